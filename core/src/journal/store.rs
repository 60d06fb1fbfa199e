//! Writing a journal: records are buffered, then flushed as one commit group.
//!
//! Every file is first written aside, synced, renamed and synced with its directory, so a segment or snapshot under its
//! final name always has a whole header. Only one group is in flight: the next is written after the sync of the last.
//! The first failed write or sync poisons the store; only opening the journal again can tell what is on disk.

use crate::plant::{self, Bug};
use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::frame::{
    ASIDE, BLOCK_BYTES, GROUP_BYTES_MAX, PAYLOAD_BYTES_MAX, REPLACING, SEGMENT_BYTES_MAX, SNAPSHOT_BYTES_MAX,
    SNAPSHOT_HEADER_BYTES, SegmentHeader, SnapshotHeader, Tag, encode_group, frame_bytes, parse_segment_name,
    parse_snapshot_name, segment_name, snapshot_name,
};
use super::recovery::{Cut, read};
use super::{Header, JournalError, Record, Snapshot};
use crate::disk::Disk;

/// A segment is ended when it would become longer than this.
pub const SEGMENT_BYTES: u64 = 64 << 20;

/// What was on disk when a journal was opened. All of it is durable.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recovered {
    /// The newest snapshot; with another logic version it is to be migrated, and `records` is empty.
    pub snapshot: Option<Snapshot>,
    /// The records from the snapshot on (or from 1 on), without gaps.
    pub records: Vec<Record>,
    /// The torn tail that was left out.
    pub cut: Option<Cut>,
    /// A torn tail was left out, now or at an earlier opening, and [`Store::whole`] has not been called since.
    pub torn: bool,
    /// The incarnation that began this journal on an empty disk: this one, if there was none.
    pub began: u64,
    /// The incarnation that last opened this journal.
    pub incarnation: Option<u64>,
}

/// A journal open for writing.
#[derive(Debug)]
pub struct Store<D: Disk> {
    disk: D,
    header: Header,
    active: Active,
    buffer: Vec<Record>,
    buffer_bytes: usize,
    durable: u64,
    snapshot_next: u64,
    segment_bytes: u64,
    torn: bool,
    began: u64,
    poisoned: bool,
}

/// The segment that groups are added to.
#[derive(Debug)]
struct Active {
    name: String,
    index: u64,
    tag: Tag,
    bytes: u64,
}

impl<D: Disk> Store<D> {
    /// Opens the journal on `disk`, or begins one on an empty disk.
    ///
    /// What was read may exist only in the page cache, so every record not known to be durable is copied into a new
    /// segment, synced with its directory, before this returns.
    pub fn open(mut disk: D, header: &Header) -> Result<(Self, Recovered), JournalError> {
        if disk.list()?.iter().any(|name| name == REPLACING) {
            remove_all(&mut disk)?;
            disk.remove(REPLACING)?;
            disk.sync_dir()?;
        }
        let scanned = read(&mut disk, Some(header))?;
        let first_seq = scanned.durable + 1;
        let tail: Vec<Record> = scanned.records.iter().filter(|r| r.seq >= first_seq).cloned().collect();
        let index = scanned.index_max + 1;
        let (torn, began) = (scanned.torn, scanned.began.unwrap_or(header.incarnation));
        let begin = SegmentHeader { header: *header, index, first_seq, torn, began };
        let active = create_segment(&mut disk, &begin, &tail)?;
        let next = scanned.snapshot.as_ref().map_or(1, |snapshot| snapshot.next);
        let durable = scanned.durable + tail.len() as u64;
        let mut store = Self {
            disk,
            header: *header,
            active,
            buffer: Vec::new(),
            buffer_bytes: 0,
            durable,
            snapshot_next: next,
            segment_bytes: SEGMENT_BYTES,
            torn,
            began,
            poisoned: false,
        };
        store.remove_unused(first_seq)?;
        let recovered = Recovered {
            snapshot: scanned.snapshot,
            records: scanned.records,
            cut: scanned.cut,
            torn,
            began,
            incarnation: scanned.header.map(|header| header.incarnation),
        };
        Ok((store, recovered))
    }

    /// Ends segments at `bytes` instead of [`SEGMENT_BYTES`].
    #[must_use]
    pub fn with_segment_bytes(mut self, bytes: u64) -> Self {
        self.segment_bytes = bytes.min(SEGMENT_BYTES_MAX - 2 * GROUP_BYTES_MAX as u64);
        self
    }

    /// The last durable record.
    pub fn durable(&self) -> u64 {
        self.durable
    }

    /// The number that the next record must have.
    pub fn next_seq(&self) -> u64 {
        self.durable + self.buffer.len() as u64 + 1
    }

    /// Whether a write or sync failed, after which everything but opening again is refused.
    pub fn poisoned(&self) -> bool {
        self.poisoned
    }

    /// The disk underneath.
    pub fn disk(&mut self) -> &mut D {
        &mut self.disk
    }

    /// Gives up the journal without flushing, and returns the disk.
    pub fn into_disk(self) -> D {
        self.disk
    }

    /// Buffers record `seq`, which is [`next_seq`](Self::next_seq).
    pub fn push(
        &mut self,
        seq: u64,
        time_ns: u64,
        digest: [u8; 32],
        payload: Vec<u8>,
    ) -> Result<(), JournalError> {
        self.check_poison()?;
        if seq != self.next_seq() {
            return Err(JournalError::OutOfOrder { expected: self.next_seq(), found: seq });
        }
        check_bound(payload.len() as u64, PAYLOAD_BYTES_MAX as u64)?;
        let buffer_bytes = self.buffer_bytes + frame_bytes(&payload);
        check_bound(buffer_bytes as u64, GROUP_BYTES_MAX as u64)?;
        self.buffer_bytes = buffer_bytes;
        self.buffer.push(Record { seq, time_ns, digest, payload });
        Ok(())
    }

    /// Writes what is buffered as one group, syncs it, and returns the last durable record.
    pub fn flush(&mut self) -> Result<u64, JournalError> {
        self.check_poison()?;
        if self.buffer.is_empty() {
            return Ok(self.durable);
        }
        self.or_poison(Self::write_group)?;
        self.durable += self.buffer.len() as u64;
        self.buffer.clear();
        self.buffer_bytes = 0;
        Ok(self.durable)
    }

    /// Writes the state after every record below `next`, whose digest is `digest`. What is buffered is flushed first;
    /// the former snapshot stays until [`trim`](Self::trim).
    pub fn write_snapshot(&mut self, next: u64, digest: [u8; 32], state: &[u8]) -> Result<(), JournalError> {
        check_bound(state.len() as u64, SNAPSHOT_BYTES_MAX - SNAPSHOT_HEADER_BYTES as u64)?;
        self.flush()?;
        if next < self.snapshot_next || next > self.durable + 1 {
            return Err(JournalError::OutOfOrder { expected: self.durable + 1, found: next });
        }
        let header = SnapshotHeader {
            header: self.header,
            next,
            digest,
            state_bytes: state.len() as u64,
            state_hash: *blake3::hash(state).as_bytes(),
        };
        let name = snapshot_name(next);
        self.or_poison(|store| write_aside(&mut store.disk, &name, &[&header.encode(), state]))?;
        self.snapshot_next = next;
        Ok(())
    }

    /// Lets go of segments whose records are all below both `before` and the snapshot, and of former snapshots.
    pub fn trim(&mut self, before: u64) -> Result<(), JournalError> {
        self.check_poison()?;
        let before = before.min(self.snapshot_next);
        self.or_poison(|store| {
            let names = store.disk.list()?;
            let mut segments: Vec<(u64, u64, &String)> = names
                .iter()
                .filter_map(|name| parse_segment_name(name).map(|(index, first)| (index, first, name)))
                .collect();
            segments.sort_unstable();
            for pair in segments.windows(2) {
                let ((_, _, name), (_, next_first_seq, _)) = (pair[0], pair[1]);
                if next_first_seq <= before {
                    store.disk.remove(name)?;
                }
            }
            for name in &names {
                if parse_snapshot_name(name).is_some_and(|next| next < store.snapshot_next) {
                    store.disk.remove(name)?;
                }
            }
            Ok(store.disk.sync_dir()?)
        })
    }

    /// Forgets the records above `keep`, durably: they were never committed. What is buffered is dropped.
    ///
    /// # Errors
    /// If `keep` is below the snapshot or above what is durable, or the disk fails.
    pub fn cut(&mut self, keep: u64) -> Result<(), JournalError> {
        if keep + 1 < self.snapshot_next || keep > self.durable {
            return Err(JournalError::OutOfOrder { expected: self.durable, found: keep });
        }
        self.or_poison(|store| {
            store.begin_segment(keep + 1)?;
            store.durable = keep;
            store.buffer.clear();
            store.buffer_bytes = 0;
            store.remove_unused(keep + 1)?;
            Ok(store.disk.sync_dir()?)
        })
    }

    /// Puts a snapshot of another node's journal in the place of everything here. A crash leaves the old journal, none, or
    /// the new one.
    ///
    /// # Errors
    /// If the snapshot is too large or the disk fails.
    pub fn install(&mut self, snapshot: &Snapshot) -> Result<(), JournalError> {
        check_bound(snapshot.bytes.len() as u64, SNAPSHOT_BYTES_MAX - SNAPSHOT_HEADER_BYTES as u64)?;
        let header = SnapshotHeader {
            header: Header { logic_version: snapshot.logic_version, ..self.header },
            next: snapshot.next,
            digest: snapshot.digest,
            state_bytes: snapshot.bytes.len() as u64,
            state_hash: *blake3::hash(&snapshot.bytes).as_bytes(),
        };
        self.or_poison(|store| {
            let disk = &mut store.disk;
            let name = snapshot_name(snapshot.next);
            let aside = begin_aside(disk, &name, &[&header.encode(), &snapshot.bytes])?;
            // While the mark is there nothing else counts: names come and go in any order.
            disk.create_new(REPLACING)?;
            disk.sync_dir()?;
            remove_all(disk)?;
            store.begin_segment(snapshot.next)?;
            let disk = &mut store.disk;
            disk.rename(&aside, &name)?;
            disk.sync_dir()?;
            disk.remove(REPLACING)?;
            disk.sync_dir()?;
            store.durable = snapshot.next - 1;
            store.snapshot_next = snapshot.next;
            store.buffer.clear();
            store.buffer_bytes = 0;
            Ok(())
        })
    }

    /// Notes, durably, that nothing is missing, whatever tail was once cut: others hold the same log.
    ///
    /// A torn tail is what a crash leaves of a group that was never acknowledged. But a disk that misreads its newest group looks
    /// the same, and then something acknowledged is gone; so the cut is remembered until somebody knows better.
    ///
    /// # Errors
    /// If the disk fails.
    pub fn whole(&mut self) -> Result<(), JournalError> {
        if !core::mem::replace(&mut self.torn, false) {
            return Ok(());
        }
        self.or_poison(|store| store.begin_segment(store.durable + 1))
    }

    /// The records from `from` on, none of them buffered; if the journal begins later, its snapshot and what follows.
    ///
    /// # Errors
    /// If the journal cannot be read back.
    pub fn read_from(&mut self, from: u64) -> Result<(Option<Snapshot>, Vec<Record>), JournalError> {
        let scanned = read(&mut self.disk, Some(&self.header))?;
        let first = scanned.snapshot.as_ref().map_or(1, |snapshot| snapshot.next);
        // What looks like a torn tail is known to have been synced whole: the disk lies, or has lost it.
        let last = scanned.records.last().map_or(first - 1, |record| record.seq);
        if last < self.durable {
            return Err(JournalError::Missing { from: last + 1, to: self.durable });
        }
        let records =
            scanned.records.into_iter().filter(|r| r.seq >= from.max(first) && r.seq <= self.durable);
        Ok((scanned.snapshot.filter(|snapshot| snapshot.next > from), records.collect()))
    }

    /// Makes an empty segment after the present one, for records from there on.
    fn begin_segment(&mut self, first_seq: u64) -> Result<(), JournalError> {
        let Self { header, torn, began, .. } = *self;
        let begin = SegmentHeader { header, index: self.active.index + 1, first_seq, torn, began };
        self.active = create_segment(&mut self.disk, &begin, &[])?;
        Ok(())
    }

    fn write_group(&mut self) -> Result<(), JournalError> {
        let group_bytes = (self.buffer_bytes + 2 * BLOCK_BYTES) as u64;
        let empty = self.active.bytes == BLOCK_BYTES as u64;
        if !empty && self.active.bytes + group_bytes > self.segment_bytes {
            self.begin_segment(self.durable + 1)?;
        }
        let group = encode_group(self.active.tag, self.active.bytes, self.durable, &self.buffer);
        self.disk.append(&self.active.name, &group)?;
        if !plant::is(Bug::SkipSync) {
            let synced = self.disk.sync(&self.active.name);
            if !plant::is(Bug::IgnoreSyncError) {
                synced?;
            }
        }
        self.active.bytes += group.len() as u64;
        Ok(())
    }

    /// Removes what an earlier opening left: files aside, and segments that the active one supersedes.
    fn remove_unused(&mut self, first_seq: u64) -> Result<(), JournalError> {
        for name in self.disk.list()? {
            let superseded = parse_segment_name(&name)
                .is_some_and(|(index, first)| index < self.active.index && first >= first_seq);
            if superseded || name.ends_with(ASIDE) {
                self.disk.remove(&name)?;
            }
        }
        Ok(())
    }

    fn check_poison(&self) -> Result<(), JournalError> {
        if self.poisoned { Err(JournalError::Poisoned) } else { Ok(()) }
    }

    fn or_poison(
        &mut self,
        write: impl FnOnce(&mut Self) -> Result<(), JournalError>,
    ) -> Result<(), JournalError> {
        self.check_poison()?;
        let done = write(self);
        self.poisoned = done.is_err();
        done
    }
}

/// Removes every segment and snapshot, durably.
fn remove_all<D: Disk>(disk: &mut D) -> Result<(), JournalError> {
    for name in disk.list()? {
        if parse_segment_name(&name).is_some() || parse_snapshot_name(&name).is_some() {
            disk.remove(&name)?;
        }
    }
    Ok(disk.sync_dir()?)
}

fn check_bound(bytes: u64, max: u64) -> Result<(), JournalError> {
    if bytes > max { Err(JournalError::TooLarge { bytes, max }) } else { Ok(()) }
}

/// Makes a durable segment that begins with `records`, all of them above what is durable elsewhere.
fn create_segment<D: Disk>(
    disk: &mut D,
    begin: &SegmentHeader,
    records: &[Record],
) -> Result<Active, JournalError> {
    let &SegmentHeader { index, first_seq, .. } = begin;
    let (mut bytes, tag) = begin.encode();
    assert!(records.first().is_none_or(|record| record.seq == first_seq));
    let mut rest = records;
    while !rest.is_empty() {
        let (group, after) = rest.split_at(group_len(rest));
        let offset = bytes.len() as u64;
        bytes.extend(encode_group(tag, offset, first_seq - 1, group));
        rest = after;
    }
    let name = segment_name(index, first_seq);
    write_aside(disk, &name, &[&bytes])?;
    Ok(Active { name, index, tag, bytes: bytes.len() as u64 })
}

/// How many of `records` fit into one group: at least one, for a record's bound is below a group's.
fn group_len(records: &[Record]) -> usize {
    let mut bytes = 0;
    let fits = |record: &&Record| {
        bytes += frame_bytes(&record.payload);
        bytes <= GROUP_BYTES_MAX
    };
    records.iter().take_while(fits).count()
}

/// Writes a file so that under its name there is all of it or what was there before.
fn write_aside<D: Disk>(disk: &mut D, name: &str, parts: &[&[u8]]) -> Result<(), JournalError> {
    let aside = begin_aside(disk, name, parts)?;
    disk.rename(&aside, name)?;
    if plant::is(Bug::SkipDirSync) {
        return Ok(());
    }
    Ok(disk.sync_dir()?)
}

/// Writes and syncs a file beside the name that it is to have, and returns its present one.
fn begin_aside<D: Disk>(disk: &mut D, name: &str, parts: &[&[u8]]) -> Result<String, JournalError> {
    let aside = format!("{name}{ASIDE}");
    if disk.list()?.contains(&aside) {
        disk.remove(&aside)?;
    }
    disk.create_new(&aside)?;
    for part in parts {
        disk.append(&aside, part)?;
    }
    disk.sync(&aside)?;
    Ok(aside)
}
