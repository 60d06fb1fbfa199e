//! Everything that an engine can ask for or say. Outputs are digested, so the order of variants and fields counts.

use crate::digest::Digest;
use crate::event::Event;
use crate::ids::{ExpertKey, Generation, LoadId, RequestId, Seq, Slot, StepId, WishId};
use crate::input::Sampling;
use crate::pages::PageRun;
use crate::time::Time;
use alloc::{string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// How the token after a row is chosen.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SampleSpec {
    /// Parameters.
    pub sampling: Sampling,
    /// The one draw, a pure function of seed and position.
    pub draw: u64,
    /// Tokens before this row, for the repetition penalty; empty if it changes nothing.
    pub history: Vec<u32>,
}

/// A stretch of one request's positions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// The request's number, in order of acceptance.
    pub request: u64,
    /// Position of the first token.
    pub start: u32,
    /// Token ids at positions `start..`.
    pub tokens: Vec<u32>,
    /// Pages of KV cache, a run for each group of layers: enough for every position up to the last, from the first that
    /// one of these positions sees.
    pub pages: Vec<PageRun>,
    /// How the next token is chosen; `None` if it is known or not yet due.
    pub sample: Option<SampleSpec>,
}

/// One batch step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Forward {
    /// Which.
    pub step: StepId,
    /// Grows when the step is tried again.
    pub attempt: u32,
    /// Under which generation all rows are computed.
    pub generation: Generation,
    /// Tiers that the generation may select.
    pub tiers: Vec<u32>,
    /// What is computed.
    pub rows: Vec<Row>,
    /// The slots of every expert of the generation, when all are in and stay so: then there is no `Need`.
    pub resident: Option<Vec<(ExpertKey, Slot)>>,
    /// Whether a `Need` is to say what the next layer will probably choose.
    pub foresee: bool,
}

/// What may be done about a refusal; its reason says the same to people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Refusal {
    /// A bound on unfinished requests is reached: ask again when one has ended.
    Busy,
    /// The engine is not ready, or drains: ask again when it serves, if in its next life.
    NotServing,
    /// The stream was finished and is no longer kept: ask under another id.
    Expired,
    /// It will never be done as it is.
    Invalid,
}

/// What came of a wish.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Granted {
    /// The generation of the tiers that were wished, from the next step on.
    Switched(Generation),
    /// The request has ended, or ends with its step.
    Cancelled,
    /// A snapshot is durable on every rank; the first input that it does not hold.
    Snapshot(Seq),
}

/// Why a stream ended.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum FinishReason {
    /// An end-of-stream token.
    Eos,
    /// A stop sequence.
    Stop,
    /// As many tokens as asked for.
    Length,
    /// The client's wish.
    Cancelled,
    /// Its time was over.
    Deadline,
    /// It could not be computed.
    Fault(String),
}

/// The carved memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Carving {
    /// Slots of the hot arena of each rank.
    pub slots: u32,
    /// Slots of the warm arena of each rank.
    pub warm_slots: u32,
    /// Bytes of a slot.
    pub slot_bytes: u64,
    /// Pages of KV cache.
    pub pages: u32,
    /// Bytes of a page.
    pub page_bytes: u64,
}

/// Where an expert comes from into a slot of the hot arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Origin {
    /// From the disk.
    Disk {
        /// The slot of the warm arena to which what is in the hot slot is copied first.
        keep: Option<Slot>,
    },
    /// From the warm arena.
    Warm {
        /// The slot in which it is.
        slot: Slot,
        /// Whether it changes places with what is in the hot slot.
        exchange: bool,
    },
}

impl Origin {
    /// The same, with the slot of the warm arena, if any, mapped.
    #[must_use]
    pub fn map(self, to: impl FnOnce(Slot) -> Slot) -> Self {
        match self {
            Self::Disk { keep } => Self::Disk { keep: keep.map(to) },
            Self::Warm { slot, exchange } => Self::Warm { slot: to(slot), exchange },
        }
    }
}

/// Something to do or to tell. Whatever has `after` may leave only when the journal is durable up to it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Output {
    /// Reserve memory; answer `Reserved` or `BootFailed`.
    Reserve {
        /// How much.
        memory_bytes: u64,
    },
    /// Read and verify the manifest; answer `ManifestRead` or `BootFailed`.
    ReadManifest,
    /// Lay out the arenas.
    Carve(Carving),
    /// Load and verify base parameters; answer `BaseLoaded` or `BootFailed`.
    LoadBase {
        /// Index into the plan's shards.
        shard: u32,
    },
    /// Load and verify router parameters; answer `RoutersLoaded` or `BootFailed`.
    LoadRouters,
    /// Bring an expert into a slot of the hot arena and verify it; answer `Loaded`.
    Load {
        /// Names the load.
        load: LoadId,
        /// Which expert.
        expert: ExpertKey,
        /// Its parameters as modified, or those of the checkpoint.
        blob: Option<Digest>,
        /// Where to.
        slot: Slot,
        /// Where from.
        origin: Origin,
    },
    /// Read an expert into a slot of the warm arena and verify it; answer `Loaded`.
    Stage {
        /// Names the load.
        load: LoadId,
        /// Which expert.
        expert: ExpertKey,
        /// Its parameters as modified, or those of the checkpoint.
        blob: Option<Digest>,
        /// Where to.
        slot: Slot,
    },
    /// Compute a step; answer `Need`, `Released`, `Finished`, `Failed`.
    Forward(Forward),
    /// An expert that a step needs is in its slot, and stays until the wave is `Released`.
    Provide {
        /// For which step.
        step: StepId,
        /// For which attempt.
        attempt: u32,
        /// For which layer.
        layer: u32,
        /// In which wave.
        wave: u32,
        /// Experts of this wave on the same shelf.
        wave_len: u32,
        /// Which expert.
        expert: ExpertKey,
        /// Where it is.
        slot: Slot,
    },
    /// Give up a step; answer `Failed`.
    Abort {
        /// Which step.
        step: StepId,
        /// Which attempt.
        attempt: u32,
    },
    /// The engine serves.
    Ready {
        /// Durable before it may be told.
        after: Seq,
    },
    /// A request is accepted, or found again.
    Accepted {
        /// Which.
        id: RequestId,
        /// Tokens that exist already.
        generated: u32,
        /// Durable before it may be told.
        after: Seq,
    },
    /// A token of a stream.
    Token {
        /// Whose.
        id: RequestId,
        /// Dense from 0.
        offset: u32,
        /// Token id.
        token: u32,
        /// Durable before it may be told.
        after: Seq,
    },
    /// The end of a stream.
    Finish {
        /// Whose.
        id: RequestId,
        /// Why.
        reason: FinishReason,
        /// Tokens of the whole stream.
        generated: u32,
        /// Durable before it may be told.
        after: Seq,
    },
    /// A request, or the end of one, is not done.
    Refuse {
        /// Whose.
        id: RequestId,
        /// What may be done about it.
        refusal: Refusal,
        /// What, why and the remedy.
        reason: String,
        /// Durable before it may be told.
        after: Seq,
    },
    /// The end of a TierSet switch.
    Switched {
        /// The input that asked for it.
        asked: Seq,
        /// The generation from the next step on, or why the old one stays.
        outcome: Result<Generation, String>,
        /// Durable before it may be told.
        after: Seq,
    },
    /// Make modified experts durable as blobs of their own; answer `Persisted`.
    Persist {
        /// The input that asked for it.
        asked: Seq,
        /// Which, and the digest of each one's bytes.
        experts: Vec<(ExpertKey, Digest)>,
    },
    /// The end of a modification.
    Modified {
        /// The input that asked for it.
        asked: Seq,
        /// The generation from the next step on, or why nothing has changed.
        outcome: Result<Generation, String>,
        /// Durable before it may be told.
        after: Seq,
    },
    /// A blob that no position refers to any more is to be removed; answer `Retired`. Said again after a restart until
    /// it is answered, so that the blob may be gone already.
    Retire {
        /// Which expert's.
        expert: ExpertKey,
        /// Which.
        blob: Digest,
        /// Durable before it may happen.
        after: Seq,
    },
    /// For telemetry.
    Event {
        /// The input it belongs to.
        seq: Seq,
        /// What.
        event: Event,
    },
    /// Write a snapshot of the state as it is once all outputs are drained; answer `SnapshotDurable`.
    Snapshot,
    /// Records before `before` are no longer needed.
    Trim {
        /// The first that is.
        before: Seq,
    },
    /// Write telemetry out; answer `TelemetryFlushed`.
    FlushTelemetry,
    /// Give back arenas and files; answer `ResourcesReleased`.
    Release,
    /// Stop the process.
    Exit {
        /// `None` after a clean stop.
        error: Option<String>,
        /// Durable before it may happen.
        after: Seq,
    },
    /// What came of an operator's wish.
    Answered {
        /// Which.
        id: WishId,
        /// It is done; or what may be done about it, and why. What is not served yet may be asked for again.
        outcome: Result<Granted, (Refusal, String)>,
        /// Durable before it may be told.
        after: Seq,
    },
    /// Nothing more to do until an input comes, or this time. Never digested.
    Wait {
        /// When to give a `Tick`.
        until: Option<Time>,
        /// Why.
        reason: WaitReason,
    },
}

/// What an engine waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WaitReason {
    /// The boot sequence.
    Boot,
    /// A running step.
    Step,
    /// Loads.
    Loads,
    /// Requests.
    Requests,
    /// Nothing: it has stopped.
    Stopped,
}
