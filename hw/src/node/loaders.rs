//! Loaders: a few threads that read experts into slots, each packed and verified, move them between the arenas, and write
//! modified ones.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{ExpertKey, LoadId, Seq};
use lite_llm_core::input::{Fault, Input};
use lite_llm_model::{CheckpointError, ExpertLoader, ModelError};

use super::NodeError;
use super::error::panic_message;
use super::reports::{Report, Reports};
use crate::arena::SlotWriter;
use crate::blobs::Blobs;
use crate::telemetry::Timing;

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
    threads: Vec<JoinHandle<()>>,
}

impl Loaders {
    pub(crate) fn start(
        count: usize,
        loader: ExpertLoader,
        blobs: &Blobs,
        reports: &Reports,
    ) -> Result<Self, NodeError> {
        let (jobs, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let mut loaders = Self { jobs, epoch: 0, loader: Arc::new(loader), threads: Vec::new() };
        for index in 0..count.max(1) {
            let (receiver, reports) = (Arc::clone(&receiver), reports.clone());
            let blobs = blobs.clone();
            let thread = std::thread::Builder::new()
                .name(format!("loader-{index}"))
                .spawn(move || run(&blobs, &receiver, &reports))
                .map_err(|source| NodeError::System { what: "cannot start a loader thread", source })?;
            loaders.threads.push(thread);
        }
        Ok(loaders)
    }

    pub(crate) fn send(&self, job: Job) {
        // A loader that is gone has reported why.
        let _ = self.jobs.send(Asked { epoch: self.epoch, loader: Arc::clone(&self.loader), job });
    }

    /// Begins another epoch, maybe with another share of each expert.
    pub(crate) fn begin(&mut self, epoch: u64, loader: Option<ExpertLoader>) {
        self.epoch = epoch;
        if let Some(loader) = loader {
            self.loader = Arc::new(loader);
        }
    }

    /// Waits for the jobs under way, and ends the threads.
    pub(crate) fn close(self) {
        drop(self.jobs);
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

fn run(blobs: &Blobs, jobs: &Mutex<Receiver<Asked>>, reports: &Reports) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Asked { epoch, loader, job }) = job else { return };
        let began = Instant::now();
        // The slot is given back within: the engine may give it to somebody else as soon as it hears.
        let report = match catch_unwind(AssertUnwindSafe(|| work(&loader, blobs, job))) {
            Ok((input, what)) => Report::Done { epoch, input, took: Some((what, began.elapsed())) },
            Err(panic) => Report::Panicked { thread: "loader", message: panic_message(&*panic) },
        };
        if !reports.tell(report) {
            return;
        }
    }
}

fn work(loader: &ExpertLoader, blobs: &Blobs, job: Job) -> (Input, Timing) {
    match job {
        Job::Load { load, expert, blob, mut slot, keep } => {
            if let Some(mut keep) = keep {
                keep.copy_from_slice(&slot);
            }
            let result = match blob {
                Some(blob) => blobs.read(blob, &mut slot),
                None => loader.load(expert, &mut slot).map_err(|error| fault_of(expert, &error)),
            };
            (Input::Loaded { load, fault: result.err() }, Timing::Load(load.0))
        }
        Job::Promote { load, mut slot, mut warm, exchange } => {
            if exchange {
                slot.swap_with_slice(&mut warm);
            } else {
                slot.copy_from_slice(&warm);
            }
            (Input::Loaded { load, fault: None }, Timing::Promote(load.0))
        }
        Job::Persist { asked, experts } => {
            let result = experts.iter().try_for_each(|(blob, bytes)| blobs.write(*blob, bytes));
            (Input::Persisted { asked, fault: result.err() }, Timing::Persist(asked.0))
        }
    }
}

fn fault_of(expert: ExpertKey, error: &ModelError) -> Fault {
    let ExpertKey { layer, tier, group, expert } = expert;
    let what = format!("expert {expert} of layer {layer}, tier {tier}, group {group}: {error}");
    match error {
        ModelError::Checkpoint(CheckpointError::Io { .. }) => Fault::Io(what),
        ModelError::Checkpoint(CheckpointError::Corrupt { .. }) => Fault::Corrupt(what),
        ModelError::Memory { .. } => Fault::Resource(what),
        _ => Fault::Checkpoint(what),
    }
}
