//! The event loop: one message, one input, its outputs, its record.

mod commands;
mod owed;
mod release;

pub(super) use commands::Command;

use std::collections::{BTreeMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use lite_llm_core::engine::Engine;
use lite_llm_core::ids::{Generation, Seq};
use lite_llm_core::input::Input;
use lite_llm_core::journal::Record;
use lite_llm_core::output::Output;
use lite_llm_core::replay::encode_input;
use lite_llm_core::time::Time;

use super::device::Device;
use super::error::panic_message;
use super::journal::Journal;
use super::reports::Report;
use super::streams::Streams;
use super::{ExitReport, NodeError, OnEvent};
use crate::blobs::Blobs;
use crate::telemetry::{Telemetry, Timing};
use owed::Owed;

/// What comes to the event loop.
#[allow(
    clippy::large_enum_variant,
    reason = "it moves once, through a bounded channel; a box would be one allocation more"
)]
#[derive(Debug)]
pub(super) enum Message {
    /// From a handle.
    Command(Command),
    /// From a thread.
    Report(Report),
}

impl From<Report> for Message {
    fn from(report: Report) -> Self {
        Self::Report(report)
    }
}

/// The core's time: nanoseconds since 1970 at the start, monotone from there, never before the journal's last.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock {
    origin: Time,
    started: Instant,
}

impl Clock {
    pub(crate) fn new(origin: Time) -> Self {
        Self { origin, started: Instant::now() }
    }

    pub(crate) fn now(&self) -> Time {
        self.origin.after_ns(u64::try_from(self.started.elapsed().as_nanos()).unwrap_or(u64::MAX))
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
    device: Device,
    journal: Journal,
    telemetry: Telemetry,
    on_event: Option<OnEvent>,
    ready: Option<Sender<()>>,
    /// Answers of the event loop itself, not yet handled.
    inbox: VecDeque<Input>,
    /// Records, up to that of the input under way. They are handed over after what the input makes others do: the journal would
    /// take a core from the step that begins.
    owed: Owed,
    /// Outputs that wait for the journal, in order.
    held: VecDeque<(Seq, Output)>,
    durable: Seq,
    streams: Streams,
    /// Who waits to hear that an input was not refused.
    done: BTreeMap<Seq, Sender<Result<(), String>>>,
    /// Who waits for a new generation.
    switches: BTreeMap<Seq, Sender<Result<Generation, String>>>,
    blobs: Blobs,
    snapshots: Vec<(Seq, Sender<Seq>)>,
    /// Bytes of the journal after which a snapshot is asked for, and whether it was.
    snapshot_bytes: Option<u64>,
    snapshot_asked: bool,
    /// The engine's alarm, always in the future when it is set.
    until: Option<Time>,
    phase_began: Instant,
    end: Option<Result<ExitReport, NodeError>>,
}

impl EventLoop {
    pub(super) fn new(
        engine: Engine,
        device: Device,
        journal: Journal,
        telemetry: Telemetry,
        blobs: Blobs,
        on_event: Option<OnEvent>,
        ready: Sender<()>,
    ) -> Self {
        Self {
            durable: Seq(engine.next_seq().0 - 1),
            clock: Clock::start(engine.now()),
            engine,
            device,
            journal,
            telemetry,
            on_event,
            ready: Some(ready),
            inbox: VecDeque::new(),
            owed: Owed::new(Duration::ZERO),
            held: VecDeque::new(),
            streams: Streams::default(),
            done: BTreeMap::new(),
            switches: BTreeMap::new(),
            blobs,
            snapshots: Vec::new(),
            snapshot_bytes: None,
            snapshot_asked: false,
            until: None,
            phase_began: Instant::now(),
            end: None,
        }
    }

    /// Keeps the journal within so many bytes.
    pub(super) fn bound_journal(&mut self, bytes_max: Option<u64>) {
        self.snapshot_bytes = bytes_max.map(|bytes| bytes / 2);
    }

    /// Lets records that nobody waits for gather so long.
    pub(super) fn sync_every(&mut self, time: Duration) {
        self.owed = Owed::new(time);
    }

    /// Runs the node to its end, then ends its threads. What was handled is written even when the engine panics: the input that
    /// broke an invariant must be in the log.
    pub(super) fn run(mut self, messages: Receiver<Message>, first: Input) -> Result<ExitReport, NodeError> {
        self.inbox.push_back(first);
        let end = catch_unwind(AssertUnwindSafe(|| self.turn(&messages)));
        let end = end.unwrap_or_else(|panic| {
            let (seq, message) = (Seq(self.engine.next_seq().0 - 1), panic_message(&*panic));
            End::Stopped(Err(NodeError::Panic { seq, thread: "node", message }))
        });
        // A journal that is gone has said why.
        let _ = self.hand_over();
        // Nobody must wait for a loop that is gone.
        drop(messages);
        let Self { device, journal, mut telemetry, .. } = self;
        let end = match end {
            End::Abandoned => {
                journal.abandon();
                Err(NodeError::Ended)
            }
            End::Stopped(end) => {
                let closed = journal.close();
                telemetry.flush();
                end.and_then(|report| closed.map(|()| report))
            }
        };
        device.close();
        end
    }

    fn turn(&mut self, messages: &Receiver<Message>) -> End {
        loop {
            let step = self.answer().and_then(|()| self.release());
            if let Some(end) = step.err().map(Err).or_else(|| self.end.take()) {
                return End::Stopped(end);
            }
            if !self.inbox.is_empty() {
                continue;
            }
            let taken = match self.receive(messages) {
                Ok(Some(Message::Command(Command::Abandon))) => return End::Abandoned,
                Ok(Some(Message::Command(command))) => self.command(command),
                Ok(Some(Message::Report(report))) => self.report(report),
                Ok(None) => self.handle(Input::Tick).map(|_| ()),
                Err(error) => Err(error),
            };
            if let Err(error) = taken {
                return End::Stopped(Err(error));
            }
        }
    }

    /// The next message; `None` when the engine's alarm rings.
    fn receive(&mut self, messages: &Receiver<Message>) -> Result<Option<Message>, NodeError> {
        loop {
            self.hand_over_in_time()?;
            let due = self.owed.due().map(|due| due.saturating_duration_since(Instant::now()));
            let alarm =
                self.until.map(|until| Duration::from_nanos(until.0.saturating_sub(self.clock.now().0)));
            let Some(wait) = due.into_iter().chain(alarm).min() else {
                return Ok(Some(messages.recv().unwrap_or(Message::Command(Command::Abandon))));
            };
            match messages.recv_timeout(wait) {
                Ok(message) => return Ok(Some(message)),
                Err(RecvTimeoutError::Timeout) if Some(wait) == alarm => return Ok(None),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Ok(Some(Message::Command(Command::Abandon))),
            }
        }
    }

    /// Handles what the loop itself answered.
    fn answer(&mut self) -> Result<(), NodeError> {
        while let Some(input) = self.inbox.pop_front() {
            self.handle(input)?;
        }
        Ok(())
    }

    /// Lets the engine handle an input, obeys, and journals it.
    fn handle(&mut self, input: Input) -> Result<Seq, NodeError> {
        let payload = encode_input(&input);
        self.handle_encoded(input, payload)
    }

    fn handle_encoded(&mut self, input: Input, payload: Vec<u8>) -> Result<Seq, NodeError> {
        let (seq, digest) = (self.engine.next_seq(), self.engine.digest());
        let now = self.clock.now().max(self.engine.now());
        self.owed.push(Record { seq: seq.0, time_ns: now.0, digest: digest.0, payload });
        self.engine.handle(now, input);
        let mut snapshot = false;
        loop {
            match self.engine.poll() {
                Output::Wait { until, reason: _ } => {
                    self.until = until;
                    break;
                }
                Output::Snapshot => snapshot = true,
                output => self.obey(output)?,
            }
        }
        self.hand_over_in_time()?;
        if snapshot {
            self.hand_over()?;
            let (next, digest) = (self.engine.next_seq(), self.engine.digest());
            self.journal.snapshot(next, digest.0, self.engine.snapshot())?;
        }
        Ok(seq)
    }

    /// Hands over all that is owed.
    fn hand_over(&mut self) -> Result<(), NodeError> {
        self.owed.take().try_for_each(|record| self.journal.record(record))
    }

    fn hand_over_in_time(&mut self) -> Result<(), NodeError> {
        if self.owed.due().is_some_and(|due| due <= Instant::now()) { self.hand_over() } else { Ok(()) }
    }

    /// Keeps an output until what it follows from is durable.
    fn hold(&mut self, after: Seq, output: Output) {
        self.owed.follows(&output);
        self.held.push_back((after, output));
    }

    /// Does at once what need not wait, and keeps the rest.
    fn obey(&mut self, output: Output) -> Result<(), NodeError> {
        match output {
            Output::Ready { after }
            | Output::Accepted { after, .. }
            | Output::Token { after, .. }
            | Output::Finish { after, .. }
            | Output::Refuse { after, .. }
            | Output::Switched { after, .. }
            | Output::Modified { after, .. }
            | Output::Answered { after, .. }
            | Output::Retire { after, .. }
            | Output::Exit { after, .. } => self.hold(after, output),
            Output::Event { seq, .. } => self.hold(seq, output),
            Output::Trim { before } => {
                self.hand_over()?;
                self.journal.trim(before)?;
            }
            // It waits for its place among the events.
            Output::FlushTelemetry => {
                let last = Seq(self.engine.next_seq().0 - 1);
                self.hold(last, Output::FlushTelemetry);
            }
            Output::Snapshot | Output::Wait { .. } => unreachable!("taken by the caller"),
            output => self.inbox.extend(self.device.obey(&self.engine, output)),
        }
        Ok(())
    }

    /// Takes what another thread has done.
    fn report(&mut self, report: Report) -> Result<(), NodeError> {
        let (mut input, took) = match report {
            Report::Done { input, took, .. } => (input, took),
            Report::Wake => return Ok(()),
            Report::Lost { what } => return Err(NodeError::Lost(what)),
            Report::DeviceLost { what } => return Err(NodeError::Device(what)),
            Report::Panicked { thread, message } => {
                return Err(NodeError::Panic { seq: Seq(self.engine.next_seq().0 - 1), thread, message });
            }
            Report::Data { .. } => unreachable!("a whole model has nobody to exchange with"),
        };
        if let Some((what, duration)) = took {
            self.telemetry.timing(what, duration);
        }
        if let Input::Finished { step, rows, duration_ns, .. } = &mut input {
            self.device.mark_stops(&self.engine, rows);
            let duration = Duration::from_nanos(*duration_ns);
            self.telemetry.timing(Timing::Step(step.0, rows.len()), duration);
        }
        self.handle(input).map(|_| ())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::node::{Node, NodeOptions, StreamEvent};
    use lite_llm_core::config::Config;
    use lite_llm_core::ids::RequestId;
    use lite_llm_core::input::Body;
    use lite_llm_core::journal::frame::BLOCK_BYTES;
    use lite_llm_core::journal::scan;
    use lite_llm_model::disk::FileDisk;
    use lite_llm_tests::harness::folder;

    /// A start that folds the journal meets the bug again, and can say where it is.
    #[test]
    fn an_input_that_the_engine_panics_at_is_in_the_log() {
        let state = tempfile::tempdir().unwrap();
        let config = Config { memory_bytes: 256 << 20, ..Config::default() };
        let node = Node::start(NodeOptions::new(folder("olmoe"), state.path(), config)).unwrap();
        // Nobody loads anything any more.
        let input = Input::BaseLoaded { shard: 7 };
        node.handle.messages.send(Report::Done { epoch: 0, input, took: None }.into()).unwrap();
        let Err(NodeError::Panic { seq, thread, .. }) = node.wait() else { panic!("no panic") };
        assert_eq!(thread, "node");
        let records = scan(&mut FileDisk::open_read_only(state.path()).unwrap()).unwrap().records;
        let last = records.last().unwrap();
        assert_eq!((last.seq, &last.payload), (seq.0, &encode_input(&Input::BaseLoaded { shard: 7 })));
    }

    /// A group has a block at least, and each token is an input.
    #[test]
    fn tokens_that_gather_are_synced_in_few_groups_and_all_told() {
        let run = |sync_every| {
            let state = tempfile::tempdir().unwrap();
            let config = Config { memory_bytes: 256 << 20, ..Config::default() };
            let options =
                NodeOptions { sync_every, ..NodeOptions::new(folder("olmoe"), state.path(), config) };
            let node = Node::start(options).unwrap();
            let body = Body { prompt: vec![1, 2, 3], max_tokens: 30, ignore_eos: true, ..Body::default() };
            let events = node.submit(RequestId::new("a").unwrap(), body, 0);
            let mut tokens = Vec::new();
            for event in events {
                match event {
                    StreamEvent::Token { token, .. } => tokens.push(token),
                    StreamEvent::Finish { .. } => break,
                    _ => {}
                }
            }
            node.drain(None).unwrap();
            node.wait().unwrap();
            let files = std::fs::read_dir(state.path()).unwrap().map(|file| file.unwrap());
            let segments = files.filter(|file| file.file_name().to_string_lossy().starts_with("segment"));
            (tokens, segments.map(|segment| segment.metadata().unwrap().len()).sum::<u64>())
        };
        let (apart, together) = (run(Duration::ZERO), run(Duration::from_secs(3600)));
        assert_eq!(apart.0.len(), 30);
        assert_eq!(apart.0, together.0);
        assert!(together.1 < 20 * BLOCK_BYTES as u64, "{} and {} bytes", together.1, apart.1);
    }
}
