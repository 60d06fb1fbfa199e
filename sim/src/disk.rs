//! A simulated disk under the real journal code: sectors, a volatile cache, names apart from bytes.
//!
//! Rules of the faults. What was synced stays. At a crash each sector that holds unsynced bytes ends in any state, its
//! synced bytes included, and the file's length anywhere between the synced and the current one; each name that was not
//! synced with its directory is the old or the new one. The operation under way may have happened or not. While
//! running, any operation can fail; a failed sync drops its dirty bytes for good.

use crate::random::Choice;
use lite_llm_core::disk::{Disk, DiskError, DiskErrorKind, DiskOp};
use std::collections::BTreeMap;

/// Bytes of a sector.
pub const SECTOR: usize = 512;

/// How unsynced sectors, lengths and names end in a crash.
#[derive(Clone, Debug)]
pub enum Ending {
    /// None of it happened.
    Old,
    /// All of it happened.
    New,
    /// Lengths and names happened, bytes are zero.
    Zero,
    /// Lengths and names happened, bytes are anything.
    Garbage,
    /// Lengths and names happened; the first half of each sector did.
    Torn,
    /// Each by itself, by a seed.
    Any(Box<Choice>),
}

/// A fault while running.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The machine dies: this operation is not acknowledged, and no later one happens.
    Crash,
    /// The operation fails.
    Io,
    /// The disk is full; half of an append is written.
    NoSpace,
}

#[derive(Clone, Debug, Default)]
struct File {
    /// As programs see it.
    bytes: Vec<u8>,
    /// How much of it is synced.
    synced: usize,
    /// A stretch that a failed sync dropped.
    dropped: Option<(usize, usize)>,
}

/// A simulated disk.
#[derive(Clone, Debug, Default)]
pub struct SimDisk {
    files: Vec<File>,
    names: BTreeMap<String, usize>,
    names_synced: BTreeMap<String, usize>,
    operations: u64,
    fault: Option<(u64, Fault)>,
    crashed: bool,
}

impl SimDisk {
    /// An empty disk.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Operations that change something, so far.
    #[must_use]
    pub const fn operations(&self) -> u64 {
        self.operations
    }

    /// Lets the operation of this number fail, counted from now on.
    pub fn fail_at(&mut self, operation: u64, fault: Fault) {
        self.operations = 0;
        self.fault = Some((operation, fault));
    }

    /// No more faults.
    pub const fn heal(&mut self) {
        self.fault = None;
    }

    /// Changes a byte that was synced, as rot does.
    ///
    /// # Panics
    /// If there is no such file or byte.
    pub fn rot(&mut self, name: &str, at: usize, mask: u8) {
        self.files[self.names[name]].bytes[at] ^= mask;
    }

    /// Cuts a file, as a careless operator does.
    ///
    /// # Panics
    /// If there is no such file.
    pub fn cut(&mut self, name: &str, len: usize) {
        let file = &mut self.files[self.names[name]];
        file.bytes.truncate(len);
        file.synced = file.synced.min(len);
    }

    /// The machine dies and comes back with what the ending leaves.
    pub fn crash(&mut self, ending: &mut Ending) {
        let names: Vec<String> = self.names.keys().chain(self.names_synced.keys()).cloned().collect();
        for name in names {
            let (old, new) = (self.names_synced.get(&name).copied(), self.names.get(&name).copied());
            let happened = match ending {
                Ending::Old => false,
                Ending::New | Ending::Zero | Ending::Garbage | Ending::Torn => true,
                Ending::Any(choice) => choice.chance(500),
            };
            match if happened { new } else { old } {
                Some(file) => self.names.insert(name, file),
                None => self.names.remove(&name),
            };
        }
        self.names_synced = self.names.clone();
        for file in &mut self.files {
            file.crash(ending);
        }
        (self.fault, self.crashed) = (None, false);
    }

    /// Counts an operation and says whether it fails. A crash happens after the operation, unacknowledged.
    fn fault(&mut self) -> Option<Fault> {
        if self.crashed {
            return Some(Fault::Crash);
        }
        self.operations += 1;
        let fault = self.fault.filter(|&(at, _)| at + 1 == self.operations).map(|(_, fault)| fault);
        self.crashed = fault == Some(Fault::Crash);
        fault
    }

    fn find(&self, op: DiskOp, name: &str) -> Result<usize, DiskError> {
        self.names.get(name).copied().ok_or_else(|| error(op, name, DiskErrorKind::NotFound))
    }
}

impl File {
    fn crash(&mut self, ending: &mut Ending) {
        if let Some((start, end)) = self.dropped.take() {
            self.bytes[start..end].fill(0);
        }
        let (synced, len) = (self.synced, self.bytes.len());
        if synced == len {
            return;
        }
        let keep = match ending {
            Ending::Old => synced,
            Ending::New | Ending::Zero | Ending::Garbage | Ending::Torn => len,
            Ending::Any(choice) => synced + choice.index(len - synced + 1),
        };
        self.bytes.truncate(keep);
        let mut start = synced / SECTOR * SECTOR;
        while start < keep {
            let end = keep.min(start + SECTOR);
            let unsynced = start.max(synced);
            let state = match ending {
                Ending::Old | Ending::New => 0,
                Ending::Zero => 1,
                Ending::Garbage => 2,
                Ending::Torn => 3,
                Ending::Any(choice) => choice.below(4),
            };
            match state {
                1 => self.bytes[unsynced..end].fill(0),
                2 => {
                    // The whole sector, what was synced in it too.
                    for (i, byte) in self.bytes[start..end].iter_mut().enumerate() {
                        *byte =
                            byte.wrapping_mul(167).wrapping_add(u8::try_from(i % 251).unwrap_or(0)) ^ 0x5a;
                    }
                }
                3 => {
                    let middle = (start + SECTOR / 2).clamp(unsynced, end);
                    self.bytes[middle..end].fill(0);
                }
                _ => {}
            }
            start = end;
        }
        self.synced = keep;
    }
}

fn error(op: DiskOp, name: &str, kind: DiskErrorKind) -> DiskError {
    DiskError { op, name: name.into(), kind, detail: "simulated".into() }
}

fn failed(op: DiskOp, name: &str, fault: Fault) -> DiskError {
    error(op, name, if fault == Fault::NoSpace { DiskErrorKind::NoSpace } else { DiskErrorKind::Io })
}

impl Disk for SimDisk {
    fn create_new(&mut self, name: &str) -> Result<(), DiskError> {
        if self.crashed {
            return Err(failed(DiskOp::Create, name, Fault::Crash));
        }
        if self.names.contains_key(name) {
            return Err(error(DiskOp::Create, name, DiskErrorKind::Exists));
        }
        let fault = self.fault();
        if fault.is_none_or(|fault| fault == Fault::Crash) {
            self.names.insert(name.into(), self.files.len());
            self.files.push(File::default());
        }
        fault.map_or(Ok(()), |fault| Err(failed(DiskOp::Create, name, fault)))
    }

    fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), DiskError> {
        let file = self.find(DiskOp::Append, name)?;
        if self.crashed {
            return Err(failed(DiskOp::Append, name, Fault::Crash));
        }
        let fault = self.fault();
        let written = match fault {
            None | Some(Fault::Crash) => bytes.len(),
            Some(Fault::NoSpace) => bytes.len() / 2,
            Some(Fault::Io) => 0,
        };
        self.files[file].bytes.extend_from_slice(&bytes[..written]);
        fault.map_or(Ok(()), |fault| Err(failed(DiskOp::Append, name, fault)))
    }

    fn sync(&mut self, name: &str) -> Result<(), DiskError> {
        let file = self.find(DiskOp::Sync, name)?;
        let fault = self.fault();
        let file = &mut self.files[file];
        match fault {
            None => file.synced = file.bytes.len(),
            Some(Fault::Crash) => {}
            Some(Fault::Io | Fault::NoSpace) => {
                // The kernel reports once and forgets: the bytes are in the cache, clean, and on no disk.
                let start = file.dropped.map_or(file.synced, |(start, _)| start);
                file.dropped = Some((start, file.bytes.len()));
            }
        }
        fault.map_or(Ok(()), |fault| Err(failed(DiskOp::Sync, name, fault)))
    }

    fn sync_dir(&mut self) -> Result<(), DiskError> {
        let fault = self.fault();
        if fault.is_none() {
            self.names_synced = self.names.clone();
        }
        fault.map_or(Ok(()), |fault| Err(failed(DiskOp::SyncDir, "", fault)))
    }

    fn read_at(&mut self, name: &str, offset: u64, into: &mut [u8]) -> Result<usize, DiskError> {
        let file = &self.files[self.find(DiskOp::Read, name)?].bytes;
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(file.len());
        let len = into.len().min(file.len() - start);
        into[..len].copy_from_slice(&file[start..start + len]);
        Ok(len)
    }

    fn len(&mut self, name: &str) -> Result<u64, DiskError> {
        Ok(self.files[self.find(DiskOp::Len, name)?].bytes.len() as u64)
    }

    fn rename(&mut self, from: &str, to: &str) -> Result<(), DiskError> {
        let file = self.find(DiskOp::Rename, from)?;
        if self.crashed {
            return Err(failed(DiskOp::Rename, from, Fault::Crash));
        }
        let fault = self.fault();
        if fault.is_none_or(|fault| fault == Fault::Crash) {
            self.names.remove(from);
            self.names.insert(to.into(), file);
        }
        fault.map_or(Ok(()), |fault| Err(failed(DiskOp::Rename, from, fault)))
    }

    fn remove(&mut self, name: &str) -> Result<(), DiskError> {
        self.find(DiskOp::Remove, name)?;
        if self.crashed {
            return Err(failed(DiskOp::Remove, name, Fault::Crash));
        }
        let fault = self.fault();
        if fault.is_none_or(|fault| fault == Fault::Crash) {
            self.names.remove(name);
        }
        fault.map_or(Ok(()), |fault| Err(failed(DiskOp::Remove, name, fault)))
    }

    fn list(&mut self) -> Result<Vec<String>, DiskError> {
        Ok(self.names.keys().cloned().collect())
    }
}
