//! Which way experts are read: as the operator says, or the best that there is, and why not a better one.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use lite_llm_model::ExpertLoader;
use serde::{Deserialize, Serialize};

use super::blocks::{self, Blocks, Buffered, Mapped};
use super::direct::Direct;
use super::fetch::Fetch;
use super::reader::{Bounds, Reader, Tell, Told};
use super::shards::{Shard, open, open_direct};
use super::staging::Staging;
use crate::cuda::Gpu;
use crate::cuda::cufile::Missing;
use crate::cuda::staging::rooms;

/// A way to read experts.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Io {
    /// One thread with many direct reads in flight (io_uring).
    Uring,
    /// A pool of threads that each read one expert, past the cache where the file system allows.
    Pread,
    /// The same pool, through maps of the shards and the system's cache.
    Mmap,
    /// The same pool, straight into memory of a GPU (GPUDirect Storage).
    Direct,
}

impl fmt::Display for Io {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uring => "uring",
            Self::Pread => "pread",
            Self::Mmap => "mmap",
            Self::Direct => "direct",
        })
    }
}

/// Why experts cannot be read as they should.
#[derive(Debug, thiserror::Error)]
pub enum ColdError {
    /// A way that was asked for cannot be had.
    #[error(
        "experts cannot be read with {io}: {why}; {remedy}, or leave the choice out (--io, or io in the configuration)"
    )]
    Refused {
        /// The way.
        io: Io,
        /// Why not.
        why: String,
        /// What to do.
        remedy: String,
    },
    /// A shard cannot be opened.
    #[error("cannot open {}: {error}; is the checkpoint complete?", path.display())]
    Shard {
        /// The shard.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// Threads cannot be had.
    #[error("cannot start the threads that read experts: {0}")]
    Threads(io::Error),
}

/// Why a way cannot be had, and what to do.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Absent {
    why: String,
    remedy: String,
}

impl From<Missing> for Absent {
    fn from(missing: Missing) -> Self {
        Self { why: missing.why, remedy: missing.remedy.into() }
    }
}

impl Absent {
    fn refuse(self, io: Io) -> ColdError {
        ColdError::Refused { io, why: self.why, remedy: self.remedy }
    }
}

/// The way that was chosen, ready to read.
#[derive(Debug)]
pub struct Cold {
    pub(super) fetch: Option<Fetch>,
    #[cfg(target_os = "linux")]
    pub(super) ring: Option<super::ring::Ring>,
    /// What slots of a GPU are read with, past the host.
    direct: Option<Arc<Direct>>,
    io: Option<Io>,
    report: String,
}

impl Cold {
    /// Chooses how the experts of a checkpoint are read: as asked, or as well as it can be. Up to `slots_bytes` of slots will be
    /// read into.
    ///
    /// # Errors
    /// If a shard cannot be opened, or the way that is asked for cannot be had.
    pub fn open(asked: Option<Io>, loader: &ExpertLoader, slots_bytes: u64) -> Result<Self, ColdError> {
        // Said before anything of the checkpoint, which would be no help.
        if asked == Some(Io::Direct) { Err(no_gpu()) } else { Self::choose(asked, loader, slots_bytes) }
    }

    fn choose(asked: Option<Io>, loader: &ExpertLoader, slots_bytes: u64) -> Result<Self, ColdError> {
        let shards = loader.shards();
        if !shards.is_empty() && !loader.cuts() {
            return Self::of_shards(asked, &shards, slots_bytes);
        }
        let (report, remedy) = match (loader.packs(), loader.cuts()) {
            (true, _) => {
                ("experts are packed from mapped tensors", "import the checkpoint (lite-llm import)")
            }
            (false, true) => {
                ("each rank cuts its rows out of experts that its loaders read", "share no rows (tp=1)")
            }
            (false, false) => ("", ""),
        };
        let refused = |io: &Io| !report.is_empty() && (*io != Io::Mmap || loader.cuts());
        if let Some(io) = asked.filter(refused) {
            return Err(Absent { why: report.into(), remedy: remedy.into() }.refuse(io));
        }
        let report = report.into();
        Ok(Self {
            fetch: None,
            #[cfg(target_os = "linux")]
            ring: None,
            direct: None,
            io: None,
            report,
        })
    }

    /// The same of experts for a GPU: they are read straight into it, or into rooms of the host, which are as large as slots.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn open_for(
        gpu: &Arc<Gpu>,
        asked: Option<Io>,
        loader: &ExpertLoader,
        slot_bytes: u64,
    ) -> Result<Self, ColdError> {
        let rooms = rooms(slot_bytes);
        let paths = loader.shards();
        if paths.is_empty() || loader.cuts() || asked.is_some_and(|io| io != Io::Direct) {
            return Self::open_staged(asked, loader, rooms, slot_bytes);
        }
        match Self::direct(gpu, &paths)? {
            Ok(cold) => Ok(cold),
            Err(missing) if asked.is_some() => Err(Absent::from(missing).refuse(Io::Direct)),
            Err(Missing { why, .. }) => {
                let mut cold = Self::open_staged(None, loader, rooms, slot_bytes)?;
                let better = format!("; not straight into memory of the GPU: {why}");
                cold.report.push_str(&better);
                Ok(cold)
            }
        }
    }

    /// Whether the nodes of a cluster that have GPUs could read so: as this GPU could, or, without one, as far as it can be told. Each
    /// node chooses for itself.
    ///
    /// # Errors
    /// As above.
    pub fn check_for_gpus(
        gpu: Option<&Arc<Gpu>>,
        asked: Option<Io>,
        loader: &ExpertLoader,
        slot_bytes: u64,
    ) -> Result<(), ColdError> {
        let checked = match gpu {
            Some(gpu) => Self::open_for(gpu, asked, loader, slot_bytes),
            None => {
                let asked = asked.filter(|&io| io != Io::Direct);
                Self::open_staged(asked, loader, rooms(slot_bytes), slot_bytes)
            }
        };
        checked.map(drop)
    }

    /// What is not read into the GPU, as experts for the warm arena, is read with `pread`.
    fn direct(gpu: &Arc<Gpu>, paths: &[PathBuf]) -> Result<Result<Self, Missing>, ColdError> {
        let shards: Arc<[Shard]> =
            open(paths).map_err(|(path, error)| ColdError::Shard { path, error })?.into();
        let direct = match Direct::open(gpu, &shards) {
            Ok(direct) => direct,
            Err(missing) => return Ok(Err(missing)),
        };
        let report = format!("experts are read {}, and verified after a copy back", direct.report());
        let direct = Some(Arc::new(direct));
        Ok(Ok(Self { io: Some(Io::Direct), report, direct, ..Self::pread(shards, None) }))
    }

    fn open_staged(
        asked: Option<Io>,
        loader: &ExpertLoader,
        rooms: u32,
        slot_bytes: u64,
    ) -> Result<Self, ColdError> {
        let mut cold = Self::choose(asked, loader, u64::from(rooms).saturating_mul(slot_bytes))?;
        match cold.io {
            Some(Io::Uring) => {
                let ahead =
                    format!("; those are {rooms} slots of pinned memory, and copied to the GPU from there");
                cold.report.push_str(&ahead);
            }
            Some(Io::Pread | Io::Mmap) => {
                cold.report.push_str("; each into pinned memory, and copied to the GPU from there");
            }
            Some(Io::Direct) | None => {}
        }
        Ok(cold)
    }

    /// The same, of shards that need not be a checkpoint's.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn of_shards(asked: Option<Io>, paths: &[PathBuf], slots_bytes: u64) -> Result<Self, ColdError> {
        let shards: Arc<[Shard]> =
            open(paths).map_err(|(path, error)| ColdError::Shard { path, error })?.into();
        match asked {
            Some(Io::Uring) => Self::uring(&shards, slots_bytes).map_err(|absent| absent.refuse(Io::Uring)),
            Some(Io::Pread) => Ok(Self::pread(shards, None)),
            Some(Io::Mmap) => Self::mmap(shards).map_err(|absent| absent.refuse(Io::Mmap)),
            Some(Io::Direct) => Err(no_gpu()),
            None => Ok(match Self::uring(&shards, slots_bytes) {
                Ok(cold) => cold,
                Err(absent) => Self::pread(shards, Some(absent)),
            }),
        }
    }

    #[cfg(target_os = "linux")]
    fn uring(shards: &Arc<[Shard]>, slots_bytes: u64) -> Result<Self, Absent> {
        let files = open_direct(shards).map_err(|(path, error)| no_direct(&path, &error))?;
        readable(shards, &files)?;
        let mut ring = super::ring::Ring::open(files).map_err(|error| no_uring(&error))?;
        let registered = match ring.allow_buffers(slots_bytes) {
            Ok(()) => "into registered slots".to_owned(),
            Err(why) => format!("into slots that are not registered with the kernel, since {why}"),
        };
        let files = if ring.has_registered_files() { "" } else { ", from files that it refuses to register" };
        let report = format!("experts are read with io_uring, past the cache, {registered}{files}");
        let blocks: Arc<dyn Blocks> = Arc::new(Buffered(Arc::clone(shards)));
        let fetch = Some(Fetch { blocks, shards: Arc::clone(shards) });
        Ok(Self { fetch, ring: Some(ring), direct: None, io: Some(Io::Uring), report })
    }

    #[cfg(not(target_os = "linux"))]
    fn uring(_: &Arc<[Shard]>, _: u64) -> Result<Self, Absent> {
        let why = "this system has no io_uring".into();
        Err(Absent { why, remedy: "give pread".into() })
    }

    /// Always there: what cannot be read past the cache is read through it.
    fn pread(shards: Arc<[Shard]>, better: Option<Absent>) -> Self {
        let direct = open_direct(&shards).map_err(|(path, error)| no_direct(&path, &error));
        let direct = direct.and_then(|files| readable(&shards, &files).map(|()| files));
        let (blocks, how): (Arc<dyn Blocks>, _) = match direct {
            Ok(direct) => (
                Arc::new(blocks::Direct { shards: Arc::clone(&shards), direct }),
                "past the cache".to_owned(),
            ),
            Err(Absent { why, .. }) if better.as_ref().is_some_and(|better| better.why == why) => {
                (Arc::new(Buffered::new(Arc::clone(&shards))), "through the cache".to_owned())
            }
            Err(Absent { why, .. }) => {
                (Arc::new(Buffered::new(Arc::clone(&shards))), format!("through the cache, since {why}"))
            }
        };
        let better =
            better.map_or_else(String::new, |Absent { why, .. }| format!("; not with io_uring: {why}"));
        let report = format!("experts are read with pread, {how}{better}");
        Self::blocking(Io::Pread, Fetch { blocks, shards }, report)
    }

    fn mmap(shards: Arc<[Shard]>) -> Result<Self, Absent> {
        let mapped = Mapped::new(&shards).map_err(|error| Absent {
            why: format!("the shards cannot be mapped: {error}"),
            remedy: "give pread".into(),
        })?;
        let fetch = Fetch { blocks: Arc::new(mapped), shards };
        Ok(Self::blocking(Io::Mmap, fetch, "experts are read with mmap, through the cache".into()))
    }

    fn blocking(io: Io, fetch: Fetch, report: String) -> Self {
        Self {
            fetch: Some(fetch),
            #[cfg(target_os = "linux")]
            ring: None,
            direct: None,
            io: Some(io),
            report,
        }
    }

    /// The way; `None` if experts are not read from shards.
    pub const fn io(&self) -> Option<Io> {
        self.io
    }

    /// Which way it is and why not a better one, for people; empty if there are no experts.
    pub fn report(&self) -> &str {
        &self.report
    }

    /// What any thread reads experts with; `None` if they are not read from shards.
    pub fn fetch(&self) -> Option<Fetch> {
        self.fetch.clone()
    }

    /// What slots of a GPU are read with, where that goes past the host.
    pub(crate) fn past_host(&self) -> Option<Arc<Direct>> {
        self.direct.clone()
    }

    /// Starts the reader, if the way has one. `tell` is called on its threads, and says whether anybody heard.
    ///
    /// # Errors
    /// If its threads cannot be had.
    pub fn reader(
        self,
        tell: impl Fn(Told) -> bool + Send + Sync + 'static,
    ) -> Result<Option<Reader>, ColdError> {
        self.reader_by(None, tell)
    }

    /// The same, for slots that are read by way of rooms.
    ///
    /// # Errors
    /// As above.
    pub(crate) fn reader_by(
        self,
        staging: Option<Arc<dyn Staging>>,
        tell: impl Fn(Told) -> bool + Send + Sync + 'static,
    ) -> Result<Option<Reader>, ColdError> {
        let tell: Tell = Arc::new(tell);
        #[cfg(target_os = "linux")]
        if let (Some(ring), Some(fetch)) = (self.ring, self.fetch) {
            let reader = Reader::start(ring, fetch, Bounds::default(), staging, tell);
            return reader.map(Some).map_err(ColdError::Threads);
        }
        drop((staging, tell));
        Ok(None)
    }

    /// Whether one thread has all loads of whole blobs.
    pub(crate) fn has_reader(&self) -> bool {
        self.io == Some(Io::Uring)
    }
}

/// Whether a GPU could have experts straight from such a file, or why not and what to do, for people.
pub fn direct_report(gpu: &Arc<Gpu>, file: &Path) -> String {
    match Direct::look(gpu, file) {
        Ok(how) => how,
        Err(Missing { why, remedy }) => {
            format!("by way of the host, not straight into memory of the GPU: {why}; {remedy}")
        }
    }
}

/// Whether direct reads are not only opened but done: some file systems and devices refuse late, or want larger blocks.
fn readable(shards: &Arc<[Shard]>, files: &[std::fs::File]) -> Result<(), Absent> {
    let (Some(shard), Some(file)) = (shards.first(), files.first()) else { return Ok(()) };
    let read = memmap2::MmapMut::map_anon(super::BLOCK)
        .and_then(|mut page| std::os::unix::fs::FileExt::read_at(file, &mut page, 0));
    read.map(drop).map_err(|error| no_direct(&shard.path, &error))
}

fn no_gpu() -> ColdError {
    let why = "it reads into memory of a GPU, and here experts are read into the host's".into();
    Absent { why, remedy: "give --device cuda".into() }.refuse(Io::Direct)
}

fn no_direct(path: &Path, error: &io::Error) -> Absent {
    let why = format!("{} cannot be read past the cache (O_DIRECT): {error}", path.display());
    Absent { why, remedy: "put the checkpoint on a file system that can, or give pread".into() }
}

#[cfg(target_os = "linux")]
fn no_uring(error: &io::Error) -> Absent {
    let remedy = match error.kind() {
        io::ErrorKind::PermissionDenied => {
            "allow it (kernel.io_uring_disabled, or the sandbox), or give pread"
        }
        io::ErrorKind::OutOfMemory => "raise the limit of locked memory (ulimit -l), or give pread",
        _ => "give pread",
    };
    Absent { why: format!("io_uring does not work here: {error}"), remedy: remedy.into() }
}
