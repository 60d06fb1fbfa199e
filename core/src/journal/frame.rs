//! The byte format: segment header, commit group, record frame, snapshot header. All integers are little-endian.
//!
//! A group begins at a multiple of [`BLOCK_BYTES`] and is padded to the next, so that no write ever touches a sector
//! that holds durable bytes. Its checksum, and that of its frames, covers the segment's own checksum and the group also
//! its offset: stale blocks of another file, and payloads that look like journal bytes, are never taken for a group.

use alloc::format;
use alloc::string::String;
use alloc::vec::Vec;

use super::{Header, Record};

/// The format version written and read here.
pub const FORMAT_VERSION: u32 = 2;
/// Groups begin at multiples of this: no smaller than the sector of any disk.
pub const BLOCK_BYTES: usize = 4096;
/// The largest payload of a record.
pub const PAYLOAD_BYTES_MAX: usize = 16 << 20;
/// The largest body of a group: what may be buffered between two flushes.
pub const GROUP_BYTES_MAX: usize = 64 << 20;
/// The largest segment: no file above this is read.
pub const SEGMENT_BYTES_MAX: u64 = 1 << 30;
/// The highest number of a record or segment: what is read is never above it, so adding to it cannot overflow.
pub const NUMBER_MAX: u64 = 1 << 62;
/// The largest snapshot: no file above this is read.
pub const SNAPSHOT_BYTES_MAX: u64 = 4 << 30;

/// The first bytes of a segment.
pub const SEGMENT_MAGIC: [u8; 8] = *b"LLMSEGMT";
const GROUP_MAGIC: [u8; 4] = *b"LLMG";
/// The first bytes of a snapshot.
pub const SNAPSHOT_MAGIC: [u8; 8] = *b"LLMSNAPS";
/// With room for more: where the checksum is must not depend on the format, or another one looks like damage.
const SEGMENT_HEADER_BYTES: usize = 128;
/// The length of a group's header.
pub const GROUP_HEADER_BYTES: usize = 32;
/// The length of a frame before its payload.
pub const FRAME_HEADER_BYTES: usize = 56;
/// The length of a snapshot's header.
pub const SNAPSHOT_HEADER_BYTES: usize = 148;

/// The suffix of a file that is being written aside.
pub const ASIDE: &str = ".aside";

/// A file of this name says that the journal is being replaced by another node's: nothing here counts.
pub const REPLACING: &str = "replacing";

/// A segment's name: its index and first record, so that those no longer needed are never opened.
pub fn segment_name(index: u64, first_seq: u64) -> String {
    format!("segment-{index:020}-{first_seq:020}")
}

/// The index and first record in a segment's name.
pub fn parse_segment_name(name: &str) -> Option<(u64, u64)> {
    let (index, first_seq) = name.strip_prefix("segment-")?.split_once('-')?;
    Some((parse_number(index)?, parse_number(first_seq)?))
}

/// A snapshot's name: the first record that is not in it.
pub fn snapshot_name(next: u64) -> String {
    format!("snapshot-{next:020}")
}

/// The number in a snapshot's name.
pub fn parse_snapshot_name(name: &str) -> Option<u64> {
    parse_number(name.strip_prefix("snapshot-")?)
}

fn parse_number(text: &str) -> Option<u64> {
    (text.len() == 20 && text.bytes().all(|b| b.is_ascii_digit())).then(|| text.parse().ok())?
}

/// Why bytes are not what they should be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Invalid {
    /// Wrong, for this reason.
    Bytes(&'static str),
    /// Right, but of another format version.
    Format(u32),
}

/// The start of a segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentHeader {
    /// What the journal is of.
    pub header: Header,
    /// Segments are numbered in the order of their making.
    pub index: u64,
    /// The first record in it; every record below was durable when it was made.
    pub first_seq: u64,
    /// A torn tail was cut since it was last known that nothing is missing: see [`Store::whole`](super::Store::whole).
    pub torn: bool,
    /// The incarnation that began the journal, on an empty disk: what earlier ones knew was never in it.
    pub began: u64,
}

/// Binds groups and frames to their segment: the checksum of its header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tag(pub u32);

impl SegmentHeader {
    /// The header's block, and the tag for what follows it.
    pub fn encode(&self) -> (Vec<u8>, Tag) {
        let mut out = Vec::with_capacity(BLOCK_BYTES);
        out.extend(SEGMENT_MAGIC);
        out.extend(FORMAT_VERSION.to_le_bytes());
        out.extend(self.header.logic_version.to_le_bytes());
        out.extend(self.header.node.to_le_bytes());
        out.extend(u32::from(self.torn).to_le_bytes());
        out.extend(self.index.to_le_bytes());
        out.extend(self.header.incarnation.to_le_bytes());
        out.extend(self.began.to_le_bytes());
        out.extend(self.first_seq.to_le_bytes());
        out.extend(self.header.identity);
        out.resize(SEGMENT_HEADER_BYTES - 4, 0);
        let crc = crc32fast::hash(&out);
        out.extend(crc.to_le_bytes());
        out.resize(BLOCK_BYTES, 0);
        (out, Tag(crc))
    }

    /// Reads the header back from the start of a segment.
    pub fn decode(bytes: &[u8]) -> Result<(Self, Tag), Invalid> {
        let header = bytes.get(..SEGMENT_HEADER_BYTES).ok_or(Invalid::Bytes("the header is cut short"))?;
        let mut at = Cursor(header);
        if at.array::<8>() != SEGMENT_MAGIC {
            return Err(Invalid::Bytes("this is no segment"));
        }
        let crc = crc32fast::hash(&header[..SEGMENT_HEADER_BYTES - 4]);
        if header[SEGMENT_HEADER_BYTES - 4..] != crc.to_le_bytes() {
            return Err(Invalid::Bytes("the header's checksum is wrong"));
        }
        let format = at.u32();
        if format != FORMAT_VERSION {
            return Err(Invalid::Format(format));
        }
        if bytes.len() < BLOCK_BYTES {
            return Err(Invalid::Bytes("the header's block is cut short"));
        }
        let logic_version = at.u32();
        let node = at.u32();
        let torn = match at.u32() {
            0 => false,
            1 => true,
            _ => return Err(Invalid::Bytes("the header has flags that nobody writes")),
        };
        let index = at.u64();
        let incarnation = at.u64();
        let began = at.u64();
        let first_seq = at.u64();
        let header = Header { logic_version, node, incarnation, identity: at.array() };
        Ok((Self { header, index, first_seq, torn, began }, Tag(crc)))
    }
}

/// The start of a commit group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupHeader {
    /// The last record that was durable when this group was written.
    pub watermark: u64,
    /// The group's first record.
    pub first_seq: u64,
    /// How many records it has.
    pub count: u32,
    /// The length of its frames together, without the padding.
    pub body_bytes: u32,
}

impl GroupHeader {
    /// The header's bytes, for a group at `offset` of the segment that `tag` is of.
    pub fn encode(&self, tag: Tag, offset: u64) -> [u8; GROUP_HEADER_BYTES] {
        let mut out = [0; GROUP_HEADER_BYTES];
        out[..4].copy_from_slice(&GROUP_MAGIC);
        out[8..16].copy_from_slice(&self.watermark.to_le_bytes());
        out[16..24].copy_from_slice(&self.first_seq.to_le_bytes());
        out[24..28].copy_from_slice(&self.count.to_le_bytes());
        out[28..32].copy_from_slice(&self.body_bytes.to_le_bytes());
        let crc = group_crc(tag, offset, &out[8..]);
        out[4..8].copy_from_slice(&crc.to_le_bytes());
        out
    }

    /// Reads the header of a group at `offset`; `bytes` start there.
    pub fn decode(tag: Tag, offset: u64, bytes: &[u8]) -> Result<Self, &'static str> {
        let header = bytes.get(..GROUP_HEADER_BYTES).ok_or("the group's header is cut short")?;
        let mut at = Cursor(header);
        if at.array::<4>() != GROUP_MAGIC {
            return Err("no group begins here");
        }
        if at.u32() != group_crc(tag, offset, &header[8..]) {
            return Err("the group header's checksum is wrong");
        }
        let group = Self { watermark: at.u64(), first_seq: at.u64(), count: at.u32(), body_bytes: at.u32() };
        if group.count == 0 {
            return Err("the group is empty");
        }
        if group.watermark >= group.first_seq {
            return Err("the group calls itself durable");
        }
        Ok(group)
    }

    /// The length of the group with header and padding.
    pub fn padded_bytes(&self) -> u64 {
        (GROUP_HEADER_BYTES as u64 + u64::from(self.body_bytes)).next_multiple_of(BLOCK_BYTES as u64)
    }
}

fn group_crc(tag: Tag, offset: u64, bytes: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&tag.0.to_le_bytes());
    crc.update(&offset.to_le_bytes());
    crc.update(bytes);
    crc.finalize()
}

/// The length of a record's frame.
pub fn frame_bytes(payload: &[u8]) -> usize {
    FRAME_HEADER_BYTES + payload.len()
}

/// Adds a record's frame to `out`. The payload is no longer than [`PAYLOAD_BYTES_MAX`].
pub fn encode_frame(tag: Tag, record: &Record, out: &mut Vec<u8>) {
    assert!(record.payload.len() <= PAYLOAD_BYTES_MAX);
    let start = out.len();
    let length = u32::try_from(record.payload.len()).unwrap_or(u32::MAX);
    out.extend(length.to_le_bytes());
    out.extend([0; 4]);
    out.extend(record.seq.to_le_bytes());
    out.extend(record.time_ns.to_le_bytes());
    out.extend(record.digest);
    out.extend(&record.payload);
    let crc = frame_crc(tag, &out[start..]);
    out[start + 4..start + 8].copy_from_slice(&crc.to_le_bytes());
}

/// Reads the frame of record `seq` from the start of `bytes`, and says how long it was.
pub fn decode_frame(tag: Tag, seq: u64, bytes: &[u8]) -> Result<(Record, usize), &'static str> {
    let header = bytes.get(..FRAME_HEADER_BYTES).ok_or("the frame is cut short")?;
    let mut at = Cursor(header);
    let length = usize::try_from(at.u32()).unwrap_or(usize::MAX);
    if length > PAYLOAD_BYTES_MAX {
        return Err("the frame's length is above the bound");
    }
    let frame = bytes.get(..FRAME_HEADER_BYTES + length).ok_or("the frame is cut short")?;
    if at.u32() != frame_crc(tag, frame) {
        return Err("the frame's checksum is wrong");
    }
    let record = Record {
        seq: at.u64(),
        time_ns: at.u64(),
        digest: at.array(),
        payload: frame[FRAME_HEADER_BYTES..].to_vec(),
    };
    if record.seq != seq {
        return Err("the frame is of another record");
    }
    Ok((record, frame.len()))
}

fn frame_crc(tag: Tag, frame: &[u8]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&tag.0.to_le_bytes());
    crc.update(&frame[..4]);
    crc.update(&frame[8..]);
    crc.finalize()
}

/// A whole group of records at `offset`: header, frames, padding.
pub fn encode_group(tag: Tag, offset: u64, watermark: u64, records: &[Record]) -> Vec<u8> {
    assert!(offset.is_multiple_of(BLOCK_BYTES as u64) && !records.is_empty());
    let frames: usize = records.iter().map(|record| frame_bytes(&record.payload)).sum();
    let mut out = Vec::with_capacity((GROUP_HEADER_BYTES + frames).next_multiple_of(BLOCK_BYTES));
    out.resize(GROUP_HEADER_BYTES, 0);
    for record in records {
        encode_frame(tag, record, &mut out);
    }
    let body_bytes = u32::try_from(out.len() - GROUP_HEADER_BYTES).unwrap_or(u32::MAX);
    assert!(body_bytes as usize <= GROUP_BYTES_MAX);
    let count = u32::try_from(records.len()).unwrap_or(u32::MAX);
    let header = GroupHeader { watermark, first_seq: records[0].seq, count, body_bytes };
    out[..GROUP_HEADER_BYTES].copy_from_slice(&header.encode(tag, offset));
    out.resize(out.len().next_multiple_of(BLOCK_BYTES), 0);
    out
}

/// The start of a snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SnapshotHeader {
    /// What the snapshot is of.
    pub header: Header,
    /// The first record that is not in it.
    pub next: u64,
    /// The digest before record `next`.
    pub digest: [u8; 32],
    /// The length of the state.
    pub state_bytes: u64,
    /// BLAKE3 of the state.
    pub state_hash: [u8; 32],
}

impl SnapshotHeader {
    /// The header's bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(SNAPSHOT_HEADER_BYTES);
        out.extend(SNAPSHOT_MAGIC);
        out.extend(FORMAT_VERSION.to_le_bytes());
        out.extend(self.header.logic_version.to_le_bytes());
        out.extend(self.header.node.to_le_bytes());
        out.extend([0; 4]);
        out.extend(self.header.incarnation.to_le_bytes());
        out.extend(self.next.to_le_bytes());
        out.extend(self.header.identity);
        out.extend(self.digest);
        out.extend(self.state_bytes.to_le_bytes());
        out.extend(self.state_hash);
        let crc = crc32fast::hash(&out);
        out.extend(crc.to_le_bytes());
        debug_assert_eq!(out.len(), SNAPSHOT_HEADER_BYTES);
        out
    }

    /// Reads the header back from the start of a snapshot.
    pub fn decode(bytes: &[u8]) -> Result<Self, Invalid> {
        let header = bytes.get(..SNAPSHOT_HEADER_BYTES).ok_or(Invalid::Bytes("the header is cut short"))?;
        let mut at = Cursor(header);
        if at.array::<8>() != SNAPSHOT_MAGIC {
            return Err(Invalid::Bytes("this is no snapshot"));
        }
        let crc = crc32fast::hash(&header[..SNAPSHOT_HEADER_BYTES - 4]);
        if header[SNAPSHOT_HEADER_BYTES - 4..] != crc.to_le_bytes() {
            return Err(Invalid::Bytes("the header's checksum is wrong"));
        }
        let format = at.u32();
        if format != FORMAT_VERSION {
            return Err(Invalid::Format(format));
        }
        let logic_version = at.u32();
        let node = at.u32();
        at.u32();
        let incarnation = at.u64();
        let next = at.u64();
        let header = Header { logic_version, node, incarnation, identity: at.array() };
        Ok(Self { header, next, digest: at.array(), state_bytes: at.u64(), state_hash: at.array() })
    }
}

/// Takes fields off a header whose length was already checked.
struct Cursor<'a>(&'a [u8]);

impl Cursor<'_> {
    fn array<const N: usize>(&mut self) -> [u8; N] {
        let (taken, rest) = self.0.split_at(N);
        self.0 = rest;
        let mut out = [0; N];
        out.copy_from_slice(taken);
        out
    }
    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.array())
    }
    fn u64(&mut self) -> u64 {
        u64::from_le_bytes(self.array())
    }
}
