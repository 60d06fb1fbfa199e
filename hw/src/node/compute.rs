//! The compute thread: owns the model and the KV cache, runs one step after another.
//!
//! While a step runs, its thread reads from the same channel what the engine provides for it. A step that is given up
//! stops where it would next wait for an expert; slots are let go before the engine hears of it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};
use std::thread::JoinHandle;
use std::time::Instant;

use lite_llm_core::ids::{ExpertKey, Slot, StepId};
use lite_llm_core::input::{Fault, Input};
use lite_llm_core::output::Forward;
use lite_llm_model::{
    Capture, CheckpointError, ExpertSource, KvCache, Model, ModelError, Provided, StepError, Stopped,
    Workspace,
};

use super::NodeError;
use super::error::panic_message;
use super::event_loop::Message;
use crate::arena::{Arena, SlotReader};

/// What the compute thread is told.
#[derive(Debug)]
pub(super) enum Work {
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
    /// Let go of arena and cache.
    Release,
}

/// The event loop's end of the compute thread. The engine bounds what it is told: one step at a time.
#[derive(Debug)]
pub(super) struct Compute {
    work: Sender<Work>,
    thread: JoinHandle<()>,
}

impl Compute {
    pub(super) fn start(
        model: Model,
        capture: Option<Box<dyn Capture + Send>>,
        messages: SyncSender<Message>,
    ) -> Result<Self, NodeError> {
        let (work, receiver) = channel();
        let run = move || {
            let mut machine = Machine { model, capture, messages, memory: None, failed: false };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| machine.run(&receiver))) {
                let message = panic_message(&*panic);
                let _ = machine.messages.send(Message::Panicked { thread: "compute", message });
            }
        };
        let thread = std::thread::Builder::new()
            .name("compute".into())
            .spawn(run)
            .map_err(|source| NodeError::System { what: "cannot start the compute thread", source })?;
        Ok(Self { work, thread })
    }

    pub(super) fn send(&self, work: Work) {
        // A compute thread that is gone has reported why.
        let _ = self.work.send(work);
    }

    /// Gives a running step up, and ends the thread.
    pub(super) fn close(self) {
        drop(self.work);
        let _ = self.thread.join();
    }
}

struct Machine {
    model: Model,
    capture: Option<Box<dyn Capture + Send>>,
    messages: SyncSender<Message>,
    memory: Option<Memory>,
    /// A step of the boot sequence failed: the engine has heard it once and wants no more.
    failed: bool,
}

/// What is carved once, so that no step allocates it.
struct Memory {
    arena: Arc<Arena>,
    cache: KvCache,
    workspace: Workspace,
    /// The slots that may be read now.
    readers: Vec<Option<SlotReader>>,
}

impl Machine {
    fn run(&mut self, work: &Receiver<Work>) {
        while let Ok(next) = work.recv() {
            match next {
                Work::Carve { arena, pages } => match KvCache::new(&self.model, pages) {
                    Ok(cache) => {
                        let readers = (0..arena.slots()).map(|_| None).collect();
                        self.memory = Some(Memory { arena, cache, workspace: Workspace::default(), readers });
                    }
                    Err(error) => self.boot_failed(&error),
                },
                Work::LoadBase { shard } => {
                    let loaded = self.model.load_base(shard);
                    self.loaded(loaded, Input::BaseLoaded { shard });
                }
                Work::LoadRouters { routing_seed } => {
                    self.model.set_routing_seed(routing_seed);
                    let loaded = self.model.load_routers();
                    self.loaded(loaded, Input::RoutersLoaded);
                }
                Work::Forward(forward) => {
                    let input = self.forward(&forward, work);
                    self.say(input);
                }
                // Of a step that has ended meanwhile.
                Work::Provide { .. } | Work::Abort { .. } => {}
                Work::Release => {
                    self.memory = None;
                    self.say(Input::ResourcesReleased);
                }
            }
        }
    }

    fn loaded(&mut self, loaded: Result<(), ModelError>, input: Input) {
        match loaded {
            Ok(()) if !self.failed => self.say(input),
            Ok(()) => {}
            Err(error) => self.boot_failed(&error),
        }
    }

    fn boot_failed(&mut self, error: &ModelError) {
        if !std::mem::replace(&mut self.failed, true) {
            let what = error.to_string();
            let fault = match error {
                ModelError::Memory { .. } => Fault::Resource(what),
                ModelError::Checkpoint(CheckpointError::Corrupt { .. }) => Fault::Corrupt(what),
                _ => Fault::Checkpoint(what),
            };
            self.say(Input::BootFailed { fault });
        }
    }

    fn forward(&mut self, forward: &Forward, work: &Receiver<Work>) -> Input {
        let (step, attempt) = (forward.step, forward.attempt);
        let Memory { arena, cache, workspace, readers } =
            self.memory.as_mut().expect("memory is carved before the first step");
        let mut source = Source {
            step,
            attempt,
            arena,
            readers,
            wave: Vec::new(),
            layer: 0,
            work,
            messages: &self.messages,
        };
        for &(_, slot) in forward.resident.iter().flatten() {
            source.take(slot);
        }
        let started = Instant::now();
        let capture: Option<&mut dyn Capture> = match &mut self.capture {
            Some(capture) => Some(&mut **capture),
            None => None,
        };
        let result = self.model.forward(forward, cache, workspace, &mut source, capture);
        // Every slot is let go before the engine hears that the step is over.
        readers.fill_with(|| None);
        let duration_ns = u64::try_from(started.elapsed().as_nanos()).unwrap_or(u64::MAX);
        let fault = match result {
            Ok(rows) => return Input::Finished { step, attempt, rows, duration_ns },
            Err(StepError::Stopped(stopped)) => Fault::Device(stopped.to_string()),
            Err(StepError::NonFinite { row, layer, position }) => Fault::NonFinite { row, layer, position },
        };
        Input::Failed { step, attempt, fault }
    }

    fn say(&self, input: Input) {
        // An event loop that is gone wants to hear nothing.
        let _ = self.messages.send(Message::Input(input));
    }
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
    messages: &'a SyncSender<Message>,
}

impl Source<'_> {
    fn take(&mut self, slot: Slot) {
        self.readers[slot.0 as usize] = Some(self.arena.read(slot));
    }

    fn say(&self, input: Input) -> Result<(), Stopped> {
        self.messages.send(Message::Input(input)).map_err(|_| Stopped)
    }
}

impl ExpertSource for Source<'_> {
    fn need(&mut self, layer: u32, experts: &[ExpertKey]) -> Result<(), Stopped> {
        self.layer = layer;
        let (step, attempt) = (self.step, self.attempt);
        self.say(Input::Need { step, attempt, layer, experts: experts.to_vec() })
    }

    fn provided(&mut self) -> Result<Provided, Stopped> {
        loop {
            match self.work.recv().map_err(|_| Stopped)? {
                Work::Provide { step, attempt, layer, provided } => {
                    if (step, attempt) == (self.step, self.attempt) {
                        assert_eq!(layer, self.layer, "what is provided is of the layer that needs");
                        self.take(provided.slot);
                        self.wave.push(provided.slot);
                        return Ok(provided);
                    }
                }
                Work::Abort { step, attempt } => {
                    if (step, attempt) == (self.step, self.attempt) {
                        return Err(Stopped);
                    }
                }
                other => unreachable!("the engine does one thing at a time, this is another: {other:?}"),
            }
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
}
