//! What the operator decides: budgets, batch shape, modes and limits. Checked once, in the first boot phase.

use crate::topology::Topology;
use alloc::{collections::BTreeMap, format, string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// Bounds of every queue and loop of the engine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Requests that may be unfinished at once; one more is refused.
    pub requests_max: u32,
    /// Rows (requests) in one step.
    pub rows_max: u32,
    /// Token positions in one step, over all rows.
    pub step_positions_max: u32,
    /// Expert loads under way at once.
    pub loads_max: u32,
    /// Times that a failed load or step is tried again before it is a fault.
    pub retries_max: u32,
    /// Finished requests whose streams are kept; the oldest become tombstones.
    pub finished_max: u32,
    /// Nanoseconds for which a finished stream is kept.
    pub finished_age_ns: u64,
    /// Tombstones: ids that answer `Expired`; the oldest are forgotten.
    pub tombstones_max: u32,
    /// TierSet switches that may wait.
    pub switches_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            requests_max: 1024,
            rows_max: 16,
            step_positions_max: 256,
            loads_max: 8,
            retries_max: 2,
            finished_max: 1024,
            finished_age_ns: 24 * 3600 * 1_000_000_000,
            tombstones_max: 1 << 16,
            switches_max: 16,
        }
    }
}

/// Where the experts of a tier belong.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Placement {
    /// Loaded on demand only, and the first to be evicted.
    Cold,
    /// Loaded ahead into what the hot tiers leave free.
    Warm,
    /// Loaded ahead first, evicted last.
    #[default]
    Hot,
}

/// Whether decode steps load, while the disk would be idle, what the next layer will probably choose. It never changes a bit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Foresight {
    /// Never.
    Off,
    /// Where blocks of steps with it and without, compared now and then, say that it pays.
    #[default]
    Paired,
    /// Always.
    On,
}

/// The runtime configuration.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Config {
    /// Bytes that the whole process may use.
    pub memory_bytes: u64,
    /// Bytes, of those, for experts that are near at hand but not where steps read them; 0 for no warm arena.
    pub warm_bytes: u64,
    /// Positions of all requests together that the KV cache holds, no fewer and no more; `None` takes a quarter of what base
    /// parameters leave, or more where experts leave it. Requests that need more take turns.
    pub cache_positions: Option<u32>,
    /// The routing seed; `None` draws one from the entropy of the boot input.
    pub routing_seed: Option<u64>,
    /// The tiers to activate at start, by name; empty means every tier of the checkpoint.
    pub tier_set: Vec<String>,
    /// Named TierSets: mode to tier names.
    pub modes: BTreeMap<String, Vec<String>>,
    /// Placement of tiers, by name; a tier that is not named is placed as the checkpoint hints.
    pub placement: BTreeMap<String, Placement>,
    /// Whether experts are loaded that will probably be needed.
    pub foresight: Foresight,
    /// Positions of a prompt that one step computes for one request.
    pub prefill_chunk: u32,
    /// Records between two snapshots; 0 takes none but those asked for.
    pub snapshot_every: u64,
    /// The ranks that the model is spread over.
    pub topology: Topology,
    /// Whether optimizer state is wanted. Training is not built: `true` is refused by name.
    pub training: bool,
    /// Bounds.
    pub limits: Limits,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            memory_bytes: u64::MAX,
            warm_bytes: 0,
            cache_positions: None,
            routing_seed: Some(0),
            tier_set: Vec::new(),
            modes: BTreeMap::new(),
            placement: BTreeMap::new(),
            foresight: Foresight::default(),
            prefill_chunk: 256,
            snapshot_every: 4096,
            topology: Topology::SINGLE,
            training: false,
            limits: Limits::default(),
        }
    }
}

impl Config {
    /// Checks every key on its own; what depends on the checkpoint is checked in the manifest phase.
    ///
    /// # Errors
    /// The key and the remedy, for people.
    pub fn check(&self) -> Result<(), String> {
        let limits = &self.limits;
        for (key, value, max) in [
            ("prefill_chunk", self.prefill_chunk, 4096),
            ("limits.requests_max", limits.requests_max, 1 << 20),
            ("limits.rows_max", limits.rows_max, 1024),
            ("limits.step_positions_max", limits.step_positions_max, 1 << 16),
            ("limits.loads_max", limits.loads_max, 1024),
            ("limits.finished_max", limits.finished_max, 1 << 20),
            ("limits.tombstones_max", limits.tombstones_max, 1 << 24),
            ("limits.switches_max", limits.switches_max, 1 << 10),
        ] {
            if value == 0 || value > max {
                return Err(format!("{key} is {value}; it must be 1 to {max}"));
            }
        }
        if limits.retries_max > 100 {
            return Err(format!("limits.retries_max is {}; it must be 0 to 100", limits.retries_max));
        }
        if self.memory_bytes == 0 {
            return Err("memory_bytes is 0; give the process the bytes it may use".into());
        }
        if self.cache_positions == Some(0) {
            return Err("cache_positions is 0; leave it out, or give as many as a request has".into());
        }
        self.topology.check_counts()?;
        if self.training {
            return Err("training is not built: set training = false".into());
        }
        Ok(())
    }
}
