//! Loaders: a few threads that read experts into slots, each packed and verified, move them between the arenas, and write
//! modified ones. Where the cold tier has a reader of its own, whole blobs of shards are left to it, also those for a GPU.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{ExpertKey, LoadId, Seq};
use lite_llm_core::input::{Fault, Input};
use lite_llm_model::checkpoint::native::ExpertBlob;
use lite_llm_model::{CheckpointError, ExpertLoader, ModelError};

use super::NodeError;
use super::busy::{Busy, JOB_MAX};
use super::error::panic_message;
use super::reports::{Report, Reports};
use crate::arena::{ArenaError, SlotWriter};
use crate::blobs::Blobs;
use crate::cold::{self, Cold, Direct, Fetch, Reader, Staging, Told};
use crate::cuda::staging::Rooms;
use crate::cuda::upload::Uploads;
use crate::cuda::{CudaError, Gpu};
use crate::telemetry::Timing;

/// How long threads that are closed are waited for. A disk that hangs may hold one up for ever: then it is left to itself, with
/// the slots that it has.
const CLOSE_WAIT: Duration = Duration::from_secs(10);

/// Something to do with the bytes of experts.
#[derive(Debug)]
pub(crate) enum Job {
    /// Read an expert, of the checkpoint or as modified, into a slot of either arena; what is there goes to `keep` first.
    Load { load: LoadId, expert: ExpertKey, blob: Option<Digest>, slot: SlotWriter, keep: Option<SlotWriter> },
    /// Bring an expert from its warm slot into a hot one, or have it change places with what is there.
    Promote { load: LoadId, slot: SlotWriter, warm: SlotWriter, exchange: bool },
    /// Make modified experts durable.
    Persist { asked: Seq, experts: Vec<(Digest, Vec<u8>)> },
}

impl Job {
    /// Whether it ends in a slot of a GPU.
    fn is_for_gpu(&self) -> bool {
        match self {
            Self::Load { slot, .. } | Self::Promote { slot, .. } => slot.address().is_some(),
            Self::Persist { .. } => false,
        }
    }
}

/// A job, in which epoch, and how experts are read there.
#[derive(Debug)]
struct Asked {
    epoch: u64,
    loader: Arc<ExpertLoader>,
    job: Job,
}

/// The event loop's end of the loaders. The engine bounds how many jobs there are (`limits.loads_max`).
#[derive(Debug)]
pub(crate) struct Loaders {
    jobs: Sender<Asked>,
    /// The epoch of the jobs from now on: their answers say it.
    epoch: u64,
    loader: Arc<ExpertLoader>,
    reader: Option<Reader>,
    /// What the reader reads for a GPU passes through these.
    rooms: Option<Arc<Rooms>>,
    /// What slots of a GPU are read with, where that goes past the host.
    direct: Option<Arc<Direct>>,
    threads: Vec<JoinHandle<()>>,
    /// Nobody watches them any more once it is dropped.
    watched: Sender<()>,
}

impl Loaders {
    pub(crate) fn start(
        count: usize,
        loader: ExpertLoader,
        cold: Cold,
        blobs: &Blobs,
        gpu: Option<&Arc<Gpu>>,
        reports: &Reports,
    ) -> Result<Self, NodeError> {
        let (jobs, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let (fetch, direct) = (cold.fetch(), cold.past_host());
        let heard = reports.clone();
        let rooms = gpu.filter(|_| cold.has_reader()).map(Rooms::new);
        let staging = rooms.clone().map(|rooms| rooms as Arc<dyn Staging>);
        let reader = cold.reader_by(staging, move |told| heard.tell(report_of(told)))?;
        let (busy, (watched, closed)) = (Busy::of(count.max(1)), channel());
        let loader = Arc::new(loader);
        let threads = Vec::new();
        let mut loaders = Self { jobs, epoch: 0, loader, reader, rooms, direct, threads, watched };
        let failed = |source| NodeError::System { what: "cannot start a loader thread", source };
        let (all, heard) = (Arc::clone(&busy), reports.clone());
        let watch = std::thread::Builder::new().name("loader-watch".into());
        loaders.threads.push(watch.spawn(move || all.watch(JOB_MAX, &closed, &heard)).map_err(failed)?);
        for index in 0..count.max(1) {
            let (receiver, reports, busy) = (Arc::clone(&receiver), reports.clone(), Arc::clone(&busy));
            let direct = loaders.direct.clone();
            let sources = Sources { blobs: blobs.clone(), fetch: fetch.clone(), direct };
            let uploads = gpu.map(|gpu| Uploads::new(Arc::clone(gpu)));
            let thread = std::thread::Builder::new()
                .name(format!("loader-{index}"))
                .spawn(move || run(&sources, uploads, &receiver, &reports, (&busy, index)))
                .map_err(failed)?;
            loaders.threads.push(thread);
        }
        Ok(loaders)
    }

    pub(crate) fn send(&self, job: Job) {
        let Some(job) = self.leave_to_reader(job) else { return };
        // A loader that is gone has reported why.
        let _ = self.jobs.send(Asked { epoch: self.epoch, loader: Arc::clone(&self.loader), job });
    }

    /// The job, if it is none for the reader.
    fn leave_to_reader(&self, job: Job) -> Option<Job> {
        let (Some(reader), Job::Load { expert, blob: None, slot, .. }) = (&self.reader, &job) else {
            return Some(job);
        };
        let Some(blob) = self.loader.blob(*expert).filter(|blob| blob.bytes <= slot.bytes()) else {
            return Some(job);
        };
        let Job::Load { load, expert, slot, keep, .. } = job else { unreachable!("it was looked at") };
        reader.read(cold::Load { epoch: self.epoch, load, expert, blob, slot, keep });
        None
    }

    /// What slots of a GPU are read with, where that goes past the host.
    pub(crate) fn direct(&self) -> Option<&Direct> {
        self.direct.as_deref()
    }

    /// Takes the memory that experts of such a size pass through on their way to a GPU.
    ///
    /// # Errors
    /// If the system does not have so much that may be pinned.
    pub(crate) fn carve(&self, slot_bytes: u64) -> Result<(), ArenaError> {
        self.rooms.as_ref().map_or(Ok(()), |rooms| rooms.carve(slot_bytes))
    }

    /// Lets go of the arenas.
    pub(crate) fn release(&self) {
        if let Some(rooms) = &self.rooms {
            rooms.release();
        }
        if let Some(reader) = &self.reader {
            reader.forget(self.epoch);
        }
    }

    /// Begins another epoch, maybe with another share of each expert.
    pub(crate) fn begin(&mut self, epoch: u64, loader: Option<ExpertLoader>) {
        self.epoch = epoch;
        self.release();
        if let Some(loader) = loader {
            self.loader = Arc::new(loader);
        }
    }

    /// Waits a while for the jobs under way, and ends the threads.
    pub(crate) fn close(self) {
        let Self { jobs, reader, mut threads, watched, .. } = self;
        drop((jobs, watched));
        threads.extend(reader.into_iter().flat_map(Reader::close));
        let began = Instant::now();
        while threads.iter().any(|thread| !thread.is_finished()) && began.elapsed() < CLOSE_WAIT {
            std::thread::sleep(Duration::from_millis(1));
        }
        for thread in threads.into_iter().filter(JoinHandle::is_finished) {
            let _ = thread.join();
        }
    }
}

fn report_of(told: Told) -> Report {
    match told {
        Told::Answer(cold::Answer { epoch, load, result, took }) => {
            let input = Input::Loaded { load, fault: result.err() };
            Report::Done { epoch, input, took: Some((Timing::Load(load.0), took)) }
        }
        Told::Lost(what) => Report::Lost { what },
        Told::DeviceLost(what) => Report::DeviceLost { what },
        Told::Panicked(message) => Report::Panicked { thread: "cold reader", message },
    }
}

/// Where experts come from.
struct Sources {
    blobs: Blobs,
    fetch: Option<Fetch>,
    direct: Option<Arc<Direct>>,
}

impl Sources {
    /// What is read straight into a slot of a GPU: whole blobs of shards.
    fn direct(
        &self,
        loader: &ExpertLoader,
        expert: ExpertKey,
        slot: &SlotWriter,
    ) -> Option<(&Direct, ExpertBlob)> {
        let direct = self.direct.as_deref()?;
        let blob = loader.blob(expert).filter(|blob| blob.bytes <= slot.bytes())?;
        Some((direct, blob))
    }

    fn read(
        &self,
        loader: &ExpertLoader,
        expert: ExpertKey,
        modified: Option<Digest>,
        slot: &mut SlotWriter,
    ) -> Result<(), Fault> {
        if let Some(blob) = modified {
            return self.blobs.read(blob, slot);
        }
        match (&self.fetch, loader.blob(expert)) {
            (Some(fetch), Some(blob)) if blob.bytes <= slot.len() => fetch.read(expert, &blob, slot),
            _ => loader.load(expert, slot).map_err(|error| fault_of(expert, &error)),
        }
    }
}

fn run(
    sources: &Sources,
    mut uploads: Option<Uploads>,
    jobs: &Mutex<Receiver<Asked>>,
    reports: &Reports,
    (busy, index): (&Busy, usize),
) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Asked { epoch, loader, job }) = job else { return };
        let began = Instant::now();
        // The slot is given back within: the engine may give it to somebody else as soon as it hears.
        let worked = busy.at_job(index, || {
            catch_unwind(AssertUnwindSafe(|| work(&loader, sources, uploads.as_mut(), job)))
        });
        let report = match worked {
            Ok(Ok((input, what))) => Report::Done { epoch, input, took: Some((what, began.elapsed())) },
            Ok(Err(lost)) => Report::DeviceLost { what: lost.to_string() },
            Err(panic) => Report::Panicked { thread: "loader", message: panic_message(&*panic) },
        };
        if !reports.tell(report) {
            return;
        }
    }
}

/// Does a job. An error says that the device is lost.
fn work(
    loader: &ExpertLoader,
    sources: &Sources,
    uploads: Option<&mut Uploads>,
    job: Job,
) -> Result<(Input, Timing), CudaError> {
    // Slots of the warm arena are the host's, wherever steps read theirs.
    let uploads = uploads.filter(|_| job.is_for_gpu());
    Ok(match (job, uploads) {
        (Job::Load { load, expert, blob, slot, keep }, Some(uploads)) => {
            let loaded = match sources.direct(loader, expert, &slot).filter(|_| blob.is_none()) {
                Some((direct, blob)) => uploads.read(&slot, keep, direct, (expert, &blob)),
                None => uploads.load(&slot, keep, |room| sources.read(loader, expert, blob, room)),
            };
            let result = loaded.inspect_err(|_| uploads.lose())?;
            (Input::Loaded { load, fault: result.err() }, Timing::Load(load.0))
        }
        (Job::Promote { load, slot, mut warm, exchange }, Some(uploads)) => {
            let promoted = uploads.promote(&slot, &mut warm, exchange);
            promoted.inspect_err(|_| uploads.lose())?;
            (Input::Loaded { load, fault: None }, Timing::Promote(load.0))
        }
        (Job::Load { load, expert, blob, mut slot, keep }, _) => {
            if let Some(mut keep) = keep {
                keep.copy_from_slice(&slot);
            }
            let result = sources.read(loader, expert, blob, &mut slot);
            (Input::Loaded { load, fault: result.err() }, Timing::Load(load.0))
        }
        (Job::Promote { load, mut slot, mut warm, exchange }, _) => {
            if exchange {
                slot.swap_with_slice(&mut warm);
            } else {
                slot.copy_from_slice(&warm);
            }
            (Input::Loaded { load, fault: None }, Timing::Promote(load.0))
        }
        (Job::Persist { asked, experts }, _) => {
            let result = experts.iter().try_for_each(|(blob, bytes)| sources.blobs.write(*blob, bytes));
            (Input::Persisted { asked, fault: result.err() }, Timing::Persist(asked.0))
        }
    })
}

fn fault_of(expert: ExpertKey, error: &ModelError) -> Fault {
    let what = format!("{}: {error}", cold::Named(expert));
    match error {
        ModelError::Checkpoint(CheckpointError::Io { .. }) => Fault::Io(what),
        ModelError::Checkpoint(CheckpointError::Corrupt { .. }) => Fault::Corrupt(what),
        ModelError::Memory { .. } => Fault::Resource(what),
        _ => Fault::Checkpoint(what),
    }
}
