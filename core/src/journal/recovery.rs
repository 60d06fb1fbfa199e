//! Reading a journal back: a torn tail is cut, damage is refused.
//!
//! The rule: a group is written only after the one before it was synced, and says so in its watermark. An invalid record
//! at or below any later watermark was durable, so it is damage. Above every watermark it is the tail of a write that
//! never finished, and nothing after it counts, valid frames included. A later segment and a snapshot are watermarks
//! too: both are made only when every record below them is durable.

use crate::plant::{self, Bug};
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use super::frame::{
    BLOCK_BYTES, GROUP_HEADER_BYTES, GroupHeader, Invalid, NUMBER_MAX, REPLACING, SEGMENT_BYTES_MAX,
    SNAPSHOT_BYTES_MAX, SNAPSHOT_HEADER_BYTES, SegmentHeader, SnapshotHeader, Tag, decode_frame,
    parse_segment_name, parse_snapshot_name, snapshot_name,
};
use super::{Header, JournalError, Record, Snapshot};
use crate::disk::{Disk, DiskError, DiskErrorKind, DiskOp};

/// A torn tail that was left out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cut {
    /// The segment.
    pub segment: String,
    /// Where the first invalid bytes are.
    pub offset: u64,
    /// How many bytes are after that.
    pub bytes: u64,
    /// What is wrong there.
    pub what: &'static str,
}

/// A segment that takes part in the journal.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SegmentInfo {
    /// Its name.
    pub name: String,
    /// Its header.
    pub header: SegmentHeader,
    /// Its length in bytes.
    pub bytes: u64,
}

/// Everything that a journal's files say.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Scanned {
    /// The newest snapshot.
    pub snapshot: Option<Snapshot>,
    /// The records from the snapshot on, without gaps.
    pub records: Vec<Record>,
    /// The torn tail, if there was one.
    pub cut: Option<Cut>,
    /// A torn tail was cut, now or at an earlier opening, and nobody has said since that nothing is missing.
    pub torn: bool,
    /// The incarnation that began it, on an empty disk; `None` on one.
    pub began: Option<u64>,
    /// The last record known to be durable; those above may exist only in the page cache.
    pub durable: u64,
    /// The segments with records from the snapshot on, oldest first.
    pub segments: Vec<SegmentInfo>,
    /// The highest segment index in use.
    pub index_max: u64,
    /// The newest file's header.
    pub header: Option<Header>,
}

/// Reads a journal and changes nothing, whatever its identity. For replay and inspection.
pub fn scan<D: Disk>(disk: &mut D) -> Result<Scanned, JournalError> {
    read(disk, None)
}

/// Reads a journal; with `expected`, refuses one of another identity, node, newer incarnation or logic version.
pub(super) fn read<D: Disk>(disk: &mut D, expected: Option<&Header>) -> Result<Scanned, JournalError> {
    let mut names = disk.list()?;
    if names.iter().any(|name| name == REPLACING) {
        names.clear();
    }
    let snapshot = match names.iter().filter_map(|name| parse_snapshot_name(name)).max() {
        Some(next) => Some(read_snapshot(disk, next, expected)?),
        None => None,
    };
    let mut header = snapshot.as_ref().map(|(header, _)| *header);
    let snapshot = snapshot.map(|(_, snapshot)| snapshot);
    let next = snapshot.as_ref().map_or(1, |snapshot| snapshot.next);

    let mut found: Vec<(u64, u64, &String)> = names
        .iter()
        .filter_map(|name| parse_segment_name(name).map(|(index, first_seq)| (index, first_seq, name)))
        .collect();
    found.sort_unstable();
    let index_max = found.last().map_or(0, |&(index, ..)| index);
    if let (Some(_), None) = (&snapshot, found.last()) {
        let what = "there is a snapshot and no segment, but a segment is made before any snapshot";
        return Err(damage(&snapshot_name(next), 0, next, what));
    }

    // Newest first: each segment counts up to where the later one begins, until the snapshot is reached.
    let mut out = Scanned {
        snapshot,
        records: Vec::new(),
        cut: None,
        torn: false,
        began: None,
        durable: next - 1,
        segments: Vec::new(),
        index_max,
        header: None,
    };
    let mut parts: Vec<Vec<Record>> = Vec::new();
    let mut end: Option<u64> = None;
    for (index, first_seq, name) in found.into_iter().rev() {
        let superseded = end.is_some_and(|end| first_seq >= end);
        let covered = end.is_some_and(|end| end <= next);
        if superseded || covered {
            continue;
        }
        let segment = Segment::read(disk, name, index, first_seq, expected)?;
        if end.is_none() {
            header = Some(segment.info.header.header);
            out.torn = segment.info.header.torn;
            out.began = Some(segment.info.header.began);
        }
        let mut records = segment.parse(end, next, &mut out)?;
        records.retain(|record| record.seq >= next && end.is_none_or(|end| record.seq < end));
        if let (Some(expected), false) = (expected, records.is_empty()) {
            let found = segment.info.header.header.logic_version;
            if found != expected.logic_version {
                let file = segment.info.name;
                return Err(JournalError::Logic { file, found, expected: expected.logic_version });
            }
        }
        parts.push(records);
        out.segments.push(segment.info);
        end = Some(first_seq);
    }
    if let Some(end) = end
        && end > next
    {
        return Err(JournalError::Missing { from: next, to: end - 1 });
    }
    out.torn |= out.cut.is_some();
    out.segments.reverse();
    out.records = parts.into_iter().rev().flatten().collect();
    out.header = header;
    debug_assert!(out.records.iter().zip(next..).all(|(record, seq)| record.seq == seq));
    Ok(out)
}

struct Segment {
    info: SegmentInfo,
    tag: Tag,
    bytes: Vec<u8>,
}

impl Segment {
    fn read<D: Disk>(
        disk: &mut D,
        name: &str,
        index: u64,
        first_seq: u64,
        expected: Option<&Header>,
    ) -> Result<Self, JournalError> {
        let damage = |what| damage(name, 0, first_seq, what);
        let length = disk.len(name)?;
        if length > SEGMENT_BYTES_MAX {
            return Err(damage("the file is longer than any segment"));
        }
        let bytes = read_file(disk, name, length)?;
        let (header, tag) = SegmentHeader::decode(&bytes).map_err(|why| invalid(name, first_seq, why))?;
        check_header(name, &header.header, expected)?;
        if (header.index, header.first_seq) != (index, first_seq) {
            return Err(damage("the header is not that of the file's name"));
        }
        if index > NUMBER_MAX || !(1..=NUMBER_MAX).contains(&first_seq) {
            return Err(damage("the segment's numbers are out of bounds"));
        }
        let info = SegmentInfo { name: String::from(name), header, bytes: length };
        Ok(Self { info, tag, bytes })
    }

    /// The valid records from the start on. `end` is where the next segment begins, if there is one; `next` where the
    /// snapshot ends.
    fn parse(&self, end: Option<u64>, next: u64, out: &mut Scanned) -> Result<Vec<Record>, JournalError> {
        let mut records = Vec::new();
        let first_seq = self.info.header.first_seq;
        let mut watermark = end.unwrap_or(first_seq).max(next) - 1;
        let mut offset = BLOCK_BYTES;
        let mut bad = None;
        while offset < self.bytes.len() && bad.is_none() {
            let due = first_seq + records.len() as u64;
            match self.group(offset, due, &mut records, &mut watermark) {
                Ok(group) => offset = advance(offset, group.padded_bytes()),
                Err((at, what)) => bad = Some((at, what)),
            }
        }
        let due = first_seq + records.len() as u64;
        if let Some((at, _)) = bad {
            watermark = watermark.max(self.later_watermark(at));
        }
        if due <= watermark && !plant::is(Bug::DamageAsTail) {
            let (at, what) = bad.unwrap_or((self.bytes.len(), "the segment ends too early"));
            return Err(damage(&self.info.name, at as u64, due, what));
        }
        // Only the newest segment has a tail: an older one is cut where the next begins.
        if end.is_none() {
            out.durable = watermark;
            out.cut = bad.map(|(at, what)| Cut {
                segment: self.info.name.clone(),
                offset: at as u64,
                bytes: (self.bytes.len() - at) as u64,
                what,
            });
        }
        Ok(records)
    }

    /// Reads the group at `offset`, whose first record is `due`. On an error the records before it are kept.
    fn group(
        &self,
        offset: usize,
        due: u64,
        records: &mut Vec<Record>,
        watermark: &mut u64,
    ) -> Result<GroupHeader, (usize, &'static str)> {
        let group = GroupHeader::decode(self.tag, offset as u64, &self.bytes[offset..])
            .map_err(|what| (offset, what))?;
        if group.first_seq != due {
            return Err((offset, "the group begins with another record"));
        }
        let body = offset + GROUP_HEADER_BYTES;
        let end = body.saturating_add(group.body_bytes as usize).min(self.bytes.len());
        // Whatever becomes of this group, everything below it was durable when it was written.
        *watermark = (*watermark).max(group.watermark);
        let mut at = body;
        for seq in (due..).take(group.count as usize) {
            let (record, length) =
                decode_frame(self.tag, seq, &self.bytes[at..end]).map_err(|what| (at, what))?;
            records.push(record);
            at += length;
        }
        if at != body.saturating_add(group.body_bytes as usize) {
            return Err((at, "the group's length is wrong"));
        }
        Ok(group)
    }

    /// The highest watermark of any valid group that begins after `offset`, whether or not it can be reached.
    fn later_watermark(&self, offset: usize) -> u64 {
        (offset.next_multiple_of(BLOCK_BYTES)..self.bytes.len())
            .step_by(BLOCK_BYTES)
            .filter_map(|at| GroupHeader::decode(self.tag, at as u64, &self.bytes[at..]).ok())
            .map(|group| group.watermark)
            .max()
            .unwrap_or(0)
    }
}

fn advance(offset: usize, by: u64) -> usize {
    offset.saturating_add(usize::try_from(by).unwrap_or(usize::MAX))
}

fn read_snapshot<D: Disk>(
    disk: &mut D,
    next: u64,
    expected: Option<&Header>,
) -> Result<(Header, Snapshot), JournalError> {
    let name = snapshot_name(next);
    let damage = |offset, what| Err(damage(&name, offset, next, what));
    let length = disk.len(&name)?;
    if length > SNAPSHOT_BYTES_MAX {
        return damage(0, "the file is longer than any snapshot");
    }
    let mut bytes = read_file(disk, &name, length)?;
    let header = SnapshotHeader::decode(&bytes).map_err(|why| invalid(&name, next, why))?;
    check_header(&name, &header.header, expected)?;
    if header.next != next {
        return damage(0, "the header is not that of the file's name");
    }
    if !(1..=NUMBER_MAX).contains(&next) {
        return damage(0, "the snapshot's number is out of bounds");
    }
    let state = bytes.split_off(SNAPSHOT_HEADER_BYTES);
    if header.state_bytes != state.len() as u64 {
        return damage(length, "the file's length is not that of the state");
    }
    if *blake3::hash(&state).as_bytes() != header.state_hash {
        return damage(SNAPSHOT_HEADER_BYTES as u64, "the state's hash is wrong");
    }
    let logic_version = header.header.logic_version;
    Ok((header.header, Snapshot { next, digest: header.digest, logic_version, bytes: state }))
}

fn check_header(file: &str, found: &Header, expected: Option<&Header>) -> Result<(), JournalError> {
    let Some(expected) = expected else { return Ok(()) };
    let file = String::from(file);
    if found.node != expected.node {
        return Err(JournalError::Node { file, found: found.node, expected: expected.node });
    }
    if found.identity != expected.identity {
        return Err(JournalError::Identity { file, found: found.identity, expected: expected.identity });
    }
    if found.incarnation > expected.incarnation {
        let (found, expected) = (found.incarnation, expected.incarnation);
        return Err(JournalError::Incarnation { file, found, expected });
    }
    Ok(())
}

fn invalid(file: &str, seq: u64, why: Invalid) -> JournalError {
    match why {
        Invalid::Bytes(what) => damage(file, 0, seq, what),
        Invalid::Format(found) => {
            JournalError::Format { file: String::from(file), found, supported: super::frame::FORMAT_VERSION }
        }
    }
}

fn damage(file: &str, offset: u64, seq: u64, what: &'static str) -> JournalError {
    JournalError::Damage { file: String::from(file), offset, seq, what }
}

/// Reads a whole file, whose length was compared with its bound.
fn read_file<D: Disk>(disk: &mut D, name: &str, length: u64) -> Result<Vec<u8>, JournalError> {
    let short = || DiskError {
        op: DiskOp::Read,
        name: String::from(name),
        kind: DiskErrorKind::Io,
        detail: String::from("the file ended before its length"),
    };
    let mut bytes = vec![0; usize::try_from(length).map_err(|_| short())?];
    let mut at = 0;
    while at < bytes.len() {
        match disk.read_at(name, at as u64, &mut bytes[at..])? {
            0 => return Err(short().into()),
            read => at += read,
        }
    }
    Ok(bytes)
}
