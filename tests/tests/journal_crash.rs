//! The journal's real code on a simulated disk: a crash at every operation with every ending, a fault at every
//! operation, rot in every region. What was acknowledged is there; what is there is what was written.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::disk::Disk;
use lite_llm_core::journal::{Header, JournalError, Recovered, Snapshot, Store, scan};
use lite_llm_sim::disk::{Ending, Fault, SimDisk};
use lite_llm_sim::random::Choice;

const HEADER: Header = Header { logic_version: 1, node: 0, incarnation: 1, identity: [7; 32] };

fn header(incarnation: u64) -> Header {
    Header { incarnation, ..HEADER }
}

/// What record `seq` holds; some are larger than a block.
fn payload(seq: u64) -> Vec<u8> {
    let len = if seq.is_multiple_of(7) { 9000 } else { seq % 40 };
    (0..len).map(|i| u8::try_from((seq * 31 + i) % 251).unwrap()).collect()
}

fn state(next: u64) -> Vec<u8> {
    (0..next * 100).map(|i| u8::try_from((next + i) % 251).unwrap()).collect()
}

/// What the journal said is durable.
#[derive(Clone, Copy, Debug, Default)]
struct Acknowledged {
    records: u64,
    snapshot: u64,
    pushed: u64,
}

/// Opens, appends in groups, takes snapshots, trims, rolls segments; stops at the first error.
fn work(disk: &mut SimDisk, incarnation: u64, said: &mut Acknowledged) -> Result<(), JournalError> {
    work_in(disk, incarnation, 24 << 10, said)
}

fn work_in(
    disk: &mut SimDisk,
    incarnation: u64,
    segment_bytes: u64,
    said: &mut Acknowledged,
) -> Result<(), JournalError> {
    let (store, recovered) = Store::open(&mut *disk, &header(incarnation))?;
    check(&recovered, said);
    let mut store = store.with_segment_bytes(segment_bytes);
    said.records = said.records.max(store.durable());
    for round in 0..12u64 {
        for _ in 0..=round % 4 {
            let seq = store.next_seq();
            store.push(seq, seq * 10, [u8::try_from(seq % 256).unwrap(); 32], payload(seq))?;
            said.pushed = said.pushed.max(seq);
        }
        said.records = store.flush()?;
        if round % 5 == 4 {
            let next = store.next_seq();
            store.write_snapshot(next, [9; 32], &state(next))?;
            said.snapshot = next;
            store.trim(next)?;
        }
    }
    Ok(())
}

/// What was recovered is what was written, and holds everything acknowledged.
fn check(recovered: &Recovered, said: &Acknowledged) {
    let mut next = 1;
    if let Some(snapshot) = &recovered.snapshot {
        assert_eq!(snapshot.bytes, state(snapshot.next));
        next = snapshot.next;
    }
    assert!(next >= said.snapshot, "an acknowledged snapshot is lost");
    for record in &recovered.records {
        assert_eq!((record.seq, record.time_ns), (next, next * 10), "records are dense");
        assert_eq!(record.payload, payload(next));
        next += 1;
    }
    assert!(
        next > said.records,
        "record {} was acknowledged, the journal ends at {}",
        said.records,
        next - 1
    );
    assert!(next <= said.pushed + 1, "the journal has records that nobody wrote");
}

fn endings(seed: u64) -> Vec<Ending> {
    let any = (0..8).map(|i| Ending::Any(Box::new(Choice::new(seed * 8 + i))));
    [Ending::Old, Ending::New, Ending::Zero, Ending::Garbage, Ending::Torn].into_iter().chain(any).collect()
}

fn operations() -> u64 {
    let mut disk = SimDisk::new();
    work(&mut disk, 1, &mut Acknowledged::default()).unwrap();
    disk.operations()
}

#[test]
fn a_crash_at_every_operation_loses_nothing_acknowledged() {
    let operations = operations();
    assert!(operations > 60, "the workload is worth crashing: {operations} operations");
    for at in 0..operations {
        for mut ending in endings(at) {
            let mut disk = SimDisk::new();
            let mut said = Acknowledged::default();
            disk.fail_at(at, Fault::Crash);
            work(&mut disk, 1, &mut said).unwrap_err();
            disk.crash(&mut ending);
            work(&mut disk, 2, &mut said).unwrap_or_else(|e| panic!("crash at {at}, {ending:?}: {e}"));
        }
    }
}

#[test]
fn a_crash_during_recovery_loses_nothing_either() {
    for at in (0..operations()).step_by(5) {
        for again in 0..12 {
            let mut disk = SimDisk::new();
            let mut said = Acknowledged::default();
            disk.fail_at(at, Fault::Crash);
            work(&mut disk, 1, &mut said).unwrap_err();
            disk.crash(&mut Ending::Any(Box::new(Choice::new(at))));
            disk.fail_at(again, Fault::Crash);
            work(&mut disk, 2, &mut said).unwrap_err();
            disk.crash(&mut Ending::Any(Box::new(Choice::new(at + 1000 * again))));
            work(&mut disk, 3, &mut said).unwrap_or_else(|e| panic!("crash at {at}, then {again}: {e}"));
        }
    }
}

#[test]
fn a_fault_at_every_operation_ends_the_journal_and_loses_nothing() {
    for fault in [Fault::Io, Fault::NoSpace] {
        for at in 0..operations() {
            for crash in [false, true] {
                let mut disk = SimDisk::new();
                let mut said = Acknowledged::default();
                disk.fail_at(at, fault);
                let error = work(&mut disk, 1, &mut said).unwrap_err();
                assert!(matches!(error, JournalError::Disk(_)), "{error}");
                disk.heal();
                if crash {
                    disk.crash(&mut Ending::Any(Box::new(Choice::new(at))));
                }
                work(&mut disk, 2, &mut said)
                    .unwrap_or_else(|e| panic!("{fault:?} at {at}, crash {crash}: {e}"));
            }
        }
    }
}

#[test]
fn nothing_is_written_after_a_fault() {
    let mut disk = SimDisk::new();
    let (mut store, _) = Store::open(&mut disk, &HEADER).unwrap();
    store.disk().fail_at(0, Fault::Io);
    store.push(1, 1, [0; 32], vec![1]).unwrap();
    store.flush().unwrap_err();
    store.disk().heal();
    assert!(store.poisoned());
    assert_eq!(store.flush(), Err(JournalError::Poisoned));
    assert_eq!(store.push(2, 2, [0; 32], vec![2]), Err(JournalError::Poisoned));
    assert_eq!(store.write_snapshot(1, [0; 32], &[]), Err(JournalError::Poisoned));
}

#[test]
fn rot_is_refused_or_cut_never_believed() {
    for segment_bytes in [24 << 10, 1 << 20] {
        rot_everywhere(segment_bytes);
    }
}

fn rot_everywhere(segment_bytes: u64) {
    let mut disk = SimDisk::new();
    work_in(&mut disk, 1, segment_bytes, &mut Acknowledged::default()).unwrap();
    let whole = scan(&mut disk).unwrap();
    // The last round writes four records.
    let last_group = whole.records.last().unwrap().seq - 4;
    let (mut refused, mut cut) = (0, 0);
    for name in disk.list().unwrap() {
        let len = usize::try_from(disk.len(&name).unwrap()).unwrap();
        for at in (0..len).step_by(13).chain(len.saturating_sub(40)..len) {
            for truncate in [false, true] {
                let mut rotten = disk.clone();
                if truncate {
                    rotten.cut(&name, at);
                } else {
                    rotten.rot(&name, at, 0x04);
                }
                match scan(&mut rotten) {
                    Ok(found) => {
                        // Rot in padding changes nothing; in the very last group it looks like a tear.
                        assert!(
                            whole.records.starts_with(&found.records),
                            "{name}, byte {at}: other records"
                        );
                        assert_eq!(found.snapshot, whole.snapshot);
                        let kept = found.snapshot.as_ref().map_or(0, |snapshot| snapshot.next - 1);
                        let last = found.records.last().map_or(kept, |record| record.seq);
                        // What is cut off at the end leaves no trace of having been there.
                        assert!(truncate || last >= last_group, "{name}, byte {at}: too much is cut");
                        cut += u64::from(found.records.len() < whole.records.len());
                    }
                    Err(error) => {
                        let text = error.to_string();
                        assert!(
                            text.contains(&name) || matches!(error, JournalError::Missing { .. }),
                            "{text}"
                        );
                        refused += 1;
                    }
                }
            }
        }
    }
    assert!(refused > 0 && cut > 0, "both happen: {refused} refused, {cut} cut");
}

#[test]
fn another_identity_node_or_logic_is_refused() {
    let mut disk = SimDisk::new();
    work(&mut disk, 1, &mut Acknowledged::default()).unwrap();
    let open = |header: Header| Store::open(&mut disk.clone(), &header).map(|_| ()).unwrap_err();
    assert!(matches!(open(Header { identity: [8; 32], ..header(2) }), JournalError::Identity { .. }));
    assert!(matches!(open(Header { node: 1, ..header(2) }), JournalError::Node { .. }));
    assert!(matches!(
        open(Header { logic_version: 2, ..header(2) }),
        JournalError::Logic { found: 1, expected: 2, .. }
    ));
    work(&mut disk, 5, &mut Acknowledged { pushed: 100, ..Acknowledged::default() }).unwrap();
    assert!(matches!(
        Store::open(&mut disk, &header(4)).map(|_| ()).unwrap_err(),
        JournalError::Incarnation { found: 5, expected: 4, .. }
    ));
}

/// The files' format: these bytes change only with the format version.
#[test]
fn files_have_golden_bytes() {
    let mut disk = SimDisk::new();
    let (mut store, _) = Store::open(&mut disk, &HEADER).unwrap();
    for seq in 1..3 {
        store.push(seq, seq * 10, [3; 32], payload(seq)).unwrap();
    }
    store.flush().unwrap();
    store.write_snapshot(3, [9; 32], &[1, 2, 3]).unwrap();
    let mut golden = String::new();
    for name in disk.list().unwrap() {
        let mut bytes = vec![0; usize::try_from(disk.len(&name).unwrap()).unwrap()];
        disk.read_at(&name, 0, &mut bytes).unwrap();
        golden += &format!("{name}: {} bytes\n", bytes.len());
        for (line, bytes) in bytes.chunks(32).enumerate().filter(|(_, bytes)| bytes.iter().any(|&b| b != 0)) {
            let hex: String = bytes.iter().map(|b| format!("{b:02x}")).collect();
            golden += &format!("{:06x} {hex}\n", line * 32);
        }
    }
    insta::assert_snapshot!(golden);
}

/// A journal of 30 records whose tail is cut, or that is replaced by another's snapshot, then goes on.
fn cut_or_install(disk: &mut SimDisk, install: bool) -> Result<(), JournalError> {
    let (store, _) = Store::open(&mut *disk, &header(2))?;
    let mut store = store.with_segment_bytes(16 << 10);
    if install {
        let bytes = state(101);
        store.install(&Snapshot { next: 101, digest: [9; 32], logic_version: 1, bytes })?;
        assert_eq!(store.durable(), 100);
    } else {
        store.cut(17)?;
    }
    let seq = store.next_seq();
    store.push(seq, seq * 10, [1; 32], payload(seq))?;
    assert_eq!(store.flush()?, seq);
    let (snapshot, records) = store.read_from(seq)?;
    assert_eq!((snapshot, records.len()), (None, 1));
    Ok(())
}

/// Where a journal ends and what it begins with.
fn extent(disk: &mut SimDisk) -> (Option<u64>, u64) {
    let (store, recovered) = Store::open(&mut *disk, &header(3)).unwrap();
    let snapshot = recovered.snapshot.map(|snapshot| {
        assert_eq!(snapshot.bytes, state(snapshot.next));
        snapshot.next
    });
    for (record, seq) in recovered.records.iter().zip(snapshot.unwrap_or(1)..) {
        assert_eq!((record.seq, &record.payload), (seq, &payload(seq)));
    }
    (snapshot, store.durable())
}

#[test]
fn a_journal_is_cut_or_replaced_whole_or_not_at_all() {
    let mut before = SimDisk::new();
    let (store, _) = Store::open(&mut before, &HEADER).unwrap();
    let mut store = store.with_segment_bytes(16 << 10);
    for seq in 1..=30 {
        store.push(seq, seq * 10, [1; 32], payload(seq)).unwrap();
        store.flush().unwrap();
    }
    drop(store);
    for install in [false, true] {
        let mut disk = before.clone();
        disk.fail_at(1 << 40, Fault::Io);
        cut_or_install(&mut disk, install).unwrap();
        let operations = disk.operations();
        let done = extent(&mut disk);
        assert_eq!(done, if install { (Some(101), 101) } else { (None, 18) });
        let mut outcomes = std::collections::BTreeSet::new();
        for at in 0..operations {
            for mut ending in endings(at) {
                let mut disk = before.clone();
                disk.fail_at(at, Fault::Crash);
                cut_or_install(&mut disk, install).unwrap_err();
                disk.crash(&mut ending);
                outcomes.insert(extent(&mut disk));
            }
        }
        let allowed = if install {
            vec![(None, 0), (None, 30), (Some(101), 100), done]
        } else {
            vec![(None, 17), done, (None, 30)]
        };
        assert_eq!(outcomes.into_iter().collect::<Vec<_>>(), allowed, "install: {install}");
    }
}
