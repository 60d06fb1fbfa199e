//! What a node does about its shards: has in memory what it is ordered to have, from wherever it is to be had; computes the
//! next version; writes checkpoints.
//!
//! The door is that of the other machines: an input with its time, then outputs until `Wait`. The driver has the bytes, this
//! has their stamps. Nothing here outlives the process; what is on disk is verified again in each life, before anything is
//! decided.

use super::{ShardMessage, ShardOrders, ShardStanding, ShardWord, Stamp, Want};
use crate::cluster::membership::Member;
use crate::time::Time;
use alloc::collections::{BTreeSet, VecDeque};
use alloc::vec::Vec;

/// What happens to the shards of a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeeperInput {
    /// What is on disk, all of it verified; the first input of a life.
    Found(Vec<Stamp>),
    /// The supervisor says how things stand.
    Orders(ShardOrders),
    /// A node says something.
    Message(ShardMessage),
    /// Answers `Begin`, `Load`, `Check` and `Compute`: it is in memory.
    Made(Stamp),
    /// Answers `Load`: the copy on disk is not what it was.
    Damaged(Stamp),
    /// Answers `Check`: what came has another digest.
    Wrong(Stamp),
    /// Answers `Store`: it is on disk, durable.
    Stored(Stamp),
    /// Answers `Store`: it is not, and may be tried again.
    NotStored(Stamp),
    /// The time of `Wait` has come.
    Tick,
}

/// What a keeper asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum KeeperOutput {
    /// Make version 0 of this shard.
    Begin {
        /// Which.
        shard: u32,
    },
    /// Read this from disk into memory, and verify it.
    Load(Stamp),
    /// Compute the next version of this, which stays.
    Compute(Stamp),
    /// Bytes of a shard that come from another node: they follow those that came before, or are the first.
    Put {
        /// Where they begin.
        offset: u64,
        /// They.
        bytes: Vec<u8>,
    },
    /// All bytes of this have come: have it in memory, if its digest is right.
    Check(Stamp),
    /// Answer a node with the bytes of this from an offset on, as many as go into one message.
    Serve {
        /// Whom.
        to: Member,
        /// Which.
        stamp: Stamp,
        /// From where on.
        offset: u64,
    },
    /// Carry a message, or lose it.
    Send(ShardMessage),
    /// Write this to disk.
    Store(Stamp),
    /// Let go of this in memory.
    Drop(Stamp),
    /// Let go of this on disk.
    Remove(Stamp),
    /// Nothing more to do until an input comes, or this time.
    Wait {
        /// When to give a `Tick`.
        until: Option<Time>,
    },
}

/// What is under way, one thing at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Job {
    /// The driver makes a shard, in one way or another.
    Make { shard: u32, version: u64 },
    /// Bytes of a shard come from another node; it is asked again then.
    Fetch { from: Member, stamp: Stamp, offset: u64, again: Time },
    /// The driver writes.
    Store(Stamp),
}

/// The shards of a node.
#[derive(Clone, Debug)]
pub struct Keeper {
    member: Member,
    /// Nanoseconds after which an unanswered question is asked again.
    retry_ns: u64,
    orders: ShardOrders,
    held: BTreeSet<Stamp>,
    stored: Option<BTreeSet<Stamp>>,
    accused: Option<(Member, Stamp)>,
    job: Option<Job>,
    out: VecDeque<KeeperOutput>,
}

impl Keeper {
    /// The keeper of a life that begins.
    #[must_use]
    pub const fn new(member: Member, retry_ns: u64) -> Self {
        Self {
            member,
            retry_ns,
            orders: ShardOrders {
                round: 0,
                own: None,
                hold: Vec::new(),
                next: None,
                store: None,
                keep: Vec::new(),
            },
            held: BTreeSet::new(),
            stored: None,
            accused: None,
            job: None,
            out: VecDeque::new(),
        }
    }

    /// Handles an input. What it brings about comes out of [`poll`](Self::poll).
    ///
    /// # Panics
    /// If the outputs of the input before were not drained.
    pub fn handle(&mut self, now: Time, input: KeeperInput) {
        assert!(self.out.is_empty(), "the outputs of one input are drained before the next");
        match input {
            KeeperInput::Found(stamps) => self.stored = Some(stamps.into_iter().collect()),
            KeeperInput::Orders(orders) if orders.round > self.orders.round => self.obey(orders),
            KeeperInput::Orders(_) => {}
            KeeperInput::Message(message) => self.hear(now, message),
            KeeperInput::Made(stamp) => self.made(stamp),
            KeeperInput::Damaged(stamp) => {
                self.stored_mut(|stored| stored.remove(&stamp));
                self.over(stamp);
            }
            KeeperInput::Wrong(stamp) => {
                let giver = self.orders.hold.iter().find(|want| is(want, &stamp)).and_then(|want| want.from);
                self.accused = giver.map(|giver| (giver, stamp));
                self.over(stamp);
            }
            KeeperInput::Stored(stamp) => {
                self.stored_mut(|stored| stored.insert(stamp));
                self.over(stamp);
                self.tidy();
            }
            KeeperInput::NotStored(stamp) => self.over(stamp),
            KeeperInput::Tick => self.ask_again(now),
        }
        self.go_on(now);
    }

    /// The next output; [`KeeperOutput::Wait`] when there is none.
    pub fn poll(&mut self) -> KeeperOutput {
        let until = match &self.job {
            Some(Job::Fetch { again, .. }) => Some(*again),
            Some(Job::Make { .. } | Job::Store(_)) | None => None,
        };
        self.out.pop_front().unwrap_or(KeeperOutput::Wait { until })
    }

    /// What the supervisor is to know.
    #[must_use]
    pub fn standing(&self) -> ShardStanding {
        ShardStanding {
            round: self.orders.round,
            held: self.held.iter().copied().collect(),
            stored: self.stored.as_ref().map(|stored| stored.iter().copied().collect()),
            accused: self.accused,
        }
    }

    fn stored_mut(&mut self, act: impl FnOnce(&mut BTreeSet<Stamp>) -> bool) {
        if let Some(stored) = &mut self.stored {
            act(stored);
        }
    }

    fn obey(&mut self, orders: ShardOrders) {
        self.orders = orders;
        self.accused = None;
        let wanted = |stamp: &Stamp| self.orders.hold.iter().any(|want| is(want, stamp));
        // What is here, or can be made, does not wait for others: they may wait for it.
        let fetches = matches!(&self.job, Some(Job::Fetch { from, stamp, .. })
            if self.lacks().is_none_or(|want| !is(&want, stamp) || want.from != Some(*from)));
        if fetches {
            self.job = None;
        }
        let next = self.orders.next;
        let (stay, go) = self.held.iter().partition(|stamp| wanted(stamp) || Some(stamp.version) == next);
        self.held = stay;
        let go: BTreeSet<Stamp> = go;
        self.out.extend(go.into_iter().map(KeeperOutput::Drop));
        self.tidy();
    }

    /// Removes from the disk what need not stay there.
    fn tidy(&mut self) {
        let Some(stored) = &mut self.stored else { return };
        let (keep, store) = (&self.orders.keep, self.orders.store);
        let go = |stamp: &Stamp| !keep.contains(&stamp.version) && store != Some(stamp.version);
        // Without orders nobody knows what is needed.
        if self.orders.round == 0 {
            return;
        }
        let gone: Vec<Stamp> = stored.iter().filter(|stamp| go(stamp)).copied().collect();
        for stamp in gone {
            stored.remove(&stamp);
            self.out.push_back(KeeperOutput::Remove(stamp));
        }
    }

    fn made(&mut self, stamp: Stamp) {
        self.over(stamp);
        let wanted = self.orders.hold.iter().any(|want| is(want, &stamp));
        if wanted || self.orders.next == Some(stamp.version) {
            self.held.insert(stamp);
        } else {
            self.out.push_back(KeeperOutput::Drop(stamp));
        }
    }

    /// The driver has answered.
    fn over(&mut self, of: Stamp) {
        let is_over = match &self.job {
            Some(Job::Make { shard, version }) => (*shard, *version) == (of.shard, of.version),
            Some(Job::Store(stamp)) => *stamp == of,
            Some(Job::Fetch { .. }) | None => false,
        };
        if is_over {
            self.job = None;
        }
    }

    fn hear(&mut self, now: Time, message: ShardMessage) {
        if message.to != self.member {
            return;
        }
        match message.what {
            ShardWord::Ask { stamp, offset } => {
                if self.held.contains(&stamp) {
                    self.out.push_back(KeeperOutput::Serve { to: message.from, stamp, offset });
                }
            }
            ShardWord::Part { stamp, offset, total, bytes } => {
                let Some(Job::Fetch { from, stamp: mine, offset: at, again }) = &mut self.job else { return };
                let end = offset.saturating_add(bytes.len() as u64);
                let fits = message.from == *from && stamp == *mine && offset == *at && end <= total;
                if !fits || (bytes.is_empty() && end < total) {
                    return;
                }
                self.out.push_back(KeeperOutput::Put { offset, bytes });
                (*at, *again) = (end, now);
                if end == total {
                    self.job = Some(Job::Make { shard: stamp.shard, version: stamp.version });
                    self.out.push_back(KeeperOutput::Check(stamp));
                } else {
                    self.ask_again(now);
                }
            }
        }
    }

    fn ask_again(&mut self, now: Time) {
        let Some(Job::Fetch { from, stamp, offset, again }) = &mut self.job else { return };
        if *again > now {
            return;
        }
        *again = now.after_ns(self.retry_ns);
        let what = ShardWord::Ask { stamp: *stamp, offset: *offset };
        self.out.push_back(KeeperOutput::Send(ShardMessage { from: self.member, to: *from, what }));
    }

    /// What is to be had next, if anything: first what is on disk or can be made, then what has to come from others.
    fn lacks(&self) -> Option<Want> {
        let has = |want: &Want| self.held.iter().any(|stamp| is(want, stamp));
        let here =
            |want: &Want| want.digest.is_none() || self.stored.iter().flatten().any(|stamp| is(want, stamp));
        let lacking = || self.orders.hold.iter().filter(|want| !has(want)).copied();
        lacking().find(here).or_else(|| lacking().next())
    }

    /// Begins the next thing that is to be done.
    fn go_on(&mut self, now: Time) {
        let Some(stored) = self.stored.as_ref().filter(|_| self.job.is_none()) else { return };
        let lacks = self.lacks();
        let own = |version: u64| {
            let mine = |stamp: &&Stamp| (Some(stamp.shard), stamp.version) == (self.orders.own, version);
            self.held.iter().find(mine).copied()
        };
        if let Some(Want { shard, version, digest, from }) = lacks {
            let make = Job::Make { shard, version };
            let Some(digest) = digest else {
                self.job = Some(make);
                return self.out.push_back(KeeperOutput::Begin { shard });
            };
            let stamp = Stamp { shard, version, digest };
            if stored.contains(&stamp) {
                self.job = Some(make);
                self.out.push_back(KeeperOutput::Load(stamp));
            } else if let Some(from) = from.filter(|_| self.accused.is_none_or(|(_, which)| which != stamp)) {
                self.job = Some(Job::Fetch { from, stamp, offset: 0, again: now });
                self.ask_again(now);
            }
        } else if let Some(stamp) = self.orders.store.and_then(own).filter(|stamp| !stored.contains(stamp)) {
            self.job = Some(Job::Store(stamp));
            self.out.push_back(KeeperOutput::Store(stamp));
        } else if let Some(next) = self.orders.next
            && own(next).is_none()
            && let Some(before) = next.checked_sub(1).and_then(own)
        {
            self.job = Some(Job::Make { shard: before.shard, version: next });
            self.out.push_back(KeeperOutput::Compute(before));
        }
    }
}

/// Whether a stamp is what is wanted.
fn is(want: &Want, stamp: &Stamp) -> bool {
    (want.shard, want.version) == (stamp.shard, stamp.version)
        && want.digest.is_none_or(|digest| digest == stamp.digest)
}
