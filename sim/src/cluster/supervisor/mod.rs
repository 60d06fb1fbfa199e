//! The supervisor of a simulated cluster: the production state machine with a journal on a simulated disk, starting, ending
//! and hearing nodes as a driver of real processes does.
//!
//! Node n is actor n. A `Start` of a life that was begun already, and a `Kill` of one that is over, are answered with its end:
//! that is what an init system knows of its processes.

use super::journal::{OpenError, Platter};
use super::luck::Luck;
use super::message::Said;
use super::watch::{Fact, Watch};
use crate::chronicle::What;
use crate::disk::SimDisk;
use crate::hazard::Hazard;
use crate::mark::Mark;
use crate::world::{ActorId, Context, Happening};
use lite_llm_core::LOGIC_VERSION;
use lite_llm_core::cluster::membership::{Member, Membership, NodeId};
use lite_llm_core::cluster::supervisor::{
    Cause, ClusterConfig, Ending, Failure, Standing, Supervisor, SupervisorEvent, SupervisorInput,
    SupervisorOutput, Suspicion,
};
use lite_llm_core::ids::{Incarnation, Seq};
use lite_llm_core::journal::{Header, JournalError, Record, Snapshot, Store};
use lite_llm_core::replay::{encode_input, fold};
use lite_llm_core::time::Time;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Tokens of wakes.
const FLUSHED: u64 = 0;
const TICK: u64 = 1;
const CAPTURED: u64 = 2;
/// And, above it, the place of a member that is to be ended.
const FENCED: u64 = 3;

/// Nanoseconds that a flush takes, a capture, and a start, at least and by how much more.
const FLUSH_NS: (u64, u64) = (50_000, 300_000);
const CAPTURE_NS: u64 = 2_000_000;
const FENCE_NS: u64 = 6_000_000_000;
const START_NS: (u64, u64) = (5_000_000, 20_000_000);
/// Nanoseconds until a supervisor that died is started again.
const RESTART_NS: u64 = 200_000_000;
/// Records between two snapshots.
const SNAPSHOT_EVERY: u64 = 2_000;

/// A supervisor's process and machine.
#[derive(Debug)]
pub struct SupervisorActor {
    config: ClusterConfig,
    platter: Platter,
    luck: Luck,
    /// The newest life of each node that was ever begun: the init system's knowledge.
    begun: BTreeMap<NodeId, Incarnation>,
    /// Failures that were written down.
    failures: Vec<Failure>,
    /// Lives that were begun before everything stopped.
    ended: BTreeSet<Member>,
    /// Events of all lives that became durable.
    events: Vec<(Seq, SupervisorEvent)>,
    /// Its last word, if it has ended by itself.
    exited: Option<Option<String>>,
    /// Whether an operator begins everything again once it has ended by itself.
    reopens: bool,
    /// The newest membership of each replica, and whether it was active.
    adopted: BTreeMap<u32, (Membership, bool)>,
    watch: Watch,
    process: Option<Process>,
}

/// What dies with the process.
#[derive(Debug)]
struct Process {
    incarnation: u64,
    supervisor: Supervisor,
    store: Store<Platter>,
    durable: Seq,
    flushing: bool,
    held: VecDeque<(Seq, SupervisorOutput)>,
    inbox: VecDeque<SupervisorInput>,
    capturing: VecDeque<Member>,
    /// Members that were to be ended and could not be reached at once.
    fencing: Vec<Member>,
    alarm: Option<Time>,
    snapshot: Seq,
}

impl SupervisorActor {
    /// A supervisor that was never started.
    #[must_use]
    pub fn new(config: ClusterConfig, disk: SimDisk, watch: Watch) -> Self {
        Self {
            config,
            platter: Platter::new(disk),
            luck: Luck::default(),
            begun: BTreeMap::new(),
            failures: Vec::new(),
            ended: BTreeSet::new(),
            events: Vec::new(),
            exited: None,
            reopens: false,
            adopted: BTreeMap::new(),
            watch,
            process: None,
        }
    }

    /// Whether an operator begins everything again once it has ended by itself.
    pub const fn set_reopens(&mut self, reopens: bool) {
        self.reopens = reopens;
    }

    /// The state machine, while its process runs.
    #[must_use]
    pub fn supervisor(&self) -> Option<&Supervisor> {
        self.process.as_ref().map(|process| &process.supervisor)
    }

    /// Its last word, if it has ended by itself.
    #[must_use]
    pub const fn exited(&self) -> Option<&Option<String>> {
        self.exited.as_ref()
    }

    /// Failures that were written down, in order.
    #[must_use]
    pub fn failures(&self) -> &[Failure] {
        &self.failures
    }

    /// What was said to be happening, in order.
    #[must_use]
    pub fn events(&self) -> &[(Seq, SupervisorEvent)] {
        &self.events
    }

    /// The operator wishes something, on the supervisor's own machine.
    pub fn wish(&mut self, cx: &mut Context<'_, Said>, input: SupervisorInput) {
        if let Some(process) = &mut self.process {
            process.inbox.push_back(input);
            self.work(cx);
        }
    }

    /// Deals with what happened.
    pub fn handle(&mut self, cx: &mut Context<'_, Said>, happening: Happening<Said>) {
        if let Happening::Started { argument } = happening {
            return self.start(cx, argument);
        }
        let hidden = matches!(happening, Happening::Ended { .. })
            && self.luck.befalls(cx, Hazard::UnseenExit).is_some();
        let Some(process) = &mut self.process else { return };
        match happening {
            Happening::Message { message: Said::Beat(beat), .. } => {
                process.inbox.push_back(SupervisorInput::Beat(beat));
            }
            Happening::Message { message: Said::Wish(wish), .. } => process.inbox.push_back(*wish),
            Happening::Ended { child, argument, code } if !hidden => {
                let member = Member { node: NodeId(child), incarnation: Incarnation(argument) };
                let ending = match code {
                    Some(0) => Ending::Clean,
                    Some(code) => Ending::Code(code),
                    None => Ending::Signal(9),
                };
                process.inbox.push_back(SupervisorInput::Ended { member, ending });
            }
            Happening::Woken { token: FLUSHED } => {
                process.flushing = false;
                if process.flush().is_err() {
                    // What is on disk is only known when it is opened again.
                    return cx.exit();
                }
            }
            Happening::Woken { token } if token >= FENCED => {
                let member = process.fencing[usize::try_from(token - FENCED).expect("few")];
                if cx.runs(member.node.0, member.incarnation.0) {
                    cx.kill(member.node.0);
                }
                let ended = SupervisorInput::Ended { member, ending: Ending::Signal(9) };
                process.inbox.push_back(ended);
            }
            Happening::Woken { token: CAPTURED } => {
                if let Some(member) = process.capturing.pop_front() {
                    process.inbox.push_back(SupervisorInput::Captured { member, tail: Ok(None) });
                }
            }
            Happening::Woken { .. } => {
                if process.alarm.take_if(|alarm| *alarm <= cx.clock()).is_some() {
                    process.inbox.push_back(SupervisorInput::Tick);
                }
            }
            Happening::Started { .. }
            | Happening::Message { .. }
            | Happening::Tampered { .. }
            | Happening::Ended { .. } => {}
        }
        self.work(cx);
    }

    /// It has died: what was not durable is torn, and its init system starts it again.
    pub fn died(&mut self, cx: &mut Context<'_, Said>, me: ActorId) {
        let Some(process) = self.process.take() else { return };
        let flushing = process.flushing.then_some(process.supervisor.next_seq().0);
        self.platter.die(Some(process.store), flushing);
        if self.exited.is_none() || self.reopens {
            cx.start(me, process.incarnation + 1, RESTART_NS);
        }
    }

    fn start(&mut self, cx: &mut Context<'_, Said>, incarnation: u64) {
        self.exited = None;
        let header = Header { logic_version: LOGIC_VERSION, node: u32::MAX, incarnation, identity: [0; 32] };
        let opened = Store::open(self.platter.clone(), &header).map_err(OpenError::from);
        let opened =
            opened.and_then(|(store, found)| Ok((store, folded(found.snapshot.as_ref(), &found.records)?)));
        let (store, supervisor) = match opened {
            Ok(opened) => opened,
            Err(error) => return self.end_unopened(cx, incarnation, &error),
        };
        let durable = Seq(supervisor.next_seq().0 - 1);
        if durable > Seq(0) {
            self.watch.mark(Mark::SupervisorRecovered);
        }
        // The life before may have died after it had decided this, and before it said so.
        let given_up = supervisor.view().nodes().filter(|(_, standing)| *standing == Standing::GivenUp);
        for (Member { node, .. }, _) in given_up {
            let reason = String::new();
            self.watch.see(cx.world_ns(), &Fact::Event(&SupervisorEvent::GaveUp { node, reason }));
        }
        let config = self.config.clone();
        let started = SupervisorInput::Started { incarnation: Incarnation(incarnation), config };
        self.process = Some(Process {
            incarnation,
            supervisor,
            store,
            durable,
            flushing: false,
            held: VecDeque::new(),
            inbox: VecDeque::from([started]),
            capturing: VecDeque::new(),
            fencing: Vec::new(),
            alarm: None,
            snapshot: durable,
        });
        self.work(cx);
    }

    /// Its journal cannot be read: it says why, and ends. A disk that fails now may not fail the next time.
    fn end_unopened(&mut self, cx: &mut Context<'_, Said>, incarnation: u64, error: &OpenError) {
        cx.note(|| What::Note(format!("journal: {error}")));
        self.platter.die(None, None);
        let me = cx.me();
        cx.exit();
        cx.start(me, incarnation + 1, RESTART_NS);
    }

    /// Why it does not run, if what is on its disk cannot be read, by whatever process and however often.
    #[must_use]
    pub fn unreadable(&self) -> Option<OpenError> {
        let found = self.platter.look().map_err(OpenError::from);
        let folded = found.and_then(|found| folded(found.snapshot.as_ref(), &found.records));
        folded.err().filter(|_| self.process.is_none())
    }

    /// Handles what there is, obeys what is durable, and has the rest made so.
    fn work(&mut self, cx: &mut Context<'_, Said>) {
        loop {
            let Some(process) = &mut self.process else { return };
            if let Some(input) = process.inbox.pop_front() {
                process.take(cx, input);
                continue;
            }
            let ready = process.held.iter().position(|(after, _)| *after <= process.durable);
            let Some((_, output)) = ready.and_then(|at| process.held.remove(at)) else { break };
            if self.luck.befalls(cx, Hazard::CrashSupervisor).is_some() {
                return cx.exit();
            }
            self.obey(cx, output);
        }
        let decisions = cx.decisions();
        let Some(process) = &mut self.process else { return };
        if !process.flushing && process.durable.0 + 1 < process.supervisor.next_seq().0 {
            process.flushing = true;
            let more = decisions.ordinary(FLUSHED, u64::MAX, process.supervisor.next_seq().0) % FLUSH_NS.1;
            cx.wake_in(FLUSH_NS.0 + more + self.platter.take_ns(), FLUSHED);
        }
    }

    fn obey(&mut self, cx: &mut Context<'_, Said>, output: SupervisorOutput) {
        let process = self.process.as_mut().expect("only a running process obeys");
        let ended = |member, ending| SupervisorInput::Ended { member, ending };
        match output {
            SupervisorOutput::Orders { orders, .. } => cx.send(orders.to.node.0, Said::Orders(orders)),
            SupervisorOutput::Start { member, .. } => {
                let begun = self.begun.get(&member.node).copied().unwrap_or_default();
                if begun < member.incarnation {
                    let before = Member { incarnation: begun, ..member };
                    if before.incarnation > Incarnation(0) && !self.recorded(before) {
                        let what = format!("{member} is started, and the end of {before} is not recorded");
                        self.watch.violated(cx.world_ns(), "recorded", what);
                    }
                    self.begun.insert(member.node, member.incarnation);
                    let more = cx.decisions().ordinary(TICK, u64::from(member.node.0), member.incarnation.0);
                    cx.start(member.node.0, member.incarnation.0, START_NS.0 + more % START_NS.1);
                } else if !cx.runs(member.node.0, member.incarnation.0) {
                    process.inbox.push_back(ended(member, Ending::Unknown));
                }
            }
            SupervisorOutput::Kill { member, cause, .. } => {
                let runs = cx.runs(member.node.0, member.incarnation.0);
                if runs && matches!(cause, Cause::Suspected(_)) {
                    self.watch.mark(Mark::FalselySuspected);
                }
                if runs && let Some(value) = self.luck.befalls(cx, Hazard::SlowFence) {
                    let process = self.process.as_mut().expect("only a running process obeys");
                    process.fencing.push(member);
                    let last = process.fencing.len() as u64 - 1;
                    return cx.wake_in(value % FENCE_NS, FENCED + last);
                }
                if runs {
                    cx.kill(member.node.0);
                }
                process.inbox.push_back(ended(member, Ending::Signal(9)));
            }
            SupervisorOutput::Capture { failure, .. } => {
                process.capturing.push_back(failure.member);
                self.failures.push(failure);
                cx.wake_in(CAPTURE_NS, CAPTURED);
            }
            SupervisorOutput::Event { seq, event } => {
                cx.note(|| What::State(format!("{event:?}")));
                self.watch.see(cx.world_ns(), &Fact::Event(&event));
                self.note(&event);
                self.events.push((seq, event));
            }
            SupervisorOutput::Exit { error, .. } => {
                // What ends in a drain is meant to.
                let lives = self.begun.iter().map(|(&node, &incarnation)| Member { node, incarnation });
                self.ended.extend(lives);
                self.exited = Some(error);
                cx.exit_with(0);
            }
            SupervisorOutput::Wait { .. } => unreachable!("taken when the input was handled"),
        }
    }
}

impl SupervisorActor {
    /// Whether the end of a life was written down; one that ended in a drain needs no record.
    fn recorded(&self, member: Member) -> bool {
        self.ended.contains(&member) || self.failures.iter().any(|failure| failure.member == member)
    }

    /// Counts what runs are to have.
    fn note(&mut self, event: &SupervisorEvent) {
        let watch = self.watch.clone();
        match event {
            SupervisorEvent::Failed(failure) => match &failure.cause {
                Cause::Suspected(Suspicion::Silent(_)) => watch.mark(Mark::FoundSilent),
                Cause::Suspected(Suspicion::Stuck(..)) => watch.mark(Mark::FoundStuck),
                Cause::NeverHeard => watch.mark(Mark::NeverHeard),
                Cause::Refused(_) => watch.mark(Mark::RefusedVersion),
                Cause::Operator => watch.mark(Mark::RestartWished),
                Cause::Ended(_) | Cause::Diverged | Cause::Drained => {}
            },
            SupervisorEvent::Adopted(membership) => {
                let ranks = self.config.topology.nodes();
                if membership.members.iter().any(|member| member.node.0 >= ranks) {
                    watch.mark(Mark::StandByUsed);
                }
                let before = self.adopted.insert(membership.replica, (membership.clone(), false));
                if let Some((before, active)) = before {
                    if !active {
                        watch.mark(Mark::EpochSkipped);
                    }
                    if before.leading().node != membership.leading().node {
                        watch.mark(Mark::LeaderChanged);
                    }
                }
            }
            SupervisorEvent::Activated(epoch) => {
                let activated = self.adopted.values_mut().find(|(membership, _)| membership.epoch == *epoch);
                if let Some((_, active)) = activated {
                    *active = true;
                }
            }
            SupervisorEvent::Waiting { .. } => watch.mark(Mark::Waiting),
            SupervisorEvent::GaveUp { .. } => watch.mark(Mark::GaveUp),
            SupervisorEvent::Drained { .. } => watch.mark(Mark::Drained),
            SupervisorEvent::Sealed { .. } => watch.mark(Mark::Sealed),
            SupervisorEvent::Restored { .. } => watch.mark(Mark::WentBack),
            SupervisorEvent::ShardsMissed { .. } => watch.mark(Mark::ShardsMissed),
            SupervisorEvent::Captured { .. }
            | SupervisorEvent::Trained { .. }
            | SupervisorEvent::ShardsDiffer { .. }
            | SupervisorEvent::State { .. } => {}
        }
    }
}

impl Process {
    /// Journals an input and lets the state machine handle it.
    fn take(&mut self, cx: &mut Context<'_, Said>, input: SupervisorInput) {
        let time = cx.clock().max(self.supervisor.now());
        let (seq, digest) = (self.supervisor.next_seq(), self.supervisor.digest());
        if self.store.push(seq.0, time.0, digest.0, encode_input(&input)).is_err() {
            return cx.exit();
        }
        self.supervisor.handle(time, input);
        loop {
            let output = self.supervisor.poll();
            if let Some(after) = output.after() {
                self.held.push_back((after, output));
            } else if let SupervisorOutput::Wait { until } = output {
                if let Some(until) = until.filter(|_| self.alarm != until) {
                    cx.wake_at(until, TICK);
                }
                self.alarm = until;
                break;
            }
        }
    }

    /// Makes everything durable; lets go of records, now and then, that a snapshot makes unneeded.
    fn flush(&mut self) -> Result<(), JournalError> {
        self.durable = Seq(self.store.flush()?);
        let next = self.supervisor.next_seq();
        if self.durable.0 + 1 == next.0 && next.0 >= self.snapshot.0 + SNAPSHOT_EVERY {
            self.snapshot = next;
            self.store.write_snapshot(next.0, self.supervisor.digest().0, &self.supervisor.snapshot())?;
            self.store.trim(next.0)?;
        }
        Ok(())
    }
}

/// The state that a snapshot and the records after it make.
fn folded(snapshot: Option<&Snapshot>, records: &[Record]) -> Result<Supervisor, OpenError> {
    let mut supervisor =
        snapshot.map_or_else(|| Ok(Supervisor::new()), |snapshot| Supervisor::restore(&snapshot.bytes))?;
    fold(&mut supervisor, records, |_, _| {})?;
    Ok(supervisor)
}

#[cfg(test)]
mod tests;
