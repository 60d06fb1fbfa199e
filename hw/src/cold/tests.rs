//! Each way brings the same bytes, and meets what disks do wrong alike.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use lite_llm_core::ids::{ExpertKey, LoadId, Slot};
use lite_llm_core::input::Fault;
use lite_llm_model::checkpoint::native::ExpertBlob;

use super::faulty::{Faults, FaultyBlocks, FaultyQueue, Planned, Wrong};
use super::reader::{Bounds, Tell};
use super::{Answer, Cold, ColdError, Fetch, Io, Load, Reader, Staging, Told};
use crate::arena::Arena;

mod staged;

const EIO: i32 = 5;
const EINTR: i32 = 4;
const EAGAIN: i32 = 11;
/// Longer than any test.
const EVER: Duration = Duration::from_secs(3600);

/// Shards with an expert of one length each; the last of a shard may end with the file.
struct Ground {
    _dir: tempfile::TempDir,
    paths: Vec<PathBuf>,
    blobs: Vec<ExpertBlob>,
    bytes: Vec<Vec<u8>>,
    slot_bytes: u64,
}

impl Ground {
    fn new(lengths: &[usize], padded_end: bool) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (mut paths, mut blobs, mut all) = (Vec::new(), Vec::new(), Vec::new());
        for shard in 0..2 {
            let path = dir.path().join(format!("experts-{shard}.bin"));
            let (mut file, mut offset) = (File::create(&path).unwrap(), 0u64);
            for (ordinal, &length) in (0..).zip(lengths) {
                let mut state = (shard * 1000 + ordinal as usize) as u64 + 1;
                let bytes: Vec<u8> = std::iter::repeat_with(|| {
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (state >> 56) as u8
                })
                .take(length)
                .collect();
                file.write_all(&bytes).unwrap();
                let end = offset + length as u64;
                let crc32 = crc32fast::hash(&bytes);
                let layer = shard as u32;
                blobs.push(ExpertBlob { shard, layer, ordinal, offset, bytes: length, crc32 });
                offset = end.next_multiple_of(4096);
                if padded_end || (ordinal as usize) + 1 < lengths.len() {
                    file.write_all(&vec![0; (offset - end) as usize]).unwrap();
                }
                all.push(bytes);
            }
            paths.push(path);
        }
        let slot_bytes = lengths.iter().max().unwrap().next_multiple_of(4096) as u64;
        Self { _dir: dir, paths, blobs, bytes: all, slot_bytes }
    }

    fn arena(&self) -> Arc<Arena> {
        Arena::new(self.blobs.len() as u32, self.slot_bytes, u64::MAX).unwrap()
    }

    fn start(&self, io: Io, planned: &[Planned]) -> Running {
        self.start_within(io, planned, Bounds::default())
    }

    fn start_within(&self, io: Io, planned: &[Planned], bounds: Bounds) -> Running {
        self.start_by(None, io, planned, bounds)
    }

    fn start_by(
        &self,
        staging: Option<Arc<dyn Staging>>,
        io: Io,
        planned: &[Planned],
        bounds: Bounds,
    ) -> Running {
        let faults = Faults::of(planned);
        let cold = Cold::of_shards(Some(io), &self.paths, 1 << 20).unwrap();
        assert!(cold.report().contains(if io == Io::Uring { "io_uring" } else { "with " }), "{cold:?}");
        let Fetch { blocks: inner, shards } = cold.fetch.unwrap();
        let fetch = Fetch { blocks: Arc::new(FaultyBlocks { inner, faults: Arc::clone(&faults) }), shards };
        let (told, answers) = channel();
        let tell: Tell = Arc::new(move |what| told.send(what).is_ok());
        let reader = cold.ring.map(|ring| {
            let queue = FaultyQueue::under(ring, Arc::clone(&faults));
            Reader::start(queue, fetch.clone(), bounds, staging, Arc::clone(&tell)).unwrap()
        });
        Running { reader, fetch, tell, answers, faults }
    }

    fn holds(&self, arena: &Arc<Arena>, nth: usize) -> bool {
        arena.read(Slot(nth as u32))[..self.bytes[nth].len()] == self.bytes[nth]
    }
}

/// A way under way.
struct Running {
    reader: Option<Reader>,
    fetch: Fetch,
    tell: Tell,
    answers: Receiver<Told>,
    faults: Arc<Faults>,
}

impl Running {
    fn load(&self, ground: &Ground, arena: &Arc<Arena>, nth: usize) {
        self.load_in(0, ground, arena, nth);
    }

    fn load_in(&self, epoch: u64, ground: &Ground, arena: &Arc<Arena>, nth: usize) {
        let slot = arena.write(Slot(nth as u32));
        let (load, blob) = (LoadId(nth as u64), ground.blobs[nth]);
        let expert = ExpertKey { layer: blob.layer, tier: 0, group: 0, expert: blob.ordinal };
        if let Some(reader) = &self.reader {
            return reader.read(Load { epoch, load, expert, blob, slot, keep: None });
        }
        let (fetch, tell) = (self.fetch.clone(), Arc::clone(&self.tell));
        std::thread::spawn(move || {
            let mut slot = slot;
            let result = fetch.read(expert, &blob, &mut slot);
            drop(slot);
            tell(Told::Answer(Answer { epoch, load, result, took: Duration::ZERO }));
        });
    }

    fn hear(&self) -> (usize, Result<(), Fault>) {
        match self.answers.recv_timeout(Duration::from_secs(60)).expect("an answer") {
            Told::Answer(Answer { load, result, .. }) => (load.0 as usize, result),
            other => panic!("{other:?}"),
        }
    }

    /// Loads one, and says what came of it.
    fn one(&self, ground: &Ground, arena: &Arc<Arena>, nth: usize) -> Result<(), Fault> {
        self.load(ground, arena, nth);
        let (heard, result) = self.hear();
        assert_eq!(heard, nth);
        result
    }

    fn close(self) {
        for thread in self.reader.into_iter().flat_map(Reader::close) {
            thread.join().unwrap();
        }
    }
}

/// The ways of this machine: a sandbox may have no io_uring, a file system no direct reads.
fn ways(ground: &Ground) -> Vec<Io> {
    let all = [Io::Uring, Io::Pread, Io::Mmap];
    all.into_iter()
        .filter(|&io| io != Io::Uring || Cold::of_shards(Some(io), &ground.paths, 0).is_ok())
        .collect()
}

fn planned(at: u64, times: u32, wrong: Wrong) -> [Planned; 1] {
    [Planned { shard: 1, at, times, wrong }]
}

#[test]
fn every_way_brings_the_same_bytes() {
    let lengths = [1, 4095, 4096, 4097, 1 << 20, (1 << 20) + 1, (3 << 20) + 777, 70_001];
    for padded_end in [true, false] {
        let ground = Ground::new(&lengths, padded_end);
        for io in ways(&ground) {
            let (arena, running) = (ground.arena(), ground.start(io, &[]));
            for round in 0..3 {
                (0..ground.blobs.len()).for_each(|nth| running.load(&ground, &arena, nth));
                for _ in 0..ground.blobs.len() {
                    let (nth, result) = running.hear();
                    assert_eq!(result, Ok(()), "{io} {nth}");
                    assert!(ground.holds(&arena, nth), "{io} {nth}, round {round}");
                    arena.write(Slot(nth as u32)).fill(0xaa);
                }
            }
            running.close();
        }
    }
}

#[test]
fn a_disk_may_be_wrong_once_and_not_twice() {
    wrong_once_and_twice(&Ground::new(&[5000, (2 << 20) + 99], true));
    // Here no direct read reaches the tail of the last one.
    wrong_once_and_twice(&Ground::new(&[5000, (2 << 20) + 99], false));
}

fn wrong_once_and_twice(ground: &Ground) {
    // In the second piece of the second expert of the second shard; and in its tail, which may be another read.
    let offset = ground.blobs[3].offset;
    for io in ways(ground) {
        for at in [offset, offset + (1 << 20) + 5000, offset + (2 << 20) + 50] {
            for wrong in [Wrong::Error(EIO), Wrong::Short(0), Wrong::Short(4096), Wrong::Byte] {
                let (arena, running) = (ground.arena(), ground.start(io, &planned(at, 1, wrong)));
                assert_eq!(running.one(ground, &arena, 3), Ok(()), "{io} {wrong:?} at {at}");
                assert!(ground.holds(&arena, 3), "{io} {wrong:?} at {at}");
                assert_eq!(running.faults.left(), 0, "{io} {wrong:?} at {at} happened");
                running.close();
            }
            for wrong in [Wrong::Error(EIO), Wrong::Short(0), Wrong::Byte] {
                let (arena, running) = (ground.arena(), ground.start(io, &planned(at, 2, wrong)));
                let fault = running.one(ground, &arena, 3).unwrap_err();
                let words = fault.to_string();
                for part in ["experts-1.bin", "at byte", "expert 1 of layer 1"] {
                    assert!(words.contains(part), "{io} {wrong:?}: {words}");
                }
                assert_eq!(matches!(fault, Fault::Corrupt(_)), matches!(wrong, Wrong::Byte), "{io}: {words}");
                assert_eq!(running.faults.left(), 0, "{io} {wrong:?} at {at} happened");
                // The slot is free, the next load as good as any.
                assert_eq!(running.one(ground, &arena, 3), Ok(()), "{io} {wrong:?} at {at}");
                assert!(ground.holds(&arena, 3));
                running.close();
            }
        }
    }
}

#[test]
fn an_interruption_is_no_failure() {
    let ground = Ground::new(&[3 << 20], true);
    for io in ways(&ground) {
        for number in [EINTR, EAGAIN] {
            let (arena, running) = (ground.arena(), ground.start(io, &planned(5, 500, Wrong::Error(number))));
            assert_eq!(running.one(&ground, &arena, 1), Ok(()), "{io} {number}");
            assert!(ground.holds(&arena, 1) && running.faults.left() == 0, "{io} {number}");
            running.close();
            // Yet no disk is asked for ever.
            let (arena, running) =
                (ground.arena(), ground.start(io, &planned(5, 1 << 20, Wrong::Error(number))));
            assert!(matches!(running.one(&ground, &arena, 1), Err(Fault::Io(_))), "{io} {number}");
            running.close();
        }
    }
}

#[test]
fn a_shard_that_is_cut_short_while_it_is_served_is_a_fault() {
    for io in ways(&Ground::new(&[1], true)) {
        let ground = Ground::new(&[(1 << 20) + 300, 2 << 20], true);
        let (arena, running) = (ground.arena(), ground.start(io, &[]));
        let cut = File::options().write(true).open(&ground.paths[1]).unwrap();
        cut.set_len(ground.blobs[3].offset + (1 << 20) + 8192).unwrap();
        assert_eq!(running.one(&ground, &arena, 2), Ok(()), "{io}");
        let fault = running.one(&ground, &arena, 3).unwrap_err();
        let words = fault.to_string();
        assert!(matches!(fault, Fault::Io(_)), "{io}: {words}");
        assert!(words.contains("experts-1.bin") && words.contains("expert 1 of layer 1"), "{io}: {words}");
        assert_eq!(running.one(&ground, &arena, 1), Ok(()), "{io}: the other shard is whole");
        running.close();
    }
}

#[test]
fn loads_are_begun_in_the_order_of_need() {
    let ground = Ground::new(&[(3 << 20) + 5, 4096, 9000, 2 << 20, 12_288], true);
    if !ways(&ground).contains(&Io::Uring) {
        return;
    }
    let (arena, running) = (ground.arena(), ground.start(Io::Uring, &[]));
    let order = [7, 0, 3, 9, 1, 2, 8, 4];
    order.iter().for_each(|&nth| running.load(&ground, &arena, nth));
    order.iter().for_each(|_| assert_eq!(running.hear().1, Ok(())));
    let reads = running.faults.reads();
    let first = |nth: usize| {
        let blob = ground.blobs[nth];
        reads.iter().position(|&read| read == (blob.shard, blob.offset)).unwrap()
    };
    let firsts: Vec<usize> = order.iter().map(|&nth| first(nth)).collect();
    assert!(firsts.is_sorted(), "{firsts:?}");
    running.close();
}

#[test]
fn what_stalls_holds_nothing_else_up() {
    let ground = Ground::new(&[1 << 20, 8192], true);
    let stall = planned(0, 1, Wrong::Stall(Duration::from_millis(400)));
    for io in ways(&ground) {
        let (arena, running) = (ground.arena(), ground.start(io, &stall));
        [2, 0, 1, 3].iter().for_each(|&nth| running.load(&ground, &arena, nth));
        let order: Vec<usize> = (0..4)
            .map(|_| running.hear())
            .map(|(nth, result)| {
                assert_eq!(result, Ok(()), "{io} {nth}");
                nth
            })
            .collect();
        assert_eq!(order.last(), Some(&2), "{io}: the others come meanwhile");
        running.close();
    }
}

#[test]
fn a_device_that_hangs_keeps_its_slot_and_nobody_waits_for_ever() {
    let ground = Ground::new(&[1 << 20, 8192], true);
    if !ways(&ground).contains(&Io::Uring) {
        return;
    }
    let bounds = Bounds { stalled: Duration::from_millis(300), close: Duration::from_millis(300) };
    let hang = planned(0, 1, Wrong::Stall(EVER));
    for closed in [true, false] {
        let (arena, running) = (ground.arena(), ground.start_within(Io::Uring, &hang, bounds));
        let began = Instant::now();
        running.load(&ground, &arena, 2);
        running.load(&ground, &arena, 0);
        assert_eq!(running.hear(), (0, Ok(())));
        if !closed {
            let lost = running.answers.recv_timeout(Duration::from_secs(60)).unwrap();
            assert!(matches!(&lost, Told::Lost(what) if what.contains("1 reads")), "{lost:?}");
        }
        running.close();
        assert!(began.elapsed() < Duration::from_secs(30), "{:?}", began.elapsed());
        // The kernel may still write there.
        let slot = std::panic::AssertUnwindSafe(|| drop(arena.write(Slot(2))));
        assert!(std::panic::catch_unwind(slot).is_err(), "the slot is given back");
        drop(arena.write(Slot(0)));
    }
}

#[test]
fn what_was_in_the_slot_is_kept_first() {
    let ground = Ground::new(&[(1 << 20) + 1, 9000], true);
    if !ways(&ground).contains(&Io::Uring) {
        return;
    }
    let (arena, warm, running) = (ground.arena(), ground.arena(), ground.start(Io::Uring, &[]));
    assert_eq!(running.one(&ground, &arena, 0), Ok(()));
    let before = arena.read(Slot(0)).to_vec();
    let (slot, keep) = (arena.write(Slot(0)), Some(warm.write(Slot(3))));
    let expert = ExpertKey { layer: 1, tier: 0, group: 0, expert: 0 };
    let load = Load { epoch: 0, load: LoadId(7), expert, blob: ground.blobs[2], slot, keep };
    running.reader.as_ref().unwrap().read(load);
    assert_eq!(running.hear(), (7, Ok(())));
    assert_eq!(&*warm.read(Slot(3)), &before[..]);
    assert_eq!(arena.read(Slot(0))[..ground.bytes[2].len()], ground.bytes[2]);
    running.close();
}

#[test]
fn an_epoch_that_is_over_leaves_nothing_behind() {
    let ground = Ground::new(&[8 << 20, 5000], true);
    if !ways(&ground).contains(&Io::Uring) {
        return;
    }
    // Its checksum is wrong once, so that it would be read again.
    let running = ground.start(Io::Uring, &planned(0, 1, Wrong::Byte));
    let arena = ground.arena();
    (0..4).for_each(|nth| running.load(&ground, &arena, nth));
    running.reader.as_ref().unwrap().forget(1);
    let former = Arc::downgrade(&arena);
    drop(arena);
    let next = ground.arena();
    (0..4).for_each(|nth| running.load_in(1, &ground, &next, nth));
    let mut heard = 0;
    while heard < 4 {
        match running.answers.recv_timeout(Duration::from_secs(60)).unwrap() {
            Told::Answer(Answer { epoch: 1, load, result, .. }) => {
                assert_eq!(result, Ok(()));
                assert!(ground.holds(&next, load.0 as usize));
                heard += 1;
            }
            Told::Answer(Answer { epoch: 0, .. }) => {}
            other => panic!("{other:?}"),
        }
    }
    let began = Instant::now();
    while Weak::strong_count(&former) > 0 {
        assert!(began.elapsed() < Duration::from_secs(30), "the former arena stays");
        std::thread::sleep(Duration::from_millis(1));
    }
    running.close();
    assert_eq!(Arc::strong_count(&next), 1);
}

#[test]
fn what_does_not_verify_after_its_epoch_is_not_read_again() {
    let ground = Ground::new(&[8192, (1 << 20) + 5], false);
    if !ways(&ground).contains(&Io::Uring) {
        return;
    }
    let offset = ground.blobs[3].offset;
    let [wrong] = planned(offset, 1, Wrong::Byte);
    // The tail, which is read when it is verified.
    let [slow] = planned(offset + (1 << 20), 1, Wrong::Stall(Duration::from_millis(300)));
    let (arena, running) = (ground.arena(), ground.start(Io::Uring, &[wrong, slow]));
    running.load(&ground, &arena, 3);
    let began = Instant::now();
    while running.faults.left() > 0 {
        assert!(began.elapsed() < Duration::from_secs(30), "it is verified");
        std::thread::sleep(Duration::from_millis(1));
    }
    running.reader.as_ref().unwrap().forget(1);
    let former = Arc::downgrade(&arena);
    drop(arena);
    while Weak::strong_count(&former) > 0 {
        assert!(began.elapsed() < Duration::from_secs(30), "the former arena stays");
        std::thread::sleep(Duration::from_millis(1));
    }
    let reads = running.faults.reads().iter().filter(|&&read| read == (1, offset)).count();
    assert_eq!(reads, 1, "once");
    running.close();
}

#[test]
fn the_choice_is_said_and_an_impossible_one_refused() {
    let ground = Ground::new(&[5000], true);
    for io in ways(&ground) {
        let cold = Cold::of_shards(Some(io), &ground.paths, 1 << 20).unwrap();
        assert_eq!(cold.io(), Some(io));
    }
    // Files of the system's own have no direct reads.
    let own = [PathBuf::from("/proc/version")];
    let Err(ColdError::Refused { io: Io::Uring, why, remedy }) = Cold::of_shards(Some(Io::Uring), &own, 0)
    else {
        panic!("it is not refused")
    };
    assert!(why.contains("/proc/version") && why.contains("O_DIRECT"), "{why}");
    assert!(remedy.contains("pread"), "{remedy}");
    let cold = Cold::of_shards(None, &own, 0).unwrap();
    assert_eq!(cold.io(), Some(Io::Pread));
    let report = cold.report();
    assert!(report.contains("pread, through the cache; not with io_uring"), "{report}");
    assert!(report.contains(&why), "{report}");
    let cold = Cold::of_shards(Some(Io::Pread), &own, 0).unwrap();
    assert!(cold.report().contains("through the cache, since"), "{}", cold.report());
    assert!(matches!(Cold::of_shards(Some(Io::Mmap), &own, 0), Err(ColdError::Refused { io: Io::Mmap, .. })));
    let none = [PathBuf::from("nowhere")];
    assert!(matches!(Cold::of_shards(None, &none, 0), Err(ColdError::Shard { .. })));
}
