//! A node: one engine, run on this machine.
//!
//! Four kinds of threads. The event loop owns the engine: every command and completion comes to it through one channel,
//! is given to the journal thread, then handled, and the outputs are obeyed. What may be seen from outside waits until
//! the journal is durable up to its `after`. The journal thread writes commit groups, the compute thread runs steps, the
//! loaders read experts into slots, or a reader of the cold tier does. None of them decides anything: that is the engine's.
//!
//! A node that is dropped stops as a killed process would: nothing is flushed, and the journal says what goes on.

pub(crate) mod backend;
mod busy;
pub(crate) mod compute;
pub(crate) mod device;
pub(crate) mod error;
pub(crate) mod event_loop;
pub(crate) mod journal;
pub(crate) mod loaders;
pub(crate) mod open;
pub(crate) mod report;
pub(crate) mod reports;
mod stop;
mod streams;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use lite_llm_core::config::Config;
use lite_llm_core::digest::Digest;
use lite_llm_core::event::Event;
use lite_llm_core::ids::{ExpertKey, Generation, Incarnation, RequestId, Seq};
use lite_llm_core::input::{Body, SwitchTarget};
use lite_llm_core::lifecycle::Lifecycle;
use lite_llm_core::output::{Carving, FinishReason, Refusal};
use lite_llm_core::plan::Identity;
use lite_llm_model::Capture;
use lite_llm_model::kernels::{DType, Isa};
use serde::{Deserialize, Serialize};

use crate::cold::{Io, Reading};

pub use error::NodeError;
use event_loop::{Command, Message};

/// Called on the event loop with each event, once its input is durable; it must return soon.
pub type OnEvent = Box<dyn FnMut(Seq, &Event) + Send>;

/// What computes the steps of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Computer {
    /// The CPU.
    Cpu,
    /// A GPU of the CUDA driver. `memory_bytes` is then of its memory, but for `warm_bytes`, which are the host's.
    Cuda {
        /// Its number there, from 0. Left out it is the first one; of a cluster's nodes each has the next.
        number: Option<u32>,
        /// How long it may be without progress before it is lost: [`crate::cuda::PATIENCE`] does for any.
        patience: Duration,
    },
}

/// What a node is started with.
pub struct NodeOptions {
    /// The checkpoint directory.
    pub model_dir: PathBuf,
    /// Where the journal is; made if there is none.
    pub state_dir: PathBuf,
    /// What the operator decides. `memory_bytes` of `u64::MAX` stands for seven eighths of what the machine has
    /// available. Where `placement` does not name a tier, the checkpoint's hint holds.
    pub config: Config,
    /// Compute threads.
    pub threads: usize,
    /// Instruction set; the choice changes no bit.
    pub isa: Isa,
    /// Storage type of cached keys and values; the type of the weights if `None`.
    pub kv_dtype: Option<DType>,
    /// What computes steps; the choice changes no bit.
    pub computer: Computer,
    /// How experts are read from a native checkpoint; as well as it can be if `None`. The choice changes no bit.
    pub io: Option<Io>,
    /// Bytes that the journal may grow to: a snapshot is taken at half of them, so that old segments can go. While the
    /// node boots or drains there is none, and the journal may be larger. `None` leaves it to `snapshot_every`.
    pub journal_bytes: Option<u64>,
    /// How long records that nobody waits for may gather before they are synced together. Tokens are told when they are durable: those
    /// of a fast stream come in twos and threes, the first and the last at once. Nothing is lost by it that was told.
    pub sync_every: Duration,
    /// Who wants to see logits and routes.
    pub capture: Option<Box<dyn Capture + Send>>,
    /// Who wants to see events, for instance the phases of the boot sequence.
    pub on_event: Option<OnEvent>,
}

impl NodeOptions {
    /// The defaults: every core, the fastest instruction set, the KV type of the weights, nobody looking on.
    pub fn new(model_dir: impl Into<PathBuf>, state_dir: impl Into<PathBuf>, config: Config) -> Self {
        Self {
            model_dir: model_dir.into(),
            state_dir: state_dir.into(),
            config,
            threads: std::thread::available_parallelism().map_or(1, usize::from),
            isa: Isa::detect(),
            kv_dtype: None,
            computer: Computer::Cpu,
            io: None,
            journal_bytes: None,
            sync_every: SYNC_EVERY,
            capture: None,
            on_event: None,
        }
    }
}

/// Fifty times a second: more often than anybody reads.
const SYNC_EVERY: Duration = Duration::from_millis(20);

/// What a client hears of its stream, in this order: `Accepted`, tokens by dense offset, `Finish`; or `Refused`.
///
/// Everything is durable before it is told. When the node ends first, the channel is closed without `Finish`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StreamEvent {
    /// The request is accepted, or found again.
    Accepted {
        /// Tokens that exist already; those from the asked offset on follow.
        generated: u32,
    },
    /// A token.
    Token {
        /// Dense from 0.
        offset: u32,
        /// Token id.
        token: u32,
    },
    /// The end of the stream.
    Finish {
        /// Why.
        reason: FinishReason,
        /// Tokens of the whole stream.
        generated: u32,
        /// Which tiers computed which of its positions.
        generations: Vec<GenerationSpan>,
    },
    /// The request is not accepted.
    Refused {
        /// What may be done about it.
        refusal: Refusal,
        /// Why, and what to do, for people.
        reason: String,
    },
}

/// How a node ended that was asked to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExitReport {
    /// The last input.
    pub seq: Seq,
    /// The process's life.
    pub incarnation: Incarnation,
    /// Requests that stay in the journal for the next life.
    pub unfinished: u32,
    /// Head of the digest chain.
    pub digest: Digest,
    /// Digest of the whole state.
    pub state_digest: Digest,
}

/// What a node is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    /// Where it is in its life.
    pub lifecycle: Lifecycle,
    /// The process's life.
    pub incarnation: Incarnation,
    /// The last input handled.
    pub seq: Seq,
    /// The last input that is durable.
    pub durable: Seq,
    /// Head of the digest chain.
    pub digest: Digest,
    /// The generation of new positions, and the names of its tiers; `None` before the manifest is read.
    pub generation: Option<(Generation, Vec<String>)>,
    /// The routing seed, once decided.
    pub routing_seed: Option<u64>,
    /// Unfinished requests, in order of acceptance.
    pub requests: Vec<RequestStatus>,
    /// Bytes that the process may use.
    pub memory_bytes: u64,
    /// Bytes of the process that are in memory now, if the system tells.
    pub resident_bytes: Option<u64>,
    /// The carved memory.
    pub carving: Carving,
    /// Slots of the hot arena with an expert in them.
    pub slots_ready: u32,
    /// Slots of the warm arena with an expert in them.
    pub warm_slots_ready: u32,
    /// Free pages of KV cache.
    pub pages_free: u32,
    /// Whether a step runs.
    pub stepping: bool,
    /// Lines of telemetry that could not be written.
    pub telemetry_dropped: u64,
}

/// An unfinished request.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestStatus {
    /// Idempotency key.
    pub id: RequestId,
    /// In order of acceptance; the number that [`Capture`] is told.
    pub number: u64,
    /// Tokens of the prompt.
    pub prompt: u32,
    /// Tokens generated.
    pub generated: u32,
    /// Positions whose keys and values are in the cache.
    pub computed: u32,
}

/// A stretch of a stream's positions, up to `until`, and the tiers that computed it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GenerationSpan {
    /// The first position that is not in it.
    pub until: u32,
    /// The generation.
    pub generation: Generation,
    /// The names of its tiers.
    pub tiers: Vec<String>,
}

/// A running node. Dropping it is a crash; [`drain`](Self::drain) and [`wait`](Self::wait) end it well.
#[derive(Debug)]
pub struct Node {
    handle: NodeHandle,
    ready: Receiver<()>,
    thread: Option<JoinHandle<Result<ExitReport, NodeError>>>,
}

impl Node {
    /// Opens model and journal, recovers what the journal holds, and returns once `Ready` is durable.
    ///
    /// # Errors
    /// What keeps the node from serving.
    pub fn start(options: NodeOptions) -> Result<Self, NodeError> {
        let mut node = Self::launch(options)?;
        node.ready()?;
        Ok(node)
    }

    /// As [`start`](Self::start), but returns while the boot sequence still runs, so that it can be watched or drained.
    ///
    /// # Errors
    /// If model or journal cannot be opened.
    pub fn launch(options: NodeOptions) -> Result<Self, NodeError> {
        open::launch(options)
    }

    /// Waits until the node serves.
    ///
    /// # Errors
    /// Why it never will.
    pub fn ready(&mut self) -> Result<(), NodeError> {
        match self.ready.recv() {
            Ok(()) => Ok(()),
            Err(_) => match self.join() {
                Ok(_) => Err(NodeError::Ended),
                Err(error) => Err(error),
            },
        }
    }

    /// Asks for a stream: see [`NodeHandle::submit`].
    pub fn submit(&self, id: RequestId, body: Body, from: u32) -> Receiver<StreamEvent> {
        self.handle.submit(id, body, from)
    }

    /// Ends a stream: see [`NodeHandle::cancel`].
    ///
    /// # Errors
    /// If there is no such request, or the node has ended.
    pub fn cancel(&self, id: RequestId) -> Result<(), NodeError> {
        self.handle.cancel(id)
    }

    /// Asks for other tiers: see [`NodeHandle::switch`].
    pub fn switch(
        &self,
        target: SwitchTarget,
        at: Option<(RequestId, u32)>,
    ) -> Receiver<Result<Generation, String>> {
        self.handle.switch(target, at)
    }

    /// Gives experts new parameters: see [`NodeHandle::modify`].
    pub fn modify(&self, experts: Vec<(ExpertKey, Vec<u8>)>) -> Receiver<Result<Generation, String>> {
        self.handle.modify(experts)
    }

    /// Asks for a clean stop: see [`NodeHandle::drain`].
    ///
    /// # Errors
    /// If the node has ended.
    pub fn drain(&self, bound: Option<Duration>) -> Result<(), NodeError> {
        self.handle.drain(bound)
    }

    /// Takes a snapshot and waits until it is durable.
    ///
    /// # Errors
    /// If the node ends first.
    pub fn snapshot(&self) -> Result<Seq, NodeError> {
        self.handle.snapshot()
    }

    /// What the node is doing.
    ///
    /// # Errors
    /// If it has ended.
    pub fn status(&self) -> Result<Status, NodeError> {
        self.handle.status()
    }

    /// What the journal belongs to.
    pub fn identity(&self) -> &Identity {
        self.handle.identity()
    }

    /// How experts are read, and why not in a better way, for people; empty if there are none.
    pub fn reading(&self) -> String {
        self.handle.reading()
    }

    /// How a GPU is told what to do, if not in the best way, for people; else empty.
    pub fn launching(&self) -> &str {
        &self.handle.launching
    }

    /// A handle for other threads.
    pub fn handle(&self) -> NodeHandle {
        self.handle.clone()
    }

    /// Waits until the node has ended, which it does only when it is drained or fails.
    ///
    /// # Errors
    /// If it did not end well.
    pub fn wait(mut self) -> Result<ExitReport, NodeError> {
        self.join()
    }

    fn join(&mut self) -> Result<ExitReport, NodeError> {
        let Some(thread) = self.thread.take() else { return Err(NodeError::Ended) };
        thread.join().unwrap_or_else(|panic| {
            Err(NodeError::Panic { seq: Seq(0), thread: "node", message: error::panic_message(&*panic) })
        })
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.handle.send(Command::Abandon);
            // The thread's own error has nobody left to hear it.
            let _ = thread.join();
        }
    }
}

/// What other threads do with a node.
#[derive(Clone, Debug)]
pub struct NodeHandle {
    messages: SyncSender<Message>,
    identity: Arc<Identity>,
    reading: Arc<Reading>,
    launching: Arc<str>,
}

impl NodeHandle {
    /// Asks for a stream, or for one that exists, from token offset `from` on. The same id with the same body attaches.
    ///
    /// The channel holds at most the tokens of the stream. Dropping the receiver detaches; the request goes on.
    pub fn submit(&self, id: RequestId, body: Body, from: u32) -> Receiver<StreamEvent> {
        let (events, receiver) = channel();
        let late = events.clone();
        if !self.send(Command::Submit { id, body: Box::new(body), from, events }) {
            // The receiver is in our hands, so there is somebody to hear it.
            let refusal = Refusal::NotServing;
            let _ = late.send(StreamEvent::Refused { refusal, reason: NodeError::Ended.to_string() });
        }
        receiver
    }

    /// Ends a stream. Cancelling what is already finished changes nothing.
    ///
    /// # Errors
    /// If there is no such request, or the node has ended.
    pub fn cancel(&self, id: RequestId) -> Result<(), NodeError> {
        self.ask(|reply| Command::Cancel { id, reply })?.map_err(NodeError::Refused)
    }

    /// Asks to serve from other tiers: from the next step on, or from a position of a request that may be yet to come.
    /// The channel tells the outcome once it is durable; it is closed without one if the node ends first.
    pub fn switch(
        &self,
        target: SwitchTarget,
        at: Option<(RequestId, u32)>,
    ) -> Receiver<Result<Generation, String>> {
        let (reply, receiver) = channel();
        self.send(Command::Switch { target, at, reply });
        receiver
    }

    /// Gives experts new parameters from the next step boundary on: for each, ascending, the bytes of its slot in the
    /// packed layout. They are made durable first. The channel tells the outcome once it is durable; it is closed without
    /// one if the node ends first.
    pub fn modify(&self, experts: Vec<(ExpertKey, Vec<u8>)>) -> Receiver<Result<Generation, String>> {
        let (reply, receiver) = channel();
        self.send(Command::Modify { experts, reply });
        receiver
    }

    /// Asks for a clean stop: nothing new is accepted, what is there is finished or, once `bound` is over, left to the
    /// next life. May be asked again with a shorter bound. [`Node::wait`] tells the end.
    ///
    /// # Errors
    /// If the node has ended.
    pub fn drain(&self, bound: Option<Duration>) -> Result<(), NodeError> {
        let bound_ns = bound.map(|bound| u64::try_from(bound.as_nanos()).unwrap_or(u64::MAX));
        if self.send(Command::Drain { bound_ns }) { Ok(()) } else { Err(NodeError::Ended) }
    }

    /// Takes a snapshot, waits until it is durable, and returns the first input that it does not hold.
    ///
    /// # Errors
    /// If the node ends first.
    pub fn snapshot(&self) -> Result<Seq, NodeError> {
        self.ask(|reply| Command::Snapshot { reply })
    }

    /// What the node is doing.
    ///
    /// # Errors
    /// If it has ended.
    pub fn status(&self) -> Result<Status, NodeError> {
        self.ask(|reply| Command::Status { reply })
    }

    /// Which tiers computed which positions of a stream, unfinished or kept; `None` if there is no such stream.
    ///
    /// # Errors
    /// If the node has ended.
    pub fn generations(&self, id: &RequestId) -> Result<Option<Vec<GenerationSpan>>, NodeError> {
        self.ask(|reply| Command::Generations { id: id.clone(), reply })
    }

    /// What the journal belongs to.
    pub fn identity(&self) -> &Identity {
        &self.identity
    }

    /// How experts are read, and why not in a better way, for people; empty if there are none.
    pub fn reading(&self) -> String {
        self.reading.whole()
    }

    fn ask<T>(&self, command: impl FnOnce(Sender<T>) -> Command) -> Result<T, NodeError> {
        let (reply, receiver) = channel();
        self.send(command(reply));
        receiver.recv().map_err(|_| NodeError::Ended)
    }

    /// Whether the node was still there to take it.
    fn send(&self, command: Command) -> bool {
        self.messages.send(Message::Command(command)).is_ok()
    }
}
