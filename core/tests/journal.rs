//! The journal's bytes and what becomes of them when any of them is wrong.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use lite_llm_core::disk::{Disk, DiskError, DiskErrorKind, DiskOp};
use lite_llm_core::journal::frame::{
    BLOCK_BYTES, FRAME_HEADER_BYTES, GROUP_BYTES_MAX, GROUP_HEADER_BYTES, PAYLOAD_BYTES_MAX,
    SNAPSHOT_HEADER_BYTES, SegmentHeader, SnapshotHeader, Tag, encode_group, segment_name, snapshot_name,
};
use lite_llm_core::journal::{Header, JournalError, Record, Snapshot, Store, scan};
use std::collections::BTreeMap;

/// Files that never fail and are always durable.
#[derive(Clone, Default)]
struct Memory(BTreeMap<String, Vec<u8>>);

impl Memory {
    fn file(&mut self, op: DiskOp, name: &str) -> Result<&mut Vec<u8>, DiskError> {
        self.0.get_mut(name).ok_or_else(|| DiskError {
            op,
            name: name.into(),
            kind: DiskErrorKind::NotFound,
            detail: "no such file".into(),
        })
    }
}

impl Disk for Memory {
    fn create_new(&mut self, name: &str) -> Result<(), DiskError> {
        assert!(self.0.insert(name.into(), Vec::new()).is_none(), "{name} exists");
        Ok(())
    }
    fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), DiskError> {
        self.file(DiskOp::Append, name)?.extend(bytes);
        Ok(())
    }
    fn sync(&mut self, name: &str) -> Result<(), DiskError> {
        self.file(DiskOp::Sync, name).map(|_| ())
    }
    fn sync_dir(&mut self) -> Result<(), DiskError> {
        Ok(())
    }
    fn read_at(&mut self, name: &str, offset: u64, into: &mut [u8]) -> Result<usize, DiskError> {
        let file = self.file(DiskOp::Read, name)?;
        let rest = file.get(offset as usize..).unwrap_or(&[]);
        let n = rest.len().min(into.len());
        into[..n].copy_from_slice(&rest[..n]);
        Ok(n)
    }
    fn len(&mut self, name: &str) -> Result<u64, DiskError> {
        Ok(self.file(DiskOp::Len, name)?.len() as u64)
    }
    fn rename(&mut self, from: &str, to: &str) -> Result<(), DiskError> {
        self.file(DiskOp::Rename, from)?;
        let file = self.0.remove(from).unwrap();
        self.0.insert(to.into(), file);
        Ok(())
    }
    fn remove(&mut self, name: &str) -> Result<(), DiskError> {
        self.file(DiskOp::Remove, name)?;
        self.0.remove(name);
        Ok(())
    }
    fn list(&mut self) -> Result<Vec<String>, DiskError> {
        Ok(self.0.keys().cloned().collect())
    }
}

fn header(incarnation: u64) -> Header {
    Header { logic_version: 1, node: 3, incarnation, identity: [0xA5; 32] }
}

/// Record `seq`, as every test writes it.
fn record(seq: u64) -> Record {
    let length = [5, 700, 0, 5000, 60][seq as usize % 5];
    Record {
        seq,
        time_ns: seq * 1000,
        digest: [seq as u8; 32],
        payload: (0..length).map(|i| (i as u64 * 31 + seq * 7) as u8 | 1).collect(),
    }
}

fn push(store: &mut Store<&mut Memory>, record: Record) {
    store.push(record.seq, record.time_ns, record.digest, record.payload).unwrap();
}

/// Each entry is one group's records.
fn write(disk: &mut Memory, groups: &[std::ops::RangeInclusive<u64>]) {
    let (store, recovered) = Store::open(disk, &header(1)).unwrap();
    assert_eq!(recovered.records, []);
    let mut store = store.with_segment_bytes(5 * BLOCK_BYTES as u64);
    for group in groups {
        for seq in group.clone() {
            push(&mut store, record(seq));
        }
        assert_eq!(store.flush().unwrap(), *group.end());
    }
}

const GROUPS: [std::ops::RangeInclusive<u64>; 8] =
    [1..=2, 3..=5, 6..=6, 7..=9, 10..=10, 11..=11, 12..=13, 14..=17];

fn records(to: u64) -> Vec<Record> {
    (1..=to).map(record).collect()
}

/// What a byte of a file belongs to.
#[derive(Debug, PartialEq)]
enum Region {
    Header,
    /// A group's header, or record `first` or later of it; with the records that are whole before this byte.
    Group {
        last: bool,
        whole: u64,
    },
    /// Covered by no checksum, and never read.
    Padding,
}

/// The regions of a segment, computed from what was written and not by the reader under test.
fn regions(first_seq: u64, newest: bool, bytes: usize) -> Vec<Region> {
    let mut out: Vec<Region> = Vec::with_capacity(bytes);
    out.extend((0..128).map(|_| Region::Header));
    out.extend((128..BLOCK_BYTES).map(|_| Region::Padding));
    for group in GROUPS.iter().filter(|group| *group.start() >= first_seq) {
        if out.len() >= bytes {
            break;
        }
        let last = newest && *group.end() == 17;
        let region = |seq: u64| Region::Group { last, whole: seq - 1 };
        out.extend((0..GROUP_HEADER_BYTES).map(|_| region(*group.start())));
        for seq in group.clone() {
            out.extend((0..FRAME_HEADER_BYTES + record(seq).payload.len()).map(|_| region(seq)));
        }
        out.resize_with(out.len().next_multiple_of(BLOCK_BYTES), || Region::Padding);
    }
    assert_eq!(out.len(), bytes);
    out
}

/// The segments' names and first records, oldest first.
fn segments(disk: &Memory) -> Vec<(String, u64)> {
    let first = |name: &String| name.rsplit('-').next().unwrap().parse().unwrap();
    disk.0
        .keys()
        .filter(|name| name.starts_with("segment-"))
        .map(|name| (name.clone(), first(name)))
        .collect()
}

fn hex(bytes: &[u8]) -> String {
    let end = bytes.iter().rposition(|&b| b != 0).map_or(0, |at| at + 1);
    let mut lines: Vec<String> = bytes[..end]
        .chunks(16)
        .enumerate()
        .map(|(n, line)| {
            let bytes: String = line.iter().map(|b| format!(" {b:02x}")).collect();
            format!("{:04x}:{bytes}", n * 16)
        })
        .collect();
    lines.push(format!("{:04x}: end, zeros before it", bytes.len()));
    lines.join("\n")
}

#[test]
fn golden_bytes() {
    let identity: [u8; 32] = std::array::from_fn(|i| i as u8);
    let header = Header { logic_version: 0x0102_0304, node: 5, incarnation: 6, identity };
    let (segment, tag) = SegmentHeader { header, index: 7, first_seq: 8, torn: false, began: 4 }.encode();
    insta::assert_snapshot!("segment_header", hex(&segment));
    let records = [
        Record { seq: 8, time_ns: 9, digest: [10; 32], payload: b"payload".to_vec() },
        Record { seq: 9, time_ns: 11, digest: [12; 32], payload: vec![] },
    ];
    insta::assert_snapshot!("group_of_two_frames", hex(&encode_group(tag, 4096, 7, &records)));
    let snapshot = SnapshotHeader { header, next: 8, digest: [13; 32], state_bytes: 5, state_hash: [14; 32] };
    insta::assert_snapshot!("snapshot_header", hex(&snapshot.encode()));
    assert_eq!(SegmentHeader::decode(&segment).unwrap().0.header, header);
    assert_eq!(SnapshotHeader::decode(&snapshot.encode()).unwrap(), snapshot);
}

#[test]
fn what_is_written_is_read() {
    let mut disk = Memory::default();
    write(&mut disk, &GROUPS);
    assert!(segments(&disk).len() >= 3, "the test is about several segments");
    let scanned = scan(&mut disk).unwrap();
    assert_eq!((scanned.records, scanned.cut, scanned.durable), (records(17), None, 13));
    let (mut store, recovered) = Store::open(&mut disk, &header(2)).unwrap();
    assert_eq!((recovered.records, recovered.incarnation), (records(17), Some(1)));
    assert_eq!((store.durable(), store.next_seq()), (17, 18));
    push(&mut store, record(18));
    store.write_snapshot(10, [9; 32], b"the state").unwrap();
    assert_eq!(store.durable(), 18, "a snapshot flushes what is buffered");
    store.trim(u64::MAX).unwrap();
    let (_, recovered) = Store::open(&mut disk, &header(2)).unwrap();
    assert_eq!(recovered.records, records(18)[9..]);
    assert_eq!(recovered.snapshot.unwrap().bytes, b"the state");
}

#[test]
fn every_byte_flipped_is_the_same_a_cut_or_damage() {
    let mut written = Memory::default();
    write(&mut written, &GROUPS);
    let segments = segments(&written);
    let mut seen = [0u32; 3];
    for (n, (name, first_seq)) in segments.iter().enumerate() {
        let newest = n + 1 == segments.len();
        let bytes = written.0[name].len();
        let mut disk = written.clone();
        for (at, region) in regions(*first_seq, newest, bytes).iter().enumerate() {
            if *region == Region::Padding && at % 16 > 0 {
                continue;
            }
            let flip = 1 << (at % 8);
            disk.0.get_mut(name).unwrap()[at] ^= flip;
            match (region, scan(&mut disk)) {
                (Region::Padding, Ok(scanned)) => {
                    assert_eq!((scanned.records, scanned.cut), (records(17), None), "{name} {at}");
                    seen[0] += 1;
                }
                (Region::Group { last: true, whole }, Ok(scanned)) => {
                    assert_eq!(scanned.records, records(*whole), "{name} {at}");
                    let cut = scanned.cut.unwrap();
                    assert_eq!(&cut.segment, name);
                    assert!(cut.offset <= at as u64 && cut.offset + cut.bytes == bytes as u64);
                    seen[1] += 1;
                }
                (
                    Region::Header | Region::Group { last: false, .. },
                    Err(JournalError::Damage { file, offset, seq, .. }),
                ) => {
                    assert_eq!(&file, name);
                    assert!(offset <= at as u64);
                    let lost = if let Region::Group { whole, .. } = region { whole + 1 } else { *first_seq };
                    assert_eq!(seq, lost, "{name} {at}");
                    seen[2] += 1;
                }
                (region, result) => panic!("{name}, byte {at}, {region:?}: {result:?}"),
            }
            disk.0.get_mut(name).unwrap()[at] ^= flip;
        }
    }
    assert!(seen.iter().all(|&n| n > 500), "{seen:?}");
}

#[test]
fn every_truncation_is_a_prefix_or_damage() {
    let mut written = Memory::default();
    write(&mut written, &GROUPS);
    let segments = segments(&written);
    for (n, (name, first_seq)) in segments.iter().enumerate() {
        let newest = n + 1 == segments.len();
        let bytes = written.0[name].len();
        let regions = regions(*first_seq, newest, bytes);
        let mut disk = written.clone();
        // The records of this segment that are whole when the file ends at `at`.
        let mut whole = if newest { 17 } else { segments[n + 1].1 - 1 };
        let all = whole;
        for at in (0..bytes).rev() {
            disk.0.get_mut(name).unwrap().truncate(at);
            if let Region::Group { whole: before, .. } = regions[at] {
                whole = before;
            }
            match scan(&mut disk) {
                Ok(scanned) if at >= BLOCK_BYTES => {
                    assert!(newest || whole == all, "{name} {at}: what was durable is silently gone");
                    let expected = if newest { whole } else { 17 };
                    assert_eq!(scanned.records, records(expected), "{name} {at}");
                }
                Err(JournalError::Damage { file, seq, .. }) => {
                    assert_eq!(&file, name);
                    assert!(at < BLOCK_BYTES || (!newest && seq == whole + 1), "{name} {at} {seq}");
                }
                result => panic!("{name} {at}: {result:?}"),
            }
        }
    }
}

#[test]
fn a_cut_is_cut_for_good() {
    let mut written = Memory::default();
    write(&mut written, &GROUPS);
    let newest = segments(&written).pop().unwrap().0;
    let bytes = written.0[&newest].len();
    for at in (BLOCK_BYTES..bytes).step_by(97) {
        let mut disk = written.clone();
        disk.0.get_mut(&newest).unwrap().truncate(at);
        let (mut store, recovered) = Store::open(&mut disk, &header(2)).unwrap();
        let kept = recovered.records.len() as u64;
        assert_eq!(recovered.records, records(kept));
        assert_eq!(recovered.torn, recovered.cut.is_some());
        // What is written now takes the numbers of what was cut, and is what is found from now on.
        let other = Record { seq: kept + 1, time_ns: 1, digest: [1; 32], payload: b"other".to_vec() };
        push(&mut store, other.clone());
        store.flush().unwrap();
        let scanned = scan(&mut disk).unwrap();
        assert_eq!(scanned.records[..kept as usize], records(kept));
        assert_eq!(scanned.records[kept as usize..], [other]);
        assert_eq!(scanned.cut, None);
    }
}

#[test]
fn every_byte_of_a_snapshot_is_checked() {
    let mut written = Memory::default();
    write(&mut written, &GROUPS);
    let (mut store, _) = Store::open(&mut written, &header(1)).unwrap();
    store.write_snapshot(9, [4; 32], b"the state").unwrap();
    let name = snapshot_name(9);
    let snapshot = scan(&mut written).unwrap().snapshot.unwrap();
    assert_eq!((snapshot.next, snapshot.digest, &snapshot.bytes[..]), (9, [4; 32], &b"the state"[..]));
    let bytes = written.0[&name].len();
    assert_eq!(bytes, SNAPSHOT_HEADER_BYTES + 9);
    let damaged = |disk: &mut Memory, at: usize| {
        let result = scan(disk);
        assert!(
            matches!(&result, Err(JournalError::Damage { file, .. }) if *file == name),
            "{at}: {result:?}"
        );
    };
    for at in 0..bytes {
        let mut disk = written.clone();
        disk.0.get_mut(&name).unwrap()[at] ^= 0x40;
        damaged(&mut disk, at);
        disk.0.insert(name.clone(), written.0[&name][..at].to_vec());
        damaged(&mut disk, at);
    }
    let mut longer = written.clone();
    longer.0.get_mut(&name).unwrap().push(0);
    damaged(&mut longer, bytes);
}

#[test]
fn files_that_are_gone_are_missed() {
    let mut written = Memory::default();
    write(&mut written, &GROUPS);
    let segments = segments(&written);
    let without = |n: usize| {
        let mut disk = written.clone();
        disk.0.remove(&segments[n].0);
        scan(&mut disk)
    };
    assert_eq!(without(0), Err(JournalError::Missing { from: 1, to: segments[1].1 - 1 }));
    for (n, (_, first_seq)) in segments.iter().enumerate().take(segments.len() - 1).skip(1) {
        assert!(
            matches!(without(n), Err(JournalError::Damage { seq, file, .. }) if seq == *first_seq && file == segments[n - 1].0)
        );
    }
    // A snapshot above what is left is a watermark too.
    let mut disk = written.clone();
    let (mut store, _) = Store::open(&mut disk, &header(1)).unwrap();
    store.write_snapshot(18, [4; 32], b"state").unwrap();
    for (name, _) in self::segments(&disk).iter().skip(1) {
        disk.0.remove(name);
    }
    assert!(matches!(scan(&mut disk), Err(JournalError::Damage { .. })));
    for (name, _) in self::segments(&disk) {
        disk.0.remove(&name);
    }
    assert!(
        matches!(scan(&mut disk), Err(JournalError::Damage { file, seq: 18, .. }) if file == snapshot_name(18))
    );
}

#[test]
fn a_cut_tail_is_remembered_until_the_log_is_known_to_be_whole() {
    let mut disk = Memory::default();
    write(&mut disk, &GROUPS);
    let newest = segments(&disk).pop().unwrap().0;
    disk.0.get_mut(&newest).unwrap().push(1);
    let open =
        |disk: &mut Memory, life| Store::open(disk, &header(life)).map(|(_, found)| found.torn).unwrap();
    assert!(
        [2, 3].map(|life| open(&mut disk, life)).iter().all(|torn| *torn),
        "further lives change nothing"
    );
    let mut store = Store::open(&mut disk, &header(4)).unwrap().0;
    push(&mut store, Record { seq: 18, time_ns: 1, digest: [1; 32], payload: b"other".to_vec() });
    store.flush().unwrap();
    store.cut(17).unwrap();
    assert!(scan(&mut disk).unwrap().torn, "nor do further segments");
    let mut store = Store::open(&mut disk, &header(5)).unwrap().0;
    store.whole().unwrap();
    assert_eq!(scan(&mut disk).unwrap().records, records(17));
    assert!([6, 7].map(|life| open(&mut disk, life)).iter().all(|torn| !torn));
    // A flag of a later version is not taken for this one.
    let begin = SegmentHeader { header: header(8), index: 9, first_seq: 1, torn: true, began: 1 };
    let (mut bytes, _) = begin.encode();
    bytes[20] = 3;
    let sum = crc32fast::hash(&bytes[..124]).to_le_bytes();
    bytes[124..128].copy_from_slice(&sum);
    assert!(SegmentHeader::decode(&bytes).is_err());
}

#[test]
fn a_journal_knows_which_life_began_it() {
    let mut disk = Memory::default();
    let open =
        |disk: &mut Memory, life| Store::open(disk, &header(life)).map(|(_, found)| found.began).unwrap();
    assert_eq!(scan(&mut disk).unwrap().began, None);
    assert_eq!([3, 4].map(|life| open(&mut disk, life)), [3, 3]);
    // Whatever becomes of it: further segments, a cut, a snapshot of another rank's in its place.
    let mut store = Store::open(&mut disk, &header(5)).unwrap().0.with_segment_bytes(1);
    for record in records(4) {
        push(&mut store, record);
        store.flush().unwrap();
    }
    store.cut(2).unwrap();
    drop(store);
    assert_eq!(open(&mut disk, 6), 3);
    let mut store = Store::open(&mut disk, &header(7)).unwrap().0;
    store.install(&Snapshot { next: 9, digest: [1; 32], logic_version: 1, bytes: vec![1] }).unwrap();
    drop(store);
    assert_eq!(scan(&mut disk).unwrap().began, Some(3));
}

#[test]
fn stale_blocks_of_another_segment_are_no_groups() {
    let mut disk = Memory::default();
    write(&mut disk, &GROUPS);
    let segments = segments(&disk);
    let newest = &segments[segments.len() - 1].0;
    let stale = disk.0[&segments[0].0][BLOCK_BYTES..].to_vec();
    let own = disk.0[newest][BLOCK_BYTES..].to_vec();
    for tail in [stale, own] {
        let mut disk = disk.clone();
        disk.0.get_mut(newest).unwrap().extend(tail);
        let scanned = scan(&mut disk).unwrap();
        assert_eq!(scanned.records, records(17));
        assert!(scanned.cut.is_some());
    }
}

#[test]
fn another_journal_is_refused_by_what_differs() {
    let mut disk = Memory::default();
    write(&mut disk, &GROUPS);
    let open = |header: &Header| Store::open(&mut disk.clone(), header).map(|_| ());
    let own = header(2);
    assert_eq!(open(&own), Ok(()));
    assert!(matches!(
        open(&Header { node: 4, ..own }),
        Err(JournalError::Node { found: 3, expected: 4, .. })
    ));
    assert!(matches!(open(&Header { identity: [1; 32], ..own }), Err(JournalError::Identity { .. })));
    let older = open(&Header { incarnation: 0, ..own });
    assert!(matches!(older, Err(JournalError::Incarnation { found: 1, expected: 0, .. })));
    let logic = open(&Header { logic_version: 2, ..own });
    assert!(matches!(logic, Err(JournalError::Logic { found: 1, expected: 2, .. })));
    // With a snapshot of everything there is nothing left that another version would fold differently.
    Store::open(&mut disk, &own).unwrap().0.write_snapshot(18, [0; 32], b"state").unwrap();
    let (_, recovered) = Store::open(&mut disk, &Header { logic_version: 2, ..own }).unwrap();
    assert_eq!((recovered.records.len(), recovered.snapshot.unwrap().logic_version), (0, 1));
}

#[test]
fn another_format_is_refused_by_number() {
    let mut disk = Memory::default();
    write(&mut disk, &GROUPS);
    let newest = segments(&disk).pop().unwrap().0;
    let file = disk.0.get_mut(&newest).unwrap();
    file[8..12].copy_from_slice(&3u32.to_le_bytes());
    let crc = crc(&file[..124]);
    file[124..128].copy_from_slice(&crc.to_le_bytes());
    assert_eq!(scan(&mut disk), Err(JournalError::Format { file: newest, found: 3, supported: 2 }));
}

/// CRC-32 (IEEE 802.3), bit by bit: apart from the crate under test.
fn crc(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |crc, byte| {
        (0..8)
            .fold(crc ^ u32::from(*byte), |crc: u32, _| (crc >> 1) ^ (0xEDB8_8320 & (crc & 1).wrapping_neg()))
    })
}

#[test]
fn numbers_out_of_bounds_are_refused() {
    for (index, first_seq) in [(u64::MAX, 1), (1, u64::MAX), (1, 0), (1 << 63, 1 << 63)] {
        let (mut bytes, tag) =
            SegmentHeader { header: header(1), index, first_seq, torn: false, began: 1 }.encode();
        let frame = Record { seq: first_seq, ..record(1) };
        if first_seq > 0 {
            bytes.extend(encode_group(tag, BLOCK_BYTES as u64, first_seq - 1, &[frame]));
        }
        let mut disk = Memory::default();
        disk.0.insert(segment_name(index, first_seq), bytes);
        let result = Store::open(&mut disk, &header(1)).map(|_| ());
        assert!(matches!(result, Err(JournalError::Damage { .. })), "{index} {first_seq}: {result:?}");
    }
    for name in
        ["segment-99999999999999999999-00000000000000000001", "snapshot-99999999999999999999", "segment-"]
    {
        let mut disk = Memory::default();
        disk.0.insert(name.into(), vec![1; 9000]);
        assert_eq!(scan(&mut disk).unwrap().records, [], "{name} is no file of a journal");
    }
}

#[test]
fn a_tail_of_two_large_groups_is_recovered() {
    // The last group is torn in its last record, so two groups' worth of records is not known to be durable.
    let large = |seq: u64| Record { seq, payload: vec![seq as u8; PAYLOAD_BYTES_MAX - 100], ..record(seq) };
    let (mut bytes, tag) =
        SegmentHeader { header: header(1), index: 1, first_seq: 1, torn: false, began: 1 }.encode();
    let groups: [Vec<Record>; 2] = [(1..=3).map(large).collect(), (4..=6).map(large).collect()];
    for group in &groups {
        let offset = bytes.len() as u64;
        // Both say that nothing is durable yet: no writer does this, but a reader is not to fall over it.
        bytes.extend(encode_group(tag, offset, 0, group));
    }
    assert!(bytes.len() > GROUP_BYTES_MAX);
    let torn = bytes.len() - PAYLOAD_BYTES_MAX / 2;
    bytes[torn] ^= 1;
    let mut disk = Memory::default();
    disk.0.insert(segment_name(1, 1), bytes);
    let (_, recovered) = Store::open(&mut disk, &header(2)).unwrap();
    assert_eq!(recovered.records.len(), 5);
    assert_eq!(scan(&mut disk).unwrap().records, recovered.records);
}

#[test]
fn bounds_and_order_are_kept() {
    let mut disk = Memory::default();
    let (mut store, _) = Store::open(&mut disk, &header(1)).unwrap();
    let too_large = store.push(1, 0, [0; 32], vec![0; PAYLOAD_BYTES_MAX + 1]);
    assert!(matches!(too_large, Err(JournalError::TooLarge { .. })));
    assert_eq!(store.push(2, 0, [0; 32], vec![]), Err(JournalError::OutOfOrder { expected: 1, found: 2 }));
    push(&mut store, record(1));
    let early = store.write_snapshot(3, [0; 32], b"");
    assert_eq!(early, Err(JournalError::OutOfOrder { expected: 2, found: 3 }));
    for seq in 2..=4 {
        store.push(seq, 0, [0; 32], vec![0; PAYLOAD_BYTES_MAX]).unwrap();
    }
    assert!(matches!(
        store.push(5, 0, [0; 32], vec![0; PAYLOAD_BYTES_MAX]),
        Err(JournalError::TooLarge { .. })
    ));
    assert_eq!(store.flush().unwrap(), 4);
    assert!(!store.poisoned(), "a refusal at the door is no failure of the disk");
}

#[test]
fn tags_bind_groups_to_their_place() {
    use lite_llm_core::journal::frame::GroupHeader;
    let group = GroupHeader { watermark: 1, first_seq: 2, count: 1, body_bytes: 60 };
    let bytes = group.encode(Tag(1), 4096);
    assert_eq!(GroupHeader::decode(Tag(1), 4096, &bytes), Ok(group));
    assert!(GroupHeader::decode(Tag(2), 4096, &bytes).is_err());
    assert!(GroupHeader::decode(Tag(1), 8192, &bytes).is_err());
}
