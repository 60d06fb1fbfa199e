//! How a cluster is run. Checked once, when the supervisor starts.

use super::detector::Patience;
use crate::cluster::orders::Facts;
use crate::topology::Topology;
use alloc::{format, string::String};
use serde::{Deserialize, Serialize};

/// What the supervisor is told when it starts.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterConfig {
    /// What every node has to say of itself: who says otherwise takes no part.
    pub facts: Facts,
    /// The ranks of a replica, and how many replicas (`data`).
    pub topology: Topology,
    /// Nodes, numbered from 0; those beyond the ranks of all replicas stand by.
    pub nodes: u32,
    /// Nanoseconds for which a leader may accept requests and tell tokens after a beat.
    pub lease_ns: u64,
    /// How far two clocks may drift apart, in thousandths.
    pub drift_per_mille: u32,
    /// How long to wait for what.
    pub patience: Patience,
    /// How often nodes are started again.
    pub restarts: Restarts,
    /// Versions of an optimizer's shards, if the cluster trains.
    pub training: Option<Training>,
}

/// How a cluster brings the shards of its optimizer further.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Training {
    /// Versions from one checkpoint to the next.
    pub store_every: u64,
    /// The last version.
    pub until: u64,
}

/// The budget of restarts, for each node.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restarts {
    /// Restarts within the window; one more is left to the operator.
    pub most: u32,
    /// Nanoseconds of the window.
    pub window_ns: u64,
    /// Nanoseconds between an end and the next start; doubles with every failure in a row.
    pub pause_min_ns: u64,
    /// The longest pause.
    pub pause_max_ns: u64,
    /// Nanoseconds of life after which a failure is none in a row.
    pub stable_ns: u64,
}

impl Default for Restarts {
    fn default() -> Self {
        const SECOND: u64 = 1_000_000_000;
        Self {
            most: 10,
            window_ns: 600 * SECOND,
            pause_min_ns: SECOND / 10,
            pause_max_ns: 30 * SECOND,
            stable_ns: 60 * SECOND,
        }
    }
}

impl Restarts {
    /// The pause after so many failures in a row.
    pub(super) fn pause_ns(&self, failures: u32) -> u64 {
        self.pause_min_ns.saturating_mul(1 << failures.min(32)).min(self.pause_max_ns)
    }
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            facts: Facts::default(),
            topology: Topology::SINGLE,
            nodes: 1,
            lease_ns: 2_000_000_000,
            drift_per_mille: 10,
            patience: Patience::default(),
            restarts: Restarts::default(),
            training: None,
        }
    }
}

impl ClusterConfig {
    /// No cluster has more nodes.
    pub const NODES_MAX: u32 = 1 << 12;

    /// Checks everything.
    ///
    /// # Errors
    /// The key and the remedy, for people.
    pub fn check(&self) -> Result<(), String> {
        self.topology.check_counts()?;
        let ranks = u64::from(self.topology.ranks()) * u64::from(self.topology.data);
        if !(1..=Self::NODES_MAX).contains(&self.nodes) {
            return Err(format!("nodes is {}; it must be 1 to {}", self.nodes, Self::NODES_MAX));
        }
        if u64::from(self.nodes) < ranks {
            return Err(format!(
                "nodes is {}, but the topology has {ranks} ranks, each on a node of its own: give that many",
                self.nodes
            ));
        }
        if self.lease_ns == 0 {
            return Err("lease_ns is 0: no leader could ever act".into());
        }
        if self.drift_per_mille >= 500 {
            return Err(format!("drift_per_mille is {}; no clock is that bad", self.drift_per_mille));
        }
        if self.training.is_some_and(|training| training.store_every == 0) {
            return Err("training.store_every is 0: nothing would ever be stored; give the versions between two checkpoints".into());
        }
        self.patience.check()
    }

    /// How long a lease may last by the supervisor's own clock, whatever the clocks do.
    pub(super) const fn longest_lease_ns(&self) -> u64 {
        self.lease_ns.saturating_add((self.lease_ns / 1000 + 1).saturating_mul(self.drift_per_mille as u64))
    }
}
