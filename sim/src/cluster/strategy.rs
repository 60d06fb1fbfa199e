//! Clusters for property tests. What fails shrinks to few kinds of faults, few requests and a short time; the schedule that is
//! left [`mod@crate::minimise`] shrinks further.

use super::clients::Workload;
use super::run::ClusterSetup;
use crate::hazard::Hazard;
use proptest::prelude::*;
use proptest::sample::subsequence;

/// Clusters of all layouts under any faults.
pub fn clusters() -> impl Strategy<Value = ClusterSetup> {
    clusters_under(Hazard::ALL)
}

/// Clusters of all layouts under some of these faults.
pub fn clusters_under(hazards: &[Hazard]) -> impl Strategy<Value = ClusterSetup> {
    let hazards = subsequence(hazards.to_vec(), 0..=hazards.len());
    let layout = 0..ClusterSetup::LAYOUTS.len();
    (hazards, layout, 1u64..=12, 1u64..=10, any::<u64>()).prop_map(
        |(hazards, layout, requests, seconds, seed)| {
            let (topology, nodes) = ClusterSetup::LAYOUTS[layout];
            let duration_ns = seconds * 1_000_000_000;
            let workload = Workload { requests, over_ns: duration_ns / 2, ..Workload::default() };
            ClusterSetup { topology, nodes, hazards, duration_ns, workload, ..ClusterSetup::of(seed) }
        },
    )
}
