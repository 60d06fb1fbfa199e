//! A whole run: a cluster is made from a seed, faults strike it, they end, and it has to finish everything and stop.
//!
//! ```
//! use lite_llm_sim::cluster::run::{ClusterSetup, run};
//! use lite_llm_core::topology::Topology;
//!
//! let topology = Topology { pipeline: 2, ..Topology::SINGLE };
//! let setup = ClusterSetup { topology, nodes: 3, ..ClusterSetup::of(7) };
//! let report = run(&setup);
//! assert_eq!(report.violation, None, "{}", report.violation.as_ref().map_or(String::new(), ToString::to_string));
//! assert_eq!(run(&setup).digest, report.digest, "a seed is a run");
//! ```

mod cast;
mod excuse;
mod file;
mod many;
mod panics;
mod phases;

use super::check::Checker;
use super::clients::Workload;
use super::watch::Violation;
use crate::chronicle::Chronicle;
use crate::decision::Decision;
use crate::hazard::Hazard;
use crate::mark::Marks;
use lite_llm_core::digest::Digest;
use lite_llm_core::topology::Topology;
use std::rc::Rc;

pub use cast::Cast;
pub use many::run_many;
pub use phases::{run, run_and_look};

/// Makes more rules for a run.
pub type MoreCheckers = Rc<dyn Fn() -> Vec<Box<dyn Checker>>>;

/// What a run is made from.
#[derive(Clone)]
pub struct ClusterSetup {
    /// Everything follows from it.
    pub seed: u64,
    /// The ranks.
    pub topology: Topology,
    /// Nodes; those beyond the ranks stand by.
    pub nodes: u32,
    /// Whether the arithmetic is that of a tiny model, not of digests.
    pub real: bool,
    /// Whether its ranks keep shards of an optimizer too, version by version.
    pub trains: bool,
    /// Which faults may strike.
    pub hazards: Vec<Hazard>,
    /// Exactly these faults, whatever the seed says.
    pub decisions: Option<Vec<Decision>>,
    /// Whether anything may be damaged, the last copy included: then the right bytes, or a halt that says why.
    pub unrestricted: bool,
    /// Virtual nanoseconds in which faults strike.
    pub duration_ns: u64,
    /// What clients ask for.
    pub workload: Workload,
    /// Whether to keep entries for a timeline.
    pub chronicle: bool,
    /// Rules besides those of every cluster.
    pub checkers: Option<MoreCheckers>,
}

impl std::fmt::Debug for ClusterSetup {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ClusterSetup")
            .field("seed", &self.seed)
            .field("topology", &self.topology)
            .field("nodes", &self.nodes)
            .field("duration_ns", &self.duration_ns)
            .finish_non_exhaustive()
    }
}

impl ClusterSetup {
    /// The layouts that seeds take turns with, and the nodes that each is tried on.
    pub const LAYOUTS: [(Topology, u32); 6] = [
        (Topology { data: 1, tensor: 1, pipeline: 2, expert: 1 }, 3),
        (Topology::SINGLE, 1),
        (Topology { data: 1, tensor: 2, pipeline: 1, expert: 2 }, 5),
        (Topology { data: 2, tensor: 1, pipeline: 1, expert: 2 }, 5),
        (Topology { data: 1, tensor: 1, pipeline: 2, expert: 2 }, 5),
        // Every node is needed, and their number is even.
        (Topology { data: 2, tensor: 1, pipeline: 2, expert: 2 }, 8),
    ];

    /// A cluster of the layout whose turn it is, all faults, ten seconds of them.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let turn = usize::try_from(seed % Self::LAYOUTS.len() as u64).expect("below a few");
        let (topology, nodes) = Self::LAYOUTS[turn];
        Self {
            seed,
            topology,
            nodes,
            real: false,
            // Prime to the layouts: each of them trains at times.
            trains: seed % 5 < 2,
            hazards: Hazard::ALL.to_vec(),
            decisions: None,
            unrestricted: false,
            duration_ns: 10_000_000_000,
            workload: Workload::default(),
            chronicle: false,
            checkers: None,
        }
    }
}

/// What came of a run.
#[derive(Clone, Debug)]
pub struct Report {
    /// The seed.
    pub seed: u64,
    /// Over everything: the states of all replicas and of the supervisor, and how much happened.
    pub digest: Digest,
    /// Things that happened in the world.
    pub events: u64,
    /// Inputs that ranks were given.
    pub inputs: u64,
    /// Virtual nanoseconds.
    pub virtual_ns: u64,
    /// Tokens that clients got.
    pub tokens: u64,
    /// Streams that ended, however.
    pub ended: u64,
    /// What has happened, by mark.
    pub marks: Marks,
    /// Faults that struck, in order.
    pub decisions: Vec<Decision>,
    /// Why the run may not have finished, if it may not: what was lost.
    pub excuse: Option<String>,
    /// The first thing that was wrong.
    pub violation: Option<Violation>,
    /// What was kept for a timeline.
    pub chronicle: Chronicle,
}

#[cfg(test)]
mod tests;
