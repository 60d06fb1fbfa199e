//! A node of a simulated cluster: the production rank over a journal on a simulated disk and a simulated device.
//!
//! It does what a driver of a real machine does. Its disk outlives it; all else dies with the process. A disk that cannot be
//! read because of damage is replaced by an operator, and only if it was damaged: then it comes back empty.

mod device;
mod job;
mod obey;
mod shards;
mod start;
mod work;

use super::journal::NodeJournal;
use super::luck::Luck;
use super::message::Said;
use super::watch::{Fact, Watch};
use crate::atlas::Atlas;
use crate::disk::SimDisk;
use crate::hazard::Hazard;
use crate::mark::Mark;
use crate::world::{ActorId, Context, Happening};
use device::{Bench, Device, Rung};
use lite_llm_core::cluster::membership::{Epoch, Member};
use lite_llm_core::cluster::orders::{Facts, LogEnd};
use lite_llm_core::cluster::peer::{Peer, PeerInput, PeerOutput};
use lite_llm_core::cluster::shards::KeeperInput;
use lite_llm_core::config::Config;
use lite_llm_core::ids::{RequestId, Seq};
use lite_llm_core::input::Input;
use lite_llm_core::journal::{JournalError, Scanned};
use lite_llm_core::plan::ModelPlan;
use lite_llm_core::time::Time;
use shards::{Shards, Vault};
use std::cell::Cell;
use std::collections::{BTreeMap, VecDeque};
use std::rc::Rc;

/// Nanoseconds between two beats; that a flush takes, at least and by how much more; that reading a journal takes.
const BEAT_NS: u64 = 100_000_000;
const FLUSH_NS: (u64, u64) = (40_000, 100_000);
/// How much longer it takes on some nodes than on others: what is not durable yet is what most can be done wrong with.
const SLOWER: [u64; 8] = [1, 1, 1, 1, 1, 4, 16, 64];
const OPEN_NS: u64 = 5_000_000;
const SLOW_START_NS: u64 = 8_000_000_000;
/// Nanoseconds after which an unconfirmed message is sent again.
const RETRY_NS: u64 = 20_000_000;
/// Openings in a row that fail before an operator replaces the disk.
const OPENINGS_MAX: u32 = 4;

/// Kinds of wakes, in the upper bits of a token.
const FLUSHED: u64 = 0;
const TICK: u64 = 1;
const BEAT: u64 = 2;
const OPEN: u64 = 3;
const COPIED: u64 = 4;
const BEGUN: u64 = 5;
const SHARDS: u64 = 6;
const KIND_SHIFT: u32 = 56;

fn token(rung: Rung) -> u64 {
    let (kind, number) = match rung {
        Rung::Copied(number) => (COPIED, number),
        Rung::Begun(number) => (BEGUN, number),
    };
    kind << KIND_SHIFT | number
}

/// What all nodes of a run share.
#[derive(Debug)]
pub struct Common {
    /// What an engine is configured with, the topology in it.
    pub config: Config,
    /// The checkpoint.
    pub plan: ModelPlan,
    /// Whether the arithmetic is that of a tiny model.
    pub real: bool,
    /// The facts that every node should state.
    pub facts: Facts,
    /// The drift that leases allow for, in thousandths.
    pub drift_per_mille: u32,
    /// The actor of the supervisor.
    pub supervisor: ActorId,
    /// The actor of the operator.
    pub operator: ActorId,
    /// What is installed on each node, as a logic version.
    pub installed: Vec<Cell<u32>>,
    /// The observers.
    pub watch: Watch,
    /// Which copies may be damaged.
    pub atlas: Atlas,
    /// Whether nodes keep shards of an optimizer.
    pub trains: bool,
}

/// A node.
#[derive(Debug)]
pub struct NodeActor {
    node: u32,
    common: Rc<Common>,
    journal: NodeJournal,
    vault: Vault,
    luck: Luck,
    /// What the newest life that was open knew to be durable.
    durable: LogEnd,
    /// Openings in a row that failed.
    failures: u32,
    /// Starts that are to fail yet.
    crash_loop: u64,
    /// The replica that it last was in.
    replica: Option<u32>,
    life: Option<Life>,
}

/// What dies with the process.
#[derive(Debug)]
enum Life {
    /// It reads its journal.
    Opening { incarnation: u64 },
    /// It takes part.
    Running(Box<Process>),
}

#[derive(Debug)]
struct Process {
    member: Member,
    peer: Peer,
    device: Device,
    shards: Option<Shards>,
    inbox: VecDeque<PeerInput>,
    flushing: bool,
    dirty: bool,
    alarm: Option<Time>,
    /// Clients that asked this process, and for what.
    attached: BTreeMap<RequestId, ActorId>,
    /// Each record that is not known to be committed, in order, and the digest before it.
    digests: VecDeque<(u64, u64)>,
    committed: Seq,
    /// The newest epoch that was seen to be active here.
    active: Epoch,
    /// Damage of the disk that reading it has not found.
    damages: u64,
}

impl NodeActor {
    /// A node that was never started.
    #[must_use]
    pub fn new(node: u32, common: Rc<Common>, disk: SimDisk, vault: SimDisk) -> Self {
        Self {
            node,
            common,
            journal: NodeJournal::new(node, disk),
            vault: Vault::new(vault),
            luck: Luck::default(),
            durable: LogEnd::default(),
            failures: 0,
            crash_loop: 0,
            replica: None,
            life: None,
        }
    }

    /// The rank, while its process takes part.
    #[must_use]
    pub fn peer(&self) -> Option<&Peer> {
        match &self.life {
            Some(Life::Running(process)) => Some(&process.peer),
            Some(Life::Opening { .. }) | None => None,
        }
    }

    /// What is on its disk now.
    ///
    /// # Errors
    /// If that is damaged.
    pub fn look(&self) -> Result<Scanned, JournalError> {
        self.journal.look()
    }

    /// The replica that it is in, or was last.
    #[must_use]
    pub const fn replica(&self) -> Option<u32> {
        self.replica
    }

    /// Deals with what happened.
    pub fn handle(&mut self, cx: &mut Context<'_, Said>, happening: Happening<Said>) {
        match happening {
            Happening::Started { argument } => self.start(cx, argument),
            Happening::Message { from, message } => self.hear(cx, from, message),
            Happening::Tampered { .. } => self.common.watch.mark(Mark::Corrupted),
            Happening::Woken { token } => self.woken(cx, token),
            Happening::Ended { .. } => {}
        }
    }

    /// It has died: what was not durable is torn.
    pub fn died(&mut self) {
        let flushing = match &self.life {
            Some(Life::Running(process)) if process.dirty => Some(process.peer.engine().next_seq().0),
            _ => None,
        };
        self.life = None;
        self.journal.die(flushing);
        self.vault.die();
    }

    fn hear(&mut self, cx: &mut Context<'_, Said>, from: ActorId, message: Said) {
        let Some(Life::Running(process)) = &mut self.life else { return };
        match message {
            Said::Rank(message) => {
                let epoch = process.peer.membership().map(|membership| membership.epoch);
                if message.to != process.member || epoch != Some(message.epoch) {
                    self.common.watch.mark(Mark::Stale);
                }
                process.inbox.push_back(PeerInput::Message(message));
            }
            Said::Shard(message) => return self.keep_shards(cx, KeeperInput::Message(*message)),
            Said::Orders(mut orders) => {
                if orders.refused.is_some() && orders.to == process.member {
                    return cx.exit_with(1);
                }
                let shards = orders.shards.take().filter(|_| orders.to == process.member);
                process.inbox.push_back(PeerInput::Orders(orders));
                if let Some(orders) = shards {
                    self.keep_shards(cx, KeeperInput::Orders(*orders));
                }
            }
            Said::Ask { replica, input } => {
                let mine = process.peer.membership().map(|membership| membership.replica);
                if mine != Some(replica) {
                    let reason = format!("this node is of replica {mine:?}");
                    return cx.send(from, Said::Refused { input, reason });
                }
                if let Input::Submit { id, .. } | Input::Cancel { id } = &*input {
                    process.attached.insert(id.clone(), from);
                }
                process.inbox.push_back(PeerInput::Command(*input));
            }
            Said::Beat(_) | Said::Wish(_) | Said::Tell(_) | Said::Refused { .. } => {}
        }
        self.work(cx);
    }

    fn woken(&mut self, cx: &mut Context<'_, Said>, token: u64) {
        let (kind, number) = (token >> KIND_SHIFT, token & ((1 << KIND_SHIFT) - 1));
        if let (OPEN, Some(Life::Opening { incarnation })) = (kind, &self.life) {
            let incarnation = *incarnation;
            return self.open(cx, incarnation);
        }
        let Some(Life::Running(process)) = &mut self.life else { return };
        match kind {
            FLUSHED => return self.flushed(cx),
            TICK => {
                if process.alarm.take_if(|alarm| *alarm <= cx.clock()).is_some() {
                    process.inbox.push_back(PeerInput::Tick);
                }
            }
            BEAT => return self.beat(cx),
            SHARDS => return self.shards_answered(cx, number),
            COPIED => self.device(cx, |device, bench| device.rung(bench, Rung::Copied(number))),
            _ => self.device(cx, |device, bench| device.rung(bench, Rung::Begun(number))),
        }
        self.work(cx);
    }

    fn device(&mut self, cx: &mut Context<'_, Said>, act: impl FnOnce(&mut Device, &mut Bench<'_, '_>)) {
        let Some(Life::Running(process)) = &mut self.life else { return };
        let (watch, plan, luck) = (&self.common.watch, &self.common.plan, &mut self.luck);
        act(&mut process.device, &mut Bench { cx, luck, watch, plan, inbox: &mut process.inbox });
    }

    /// Beats come from a thread of their own: nothing that hangs holds them up.
    fn beat(&mut self, cx: &mut Context<'_, Said>) {
        let Some(Life::Running(process)) = &mut self.life else { return };
        let mut beat = process.peer.beat(cx.clock());
        beat.shards = process.shards.as_ref().map(|shards| Box::new(shards.standing()));
        let things = process.inbox.len() + process.device.queued() + process.peer.waiting();
        self.common.watch.see(cx.world_ns(), &Fact::Queued { node: process.member.node, things });
        cx.send(self.common.supervisor, Said::Beat(Box::new(beat)));
        cx.wake_in(BEAT_NS, BEAT << KIND_SHIFT);
    }

    fn flushed(&mut self, cx: &mut Context<'_, Said>) {
        let Some(Life::Running(process)) = &mut self.life else { return };
        process.flushing = false;
        process.dirty = false;
        let Ok(seq) = self.journal.flush() else {
            // What is on disk is only known when it is opened again.
            return cx.exit_with(3);
        };
        self.common.watch.see(cx.world_ns(), &Fact::Durable { member: process.member, last: seq });
        process.inbox.push_back(PeerInput::Durable { seq });
        self.work(cx);
    }

    /// Handles what there is, and has the rest made durable.
    fn work(&mut self, cx: &mut Context<'_, Said>) {
        loop {
            let Some(Life::Running(process)) = &mut self.life else { return };
            let Some(input) = process.inbox.pop_front() else { break };
            self.common.watch.input();
            let command = matches!(input, PeerInput::Command(_));
            let before = process.peer.engine().next_seq();
            process.peer.handle(cx.clock(), input);
            // What is told next rests on it, even if the process dies in between.
            self.durable = process.peer.durable();
            if command && process.peer.engine().next_seq() > before {
                let membership = process.peer.membership().expect("it leads");
                let fact = Fact::Took { member: process.member, membership };
                self.common.watch.see(cx.world_ns(), &fact);
            }
            if !self.drain(cx) {
                return;
            }
        }
        let Some(Life::Running(process)) = &mut self.life else { return };
        if process.dirty && !process.flushing {
            process.flushing = true;
            let seq = process.peer.engine().next_seq().0;
            let draw = |nth| cx.decisions().ordinary(FLUSHED, u64::from(self.node), nth);
            let slower = SLOWER[usize::try_from(draw(u64::MAX) % SLOWER.len() as u64).expect("a few")];
            let ns = (FLUSH_NS.0 + draw(seq) % FLUSH_NS.1) * slower;
            cx.wake_in(ns + self.journal.take_ns(), FLUSHED << KIND_SHIFT);
        }
    }

    /// Obeys everything that came out; whether the process still runs.
    fn drain(&mut self, cx: &mut Context<'_, Said>) -> bool {
        loop {
            let Some(Life::Running(process)) = &mut self.life else { return false };
            let output = process.peer.poll();
            if let PeerOutput::Wait { until } = output {
                let until = until.map(|until| until.max(cx.clock()));
                if until.is_some() && until != process.alarm {
                    cx.wake_at(until.unwrap_or_default(), TICK << KIND_SHIFT);
                }
                process.alarm = until;
                self.note_commits(cx);
                return true;
            }
            if self.luck.befalls(cx, Hazard::Crash).is_some() {
                cx.exit();
                return false;
            }
            if !self.obey(cx, output) {
                return false;
            }
        }
    }

    fn note_commits(&mut self, cx: &Context<'_, Said>) {
        let Some(Life::Running(process)) = &mut self.life else { return };
        let Some(membership) = process.peer.membership() else { return };
        let (replica, member) = (membership.replica, process.member);
        self.replica = Some(replica);
        let committed = process.peer.committed();
        while process.committed < committed {
            process.committed.0 += 1;
            let seq = process.committed;
            while let Some((known, digest)) = process.digests.front().copied().filter(|(n, _)| *n <= seq.0) {
                process.digests.pop_front();
                if known == seq.0 {
                    let fact = Fact::Committed { member, replica, seq, digest };
                    self.common.watch.see(cx.world_ns(), &fact);
                }
            }
        }
        // A disk whose damage was found and made good in a whole epoch has all that others have.
        if process.peer.leads() && process.active < membership.epoch {
            process.active = membership.epoch;
            let nodes = membership.members.iter().map(|member| member.node.0).collect();
            self.common.atlas.regroup(replica as usize, nodes);
        }
        if process.peer.is_in_active_epoch() {
            self.common.atlas.joined(self.node, membership.leading().node.0);
        }
        if process.peer.is_in_active_epoch() && process.damages == self.common.atlas.damages(self.node) {
            self.common.atlas.whole_again(self.node);
        }
    }
}
