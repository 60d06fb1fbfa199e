//! Telemetry: a pure function of the journal, so that replay regenerates it byte for byte. No durations here.

use crate::digest::Digest;
use crate::ids::{ExpertKey, Generation, Incarnation, RequestId, StepId};
use crate::lifecycle::Lifecycle;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// The named phases of boot and load, in their order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Phase {
    /// Configuration read and checked.
    Config,
    /// Memory reserved.
    Resources,
    /// Routing seed known.
    Seed,
    /// Log open.
    Log,
    /// Manifest parsed and verified, TierSet resolved, arenas carved.
    Manifest,
    /// Base parameters loaded.
    Base,
    /// Experts registered and the hot arena filled.
    Experts,
    /// Router parameters loaded.
    Router,
    /// Optimizer state: skipped for inference.
    Optimizer,
}

/// Something worth recording.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Event {
    /// A phase of boot is complete.
    PhaseDone {
        /// Which.
        phase: Phase,
        /// Bytes that it accounts for.
        bytes: u64,
    },
    /// The lifecycle moved.
    Moved {
        /// From.
        from: Lifecycle,
        /// To.
        to: Lifecycle,
    },
    /// A TierSet became active.
    TierSet {
        /// The new generation.
        generation: Generation,
        /// Its tiers.
        tiers: Vec<u32>,
    },
    /// Experts of tiers that are no longer active left the arena.
    Demoted {
        /// How many.
        experts: u32,
    },
    /// Modified experts became active.
    Modified {
        /// The new generation.
        generation: Generation,
        /// The experts that have changed, and the digest of each one's bytes.
        experts: Vec<(ExpertKey, Digest)>,
    },
    /// A pending TierSet switch was given up.
    SwitchAborted,
    /// A new life began.
    Recovered {
        /// Which.
        incarnation: Incarnation,
        /// Unfinished requests that go on.
        requests: u32,
    },
    /// A step is done.
    StepDone {
        /// Which.
        step: StepId,
        /// Positions computed.
        positions: u32,
        /// Experts found in the arena.
        hits: u32,
        /// Experts that had to be loaded.
        misses: u32,
        /// Loads begun by foresight.
        ahead: u32,
        /// Experts, of those that had to be loaded, whose load foresight had begun.
        foreseen: u32,
    },
    /// Steps with foresight and without were compared.
    Compared {
        /// Whether foresight is used until the next comparison.
        pays: bool,
        /// Nanoseconds of as many steps with it.
        with_ns: u64,
        /// And without it.
        without_ns: u64,
    },
    /// A step is tried again.
    StepRetried {
        /// Which.
        step: StepId,
        /// The new attempt.
        attempt: u32,
    },
    /// A load failed and is tried again.
    LoadRetried {
        /// Which expert.
        expert: ExpertKey,
        /// Failures so far.
        failures: u32,
    },
    /// The digest of the whole state after this input, taken every few thousand records.
    State {
        /// It.
        digest: Digest,
    },
    /// A request lost its pages and will be recomputed.
    Preempted {
        /// Which.
        id: RequestId,
    },
}
