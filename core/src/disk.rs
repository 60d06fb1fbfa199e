//! The disk as the journal sees it: one flat directory of append-only files.
//!
//! Written bytes are volatile until [`Disk::sync`] returns, and names (created, renamed or removed) until
//! [`Disk::sync_dir`] returns. There is deliberately no truncate and no write in place: a byte that was synced is never
//! written again, so no crash can take it back.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

/// One flat directory of append-only files.
pub trait Disk {
    /// Makes an empty file; refuses with [`DiskErrorKind::Exists`] if there is one. Volatile until `sync_dir`.
    fn create_new(&mut self, name: &str) -> Result<(), DiskError>;
    /// Adds `bytes` at the end of a file. Volatile until `sync`. After an error any part may have been written.
    fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), DiskError>;
    /// Makes the file's bytes and length durable (`fdatasync`). After an error nothing unsynced may be relied on, ever.
    fn sync(&mut self, name: &str) -> Result<(), DiskError>;
    /// Makes every creation, rename and removal so far durable.
    fn sync_dir(&mut self) -> Result<(), DiskError>;
    /// Reads at `offset` into `into` and returns how many bytes were read: fewer only at the end of the file.
    fn read_at(&mut self, name: &str, offset: u64, into: &mut [u8]) -> Result<usize, DiskError>;
    /// The file's length in bytes.
    fn len(&mut self, name: &str) -> Result<u64, DiskError>;
    /// Renames a file, replacing `to` in one step. Volatile until `sync_dir`.
    fn rename(&mut self, from: &str, to: &str) -> Result<(), DiskError>;
    /// Removes a file. Volatile until `sync_dir`.
    fn remove(&mut self, name: &str) -> Result<(), DiskError>;
    /// The names in the directory, sorted.
    fn list(&mut self) -> Result<Vec<String>, DiskError>;
}

impl<D: Disk + ?Sized> Disk for &mut D {
    fn create_new(&mut self, name: &str) -> Result<(), DiskError> {
        (**self).create_new(name)
    }
    fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), DiskError> {
        (**self).append(name, bytes)
    }
    fn sync(&mut self, name: &str) -> Result<(), DiskError> {
        (**self).sync(name)
    }
    fn sync_dir(&mut self) -> Result<(), DiskError> {
        (**self).sync_dir()
    }
    fn read_at(&mut self, name: &str, offset: u64, into: &mut [u8]) -> Result<usize, DiskError> {
        (**self).read_at(name, offset, into)
    }
    fn len(&mut self, name: &str) -> Result<u64, DiskError> {
        (**self).len(name)
    }
    fn rename(&mut self, from: &str, to: &str) -> Result<(), DiskError> {
        (**self).rename(from, to)
    }
    fn remove(&mut self, name: &str) -> Result<(), DiskError> {
        (**self).remove(name)
    }
    fn list(&mut self) -> Result<Vec<String>, DiskError> {
        (**self).list()
    }
}

/// What was being done when a disk failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskOp {
    /// Making a file.
    Create,
    /// Adding bytes at the end of a file.
    Append,
    /// Making a file's bytes durable.
    Sync,
    /// Making names durable.
    SyncDir,
    /// Reading bytes.
    Read,
    /// Asking for a length.
    Len,
    /// Renaming a file.
    Rename,
    /// Removing a file.
    Remove,
    /// Listing the directory.
    List,
}

impl fmt::Display for DiskOp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Create => "create",
            Self::Append => "append to",
            Self::Sync => "sync",
            Self::SyncDir => "sync the directory of",
            Self::Read => "read",
            Self::Len => "find the length of",
            Self::Rename => "rename",
            Self::Remove => "remove",
            Self::List => "list",
        })
    }
}

/// The kinds of disk failure that callers tell apart.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskErrorKind {
    /// There is no such file.
    NotFound,
    /// There is already such a file.
    Exists,
    /// The device or quota is full.
    NoSpace,
    /// The disk was opened for reading only, or permission is lacking.
    Denied,
    /// Anything else: the device failed.
    Io,
}

/// A failed disk operation.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {op} {name}: {detail}")]
pub struct DiskError {
    /// What was being done.
    pub op: DiskOp,
    /// The file's name.
    pub name: String,
    /// What kind of failure.
    pub kind: DiskErrorKind,
    /// The system's words for it.
    pub detail: String,
}
