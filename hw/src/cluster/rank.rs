//! A node of a cluster: one process, one rank at a time.
//!
//! The loop drives a `Peer`: records go to the journal thread, what is to be done here to the device, messages to the other
//! nodes. Beats have a thread of their own, which repeats what the loop last said of itself: nothing that hangs holds them up,
//! and a hang shows in the progress that they tell.

use super::ClusterError;
use super::processes::introduce;
use super::said::Said;
use crate::blobs::Blobs;
use crate::cold::{Cold, Io, Reading};
use crate::disk::FileDisk;
use crate::net::{Key, Mesh};
use crate::node::compute::Compute;
use crate::node::device::Device;
use crate::node::error::panic_message;
use crate::node::event_loop::Clock;
use crate::node::journal::{Change, Contents, Journal};
use crate::node::loaders::Loaders;
use crate::node::open::{LOADERS_MAX, backend_of, fold_contents, gpu_of, refold};
use crate::node::report;
use crate::node::reports::{Report, Reports};
use crate::node::{Computer, NodeError};
use crate::telemetry::{Telemetry, Timing};
use lite_llm_core::LOGIC_VERSION;
use lite_llm_core::cluster::membership::{Member, NodeId};
use lite_llm_core::cluster::orders::{Beat, Facts, Orders};
use lite_llm_core::cluster::peer::{Log, Peer, PeerConfig, PeerInput, PeerOutput};
use lite_llm_core::config::Config;
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{Incarnation, Seq};
use lite_llm_core::input::Input;
use lite_llm_core::journal::{Header, Store};
use lite_llm_core::output::Output;
use lite_llm_core::plan::Identity;
use lite_llm_core::time::Time;
use lite_llm_core::topology::Topology;
use lite_llm_model::kernels::{CONTRACT_VERSION, DType, Isa};
use lite_llm_model::tokenizer::Tokenizer;
use lite_llm_model::{Checkpoint, Model, ModelOptions, Share};
use std::collections::{BTreeMap, VecDeque};
use std::hash::{BuildHasher, Hasher};
use std::net::SocketAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Time between two beats.
const BEAT_EVERY: Duration = Duration::from_millis(100);
/// Nanoseconds after which an unconfirmed message is sent again.
const RETRY_NS: u64 = 200_000_000;
/// Messages to one member that may be unconfirmed.
const UNCONFIRMED_MAX: u32 = 1024;
/// Messages that may wait for the loop.
const MESSAGES_MAX: usize = 4096;
/// A node that hears nothing of its supervisor for so long ends: nobody would start another in its place.
const ALONE_MAX: Duration = Duration::from_secs(60);
/// How long the last word of a node may take.
const LAST_WORD_MAX: Duration = Duration::from_secs(2);

/// What a node is started with.
#[derive(Debug)]
pub struct RankOptions {
    /// The checkpoint directory.
    pub model_dir: PathBuf,
    /// The node's own directory.
    pub state_dir: PathBuf,
    /// What the operator decided, the topology in it: the same on every node.
    pub config: Config,
    /// Compute threads.
    pub threads: usize,
    /// Instruction set.
    pub isa: Isa,
    /// Storage type of cached keys and values.
    pub kv_dtype: DType,
    /// What computes steps.
    pub computer: Computer,
    /// How experts are read; as well as it can be if `None`.
    pub io: Option<Io>,
    /// This life.
    pub member: Member,
    /// How far two clocks may drift apart, in thousandths.
    pub drift_per_mille: u32,
    /// Where the supervisor listens.
    pub supervisor: SocketAddr,
    /// Where to listen; port 0 for any.
    pub listen: SocketAddr,
    /// What all processes of the cluster share.
    pub key: Key,
    /// Tells people a line of this node.
    pub say: fn(&str),
}

/// What every node of a cluster has to say of itself.
///
/// # Errors
/// If the checkpoint cannot be read.
pub fn facts(model: &Model, config: &Config, tokenizer: Option<&Tokenizer>) -> Result<Facts, NodeError> {
    let digest = tokenizer.map_or_else(Digest::default, Tokenizer::digest);
    let identity = model.plan(config.limits.step_positions_max, config.limits.rows_max, digest)?.identity;
    Ok(facts_of(&identity, config))
}

fn facts_of(identity: &Identity, config: &Config) -> Facts {
    Facts {
        contract: CONTRACT_VERSION,
        logic: LOGIC_VERSION,
        model: Digest::of_value(identity),
        config: Digest::of_value(config),
    }
}

/// What comes to the loop.
#[allow(
    clippy::large_enum_variant,
    reason = "it moves once, through a bounded channel; a box would be one allocation more"
)]
#[derive(Debug)]
enum Happened {
    Report(Report),
    Said(Said),
}

impl From<Report> for Happened {
    fn from(report: Report) -> Self {
        Self::Report(report)
    }
}

/// Runs a node until the cluster has no more need of it.
///
/// # Errors
/// Why it ended otherwise.
pub fn run(options: RankOptions) -> Result<(), ClusterError> {
    let alive = |source| ClusterError::File { path: options.state_dir.clone(), source };
    let say = |clean| introduce(&options.state_dir, options.member.incarnation, clean).map_err(alive);
    say(false)?;
    let (messages, happened) = sync_channel(MESSAGES_MAX);
    let mut node = Node::open(&options, Reports::to(messages.clone()))?;
    let heard = move |bytes: Vec<u8>| {
        Said::decode(&bytes).is_some_and(|said| messages.send(Happened::Said(said)).is_ok())
    };
    let mesh = Arc::new(Mesh::listen(options.listen, options.key.clone(), heard)?);
    let heart = Heart::start(&node, Arc::clone(&mesh), options.supervisor)?;
    // The record at which a rank breaks an invariant must be in its journal: that is how its supervisor knows it again.
    let end = catch_unwind(AssertUnwindSafe(|| node.turn(&happened, &mesh, &heart)));
    let end = end.unwrap_or_else(|panic| {
        let message = panic_message(&*panic);
        Err(NodeError::Panic { seq: node.last(), thread: "node", message }.into())
    });
    // Others may wait for its last word: that all are refused, say, or that all is done.
    mesh.settle(LAST_WORD_MAX);
    heart.stop();
    let closed = node.close();
    end.and(closed)?;
    say(true)
}

/// What is needed to open a rank's share of the model.
struct Shares {
    checkpoint: Arc<Checkpoint>,
    options: ModelOptions,
}

impl Shares {
    fn open(&self, share: Share) -> Result<Model, NodeError> {
        Ok(Model::open(Arc::clone(&self.checkpoint), ModelOptions { share, ..self.options.clone() })?)
    }
}

struct Node {
    peer: Peer,
    clock: Clock,
    device: Device,
    shares: Shares,
    topology: Topology,
    /// The rank that the device computes.
    rank: u32,
    journal: Journal,
    durable: Seq,
    telemetry: Telemetry,
    blobs: Blobs,
    inbox: VecDeque<PeerInput>,
    until: Option<Time>,
    book: BTreeMap<NodeId, SocketAddr>,
    supervisor: SocketAddr,
    member: Member,
    /// When the supervisor was last heard.
    heard: Instant,
    end: Option<Result<(), ClusterError>>,
    say: fn(&str),
}

impl Node {
    fn open(options: &RankOptions, reports: Reports) -> Result<Self, ClusterError> {
        let RankOptions { state_dir, config, member, .. } = options;
        // The lock first: nobody else may serve this state while the model is being read.
        let disk = FileDisk::open(state_dir).map_err(NodeError::from)?;
        let checkpoint = Arc::new(Checkpoint::open(&options.model_dir).map_err(NodeError::from)?);
        let tokenizer = Tokenizer::of(&checkpoint).map_err(NodeError::from)?;
        let gpu = gpu_of(options.computer, member.node.0)?;
        let shares = Shares {
            checkpoint,
            options: ModelOptions {
                threads: options.threads,
                isa: options.isa,
                kv_dtype: Some(options.kv_dtype),
                routing_seed: config.routing_seed.unwrap_or(0),
                share: Share::WHOLE,
            },
        };
        let rank = 0;
        let model = shares.open(Share::new(config.topology, rank))?;
        let loader = model.expert_loader();
        let slot_bytes = model.slot_bytes() as u64;
        let cold = match &gpu {
            None => Cold::open(options.io, &loader, config.memory_bytes),
            Some(gpu) => Cold::open_for(gpu, options.io, &loader, slot_bytes),
        };
        let cold = cold.map_err(NodeError::from)?;
        let reading = Arc::new(Reading::new(cold.report()));
        let digest = tokenizer.as_ref().map_or_else(Digest::default, Tokenizer::digest);
        let limits = &config.limits;
        let plan = model.plan(limits.step_positions_max, limits.rows_max, digest);
        let mut plan = plan.map_err(NodeError::from)?;
        let facts = facts_of(&plan.identity, config);
        let (backend, launching) = backend_of(gpu.as_ref(), model, limits, &mut plan)?;
        if !launching.is_empty() {
            (options.say)(&format!("{member}: {launching}"));
        }
        let header = Header {
            logic_version: LOGIC_VERSION,
            node: member.node.0,
            incarnation: member.incarnation.0,
            identity: facts.model.0,
        };
        let (store, recovered) = Store::open(disk, &header).map_err(NodeError::from)?;
        let telemetry = Telemetry::open(state_dir, member.incarnation.0);
        let what = "cannot open the telemetry files in the state directory";
        let mut telemetry = telemetry.map_err(|source| NodeError::System { what, source })?;
        let engine = refold(&recovered, &mut telemetry)?;
        let log = Log::new(engine, &recovered.records);
        let settings = PeerConfig {
            member: *member,
            facts,
            config: config.clone(),
            torn: recovered.torn,
            began: Incarnation(recovered.began),
            entropy: std::collections::hash_map::RandomState::new().build_hasher().finish(),
            retry_ns: RETRY_NS,
            unconfirmed_max: UNCONFIRMED_MAX,
            drift_per_mille: options.drift_per_mille,
        };
        let blobs = Blobs::of(state_dir);
        let loaders = options.threads.clamp(1, LOADERS_MAX).min(limits.loads_max as usize);
        let loaders = Loaders::start(loaders, loader, cold, &blobs, gpu.as_ref(), &reports)?;
        let compute = Compute::start(backend, None, reports.clone())?;
        let durable = Seq(store.durable());
        Ok(Self {
            clock: Clock::start(log.engine.now()),
            peer: Peer::new(settings, log),
            device: Device::new(compute, loaders, plan, tokenizer, gpu, reading),
            shares,
            topology: config.topology,
            rank,
            journal: Journal::start(store, 0, reports)?,
            durable,
            telemetry,
            blobs,
            inbox: VecDeque::new(),
            until: None,
            book: BTreeMap::new(),
            supervisor: options.supervisor,
            member: *member,
            heard: Instant::now(),
            end: None,
            say: options.say,
        })
    }

    fn turn(
        &mut self,
        happened: &Receiver<Happened>,
        mesh: &Mesh,
        heart: &Heart,
    ) -> Result<(), ClusterError> {
        loop {
            while let Some(input) = self.inbox.pop_front() {
                self.give(input, mesh)?;
                self.look_at_journal()?;
            }
            heart.say(self.peer.beat(self.clock.now()));
            if let Some(end) = self.end.take() {
                return end;
            }
            if self.heard.elapsed() > ALONE_MAX {
                let what = format!("{} ends: its supervisor was not heard for {ALONE_MAX:?}", self.member);
                return Err(ClusterError::Refused(what));
            }
            let wait = self.until.map_or(ALONE_MAX, |until| {
                Duration::from_nanos(until.0.saturating_sub(self.clock.now().0)).min(ALONE_MAX)
            });
            match happened.recv_timeout(wait) {
                Ok(Happened::Report(report)) => self.report(report)?,
                Ok(Happened::Said(said)) => self.hear(said, mesh)?,
                Err(RecvTimeoutError::Timeout) => self.inbox.push_back(PeerInput::Tick),
                Err(RecvTimeoutError::Disconnected) => {
                    unreachable!("threads of this node report as long as it runs")
                }
            }
            self.look_at_journal()?;
        }
    }

    /// Another process says something.
    fn hear(&mut self, said: Said, mesh: &Mesh) -> Result<(), ClusterError> {
        match said {
            Said::Rank(message) => self.inbox.push_back(PeerInput::Message(message)),
            Said::Orders { orders, book } if orders.to == self.member => {
                self.heard = Instant::now();
                self.book.extend(book);
                let Orders { refused, .. } = &*orders;
                if let Some(reason) = refused {
                    return Err(ClusterError::Refused(reason.clone()));
                }
                self.inbox.push_back(PeerInput::Orders(orders));
            }
            Said::Ask { replica, input } => {
                // One of another replica is asked again, of the right one.
                if self.peer.membership().is_some_and(|membership| membership.replica == replica) {
                    self.inbox.push_back(PeerInput::Command(*input));
                }
            }
            Said::Look => {
                let status = report::status(self.peer.engine(), self.durable, self.telemetry.dropped());
                let said = Said::Seen { member: self.member, status: Box::new(status) };
                mesh.send(self.supervisor, said.encode());
            }
            Said::Orders { .. }
            | Said::Beat { .. }
            | Said::Tell(_)
            | Said::Refused { .. }
            | Said::Seen { .. }
            | Said::Agent(_)
            | Said::Wanted(_) => {}
        }
        Ok(())
    }

    /// A thread of this node has done something.
    fn report(&mut self, report: Report) -> Result<(), ClusterError> {
        for news in self.device.news() {
            (self.say)(&format!("{}: {news}", self.member));
        }
        match report {
            Report::Done { epoch, mut input, took } if epoch == self.device.epoch() => {
                if let Some((what, duration)) = took {
                    self.telemetry.timing(what, duration);
                }
                if let Input::Finished { step, rows, duration_ns, .. } = &mut input {
                    self.device.mark_stops(self.peer.engine(), rows);
                    let duration = Duration::from_nanos(*duration_ns);
                    self.telemetry.timing(Timing::Step(step.0, rows.len()), duration);
                }
                self.inbox.push_back(PeerInput::Answer(input));
            }
            Report::Data { epoch, to, tag, bytes } if epoch == self.device.epoch() => {
                self.inbox.push_back(PeerInput::Data { to, tag, bytes });
            }
            // Of an epoch that is over.
            Report::Done { .. } | Report::Data { .. } | Report::Wake => {}
            Report::Lost { what } => return Err(NodeError::Lost(what).into()),
            Report::DeviceLost { what } => return Err(NodeError::Device(what).into()),
            Report::Panicked { thread, message } => {
                return Err(NodeError::Panic { seq: self.last(), thread, message }.into());
            }
        }
        Ok(())
    }

    fn last(&self) -> Seq {
        Seq(self.peer.engine().next_seq().0 - 1)
    }

    /// Takes note of what has become durable.
    fn look_at_journal(&mut self) -> Result<(), ClusterError> {
        let (durable, snapshot) = {
            let mut progress = self.journal.progress();
            if let Some(error) = progress.failed.take() {
                return Err(NodeError::from(error).into());
            }
            progress.flushes.clear();
            (progress.durable, progress.snapshot.take())
        };
        if durable > self.durable {
            self.durable = durable;
            self.inbox.push_back(PeerInput::Durable { seq: durable });
        }
        if let Some(next) = snapshot {
            self.inbox.push_back(PeerInput::Answer(Input::SnapshotDurable { next }));
        }
        Ok(())
    }

    /// Lets the rank handle something, and obeys.
    fn give(&mut self, input: PeerInput, mesh: &Mesh) -> Result<(), ClusterError> {
        self.peer.handle(self.clock.now(), input);
        loop {
            match self.peer.poll() {
                PeerOutput::Wait { until } => {
                    self.until = until;
                    return Ok(());
                }
                output => self.obey(output, mesh)?,
            }
        }
    }

    fn obey(&mut self, output: PeerOutput, mesh: &Mesh) -> Result<(), ClusterError> {
        match output {
            PeerOutput::Append(record) => self.journal.record(record)?,
            PeerOutput::Obey(output) => self.carry_out(output)?,
            PeerOutput::Tell(output) => mesh.send(self.supervisor, Said::Tell(Box::new(output)).encode()),
            PeerOutput::Refused { input, reason } => {
                mesh.send(self.supervisor, Said::Refused { input: Box::new(input), reason }.encode());
            }
            PeerOutput::Send(message) => {
                // Whom nobody knows yet is told again.
                if let Some(&to) = self.book.get(&message.to.node) {
                    mesh.send(to, Said::Rank(message).encode());
                }
            }
            PeerOutput::Data { from, tag, bytes } => self.device.data(from, tag, bytes),
            PeerOutput::Snapshot(snapshot) => {
                self.journal.snapshot(Seq(snapshot.next), snapshot.digest, snapshot.bytes)?;
            }
            PeerOutput::ReadLog { from } => {
                let (snapshot, records) = self.journal.change(Change::Read { from })?;
                self.inbox.push_front(PeerInput::Log { snapshot, records });
            }
            PeerOutput::Rewind { keep } => self.replace_log(Change::Cut { keep })?,
            PeerOutput::Install(snapshot) => self.replace_log(Change::Install(snapshot))?,
            PeerOutput::Whole => drop(self.journal.change(Change::Whole)?),
            PeerOutput::Forget => self.forget()?,
            PeerOutput::Diverged { seq, expected, found } => {
                return Err(ClusterError::Diverged { seq, expected, found });
            }
            PeerOutput::Wait { .. } => unreachable!("taken by the caller"),
        }
        Ok(())
    }

    fn replace_log(&mut self, change: Change) -> Result<(), ClusterError> {
        let contents: Contents = self.journal.change(change)?;
        let log = fold_contents(contents)?;
        // Whatever was on its way before was written before.
        self.durable = self.journal.progress().durable;
        self.inbox.retain(|input| !matches!(input, PeerInput::Durable { .. }));
        self.inbox.push_front(PeerInput::Rewound(Box::new(log)));
        Ok(())
    }

    /// A new epoch, maybe as another rank.
    fn forget(&mut self) -> Result<(), ClusterError> {
        self.inbox.retain(|input| {
            matches!(
                input,
                PeerInput::Orders(_)
                    | PeerInput::Message(_)
                    | PeerInput::Command(_)
                    | PeerInput::Durable { .. }
                    | PeerInput::Rewound(_)
            )
        });
        let rank = self.peer.rank();
        let model =
            if rank == self.rank { None } else { Some(self.shares.open(Share::new(self.topology, rank))?) };
        self.rank = rank;
        self.device.forget(model);
        Ok(())
    }

    /// Does what the engine asks of this rank.
    fn carry_out(&mut self, output: Output) -> Result<(), ClusterError> {
        match output {
            Output::Event { seq, event } => self.telemetry.event(seq, &event),
            Output::FlushTelemetry => {
                // What cannot be written is dropped and counted, and keeps nobody from stopping.
                let _ = self.telemetry.sync();
                self.inbox.push_back(PeerInput::Answer(Input::TelemetryFlushed));
            }
            Output::Retire { blob, .. } => {
                self.blobs.remove(blob);
                self.inbox.push_back(PeerInput::Answer(Input::Retired { blob }));
            }
            Output::Trim { before } => self.journal.trim(before)?,
            Output::Exit { error, .. } => {
                self.end = Some(error.map_or(Ok(()), |error| Err(NodeError::Boot(error).into())));
            }
            output => {
                let done = self.device.obey(self.peer.engine(), output);
                self.inbox.extend(done.map(PeerInput::Answer));
            }
        }
        Ok(())
    }

    fn close(mut self) -> Result<(), ClusterError> {
        let closed = self.journal.close();
        self.telemetry.flush();
        self.device.close();
        Ok(closed?)
    }
}

/// The thread of the beats.
struct Heart {
    last: Arc<Mutex<Beat>>,
    over: Arc<AtomicBool>,
}

impl Heart {
    fn start(node: &Node, mesh: Arc<Mesh>, supervisor: SocketAddr) -> Result<Self, NodeError> {
        let clock = node.clock;
        let last = Arc::new(Mutex::new(node.peer.beat(clock.now())));
        let over = Arc::new(AtomicBool::new(false));
        let heart = Self { last: Arc::clone(&last), over: Arc::clone(&over) };
        let address = mesh.address();
        let beat = move || {
            while !over.load(Ordering::Relaxed) {
                let mut beat = last.lock().unwrap_or_else(PoisonError::into_inner).clone();
                beat.sent = clock.now();
                mesh.send(supervisor, Said::Beat { beat: Box::new(beat), address }.encode());
                std::thread::sleep(BEAT_EVERY);
            }
        };
        let what = "cannot start the thread of the beats";
        std::thread::Builder::new()
            .name("heart".into())
            .spawn(beat)
            .map_err(|source| NodeError::System { what, source })?;
        Ok(heart)
    }

    fn say(&self, beat: Beat) {
        *self.last.lock().unwrap_or_else(PoisonError::into_inner) = beat;
    }

    fn stop(&self) {
        self.over.store(true, Ordering::Relaxed);
    }
}
