//! Versions of an optimizer's shards: when the next one is computed, when it is a checkpoint, and to which all go back.
//!
//! Everything is decided from what nodes said that they have, on ticks and beats alike, and told as orders that say all each
//! time. A version counts once every rank of every replica holds it and the same shards have the same digest. Whoever lacks
//! it gets it from his own disk or from whoever has it. Only if a shard of it is nowhere do all go back, to the newest version
//! of which every shard is somewhere, in memory or on a disk that was read; and below what all had on disk only once every
//! disk that had it was read, or its node is given up. No step of this waits for a time.
//!
//! A beat may be older than orders that are on their way, and whoever obeys those lets go of what they do not name. So what
//! ranks have counts as theirs only from beats of those that have obeyed their newest orders, and only if it was ordered.

use super::config::Training;
use super::node::Life;
use super::words::{Cause, SupervisorEvent};
use super::{Context, State};
use crate::cluster::membership::{Member, NodeId};
use crate::cluster::shards::{ShardOrders, ShardStanding, Stamp, Want};
use crate::digest::Digest;
use crate::ids::{index, len32};
use crate::plant::{self, Bug};
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// Times in a row that a version may come out differently.
const DIFFERED_MAX: u32 = 3;

/// What the supervisor knows of the shards.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Shards {
    /// Every rank of every replica has had it.
    version: u64,
    /// The digest of each shard of it; empty before all ranks have begun.
    digests: Vec<Digest>,
    /// The newest that every rank had on disk, and the one before.
    sealed: u64,
    sealed_before: u64,
    /// Whose disks had it, or some of it.
    sealers: BTreeSet<NodeId>,
    /// The present version is being written.
    storing: bool,
    /// It was said whose disks are waited for.
    waiting: bool,
    /// Times in a row that the next version came out differently.
    differed: u32,
    /// What came out differently is not let go of everywhere.
    dropping: bool,
}

impl Shards {
    pub(super) const fn versions(&self) -> (u64, u64) {
        (self.version, self.sealed)
    }

    /// A new life of the supervisor: an operator may have mended what differed.
    pub(super) const fn take_up(&mut self) {
        self.differed = 0;
    }

    /// # Panics
    /// If an invariant does not hold.
    pub(super) fn check(&self, ranks: u32) {
        assert!(self.sealed <= self.version, "what is on all disks was in all memories");
        assert!(self.sealed_before <= self.sealed, "checkpoints grow");
        assert!(self.digests.is_empty() || len32(self.digests.len()) == ranks, "every rank has a shard");
    }

    fn stamp(&self, shard: u32) -> Option<Stamp> {
        let digest = *self.digests.get(index(shard))?;
        Some(Stamp { shard, version: self.version, digest })
    }

    fn want(&self, shard: u32, from: Option<Member>) -> Want {
        Want { shard, version: self.version, digest: self.digests.get(index(shard)).copied(), from }
    }
}

/// The nodes that have told of their shards, in order; and which of them is which rank.
struct Census<'a> {
    standings: BTreeMap<NodeId, &'a ShardStanding>,
    /// What each was told last, of those that have said since that they obey it.
    obeyed: BTreeMap<NodeId, &'a ShardOrders>,
    seats: Vec<(NodeId, u32)>,
    ranks: u32,
}

impl<'a> Census<'a> {
    fn holds(&self, node: NodeId, stamp: &Stamp) -> bool {
        self.standings.get(&node).is_some_and(|standing| standing.held.contains(stamp))
    }

    fn stores(&self, node: NodeId, stamp: &Stamp) -> bool {
        self.standings.get(&node).is_some_and(|standing| standing.stored.iter().flatten().any(|s| s == stamp))
    }

    /// Whose disks have some of a version.
    fn storing(&self, version: u64) -> impl Iterator<Item = NodeId> {
        let has = move |standing: &ShardStanding| {
            standing.stored.iter().flatten().any(|stamp| stamp.version == version)
        };
        self.standings.iter().filter(move |(_, standing)| has(standing)).map(|(&node, _)| node)
    }

    /// Whether every rank does what the newest orders say, and they say this.
    fn all_obey(&self, say: impl Fn(&ShardOrders) -> bool) -> bool {
        let obeys = |&(node, _): &(NodeId, u32)| self.obeyed.get(&node).is_some_and(|orders| say(orders));
        self.seats.iter().all(obeys)
    }

    /// Who is to give others a shard: who holds it, or else who can read it.
    fn giver(&self, stamp: &Stamp) -> Option<NodeId> {
        let nodes = || self.standings.keys().copied();
        let holder = nodes().find(|&node| self.holds(node, stamp));
        holder.or_else(|| nodes().find(|&node| self.stores(node, stamp)))
    }

    /// What every seat holds of a version, or what differs; `None` while somebody lacks it.
    fn held_by_all(&self, version: u64) -> Option<Result<Vec<Digest>, u32>> {
        let digest_of = |&(node, shard): &(NodeId, u32)| {
            let held = &self.standings.get(&node)?.held;
            Some((shard, held.iter().find(|s| (s.shard, s.version) == (shard, version))?.digest))
        };
        let digests: BTreeSet<(u32, Digest)> = if plant::is(Bug::TrainedByOne) {
            self.seats.iter().filter_map(digest_of).collect()
        } else {
            self.seats.iter().map(digest_of).collect::<Option<_>>()?
        };
        self.one_each(digests)
    }

    /// One digest for each shard, if each has one and no more.
    fn one_each(&self, digests: BTreeSet<(u32, Digest)>) -> Option<Result<Vec<Digest>, u32>> {
        let digests: Vec<(u32, Digest)> = digests.into_iter().collect();
        if let Some(pair) = digests.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Some(Err(pair[0].0));
        }
        (len32(digests.len()) == self.ranks)
            .then(|| Ok(digests.into_iter().map(|(_, digest)| digest).collect()))
    }

    /// The newest version of which every shard is somewhere, and all copies of it are the same.
    fn newest_whole(&self) -> (u64, Vec<Digest>) {
        let mut copies: BTreeMap<u64, BTreeSet<(u32, Digest)>> = BTreeMap::new();
        let stamps = |standing: &&'a ShardStanding| {
            standing.held.iter().chain(standing.stored.iter().flatten()).copied().collect::<Vec<_>>()
        };
        for stamp in self.standings.values().flat_map(stamps).filter(|stamp| stamp.shard < self.ranks) {
            copies.entry(stamp.version).or_default().insert((stamp.shard, stamp.digest));
        }
        let whole = |(version, digests)| Some((version, self.one_each(digests)?.ok()?));
        copies
            .into_iter()
            .rev()
            .filter(|(version, _)| (1..u64::MAX).contains(version))
            .find_map(whole)
            .unwrap_or_default()
    }
}

impl State {
    /// Brings the shards further, or back.
    pub(super) fn train(&mut self, cx: &mut Context<'_>) {
        let Some(training) = self.config.training else { return };
        if self.drain.is_some() {
            return;
        }
        self.end_accused(cx);
        let Some(census) = self.census() else { return };
        let mut shards = self.shards.clone();
        let events = decide(&mut shards, &census, training, |node| !self.nodes[index(node.0)].is_over());
        let orders = orders(&shards, &census, training, |node| self.nodes[index(node.0)].member(node));
        self.shards = shards;
        for event in events {
            cx.event(event);
        }
        for (id, mut new) in orders {
            let node = &mut self.nodes[index(id.0)];
            new.round = node.shards.as_ref().map_or(0, |orders| orders.round);
            if node.shards.as_deref() != Some(&new) {
                new.round = cx.seq.0;
                node.shards = Some(Box::new(new));
                self.decided = cx.seq;
                self.tell(cx, id, false);
            }
        }
    }

    /// What nodes have said, once all that live and can say it have, and every rank is taken.
    fn census(&self) -> Option<Census<'_>> {
        let up = || self.ids().filter(|id| self.nodes[index(id.0)].life == Life::Up);
        let standing = |id: NodeId| {
            let standing = self.nodes[index(id.0)].beat.as_ref()?.shards.as_deref()?;
            (standing.stored.is_some() || plant::is(Bug::ShardsUnverified)).then_some((id, standing))
        };
        let standings: BTreeMap<NodeId, &ShardStanding> = up().map(standing).collect::<Option<_>>()?;
        let mut seats = Vec::new();
        for replica in &self.replicas {
            let membership = replica.membership.as_ref()?;
            seats.extend(membership.members.iter().zip(0..).map(|(member, shard)| (*member, shard)));
        }
        let lives = |&(member, _): &(Member, u32)| {
            self.nodes[index(member.node.0)].incarnation == member.incarnation
                && standings.contains_key(&member.node)
        };
        if !seats.iter().all(lives) {
            return None;
        }
        let obeys = |(&id, standing): (&NodeId, &&ShardStanding)| {
            let orders = self.nodes[index(id.0)].shards.as_deref()?;
            (orders.round == standing.round).then_some((id, orders))
        };
        let obeyed = standings.iter().filter_map(obeys).collect();
        let seats = seats.into_iter().map(|(member, shard)| (member.node, shard)).collect();
        Some(Census { standings, obeyed, seats, ranks: self.config.topology.ranks() })
    }

    /// Ends whoever gave others bytes that were not those of their stamp, and has that stamp still.
    fn end_accused(&mut self, cx: &mut Context<'_>) {
        let standing = |id: NodeId| self.nodes[index(id.0)].beat.as_ref()?.shards.as_deref();
        let accused = self.ids().filter_map(|id| standing(id)?.accused);
        let guilty: Vec<NodeId> = accused
            .filter(|(member, stamp)| {
                let node = self.nodes.get(index(member.node.0));
                node.is_some_and(|node| node.life == Life::Up && node.incarnation == member.incarnation)
                    && standing(member.node).is_some_and(|standing| standing.held.contains(stamp))
            })
            .map(|(member, _)| member.node)
            .collect();
        for node in guilty {
            if self.nodes[index(node.0)].life == Life::Up {
                self.end(cx, node, Cause::Diverged);
            }
        }
    }
}

/// Takes what nodes have for what it means; returns what is to be told.
fn decide(
    shards: &mut Shards,
    census: &Census<'_>,
    training: Training,
    may_come: impl Fn(NodeId) -> bool,
) -> Vec<SupervisorEvent> {
    let mut events = Vec::new();
    // Whoever has something of the checkpoint on disk is waited for too: it may be the last that can be read.
    if shards.sealed > 0 {
        shards.sealers.extend(census.storing(shards.sealed));
    }
    let is_somewhere = |shard| shards.stamp(shard).is_some_and(|stamp| census.giver(&stamp).is_some());
    if !(0..census.ranks).all(is_somewhere) {
        let (version, digests) = census.newest_whole();
        if version < shards.sealed {
            let unread = |node: &NodeId| !census.standings.contains_key(node) && may_come(*node);
            let nodes: Vec<NodeId> = shards.sealers.iter().copied().filter(unread).collect();
            if !nodes.is_empty() {
                if !core::mem::replace(&mut shards.waiting, true) {
                    events.push(SupervisorEvent::ShardsMissed { nodes });
                }
                return events;
            }
        }
        let (from, sealed) = (shards.version, shards.sealed);
        if version != from {
            events.push(SupervisorEvent::Restored { version, from, sealed });
        }
        if version < sealed {
            shards.sealers.clear();
        }
        (shards.version, shards.digests) = (version, digests);
        shards.sealed_before = shards.sealed_before.min(version);
        // What was on all disks stays so; anything else is written before anybody goes on from it.
        shards.storing = version > 0 && version != sealed;
        shards.sealed = sealed.min(version);
        (shards.differed, shards.dropping) = (0, false);
    }
    shards.waiting = false;
    if shards.digests.is_empty() {
        match census.held_by_all(0) {
            None => return events,
            Some(Err(shard)) => {
                // Computing it again would make the same of it.
                differ(shards, &mut events, shard, 0, DIFFERED_MAX);
                return events;
            }
            Some(Ok(digests)) => shards.digests = digests,
        }
    } else if !is_in_step(shards, census) {
        return events;
    }
    if shards.storing && census.all_obey(|orders| orders.store == Some(shards.version)) {
        seal(shards, census, &mut events);
    }
    let next = shards.version + 1;
    shards.dropping &= census.standings.values().any(|s| s.held.iter().any(|stamp| stamp.version == next));
    if may_go_on(shards, training) && census.all_obey(|orders| orders.next == Some(next)) {
        match census.held_by_all(next) {
            None => {}
            Some(Err(shard)) => {
                shards.dropping = true;
                differ(shards, &mut events, shard, next, 1);
            }
            Some(Ok(digests)) => {
                (shards.version, shards.digests, shards.differed) = (next, digests, 0);
                shards.storing = next.is_multiple_of(training.store_every);
                events.push(SupervisorEvent::Trained { version: next });
            }
        }
    }
    events
}

/// The present version is a checkpoint, once every rank has it on disk.
fn seal(shards: &mut Shards, census: &Census<'_>, events: &mut Vec<SupervisorEvent>) {
    let stores =
        |&(node, shard): &(NodeId, u32)| shards.stamp(shard).is_some_and(|s| census.stores(node, &s));
    let sealed = if plant::is(Bug::SealedByOne) {
        census.seats.iter().any(stores)
    } else {
        census.seats.iter().all(stores)
    };
    if sealed {
        (shards.sealed_before, shards.sealed, shards.storing) = (shards.sealed, shards.version, false);
        shards.sealers = census.seats.iter().map(|&(node, _)| node).collect();
        events.push(SupervisorEvent::Sealed { version: shards.version });
    }
}

/// Whether every rank holds the present version.
fn is_in_step(shards: &Shards, census: &Census<'_>) -> bool {
    let holds = |&(node, shard): &(NodeId, u32)| shards.stamp(shard).is_some_and(|s| census.holds(node, &s));
    census.seats.iter().all(holds)
}

fn differ(shards: &mut Shards, events: &mut Vec<SupervisorEvent>, shard: u32, version: u64, times: u32) {
    if shards.differed < DIFFERED_MAX {
        shards.differed += times;
        events.push(SupervisorEvent::ShardsDiffer { shard, version });
    }
}

const fn may_go_on(shards: &Shards, training: Training) -> bool {
    !shards.storing && !shards.dropping && shards.differed < DIFFERED_MAX && shards.version < training.until
}

/// What every node is to be told, but for the round.
fn orders(
    shards: &Shards,
    census: &Census<'_>,
    training: Training,
    member: impl Fn(NodeId) -> Member,
) -> BTreeMap<NodeId, ShardOrders> {
    let keep: BTreeSet<u64> = [shards.sealed_before, shards.sealed, shards.version].into();
    let keep: Vec<u64> = keep.into_iter().filter(|version| *version > 0).collect();
    let mut orders: BTreeMap<NodeId, ShardOrders> = census
        .standings
        .keys()
        .map(|&node| (node, ShardOrders { keep: keep.clone(), ..ShardOrders::default() }))
        .collect();
    let in_step = is_in_step(shards, census);
    for &(node, shard) in &census.seats {
        let own = shards.stamp(shard).is_some_and(|s| census.holds(node, &s) || census.stores(node, &s));
        let giver = shards.stamp(shard).filter(|_| !own).and_then(|stamp| census.giver(&stamp));
        let order = orders.get_mut(&node).expect("whoever has a seat was heard");
        order.own = Some(shard);
        order.hold.push(shards.want(shard, giver.map(&member)));
        order.store = shards.storing.then_some(shards.version);
        order.next = (in_step && may_go_on(shards, training)).then_some(shards.version + 1);
        if let Some(giver) = giver
            && let Some(gives) = orders.get_mut(&giver)
            && !gives.hold.iter().any(|want| want.shard == shard)
        {
            gives.hold.push(shards.want(shard, None));
        }
    }
    // A giver that has the shard as its own comes to it twice, whichever came first.
    for order in orders.values_mut() {
        order.hold.sort_unstable_by_key(|want| want.shard);
        order.hold.dedup_by_key(|want| want.shard);
    }
    orders
}
