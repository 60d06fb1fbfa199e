//! What `lite-llm sim` prints of faults, bugs and runs.

use super::say;
use crate::exit::Exit;
use lite_llm_sim::cluster::run::{ClusterSetup, Report};
use lite_llm_sim::hazard::Hazard;
use lite_llm_sim::mark::{Mark, Marks};
use serde_json::json;
use std::time::Duration;

/// Every fault, its area, how often it may happen, and what it is.
pub(super) fn faults() -> anyhow::Result<Exit> {
    for hazard in Hazard::ALL {
        let about = hazard.about();
        let rate = about.per_million;
        say(&format!(
            "{:<18} {:<9} {rate:>7} in a million  {}",
            about.name,
            about.area.to_string(),
            about.what
        ))?;
    }
    Ok(Exit::Ok)
}

/// Every bug that can be planted.
#[cfg(feature = "plant")]
pub(super) fn plants() -> anyhow::Result<Exit> {
    for bug in lite_llm_core::plant::Bug::ALL {
        say(&format!("{:<22} {:<12} {}", bug.name(), bug.area(), bug.what()))?;
    }
    Ok(Exit::Ok)
}

#[cfg(not(feature = "plant"))]
pub(super) fn plants() -> anyhow::Result<Exit> {
    super::plant("list").map(|()| Exit::Ok)
}

/// What came of one run.
pub(super) fn one(setup: &ClusterSetup, report: &Report, took: Duration, json: bool) -> anyhow::Result<()> {
    let wall = took.as_secs_f64().max(1e-9);
    let virtual_s = seconds(report.virtual_ns);
    if json {
        let object = json!({
            "seed": report.seed,
            "digest": report.digest.to_string(),
            "events": report.events,
            "inputs": report.inputs,
            "virtual_seconds": virtual_s,
            "wall_seconds": wall,
            "tokens": report.tokens,
            "ended": report.ended,
            "faults": counts(std::slice::from_ref(report)),
            "marks": marks(&report.marks),
            "excuse": report.excuse,
            "violation": report.violation.as_ref().map(ToString::to_string),
        });
        return say(&object.to_string());
    }
    let topology = setup.topology;
    say(&format!(
        "seed {}: dp={},tp={},pp={},ep={} on {} nodes: {} events, {} faults, {} tokens in {virtual_s:.1} simulated seconds",
        report.seed,
        topology.data,
        topology.tensor,
        topology.pipeline,
        topology.expert,
        setup.nodes,
        report.events,
        report.decisions.len(),
        report.tokens,
    ))?;
    say(&format!(
        "digest {}; {:.0} events and {:.0} simulated seconds a second",
        report.digest,
        report_rate(report.events, wall),
        virtual_s / wall
    ))?;
    if let Some(excuse) = &report.excuse {
        say(&format!("excused: {excuse}"))?;
    }
    say(&report
        .violation
        .as_ref()
        .map_or_else(|| "nothing is wrong".into(), |found| format!("violated: {found}")))
}

#[expect(clippy::cast_precision_loss, reason = "a rate for people")]
fn report_rate(events: u64, wall: f64) -> f64 {
    events as f64 / wall
}

#[expect(clippy::cast_precision_loss, reason = "seconds for people")]
pub(super) fn seconds(ns: u64) -> f64 {
    ns as f64 / 1e9
}

/// How often each fault struck.
fn counts(reports: &[Report]) -> serde_json::Map<String, serde_json::Value> {
    let mut by_number = [0u64; 256];
    for decision in reports.iter().flat_map(|report| &report.decisions) {
        by_number[decision.point.hazard as usize] += 1;
    }
    Hazard::ALL.iter().map(|hazard| (hazard.to_string(), by_number[*hazard as usize].into())).collect()
}

fn marks(marks: &Marks) -> serde_json::Map<String, serde_json::Value> {
    Mark::ALL.iter().map(|mark| (mark.to_string(), marks.count(*mark).into())).collect()
}

/// Sums over many runs.
#[derive(Debug, Default)]
pub(super) struct Sums {
    pub(super) runs: u64,
    pub(super) failed: Vec<(u64, String)>,
    pub(super) excused: Vec<(u64, String)>,
    events: u64,
    inputs: u64,
    virtual_ns: u64,
    tokens: u64,
    marks: Marks,
    faults: serde_json::Map<String, serde_json::Value>,
    /// Over the digests, in the order of seeds.
    digests: std::collections::BTreeMap<u64, lite_llm_core::digest::Digest>,
}

impl Sums {
    pub(super) fn add(&mut self, report: &Report) {
        self.runs += 1;
        self.events += report.events;
        self.inputs += report.inputs;
        self.virtual_ns += report.virtual_ns;
        self.tokens += report.tokens;
        self.marks.add(&report.marks);
        for (name, count) in counts(std::slice::from_ref(report)) {
            let sum = self.faults.get(&name).and_then(serde_json::Value::as_u64).unwrap_or(0);
            self.faults.insert(name, (sum + count.as_u64().unwrap_or(0)).into());
        }
        self.digests.insert(report.seed, report.digest);
        if let Some(found) = &report.violation {
            self.failed.push((report.seed, found.to_string()));
        }
        if let Some(excuse) = &report.excuse {
            self.excused.push((report.seed, excuse.clone()));
        }
    }

    /// One digest of all runs.
    fn digest(&self) -> lite_llm_core::digest::Digest {
        let bytes: Vec<u8> = self.digests.values().flat_map(|digest| digest.0).collect();
        lite_llm_core::digest::Digest::of(&bytes)
    }

    /// What was never hit, of faults and of marks.
    fn missed(&self) -> Vec<String> {
        let faults =
            self.faults.iter().filter(|(_, count)| count.as_u64() == Some(0)).map(|(name, _)| name.clone());
        let marks = Mark::ALL.iter().filter(|mark| self.marks.count(**mark) == 0).map(ToString::to_string);
        faults.chain(marks).collect()
    }

    pub(super) fn print(&self, took: Duration, json: bool) -> anyhow::Result<()> {
        let (wall, virtual_s) = (took.as_secs_f64().max(1e-9), seconds(self.virtual_ns));
        if json {
            let object = json!({
                "runs": self.runs,
                "digest": self.digest().to_string(),
                "events": self.events,
                "inputs": self.inputs,
                "virtual_seconds": virtual_s,
                "wall_seconds": wall,
                "tokens": self.tokens,
                "faults": self.faults,
                "marks": marks(&self.marks),
                "missed": self.missed(),
                "excused": self.excused,
                "failed": self.failed,
            });
            return say(&object.to_string());
        }
        let mut names: Vec<String> =
            self.faults.iter().map(|(name, count)| format!("{name} {count}")).collect();
        names.extend(Mark::ALL.iter().map(|mark| format!("{mark} {}", self.marks.count(*mark))));
        let width = names.iter().map(String::len).max().unwrap_or(1) + 2;
        for row in names.chunks(4) {
            let row: String = row.iter().map(|name| format!("{name:<width$}")).collect();
            say(row.trim_end())?;
        }
        let missed = self.missed();
        say(&if missed.is_empty() {
            "every fault and mark was hit".into()
        } else {
            format!("never hit: {}", missed.join(", "))
        })?;
        for (seed, excuse) in &self.excused {
            say(&format!("seed {seed} is excused: {excuse}"))?;
        }
        say(&format!(
            "{} runs, {} violated, {} excused; {} events, {} inputs, {} tokens; digest {}",
            self.runs,
            self.failed.len(),
            self.excused.len(),
            self.events,
            self.inputs,
            self.tokens,
            self.digest()
        ))?;
        say(&format!(
            "{:.0} events and {:.0} simulated seconds a second",
            report_rate(self.events, wall),
            virtual_s / wall
        ))
    }
}
