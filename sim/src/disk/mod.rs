//! A simulated disk under the real journal code: sectors, a volatile cache, names apart from bytes.
//!
//! Rules of the faults. What was synced stays. At a crash each sector that holds unsynced bytes ends in any state, its
//! synced bytes included, and the file's length anywhere between the synced and the current one; each name that was not
//! synced with its directory is the old or the new one. The operation under way may have happened or not. While
//! running, any operation can fail; a failed sync drops its dirty bytes for good. Under the decisions of a run the disk
//! also lies: writes that are nowhere or elsewhere, reads of another place or time, bits that rot, sectors that go.

mod media;
mod sectors;
mod wear;

pub use media::Ending;

use crate::atlas::Atlas;
use crate::decision::Decisions;
use lite_llm_core::disk::{Disk, DiskError, DiskErrorKind, DiskOp};
use media::File;
use std::collections::BTreeMap;
use wear::{ReadFault, Wear};

/// Bytes of a sector, unless the disk has larger ones.
pub const SECTOR: usize = 512;

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

/// A simulated disk.
#[derive(Clone, Debug)]
pub struct SimDisk {
    files: Vec<File>,
    names: BTreeMap<String, usize>,
    names_synced: BTreeMap<String, usize>,
    operations: u64,
    fault: Option<(u64, Fault)>,
    crashed: bool,
    sector_bytes: usize,
    wear: Option<Wear>,
}

impl Default for SimDisk {
    fn default() -> Self {
        Self {
            files: Vec::new(),
            names: BTreeMap::new(),
            names_synced: BTreeMap::new(),
            operations: 0,
            fault: None,
            crashed: false,
            sector_bytes: SECTOR,
            wear: None,
        }
    }
}

impl SimDisk {
    /// An empty disk.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// An empty disk of a node, with sectors of this size, under the decisions of a run.
    #[must_use]
    pub fn of_node(node: u32, sector_bytes: usize, decisions: Decisions, atlas: Atlas) -> Self {
        Self { sector_bytes, wear: Some(Wear::new(decisions, atlas, node)), ..Self::default() }
    }

    /// The same node's second disk: what befalls it is decided apart.
    #[must_use]
    pub fn second(mut self) -> Self {
        if let Some(wear) = &mut self.wear {
            wear.second = true;
        }
        self
    }

    /// How long the operations since the last call took, in nanoseconds.
    pub fn take_ns(&mut self) -> u64 {
        self.wear.as_mut().map_or(0, |wear| std::mem::take(&mut wear.took_ns))
    }

    /// A new disk in the place of this one: everything on it is gone.
    pub fn replace(&mut self) {
        let (sector_bytes, wear) = (self.sector_bytes, self.wear.take());
        *self = Self { sector_bytes, wear, ..Self::default() };
    }

    /// What is on it now, without any fault of reading it.
    #[must_use]
    pub fn honest(&self) -> Self {
        Self { wear: None, fault: None, crashed: false, ..self.clone() }
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
        self.files[self.names[name]].bytes.change_each(at..at + 1, |_, byte| byte[0] ^= mask);
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
            if old == new {
                continue;
            }
            match if ending.name_happened(&mut self.wear) { new } else { old } {
                Some(file) => self.names.insert(name, file),
                None => self.names.remove(&name),
            };
        }
        self.names_synced = self.names.clone();
        for file in &mut self.files {
            file.crash(ending, self.sector_bytes, &mut self.wear);
        }
        (self.fault, self.crashed) = (None, false);
    }

    /// Counts an operation and says whether it fails. A crash happens after the operation, unacknowledged.
    fn fault(&mut self, op: DiskOp) -> Option<Fault> {
        if self.crashed {
            return Some(Fault::Crash);
        }
        self.operations += 1;
        let fault = self.fault.filter(|&(at, _)| at + 1 == self.operations).map(|(_, fault)| fault);
        self.crashed = fault == Some(Fault::Crash);
        fault.or_else(|| self.wear.as_mut().and_then(|wear| wear.change(op)))
    }

    /// The stretch that was appended last is on no medium, or is where other bytes were.
    fn lie(&mut self, name: &str, file: usize, len: usize) {
        let Some(lie) = self.wear.as_mut().and_then(|wear| wear.append_lies(name)) else { return };
        let end = self.files[file].bytes.len();
        self.files[file].dropped.push(end - len..end);
        if let Some(value) = lie {
            let victim = &mut self.files[file];
            let sectors = (victim.synced / self.sector_bytes).max(1) as u64;
            let start = usize::try_from(value % sectors).unwrap_or(0) * self.sector_bytes;
            let victim_end = victim.synced.min(start + len.min(self.sector_bytes));
            if start < victim_end {
                let mut bytes = vec![0; victim_end - start];
                victim.bytes.read(end - len, &mut bytes);
                victim.bytes.change_each(start..victim_end, |at, part| {
                    part.copy_from_slice(&bytes[at - start..][..part.len()]);
                });
            }
        }
    }

    fn find(&self, op: DiskOp, name: &str) -> Result<usize, DiskError> {
        self.names.get(name).copied().ok_or_else(|| error(op, name, DiskErrorKind::NotFound))
    }
}

/// An index below `len`, which is not 0.
fn pick(value: u64, len: usize) -> usize {
    usize::try_from((value & ((1 << 60) - 1)) % len as u64).expect("below a usize")
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
        let fault = self.fault(DiskOp::Create);
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
        let fault = self.fault(DiskOp::Append);
        let written = match fault {
            None | Some(Fault::Crash) => bytes.len(),
            Some(Fault::NoSpace) => bytes.len() / 2,
            Some(Fault::Io) => 0,
        };
        self.files[file].bytes.extend(&bytes[..written]);
        if fault.is_none() && !bytes.is_empty() {
            self.lie(name, file, written);
        }
        fault.map_or(Ok(()), |fault| Err(failed(DiskOp::Append, name, fault)))
    }

    fn sync(&mut self, name: &str) -> Result<(), DiskError> {
        let file = self.find(DiskOp::Sync, name)?;
        let fault = self.fault(DiskOp::Sync);
        let file = &mut self.files[file];
        match fault {
            None => file.synced = file.bytes.len(),
            Some(Fault::Crash) => {}
            Some(Fault::Io | Fault::NoSpace) => {
                // The kernel reports once and forgets: the bytes are in the cache, clean, and on no disk.
                file.dropped.push(file.synced..file.bytes.len());
            }
        }
        fault.map_or(Ok(()), |fault| Err(failed(DiskOp::Sync, name, fault)))
    }

    fn sync_dir(&mut self) -> Result<(), DiskError> {
        let fault = self.fault(DiskOp::SyncDir);
        if fault.is_none() {
            self.names_synced = self.names.clone();
        }
        fault.map_or(Ok(()), |fault| Err(failed(DiskOp::SyncDir, "", fault)))
    }

    fn read_at(&mut self, name: &str, offset: u64, into: &mut [u8]) -> Result<usize, DiskError> {
        let at = self.find(DiskOp::Read, name)?;
        let fault = self.wear.as_mut().and_then(|wear| wear.read(name));
        let (file, sector) = (&mut self.files[at], self.sector_bytes);
        let mut start = usize::try_from(offset).unwrap_or(usize::MAX).min(file.bytes.len());
        let len = into.len().min(file.bytes.len() - start);
        let range = start..start + len;
        let fail = || error(DiskOp::Read, name, DiskErrorKind::Io);
        match fault {
            Some(ReadFault::Error) => return Err(fail()),
            Some(ReadFault::Unreadable(value)) if len > 0 => {
                let at = start + pick(value, len);
                file.unreadable.insert(at / sector);
            }
            Some(ReadFault::Rot(value)) if len > 0 => {
                let at = start + pick(value, len);
                file.bytes.change_each(at..at + 1, |_, byte| byte[0] ^= 1 << (value >> 61));
            }
            Some(ReadFault::Misdirected(value)) => {
                start = pick(value, file.bytes.len() - len + 1) / sector * sector;
            }
            Some(ReadFault::Stale | ReadFault::Unreadable(_) | ReadFault::Rot(_)) | None => {}
        }
        if File::sectors(&range, sector).any(|number| file.unreadable.contains(&number)) {
            return Err(fail());
        }
        file.bytes.read(start, &mut into[..len]);
        if fault == Some(ReadFault::Stale) {
            // The newest sector as it was before it was written.
            let newest = len - len.min(sector);
            into[newest..len].fill(0);
        }
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
        let fault = self.fault(DiskOp::Rename);
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
        let fault = self.fault(DiskOp::Remove);
        if fault.is_none_or(|fault| fault == Fault::Crash) {
            self.names.remove(name);
        }
        fault.map_or(Ok(()), |fault| Err(failed(DiskOp::Remove, name, fault)))
    }

    fn list(&mut self) -> Result<Vec<String>, DiskError> {
        Ok(self.names.keys().cloned().collect())
    }
}

#[cfg(test)]
mod tests;
