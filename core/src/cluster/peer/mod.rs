//! One rank of a replica: an engine that folds the log of its epoch, and what it takes to have the same log as the others.
//!
//! The door is the engine's: `handle` an input with its time, `poll` until `Wait`. The driver journals what `Append` says,
//! obeys `Obey`, tells clients what `Tell` says and carries messages; it decides nothing. Everything here but the engine is
//! volatile: a new epoch begins from the engine and the orders of the supervisor.

mod join;
mod serve;

use super::gather::Gather;
use super::link::{Link, LinkHeader};
use super::membership::{Epoch, Member, Membership};
use super::message::{Message, Payload, Tag};
use super::orders::{Activity, Beat, Facts, LogEnd, Orders};
use crate::config::Config;
use crate::digest::Digest;
use crate::engine::Engine;
use crate::ids::{Incarnation, Seq, index};
use crate::input::Input;
use crate::journal::{Record, Snapshot};
use crate::lifecycle::Lifecycle;
use crate::output::Output;
use crate::plant::{self, Bug};
use crate::time::Time;
use crate::topology::Topology;
use alloc::boxed::Box;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::{string::String, vec::Vec};

/// What a rank is started with.
#[derive(Clone, Debug)]
pub struct PeerConfig {
    /// This life.
    pub member: Member,
    /// What must be the same on every node.
    pub facts: Facts,
    /// The engine's configuration, the topology in it.
    pub config: Config,
    /// The journal's tail was torn, and nobody has said since that nothing is missing.
    pub torn: bool,
    /// The life that began the journal, on an empty disk.
    pub began: Incarnation,
    /// A random number, for a replica whose routing seed is to be drawn.
    pub entropy: u64,
    /// Nanoseconds after which an unconfirmed message is sent again.
    pub retry_ns: u64,
    /// Messages to one member that may be unconfirmed; while there are more, no new command is taken.
    pub unconfirmed_max: u32,
    /// How far two clocks may drift apart, in thousandths: a lease is used for so much less.
    pub drift_per_mille: u32,
}

/// A node's journal, all of it durable, as a rank begins with it.
#[derive(Clone, Debug)]
pub struct Log {
    /// The journal folded.
    pub engine: Engine,
    /// Where it ended after its snapshot (or before the first record), and after each record since.
    pub ends: Vec<LogEnd>,
}

impl Log {
    /// The log of an engine that was folded from a snapshot and these records, all that there are after it.
    #[must_use]
    pub fn new(engine: Engine, records: &[Record]) -> Self {
        let before = |record: &Record| LogEnd { last: Seq(record.seq - 1), digest: Digest(record.digest) };
        let mut ends: Vec<LogEnd> = records.iter().map(before).collect();
        ends.push(end_of(&engine));
        Self { engine, ends }
    }
}

/// What happens to a rank.
#[derive(Debug)]
pub enum PeerInput {
    /// The supervisor says how things stand.
    Orders(Box<Orders>),
    /// A member says something.
    Message(Box<Message>),
    /// The local journal is durable up to this record. None that was on its way when the log was cut may come after
    /// `Rewound`: the record of that number may be another now.
    Durable {
        /// Which.
        seq: Seq,
    },
    /// The local driver has done, or could not do, what an `Obey` asked.
    Answer(Input),
    /// A client or operator of this node wants something of the engine.
    Command(Input),
    /// Answers `ReadLog`: the records from there on; if the log begins later, its snapshot and the records after it.
    Log {
        /// Only if the log begins after the record that was asked for.
        snapshot: Option<Snapshot>,
        /// Without gaps.
        records: Vec<Record>,
    },
    /// Answers `Rewind` and `Install`: the log as it is now.
    Rewound(Box<Log>),
    /// The local compute backend has something for another rank.
    Data {
        /// For which rank.
        to: u32,
        /// Which exchange.
        tag: Tag,
        /// What.
        bytes: Vec<u8>,
    },
    /// The time of `Wait` has come.
    Tick,
}

/// What a rank asks for or says.
#[derive(Debug)]
pub enum PeerOutput {
    /// Add a record to the local journal; `Durable` follows when it is.
    Append(Record),
    /// Do this on this rank, with its own slots; answered by `Answer`.
    Obey(Output),
    /// Tell clients. All members have what it needs, and there is a lease.
    Tell(Output),
    /// Write a snapshot; `SnapshotDurable` answers.
    Snapshot(Snapshot),
    /// Carry a message, or lose it.
    Send(Box<Message>),
    /// Hand data of another rank to the local compute backend.
    Data {
        /// Of which rank.
        from: u32,
        /// Which exchange.
        tag: Tag,
        /// What.
        bytes: Vec<u8>,
    },
    /// Read the local journal from this record on; answered by `Log`.
    ReadLog {
        /// The first that is wanted.
        from: Seq,
    },
    /// Cut the local journal after this record and fold it again; answered by `Rewound`.
    Rewind {
        /// The last record that stays.
        keep: Seq,
    },
    /// Take this in place of the local journal; answered by `Rewound`.
    Install(Snapshot),
    /// Nothing is missing in the local journal, although its tail was torn: remember that with it.
    Whole,
    /// A new epoch: drop arenas, loads, the running step and every answer that is still to come.
    Forget,
    /// A command is not taken, and why.
    Refused {
        /// It.
        input: Input,
        /// What, why and the remedy.
        reason: String,
    },
    /// The log of this rank does not lead where the leader's does, although both hold the same records: stop, and say so.
    Diverged {
        /// Before which record.
        seq: Seq,
        /// The leader's digest.
        expected: Digest,
        /// This rank's.
        found: Digest,
    },
    /// Nothing more to do until an input comes, or this time.
    Wait {
        /// When to give a `Tick`.
        until: Option<Time>,
    },
}

/// Where a rank stands in its epoch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Standing {
    /// In none.
    Outside,
    /// Bringing its log to the leader's.
    Joining,
    /// The local journal is being cut or replaced.
    Rewinding,
    /// Its log grows with the leader's.
    Joined,
    /// It diverged, and takes no further part.
    Broken,
}

/// One rank of a replica.
#[derive(Debug)]
pub struct Peer {
    settings: PeerConfig,
    engine: Engine,
    standing: Standing,
    membership: Option<Membership>,
    rank: u32,
    /// The supervisor has journalled the epoch as active.
    active: bool,
    /// The first input of the epoch is in the log: outputs are obeyed.
    obeying: bool,
    links: BTreeMap<u32, Link<Payload>>,
    /// When the first of them has something to send again.
    again: Option<Time>,
    /// Ends of the log: the one up to which every member's journal is known to be durable, and after each record since.
    ends: VecDeque<LogEnd>,
    /// The durable end of the local journal.
    durable: LogEnd,
    /// As the leader: up to where each rank's journal is durable; `None` before its log is the leader's.
    followers: BTreeMap<u32, Option<Seq>>,
    /// As the leader: ranks for which the journal is being read, and what they said of their logs.
    reading: VecDeque<(u32, Seq, Vec<Digest>)>,
    /// As the leader: the journal is being read for the first of them.
    reads: bool,
    gather: Gather,
    /// As the leader: what the next layer needs, before the one before it is released.
    early: Option<Input>,
    /// Outputs that wait until their record is committed, in order.
    held: VecDeque<(Seq, Held)>,
    /// When the engine wants a tick, by the time of the log.
    engine_until: Option<Time>,
    /// As the leader: what this clock showed when the time of the log was what.
    begun: (Time, Time),
    /// Until when commands may be taken and clients told.
    lease_until: Option<Time>,
    drained: bool,
    draining: bool,
    diverged: u64,
    progress: u64,
    /// Records that are to be sent with the next message to the followers.
    batch: Vec<Record>,
    out: VecDeque<PeerOutput>,
}

/// What waits for its record to be committed.
#[derive(Debug)]
enum Held {
    Output(Output),
    Snapshot(Snapshot),
}

impl Peer {
    /// A rank that begins with this log.
    #[must_use]
    pub fn new(settings: PeerConfig, log: Log) -> Self {
        Self {
            durable: end_of(&log.engine),
            settings,
            engine: log.engine,
            ends: log.ends.into(),
            standing: Standing::Outside,
            membership: None,
            rank: 0,
            active: false,
            obeying: false,
            links: BTreeMap::new(),
            again: None,
            followers: BTreeMap::new(),
            reading: VecDeque::new(),
            reads: false,
            gather: Gather::default(),
            early: None,
            held: VecDeque::new(),
            engine_until: None,
            begun: (Time(0), Time(0)),
            lease_until: None,
            drained: false,
            draining: false,
            diverged: 0,
            progress: 0,
            batch: Vec::new(),
            out: VecDeque::new(),
        }
    }

    /// Handles an input. What it brings about comes out of [`poll`](Self::poll).
    ///
    /// # Panics
    /// If the driver broke the protocol, or an invariant does not hold.
    pub fn handle(&mut self, now: Time, input: PeerInput) {
        assert!(self.out.is_empty(), "the outputs of one input are drained before the next");
        match input {
            PeerInput::Orders(orders) => self.orders(now, *orders),
            PeerInput::Message(message) => self.message(now, *message),
            PeerInput::Durable { seq } => self.journalled(now, seq),
            PeerInput::Answer(input) => {
                // What records alone bring about says nothing of a device: they may all be wishes.
                let of_records = matches!(
                    input,
                    Input::SnapshotDurable { .. } | Input::Persisted { .. } | Input::Retired { .. }
                );
                self.progress += u64::from(!of_records);
                self.answer(now, input);
            }
            PeerInput::Command(input) => self.command(now, input),
            PeerInput::Log { snapshot, records } => self.log_read(now, snapshot, records),
            PeerInput::Rewound(log) => self.rewound(now, *log),
            PeerInput::Data { to, tag, bytes } => {
                self.progress += 1;
                self.send(now, to, Payload::Data { tag, bytes });
            }
            PeerInput::Tick => self.tick(now),
        }
        self.send_batch(now);
        self.commit(now);
        self.release(now);
        self.confirm(now);
        // All members of an active epoch have one log, and who began it had everything.
        if self.settings.torn && self.is_in_active_epoch() {
            self.settings.torn = false;
            self.out.push_back(PeerOutput::Whole);
        }
    }

    /// The next output; [`PeerOutput::Wait`] when there is none.
    pub fn poll(&mut self) -> PeerOutput {
        self.out.pop_front().unwrap_or_else(|| PeerOutput::Wait { until: self.until() })
    }

    /// What the supervisor is to know.
    #[must_use]
    pub fn beat(&self, now: Time) -> Beat {
        let in_epoch = !matches!(self.standing, Standing::Outside | Standing::Broken);
        Beat {
            member: self.settings.member,
            sent: now,
            facts: self.settings.facts.clone(),
            log: self.durable,
            torn: self.settings.torn,
            began: self.settings.began,
            committed: self.committed(),
            epoch: self.epoch().filter(|_| in_epoch).unwrap_or_default(),
            synced: self.synced(),
            activity: self.activity(),
            progress: self.progress,
            diverged: self.diverged,
            drained: self.drained,
            shards: None,
        }
    }

    /// Where the local journal's durable log ends.
    #[must_use]
    pub const fn durable(&self) -> LogEnd {
        self.durable
    }

    /// The engine, for checkers and drivers that answer questions about it.
    #[must_use]
    pub const fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The last record that every member of the epoch has durable, as far as this rank knows.
    #[must_use]
    pub fn committed(&self) -> Seq {
        self.ends[0].last
    }

    /// Every member's journal is durable up to here.
    fn committed_to(&mut self, seq: Seq) {
        while self.ends.len() > 1 && self.ends[0].last < seq {
            self.ends.pop_front();
        }
    }

    /// The membership that this rank acts in.
    #[must_use]
    pub const fn membership(&self) -> Option<&Membership> {
        self.membership.as_ref()
    }

    /// Its number in the membership.
    #[must_use]
    pub const fn rank(&self) -> u32 {
        self.rank
    }

    /// Whether it leads an active epoch.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.active && self.leading()
    }

    /// Whether its epoch is active and its log is that of the leader.
    #[must_use]
    pub fn is_in_active_epoch(&self) -> bool {
        self.active && self.standing == Standing::Joined
    }

    /// How many things wait here: outputs for their commit, messages for their confirmation.
    #[must_use]
    pub fn waiting(&self) -> usize {
        let unconfirmed: usize = self.links.values().map(Link::unconfirmed).sum();
        self.held.len() + self.out.len() + self.batch.len() + unconfirmed
    }

    const fn topology(&self) -> &Topology {
        &self.settings.config.topology
    }

    fn leading(&self) -> bool {
        self.membership.as_ref().is_some_and(|membership| membership.leader == self.rank)
    }

    fn epoch(&self) -> Option<Epoch> {
        self.membership.as_ref().map(|membership| membership.epoch)
    }

    fn activity(&self) -> Activity {
        match self.standing {
            Standing::Outside | Standing::Broken => return Activity::Idle,
            Standing::Joining | Standing::Rewinding => return Activity::Joining,
            Standing::Joined if !self.obeying => return Activity::Joining,
            Standing::Joined => {}
        }
        match self.engine.view().lifecycle() {
            Lifecycle::Boot | Lifecycle::Loading | Lifecycle::Warm | Lifecycle::Recovering => {
                Activity::Loading
            }
            Lifecycle::Draining => Activity::Draining,
            Lifecycle::Active | Lifecycle::Reconfiguring
                if self.engine.view().requests().next().is_some() =>
            {
                Activity::Serving
            }
            Lifecycle::Active | Lifecycle::Reconfiguring | Lifecycle::Stopped => Activity::Idle,
        }
    }

    /// Sends a message that the link keeps until it is confirmed.
    fn send(&mut self, now: Time, to: u32, payload: Payload) {
        let retry_ns = self.settings.retry_ns;
        let header = self.links.entry(to).or_default().send(now, retry_ns, payload.clone());
        let membership = self.membership.as_ref().expect("messages are of an epoch");
        let message = message(membership, self.settings.member, to, header, Some(payload));
        self.out.push_back(PeerOutput::Send(message));
    }

    fn send_to_followers(&mut self, now: Time, payload: &Payload) {
        let joined: Vec<u32> =
            self.followers.iter().filter(|(_, durable)| durable.is_some()).map(|(&rank, _)| rank).collect();
        for rank in joined {
            self.send(now, rank, payload.clone());
        }
    }

    /// Takes a message if it is of this epoch and both lives, and the next of its link.
    fn message(&mut self, now: Time, message: Message) {
        let Message { epoch, from, to, link, payload } = message;
        let Some(membership) = &self.membership else { return };
        let Some(rank) = membership.rank_of(from) else { return };
        if epoch != membership.epoch || to != self.settings.member || self.standing == Standing::Broken {
            return;
        }
        let retry_ns = self.settings.retry_ns;
        if !self.links.entry(rank).or_default().receive(now, retry_ns, link) {
            return;
        }
        self.progress += u64::from(!self.obeying || plant::is(Bug::WishesAreProgress));
        let from_leader = rank == membership.leader;
        match payload {
            Some(Payload::Join { committed, digests }) => self.joining(rank, committed, digests),
            Some(Payload::Rewind { keep }) if from_leader => {
                self.standing = Standing::Rewinding;
                self.out.push_back(PeerOutput::Rewind { keep });
            }
            Some(Payload::Install { snapshot }) if from_leader => {
                self.standing = Standing::Rewinding;
                self.out.push_back(PeerOutput::Install(snapshot));
            }
            Some(Payload::Records { records, committed }) if from_leader => {
                self.follow(&records);
                self.committed_to(committed);
                if plant::is(Bug::AckUnflushed) {
                    self.send(now, rank, Payload::Durable { seq: end_of(&self.engine).last });
                }
            }
            Some(Payload::Committed { seq }) if from_leader => self.committed_to(seq),
            Some(Payload::Durable { seq }) => self.follower_durable(rank, seq),
            Some(Payload::Answer { input }) => self.answered(now, rank, *input),
            Some(Payload::Abort { step, attempt }) if from_leader => {
                self.out.push_back(PeerOutput::Obey(Output::Abort { step, attempt }));
            }
            Some(Payload::Data { tag, bytes }) => {
                self.out.push_back(PeerOutput::Data { from: rank, tag, bytes });
            }
            // A link delivers only what has something to say; and nobody but the leader says the rest.
            None
            | Some(
                Payload::Rewind { .. }
                | Payload::Install { .. }
                | Payload::Records { .. }
                | Payload::Committed { .. }
                | Payload::Abort { .. },
            ) => {}
        }
    }

    fn tick(&mut self, now: Time) {
        if self.leads() && self.obeying && self.engine_until.is_some_and(|until| until <= self.log_time(now))
        {
            self.order(now, Input::Tick);
        }
    }

    /// Sends again what was not confirmed, and confirmations that nothing else carried.
    fn confirm(&mut self, now: Time) {
        let Some(membership) = &self.membership else { return };
        self.again = None;
        for (&rank, link) in &mut self.links {
            let again = link.due(now, self.settings.retry_ns, |header, payload| {
                let message = message(membership, self.settings.member, rank, header, payload);
                self.out.push_back(PeerOutput::Send(message));
            });
            self.again = self.again.into_iter().chain(again).min();
        }
    }

    /// The time of the log, which goes on in every epoch where it stood, whatever the clock of its leader shows.
    const fn log_time(&self, now: Time) -> Time {
        let (own, log) = self.begun;
        log.after_ns(now.0.saturating_sub(own.0))
    }

    fn until(&self) -> Option<Time> {
        let (own, log) = self.begun;
        let engine =
            self.engine_until.filter(|_| self.leads()).map(|at| own.after_ns(at.0.saturating_sub(log.0)));
        self.again.into_iter().chain(engine).min()
    }
}

/// What a member says to a rank of its epoch.
fn message(
    membership: &Membership,
    from: Member,
    to: u32,
    link: LinkHeader,
    payload: Option<Payload>,
) -> Box<Message> {
    Box::new(Message { epoch: membership.epoch, from, to: membership.members[index(to)], link, payload })
}

fn end_of(engine: &Engine) -> LogEnd {
    LogEnd { last: Seq(engine.next_seq().0 - 1), digest: engine.digest() }
}
