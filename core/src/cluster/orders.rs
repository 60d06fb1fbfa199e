//! What nodes and supervisor tell each other. Both say their whole standing each time, so that a message that is lost,
//! doubled or late does no harm: the next one says it again.

use super::membership::{Epoch, Member, Membership};
use super::shards::{ShardOrders, ShardStanding};
use crate::digest::Digest;
use crate::ids::{Incarnation, Seq};
use crate::time::Time;
use alloc::boxed::Box;
use alloc::string::String;
use serde::{Deserialize, Serialize};

/// What must be the same on every node of a cluster.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// Version of the numeric contract.
    pub contract: u32,
    /// Version of the fold.
    pub logic: u32,
    /// Digest of the checkpoint's identity and plan.
    pub model: Digest,
    /// Digest of the configuration, the topology and the routing seed in it.
    pub config: Digest,
}

/// Where the log of a node ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct LogEnd {
    /// The last record.
    pub last: Seq,
    /// Digest before the next record.
    pub digest: Digest,
}

/// What a node is doing, as far as its patience with it goes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Activity {
    /// Nothing that must progress.
    #[default]
    Idle,
    /// The boot sequence, loads of parameters: slow, and no hang.
    Loading,
    /// Bringing its log to that of its leader.
    Joining,
    /// Steps.
    Serving,
    /// Finishing what is there.
    Draining,
}

/// A heartbeat, with all that the supervisor has to know of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Beat {
    /// Whose.
    pub member: Member,
    /// When it was sent, by the node's own clock: comes back with a lease.
    pub sent: Time,
    /// What must be the same everywhere.
    pub facts: Facts,
    /// Where its log ends.
    pub log: LogEnd,
    /// Its journal's tail was torn when it was opened, and it has not been in an active epoch since: some of what it had may be
    /// gone.
    pub torn: bool,
    /// The life that began its journal, on an empty disk: what its node was told before, another disk had.
    pub began: Incarnation,
    /// Up to where it knows every member of its epoch to have the log durable.
    pub committed: Seq,
    /// The newest epoch that it has joined; 0 for none.
    pub epoch: Epoch,
    /// It leads the epoch, and the logs of all members are as its own.
    pub synced: bool,
    /// What it is doing.
    pub activity: Activity,
    /// Grows while it gets anything done. Counted apart from beats, which a hang does not stop.
    pub progress: u64,
    /// Ranks whose results are not those of the others, if the leader has found any: bit n is rank n.
    pub diverged: u64,
    /// It has drained and let go of everything.
    pub drained: bool,
    /// Shards of an optimizer, if it keeps any.
    pub shards: Option<Box<ShardStanding>>,
}

/// The right to accept requests and to tell tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// [`Beat::sent`] of the beat that it answers: it begins there, by the node's clock.
    pub sent: Time,
    /// For how long, in nanoseconds of a clock that keeps the stated drift.
    pub length_ns: u64,
}

/// What the supervisor answers to a beat, or says when something has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Orders {
    /// To whom.
    pub to: Member,
    /// The newest membership that it belongs to.
    pub membership: Option<Membership>,
    /// Whether that epoch is active: its leader may begin.
    pub active: bool,
    /// For the leader of an active epoch.
    pub lease: Option<Lease>,
    /// Accept nothing more, finish within these nanoseconds if any, stop.
    pub drain: Option<Option<u64>>,
    /// It may not take part, and why: it should end.
    pub refused: Option<String>,
    /// For its keeper of shards, if it has one.
    pub shards: Option<Box<ShardOrders>>,
}
