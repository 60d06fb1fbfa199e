//! Everything that can happen to an engine. The journal is a list of these, so the order of variants and fields is a
//! file format: change it only with [`LOGIC_VERSION`](crate::LOGIC_VERSION).

use crate::config::Config;
use crate::digest::Digest;
use crate::ids::{ExpertKey, Incarnation, LoadId, RequestId, Seq, StepId, WishId};
use crate::plan::ModelPlan;
use alloc::{boxed::Box, string::String, vec::Vec};
use core::fmt;
use serde::{Deserialize, Serialize};

pub use crate::body::{Body, Priority, Sampling};

/// Why something did not work. A fault is an input, never a panic.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Fault {
    /// Reading or writing failed.
    Io(String),
    /// Bytes do not have their checksum.
    Corrupt(String),
    /// A resource could not be had.
    Resource(String),
    /// The compute device failed.
    Device(String),
    /// NaN or infinity in the logits or router scores.
    NonFinite {
        /// The row of the step.
        row: u32,
        /// Decoder layer; the number of layers stands for the logits.
        layer: u32,
        /// Position in the sequence.
        position: u32,
    },
    /// The checkpoint is not what it should be.
    Checkpoint(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Io(what) => write!(f, "input/output error: {what}"),
            Self::Corrupt(what) => write!(f, "corrupt data: {what}"),
            Self::Resource(what) | Self::Checkpoint(what) => f.write_str(what),
            Self::Device(what) => write!(f, "device error: {what}"),
            Self::NonFinite { row, layer, position } => {
                write!(f, "NaN or infinity in row {row}, layer {layer}, position {position}")
            }
        }
    }
}

/// The result of one row of a step.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RowResult {
    /// The chosen token, if the row was to sample.
    pub token: Option<u32>,
    /// Whether the text up to this token ends in a stop sequence.
    pub stop: bool,
    /// Digest of the row's routes, hidden states and logits.
    pub digest: Digest,
}

/// Which tiers to serve from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum SwitchTarget {
    /// These, by name.
    Tiers(Vec<String>),
    /// A mode of the configuration.
    Mode(String),
    /// The mode with the most experts whose measured cost of one step stays within these nanoseconds.
    Budget(u64),
}

/// What an operator wishes of a replica; each is done once, however often it is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wish {
    /// As [`Input::Switch`].
    Switch {
        /// Which tiers.
        target: SwitchTarget,
        /// The first position of a request that they compute; at the next step boundary if `None`.
        at: Option<(RequestId, u32)>,
    },
    /// As [`Input::Cancel`].
    Cancel {
        /// Which request.
        id: RequestId,
    },
    /// A snapshot that is durable on every rank.
    Snapshot,
}

/// Something that happened. What is large and rare is boxed: inputs are moved often.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Input {
    /// The first input of a journal.
    Boot {
        /// This process's life.
        incarnation: Incarnation,
        /// What the operator decided.
        config: Box<Config>,
        /// A random number of the driver's.
        entropy: u64,
    },
    /// The first input after the fold of a recovered journal: all that was volatile is gone.
    Restarted {
        /// This process's life, greater than any before.
        incarnation: Incarnation,
        /// What the operator decides now. The routing seed and the active TierSet stay what they were.
        config: Box<Config>,
        /// A random number of the driver's, for a journal whose boot never got as far as a routing seed.
        entropy: u64,
    },
    /// `Reserve` was obeyed.
    Reserved,
    /// `ReadManifest` was obeyed.
    ManifestRead {
        /// What the checkpoint holds.
        plan: Box<ModelPlan>,
    },
    /// `LoadBase` was obeyed, checksums verified.
    BaseLoaded {
        /// Index into [`ModelPlan::base_shards`].
        shard: u32,
    },
    /// `LoadRouters` was obeyed, checksums verified.
    RoutersLoaded,
    /// A step of the boot sequence cannot be done.
    BootFailed {
        /// Why.
        fault: Fault,
    },
    /// `Load` or `Stage` was obeyed: the expert is in its slot, its checksum verified. Or it is not, and there may be
    /// anything in the slots that the load was given.
    Loaded {
        /// Which load.
        load: LoadId,
        /// Why not.
        fault: Option<Fault>,
    },
    /// A client's request, or its second attempt.
    Submit {
        /// Idempotency key.
        id: RequestId,
        /// What is asked for.
        body: Box<Body>,
        /// The token offset from which an existing stream is sent again.
        from: u32,
    },
    /// A client no longer wants it.
    Cancel {
        /// Which request.
        id: RequestId,
    },
    /// Serve from other tiers.
    Switch {
        /// Which.
        target: SwitchTarget,
        /// The first position of a request that the new tiers compute; at the next step boundary if `None`.
        at: Option<(RequestId, u32)>,
    },
    /// Accept nothing more, finish what is there, stop.
    Drain {
        /// Nanoseconds after which what is unfinished stays in the journal.
        bound_ns: Option<u64>,
    },
    /// Take a snapshot.
    SnapshotWanted,
    /// A snapshot is durable.
    SnapshotDurable {
        /// The first input that it does not hold.
        next: Seq,
    },
    /// A layer's router has chosen.
    Need {
        /// Of which step.
        step: StepId,
        /// Of which attempt.
        attempt: u32,
        /// Which layer.
        layer: u32,
        /// Distinct, ascending.
        experts: Vec<ExpertKey>,
        /// What the next mixture layer will probably choose, if the step was to foresee it: distinct, the likeliest
        /// first.
        foreseen: Vec<ExpertKey>,
    },
    /// The last read of a wave's slots is over.
    Released {
        /// Of which step.
        step: StepId,
        /// Of which attempt.
        attempt: u32,
        /// Which layer.
        layer: u32,
        /// Which wave.
        wave: u32,
    },
    /// A step is done.
    Finished {
        /// Which.
        step: StepId,
        /// Which attempt.
        attempt: u32,
        /// One for each row.
        rows: Vec<RowResult>,
        /// Measured duration, in nanoseconds.
        duration_ns: u64,
    },
    /// A step failed as a whole.
    Failed {
        /// Which.
        step: StepId,
        /// Which attempt.
        attempt: u32,
        /// Why.
        fault: Fault,
    },
    /// The time of `Wait` has come.
    Tick,
    /// `FlushTelemetry` was obeyed.
    TelemetryFlushed,
    /// `Release` was obeyed.
    ResourcesReleased,
    /// Experts have new parameters, which the driver holds under these digests.
    Modify {
        /// Which experts, and the digest of each one's new bytes.
        experts: Vec<(ExpertKey, Digest)>,
    },
    /// `Persist` was obeyed, or cannot be.
    Persisted {
        /// The input that asked for it.
        asked: Seq,
        /// Why not.
        fault: Option<Fault>,
    },
    /// `Retire` was obeyed: the blob is gone, or never was.
    Retired {
        /// Which.
        blob: Digest,
    },
    /// An operator's wish, or the same again.
    Wish {
        /// Names it.
        id: WishId,
        /// What.
        wish: Wish,
    },
}
