//! The reader: one thread with many reads in flight, each straight into its slot.
//!
//! Loads are begun in the order in which they were asked for, which is that of need; each is cut into pieces, and as many of
//! them are in flight as the device has use for (`depth.rs`). What has come whole goes to the thread that verifies it.
//!
//! A slot, or the room that is read to instead, belongs to the kernel from submission to completion. So nothing that could end
//! early gives one back: a reader that ends or panics while reads are in flight keeps their slots, and with them the arena, for
//! ever. A device that answers nothing for a minute is reported as lost, which ends the node; one that does not answer a closing
//! reader is left to itself after seconds ([`Bounds`]).

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lite_llm_core::ids::{ExpertKey, LoadId};
use lite_llm_core::input::Fault;
use lite_llm_model::checkpoint::native::ExpertBlob;

use super::depth::{DEPTH_MAX, Depth};
use super::fault::ReadFault;
use super::fetch::{Fetch, padded, passes};
use super::registered::Registered;
use super::staging::{Outlet, Staging};
use super::verify::Verify;
use super::{BLOCK, INTERRUPTED_MAX};
use crate::arena::SlotWriter;
use crate::node::error::panic_message;

/// Bytes of a piece: what a device takes in one command or few, and enough to be worth a submission.
const PIECE_BYTES: usize = 1 << 20;
/// How often a reader that waits looks at the clock.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// How long a device is waited for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// How long it may answer nothing while reads are in flight.
    pub(super) stalled: Duration,
    /// How long a reader that is closed waits for what is in flight.
    pub(super) close: Duration,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { stalled: Duration::from_secs(60), close: Duration::from_secs(5) }
    }
}

/// An expert to be read into a slot.
#[derive(Debug)]
pub struct Load {
    /// The epoch in which it was asked for.
    pub epoch: u64,
    /// Its number.
    pub load: LoadId,
    /// Whose name a fault has.
    pub expert: ExpertKey,
    /// Where it lies.
    pub blob: ExpertBlob,
    /// Where it goes.
    pub slot: SlotWriter,
    /// Where what is in the slot goes first.
    pub keep: Option<SlotWriter>,
}

/// What came of a load. Its slot is given back already.
#[derive(Debug)]
pub struct Answer {
    /// The epoch in which it was asked for.
    pub epoch: u64,
    /// Its number.
    pub load: LoadId,
    /// Whether the expert is in its slot, verified.
    pub result: Result<(), Fault>,
    /// From its first read to its checksum.
    pub took: Duration,
}

/// What a reader says.
#[derive(Debug)]
pub enum Told {
    /// A load has ended.
    Answer(Answer),
    /// The device, or the kernel's interface to it, answers no more. Slots stay with it, so no node can go on.
    Lost(String),
    /// What the slots are memory of answers no more.
    DeviceLost(String),
    /// A bug.
    Panicked(String),
}

/// Whom it says it to; whether anybody hears it.
pub(super) type Tell = Arc<dyn Fn(Told) -> bool + Send + Sync>;

/// A read of a part of an expert.
#[derive(Clone, Copy, Debug)]
pub(super) struct Piece {
    /// By which its completion is known.
    pub(super) id: u64,
    pub(super) shard: usize,
    pub(super) offset: u64,
    pub(super) into: *mut u8,
    pub(super) len: u32,
    /// The registered memory that it goes to.
    pub(super) buffer: Option<u16>,
}

/// A piece that has come: as many bytes, or an error's number, negative.
#[derive(Clone, Copy, Debug)]
pub(super) struct Came {
    pub(super) id: u64,
    pub(super) result: i32,
}

/// A queue of reads in a kernel, or in a test that stands between.
pub(super) trait Queue: Send {
    /// Takes a piece, which is submitted with the next turn; whether there was room.
    ///
    /// # Safety
    /// The memory must be there, and untouched, until the piece has come.
    unsafe fn push(&mut self, piece: &Piece) -> bool;

    /// Submits what was pushed, waits until something comes, the bell rings, or the time is over, and takes what has come.
    fn turn(&mut self, wait: Option<Duration>, came: &mut Vec<Came>) -> io::Result<()>;

    /// What ends a turn from another thread.
    fn bell(&self) -> Arc<dyn Bell>;

    /// Makes memory known under a number, in ascending order; whether it is.
    ///
    /// # Safety
    /// The memory must be there until all are forgotten or the queue is gone.
    unsafe fn register(&mut self, buffer: u16, start: *mut u8, bytes: usize) -> bool;

    /// Forgets memory: so many numbers from 0 on.
    fn forget(&mut self, count: u16);
}

/// Ends the turn of a queue.
pub(super) trait Bell: std::fmt::Debug + Send + Sync {
    fn ring(&self);
}

/// What a reader is told.
#[derive(Debug)]
pub(super) enum Message {
    Load(Load),
    /// An expert that did not have its checksum.
    Again(Read),
    /// Loads of earlier epochs that were not begun are not wanted any more, and arenas are let go of.
    Forget {
        epoch: u64,
    },
    Close,
}

/// A load under way.
#[derive(Debug)]
pub(super) struct Read {
    pub(super) load: Load,
    /// Where it is read to, if not into its slot.
    pub(super) room: Option<SlotWriter>,
    pub(super) began: Instant,
    /// Bytes that direct reads bring, and those of them that were asked for.
    pub(super) direct: usize,
    asked: usize,
    /// Pieces in flight.
    pieces: u32,
    /// Whether it is read for the second time.
    pub(super) again: bool,
    buffer: Option<u16>,
    fault: Option<Fault>,
}

/// A piece in flight, or to be asked for once more.
#[derive(Clone, Copy, Debug)]
struct Flight {
    read: usize,
    /// Within the expert.
    from: usize,
    len: usize,
    got: usize,
    again: bool,
    interrupted: u32,
}

/// The other threads' end of a reader.
#[derive(Debug)]
pub struct Reader {
    messages: Sender<Message>,
    bell: Arc<dyn Bell>,
    threads: Vec<JoinHandle<()>>,
}

impl Reader {
    pub(super) fn start(
        queue: impl Queue + 'static,
        fetch: Fetch,
        bounds: Bounds,
        staging: Option<Arc<dyn Staging>>,
        tell: Tell,
    ) -> io::Result<Self> {
        let (messages, receiver) = channel();
        let (verify, reads) = channel();
        let (onward, verified) = channel();
        let bell = queue.bell();
        let verifying = Verify {
            fetch: fetch.clone(),
            reader: messages.clone(),
            onward,
            outlet: Outlet { bell: Arc::clone(&bell), tell: Arc::clone(&tell) },
        };
        let mut flying = Flying::new(queue, fetch, bounds, (verify, Arc::clone(&tell)));
        flying.staging = staging.clone();
        let mut threads = vec![
            spawn("cold-reader", Arc::clone(&tell), move || flying.run(&receiver))?,
            spawn("cold-verify", Arc::clone(&tell), move || verifying.run(&reads))?,
        ];
        if let Some(staging) = staging {
            let outlet = Outlet { bell: Arc::clone(&bell), tell: Arc::clone(&tell) };
            threads.push(spawn("cold-copy", tell, move || staging.run(&verified, &outlet))?);
        }
        Ok(Self { messages, bell, threads })
    }

    /// Reads an expert after all that were asked for before.
    ///
    /// # Panics
    /// If the slot is too small, or not the size of what is to be kept of it.
    pub fn read(&self, load: Load) {
        assert!(load.blob.bytes <= load.slot.bytes(), "an expert fits into its slot");
        self.say(Message::Load(load));
    }

    /// Lets go of loads of earlier epochs that were not begun, and of arenas.
    pub fn forget(&self, epoch: u64) {
        self.say(Message::Forget { epoch });
    }

    fn say(&self, message: Message) {
        // A reader that is gone has said why.
        let _ = self.messages.send(message);
        self.bell.ring();
    }

    /// Ends it once what is in flight has come, or does not come. The threads that are still there are to be waited for.
    #[must_use]
    pub fn close(self) -> Vec<JoinHandle<()>> {
        self.say(Message::Close);
        self.threads
    }
}

fn spawn(name: &str, tell: Tell, run: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    std::thread::Builder::new().name(name.into()).spawn(move || {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(run)) {
            tell(Told::Panicked(panic_message(&*panic)));
        }
    })
}

/// The reader's own.
struct Flying<Q: Queue> {
    queue: Q,
    fetch: Fetch,
    bounds: Bounds,
    verify: Sender<Read>,
    tell: Tell,
    /// Where what is not for slots of the host is read to.
    staging: Option<Arc<dyn Staging>>,
    depth: Depth,
    registered: Registered,
    /// Not begun, in order of need.
    waiting: VecDeque<Load>,
    /// To be read again, before anything new.
    repeated: VecDeque<Read>,
    reads: Vec<Option<Read>>,
    /// The one of which not every piece was asked for.
    current: Option<usize>,
    flights: Vec<Option<Flight>>,
    /// Flights that are to be asked for once more.
    retried: VecDeque<usize>,
    in_flight: u32,
    /// Answers of earlier ones are not heard.
    epoch: u64,
    /// When something last came, or began to be waited for.
    heard: Instant,
    began: Instant,
    closing: Option<Instant>,
}

impl<Q: Queue> Flying<Q> {
    fn new(queue: Q, fetch: Fetch, bounds: Bounds, (verify, tell): (Sender<Read>, Tell)) -> Self {
        let now = Instant::now();
        Self {
            queue,
            fetch,
            bounds,
            verify,
            tell,
            staging: None,
            depth: Depth::new(),
            registered: Registered::default(),
            waiting: VecDeque::new(),
            repeated: VecDeque::new(),
            reads: Vec::new(),
            current: None,
            flights: vec![None; DEPTH_MAX as usize],
            retried: VecDeque::new(),
            in_flight: 0,
            epoch: 0,
            heard: now,
            began: now,
            closing: None,
        }
    }

    fn run(&mut self, messages: &Receiver<Message>) {
        let mut came = Vec::with_capacity(DEPTH_MAX as usize);
        loop {
            self.hear(messages);
            if self.closing.is_none() {
                self.fill();
            }
            let Bounds { stalled, close } = self.bounds;
            if self.closing.is_some_and(|since| self.in_flight == 0 || since.elapsed() >= close) {
                return;
            }
            let full = self.in_flight >= self.depth.now();
            let wait = match (self.in_flight, self.closing) {
                (0, _) => None,
                (_, None) => Some(stalled.min(LOOK_EVERY)),
                (_, Some(since)) => Some(close.saturating_sub(since.elapsed()).min(LOOK_EVERY)),
            };
            if let Err(error) = self.queue.turn(wait, &mut came) {
                (self.tell)(Told::Lost(format!("io_uring does not go on: {error}")));
                return;
            }
            if !came.is_empty() || self.in_flight == 0 {
                self.heard = Instant::now();
            } else if self.heard.elapsed() >= stalled && self.closing.is_none() {
                let what = format!("{} reads of experts were not answered in {stalled:?}", self.in_flight);
                (self.tell)(Told::Lost(what));
                return;
            }
            for came in came.drain(..) {
                self.came(came, full);
            }
        }
    }

    fn hear(&mut self, messages: &Receiver<Message>) {
        loop {
            match messages.try_recv() {
                Ok(Message::Load(load)) => self.waiting.push_back(load),
                Ok(Message::Again(read)) if read.load.epoch < self.epoch => {}
                Ok(Message::Again(read)) => self.repeated.push_back(read),
                Ok(Message::Forget { epoch }) => {
                    self.epoch = epoch;
                    self.waiting.retain(|load| load.epoch >= epoch);
                    self.repeated.retain(|read| read.load.epoch >= epoch);
                    self.registered.forget(&mut self.queue);
                    // What is asked for once more goes to the same memory, by another way.
                    self.reads.iter_mut().flatten().for_each(|read| read.buffer = None);
                }
                Ok(Message::Close) | Err(TryRecvError::Disconnected) => {
                    self.closing.get_or_insert_with(Instant::now);
                    return;
                }
                Err(TryRecvError::Empty) => return,
            }
        }
    }

    /// Pushes pieces until as many are in flight as the device has use for.
    fn fill(&mut self) {
        while self.in_flight < self.depth.now() {
            let Some(flight) = self.retried.pop_front().or_else(|| self.next_flight()) else { return };
            let Flight { read, from, len, got, .. } = self.flights[flight].expect("it is to be pushed");
            let of = self.reads[read].as_mut().expect("a read has its flights");
            let place = of.place();
            let start = place.start();
            assert!(from + len <= place.bytes(), "a piece lies in its place");
            let piece = Piece {
                id: flight as u64,
                shard: of.load.blob.shard,
                offset: of.load.blob.offset + (from + got) as u64,
                // SAFETY: by the assertion above the piece lies in it.
                into: unsafe { start.add(from + got) },
                len: (len - got) as u32,
                buffer: of.buffer,
            };
            // SAFETY: the place is `of`'s, which is kept, and not looked at, until the piece has come (`came`), or for ever.
            if !unsafe { self.queue.push(&piece) } {
                self.retried.push_front(flight);
                return;
            }
            if self.in_flight == 0 {
                self.heard = Instant::now();
            }
            self.in_flight += 1;
        }
    }

    /// The next piece of the load under way, or of the next one.
    fn next_flight(&mut self) -> Option<usize> {
        let flight = self.flights.iter().position(Option::is_none)?;
        let at = match self.current {
            Some(at) => at,
            None => self.begin()?,
        };
        let read = self.reads[at].as_mut().expect("the current read is there");
        let from = read.asked;
        let len = PIECE_BYTES.min(read.direct - from);
        read.asked += len;
        read.pieces += 1;
        self.current = (read.asked < read.direct).then_some(at);
        self.flights[flight] = Some(Flight { read: at, from, len, got: 0, again: false, interrupted: 0 });
        Some(flight)
    }

    /// Begins the next load; one in which there is nothing to read directly goes on at once.
    fn begin(&mut self) -> Option<usize> {
        loop {
            let mut read = match self.repeated.pop_front() {
                Some(read) => Read { asked: 0, ..read },
                None => self.prepare()?,
            };
            if read.direct == 0 {
                let _ = self.verify.send(read);
                continue;
            }
            read.buffer = self.registered.buffer(read.place(), &mut self.queue);
            let at = self.reads.iter().position(Option::is_none).unwrap_or_else(|| {
                self.reads.push(None);
                self.reads.len() - 1
            });
            self.reads[at] = Some(read);
            return Some(at);
        }
    }

    fn prepare(&mut self) -> Option<Read> {
        let first = self.waiting.front()?;
        let room = match &self.staging {
            // Where there is none, the bell rings when there is one again.
            Some(staging) if staging.stages(&first.slot) => Some(staging.room()?),
            _ => None,
        };
        let mut load = self.waiting.pop_front()?;
        let began = Instant::now();
        if room.is_none()
            && let Some(mut keep) = load.keep.take()
        {
            keep.copy_from_slice(&load.slot);
        }
        let (blob, place) = (&load.blob, room.as_ref().unwrap_or(&load.slot));
        let bytes = padded(blob, self.fetch.shards[blob.shard].bytes, place.bytes());
        let direct = bytes / BLOCK * BLOCK;
        Some(Read { load, room, began, direct, asked: 0, pieces: 0, again: false, buffer: None, fault: None })
    }

    fn came(&mut self, came: Came, full: bool) {
        self.in_flight -= 1;
        let at = came.id as usize;
        let flight = self.flights[at].as_mut().expect("what comes was pushed");
        let read = self.reads[flight.read].as_mut().expect("a read has its flights");
        let offset = read.load.blob.offset + (flight.from + flight.got) as u64;
        // Of the last piece only what belongs to the expert is needed.
        let need = flight.len.min(read.load.blob.bytes.saturating_sub(flight.from));
        let failed = match came.result {
            ..0 => {
                let error = io::Error::from_raw_os_error(-came.result);
                if passes(&error) && flight.interrupted < INTERRUPTED_MAX {
                    flight.interrupted += 1;
                    None
                } else {
                    Some(ReadFault::Failed { at: offset, error })
                }
            }
            bytes => {
                flight.got += bytes as usize;
                if flight.got >= need {
                    let now = u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX);
                    self.depth.came(flight.len as u64, full, now);
                    self.end(at, None);
                    return;
                }
                // Direct reads begin at a boundary.
                flight.got = flight.got / BLOCK * BLOCK;
                Some(ReadFault::Short { at: read.load.blob.offset + (flight.from + flight.got) as u64 })
            }
        };
        match failed {
            Some(fault) if std::mem::replace(&mut flight.again, true) => {
                let expert = read.load.expert;
                let fault = fault.of(expert, self.fetch.path(read.load.blob.shard));
                self.end(at, Some(fault));
            }
            _ => self.retried.push_back(at),
        }
    }

    /// A flight is over; with the last one of a read, so is that.
    fn end(&mut self, flight: usize, fault: Option<Fault>) {
        let Flight { read: at, .. } = self.flights[flight].take().expect("it was in flight");
        let read = self.reads[at].as_mut().expect("a read has its flights");
        read.pieces -= 1;
        if fault.is_some() {
            read.fault = read.fault.take().or(fault);
            // The rest is not wanted any more.
            read.asked = read.direct;
            self.current = self.current.filter(|&current| current != at);
        }
        if read.pieces > 0 || read.asked < read.direct {
            return;
        }
        let mut read = self.reads[at].take().expect("it was there");
        match read.fault.take() {
            Some(fault) => {
                (self.tell)(Told::Answer(read.answer(Err(fault))));
            }
            None => {
                // A verifier that is gone has said why.
                let _ = self.verify.send(read);
            }
        }
    }
}

impl Read {
    /// Where it is read to.
    pub(super) fn place(&mut self) -> &mut SlotWriter {
        self.room.as_mut().unwrap_or(&mut self.load.slot)
    }
}

impl<Q: Queue> Drop for Flying<Q> {
    fn drop(&mut self) {
        if self.in_flight > 0 {
            // The kernel may write to these slots and rooms at any time: they and their arenas stay.
            std::mem::forget(std::mem::take(&mut self.reads));
            std::mem::forget(std::mem::take(&mut self.registered));
        }
    }
}
