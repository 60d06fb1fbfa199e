//! Everything that can happen to a supervisor, and everything that it asks for or says. The encoding of inputs is the format of
//! its journal.

use super::config::ClusterConfig;
use super::detector::Suspicion;
use crate::cluster::membership::{Epoch, Member, Membership, NodeId};
use crate::cluster::orders::{Beat, LogEnd, Orders};
use crate::digest::Digest;
use crate::ids::{Incarnation, Seq};
use crate::time::Time;
use alloc::boxed::Box;
use alloc::{string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// How a process ended, as the one who waited for it knows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// It stopped by itself, with nothing wrong.
    Clean,
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// With a panic while it handled this record: the same would come again.
    Panic {
        /// Which record.
        record: Seq,
    },
    /// It is gone, and nobody knows how.
    Unknown,
}

/// Why a life ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Cause {
    /// Its process ended.
    Ended(Ending),
    /// It never beat.
    NeverHeard,
    /// The detector suspected it.
    Suspected(Suspicion),
    /// Its results were not those of the other ranks.
    Diverged,
    /// It is not what the cluster needs, and why.
    Refused(String),
    /// The operator wished it.
    Operator,
    /// The cluster drains, and has no need of it any more.
    Drained,
}

/// The end of a life, recorded before the next one begins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    /// Whose.
    pub member: Member,
    /// When it was certain, by the supervisor's clock.
    pub at: Time,
    /// Why.
    pub cause: Cause,
    /// The epoch that it last took part in; 0 for none.
    pub epoch: Epoch,
    /// The durable end of its log, as it last said.
    pub log: LogEnd,
}

/// Something that happened.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SupervisorInput {
    /// A life of the supervisor begins; the first input of each.
    Started {
        /// Grows with every life.
        incarnation: Incarnation,
        /// How the cluster is run from now on.
        config: ClusterConfig,
    },
    /// A node tells how it stands.
    Beat(Box<Beat>),
    /// The process of a member has certainly ended, after `Kill` or by itself.
    Ended {
        /// Whose.
        member: Member,
        /// How.
        ending: Ending,
    },
    /// Answers `Capture`.
    Captured {
        /// Whose log.
        member: Member,
        /// The last record of it, or why it cannot be read.
        tail: Result<Option<Seq>, String>,
    },
    /// The operator wishes a node to begin a new life, whatever its budget.
    Restart {
        /// Which.
        node: NodeId,
    },
    /// The operator wishes everything to finish and stop.
    Drain {
        /// Within so many nanoseconds; what is unfinished then stays in the journals.
        bound_ns: Option<u64>,
    },
    /// The time of `Wait` has come.
    Tick,
}

/// For telemetry and people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SupervisorEvent {
    /// A life ended.
    Failed(Failure),
    /// What was captured of its log.
    Captured {
        /// Whose.
        member: Member,
        /// The last record, or why there is none.
        tail: Result<Option<Seq>, String>,
    },
    /// A replica has new members.
    Adopted(Membership),
    /// Their logs are one; it begins.
    Activated(Epoch),
    /// A replica cannot go on until one of these nodes is back, or all, if the tail of each log was torn: only their disks hold
    /// what was told.
    Waiting {
        /// Which replica.
        replica: u32,
        /// Whose disks.
        nodes: Vec<NodeId>,
    },
    /// A node is not started again, and why.
    GaveUp {
        /// Which.
        node: NodeId,
        /// Why, and what the operator can do.
        reason: String,
    },
    /// Every rank of every replica has this version of its shard, and the same shards have the same bytes.
    Trained {
        /// Which.
        version: u64,
    },
    /// Every rank has this version on its disk too.
    Sealed {
        /// Which.
        version: u64,
    },
    /// All go on from this version, the newest of which every shard is whole somewhere.
    Restored {
        /// Which.
        version: u64,
        /// The version that they had.
        from: u64,
        /// The newest that all of them had on disk: above `version` only if disks have lost it.
        sealed: u64,
    },
    /// All would have to go back further than what they had on disk: these nodes have not said what is on theirs.
    ShardsMissed {
        /// Whose disks.
        nodes: Vec<NodeId>,
    },
    /// Ranks that should have the same bytes do not. The version is computed again, and no further after a third time.
    ShardsDiffer {
        /// Of which shard.
        shard: u32,
        /// Of which version.
        version: u64,
    },
    /// A replica has finished everything and stopped.
    Drained {
        /// Which replica.
        replica: u32,
    },
    /// Digest of the whole state, every few thousand inputs.
    State {
        /// It.
        digest: Digest,
    },
}

/// Something to do or to tell. Whatever has `after` may happen only when the supervisor's journal is durable up to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum SupervisorOutput {
    /// Carry orders to a node, or lose them.
    Orders {
        /// To whom, and what.
        orders: Box<Orders>,
        /// The decision that they rest on.
        after: Seq,
    },
    /// Start a node's process with this incarnation. One that runs already is left alone.
    Start {
        /// Which node, in which life.
        member: Member,
        /// Durable before it may happen: no incarnation is ever used twice.
        after: Seq,
    },
    /// End a process; `Ended` follows once it is certain, also if there was none.
    Kill {
        /// Whose.
        member: Member,
        /// Why.
        cause: Cause,
        /// Durable before it may happen.
        after: Seq,
    },
    /// Write the failure down and keep the tail of the node's log beside it; `Captured` answers.
    Capture {
        /// What is known.
        failure: Failure,
        /// Durable before it may happen.
        after: Seq,
    },
    /// For telemetry.
    Event {
        /// The input that it belongs to.
        seq: Seq,
        /// What.
        event: SupervisorEvent,
    },
    /// Stop: nothing is left to supervise.
    Exit {
        /// `None` after a clean drain.
        error: Option<String>,
        /// Durable before it may happen.
        after: Seq,
    },
    /// Nothing more to do until an input comes, or this time. Never digested.
    Wait {
        /// When to give a `Tick`.
        until: Option<Time>,
    },
}

impl SupervisorOutput {
    /// The input that has to be durable before this may happen; `None` of the mere wait.
    #[must_use]
    pub const fn after(&self) -> Option<Seq> {
        match self {
            Self::Orders { after, .. }
            | Self::Start { after, .. }
            | Self::Kill { after, .. }
            | Self::Capture { after, .. }
            | Self::Exit { after, .. } => Some(*after),
            Self::Event { seq, .. } => Some(*seq),
            Self::Wait { .. } => None,
        }
    }
}
