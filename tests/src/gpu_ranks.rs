//! Clusters whose ranks are on devices of a stand-in, and the process on the CPU to which they are held.
#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "this is test code; a panic is a failed test"
)]

use crate::command::{self, Ran, failures, tokens, try_signal};
use crate::cuda::counts;
use crate::gpu_place::GpuPlace;
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;

/// What the tests have: a machine with GPUs.
pub struct Machine {
    /// Where its commands run.
    pub gpus: GpuPlace,
    /// How many devices it has, where it has NCCL.
    pub nccl: Option<u32>,
}

impl Machine {
    /// None, and said so of `what`, where there is no compiler of C++ or no NVRTC. It has two devices, and no NCCL. `target` is the folder
    /// that Cargo gives to tests.
    pub fn new(target: &Path, what: &str) -> Option<Self> {
        Some(Self { gpus: GpuPlace::new(target, what)?, nccl: None })
    }

    /// A command there.
    pub fn command(&self, arguments: &[&str], wishes: &[(&str, &str)]) -> Command {
        let mut command = self.gpus.command(arguments, wishes);
        if let Some(devices) = self.nccl {
            self.gpus.with_nccl(&mut command, devices);
        }
        command
    }

    /// The command of a cluster on devices, with the state directory `state`.
    pub fn cluster(&self, layout: &Layout<'_>, run: &[&str], wishes: &[(&str, &str)]) -> Command {
        let nodes = layout.nodes.to_string();
        let mut arguments =
            vec!["supervise", "--max-restarts", layout.restarts, "--nodes", &nodes, "--topology"];
        arguments.extend([layout.topology, "--", "run", layout.model.to_str().unwrap()]);
        arguments.extend(run);
        arguments.extend(["--state", "state", "--request-id", "one", "--device", layout.device]);
        self.command(&arguments, wishes)
    }

    /// What one process on the CPU makes of a request.
    pub fn alone(&self, model: &Path, run: &[&str]) -> Vec<u64> {
        let arguments = [&["run", model.to_str().unwrap()], run].concat();
        let ran = command::run(self.command(&arguments, &[]));
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        tokens(&ran)
    }

    /// Recomputes the journal of a node on the CPU.
    #[track_caller]
    pub fn replay(&self, model: &Path, node: u32) {
        let journal = format!("state/node-{node}");
        let replayed = self.gpus.place.run(["replay", &journal, "--full", model.to_str().unwrap()]);
        assert_eq!(replayed.code, Some(0), "{}: {}{}", model.display(), replayed.stdout, replayed.stderr);
        assert!(replayed.stdout.contains("every digest and token equal"), "{}", replayed.stdout);
    }

    /// The least memory with which each rank of a model is served.
    pub fn least(&self, layout: &Layout<'_>, run: &[&str]) -> u64 {
        let layout = Layout { restarts: "0", ..layout.clone() };
        let refused = command::run(self.cluster(&layout, &[run, &["--memory", "1MiB"]].concat(), &[]));
        self.forget();
        let after = refused.stderr.split("at least ").nth(1).unwrap_or_else(|| panic!("{}", refused.stderr));
        after.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
    }

    /// Runs a request on a cluster, and checks it against one process: what it said.
    #[track_caller]
    pub fn check(
        &self,
        layout: &Layout<'_>,
        run: &[&str],
        wishes: &[(&str, &str)],
        expected: &[u64],
    ) -> String {
        let ran = command::run(self.cluster(layout, run, wishes));
        assert_eq!(ran.code, Some(0), "{layout:?}: {}", ran.stderr);
        assert_eq!(failures(&self.gpus.place, layout.nodes), Vec::<Value>::new(), "{layout:?}");
        assert_eq!(tokens(&ran), expected, "{layout:?}");
        self.replay(layout.model, 0);
        self.forget();
        ran.stderr
    }

    /// Runs a request on a cluster, and checks it as above: how often each rank was asked for what, after the self-test.
    #[track_caller]
    pub fn tallies(
        &self,
        layout: &Layout<'_>,
        run: &[&str],
        wishes: &[(&str, &str)],
        expected: &[u64],
    ) -> Vec<BTreeMap<String, u64>> {
        let tally = self.gpus.place.path("tally-%p");
        let wishes = [wishes, &[("TALLY", tally.to_str().unwrap())]].concat();
        self.check(layout, run, &wishes, expected);
        let files = std::fs::read_dir(self.gpus.place.path("")).unwrap().map(|entry| entry.unwrap().path());
        let tallies = files.filter(|file| file.to_string_lossy().contains("tally-"));
        let counted = tallies.map(|file| {
            let counted = counts(&file);
            std::fs::remove_file(file).unwrap();
            counted
        });
        // The head computes nothing.
        let of_ranks = counted.filter(|counted| counted["launch"] > 0).map(|mut counted| {
            counted.iter_mut().for_each(|(what, count)| *count -= self.gpus.before()[what]);
            counted
        });
        let of_ranks: Vec<_> = of_ranks.collect();
        assert_eq!(of_ranks.len(), layout.nodes as usize, "{layout:?}");
        of_ranks
    }

    /// Removes the state directory.
    pub fn forget(&self) {
        std::fs::remove_dir_all(self.gpus.place.path("state")).unwrap();
    }

    /// Runs a cluster in which nodes are killed, each after so many more lines of the stream.
    #[track_caller]
    pub fn kills(&self, mut cluster: Command, kills: &[(usize, u32)]) -> Ran {
        let mut child = cluster.spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let (mut stdout, mut killed) = (String::new(), 0);
        for &(told, node) in kills {
            stdout.extend(lines.by_ref().take(told).map(|line| line.unwrap() + "\n"));
            let alive = self.gpus.place.path(&format!("state/node-{node}/alive"));
            let alive = std::fs::read_to_string(alive).unwrap();
            let pid = alive.split_whitespace().next().unwrap().parse().unwrap();
            killed += usize::from(try_signal(pid, "KILL"));
        }
        stdout.extend(lines.map(|line| line.unwrap() + "\n"));
        let ended = child.wait_with_output().unwrap();
        let ran = Ran { stdout, ..ended.into() };
        assert_eq!((ran.code, killed), (Some(0), kills.len()), "{}", ran.stderr);
        ran
    }

    /// The name of a file of several requests, with prompts of several lengths.
    pub fn batch(&self) -> &'static str {
        let lines = (0..4).map(|number: u64| {
            let length = [3, 70, 1, 40][number as usize];
            let prompt: Vec<u64> = (0..length).map(|i| (i * 31 + number) % 90 + 2).collect();
            format!(
                "{{\"id\": \"r{number}\", \"prompt_tokens\": {prompt:?}, \"max_tokens\": 9, \"temperature\": 0.9, \
                 \"seed\": {number}, \"repetition_penalty\": 1.3}}\n"
            )
        });
        std::fs::write(self.gpus.place.path("in"), lines.collect::<String>()).unwrap();
        "in"
    }

    /// The tokens of several requests, by a command that comes before `run`.
    pub fn results(&self, batch: &str, before: &[&str], model: &Path, device: &str) -> Vec<(String, Value)> {
        let run = ["run", model.to_str().unwrap(), "--batch", batch, "--out", device, "--device", device];
        let arguments = [before, &run, &["--memory", "300MiB"]].concat();
        let ran = command::run(self.command(&arguments, &[("SEED", "2")]));
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let text = std::fs::read_to_string(self.gpus.place.path(device)).unwrap();
        let results = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let mut tokens: Vec<_> =
            results.map(|line| (line["id"].to_string(), line["tokens"].clone())).collect();
        tokens.sort_by(|one, other| one.0.cmp(&other.0));
        tokens
    }
}

/// How a model is spread.
#[derive(Clone, Debug)]
pub struct Layout<'a> {
    /// The model.
    pub model: &'a Path,
    /// How many nodes there are.
    pub nodes: u32,
    /// How ranks share the model.
    pub topology: &'a str,
    /// How often nodes may be started again.
    pub restarts: &'a str,
    /// Which device.
    pub device: &'a str,
}

impl<'a> Layout<'a> {
    /// With a node for each rank.
    pub fn new(model: &'a Path, topology: &'a str) -> Self {
        let nodes = topology.split(',').map(|kind| kind[3..].parse::<u32>().unwrap()).product();
        Self { model, nodes, topology, restarts: "2", device: "cuda" }
    }
}

/// Few tokens, drawn, with a prompt in chunks: of more than a page, so that pages are read that another step wrote.
pub const RUN: [&str; 11] = [
    "--max-tokens",
    "4",
    "--ignore-eos",
    "--stream",
    "--json",
    "--temperature",
    "1",
    "--seed",
    "5",
    "--prefill-chunk",
    "29",
];

/// A prompt of so many tokens.
pub fn prompt(length: u64) -> String {
    (0..length).map(|i| (i * 37 % 91 + 2).to_string()).collect::<Vec<_>>().join(",")
}
