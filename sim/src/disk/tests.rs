//! The faults of a running disk, each by a log that asks for it.

use super::*;
use crate::decision::{Decision, Point};
use crate::hazard::Hazard;
use std::collections::BTreeSet;

/// A disk with a synced file, on which a fault happens at every opportunity but not before.
fn disk(hazard: Hazard, value: u64, unrestricted: bool) -> SimDisk {
    let log: Vec<Decision> =
        (0..200).map(|nth| Decision { point: Point { hazard, subject: 0, nth }, value }).collect();
    let atlas = Atlas::new(vec![BTreeSet::from([0])], unrestricted);
    let mut disk = SimDisk::of_node(0, 4096, Decisions::of_log(1, &[]), atlas.clone());
    disk.create_new("log").expect("an empty disk");
    let bytes: Vec<u8> = (0..20_000u32).map(|n| u8::try_from(1 + n % 250).expect("a byte")).collect();
    disk.append("log", &bytes).expect("no fault yet");
    disk.sync("log").expect("no fault yet");
    disk.sync_dir().expect("no fault yet");
    disk.wear = Some(Wear::new(Decisions::of_log(1, &log), atlas, 0));
    disk
}

fn read(disk: &mut SimDisk) -> Result<Vec<u8>, DiskError> {
    let mut bytes = vec![0; 20_000];
    disk.read_at("log", 0, &mut bytes).map(|_| bytes)
}

#[test]
fn reads_fail_lie_and_wear_out() {
    let good = read(&mut disk(Hazard::Crash, 0, true)).expect("nothing happens");
    assert!(read(&mut disk(Hazard::ReadError, 0, true)).is_err());
    let stale = read(&mut disk(Hazard::StaleRead, 0, true)).expect("it lies");
    assert_eq!((&stale[..15_904], &stale[15_904..]), (&good[..15_904], &[0; 4096][..]));
    let mut rotten = disk(Hazard::Rot, 77, true);
    let first = read(&mut rotten).expect("it lies");
    rotten.wear = None;
    assert_eq!((read(&mut rotten).expect("for good"), first[77] ^ good[77]), (first, 1));
    let mut worn = disk(Hazard::UnreadableSector, 5000, true);
    assert!(read(&mut worn).is_err());
    worn.wear = None;
    assert!(read(&mut worn).is_err(), "for good");
    let mut part = [0; 4096];
    assert_eq!(worn.read_at("log", 0, &mut part), Ok(4096), "the other sectors can be read");
    let mut elsewhere = disk(Hazard::MisdirectRead, 9000, true);
    assert_eq!(elsewhere.read_at("log", 0, &mut part), Ok(4096));
    assert_eq!(part[..], good[8192..12_288]);
}

#[test]
fn writes_fail_and_lie() {
    let kind = |hazard, act: fn(&mut SimDisk) -> Result<(), DiskError>| {
        act(&mut disk(hazard, 0, true)).map_err(|error| error.kind)
    };
    let append: fn(&mut SimDisk) -> _ = |disk| disk.append("log", &[7; 5000]);
    assert_eq!(kind(Hazard::WriteError, append), Err(DiskErrorKind::Io));
    assert_eq!(kind(Hazard::FullAppend, append), Err(DiskErrorKind::NoSpace));
    assert_eq!(kind(Hazard::FullRename, |disk| disk.rename("log", "b")), Err(DiskErrorKind::NoSpace));
    for (hazard, hurt) in [(Hazard::PhantomWrite, 0), (Hazard::MisdirectWrite, 4096)] {
        let mut disk = disk(hazard, 1, true);
        append(&mut disk).expect("it lies");
        disk.sync("log").expect("it lies");
        disk.wear = None;
        let seen = read(&mut disk).expect("a read").iter().filter(|&&byte| byte == 7).count();
        assert!(seen >= hurt, "{hazard}: {seen}");
        disk.crash(&mut Ending::Old);
        let mut tail = [9; 5000];
        assert_eq!(disk.read_at("log", 20_000, &mut tail), Ok(5000));
        assert_eq!(tail, [0; 5000], "{hazard}: what was synced is not there");
    }
    let mut dropped = disk(Hazard::SyncError, 0, true);
    append(&mut dropped).expect("no fault of appends");
    assert!(dropped.sync("log").is_err());
}

#[test]
fn what_cannot_be_had_elsewhere_is_not_damaged() {
    let mut disk = disk(Hazard::Rot, 77, false);
    let bytes = read(&mut disk).expect("a read");
    assert_eq!(bytes[77], 78);
}

#[test]
fn operations_take_time_and_stall() {
    let mut usual = disk(Hazard::Crash, 0, true);
    read(&mut usual).expect("a read");
    let usual = usual.take_ns();
    let mut stalled = disk(Hazard::StallDisk, 3_000_000_000, true);
    read(&mut stalled).expect("a read");
    assert_eq!(stalled.take_ns(), usual + 3_000_000_000);
    assert_eq!(stalled.take_ns(), 0);
}

#[test]
fn decided_endings_are_old_unless_they_are_decided() {
    let calm = || disk(Hazard::Crash, 0, true);
    for (hazard, value, len) in
        [(Hazard::Crash, 0, 0), (Hazard::EndLength, 2, 5000), (Hazard::EndLength, 201, 100)]
    {
        let mut disk = if hazard == Hazard::Crash { calm() } else { disk(hazard, value, true) };
        disk.append("log", &[7; 5000]).expect("no fault");
        disk.crash(&mut Ending::Decided);
        assert_eq!(disk.len("log"), Ok(20_000 + len), "{hazard} {value}");
    }
}
