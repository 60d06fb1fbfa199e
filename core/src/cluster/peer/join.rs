//! A new epoch: every member forgets what was volatile, then brings its log to the leader's.

use super::{Held, Log, Peer, PeerOutput, Standing, end_of};
use crate::cluster::gather::Gather;
use crate::cluster::membership::Membership;
use crate::cluster::message::Payload;
use crate::cluster::orders::{LogEnd, Orders};
use crate::digest::Digest;
use crate::ids::{Incarnation, Seq, len32};
use crate::input::Input;
use crate::journal::{Record, Snapshot};
use crate::plant::{self, Bug};
use crate::time::Time;
use alloc::boxed::Box;
use alloc::vec::Vec;

impl Peer {
    pub(super) fn orders(&mut self, now: Time, orders: Orders) {
        if orders.to != self.settings.member || self.standing == Standing::Broken {
            return;
        }
        if let Some(membership) = orders.membership {
            let newer = self.membership.as_ref().is_none_or(|mine| membership.epoch > mine.epoch);
            if newer && let Some(rank) = membership.rank_of(self.settings.member) {
                self.enter(now, membership.clone(), rank);
            }
            let current = self.epoch() == Some(membership.epoch);
            if current && orders.active && !self.active && (self.synced() || !self.leading()) {
                self.active = true;
                if self.leading() {
                    self.begin(now);
                }
            }
            if let Some(lease) = orders.lease.filter(|_| current && self.leads()) {
                let kept = 1000 - u64::from(self.settings.drift_per_mille.min(1000));
                let until = lease.sent.after_ns(lease.length_ns / 1000 * kept);
                self.lease_until = self.lease_until.max(Some(until));
            }
        }
        if let Some(bound_ns) = orders.drain
            && self.leads()
            && self.obeying
            && !self.draining
        {
            self.draining = true;
            self.order(now, Input::Drain { bound_ns });
        }
    }

    fn enter(&mut self, now: Time, membership: Membership, rank: u32) {
        let leader = membership.leader;
        let ranks = len32(membership.members.len());
        assert_eq!(ranks, self.topology().ranks(), "an epoch has a member for each rank");
        self.membership = Some(membership);
        self.rank = rank;
        self.active = false;
        self.obeying = false;
        self.links.clear();
        self.followers.clear();
        self.reading.clear();
        self.reads = false;
        self.gather = Gather::default();
        self.early = None;
        self.held.clear();
        self.batch.clear();
        self.lease_until = None;
        self.engine_until = None;
        self.diverged = 0;
        self.draining = false;
        if !plant::is(Bug::ArenasKept) {
            self.out.push_back(PeerOutput::Forget);
        }
        if rank == leader {
            self.standing = Standing::Joined;
            self.followers = (0..ranks).filter(|&other| other != rank).map(|other| (other, None)).collect();
        } else if self.standing != Standing::Rewinding {
            self.standing = Standing::Joining;
            self.join(now);
        }
    }

    /// Tells the leader of its log, once all of it is durable.
    pub(super) fn join(&mut self, now: Time) {
        let membership = self.membership.as_ref().expect("an epoch is joined");
        if self.standing == Standing::Joining && self.durable == end_of(&self.engine) {
            let leader = membership.leader;
            let digests = self.ends.iter().map(|end| end.digest).collect();
            self.standing = Standing::Joined;
            self.send(now, leader, Payload::Join { committed: self.committed(), digests });
        }
    }

    /// The journal was cut or replaced as the leader said.
    pub(super) fn rewound(&mut self, now: Time, log: Log) {
        self.durable = end_of(&log.engine);
        self.engine = log.engine;
        let committed = self.committed();
        self.ends = log.ends.into();
        self.committed_to(committed);
        if self.standing == Standing::Rewinding {
            self.standing = if self.leading() { Standing::Joined } else { Standing::Joining };
            self.join(now);
        }
    }

    /// As the leader: a member tells of its log.
    pub(super) fn joining(&mut self, rank: u32, committed: Seq, digests: Vec<Digest>) {
        if !self.leading() || self.obeying {
            return;
        }
        // A log has an end: a join without one, or with one that nobody counts to, is none.
        let records = digests.len().checked_sub(1).and_then(|records| u64::try_from(records).ok());
        let last =
            records.and_then(|records| committed.0.checked_add(records)).filter(|last| *last < u64::MAX);
        let Some(last) = last.map(Seq) else { return };
        if (LogEnd { last, digest: *digests.last().unwrap_or(&Digest::default()) }) == end_of(&self.engine) {
            return self.joined(rank, last);
        }
        if committed > end_of(&self.engine).last {
            // It knows more to be committed than a member of the last active epoch holds: this leader is none.
            return self.broken(committed, Digest::default());
        }
        self.reading.push_back((rank, committed, digests));
        self.read_next();
    }

    /// As the leader: reads its log for the next member whose log is not the same, once all of it can be read.
    pub(super) fn read_next(&mut self) {
        let whole = self.durable == end_of(&self.engine) || plant::is(Bug::ReadEarly);
        if self.reads || !whole {
            return;
        }
        if let Some(&(_, committed, _)) = self.reading.front() {
            self.reads = true;
            self.out.push_back(PeerOutput::ReadLog { from: Seq(committed.0 + 1) });
        }
    }

    /// As the leader: its records after what a member knows to be committed.
    ///
    /// What is committed is in both logs, so cutting the member's where they part never takes any of it.
    pub(super) fn log_read(&mut self, now: Time, snapshot: Option<Snapshot>, records: Vec<Record>) {
        let Some((rank, committed, digests)) = self.reading.pop_front() else { return };
        let theirs =
            |at: u64| at.checked_sub(committed.0).and_then(|n| digests.get(usize::try_from(n).ok()?));
        let first = records.first().map_or(end_of(&self.engine).last.0, |record| record.seq - 1);
        let mine = records.iter().map(|record| Digest(record.digest)).chain([self.engine.digest()]);
        let common = (first..).zip(mine).take_while(|(at, digest)| theirs(*at) == Some(digest)).last();
        match (common, snapshot) {
            (Some((at, _)), _) if at + 1 == committed.0 + digests.len() as u64 => {
                let at = at + u64::from(plant::is(Bug::LacksOne));
                let lacks = records.into_iter().filter(|record| record.seq > at).collect();
                self.send_records(now, rank, lacks);
                self.joined(rank, Seq(at));
            }
            (Some(_), _) if plant::is(Bug::RewindSkipped) => self.joined(rank, end_of(&self.engine).last),
            (Some((at, _)), _) => self.send(now, rank, Payload::Rewind { keep: Seq(at) }),
            (None, Some(snapshot)) => self.send(now, rank, Payload::Install { snapshot }),
            (None, None) => self.broken(committed, *digests.first().unwrap_or(&Digest::default())),
        }
        self.reads = false;
        self.read_next();
    }

    /// Logs that should be one are not.
    fn broken(&mut self, after: Seq, expected: Digest) {
        self.standing = Standing::Broken;
        self.held.clear();
        let seq = Seq(after.0 + 1);
        self.out.push_back(PeerOutput::Diverged { seq, expected, found: self.engine.digest() });
    }

    fn send_records(&mut self, now: Time, rank: u32, records: Vec<Record>) {
        let committed = self.committed();
        let mut records = records.into_iter().peekable();
        while records.peek().is_some() {
            let part = records.by_ref().take(RECORDS_TOGETHER).collect();
            self.send(now, rank, Payload::Records { records: part, committed });
        }
    }

    fn joined(&mut self, rank: u32, durable: Seq) {
        self.followers.insert(rank, Some(durable));
    }

    /// Whether this rank leads, and every member's log is its own, durable.
    pub(super) fn synced(&self) -> bool {
        let last = end_of(&self.engine).last;
        self.leading()
            && self.standing == Standing::Joined
            && self.durable.last == last
            && self.followers.values().all(|durable| durable.is_some_and(|durable| durable >= last))
    }

    /// The first input of the epoch: what was volatile is gone on every rank. All that is in the log is committed.
    fn begin(&mut self, now: Time) {
        self.committed_to(end_of(&self.engine).last);
        if !plant::is(Bug::ClockJumps) {
            self.begun = (now, self.engine.now());
        }
        let incarnation = Incarnation(self.epoch().expect("an epoch is active").0);
        let (config, entropy) = (Box::new(self.settings.config.clone()), self.settings.entropy);
        self.order(
            now,
            if self.engine.next_seq() == Seq(1) {
                Input::Boot { incarnation, config, entropy }
            } else {
                Input::Restarted { incarnation, config, entropy }
            },
        );
    }

    /// As a follower: the leader's records.
    pub(super) fn follow(&mut self, records: &[Record]) {
        for record in records {
            let (seq, expected) = (Seq(record.seq), Digest(record.digest));
            assert_eq!(seq, self.engine.next_seq(), "a link delivers records in order");
            let found = self.engine.digest();
            let input = crate::replay::decode_input(&record.payload);
            let (true, Ok(input)) = (found == expected, input) else {
                return self.broken(Seq(seq.0 - 1), expected);
            };
            let time = Time(record.time_ns);
            self.fold(time, input, record.clone());
        }
    }

    /// What waits for a later commit.
    pub(super) fn hold(&mut self, after: Seq, held: Held) {
        self.held.push_back((after, held));
    }
}

/// Records that travel in one message while a log is brought up.
const RECORDS_TOGETHER: usize = 64;
