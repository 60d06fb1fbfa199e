//! Whole clusters under all faults, over a few seeds; the command runs many.

use super::*;
use crate::mark::Mark;

/// Topologies with the nodes that they are tried on.
const CLUSTERS: [(Topology, u32); 5] = [
    (Topology { data: 1, tensor: 1, pipeline: 2, expert: 1 }, 3),
    (Topology::SINGLE, 1),
    (Topology { data: 1, tensor: 2, pipeline: 1, expert: 2 }, 5),
    (Topology { data: 2, tensor: 1, pipeline: 1, expert: 2 }, 5),
    (Topology { data: 1, tensor: 1, pipeline: 2, expert: 2 }, 5),
];

/// Seeds take turns with the topologies.
fn setup(seed: u64) -> ClusterSetup {
    let (topology, nodes) = CLUSTERS[usize::try_from(seed).expect("a small seed") % CLUSTERS.len()];
    ClusterSetup { topology, nodes, ..ClusterSetup::of(seed) }
}

#[test]
fn every_layout_survives_every_fault() {
    let mut marks = Marks::default();
    for seed in 0..40 {
        let report = run(&setup(seed));
        let found = report.violation.as_ref().map_or_else(String::new, ToString::to_string);
        assert!(report.violation.is_none(), "seed {seed}: {found}");
        assert_eq!(report.excuse, None, "seed {seed}");
        marks.add(&report.marks);
    }
    for mark in [Mark::Recovered, Mark::Rewound, Mark::LeaderChanged, Mark::Complete, Mark::StepRetried] {
        assert!(marks.count(mark) > 0, "{mark} never happened");
    }
}

#[test]
fn a_seed_is_a_run() {
    for seed in 0..5 {
        let (one, other) = (run(&setup(seed)), run(&setup(seed)));
        assert_eq!((one.digest, one.decisions), (other.digest, other.decisions));
    }
    assert_ne!(run(&setup(0)).digest, run(&setup(5)).digest);
}

#[test]
fn its_decisions_alone_make_the_same_run() {
    let seeded = run(&setup(5));
    let logged = run(&ClusterSetup { decisions: Some(seeded.decisions.clone()), ..setup(5) });
    assert_eq!((seeded.digest, seeded.decisions.len()), (logged.digest, logged.decisions.len()));
}
