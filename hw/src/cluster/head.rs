//! The head of a cluster: the supervisor's state machine with its journal, the nodes' processes, the clients and the operator.

mod handle;
mod operator;
mod status;

pub(super) use handle::Reply;
pub use handle::{Answer, HeadHandle};
pub use status::{ClusterStatus, NodeStatus, ReplicaStatus};

use super::ClusterError;
use super::book::Book;
use super::elsewhere::Elsewhere;
use super::processes::Processes;
use super::requests::Requests;
use super::said::Said;
use crate::disk::FileDisk;
use crate::net::{Key, Mesh};
use crate::node::NodeError;
use crate::node::event_loop::Clock;
use crate::supervisor::JournalTail;
use handle::Happened;
use lite_llm_core::LOGIC_VERSION;
use lite_llm_core::cluster::membership::Member;
use lite_llm_core::cluster::supervisor::{
    ClusterConfig, Failure, Standing, Supervisor, SupervisorEvent, SupervisorInput, SupervisorOutput,
};
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{Incarnation, Seq};
use lite_llm_core::journal::{Header, Store, scan};
use lite_llm_core::replay::{encode_input, fold};
use lite_llm_core::time::Time;
use operator::Operator;
use serde::Serialize;
use std::collections::VecDeque;
use std::fs::{DirBuilder, OpenOptions};
use std::io::Write;
use std::net::SocketAddr;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The node number in the supervisor's journal.
const NODE: u32 = u32::MAX;
/// The file that holds where the supervisor listens, so that its next life listens there too.
const ADDRESS_NAME: &str = "address";
/// Records between two snapshots.
const SNAPSHOT_EVERY: u64 = 4096;
/// Time between two looks at the processes.
const LOOK_EVERY: Duration = Duration::from_millis(20);
/// Messages that may wait for the loop.
const MESSAGES_MAX: usize = 4096;

/// Makes the command of a node's life: its member, where the supervisor listens, its directory.
pub type NodeCommand = Box<dyn FnMut(Member, SocketAddr, &Path) -> Command + Send>;

/// Called with each thing that happened, once it is durable.
pub type OnEvent = Box<dyn FnMut(&SupervisorEvent) + Send>;

/// What a head is started with.
pub struct HeadOptions {
    /// Its state directory, with its journal and the directories of the nodes of this machine. It is locked: who has it open may end
    /// what a former head left there, and change it.
    pub disk: FileDisk,
    /// How the cluster is run.
    pub cluster: ClusterConfig,
    /// How many of the nodes, the last ones, are on other machines; what their processes are started with.
    pub elsewhere: u32,
    /// See `elsewhere`.
    pub settings: String,
    /// Whether somebody may restart nodes that are given up. Else a replica that too few are left for ends the cluster.
    pub attended: bool,
    /// Where to listen; port 0 for any, which the next life keeps.
    pub listen: SocketAddr,
    /// What all processes of the cluster share.
    pub key: Key,
    /// How a node's process is started.
    pub command: NodeCommand,
    /// Who wants to see what happens.
    pub on_event: Option<OnEvent>,
}

/// A running head. Dropping it is a crash: the nodes go on, and the next life finds them.
#[derive(Debug)]
pub struct Head {
    handle: HeadHandle,
    thread: Option<JoinHandle<Result<(), ClusterError>>>,
}

impl Head {
    /// Opens the journal and begins, or goes on with what a former life left.
    ///
    /// # Errors
    /// If the journal or the network cannot be opened.
    pub fn start(options: HeadOptions) -> Result<Self, ClusterError> {
        let (messages, happened) = sync_channel(MESSAGES_MAX);
        let replicas = options.cluster.topology.data;
        let mut loop_ = Loop::open(options, &messages)?;
        let thread = std::thread::Builder::new()
            .name("head".into())
            .spawn(move || loop_.run(&happened))
            .map_err(|source| NodeError::System { what: "cannot start the head's loop", source })?;
        Ok(Self { handle: HeadHandle::new(messages, replicas), thread: Some(thread) })
    }

    /// A handle for other threads.
    #[must_use]
    pub fn handle(&self) -> HeadHandle {
        self.handle.clone()
    }

    /// Waits for the end, after a drain.
    ///
    /// # Errors
    /// Why it ended otherwise.
    pub fn wait(mut self) -> Result<(), ClusterError> {
        self.join()
    }

    fn join(&mut self) -> Result<(), ClusterError> {
        let Some(thread) = self.thread.take() else { return Ok(()) };
        thread.join().unwrap_or_else(|panic| {
            let message = crate::node::error::panic_message(&*panic);
            Err(NodeError::Panic { seq: Seq(0), thread: "head", message }.into())
        })
    }
}

impl Drop for Head {
    fn drop(&mut self) {
        if self.thread.is_some() {
            self.handle.send(Happened::Stop);
            // What it says is of no interest to who drops it.
            let _ = self.join();
        }
    }
}

/// What is written down of the end of a node's life.
#[derive(Debug, Serialize)]
struct Recorded<'a> {
    failure: &'a Failure,
    journal: serde_json::Value,
}

struct Loop {
    supervisor: Supervisor,
    store: Store<FileDisk>,
    snapshot: Seq,
    durable: Seq,
    held: VecDeque<(Seq, SupervisorOutput)>,
    inbox: VecDeque<SupervisorInput>,
    until: Option<Time>,
    clock: Clock,
    processes: Processes,
    elsewhere: Elsewhere,
    settings: String,
    attended: bool,
    command: NodeCommand,
    on_event: Option<OnEvent>,
    mesh: Mesh,
    book: Book,
    requests: Requests,
    operator: Operator,
    end: Option<Result<(), ClusterError>>,
}

impl Loop {
    fn open(options: HeadOptions, messages: &SyncSender<Happened>) -> Result<Self, ClusterError> {
        let HeadOptions { mut disk, cluster, elsewhere, settings, attended, listen, key, command, on_event } =
            options;
        let state_dir = disk.path().to_path_buf();
        let former = scan(&mut disk).map_err(NodeError::from)?.header.map_or(0, |header| header.incarnation);
        let header = Header {
            logic_version: LOGIC_VERSION,
            node: NODE,
            incarnation: former + 1,
            identity: Digest::of_value(&cluster.facts.model).0,
        };
        let (store, found) = Store::open(disk, &header).map_err(NodeError::from)?;
        let broken = |what: String| NodeError::Snapshot { next: store.durable() + 1, what };
        let mut supervisor = match &found.snapshot {
            None => Supervisor::new(),
            Some(snapshot) => {
                Supervisor::restore(&snapshot.bytes).map_err(|error| broken(error.to_string()))?
            }
        };
        fold(&mut supervisor, &found.records, |_, _| {}).map_err(NodeError::from)?;
        let durable = Seq(supervisor.next_seq().0 - 1);
        let heard = {
            let messages = messages.clone();
            move |bytes: Vec<u8>| {
                Said::decode(&bytes).is_some_and(|said| messages.send(Happened::Said(said)).is_ok())
            }
        };
        let mesh = Mesh::listen(address(&state_dir, listen), key, heard)?;
        write_address(&state_dir, mesh.address())?;
        let mut processes = Processes::new(state_dir);
        for (member, standing) in supervisor.view().nodes() {
            let here = member.node.0 < cluster.nodes.saturating_sub(elsewhere);
            if here && matches!(standing, Standing::Starting | Standing::Up | Standing::Fencing) {
                processes.adopt(member);
            }
        }
        let replicas = cluster.topology.data;
        let elsewhere = Elsewhere::new(cluster.nodes.saturating_sub(elsewhere)..cluster.nodes);
        let started = SupervisorInput::Started { incarnation: Incarnation(former + 1), config: cluster };
        Ok(Self {
            clock: Clock::start(supervisor.now()),
            processes,
            elsewhere,
            settings,
            attended,
            supervisor,
            store,
            snapshot: durable,
            durable,
            held: VecDeque::new(),
            inbox: VecDeque::from([started]),
            until: None,
            command,
            on_event,
            mesh,
            book: Book::default(),
            requests: Requests::new(replicas),
            operator: Operator::default(),
            end: None,
        })
    }

    fn run(&mut self, happened: &Receiver<Happened>) -> Result<(), ClusterError> {
        let mut looked = Instant::now();
        loop {
            self.work()?;
            if let Some(end) = self.end.take() {
                return end;
            }
            self.ask();
            self.attend();
            let due = self
                .until
                .map_or(LOOK_EVERY, |until| Duration::from_nanos(until.0.saturating_sub(self.clock.now().0)));
            // What is due and was not asked waits for somebody who leads.
            let now = Instant::now();
            let asks = self.requests.again().into_iter().chain(self.operator.again());
            let asks = asks.map(|at| at.saturating_duration_since(now)).filter(|wait| !wait.is_zero());
            let asks = asks.min().unwrap_or(LOOK_EVERY);
            match happened.recv_timeout(due.min(asks).min(LOOK_EVERY)) {
                Ok(Happened::Stop) => return Err(NodeError::Ended.into()),
                Ok(happened) => self.take(happened),
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return Err(NodeError::Ended.into()),
            }
            // Every message that is there comes before a tick: nobody is suspected for what waits here.
            while let Ok(happened) = happened.try_recv() {
                if matches!(happened, Happened::Stop) {
                    return Err(NodeError::Ended.into());
                }
                self.take(happened);
            }
            if looked.elapsed() >= LOOK_EVERY {
                looked = Instant::now();
                let mut ended = self.processes.poll();
                ended.extend(self.elsewhere.poll());
                self.inbox.extend(
                    ended.into_iter().map(|(member, ending)| SupervisorInput::Ended { member, ending }),
                );
            }
            if self.until.is_some_and(|until| until <= self.clock.now()) {
                self.inbox.push_back(SupervisorInput::Tick);
            }
        }
    }

    fn take(&mut self, happened: Happened) {
        match happened {
            Happened::Said(Said::Beat { beat, address }) => {
                self.book.insert(beat.member, address);
                self.inbox.push_back(SupervisorInput::Beat(beat));
            }
            Happened::Said(Said::Tell(output)) => {
                self.operator.wishes.tell(&output);
                self.requests.tell(*output);
            }
            Happened::Said(Said::Refused { input, .. }) => {
                self.operator.wishes.refused(&input);
                self.requests.refused(&input);
            }
            Happened::Said(Said::Seen { member, status }) => self.operator.seen(member, *status),
            Happened::Said(Said::Agent(says)) => {
                let (to, wanted, new) = self.elsewhere.hear(*says, &self.settings);
                self.mesh.send(to, Said::Wanted(Box::new(wanted)).encode());
                // One that was given up for want of a machine has one now.
                let given_up = |node| {
                    self.supervisor
                        .view()
                        .nodes()
                        .any(|(member, standing)| member.node == node && standing == Standing::GivenUp)
                };
                self.inbox
                    .extend(new.filter(|&node| given_up(node)).map(|node| SupervisorInput::Restart { node }));
            }
            Happened::Said(
                Said::Rank(_) | Said::Orders { .. } | Said::Ask { .. } | Said::Look | Said::Wanted(_),
            ) => {}
            Happened::Submit { id, body, from, events } => self.requests.submit(id, *body, from, events),
            Happened::Asked(asked) => self.asked(asked),
            Happened::Drain { bound_ns } => self.inbox.push_back(SupervisorInput::Drain { bound_ns }),
            Happened::Stop => unreachable!("taken by the caller"),
        }
    }

    /// Handles what there is, makes it durable, and obeys what is.
    fn work(&mut self) -> Result<(), ClusterError> {
        while !self.inbox.is_empty() {
            while let Some(input) = self.inbox.pop_front() {
                self.handle(input)?;
            }
            self.flush()?;
            while let Some(at) = self.held.iter().position(|(after, _)| *after <= self.durable) {
                let (_, output) = self.held.remove(at).expect("it was there");
                self.obey(output)?;
            }
        }
        Ok(())
    }

    fn handle(&mut self, input: SupervisorInput) -> Result<(), ClusterError> {
        let time = self.clock.now().max(self.supervisor.now());
        let (seq, digest) = (self.supervisor.next_seq(), self.supervisor.digest());
        self.store.push(seq.0, time.0, digest.0, encode_input(&input)).map_err(NodeError::from)?;
        self.supervisor.handle(time, input);
        loop {
            let output = self.supervisor.poll();
            if let Some(after) = output.after() {
                self.held.push_back((after, output));
            } else if let SupervisorOutput::Wait { until } = output {
                self.until = until;
                return Ok(());
            }
        }
    }

    fn flush(&mut self) -> Result<(), ClusterError> {
        self.durable = Seq(self.store.flush().map_err(NodeError::from)?);
        let next = self.supervisor.next_seq();
        if next.0 >= self.snapshot.0 + SNAPSHOT_EVERY {
            self.snapshot = next;
            let (digest, bytes) = (self.supervisor.digest(), self.supervisor.snapshot());
            self.store.write_snapshot(next.0, digest.0, &bytes).map_err(NodeError::from)?;
            self.store.trim(next.0).map_err(NodeError::from)?;
        }
        Ok(())
    }

    fn obey(&mut self, output: SupervisorOutput) -> Result<(), ClusterError> {
        match output {
            SupervisorOutput::Orders { orders, .. } => {
                if let Some(to) = self.book.of(orders.to) {
                    let book = self.book.newest().collect();
                    self.mesh.send(to, Said::Orders { orders, book }.encode());
                }
            }
            SupervisorOutput::Start { member, .. } if self.elsewhere.has(member.node) => {
                self.elsewhere.start(member)
            }
            SupervisorOutput::Kill { member, .. } if self.elsewhere.has(member.node) => {
                self.elsewhere.kill(member)
            }
            SupervisorOutput::Start { member, .. } => {
                let at = self.mesh.address();
                let command = &mut self.command;
                self.processes.start(member, |dir| command(member, at, dir))?;
            }
            SupervisorOutput::Kill { member, .. } => self.processes.kill(member),
            SupervisorOutput::Capture { failure, .. } => {
                let tail = self.capture(&failure)?;
                self.inbox.push_back(SupervisorInput::Captured { member: failure.member, tail });
            }
            SupervisorOutput::Event { event, .. } => {
                if let Some(on_event) = &mut self.on_event {
                    on_event(&event);
                }
                let gave_up = matches!(event, SupervisorEvent::GaveUp { .. });
                if gave_up && !self.attended && self.supervisor.view().needs_operator() {
                    self.inbox.push_back(SupervisorInput::Drain { bound_ns: None });
                }
            }
            SupervisorOutput::Exit { error, .. } => {
                self.processes.kill_all();
                self.end = Some(error.map_or(Ok(()), |error| Err(ClusterError::Refused(error))));
            }
            SupervisorOutput::Wait { .. } => unreachable!("taken when the input was handled"),
        }
        Ok(())
    }

    /// Writes a failure down, with the end of the node's journal, before anything is started again.
    fn capture(&mut self, failure: &Failure) -> Result<Result<Option<Seq>, String>, ClusterError> {
        let dir = self.processes.dir(failure.member.node);
        let (tail, journal) = if self.elsewhere.has(failure.member.node) {
            let made = DirBuilder::new().recursive(true).mode(0o700).create(&dir);
            made.map_err(|source| ClusterError::File { path: dir.clone(), source })?;
            let (tail, journal) = self.elsewhere.take_left(failure.member);
            (tail, serde_json::from_str(&journal).unwrap_or_default())
        } else {
            let journal = JournalTail::read(&dir);
            let tail = match &journal.error {
                Some(error) => Err(error.clone()),
                None => Ok((journal.last > 0).then_some(Seq(journal.last))),
            };
            (tail, serde_json::to_value(journal).expect("plain data"))
        };
        let recorded = Recorded { failure, journal };
        let text = serde_json::to_string_pretty(&recorded).expect("plain data");
        let name = format!("failure-{}.json", failure.member.incarnation);
        write_durably(&dir, &name, text.as_bytes())?;
        Ok(tail)
    }

    /// Asks whoever leads for the streams that clients wait for, and for what the operator wishes.
    fn ask(&mut self) {
        let view = self.supervisor.view();
        let leader = |replica: u32| {
            let (membership, active) =
                view.memberships().find(|(membership, _)| membership.replica == replica)?;
            let node = membership.leading().node;
            (active && self.book.newest_of(node).is_some()).then_some((membership.epoch, node))
        };
        let mut due = self.requests.due(leader);
        due.extend(self.operator.wishes.due(leader));
        for (node, replica, input) in due {
            if let Some(to) = self.book.newest_of(node) {
                self.mesh.send(to, Said::Ask { replica, input: Box::new(input) }.encode());
            }
        }
    }
}

/// Where to listen: where the last life did, if that is on the same host and no port is asked for.
fn address(state_dir: &Path, listen: SocketAddr) -> SocketAddr {
    let former = std::fs::read_to_string(state_dir.join(ADDRESS_NAME)).ok();
    let former: Option<SocketAddr> = former.and_then(|text| text.trim().parse().ok());
    former.filter(|former| listen.port() == 0 && former.ip() == listen.ip()).unwrap_or(listen)
}

fn write_address(state_dir: &Path, address: SocketAddr) -> Result<(), ClusterError> {
    write_durably(state_dir, ADDRESS_NAME, address.to_string().as_bytes())
}

/// Writes a file aside, syncs it, and gives it its name.
fn write_durably(dir: &Path, name: &str, bytes: &[u8]) -> Result<(), ClusterError> {
    let path = dir.join(name);
    let aside = dir.join(format!("{name}.aside"));
    let write = || {
        let mut options = OpenOptions::new();
        let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        std::fs::rename(&aside, &path)?;
        std::fs::File::open(dir)?.sync_all()
    };
    write().map_err(|source| ClusterError::File { path: path.clone(), source })
}
