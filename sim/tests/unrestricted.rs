//! With anything damaged, the last copy included, a run ends right, or with a halt that says why and that the disks bear out.

use lite_llm_core::topology::Topology;
use lite_llm_sim::cluster::run::{ClusterSetup, Report, run_many};
use lite_llm_sim::hazard::Hazard;
use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::sync::Mutex;

/// How an excuse begins, of each kind.
const KINDS: [&str; 3] =
    ["the supervisor's disk was damaged", "every journal of replica 0 was damaged", "record "];

/// How many runs finish, and by which kinds of excuse the others are excused.
fn ends(
    seeds: std::ops::Range<u64>,
    setup: impl Fn(u64) -> ClusterSetup + Sync,
) -> BTreeMap<&'static str, u64> {
    let ends = Mutex::new(BTreeMap::new());
    run_many(
        seeds,
        |seed| ClusterSetup { unrestricted: true, ..setup(seed) },
        |report| {
            let Report { seed, violation, excuse, .. } = report;
            assert_eq!(violation, None, "seed {seed}");
            let kind = excuse.as_ref().map_or("finished", |excuse| {
                KINDS.into_iter().find(|kind| excuse.starts_with(kind)).unwrap_or("of another replica")
            });
            *ends.lock().expect("no thread has failed").entry(kind).or_default() += 1;
            ControlFlow::Continue(())
        },
    );
    ends.into_inner().expect("no thread has failed")
}

#[test]
fn the_right_bytes_or_a_halt_that_says_why() {
    let ends = ends(0..300, ClusterSetup::of);
    assert!(ends["finished"] > 200 && ends[KINDS[0]] > 0 && ends[KINDS[1]] > 0, "{ends:?}");
}

/// The only disk may lose the end of its log and look as if its machine had died in the middle of a write: nobody can halt.
#[test]
fn one_disk_that_lies_is_excused_only_by_what_it_lost() {
    let hazards = Hazard::parse_list("disk,process").expect("two groups");
    let alone = |seed| ClusterSetup {
        topology: Topology::SINGLE,
        nodes: 1,
        hazards: hazards.clone(),
        ..ClusterSetup::of(seed)
    };
    let ends = ends(360..380, alone);
    assert_eq!(ends.get(KINDS[2]), Some(&1), "{ends:?}");
    assert!(ends["finished"] > 10, "{ends:?}");
}
