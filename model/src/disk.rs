//! A directory on a real file system, locked for as long as it is open: a state directory, or an import under way.
//!
//! Files are made with mode 0600: a journal holds what users wrote.

use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use lite_llm_core::disk::{Disk, DiskError, DiskErrorKind, DiskOp};
use rustix::fs::{FlockOperation, OFlags, flock};

use crate::files;

/// The file that is locked; it is never listed.
pub(crate) const LOCK_NAME: &str = "lock";
/// Above this many open files, those with nothing unsynced are closed.
const OPEN_FILES_MAX: usize = 8;

/// Why a directory cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it open.
    #[error("the directory {} is in use by another process; stop that one or use another directory", .0.display())]
    InUse(PathBuf),
    /// The file in it that is locked cannot be had.
    #[error("cannot lock the directory {}: its file {LOCK_NAME}: {source}", path.display())]
    Lock {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
    /// The file system refused.
    #[error("cannot open the directory {}: {source}", path.display())]
    Io {
        /// The directory.
        path: PathBuf,
        /// The system's error.
        source: io::Error,
    },
}

/// One directory of files.
#[derive(Debug)]
pub struct FileDisk {
    path: PathBuf,
    directory: File,
    /// Held open for its lock; `None` when open for reading only.
    lock: Option<File>,
    /// Appended to through one descriptor until synced: the kernel reports a failed write-back to those that are open.
    open: BTreeMap<String, Appender>,
}

#[derive(Debug)]
struct Appender {
    file: File,
    unsynced: bool,
}

impl FileDisk {
    /// Opens a directory for this process alone, and makes it if there is none.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let io = |source| OpenError::Io { path: path.to_path_buf(), source };
        make_directory(path).map_err(io)?;
        let lock = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(path.join(LOCK_NAME))
            .map_err(|source| OpenError::Lock { path: path.to_path_buf(), source })?;
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(OpenError::InUse(path.to_path_buf())),
            Err(error) => return Err(io(error.into())),
        }
        let mut disk = Self::open_read_only(path)?;
        disk.lock = Some(lock);
        Ok(disk)
    }

    /// Opens a directory to look at; it may be in use by another process at the same time.
    pub fn open_read_only(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref().to_path_buf();
        // What is no directory is not opened: a pipe may never answer.
        let flags = OFlags::DIRECTORY.bits().cast_signed();
        match OpenOptions::new().read(true).custom_flags(flags).open(&path) {
            Ok(directory) => Ok(Self { path, directory, lock: None, open: BTreeMap::new() }),
            Err(source) => Err(OpenError::Io { path, source }),
        }
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn writable(&self, op: DiskOp, name: &str) -> Result<PathBuf, DiskError> {
        if self.lock.is_none() {
            let detail = "the directory is open for reading only".into();
            return Err(DiskError { op, name: name.into(), kind: DiskErrorKind::Denied, detail });
        }
        self.file_path(op, name)
    }

    fn file_path(&self, op: DiskOp, name: &str) -> Result<PathBuf, DiskError> {
        let plain = !name.is_empty() && name != LOCK_NAME && !name.starts_with('.') && !name.contains('/');
        if !plain {
            let detail = "this is no name of a file in such a directory".into();
            return Err(DiskError { op, name: name.into(), kind: DiskErrorKind::Denied, detail });
        }
        Ok(self.path.join(name))
    }

    fn appender(&mut self, op: DiskOp, name: &str) -> Result<&mut Appender, DiskError> {
        let path = self.writable(op, name)?;
        if !self.open.contains_key(name) {
            let file = OpenOptions::new().append(true).open(path).map_err(|e| error(op, name, &e))?;
            self.keep(name, Appender { file, unsynced: true });
        }
        self.open.get_mut(name).ok_or_else(|| error(op, name, &io::ErrorKind::NotFound.into()))
    }

    fn keep(&mut self, name: &str, appender: Appender) {
        if self.open.len() >= OPEN_FILES_MAX {
            self.open.retain(|_, appender| appender.unsynced);
        }
        self.open.insert(name.into(), appender);
    }
}

impl Disk for FileDisk {
    fn create_new(&mut self, name: &str) -> Result<(), DiskError> {
        let path = self.writable(DiskOp::Create, name)?;
        let file = OpenOptions::new()
            .append(true)
            .create_new(true)
            .mode(0o600)
            .open(path)
            .map_err(|e| error(DiskOp::Create, name, &e))?;
        self.keep(name, Appender { file, unsynced: true });
        Ok(())
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), DiskError> {
        let appender = self.appender(DiskOp::Append, name)?;
        appender.unsynced = true;
        appender.file.write_all(bytes).map_err(|e| error(DiskOp::Append, name, &e))
    }

    fn sync(&mut self, name: &str) -> Result<(), DiskError> {
        let appender = self.appender(DiskOp::Sync, name)?;
        appender.file.sync_data().map_err(|e| error(DiskOp::Sync, name, &e))?;
        appender.unsynced = false;
        Ok(())
    }

    fn sync_dir(&mut self) -> Result<(), DiskError> {
        let name = self.path.display().to_string();
        self.directory.sync_all().map_err(|e| error(DiskOp::SyncDir, &name, &e))
    }

    fn read_at(&mut self, name: &str, offset: u64, into: &mut [u8]) -> Result<usize, DiskError> {
        let path = self.file_path(DiskOp::Read, name)?;
        let mut read = || -> io::Result<usize> {
            let file = files::open(&path)?;
            let mut at = 0;
            while at < into.len() {
                match file.read_at(&mut into[at..], offset + at as u64) {
                    Ok(0) => break,
                    Ok(read) => at += read,
                    Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                    Err(error) => return Err(error),
                }
            }
            Ok(at)
        };
        read().map_err(|e| error(DiskOp::Read, name, &e))
    }

    fn len(&mut self, name: &str) -> Result<u64, DiskError> {
        let path = self.file_path(DiskOp::Len, name)?;
        Ok(files::regular(&path).map_err(|e| error(DiskOp::Len, name, &e))?.len())
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<(), DiskError> {
        let source = self.writable(DiskOp::Rename, from)?;
        let target = self.writable(DiskOp::Rename, to)?;
        std::fs::rename(source, target).map_err(|e| error(DiskOp::Rename, from, &e))?;
        self.open.remove(to);
        if let Some(appender) = self.open.remove(from) {
            self.open.insert(to.into(), appender);
        }
        Ok(())
    }

    fn remove(&mut self, name: &str) -> Result<(), DiskError> {
        let path = self.writable(DiskOp::Remove, name)?;
        std::fs::remove_file(path).map_err(|e| error(DiskOp::Remove, name, &e))?;
        self.open.remove(name);
        Ok(())
    }

    fn list(&mut self) -> Result<Vec<String>, DiskError> {
        let name = self.path.display().to_string();
        let read = || -> io::Result<Vec<String>> {
            let mut names = Vec::new();
            for entry in std::fs::read_dir(&self.path)? {
                let entry = entry?;
                // A link is listed wherever it leads, and whatever else has a file's name: a journal that is moved away
                // and linked to, or cannot be had now, is not an empty one.
                if let (false, Ok(name)) = (entry.file_type()?.is_dir(), entry.file_name().into_string())
                    && name != LOCK_NAME
                {
                    names.push(name);
                }
            }
            names.sort();
            Ok(names)
        };
        read().map_err(|e| error(DiskOp::List, &name, &e))
    }
}

/// Makes the directory and what is missing above it, and syncs the parent of each, so that it outlives a crash with what
/// is put in it.
fn make_directory(path: &Path) -> io::Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    let parent = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    };
    make_directory(parent)?;
    match DirBuilder::new().mode(0o700).create(path) {
        // Another process was faster; the lock decides between the two.
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => {}
        made => made?,
    }
    File::open(parent)?.sync_all()
}

fn error(op: DiskOp, name: &str, source: &io::Error) -> DiskError {
    let kind = match source.kind() {
        io::ErrorKind::NotFound => DiskErrorKind::NotFound,
        io::ErrorKind::AlreadyExists => DiskErrorKind::Exists,
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => DiskErrorKind::NoSpace,
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => DiskErrorKind::Denied,
        _ => DiskErrorKind::Io,
    };
    DiskError { op, name: name.into(), kind, detail: source.to_string() }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests;
