//! How experts that a reader of the cold tier has in flight come to a GPU: each is read into a pinned room of several, verified there,
//! and copied into its slot while the next ones are read, verified and copied.
//!
//! One stream copies up, another down. What was copied up is copied back after a mark of the first one, and compared; so one expert
//! goes up while the one before it comes down, and nobody waits for a single copy. A room is given back when its expert was compared,
//! never before. A copy that differs is made once more; then the device is lost.

use super::CudaError;
use super::event::Event;
use super::gpu::Gpu;
use super::stream::Stream;
use crate::arena::{Arena, ArenaError, SlotWriter};
use crate::cold::{Outlet, Staged, Staging};
use std::collections::VecDeque;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of experts that are read, verified or copied at once: what the reader has in flight, and as much behind it.
const AHEAD_BYTES: u64 = 128 << 20;
/// Rooms at least: one is read, one verified, one copied.
const ROOMS_MIN: u64 = 3;
/// Rooms at most.
const ROOMS_MAX: u64 = 32;
/// Copies under way at once: one goes up, one comes down, one is compared, one is to go next.
const LANES: u32 = 4;
/// Pinned slots that loaders have beside these, each two: `upload.rs`.
const OF_LOADERS: u64 = 2 * crate::node::open::LOADERS_MAX as u64;
/// How often copies under way are looked at.
const LOOK_EVERY: Duration = Duration::from_micros(20);

/// Experts that are on their way at once, at most.
pub(crate) fn rooms(slot_bytes: u64) -> u32 {
    (AHEAD_BYTES / slot_bytes.max(1)).clamp(ROOMS_MIN, ROOMS_MAX) as u32
}

/// Bytes of pinned memory that experts pass through, at most, whichever way they are read.
pub(crate) fn pinned_bytes(slot_bytes: u64) -> u64 {
    (u64::from(rooms(slot_bytes)) + u64::from(LANES) + OF_LOADERS).saturating_mul(slot_bytes)
}

/// The rooms of a GPU's experts. There are none before memory is carved.
#[derive(Debug)]
pub(crate) struct Rooms {
    gpu: Arc<Gpu>,
    /// Rooms, and behind them a slot for each lane, to which is copied back.
    carved: Mutex<Option<Arc<Arena>>>,
}

impl Rooms {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Arc<Self> {
        Arc::new(Self { gpu: Arc::clone(gpu), carved: Mutex::new(None) })
    }

    /// Takes pinned memory for experts of such a size.
    ///
    /// # Errors
    /// If the system does not have so much.
    pub(crate) fn carve(&self, slot_bytes: u64) -> Result<(), ArenaError> {
        if slot_bytes > 0 {
            let slots = rooms(slot_bytes) + LANES;
            *self.carved() = Some(Arena::pinned(&self.gpu, slots, slot_bytes, u64::MAX)?);
        }
        Ok(())
    }

    /// Lets go of it, as soon as what is in it has been brought on.
    pub(crate) fn release(&self) {
        *self.carved() = None;
    }

    fn carved(&self) -> MutexGuard<'_, Option<Arc<Arena>>> {
        self.carved.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Staging for Rooms {
    fn room(&self) -> Option<SlotWriter> {
        let carved = self.carved();
        let arena = carved.as_ref()?;
        arena.write_any(0..arena.slots() as u32 - LANES)
    }

    fn run(&self, verified: &Receiver<Staged>, outlet: &Outlet) {
        let copies = Copies::new(&self.gpu);
        let ended = copies.and_then(|mut copies| copies.run(verified, outlet));
        if let Err(error) = ended {
            self.gpu.lose();
            outlet.lost(error.to_string());
        }
    }
}

/// An expert under way.
#[derive(Debug)]
struct Flight {
    staged: Staged,
    /// Where it is copied back to.
    back: SlotWriter,
    lane: Lane,
    /// Whether it is copied for the second time.
    again: bool,
}

/// Marks of an expert under way: it is up; it is back.
#[derive(Debug)]
struct Lane {
    up: Event,
    back: Event,
}

/// The copying thread's own.
struct Copies {
    gpu: Arc<Gpu>,
    up: Stream,
    down: Stream,
    /// Those that nobody uses.
    lanes: Vec<Lane>,
    /// Verified, in the order in which they came.
    waiting: VecDeque<Staged>,
    /// In the order in which they come back.
    flights: VecDeque<Flight>,
    /// When something last came back, or began to be waited for.
    heard: Instant,
}

impl Copies {
    fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        let lane = |_| Ok(Lane { up: Event::new(gpu)?, back: Event::new(gpu)? });
        Ok(Self {
            gpu: Arc::clone(gpu),
            up: Stream::new(gpu)?,
            down: Stream::new(gpu)?,
            lanes: (0..LANES).map(lane).collect::<Result<_, CudaError>>()?,
            waiting: VecDeque::new(),
            flights: VecDeque::new(),
            heard: Instant::now(),
        })
    }

    fn run(&mut self, verified: &Receiver<Staged>, outlet: &Outlet) -> Result<(), CudaError> {
        self.gpu.enter()?;
        loop {
            if self.flights.is_empty() && self.waiting.is_empty() {
                // Whoever reads is closed, and all that it read is where it should be.
                let Ok(staged) = verified.recv() else { return Ok(()) };
                self.waiting.push_back(staged);
            }
            self.waiting.extend(verified.try_iter());
            self.begin()?;
            if self.look(outlet)? {
                self.heard = Instant::now();
            } else if self.heard.elapsed() > self.gpu.patience {
                return Err(CudaError::Hang { patience: self.gpu.patience });
            } else {
                std::thread::sleep(LOOK_EVERY);
            }
        }
    }

    /// Gives the streams what waits, as far as there are lanes.
    fn begin(&mut self) -> Result<(), CudaError> {
        while !self.lanes.is_empty()
            && let Some(staged) = self.waiting.pop_front()
        {
            if self.flights.is_empty() {
                self.heard = Instant::now();
            }
            let arena = staged.room.arena();
            let slots = arena.slots() as u32;
            let back = arena.write_any(slots - LANES..slots).expect("one for each lane");
            let lane = self.lanes.pop().expect("there is one");
            self.flights.push_back(Flight { staged, back, lane, again: false });
            self.send()?;
        }
        Ok(())
    }

    /// Gives the streams the last expert: what is to be kept comes down, twice, as nothing else says what it should be; then the expert
    /// goes up, and comes back.
    fn send(&mut self) -> Result<(), CudaError> {
        let Flight { staged, back, lane, .. } = self.flights.back_mut().expect("it was put there");
        let slot = staged.load.slot.address().expect("a slot of the device");
        let bytes = back.bytes();
        if let Some(keep) = &mut staged.load.keep {
            for to in [keep.start(), back.start()] {
                // SAFETY: all slots have so many bytes, those of the host are pinned, and all are this flight's, which is kept until
                // its mark is passed or the device is lost.
                unsafe { self.down.down(slot, to, bytes) }?;
            }
            return self.down.mark(&lane.back);
        }
        // SAFETY: as above.
        unsafe { self.up.up(staged.room.as_ptr(), slot, bytes) }?;
        self.up.mark(&lane.up)?;
        self.down.follow(&lane.up)?;
        // SAFETY: as above.
        unsafe { self.down.down(slot, back.start(), bytes) }?;
        self.down.mark(&lane.back)
    }

    /// Takes what has come back; whether anything has.
    fn look(&mut self, outlet: &Outlet) -> Result<bool, CudaError> {
        let mut any = false;
        while let Some(flight) = self.flights.front()
            && flight.lane.back.is_passed()?
        {
            any = true;
            let mut flight = self.flights.pop_front().expect("it was looked at");
            let sent = flight.staged.load.keep.as_ref().unwrap_or(&flight.staged.room);
            let arrived = flight.back[..] == sent[..];
            if arrived && flight.staged.load.keep.take().is_none() {
                let Flight { staged, back, lane, .. } = flight;
                self.lanes.push(lane);
                drop(back);
                outlet.answer(staged, Ok(()));
                continue;
            }
            if !arrived && std::mem::replace(&mut flight.again, true) {
                return Err(CudaError::Copy { bytes: flight.back.bytes() as u64 });
            }
            // What was kept makes room for the expert, which is another copy.
            flight.again &= !arrived;
            self.flights.push_back(flight);
            self.send()?;
        }
        Ok(any)
    }
}

impl Drop for Copies {
    fn drop(&mut self) {
        if !self.flights.is_empty() {
            // The device may write to these rooms and slots at any time: nothing is given back to it.
            self.gpu.lose();
        }
    }
}
