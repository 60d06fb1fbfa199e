//! Over the seeds that are run with every change, every fault strikes and every mark is hit: a knob that does nothing is a bug.

use lite_llm_sim::cluster::run::{ClusterSetup, Report, run_many};
use lite_llm_sim::hazard::Hazard;
use lite_llm_sim::mark::{Mark, Marks};
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::Mutex;

const SEEDS: u64 = 300;

#[test]
fn every_fault_and_mark_is_hit_and_nothing_is_wrong() {
    let sums = Mutex::new((Marks::default(), BTreeSet::new()));
    run_many(0..SEEDS, ClusterSetup::of, |report| {
        let Report { seed, violation, excuse, marks, decisions, .. } = report;
        assert_eq!((violation, excuse), (None, None), "seed {seed}");
        let mut sums = sums.lock().expect("no thread has failed");
        sums.0.add(&marks);
        sums.1.extend(decisions.iter().map(|decision| decision.point.hazard));
        ControlFlow::Continue(())
    });
    let (marks, struck) = sums.into_inner().expect("no thread has failed");
    let never: Vec<&Hazard> = Hazard::ALL.iter().filter(|hazard| !struck.contains(hazard)).collect();
    assert!(never.is_empty(), "these never struck: {never:?}");
    let never: Vec<&Mark> = Mark::ALL.iter().filter(|mark| marks.count(**mark) == 0).collect();
    assert!(never.is_empty(), "these were never hit: {never:?}");
}
