//! Experts that are read by way of rooms: the same bytes, the same faults, and no more rooms than there are.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc::Receiver;

use super::super::{Outlet, Staged};
use super::*;
use crate::arena::SlotWriter;

/// Rooms beside slots that are the host's too. Whoever brings experts on is slow, and has some at once, of which the last one ends first.
#[derive(Debug)]
struct Rooms {
    rooms: Arc<Arena>,
    pause: Duration,
    brought: AtomicU32,
}

impl Rooms {
    fn new(ground: &Ground, count: u32, pause: Duration) -> Arc<Self> {
        let rooms = Arena::new(count, ground.slot_bytes, u64::MAX).unwrap();
        Arc::new(Self { rooms, pause, brought: AtomicU32::new(0) })
    }
}

impl Staging for Rooms {
    fn stages(&self, _: &SlotWriter) -> bool {
        true
    }

    fn room(&self) -> Option<SlotWriter> {
        self.rooms.write_any(0..self.rooms.slots() as u32)
    }

    fn run(&self, verified: &Receiver<Staged>, outlet: &Outlet) {
        while let Ok(first) = verified.recv() {
            std::thread::sleep(self.pause);
            let mut all = vec![first];
            all.extend(verified.try_iter().take(2));
            for mut staged in all.into_iter().rev() {
                if let Some(mut keep) = staged.load.keep.take() {
                    keep.copy_from_slice(&staged.load.slot);
                }
                staged.load.slot.copy_from_slice(&staged.room);
                self.brought.fetch_add(1, Ordering::Relaxed);
                outlet.answer(staged, Ok(()));
            }
        }
    }
}

fn has_uring(ground: &Ground) -> bool {
    ways(ground).contains(&Io::Uring)
}

#[test]
fn rooms_bring_the_same_bytes() {
    let lengths = [1, 4095, 4096, 4097, 1 << 20, (1 << 20) + 1, (3 << 20) + 777, 70_001];
    for padded_end in [true, false] {
        let ground = Ground::new(&lengths, padded_end);
        for count in [1, 3, 40] {
            if !has_uring(&ground) {
                return;
            }
            let rooms = Rooms::new(&ground, count, Duration::from_millis(2));
            let staging = Some(Arc::clone(&rooms) as Arc<dyn Staging>);
            let (arena, running) =
                (ground.arena(), ground.start_by(staging, Io::Uring, &[], Bounds::default()));
            for round in 0..3 {
                (0..ground.blobs.len()).for_each(|nth| running.load(&ground, &arena, nth));
                for _ in 0..ground.blobs.len() {
                    let (nth, result) = running.hear();
                    assert_eq!(result, Ok(()), "{nth}");
                    assert!(ground.holds(&arena, nth), "{nth}, {count} rooms, round {round}");
                    arena.write(Slot(nth as u32)).fill(0xaa);
                }
            }
            assert_eq!(rooms.brought.load(Ordering::Relaxed), 3 * ground.blobs.len() as u32);
            running.close();
            assert!((0..count).all(|room| rooms.rooms.write_any(room..room + 1).is_some()), "all are free");
        }
    }
}

/// What is wrong is found in its room: none of it is brought on.
#[test]
fn what_is_wrong_once_is_read_again_and_twice_is_a_fault() {
    let ground = Ground::new(&[5000, (2 << 20) + 99], false);
    if !has_uring(&ground) {
        return;
    }
    let offset = ground.blobs[3].offset;
    for at in [offset, offset + (1 << 20) + 5000, offset + (2 << 20) + 50] {
        for wrong in [Wrong::Error(EIO), Wrong::Short(0), Wrong::Byte] {
            for times in [1, 2] {
                let rooms = Rooms::new(&ground, 1, Duration::ZERO);
                let staging = Some(Arc::clone(&rooms) as Arc<dyn Staging>);
                let planned = planned(at, times, wrong);
                let running = ground.start_by(staging, Io::Uring, &planned, Bounds::default());
                let arena = ground.arena();
                let result = running.one(&ground, &arena, 3);
                assert_eq!(running.faults.left(), 0, "{wrong:?} at {at} happened");
                assert_eq!(rooms.brought.load(Ordering::Relaxed), u32::from(times == 1), "{wrong:?} at {at}");
                match result {
                    Ok(()) => assert!(times == 1 && ground.holds(&arena, 3), "{wrong:?} at {at}"),
                    Err(fault) => {
                        let words = fault.to_string();
                        assert!(times == 2 && words.contains("expert 1 of layer 1"), "{wrong:?}: {words}");
                        assert_eq!(
                            matches!(fault, Fault::Corrupt(_)),
                            matches!(wrong, Wrong::Byte),
                            "{words}"
                        );
                    }
                }
                // The only room is free again, and who waits for it is told.
                assert_eq!(running.one(&ground, &arena, 3), Ok(()), "{wrong:?} at {at}");
                assert!(ground.holds(&arena, 3));
                running.close();
            }
        }
    }
}

#[test]
fn what_was_in_the_slot_is_kept_by_whoever_brings_the_next() {
    let ground = Ground::new(&[(1 << 20) + 1, 9000], true);
    if !has_uring(&ground) {
        return;
    }
    let rooms = Rooms::new(&ground, 2, Duration::ZERO);
    let running = ground.start_by(Some(rooms), Io::Uring, &[], Bounds::default());
    let (arena, warm) = (ground.arena(), ground.arena());
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
fn an_epoch_that_is_over_leaves_its_rooms() {
    let ground = Ground::new(&[4 << 20, 5000], true);
    if !has_uring(&ground) {
        return;
    }
    let rooms = Rooms::new(&ground, 2, Duration::from_millis(1));
    let staging = Some(Arc::clone(&rooms) as Arc<dyn Staging>);
    let running = ground.start_by(staging, Io::Uring, &planned(0, 1, Wrong::Byte), Bounds::default());
    let (arena, next) = (ground.arena(), ground.arena());
    (0..4).for_each(|nth| running.load(&ground, &arena, nth));
    running.reader.as_ref().unwrap().forget(1);
    drop(arena);
    (0..4).for_each(|nth| running.load_in(1, &ground, &next, nth));
    let mut heard = 0;
    while heard < 4 {
        match running.answers.recv_timeout(Duration::from_secs(60)).unwrap() {
            Told::Answer(Answer { epoch: 1, load, result, .. }) => {
                assert_eq!(result, Ok(()));
                assert!(ground.holds(&next, load.0 as usize));
                heard += 1;
            }
            Told::Answer(_) => {}
            other => panic!("{other:?}"),
        }
    }
    running.close();
    assert!((0..2).all(|room| rooms.rooms.write_any(room..room + 1).is_some()), "all are free");
}
