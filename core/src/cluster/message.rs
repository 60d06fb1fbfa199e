//! What the members of an epoch tell each other.

use super::link::LinkHeader;
use super::membership::{Epoch, Member};
use crate::digest::Digest;
use crate::ids::{Seq, StepId};
use crate::input::Input;
use crate::journal::{Record, Snapshot};
use alloc::boxed::Box;
use alloc::sync::Arc;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// A message between two members. One of another epoch, or of another life, is not heard.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// In which epoch.
    pub epoch: Epoch,
    /// Whose.
    pub from: Member,
    /// To whom.
    pub to: Member,
    /// Its place in their conversation.
    pub link: LinkHeader,
    /// What it says; nothing if it only confirms.
    pub payload: Option<Payload>,
}

/// Which exchange of a step some data belong to. Tags of one attempt grow in the order in which its ranks exchange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Tag {
    /// Of which step.
    pub step: StepId,
    /// Of which attempt.
    pub attempt: u32,
    /// Which exchange, counted from 0.
    pub exchange: u32,
}

/// What a message says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Payload {
    /// To the leader: where my log ends, and up to where I know it to be committed.
    Join {
        /// The last record that is known to be committed: it is in every member's log.
        committed: Seq,
        /// Digests before each record after that one, and at the end of the log.
        digests: Vec<Digest>,
    },
    /// From the leader: cut your log after this record, the last that we have in common, and join again.
    Rewind {
        /// The last record that stays.
        keep: Seq,
    },
    /// From the leader: my log begins after yours ends; take this in its place, and join again.
    Install {
        /// The state that my log begins with.
        snapshot: Snapshot,
    },
    /// From the leader: the next records.
    Records {
        /// In order, without gaps; shared by all to whom they go, and kept until each has them.
        records: Arc<[Record]>,
        /// Up to here all members have them.
        committed: Seq,
    },
    /// To the leader: my log is durable up to here.
    Durable {
        /// The last durable record.
        seq: Seq,
    },
    /// From the leader: all members have the records up to here.
    Committed {
        /// The last of them.
        seq: Seq,
    },
    /// To the leader: I have done, or could not do, what an output asked of me.
    Answer {
        /// What I would tell an engine of my own.
        input: Box<Input>,
    },
    /// From the leader: some rank cannot go on with this attempt; give it up.
    Abort {
        /// Which step.
        step: StepId,
        /// Which attempt.
        attempt: u32,
    },
    /// Between any two ranks: activations, in the bytes of the compute backends.
    Data {
        /// Which exchange.
        tag: Tag,
        /// What is exchanged.
        bytes: Vec<u8>,
    },
}
