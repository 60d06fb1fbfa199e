//! The event loop: one message, one input, its record, its outputs.

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::event::Event;
use lite_llm_core::ids::{ExpertKey, Generation, RequestId, Seq};
use lite_llm_core::input::{Body, Fault, Input, RowResult, SwitchTarget};
use lite_llm_core::journal::Record;
use lite_llm_core::journal::frame::PAYLOAD_BYTES_MAX;
use lite_llm_core::output::{Carving, Output};
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
use super::{ExitReport, GenerationSpan, NodeError, OnEvent, Status, StreamEvent, report, stop};
use crate::arena::Arena;
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

/// What a handle asks for.
#[derive(Debug)]
pub(super) enum Command {
    Submit { id: RequestId, body: Box<Body>, from: u32, events: Sender<StreamEvent> },
    Cancel { id: RequestId, reply: Sender<Result<(), String>> },
    Switch { target: SwitchTarget, at: Option<(RequestId, u32)>, reply: Sender<Result<Generation, String>> },
    Modify { experts: Vec<(ExpertKey, Vec<u8>)>, reply: Sender<Result<Generation, String>> },
    Drain { bound_ns: Option<u64> },
    Snapshot { reply: Sender<Seq> },
    Status { reply: Sender<Status> },
    Generations { id: RequestId, reply: Sender<Option<Vec<GenerationSpan>>> },
    Abandon,
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
    arena: Option<Arc<Arena>>,
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
    /// The engine's alarm, and the last that rang.
    until: Option<Time>,
    rang: Option<Time>,
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
            arena: None,
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
            rang: None,
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

    /// The next message; `None` when the engine's alarm rings. One alarm rings once: the engine may show it for longer.
    fn receive(&mut self, messages: &Receiver<Message>) -> Option<Message> {
        let Some(until) = self.until.filter(|until| self.rang != Some(*until)) else {
            return Some(messages.recv().unwrap_or(Message::Command(Command::Abandon)));
        };
        let wait = Duration::from_nanos(until.0.saturating_sub(self.clock.now().0));
        match messages.recv_timeout(wait) {
            Ok(message) => Some(message),
            Err(RecvTimeoutError::Timeout) => {
                self.rang = Some(until);
                None
            }
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
            Output::Load { load, expert, blob, slot } => {
                let slot = self.arena.as_ref().expect("carved before any load").write(slot);
                parts.loaders.send(Job::Load { load, expert, blob, slot });
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
                self.arena = None;
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
        let Carving { slots, slot_bytes, pages, page_bytes: _ } = carving;
        match Arena::new(slots, slot_bytes, self.engine.view().config().memory_bytes) {
            Ok(arena) => {
                self.arena = Some(Arc::clone(&arena));
                parts.compute.send(Work::Carve { arena, pages });
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

    fn command(&mut self, parts: &Parts, command: Command) -> Result<(), NodeError> {
        match command {
            Command::Submit { id, body, from, events } => self.submit(parts, id, *body, from, events)?,
            Command::Cancel { id, reply } => {
                let seq = self.handle(parts, Input::Cancel { id })?;
                self.done.insert(seq, reply);
            }
            Command::Switch { target, at, reply } => {
                // The outcome may already be among the outputs: they are held until after this.
                let seq = self.handle(parts, Input::Switch { target, at })?;
                self.switches.insert(seq, reply);
            }
            Command::Modify { experts, reply } => self.modify(parts, experts, reply)?,
            Command::Drain { bound_ns } => {
                self.handle(parts, Input::Drain { bound_ns })?;
            }
            Command::Snapshot { reply } => {
                let seq = self.handle(parts, Input::SnapshotWanted)?;
                self.snapshots.push((seq, reply));
            }
            // Whoever asked and went away wants no answer.
            Command::Status { reply } => {
                let status = report::status(&self.engine, self.durable, self.telemetry.dropped());
                let _ = reply.send(status);
            }
            Command::Generations { id, reply } => drop(reply.send(report::generations(&self.engine, &id))),
            Command::Abandon => unreachable!("taken by the caller"),
        }
        Ok(())
    }

    fn submit(
        &mut self,
        parts: &Parts,
        id: RequestId,
        body: Body,
        from: u32,
        events: Sender<StreamEvent>,
    ) -> Result<(), NodeError> {
        let stops = !body.stop.is_empty();
        let input = Input::Submit { id: id.clone(), body, from };
        let payload = encode_input(&input);
        // What no journal could hold or no text could end is refused before it is an input.
        let refusal = if payload.len() > PAYLOAD_BYTES_MAX {
            Some(format!(
                "the request is {} bytes long, above the journal's bound of {PAYLOAD_BYTES_MAX}: shorten the prompt",
                payload.len()
            ))
        } else if stops && self.tokenizer.is_none() {
            Some("stop texts need a tokenizer, and this checkpoint has none: leave them out".into())
        } else {
            None
        };
        if let Some(reason) = refusal {
            let _ = events.send(StreamEvent::Refused { reason });
            return Ok(());
        }
        let seq = self.handle_encoded(parts, input, payload)?;
        self.streams.listen(id, seq, from, events);
        Ok(())
    }

    /// Modified bytes must fill a slot. The engine names them by their digests.
    fn modify(
        &mut self,
        parts: &Parts,
        experts: Vec<(ExpertKey, Vec<u8>)>,
        reply: Sender<Result<Generation, String>>,
    ) -> Result<(), NodeError> {
        let slot_bytes = self.plan.slot_bytes;
        if let Some((key, bytes)) = experts.iter().find(|(_, bytes)| bytes.len() as u64 != slot_bytes) {
            let reason = format!("expert {key:?} has {} bytes, a slot has {slot_bytes}", bytes.len());
            let _ = reply.send(Err(reason));
            return Ok(());
        }
        let named: Vec<_> = experts.iter().map(|(key, bytes)| (*key, Digest::of(bytes))).collect();
        self.staged =
            named.iter().map(|(_, blob)| *blob).zip(experts.into_iter().map(|(_, bytes)| bytes)).collect();
        let seq = self.handle(parts, Input::Modify { experts: named })?;
        // Refused, nobody asks for them.
        self.staged.clear();
        self.switches.insert(seq, reply);
        Ok(())
    }

    /// Lets go of what has become durable, and takes note of a durable snapshot.
    fn release(&mut self, parts: &Parts) -> Result<(), NodeError> {
        let (durable, snapshot, bytes, flushes) = {
            let mut progress = parts.journal.progress();
            if let Some(error) = progress.failed.take() {
                return Err(error.into());
            }
            let flushes = std::mem::take(&mut progress.flushes);
            (progress.durable, progress.snapshot.take(), progress.bytes, flushes)
        };
        self.durable = durable;
        for flush in flushes {
            self.telemetry.timing(Timing::Flush, flush);
        }
        while self.held.front().is_some_and(|(after, _)| *after <= durable) {
            let (_, output) = self.held.pop_front().expect("it was there");
            self.tell(output);
        }
        let waiting = self.done.split_off(&Seq(durable.0 + 1));
        for (_, reply) in std::mem::replace(&mut self.done, waiting) {
            let _ = reply.send(Ok(()));
        }
        if self.snapshot_bytes.is_some_and(|most| bytes > most) && !self.snapshot_asked {
            self.snapshot_asked = true;
            self.inbox.push_back(Input::SnapshotWanted);
        }
        if let Some(next) = snapshot {
            self.snapshot_asked = false;
            self.inbox.push_back(Input::SnapshotDurable { next });
            self.snapshots.retain(|(asked, reply)| *asked >= next || reply.send(next).is_err());
        }
        if self.held.is_empty() {
            self.telemetry.flush();
        }
        Ok(())
    }

    /// What leaves the node.
    fn tell(&mut self, output: Output) {
        match output {
            Output::Accepted { id, generated, after } => self.streams.accepted(&id, generated, after),
            Output::Token { id, offset, token, after } => self.streams.token(&id, offset, token, after),
            Output::Finish { id, reason, generated, after } => {
                // Said with the end, because the node may be gone when somebody asks.
                let generations = report::generations(&self.engine, &id).unwrap_or_default();
                self.streams.finish(&id, (&reason, generated), &generations, after);
            }
            Output::Refuse { id, reason, after } => match (self.done.remove(&after), id) {
                (Some(reply), _) => drop(reply.send(Err(reason))),
                (None, Some(id)) => self.streams.refused(&id, &reason, after),
                (None, None) => {}
            },
            Output::Retire { blob, .. } => {
                self.blobs.remove(blob);
                self.inbox.push_back(Input::Retired { blob });
            }
            Output::Switched { asked, outcome, .. } | Output::Modified { asked, outcome, .. } => {
                if let Some(reply) = self.switches.remove(&asked) {
                    let _ = reply.send(outcome);
                }
            }
            Output::Event { seq, event } => self.event(seq, &event),
            Output::Ready { .. } => {
                if let Some(ready) = self.ready.take() {
                    let _ = ready.send(());
                }
            }
            Output::FlushTelemetry => {
                // Telemetry that cannot be written is dropped and counted, and keeps nobody from stopping.
                let _ = self.telemetry.sync();
                self.inbox.push_back(Input::TelemetryFlushed);
            }
            Output::Exit { error, .. } => {
                self.end = Some(match error {
                    None => Ok(report::exit(&self.engine)),
                    Some(error) => Err(NodeError::Boot(error)),
                });
            }
            other => unreachable!("{other:?} is not held"),
        }
    }

    fn event(&mut self, seq: Seq, event: &Event) {
        self.telemetry.event(seq, event);
        if let Event::PhaseDone { phase, .. } = event {
            let began = std::mem::replace(&mut self.phase_began, Instant::now());
            self.telemetry.timing(Timing::Phase(*phase), began.elapsed());
        }
        if let Some(on_event) = &mut self.on_event {
            on_event(seq, event);
        }
    }
}
