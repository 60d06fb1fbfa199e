//! The simulation's own test: every bug that can be planted is found within 200 seeds.
//!
//! Needs the feature `plant`. The bugs share one switch of the process, so that there is one test, which takes them one after
//! the other and the seeds of each on all cores. `MINIMISE=1` also says how small their schedules get.
#![cfg(feature = "plant")]

use lite_llm_core::plant::{Bug, plant};
use lite_llm_sim::cluster::run::{ClusterSetup, run, run_many};
use lite_llm_sim::cluster::watch::Violation;
use lite_llm_sim::decision::Decision;
use lite_llm_sim::minimise::minimise;
use std::ops::ControlFlow;
use std::sync::atomic::{AtomicU64, Ordering};

/// Runs that a minimisation may take.
const TRIES_MAX: u32 = 400;
/// Within so many seeds each is found.
const SEEDS: u64 = 200;

/// The first seed that finds what is planted.
fn found() -> Option<u64> {
    let first = AtomicU64::new(SEEDS);
    run_many(0..SEEDS, ClusterSetup::of, |report| {
        if report.violation.is_none() {
            return ControlFlow::Continue(());
        }
        first.fetch_min(report.seed, Ordering::Relaxed);
        ControlFlow::Break(())
    });
    Some(first.into_inner()).filter(|seed| *seed < SEEDS)
}

/// How many decisions are left of a failing run's, if that is asked for: it takes a while.
fn minimised(seed: u64) -> String {
    if std::env::var_os("MINIMISE").is_none() {
        return String::new();
    }
    let setup = ClusterSetup::of(seed);
    let report = run(&setup);
    let kind = report.violation.as_ref().map(Violation::kind);
    let fails = |decisions: &[Decision]| {
        let part = ClusterSetup { decisions: Some(decisions.to_vec()), ..setup.clone() };
        run(&part).violation.map(|found| found.kind()) == kind
    };
    let left = minimise(&report.decisions, TRIES_MAX, fails).left.len();
    format!(" {} | {left} |", report.decisions.len())
}

#[test]
fn every_planted_bug_is_found() {
    let mut missed = Vec::new();
    for &bug in Bug::ALL {
        plant(Some(bug));
        match found() {
            Some(seed) => println!("| `{}` | {} | {seed} |{}", bug.name(), bug.area(), minimised(seed)),
            None => missed.push(bug.name()),
        }
    }
    plant(None);
    assert_eq!(missed, Vec::<&str>::new(), "these were not found within {SEEDS} seeds");
    assert!(Bug::ALL.len() >= 25);
}
