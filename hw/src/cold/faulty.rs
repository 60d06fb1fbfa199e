//! A layer of files that does what disks do wrong, under any of the ways.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use super::blocks::Blocks;
use super::reader::{Bell, Came, Piece, Queue};

/// What happens to a read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Wrong {
    /// It fails with this number.
    Error(i32),
    /// It brings no more than so many bytes.
    Short(usize),
    /// The byte is another.
    Byte,
    /// It takes so long.
    Stall(Duration),
}

/// What happens to the first reads of a byte of a shard.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planned {
    pub(super) shard: usize,
    pub(super) at: u64,
    pub(super) times: u32,
    pub(super) wrong: Wrong,
}

/// What is planned, and what was read.
#[derive(Debug, Default)]
pub(super) struct Faults {
    planned: Mutex<Vec<Planned>>,
    reads: Mutex<Vec<(usize, u64)>>,
}

impl Faults {
    pub(super) fn of(planned: &[Planned]) -> Arc<Self> {
        Arc::new(Self { planned: Mutex::new(planned.to_vec()), ..Self::default() })
    }

    /// Where reads began, in the order in which they were asked for.
    pub(super) fn reads(&self) -> Vec<(usize, u64)> {
        self.reads.lock().unwrap().clone()
    }

    /// What is planned and has not happened.
    pub(super) fn left(&self) -> u32 {
        self.planned.lock().unwrap().iter().map(|planned| planned.times).sum()
    }

    /// What happens to a read, and where.
    fn meet(&self, shard: usize, offset: u64, bytes: usize) -> Option<(u64, Wrong)> {
        let mut planned = self.planned.lock().unwrap();
        let hit = |planned: &&mut Planned| {
            let within = (offset..offset + bytes as u64).contains(&planned.at);
            planned.shard == shard && planned.times > 0 && within
        };
        let Planned { at, times, wrong, .. } = planned.iter_mut().find(hit)?;
        *times -= 1;
        Some((*at, *wrong))
    }

    /// What was planned there did not happen yet.
    fn put_off(&self, shard: usize, at: u64) {
        let mut planned = self.planned.lock().unwrap();
        let planned = planned.iter_mut().find(|planned| (planned.shard, planned.at) == (shard, at));
        planned.expect("it was planned").times += 1;
    }
}

/// Faults under what blocks.
#[derive(Debug)]
pub(super) struct FaultyBlocks {
    pub(super) inner: Arc<dyn Blocks>,
    pub(super) faults: Arc<Faults>,
}

impl Blocks for FaultyBlocks {
    fn read_at(&self, shard: usize, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.faults.reads.lock().unwrap().push((shard, offset));
        match self.faults.meet(shard, offset, into.len()) {
            Some((_, Wrong::Error(number))) => Err(io::Error::from_raw_os_error(number)),
            Some((_, Wrong::Short(bytes))) => {
                let bytes = bytes.min(into.len());
                self.inner.read_at(shard, offset, &mut into[..bytes])
            }
            Some((at, Wrong::Byte)) => {
                let bytes = self.inner.read_at(shard, offset, into)?;
                match into[..bytes].get_mut((at - offset) as usize) {
                    Some(byte) => *byte ^= 1,
                    // It is another read that brings it.
                    None => self.faults.put_off(shard, at),
                }
                Ok(bytes)
            }
            Some((_, Wrong::Stall(time))) => {
                std::thread::sleep(time);
                self.inner.read_at(shard, offset, into)
            }
            None => self.inner.read_at(shard, offset, into),
        }
    }
}

/// Faults under a queue.
pub(super) struct FaultyQueue<Q> {
    inner: Q,
    faults: Arc<Faults>,
    pushed: Vec<Piece>,
    held: Vec<(Instant, Came)>,
}

// SAFETY: the places of pieces are the reader's, which lends them until they have come, on whichever thread it runs.
unsafe impl<Q: Send> Send for FaultyQueue<Q> {}

impl<Q> FaultyQueue<Q> {
    pub(super) const fn under(inner: Q, faults: Arc<Faults>) -> Self {
        Self { inner, faults, pushed: Vec::new(), held: Vec::new() }
    }

    fn befall(&mut self, came: &mut Came) -> Option<Instant> {
        let at = self.pushed.iter().position(|piece| piece.id == came.id).expect("it was pushed");
        let piece = self.pushed.swap_remove(at);
        let (at, wrong) = self.faults.meet(piece.shard, piece.offset, piece.len as usize)?;
        match wrong {
            Wrong::Error(number) => came.result = -number,
            Wrong::Short(bytes) => came.result = came.result.min(bytes as i32),
            Wrong::Byte => {
                // SAFETY: the byte lies in the piece, which is lent until it has come.
                unsafe { *piece.into.add((at - piece.offset) as usize) ^= 1 };
            }
            Wrong::Stall(time) => return Some(Instant::now() + time),
        }
        None
    }
}

impl<Q: Queue> Queue for FaultyQueue<Q> {
    unsafe fn push(&mut self, piece: &Piece) -> bool {
        self.faults.reads.lock().unwrap().push((piece.shard, piece.offset));
        self.pushed.push(*piece);
        // SAFETY: the caller's promise is passed on.
        unsafe { self.inner.push(piece) }
    }

    fn turn(&mut self, wait: Option<Duration>, came: &mut Vec<Came>) -> io::Result<()> {
        let now = Instant::now();
        let next = self.held.iter().map(|(until, _)| until.saturating_duration_since(now)).min();
        let mut real = Vec::new();
        self.inner.turn(wait.into_iter().chain(next).min(), &mut real)?;
        for mut one in real {
            match self.befall(&mut one) {
                Some(until) => self.held.push((until, one)),
                None => came.push(one),
            }
        }
        let now = Instant::now();
        came.extend(self.held.extract_if(.., |(until, _)| *until <= now).map(|(_, came)| came));
        Ok(())
    }

    fn bell(&self) -> Arc<dyn Bell> {
        self.inner.bell()
    }

    unsafe fn register(&mut self, buffer: u16, start: *mut u8, bytes: usize) -> bool {
        // SAFETY: the caller's promise is passed on.
        unsafe { self.inner.register(buffer, start, bytes) }
    }

    fn forget(&mut self, count: u16) {
        self.inner.forget(count);
    }
}
