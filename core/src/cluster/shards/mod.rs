//! The state of an optimizer, as far as a cluster has to know it: a version, a shard of it on each rank, and the bytes of
//! each shard, which only the trainer understands.
//!
//! Replicas that train the same model step together: each version is computed by every replica, and rank `n` of one has the
//! very bytes that rank `n` of any other has. So whoever lost a shard gets it from another replica; and only if none has it,
//! all go back to the newest checkpoint of which every shard is whole somewhere. The supervisor decides that from what nodes
//! say to have verified (`crate::cluster::supervisor`), and a [`Keeper`] on each node carries it out.

mod keeper;

pub use keeper::{Keeper, KeeperInput, KeeperOutput};

use super::membership::Member;
use crate::digest::Digest;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// The name of a shard's content: which, how new, and the digest of its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Stamp {
    /// The rank that has it, in every replica.
    pub shard: u32,
    /// Grows by one with every update; 0 is the state that training begins with.
    pub version: u64,
    /// Of its bytes.
    pub digest: Digest,
}

/// What a node says of its shards, with each beat.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardStanding {
    /// [`ShardOrders::round`] of the orders that it obeys; 0 before any came.
    pub round: u64,
    /// In memory.
    pub held: Vec<Stamp>,
    /// On its disk, each read and verified in this life; `None` until all of them were.
    pub stored: Option<Vec<Stamp>>,
    /// Who gave it bytes that were not those of their stamp.
    pub accused: Option<(Member, Stamp)>,
}

/// A shard that a node is to have in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Want {
    /// Which.
    pub shard: u32,
    /// How new.
    pub version: u64,
    /// Of what bytes; `None` of version 0, which every rank makes by itself.
    pub digest: Option<Digest>,
    /// Who has it, if this node has it neither in memory nor on disk.
    pub from: Option<Member>,
}

/// What a node is told of its shards: all of it, each time.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardOrders {
    /// Grows with every decision: older orders are not heard.
    pub round: u64,
    /// The shard of its rank, if it has one.
    pub own: Option<u32>,
    /// What it is to have in memory. Anything else may go, but the version that is being computed.
    pub hold: Vec<Want>,
    /// Compute this version of its own shard, from the one before it.
    pub next: Option<u64>,
    /// Write this version of its own shard to disk.
    pub store: Option<u64>,
    /// Versions that stay on disk.
    pub keep: Vec<u64>,
}

/// What nodes tell each other of shards.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShardMessage {
    /// Whose.
    pub from: Member,
    /// To whom.
    pub to: Member,
    /// What.
    pub what: ShardWord,
}

/// What a [`ShardMessage`] says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum ShardWord {
    /// Give me the bytes of this shard from there on.
    Ask {
        /// Which.
        stamp: Stamp,
        /// From which byte on.
        offset: u64,
    },
    /// Some of them.
    Part {
        /// Of which shard.
        stamp: Stamp,
        /// Where they begin.
        offset: u64,
        /// How many the shard has.
        total: u64,
        /// They.
        bytes: Vec<u8>,
    },
}
