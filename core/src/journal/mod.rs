//! The journal: the list of inputs on disk, of which the state is a fold.
//!
//! [`frame`] is the byte format, [`recovery`] reads it back and tells a torn tail from damage, [`store`] writes it.
//! Payloads are opaque here. `docs/journal.md` draws the layout and tables the recovery cases.

pub mod frame;
pub mod recovery;
pub mod store;

use alloc::string::String;
use alloc::vec::Vec;

use crate::disk::DiskError;
use serde::{Deserialize, Serialize};

pub use recovery::{Cut, Scanned, SegmentInfo, scan};
pub use store::{Recovered, Store};

/// What a journal is of. It is written into every segment and snapshot, and compared when they are opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// The version of the fold: a core that would fold the same records differently has another one.
    pub logic_version: u32,
    /// The node whose inputs these are.
    pub node: u32,
    /// The writer's incarnation; it never falls from one opening to the next.
    pub incarnation: u64,
    /// Digest of everything that decides the bits of the output (contract, weights, seed, KV type, tokenizer, ..).
    pub identity: [u8; 32],
}

/// Input number `seq`, as it was journalled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The record's number; the first is 1.
    pub seq: u64,
    /// The input's time in nanoseconds.
    pub time_ns: u64,
    /// The digest before this input was handled.
    pub digest: [u8; 32],
    /// The encoded input.
    pub payload: Vec<u8>,
}

/// The state after every record below `next`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    /// The first record that is not in it.
    pub next: u64,
    /// The digest before record `next`.
    pub digest: [u8; 32],
    /// The logic version that wrote it. Snapshots migrate, so another version is handed out, not refused.
    pub logic_version: u32,
    /// The encoded state.
    pub bytes: Vec<u8>,
}

/// Why a journal cannot be opened, read or written.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    /// The disk failed.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// Bytes that were durable are wrong.
    #[error(
        "the journal is damaged: {file}, byte {offset}, record {seq}: {what}. These bytes had been synced, so this is \
         no torn write; restore the state directory from a copy, or start with an empty one"
    )]
    Damage {
        /// The segment or snapshot.
        file: String,
        /// Where in it, in bytes.
        offset: u64,
        /// The first record that is lost.
        seq: u64,
        /// What is wrong there.
        what: &'static str,
    },
    /// Records that were durable are in no file.
    #[error(
        "the journal is damaged: records {from} to {to} are in no file. Restore the missing segments, or start with \
         an empty state directory"
    )]
    Missing {
        /// The first missing record.
        from: u64,
        /// The last missing record.
        to: u64,
    },
    /// The file's layout is of a version that this program does not read.
    #[error(
        "{file} has format version {found}, this program reads version {supported}; use the version that wrote it"
    )]
    Format {
        /// The segment or snapshot.
        file: String,
        /// The version found.
        found: u32,
        /// The version read here.
        supported: u32,
    },
    /// The records are of another model, seed, KV type, ..
    #[error(
        "{file} is of another identity ({}.. there, {}.. here): other weights, tokenizer, seed or numeric settings. \
         Start with those it was written with, or with another state directory", Short(.found), Short(.expected)
    )]
    Identity {
        /// The segment or snapshot.
        file: String,
        /// The identity found.
        found: [u8; 32],
        /// The identity asked for.
        expected: [u8; 32],
    },
    /// The records would be folded differently.
    #[error(
        "{file} holds records of logic version {found}, this program folds version {expected}. Snapshots migrate, \
         journals do not: drain with the version that wrote it, let it write a snapshot, then start this one"
    )]
    Logic {
        /// The segment.
        file: String,
        /// The version found.
        found: u32,
        /// The version folded here.
        expected: u32,
    },
    /// The records are another node's.
    #[error(
        "{file} is of node {found}, this is node {expected}; give each node a state directory of its own"
    )]
    Node {
        /// The segment or snapshot.
        file: String,
        /// The node found.
        found: u32,
        /// This node.
        expected: u32,
    },
    /// A newer incarnation has already written here.
    #[error(
        "{file} was written by incarnation {found}, this is the older incarnation {expected}: it was replaced"
    )]
    Incarnation {
        /// The segment or snapshot.
        file: String,
        /// The incarnation found.
        found: u64,
        /// This incarnation.
        expected: u64,
    },
    /// An earlier write or sync failed; what is on disk is unknown until the journal is opened again.
    #[error("an earlier write to the journal failed; nothing more is written until it is opened again")]
    Poisoned,
    /// A record, or what is buffered, is above its bound.
    #[error("{bytes} bytes are above the journal's bound of {max}; flush more often or send smaller inputs")]
    TooLarge {
        /// The size asked for.
        bytes: u64,
        /// The bound.
        max: u64,
    },
    /// A record or a snapshot came with the wrong number.
    #[error("record {found} came where record {expected} was due")]
    OutOfOrder {
        /// The number that was due.
        expected: u64,
        /// The number given.
        found: u64,
    },
}

/// The first bytes of a digest, for people.
struct Short<'a>(&'a [u8; 32]);

impl core::fmt::Display for Short<'_> {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        self.0.iter().take(6).try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}
