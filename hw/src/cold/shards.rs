//! The shards of a checkpoint, opened once for every way in which they are read.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// A shard, and how long it was when it was opened.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    pub(super) buffered: File,
}

impl Shard {
    fn open(path: &Path) -> io::Result<Self> {
        // Whoever opens a pipe may wait for ever.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
        }
        let buffered = File::open(path)?;
        let bytes = buffered.metadata()?.len();
        Ok(Self { path: path.to_owned(), bytes, buffered })
    }
}

/// Opens all of them, or says which cannot be.
pub(super) fn open(paths: &[PathBuf]) -> Result<Vec<Shard>, (PathBuf, io::Error)> {
    paths.iter().map(|path| Shard::open(path).map_err(|error| (path.clone(), error))).collect()
}

/// Opens them once more, for reads past the cache.
#[cfg(target_os = "linux")]
pub(super) fn open_direct(shards: &[Shard]) -> Result<Vec<File>, (PathBuf, io::Error)> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::DIRECT | OFlags::CLOEXEC;
    let open = |shard: &Shard| match rustix::fs::open(&shard.path, flags, Mode::empty()) {
        Ok(file) => Ok(File::from(file)),
        Err(error) => Err((shard.path.clone(), error.into())),
    };
    shards.iter().map(open).collect()
}

/// Opens them once more, for reads past the cache.
#[cfg(not(target_os = "linux"))]
pub(super) fn open_direct(shards: &[Shard]) -> Result<Vec<File>, (PathBuf, io::Error)> {
    let path = shards.first().map_or_else(PathBuf::new, |shard| shard.path.clone());
    Err((path, io::ErrorKind::Unsupported.into()))
}
