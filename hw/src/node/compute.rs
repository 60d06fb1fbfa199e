//! The compute thread: owns what computes (`backend.rs`), runs one step after another.
//!
//! While a step runs, its thread reads from the same channel what the engine provides for it. A step that is given up
//! stops where it would next wait for an expert; slots are let go before the engine hears of it.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lite_llm_core::cluster::collective::{Exchange, Kind, Plan};
use lite_llm_core::cluster::message::Tag;
use lite_llm_core::ids::{ExpertKey, Slot, StepId};
use lite_llm_core::input::{Fault, Input};
use lite_llm_core::output::Forward;
use lite_llm_model::{Capture, ExpertSource, Model, Provided, StepError, Stopped};

use super::NodeError;
use super::backend::{Backend, Unfinished};
use super::error::panic_message;
use super::reports::{Report, Reports};
use crate::arena::{Arena, SlotReader};
use crate::telemetry::Timing;

/// How long the thread stays awake for the next step.
const SOON: Duration = Duration::from_micros(200);

/// What the compute thread is told.
#[derive(Debug)]
pub(crate) enum Work {
    /// Lay out the cache; slots are read from this arena.
    Carve {
        arena: Arc<Arena>,
        pages: u32,
    },
    LoadBase {
        shard: u32,
    },
    LoadRouters {
        routing_seed: u64,
    },
    Forward(Forward),
    Provide {
        step: StepId,
        attempt: u32,
        layer: u32,
        provided: Provided,
    },
    Abort {
        step: StepId,
        attempt: u32,
    },
    /// What another rank computed of a step.
    Data {
        from: u32,
        tag: Tag,
        bytes: Vec<u8>,
    },
    /// Let go of arena and cache.
    Release,
    /// The same, of the running step too; whatever is answered from now on is of this epoch.
    Forget {
        epoch: u64,
        /// Another share of the model, if it changes.
        model: Option<Box<Model>>,
    },
}

/// The event loop's end of the compute thread. The engine bounds what it is told: one step at a time.
#[derive(Debug)]
pub(crate) struct Compute {
    work: Sender<Work>,
    thread: JoinHandle<()>,
}

impl Compute {
    pub(crate) fn start(
        backend: Box<dyn Backend>,
        capture: Option<Box<dyn Capture + Send>>,
        reports: Reports,
    ) -> Result<Self, NodeError> {
        let (work, receiver) = channel();
        let run = move || {
            let mut machine = Machine {
                backend,
                capture,
                reports,
                memory: None,
                failed: false,
                epoch: 0,
                early: RefCell::default(),
            };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| machine.run(&receiver))) {
                let message = panic_message(&*panic);
                machine.reports.tell(Report::Panicked { thread: "compute", message });
            }
        };
        let thread = std::thread::Builder::new()
            .name("compute".into())
            .spawn(run)
            .map_err(|source| NodeError::System { what: "cannot start the compute thread", source })?;
        Ok(Self { work, thread })
    }

    pub(crate) fn send(&self, work: Work) {
        // A compute thread that is gone has reported why.
        let _ = self.work.send(work);
    }

    /// Gives a running step up, and ends the thread.
    pub(crate) fn close(self) {
        drop(self.work);
        let _ = self.thread.join();
    }
}

struct Machine {
    backend: Box<dyn Backend>,
    capture: Option<Box<dyn Capture + Send>>,
    reports: Reports,
    memory: Option<Memory>,
    /// A step of the boot sequence failed: the engine has heard it once and wants no more.
    failed: bool,
    epoch: u64,
    /// What other ranks computed before this one wanted it.
    early: RefCell<Vec<(u32, Tag, Vec<u8>)>>,
}

/// The epoch that has begun, and the share of the model if it is another.
type Forgotten = (u64, Option<Box<Model>>);
/// What the engine hears of a step, how long it waited, and what began meanwhile.
type Answer = (Input, Option<Duration>, Option<Forgotten>);

/// The slots of experts.
struct Memory {
    arena: Arc<Arena>,
    /// The slots that may be read now.
    readers: Vec<Option<SlotReader>>,
}

impl Machine {
    fn run(&mut self, work: &Receiver<Work>) {
        let mut next = work.recv();
        while let Ok(told) = next {
            let steps = matches!(told, Work::Forward(_));
            match told {
                Work::Carve { arena, pages } => match self.backend.carve(&arena, pages) {
                    Ok(()) => {
                        let readers = (0..arena.slots()).map(|_| None).collect();
                        self.memory = Some(Memory { arena, readers });
                    }
                    Err(fault) => self.boot_failed(fault),
                },
                Work::LoadBase { shard } if !self.failed => {
                    let loaded = self.backend.load_base(shard);
                    self.loaded(loaded, Input::BaseLoaded { shard });
                }
                Work::LoadRouters { routing_seed } if !self.failed => {
                    let loaded = self.backend.load_routers(routing_seed);
                    self.loaded(loaded, Input::RoutersLoaded);
                }
                // The boot sequence was given up, and the engine has heard why.
                Work::LoadBase { .. } | Work::LoadRouters { .. } => {}
                Work::Forward(forward) => {
                    let (input, waited, then) = match self.forward(&forward, work) {
                        Ok(answer) => answer,
                        Err(lost) => {
                            // The step stays in the journal as one that is to be computed.
                            self.reports.tell(Report::DeviceLost { what: lost });
                            return;
                        }
                    };
                    match then {
                        Some((epoch, model)) => self.forget(epoch, model),
                        None => self.tell(input, waited.map(|waited| (Timing::Wait(forward.step.0), waited))),
                    }
                }
                // Of a step that has ended meanwhile.
                Work::Provide { .. } | Work::Abort { .. } => {}
                Work::Data { from, tag, bytes } => self.early.borrow_mut().push((from, tag, bytes)),
                Work::Forget { epoch, model } => self.forget(epoch, model),
                Work::Release => {
                    self.memory = None;
                    self.backend.release();
                    self.say(Input::ResourcesReleased);
                }
            }
            next = if steps { soon(work) } else { work.recv() };
        }
    }

    /// Nothing of the epoch before is there any more.
    fn forget(&mut self, epoch: u64, model: Option<Box<Model>>) {
        self.memory = None;
        self.backend.release();
        if let Some(model) = model {
            self.backend.take(*model);
        }
        self.failed = false;
        self.epoch = epoch;
        self.early.borrow_mut().clear();
    }

    fn loaded(&mut self, loaded: Result<(), Fault>, input: Input) {
        match loaded {
            Ok(()) => self.say(input),
            Err(fault) => self.boot_failed(fault),
        }
    }

    fn boot_failed(&mut self, fault: Fault) {
        if !std::mem::replace(&mut self.failed, true) {
            self.say(Input::BootFailed { fault });
        }
    }

    /// The answer to a step, and how long it waited for experts; and the new epoch, if one began meanwhile and nobody wants
    /// the answer. An error says that the device is lost.
    fn forward(&mut self, forward: &Forward, work: &Receiver<Work>) -> Result<Answer, String> {
        let (step, attempt) = (forward.step, forward.attempt);
        self.early.borrow_mut().retain(|(_, tag, _)| (tag.step, tag.attempt) >= (step, attempt));
        let Memory { arena, readers } = self.memory.as_mut().expect("memory is carved before the first step");
        let mut source = Source {
            step,
            attempt,
            arena,
            readers,
            wave: Vec::new(),
            layer: 0,
            work,
            reports: &self.reports,
            epoch: self.epoch,
            rank: self.backend.rank(),
            provided: RefCell::default(),
            early: &self.early,
            forgotten: Cell::new(None),
            waited: Duration::ZERO,
        };
        for &(_, slot) in forward.resident.iter().flatten() {
            source.take(slot);
        }
        let started = Instant::now();
        let capture: Option<&mut dyn Capture> = match &mut self.capture {
            Some(capture) => Some(&mut **capture),
            None => None,
        };
        let result = self.backend.forward(forward, &mut source, capture);
        let forgotten = source.forgotten.take();
        let waited = Some(source.waited).filter(|waited| !waited.is_zero());
        // Every slot is let go before the engine hears that the step is over.
        readers.fill_with(|| None);
        let duration_ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let fault = match result {
            Ok(rows) => return Ok((Input::Finished { step, attempt, rows, duration_ns }, waited, forgotten)),
            Err(Unfinished::Lost(what)) => return Err(what),
            Err(Unfinished::Step(StepError::Stopped(stopped))) => Fault::Device(stopped.to_string()),
            Err(Unfinished::Step(StepError::NonFinite { row, layer, position })) => {
                Fault::NonFinite { row, layer, position }
            }
        };
        Ok((Input::Failed { step, attempt, fault }, waited, forgotten))
    }

    fn say(&self, input: Input) {
        self.tell(input, None);
    }

    fn tell(&self, input: Input, took: Option<(Timing, Duration)>) {
        // A loop that is gone wants to hear nothing.
        self.reports.tell(Report::Done { epoch: self.epoch, input, took });
    }
}

/// What comes after a step: the engine mostly has the next one at once, and to be woken takes as long as to decide it.
fn soon(work: &Receiver<Work>) -> Result<Work, RecvError> {
    let began = Instant::now();
    while began.elapsed() < SOON {
        match work.try_recv() {
            Ok(next) => return Ok(next),
            Err(TryRecvError::Disconnected) => return Err(RecvError),
            // The loop itself may want this very core.
            Err(TryRecvError::Empty) => std::thread::yield_now(),
        }
    }
    work.recv()
}

/// Where the experts of one attempt at a step come from.
struct Source<'a> {
    step: StepId,
    attempt: u32,
    arena: &'a Arc<Arena>,
    readers: &'a mut [Option<SlotReader>],
    /// Those of them that the wave under way provided.
    wave: Vec<Slot>,
    layer: u32,
    work: &'a Receiver<Work>,
    reports: &'a Reports,
    epoch: u64,
    rank: u32,
    /// What was provided while something else was waited for.
    provided: RefCell<VecDeque<Provided>>,
    early: &'a RefCell<Vec<(u32, Tag, Vec<u8>)>>,
    /// The epoch that has begun meanwhile.
    forgotten: Cell<Option<Forgotten>>,
    /// How long nothing could be computed for want of an expert.
    waited: Duration,
}

impl Source<'_> {
    fn take(&mut self, slot: Slot) {
        self.readers[slot.0 as usize] = Some(self.arena.read(slot));
    }

    fn say(&self, input: Input) -> Result<(), Stopped> {
        let told = self.reports.tell(Report::Done { epoch: self.epoch, input, took: None });
        if told { Ok(()) } else { Err(Stopped) }
    }

    const fn tag(&self, exchange: u32) -> Tag {
        Tag { step: self.step, attempt: self.attempt, exchange }
    }

    fn give(&self, to: u32, exchange: u32, bytes: Vec<u8>) -> Result<(), Stopped> {
        let told = self.reports.tell(Report::Data { epoch: self.epoch, to, tag: self.tag(exchange), bytes });
        if told { Ok(()) } else { Err(Stopped) }
    }

    /// Waits for the next thing that happens to the step, and keeps it until it is wanted.
    fn wait(&self) -> Result<(), Stopped> {
        match self.work.recv().map_err(|_| Stopped)? {
            Work::Provide { step, attempt, layer, provided } => {
                if (step, attempt) == (self.step, self.attempt) {
                    assert_eq!(layer, self.layer, "what is provided is of the layer that needs");
                    self.provided.borrow_mut().push_back(provided);
                }
            }
            Work::Data { from, tag, bytes } => {
                if (tag.step, tag.attempt) >= (self.step, self.attempt) {
                    self.early.borrow_mut().push((from, tag, bytes));
                }
            }
            Work::Abort { step, attempt } => {
                if (step, attempt) == (self.step, self.attempt) {
                    return Err(Stopped);
                }
            }
            Work::Forget { epoch, model } => {
                self.forgotten.set(Some((epoch, model)));
                return Err(Stopped);
            }
            other => unreachable!("the engine does one thing at a time, this is another: {other:?}"),
        }
        Ok(())
    }

    /// Takes what came of an exchange.
    fn came(&self, exchange: u32) -> Vec<(u32, Vec<u8>)> {
        let tag = self.tag(exchange);
        let mut early = self.early.borrow_mut();
        let came = early.extract_if(.., |(_, of, _)| *of == tag);
        came.map(|(from, _, bytes)| (from, bytes)).collect()
    }
}

impl ExpertSource for Source<'_> {
    fn need(&mut self, layer: u32, experts: &[ExpertKey], foreseen: &[ExpertKey]) -> Result<(), Stopped> {
        self.layer = layer;
        let (step, attempt) = (self.step, self.attempt);
        let (experts, foreseen) = (experts.to_vec(), foreseen.to_vec());
        self.say(Input::Need { step, attempt, layer, experts, foreseen })
    }

    fn provided(&mut self) -> Result<Provided, Stopped> {
        loop {
            let next = self.provided.borrow_mut().pop_front();
            if let Some(provided) = next {
                self.take(provided.slot);
                self.wave.push(provided.slot);
                return Ok(provided);
            }
            let began = Instant::now();
            self.wait()?;
            self.waited += began.elapsed();
        }
    }

    fn slot(&self, slot: Slot) -> &[u8] {
        self.readers[slot.0 as usize]
            .as_deref()
            .expect("a slot is read only while it is provided or resident")
    }

    fn released(&mut self, layer: u32, wave: u32) -> Result<(), Stopped> {
        for slot in self.wave.drain(..) {
            self.readers[slot.0 as usize] = None;
        }
        let (step, attempt) = (self.step, self.attempt);
        self.say(Input::Released { step, attempt, layer, wave })
    }

    fn gather(&self, ranks: &[u32], exchange: u32, part: &[u8]) -> Result<Vec<Vec<u8>>, Stopped> {
        let plan = Plan::new(Kind::AllGather, ranks.to_vec());
        let part = part.to_vec();
        let (mut gathered, sends) =
            Exchange::begin(plan, self.tag(exchange), self.rank, std::slice::from_ref(&part));
        for (to, part) in sends {
            self.give(to, exchange, part)?;
        }
        loop {
            for (from, bytes) in self.came(exchange) {
                gathered.take(from, self.tag(exchange), bytes);
            }
            if let Some(parts) = gathered.parts() {
                return Ok(parts.into_iter().map(|(_, part)| part).collect());
            }
            self.wait()?;
        }
    }

    fn hand_on(&self, rank: u32, exchange: u32, part: &[u8]) -> Result<(), Stopped> {
        self.give(rank, exchange, part.to_vec())
    }

    fn take_over(&self, rank: u32, exchange: u32) -> Result<Vec<u8>, Stopped> {
        loop {
            if let Some((_, bytes)) = self.came(exchange).into_iter().find(|(from, _)| *from == rank) {
                return Ok(bytes);
            }
            self.wait()?;
        }
    }
}
