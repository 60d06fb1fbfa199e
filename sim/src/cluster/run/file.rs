//! A run as a decision log, and a decision log as a run.

use super::{ClusterSetup, Report};
use crate::cluster::clients::Workload;
use crate::decision::{Decision, LogFile};
use lite_llm_core::topology::Topology;
use std::collections::BTreeMap;

impl ClusterSetup {
    /// The run with exactly these faults, as a file.
    #[must_use]
    pub fn to_log(&self, decisions: Vec<Decision>) -> LogFile {
        let Topology { data, tensor, pipeline, expert } = self.topology;
        let settings = [
            ("topology", format!("dp={data},tp={tensor},pp={pipeline},ep={expert}")),
            ("nodes", self.nodes.to_string()),
            ("duration_ns", self.duration_ns.to_string()),
            ("requests", self.workload.requests.to_string()),
            ("unrestricted", self.unrestricted.to_string()),
            ("compute", if self.real { "real" } else { "digest" }.to_owned()),
        ];
        let settings = settings.map(|(name, value)| (name.to_owned(), value));
        LogFile { seed: self.seed, settings: settings.into(), decisions }
    }

    /// The run of a file.
    ///
    /// # Errors
    /// The setting that is missing or wrong, for people.
    pub fn of_log(file: &LogFile) -> Result<Self, String> {
        let of = Settings(&file.settings);
        let mut setup = Self { decisions: Some(file.decisions.clone()), ..Self::of(file.seed) };
        setup.topology = of.text("topology")?.parse()?;
        setup.nodes = of.number("nodes")?;
        setup.duration_ns = of.number("duration_ns")?;
        setup.unrestricted = of.number("unrestricted")?;
        setup.real = match of.text("compute")? {
            "real" => true,
            "digest" => false,
            other => return Err(format!("the setting compute is {other:?}; it is digest or real")),
        };
        setup.workload = Workload { requests: of.number("requests")?, ..Workload::default() };
        setup.check()?;
        Ok(setup)
    }

    /// Checks what a run cannot do with.
    ///
    /// # Errors
    /// What, and the remedy, for people.
    pub fn check(&self) -> Result<(), String> {
        let plan = crate::model::plan();
        self.topology.check(plan.layers, plan.experts_of_layer())?;
        let ranks = self.topology.nodes();
        if self.nodes < ranks || self.nodes > Self::NODES_MAX {
            return Err(format!(
                "nodes is {}; this topology needs {ranks} to {}",
                self.nodes,
                Self::NODES_MAX
            ));
        }
        if self.workload.requests > Self::REQUESTS_MAX {
            return Err(format!(
                "requests is {}; it must be at most {}",
                self.workload.requests,
                Self::REQUESTS_MAX
            ));
        }
        if self.duration_ns > Self::DURATION_NS_MAX {
            return Err(format!("duration is {} ns; it must be at most a day", self.duration_ns));
        }
        Ok(())
    }

    /// No simulated cluster has more nodes.
    pub const NODES_MAX: u32 = 64;
    /// No workload has more requests.
    pub const REQUESTS_MAX: u64 = 100_000;
    /// No run's faults strike for longer.
    pub const DURATION_NS_MAX: u64 = 86_400_000_000_000;
}

impl Report {
    /// A test that runs a decision log, which lies beside it, and finds nothing wrong once the bug is mended.
    #[must_use]
    pub fn as_test(&self, log_file: &str) -> String {
        let found = self.violation.as_ref().map_or_else(String::new, ToString::to_string);
        let found = found.lines().next().unwrap_or_default();
        format!(
            "// {found}\n#[test]\nfn seed_{}() {{\n    let log = lite_llm_sim::decision::LogFile::parse(include_str!({log_file:?}))\
             .expect(\"a whole log\");\n    let setup = lite_llm_sim::cluster::run::ClusterSetup::of_log(&log).expect(\"of this \
             version\");\n    assert_eq!(lite_llm_sim::cluster::run::run(&setup).violation, None);\n}}\n",
            self.seed
        )
    }
}

struct Settings<'a>(&'a BTreeMap<String, String>);

impl Settings<'_> {
    fn text(&self, name: &str) -> Result<&str, String> {
        self.0.get(name).map(String::as_str).ok_or_else(|| format!("the setting {name} is missing"))
    }

    fn number<T: std::str::FromStr>(&self, name: &str) -> Result<T, String> {
        let text = self.text(name)?;
        text.parse().map_err(|_| format!("the setting {name} is {text:?}, which is none"))
    }
}
