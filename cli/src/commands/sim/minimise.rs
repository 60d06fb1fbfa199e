//! The smallest schedule with the same failure.

use crate::terminal::tell;
use crate::whole_file::write_whole;
use lite_llm_sim::cluster::run::{ClusterSetup, Report, run};
use lite_llm_sim::minimise::minimise as shrink;
use std::path::Path;

/// Runs that are tried at most.
const TRIES_MAX: u32 = 3_000;

/// Shrinks what a run decided, writes it as a log and as a test, and runs it once more.
pub(super) fn minimise(setup: &mut ClusterSetup, report: &Report, chronicle: bool) -> anyhow::Result<Report> {
    let kind = report.violation.as_ref().map(lite_llm_sim::cluster::watch::Violation::kind);
    let of = |decisions: &[_]| ClusterSetup { decisions: Some(decisions.to_vec()), ..setup.clone() };
    let fails = |decisions: &[_]| run(&of(decisions)).violation.map(|found| found.kind()) == kind;
    let small = shrink(&report.decisions, TRIES_MAX, fails);
    tell!(
        "{} decisions of {} are left after {} runs{}",
        small.left.len(),
        report.decisions.len(),
        small.tries,
        if small.bounded { ", which are all that are tried: it may be smaller yet" } else { "" }
    );
    *setup = ClusterSetup { chronicle, ..of(&small.left) };
    let report = run(setup);
    let (log, test) = (format!("seed-{}.log", setup.seed), format!("seed-{}.rs", setup.seed));
    write_whole(Path::new(&log), setup.to_log(small.left).to_text().as_bytes())?;
    write_whole(Path::new(&test), report.as_test(&log).as_bytes())?;
    tell!("written: {log}, and the test {test}; lite-llm sim --replay {log}");
    Ok(report)
}
