//! `lite-llm sim`: simulated clusters under faults, found out by seed, made small, replayed.

mod minimise;
mod seeds;
mod tables;

use crate::exit::{Exit, usage};
use crate::quantity::duration;
use crate::terminal;
use crate::whole_file::write_whole;
use anyhow::Context;
use clap::{Args, ValueEnum};
use lite_llm_core::topology::Topology;
use lite_llm_sim::cluster::run::{ClusterSetup, Report, run};
use lite_llm_sim::decision::LogFile;
use lite_llm_sim::hazard::Hazard;
use lite_llm_sim::timeline;
use std::fs::File;
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// Bytes of the largest decision log.
const LOG_BYTES_MAX: u64 = 256 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ComputeName {
    Digest,
    Real,
}

#[derive(Debug, Args)]
pub(crate) struct SimArgs {
    /// Run this one
    #[arg(long, value_name = "N", conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Run so many, on all cores
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u64).range(1..))]
    seeds: u64,
    /// The first of them
    #[arg(long, value_name = "N", default_value_t = 0)]
    from: u64,
    /// Nodes; those beyond the ranks of the topology stand by
    #[arg(long, value_name = "N")]
    nodes: Option<u32>,
    /// Ranks, as dp=2,tp=1,pp=2,ep=2; seeds take turns with six layouts if left out
    #[arg(long, value_name = "RANKS")]
    topology: Option<Topology>,
    /// What is computed: digests of all that a result may depend on, or a tiny model's real arithmetic
    #[arg(long, value_name = "KIND", default_value = "digest")]
    compute: ComputeName,
    /// Faults that may strike: all, none, or names and areas from --list-faults
    #[arg(long, value_name = "LIST", default_value = "all")]
    faults: String,
    /// Let anything be damaged, the last copy included: then the right bytes, or a halt that says why
    #[arg(long)]
    unrestricted: bool,
    /// Simulated time in which faults strike
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = duration)]
    duration: Duration,
    /// Requests of clients
    #[arg(long, value_name = "N", default_value_t = 12)]
    requests: u64,
    /// Find the smallest schedule with the same failure, and write it as a log and as a test
    #[arg(long)]
    minimise: bool,
    /// Write the run as a page
    #[arg(long, value_name = "HTML")]
    timeline: Option<PathBuf>,
    /// Write the run as trace events, which Perfetto opens
    #[arg(long, value_name = "JSON")]
    trace: Option<PathBuf>,
    /// Write the faults that struck as a decision log
    #[arg(long, value_name = "LOG")]
    log: Option<PathBuf>,
    /// Run a decision log
    #[arg(long, value_name = "LOG", conflicts_with_all = ["seed", "topology", "nodes", "unrestricted"])]
    replay: Option<PathBuf>,
    /// Say which faults there are
    #[arg(long)]
    list_faults: bool,
    /// Plant a bug, to see it found; `list` says which there are
    #[arg(long, value_name = "NAME")]
    plant: Option<String>,
    /// Print one object of JSON
    #[arg(long)]
    json: bool,
}

impl SimArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        if self.list_faults {
            return tables::faults();
        }
        if let Some(name) = &self.plant {
            if name == "list" {
                return tables::plants();
            }
            plant(name)?;
        }
        let hazards = Hazard::parse_list(&self.faults).map_err(usage)?;
        let one = self.seed.is_some() || self.replay.is_some();
        if !one {
            let files = [&self.timeline, &self.trace, &self.log];
            if self.minimise || files.iter().any(|file| file.is_some()) {
                return Err(usage(
                    "give the --seed that is meant: --minimise, --timeline, --trace and --log are of one run",
                ));
            }
            self.setup(0, &hazards).check().map_err(usage)?;
            return seeds::run_all(&self, &hazards);
        }
        let mut setup = match &self.replay {
            Some(path) => of_log(path)?,
            None => self.setup(self.seed.unwrap_or_default(), &hazards),
        };
        setup.check().map_err(usage)?;
        setup.chronicle = (self.timeline.is_some() || self.trace.is_some()) && !self.minimise;
        let started = std::time::Instant::now();
        let mut report = run(&setup);
        if self.minimise && report.violation.is_some() {
            report =
                minimise::minimise(&mut setup, &report, self.timeline.is_some() || self.trace.is_some())?;
        }
        self.write_files(&setup, &report)?;
        tables::one(&setup, &report, started.elapsed(), self.json)?;
        Ok(if report.violation.is_some() { Exit::Corrupt } else { Exit::Ok })
    }

    /// The run of a seed, as the flags say.
    fn setup(&self, seed: u64, hazards: &[Hazard]) -> ClusterSetup {
        let mut setup = ClusterSetup { hazards: hazards.to_vec(), ..ClusterSetup::of(seed) };
        if let Some(topology) = self.topology {
            (setup.topology, setup.nodes) = (topology, topology.nodes());
        }
        setup.nodes = self.nodes.unwrap_or(setup.nodes);
        setup.unrestricted = self.unrestricted;
        setup.real = self.compute == ComputeName::Real;
        setup.duration_ns = u64::try_from(self.duration.as_nanos()).unwrap_or(u64::MAX);
        setup.workload.requests = self.requests;
        setup
    }

    /// The flags that make the same run again, seed aside.
    fn flags(&self) -> String {
        let mut flags = String::new();
        let mut add = |flag: String| flags += &format!(" {flag}");
        if let Some(t) = self.topology {
            add(format!("--topology {t}"));
        }
        if self.compute == ComputeName::Real {
            add("--compute real".into());
        }
        if let Some(nodes) = self.nodes {
            add(format!("--nodes {nodes}"));
        }
        if self.faults != "all" {
            add(format!("--faults {}", self.faults));
        }
        if self.unrestricted {
            add("--unrestricted".into());
        }
        if self.duration != Duration::from_secs(10) {
            add(format!("--duration {}ms", self.duration.as_millis()));
        }
        if self.requests != 12 {
            add(format!("--requests {}", self.requests));
        }
        if let Some(plant) = &self.plant {
            add(format!("--plant {plant}"));
        }
        flags
    }

    fn write_files(&self, setup: &ClusterSetup, report: &Report) -> anyhow::Result<()> {
        let title = format!("seed {}", setup.seed);
        if let Some(path) = &self.timeline {
            write_whole(path, timeline::html(&title, &report.chronicle).as_bytes())?;
        }
        if let Some(path) = &self.trace {
            write_whole(path, timeline::trace(&report.chronicle).as_bytes())?;
        }
        if let Some(path) = &self.log {
            write_whole(path, setup.to_log(report.decisions.clone()).to_text().as_bytes())?;
        }
        Ok(())
    }
}

/// Has the bug of a name in everything that runs from now on.
#[cfg(feature = "plant")]
pub(crate) fn plant(name: &str) -> anyhow::Result<()> {
    use lite_llm_core::plant::{Bug, plant};
    let bug = Bug::named(name)
        .ok_or_else(|| usage(format!("there is no bug {name:?}; --plant list names them all")))?;
    plant(Some(bug));
    Ok(())
}

#[cfg(not(feature = "plant"))]
pub(crate) fn plant(_: &str) -> anyhow::Result<()> {
    Err(usage("this program was built without bugs to plant: build it with --features plant"))
}

/// The run of a decision log.
pub(crate) fn of_log(path: &Path) -> anyhow::Result<ClusterSetup> {
    let file = LogFile::parse(&read(path)?).with_context(|| path.display().to_string())?;
    let setup = ClusterSetup::of_log(&file).map_err(|why| usage(format!("{}: {why}", path.display())))?;
    setup.check().map_err(|why| usage(format!("{}: {why}", path.display())))?;
    Ok(setup)
}

fn read(path: &Path) -> anyhow::Result<String> {
    let mut text = String::new();
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    let bytes = file.take(LOG_BYTES_MAX + 1).read_to_string(&mut text);
    let bytes = bytes.with_context(|| format!("cannot read {}", path.display()))?;
    anyhow::ensure!(bytes as u64 <= LOG_BYTES_MAX, "{} is longer than any decision log", path.display());
    Ok(text)
}

/// A line for people, or for whoever reads standard output.
fn say(line: &str) -> anyhow::Result<()> {
    Ok(writeln!(terminal::stdout(), "{line}")?)
}
