//! The event loop: one message, one input, its record, its outputs.

mod commands;
mod release;

pub(super) use commands::Command;

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::ids::{Generation, Seq};
use lite_llm_core::input::{Fault, Input, RowResult};
use lite_llm_core::journal::Record;
use lite_llm_core::output::{Carving, Origin, Output};
use lite_llm_core::plan::ModelPlan;
use lite_llm_core::replay::encode_input;
use lite_llm_core::time::Time;
use lite_llm_model::Provided;
use lite_llm_model::tokenizer::Tokenizer;

use super::compute::{Compute, Work};
use super::error::panic_message;
use super::journal::Journal;
use super::loaders::{Job, Loaders};
use super::streams::Streams;
use super::{ExitReport, NodeError, OnEvent, stop};
use crate::arena::{Arena, ArenaError};
use crate::blobs::Blobs;
use crate::memory;
use crate::telemetry::{Telemetry, Timing};

/// What comes to the event loop.
#[derive(Debug)]
pub(super) enum Message {
    /// From a handle.
    Command(Command),
    /// A completion, from compute or a loader.
    Input(Input),
    /// The same, with what it took.
    Measured { input: Input, what: Timing, duration: Duration },
    /// The journal is further than before.
    Wake,
    /// A thread found a bug.
    Panicked { thread: &'static str, message: String },
}

/// The core's time: nanoseconds since 1970 at the start, monotone from there, never before the journal's last.
#[derive(Debug)]
pub(super) struct Clock {
    origin: Time,
    started: Instant,
}

impl Clock {
    pub(super) fn new(origin: Time) -> Self {
        Self { origin, started: Instant::now() }
    }

    fn now(&self) -> Time {
        self.origin.after_ns(u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX))
    }
}

/// The threads that the event loop directs.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) loaders: Loaders,
    pub(super) compute: Compute,
    pub(super) journal: Journal,
}

/// Where experts are: in the hot arena steps read them, in the warm one they are near at hand.
struct Arenas {
    hot: Arc<Arena>,
    warm: Arc<Arena>,
}

impl Arenas {
    fn of(carving: Carving, budget: u64) -> Result<Self, ArenaError> {
        let Carving { slots, warm_slots, slot_bytes, pages: _, page_bytes: _ } = carving;
        let hot = Arena::new(slots, slot_bytes, budget)?;
        let warm = Arena::new(warm_slots, slot_bytes, budget - u64::from(slots) * slot_bytes)?;
        Ok(Self { hot, warm })
    }
}

/// How the loop ends.
enum End {
    Stopped(Result<ExitReport, NodeError>),
    Abandoned,
}

/// The engine and everybody who waits for it.
pub(super) struct EventLoop {
    engine: Engine,
    clock: Clock,
    plan: ModelPlan,
    tokenizer: Option<Tokenizer>,
    telemetry: Telemetry,
    on_event: Option<OnEvent>,
    ready: Option<Sender<()>>,
    arenas: Option<Arenas>,
    /// The boot sequence was given up by the driver: what the engine still asked for is not done.
    boot_failed: bool,
    /// Answers of the event loop itself, not yet handled.
    inbox: VecDeque<Input>,
    /// Outputs that wait for the journal, in order.
    held: VecDeque<(Seq, Output)>,
    durable: Seq,
    streams: Streams,
    /// Who waits to hear that an input was not refused.
    done: BTreeMap<Seq, Sender<Result<(), String>>>,
    /// Who waits for a new generation.
    switches: BTreeMap<Seq, Sender<Result<Generation, String>>>,
    blobs: Blobs,
    /// Modified bytes that the engine has not yet asked for.
    staged: Vec<(Digest, Vec<u8>)>,
    snapshots: Vec<(Seq, Sender<Seq>)>,
    /// Bytes of the journal after which a snapshot is asked for, and whether it was.
    snapshot_bytes: Option<u64>,
    snapshot_asked: bool,
    /// The engine's alarm, always in the future when it is set.
    until: Option<Time>,
    /// The requests of the running step's rows.
    rows: Vec<u64>,
    phase_began: Instant,
    end: Option<Result<ExitReport, NodeError>>,
}

impl EventLoop {
    pub(super) fn new(
        engine: Engine,
        plan: ModelPlan,
        tokenizer: Option<Tokenizer>,
        telemetry: Telemetry,
        blobs: Blobs,
        on_event: Option<OnEvent>,
        ready: Sender<()>,
    ) -> Self {
        Self {
            durable: Seq(engine.next_seq().0 - 1),
            clock: Clock::start(engine.now()),
            engine,
            plan,
            tokenizer,
            telemetry,
            on_event,
            ready: Some(ready),
            arenas: None,
            boot_failed: false,
            inbox: VecDeque::new(),
            held: VecDeque::new(),
            streams: Streams::default(),
            done: BTreeMap::new(),
            switches: BTreeMap::new(),
            blobs,
            staged: Vec::new(),
            snapshots: Vec::new(),
            snapshot_bytes: None,
            snapshot_asked: false,
            until: None,
            rows: Vec::new(),
            phase_began: Instant::now(),
            end: None,
        }
    }

    /// Keeps the journal within so many bytes.
    pub(super) fn bound_journal(&mut self, bytes_max: Option<u64>) {
        self.snapshot_bytes = bytes_max.map(|bytes| bytes / 2);
    }

    /// Runs the node to its end, then ends its threads. What is in the journal's channel is written even when the
    /// engine panics: the input that broke an invariant must be in the log.
    pub(super) fn run(
        mut self,
        parts: Parts,
        messages: Receiver<Message>,
        first: Input,
    ) -> Result<ExitReport, NodeError> {
        self.inbox.push_back(first);
        let end = catch_unwind(AssertUnwindSafe(|| self.turn(&parts, &messages)));
        let end = end.unwrap_or_else(|panic| {
            let (seq, message) = (Seq(self.engine.next_seq().0 - 1), panic_message(&*panic));
            End::Stopped(Err(NodeError::Panic { seq, thread: "node", message }))
        });
        // Nobody must wait for a loop that is gone.
        drop(messages);
        let Parts { loaders, compute, journal } = parts;
        let end = match end {
            End::Abandoned => {
                journal.abandon();
                Err(NodeError::Ended)
            }
            End::Stopped(end) => {
                let closed = journal.close();
                self.telemetry.flush();
                end.and_then(|report| closed.map(|()| report))
            }
        };
        loaders.close();
        compute.close();
        end
    }

    fn turn(&mut self, parts: &Parts, messages: &Receiver<Message>) -> End {
        loop {
            let step = self.answer(parts).and_then(|()| self.release(parts));
            if let Some(end) = step.err().map(Err).or_else(|| self.end.take()) {
                return End::Stopped(end);
            }
            if !self.inbox.is_empty() {
                continue;
            }
            let taken = match self.receive(messages) {
                Some(Message::Command(Command::Abandon)) => return End::Abandoned,
                Some(Message::Command(command)) => self.command(parts, command),
                Some(Message::Input(input)) => self.completion(parts, input),
                Some(Message::Measured { input, what, duration }) => {
                    self.telemetry.timing(what, duration);
                    self.completion(parts, input)
                }
                Some(Message::Panicked { thread, message }) => {
                    Err(NodeError::Panic { seq: Seq(self.engine.next_seq().0 - 1), thread, message })
                }
                Some(Message::Wake) => Ok(()),
                None => self.handle(parts, Input::Tick).map(|_| ()),
            };
            if let Err(error) = taken {
                return End::Stopped(Err(error));
            }
        }
    }

    /// The next message; `None` when the engine's alarm rings.
    fn receive(&mut self, messages: &Receiver<Message>) -> Option<Message> {
        let Some(until) = self.until else {
            return Some(messages.recv().unwrap_or(Message::Command(Command::Abandon)));
        };
        let wait = Duration::from_nanos(until.0.saturating_sub(self.clock.now().0));
        match messages.recv_timeout(wait) {
            Ok(message) => Some(message),
            Err(RecvTimeoutError::Timeout) => None,
            Err(RecvTimeoutError::Disconnected) => Some(Message::Command(Command::Abandon)),
        }
    }

    /// Handles what the loop itself answered.
    fn answer(&mut self, parts: &Parts) -> Result<(), NodeError> {
        while let Some(input) = self.inbox.pop_front() {
            self.handle(parts, input)?;
        }
        Ok(())
    }

    /// Journals an input, lets the engine handle it, and obeys.
    fn handle(&mut self, parts: &Parts, input: Input) -> Result<Seq, NodeError> {
        let payload = encode_input(&input);
        self.handle_encoded(parts, input, payload)
    }

    fn handle_encoded(&mut self, parts: &Parts, input: Input, payload: Vec<u8>) -> Result<Seq, NodeError> {
        let (seq, digest) = (self.engine.next_seq(), self.engine.digest());
        let now = self.clock.now().max(self.engine.now());
        parts.journal.record(Record { seq: seq.0, time_ns: now.0, digest: digest.0, payload })?;
        self.engine.handle(now, input);
        let mut snapshot = false;
        loop {
            match self.engine.poll() {
                Output::Wait { until, reason: _ } => {
                    self.until = until;
                    break;
                }
                Output::Snapshot => snapshot = true,
                output => self.obey(parts, output)?,
            }
        }
        if snapshot {
            let (next, digest) = (self.engine.next_seq(), self.engine.digest());
            parts.journal.snapshot(next, digest.0, self.engine.snapshot())?;
        }
        Ok(seq)
    }

    /// Does at once what need not wait, and keeps the rest.
    fn obey(&mut self, parts: &Parts, output: Output) -> Result<(), NodeError> {
        match output {
            Output::Reserve { memory_bytes } => self.reserve(memory_bytes),
            Output::ReadManifest => {
                let plan = self.plan.clone();
                self.inbox.push_back(Input::ManifestRead { plan });
            }
            Output::Carve(carving) => self.carve(parts, carving),
            Output::LoadBase { shard } if !self.boot_failed => parts.compute.send(Work::LoadBase { shard }),
            Output::LoadBase { .. } => {}
            Output::LoadRouters => {
                let routing_seed = self.engine.view().routing_seed().expect("decided in the first phase");
                parts.compute.send(Work::LoadRouters { routing_seed });
            }
            Output::Load { load, expert, blob, slot, origin } => {
                let Arenas { hot, warm } = self.arenas.as_ref().expect("carved before any load");
                let slot = hot.write(slot);
                parts.loaders.send(match origin {
                    Origin::Disk { keep } => {
                        Job::Load { load, expert, blob, slot, keep: keep.map(|keep| warm.write(keep)) }
                    }
                    Origin::Warm { slot: from, exchange } => {
                        Job::Promote { load, slot, warm: warm.write(from), exchange }
                    }
                });
            }
            Output::Stage { load, expert, blob, slot } => {
                let slot = self.arenas.as_ref().expect("carved before any load").warm.write(slot);
                parts.loaders.send(Job::Load { load, expert, blob, slot, keep: None });
            }
            Output::Persist { asked, .. } => {
                let experts = std::mem::take(&mut self.staged);
                parts.loaders.send(Job::Persist { asked, experts });
            }
            Output::Forward(forward) => {
                self.rows = forward.rows.iter().map(|row| row.request).collect();
                parts.compute.send(Work::Forward(forward));
            }
            Output::Provide { step, attempt, layer, wave, wave_len, expert, slot } => {
                let provided = Provided { wave, wave_len, expert, slot };
                parts.compute.send(Work::Provide { step, attempt, layer, provided });
            }
            Output::Abort { step, attempt } => parts.compute.send(Work::Abort { step, attempt }),
            Output::Ready { after }
            | Output::Accepted { after, .. }
            | Output::Token { after, .. }
            | Output::Finish { after, .. }
            | Output::Refuse { after, .. }
            | Output::Switched { after, .. }
            | Output::Modified { after, .. }
            | Output::Retire { after, .. }
            | Output::Exit { after, .. } => self.held.push_back((after, output)),
            Output::Event { seq, .. } => self.held.push_back((seq, output)),
            Output::Trim { before } => parts.journal.trim(before)?,
            // Both wait for their place among the events.
            Output::FlushTelemetry => {
                let last = Seq(self.engine.next_seq().0 - 1);
                self.held.push_back((last, Output::FlushTelemetry));
            }
            Output::Release => {
                self.arenas = None;
                parts.compute.send(Work::Release);
            }
            Output::Snapshot | Output::Wait { .. } => unreachable!("taken by the caller"),
        }
        Ok(())
    }

    fn reserve(&mut self, memory_bytes: u64) {
        let refuse = |what: String| Input::BootFailed { fault: Fault::Resource(what) };
        let answer = match memory::measure() {
            Err(error) => refuse(format!("cannot tell how much memory there is: {error}")),
            Ok(memory) => {
                // The budget is the whole process's: what it has already is part of it.
                let most = memory.available.saturating_add(memory::resident_bytes().unwrap_or(0));
                if memory_bytes <= most {
                    Input::Reserved
                } else {
                    refuse(format!(
                        "memory_bytes is {memory_bytes}, but of the {} bytes of this machine only {most} can be had: give \
                         at most that",
                        memory.total
                    ))
                }
            }
        };
        self.inbox.push_back(answer);
    }

    fn carve(&mut self, parts: &Parts, carving: Carving) {
        match Arenas::of(carving, self.engine.view().config().memory_bytes) {
            Ok(arenas) => {
                parts.compute.send(Work::Carve { arena: Arc::clone(&arenas.hot), pages: carving.pages });
                self.arenas = Some(arenas);
            }
            Err(error) => {
                self.boot_failed = true;
                self.inbox.push_back(Input::BootFailed { fault: Fault::Resource(error.to_string()) });
            }
        }
    }

    /// Takes what another thread has done.
    fn completion(&mut self, parts: &Parts, mut input: Input) -> Result<(), NodeError> {
        if let Input::Finished { step, rows, duration_ns, .. } = &mut input {
            self.mark_stops(rows);
            let duration = Duration::from_nanos(*duration_ns);
            self.telemetry.timing(Timing::Step(step.0, rows.len()), duration);
        }
        self.handle(parts, input).map(|_| ())
    }

    /// Finds the rows whose text has come to a stop text of their request.
    fn mark_stops(&self, rows: &mut [RowResult]) {
        let Some(tokenizer) = &self.tokenizer else { return };
        let view = self.engine.view();
        for (row, &number) in rows.iter_mut().zip(&self.rows) {
            if let (Some(token), Some(request)) = (row.token, view.request(number)) {
                row.stop = stop::stops(tokenizer, &request.body.stop, request.tokens, token);
            }
        }
    }
}
