//! Who is which rank of a replica, in which epoch, and when it may begin.

use super::node::Life;
use super::words::{Cause, SupervisorEvent, SupervisorOutput};
use super::{Context, State};
use crate::cluster::membership::{Member, Membership, NodeId};
use crate::cluster::orders::{Lease, Orders};
use crate::ids::{Seq, index, len32};
use crate::plant::{self, Bug};
use crate::time::Time;
use alloc::string::String;
use alloc::vec::Vec;
use alloc::{format, vec};
use serde::{Deserialize, Serialize};

/// What the supervisor knows of a replica.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Replica {
    pub(super) membership: Option<Membership>,
    /// The logs of its members are one, and its leader may begin.
    pub(super) active: bool,
    /// The last membership that was active: each of its nodes has on disk what was ever told.
    holders: Option<Membership>,
    /// A record that is known to be committed: a disk that ends before it has lost something.
    floor: Seq,
    /// It was said whom it waits for.
    waiting: bool,
    /// Since when a member of its newest epoch is missing.
    lacks_since: Option<Time>,
    /// When all was finished.
    pub(super) drained: Option<Time>,
    /// Why it will never be.
    pub(super) hopeless: Option<String>,
}

impl Replica {
    pub(super) const fn is_over(&self) -> bool {
        self.drained.is_some() || self.hopeless.is_some()
    }

    /// A new run after a drain.
    pub(super) fn reopen(&mut self) {
        (self.drained, self.hopeless) = (None, None);
    }

    /// # Panics
    /// If an invariant does not hold.
    pub(super) fn check(&self) {
        if self.active {
            assert_eq!(self.holders, self.membership, "whoever is active holds everything");
        }
        if let Some(membership) = &self.membership {
            assert!(self.is_holder(membership.leading().node), "who leads holds everything that was told");
        }
    }

    /// A record that is known to be committed.
    pub(super) const fn floor(&self) -> Seq {
        self.floor
    }

    /// The nodes whose disks have everything that was told.
    pub(super) fn holders(&self) -> Vec<NodeId> {
        self.holders.iter().flat_map(|holders| &holders.members).map(|member| member.node).collect()
    }

    /// Whether a node's disk has everything that was told, if it has its log still.
    fn is_holder(&self, node: NodeId) -> bool {
        plant::is(Bug::AnyLeads)
            || self
                .holders
                .as_ref()
                .is_none_or(|holders| holders.members.iter().any(|member| member.node == node))
    }
}

/// Why there is no membership yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Missing {
    /// Nodes.
    Nodes,
    /// A node that has all that was told.
    Holder,
    /// The end of the lease of a leader that may still run.
    Fence,
}

impl State {
    fn replica_of(&self, node: NodeId) -> Option<u32> {
        self.nodes[index(node.0)].home
    }

    /// Whether a node is needed no more: its replica is over, or it never had one.
    pub(super) fn is_finished(&self, node: NodeId) -> bool {
        self.replica_of(node).is_none_or(|replica| self.replicas[index(replica)].is_over())
    }

    /// Tells a node how things stand; an answer to a beat extends its lease, if it is to have one.
    pub(super) fn tell(&mut self, cx: &mut Context<'_>, id: NodeId, answer: bool) {
        let lease_ns = self.config.lease_ns;
        let longest_ns = self.config.longest_lease_ns();
        let node = &mut self.nodes[index(id.0)];
        let to = node.member(id);
        let replica = node.home.map(|replica| &self.replicas[index(replica)]);
        let membership =
            replica.and_then(|replica| replica.membership.clone()).filter(|m| m.rank_of(to).is_some());
        let active = membership.is_some() && replica.is_some_and(|replica| replica.active);
        let leads = active && membership.as_ref().is_some_and(|membership| membership.leading() == to);
        let sent = node.beat.as_ref().map(|beat| beat.sent);
        let lease = sent.filter(|_| answer && leads).map(|sent| Lease { sent, length_ns: lease_ns });
        if lease.is_some() {
            node.lease_until = cx.now.after_ns(longest_ns);
        }
        let drain = self.drain.as_ref().filter(|_| membership.is_some());
        let drain = drain.map(|drain| drain.until.map(|until| until.0.saturating_sub(cx.now.0)));
        let shards = node.shards.clone();
        let orders = Orders { to, membership, active, lease, drain, refused: None, shards }.into();
        cx.say(SupervisorOutput::Orders { orders, after: self.decided });
    }

    /// Tells all members of a replica.
    fn tell_all(&mut self, cx: &mut Context<'_>, replica: u32) {
        let membership = self.replicas[index(replica)].membership.as_ref();
        let members: Vec<Member> = membership.map_or_else(Vec::new, |membership| membership.members.clone());
        for member in members {
            if self.is_up(member) {
                self.tell(cx, member.node, false);
            }
        }
    }

    fn is_up(&self, member: Member) -> bool {
        let node = &self.nodes[index(member.node.0)];
        node.incarnation == member.incarnation && node.life == Life::Up
    }

    /// Whether every member of its newest epoch lives.
    pub(super) fn is_whole(&self, replica: &Replica) -> bool {
        replica
            .membership
            .as_ref()
            .is_some_and(|membership| membership.members.iter().all(|&m| self.is_up(m)))
    }

    /// Takes what a member's beat says of its replica.
    pub(super) fn take_stock(&mut self, cx: &mut Context<'_>, member: Member) {
        let node = &self.nodes[index(member.node.0)];
        let (Some(home), Some(beat)) = (node.home, &node.beat) else { return };
        let replica = &mut self.replicas[index(home)];
        let Some(membership) = &replica.membership else { return };
        if membership.rank_of(member).is_none() || beat.epoch != membership.epoch {
            return;
        }
        replica.floor = replica.floor.max(beat.committed);
        let leads = membership.leading() == member;
        let drained = replica.active && beat.drained && self.drain.is_some();
        let diverged = if leads { beat.diverged } else { 0 };
        if leads && beat.synced && !replica.active {
            replica.active = true;
            let (membership, last) = (membership.clone(), beat.log.last);
            replica.floor = replica.floor.max(last);
            for member in &membership.members {
                self.nodes[index(member.node.0)].reached = last;
            }
            self.decided = cx.seq;
            cx.event(SupervisorEvent::Activated(membership.epoch));
            self.replicas[index(home)].holders = Some(membership);
            self.tell_all(cx, home);
        }
        if drained {
            self.drained(cx, home);
        }
        if diverged != 0 {
            self.end_diverged(cx, home, diverged);
        }
    }

    /// A replica has finished everything.
    pub(super) fn drained(&mut self, cx: &mut Context<'_>, id: u32) {
        let replica = &mut self.replicas[index(id)];
        if !replica.is_over() {
            replica.drained = Some(cx.now);
            self.decided = cx.seq;
            cx.event(SupervisorEvent::Drained { replica: id });
        }
    }

    /// Ends the ranks whose results are not those of the others.
    fn end_diverged(&mut self, cx: &mut Context<'_>, replica: u32, ranks: u64) {
        let membership =
            self.replicas[index(replica)].membership.clone().expect("a rank has diverged from others");
        let diverged = (0..).zip(membership.members).filter(|(rank, _)| ranks >> rank & 1 == 1);
        for (_, member) in diverged {
            if self.is_up(member) {
                self.end(cx, member.node, Cause::Diverged);
            }
        }
    }

    /// Gives replicas members where they lack any.
    pub(super) fn assemble(&mut self, cx: &mut Context<'_>) {
        if cx.now < self.quiet_until {
            return;
        }
        for id in 0..len32(self.replicas.len()) {
            let replica = &self.replicas[index(id)];
            if self.is_whole(replica) || replica.is_over() {
                continue;
            }
            self.replicas[index(id)].lacks_since.get_or_insert(cx.now);
            match self.choose(cx.now, id) {
                Ok((members, leader)) => self.adopt(cx, id, members, leader),
                Err(Missing::Holder) => self.wait_for_holders(cx, id),
                Err(Missing::Nodes | Missing::Fence) => {}
            }
        }
    }

    /// The members of the next epoch, and who of them leads.
    pub(super) fn choose(&self, now: Time, id: u32) -> Result<(Vec<Member>, u32), Missing> {
        let replica = &self.replicas[index(id)];
        let fits = |node: NodeId| {
            let known = &self.nodes[index(node.0)];
            known.life == Life::Up && known.beat.is_some() && known.home.is_none_or(|home| home == id)
        };
        // Who had a seat keeps it: its share of the model is loaded already.
        let mut seats: Vec<Option<NodeId>> = vec![None; index(self.config.topology.ranks())];
        for (seat, member) in seats.iter_mut().zip(replica.membership.iter().flat_map(|m| &m.members)) {
            *seat = Some(member.node).filter(|&node| fits(node));
        }
        let mut spare = self.spare(id);
        let mut free: Vec<NodeId> =
            self.ids().filter(|&node| fits(node) && !seats.contains(&Some(node))).collect();
        // Those that hold its log first; stand-bys last.
        free.sort_by_key(|&node| (!replica.is_holder(node), self.replica_of(node).is_none(), node));
        let mut free = free.into_iter().filter(|&node| {
            let own = self.replica_of(node).is_some() || spare > 0;
            spare = spare.saturating_sub(usize::from(self.replica_of(node).is_none()));
            own
        });
        for seat in &mut seats {
            *seat = seat.or_else(|| free.next());
        }
        let last =
            |node: NodeId| self.nodes[index(node.0)].beat.as_ref().map_or(Seq(0), |beat| beat.log.last);
        let reaches = |node: NodeId| last(node) >= replica.floor || plant::is(Bug::FloorIgnored);
        let has_all =
            |node: NodeId| replica.is_holder(node) && self.is_its_disk(replica, node) && reaches(node);
        let is_whole = |node: NodeId| has_all(node) && !self.is_torn(node);
        let whole = self.ids().any(|node| fits(node) && is_whole(node));
        // A log whose tail was torn may lack what was told: it is as good as any only once all are known.
        let longest = replica
            .holders
            .iter()
            .flat_map(|holders| &holders.members)
            .try_fold(Seq(0), |most, member| fits(member.node).then(|| most.max(last(member.node))));
        let is_longest = |node: NodeId| has_all(node) && longest.is_some_and(|most| last(node) >= most);
        let may_lead = |node: NodeId| is_whole(node) || !whole && is_longest(node);
        // A seat is worth nothing without somebody who has the log: he takes one, if nobody seated has it.
        if !seats.iter().flatten().any(|&node| may_lead(node))
            && let Some(holder) = self.ids().find(|&node| fits(node) && may_lead(node))
        {
            *seats.last_mut().expect("a replica has ranks") = Some(holder);
        }
        let nodes: Vec<NodeId> = seats.into_iter().collect::<Option<_>>().ok_or(Missing::Nodes)?;
        let members: Vec<Member> = nodes.iter().map(|&node| self.nodes[index(node.0)].member(node)).collect();
        let before = replica.membership.as_ref().filter(|_| replica.active).map(Membership::leading);
        // Who led goes on, so that no lease has to be waited out; or else who has most, so that least is cut off.
        let leader =
            (0..).zip(&members).filter(|(_, member)| may_lead(member.node)).max_by_key(|&(rank, member)| {
                (before == Some(*member), last(member.node), core::cmp::Reverse(rank))
            });
        let (leader, &leading): (u32, _) = leader.ok_or(Missing::Holder)?;
        let leased = self.leases(id).any(|(member, until)| member != leading && until > now);
        if leased && !plant::is(Bug::NoFence) {
            return Err(Missing::Fence);
        }
        Ok((members, leader))
    }

    /// Whether a node's log may lack what it had: its tail was torn, or it ends earlier than it did. That may be the doing of a
    /// leader, who cut off what was never committed, or of a disk that was replaced.
    fn is_torn(&self, node: NodeId) -> bool {
        let node = &self.nodes[index(node.0)];
        let reached = if plant::is(Bug::FloorIgnored) { Seq(0) } else { node.reached };
        node.beat.as_ref().is_none_or(|beat| beat.torn || beat.log.last < reached)
    }

    /// Whether a node's disk is the one that it had as a holder, not one that was put in its place since.
    fn is_its_disk(&self, replica: &Replica, node: NodeId) -> bool {
        let began = self.nodes[index(node.0)].beat.as_ref().map(|beat| beat.began);
        let held = replica.holders.iter().flat_map(|holders| &holders.members).find(|held| held.node == node);
        let is_its = held.is_none_or(|held| began.is_some_and(|began| began <= held.incarnation));
        is_its || plant::is(Bug::AnyLeads) || plant::is(Bug::FloorIgnored)
    }

    /// Nodes without a replica that this one may take: the others have to find as many as they have ranks.
    fn spare(&self, id: u32) -> usize {
        let at_home = |replica: Option<u32>| {
            self.nodes.iter().filter(|node| node.home == replica && node.life != Life::GivenUp).count()
        };
        let others = (0..len32(self.replicas.len())).filter(|&other| other != id);
        let ranks = index(self.config.topology.ranks());
        let reserved = others.map(|other| ranks.saturating_sub(at_home(Some(other)))).sum();
        at_home(None).saturating_sub(reserved)
    }

    /// Until when nodes of a replica that may run may act as its leader, whichever epoch they have heard of.
    fn leases(&self, id: u32) -> impl Iterator<Item = (Member, Time)> {
        let own = self.ids().filter(move |&node| self.replica_of(node) == Some(id));
        own.filter_map(|node| {
            let known = &self.nodes[index(node.0)];
            known.may_run().then(|| (known.member(node), known.lease_until))
        })
    }

    fn adopt(&mut self, cx: &mut Context<'_>, id: u32, members: Vec<Member>, leader: u32) {
        assert!(members.iter().all(|&member| self.is_up(member)), "only who is heard becomes a member");
        self.epoch.0 += u64::from(!plant::is(Bug::EpochReused) || self.epoch.0 == 0);
        for member in &members {
            self.nodes[index(member.node.0)].home = Some(id);
        }
        let membership = Membership { replica: id, epoch: self.epoch, members, leader };
        let replica = &mut self.replicas[index(id)];
        replica.membership = Some(membership.clone());
        replica.active = false;
        replica.waiting = false;
        replica.lacks_since = None;
        self.decided = cx.seq;
        cx.event(SupervisorEvent::Adopted(membership));
        self.tell_all(cx, id);
    }

    /// Says whose disk is waited for, once everybody who is there has said since how far his log reaches.
    fn wait_for_holders(&mut self, cx: &mut Context<'_>, id: u32) {
        let mut own = self.nodes.iter().filter(|node| node.home == Some(id) && node.life == Life::Up);
        let since = self.replicas[index(id)].lacks_since;
        if own.any(|node| since.is_some_and(|since| !node.detector.heard_since(since))) {
            return;
        }
        let replica = &mut self.replicas[index(id)];
        if !core::mem::replace(&mut replica.waiting, true) {
            let nodes = replica.holders();
            cx.event(SupervisorEvent::Waiting { replica: id, nodes });
        }
    }

    /// When a replica is to be looked at again.
    pub(super) fn replicas_until(&self, now: Time) -> Option<Time> {
        let waiting =
            (0..).zip(&self.replicas).filter(|(_, replica)| !replica.is_over() && !self.is_whole(replica));
        let fences = waiting.flat_map(|(id, _)| self.leases(id)).map(|(_, until)| until);
        fences.chain([self.quiet_until]).filter(|until| *until > now).min()
    }

    /// The operator wishes everything to finish.
    pub(super) fn drain(&mut self, cx: &mut Context<'_>, bound_ns: Option<u64>) {
        let until = bound_ns.map(|ns| cx.now.after_ns(ns));
        self.decided = cx.seq;
        match &mut self.drain {
            // A second, more urgent wish.
            Some(drain) => drain.until = drain.until.into_iter().chain(until).min(),
            None => self.drain = Some(super::Drain { until }),
        }
        for id in 0..len32(self.replicas.len()) {
            self.tell_all(cx, id);
        }
    }

    /// Whether too few nodes are left for a replica, unless the operator has one begin again.
    pub(super) fn lacks_nodes(&self, id: u32) -> bool {
        let left = self.nodes.iter().filter(|n| !n.is_over() && n.home.is_none_or(|home| home == id));
        left.count() < index(self.config.topology.ranks())
    }

    /// Gives up, while draining, what can never finish, and ends what is needed no more.
    pub(super) fn finish(&mut self, cx: &mut Context<'_>) {
        let Some(until) = self.drain.as_ref().map(|drain| drain.until) else { return };
        let overtime = until.map(|until| until.after_ns(self.config.patience.serving_ns));
        for id in 0..len32(self.replicas.len()) {
            if self.replicas[index(id)].is_over() {
                continue;
            }
            let reason = if self.lacks_nodes(id) {
                Some("too few of its nodes are left")
            } else if overtime.is_some_and(|overtime| overtime <= cx.now) {
                Some("its time is over")
            } else {
                None
            };
            if let Some(reason) = reason {
                self.decided = cx.seq;
                self.replicas[index(id)].hopeless = Some(format!(
                    "replica {id} did not finish: {reason}; what it had accepted is in its journals"
                ));
            }
        }
        for id in self.ids() {
            if !matches!(self.nodes[index(id.0)].life, Life::Starting { .. } | Life::Up)
                || !self.is_finished(id)
            {
                continue;
            }
            // Members of a replica that is drained stop by themselves, and have a while for it.
            let drained = self.replica_of(id).and_then(|replica| self.replicas[index(replica)].drained);
            if drained.is_none_or(|at| at.after_ns(self.config.patience.silence_max_ns) <= cx.now) {
                self.end(cx, id, Cause::Drained);
            }
        }
    }

    /// When draining is to be looked at again.
    pub(super) fn drain_until(&self, now: Time) -> Option<Time> {
        let until = self.drain.as_ref()?.until.map(|until| until.after_ns(self.config.patience.serving_ns));
        let unfinished = self.replicas.iter().any(|replica| !replica.is_over());
        let stragglers =
            self.ids().filter(|&id| matches!(self.nodes[index(id.0)].life, Life::Starting { .. } | Life::Up));
        let drained = stragglers.filter_map(|id| self.replicas[index(self.replica_of(id)?)].drained);
        let drained = drained.map(|at| at.after_ns(self.config.patience.silence_max_ns));
        drained.chain(until.filter(|_| unfinished)).filter(|until| *until > now).min()
    }
}
