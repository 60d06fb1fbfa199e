//! Ranks of a model on devices, over the stand-in for the driver: whatever the layout and whoever is killed, the stream is that of one
//! process on the CPU, and the journals are recomputed there to equal digests. Nothing here has met a GPU.

use lite_llm_tests::command::{Ran, failures, tokens, try_signal};
use lite_llm_tests::gpu_place::GpuPlace;
use lite_llm_tests::harness::folder;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::Command;

/// What the tests have: a machine with GPUs.
struct Machine {
    gpus: GpuPlace,
}

impl Machine {
    /// None, and said so, where there is no compiler of C++ or no NVRTC.
    fn new() -> Option<Self> {
        let gpus = GpuPlace::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "ranks on a stand-in for GPUs")?;
        Some(Self { gpus })
    }

    /// The command of a cluster on devices, with the state directory `state`.
    fn cluster(&self, layout: &Layout<'_>, run: &[&str], wishes: &[(&str, &str)]) -> Command {
        let nodes = layout.nodes.to_string();
        let mut arguments =
            vec!["supervise", "--max-restarts", layout.restarts, "--nodes", &nodes, "--topology"];
        arguments.extend([layout.topology, "--", "run", layout.model.to_str().unwrap()]);
        arguments.extend(run);
        arguments.extend(["--state", "state", "--request-id", "one", "--device", layout.device]);
        self.gpus.command(&arguments, wishes)
    }

    /// What one process on the CPU makes of a request.
    fn alone(&self, model: &Path, run: &[&str]) -> Vec<u64> {
        let arguments = [&["run", model.to_str().unwrap()], run].concat();
        let ran: Ran = self.gpus.command(&arguments, &[]).output().unwrap().into();
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        tokens(&ran)
    }

    /// Recomputes the journal of a node on the CPU.
    #[track_caller]
    fn replay(&self, model: &Path, node: u32) {
        let journal = format!("state/node-{node}");
        let replayed = self.gpus.place.run(["replay", &journal, "--full", model.to_str().unwrap()]);
        assert_eq!(replayed.code, Some(0), "{}: {}{}", model.display(), replayed.stdout, replayed.stderr);
        assert!(replayed.stdout.contains("every digest and token equal"), "{}", replayed.stdout);
    }

    /// The least memory with which each rank of a model is served.
    fn least(&self, layout: &Layout<'_>, run: &[&str]) -> u64 {
        let layout = Layout { restarts: "0", ..layout.clone() };
        let mut command = self.cluster(&layout, &[run, &["--memory", "1MiB"]].concat(), &[]);
        let refused: Ran = command.output().unwrap().into();
        std::fs::remove_dir_all(self.gpus.place.path("state")).unwrap();
        let after = refused.stderr.split("at least ").nth(1).unwrap_or_else(|| panic!("{}", refused.stderr));
        after.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
    }

    /// Runs a request on a cluster, and checks it against one process.
    #[track_caller]
    fn check(&self, layout: &Layout<'_>, run: &[&str], wishes: &[(&str, &str)], expected: &[u64]) {
        let ran: Ran = self.cluster(layout, run, wishes).output().unwrap().into();
        assert_eq!(ran.code, Some(0), "{layout:?}: {}", ran.stderr);
        assert_eq!(failures(&self.gpus.place, layout.nodes), Vec::<Value>::new(), "{layout:?}");
        assert_eq!(tokens(&ran), expected, "{layout:?}");
        self.replay(layout.model, 0);
        std::fs::remove_dir_all(self.gpus.place.path("state")).unwrap();
    }
}

/// How a model is spread.
#[derive(Clone, Debug)]
struct Layout<'a> {
    model: &'a Path,
    nodes: u32,
    topology: &'a str,
    restarts: &'a str,
    device: &'a str,
}

impl<'a> Layout<'a> {
    /// With a node for each rank.
    fn new(model: &'a Path, topology: &'a str) -> Self {
        let nodes = topology.split(',').map(|kind| kind[3..].parse::<u32>().unwrap()).product();
        Self { model, nodes, topology, restarts: "2", device: "cuda" }
    }
}

/// A prompt of more than a page, in chunks, so that pages are read that another step wrote.
const RUN: [&str; 11] = [
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

fn prompt(length: u64) -> String {
    (0..length).map(|i| (i * 37 % 91 + 2).to_string()).collect::<Vec<_>>().join(",")
}

#[test]
fn every_layout_has_the_stream_of_the_cpu() {
    let Some(machine) = Machine::new() else { return };
    let prompt = prompt(70);
    let run = [&RUN[..], &["--prompt-tokens", &prompt, "--memory", "400MiB"]].concat();
    // Norms over all heads, shared experts and dense blocks, latents, biases and sinks, heads of keys that ranks share.
    for (name, layouts) in [
        ("olmoe", &["ep=2", "pp=2", "tp=2", "tp=2,ep=2"][..]),
        ("qwen2_moe", &["tp=2,pp=2"]),
        ("deepseek_v3", &["tp=2,ep=2"]),
        ("gpt_oss", &["tp=4"]),
        ("llama", &["tp=2,pp=2"]),
    ] {
        let model = folder(name);
        let expected = machine.alone(&model, &run);
        for (seed, topology) in layouts.iter().enumerate() {
            let layout = Layout::new(&model, topology);
            machine.check(&layout, &run, &[("SEED", &seed.to_string())], &expected);
        }
    }
    // All nodes on one device, which is not the first.
    let model = folder("olmoe");
    let layout = Layout { device: "cuda:1", ..Layout::new(&model, "ep=2") };
    machine.check(&layout, &run, &[], &machine.alone(&model, &run));
}

#[test]
fn experts_come_and_go_in_every_rank_with_the_same_bits() {
    let Some(machine) = Machine::new() else { return };
    let prompt = prompt(20);
    let run = [&RUN[..], &["--prompt-tokens", &prompt]].concat();
    for (name, topology) in [("olmoe", "tp=2,ep=2"), ("qwen2_moe", "ep=3"), ("deepseek_v2", "tp=2,pp=2")] {
        let model = folder(name);
        let (layout, expected) = (Layout::new(&model, topology), machine.alone(&model, &run));
        for more in [&["--foresight", "on"][..], &["--warm", "120KiB"]] {
            let memory = machine.least(&layout, &[&run[..], more].concat()) + (30 << 10);
            let memory = memory.to_string();
            let run = [&run[..], more, &["--memory", &memory]].concat();
            machine.check(&layout, &run, &[("SEED", "1")], &expected);
        }
    }
}

#[test]
fn rows_of_many_requests_share_the_steps_of_ranks() {
    let Some(machine) = Machine::new() else { return };
    let model = folder("olmoe");
    let lines = (0..4).map(|number: u64| {
        let prompt: Vec<u64> = (0..[3, 70, 1, 40][number as usize]).map(|i| (i * 31 + number) % 90 + 2).collect();
        format!(
            "{{\"id\": \"r{number}\", \"prompt_tokens\": {prompt:?}, \"max_tokens\": 9, \"temperature\": 0.9, \
             \"seed\": {number}, \"repetition_penalty\": 1.3}}\n"
        )
    });
    std::fs::write(machine.gpus.place.path("in"), lines.collect::<String>()).unwrap();
    let results = |before: &[&str], out: &str, device: &str| {
        let batch = ["run", model.to_str().unwrap(), "--batch", "in", "--out", out, "--device", device];
        let arguments = [before, &batch, &["--memory", "300MiB"]].concat();
        let ran: Ran = machine.gpus.command(&arguments, &[("SEED", "2")]).output().unwrap().into();
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let text = std::fs::read_to_string(machine.gpus.place.path(out)).unwrap();
        let results = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let mut tokens: Vec<_> =
            results.map(|line| (line["id"].to_string(), line["tokens"].clone())).collect();
        tokens.sort_by(|one, other| one.0.cmp(&other.0));
        tokens
    };
    let cluster = ["supervise", "--nodes", "4", "--topology", "tp=2,pp=2", "--"];
    assert_eq!(results(&cluster, "ranks", "cuda"), results(&[], "alone", "cpu"));
}

#[test]
fn ranks_that_are_killed_cost_no_bit() {
    let Some(machine) = Machine::new() else { return };
    let model = folder("olmoe");
    // One stands by, and takes the seat of the first that is killed. What a device may be asked for is left to the supervisor.
    let layout = Layout { nodes: 5, restarts: "100", ..Layout::new(&model, "tp=2,ep=2") };
    let mut run = [&RUN[..], &["--prompt-tokens", "3,5,7,11,13,17,19,23,29"]].concat();
    run[1] = "120";
    let expected = machine.alone(&model, &run);
    let mut child = machine.cluster(&layout, &run, &[]).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let (mut stdout, mut killed) = (String::new(), 0);
    for (told, node) in [(20, 0), (60, 2)] {
        stdout.extend(lines.by_ref().take(told).map(|line| line.unwrap() + "\n"));
        let alive =
            std::fs::read_to_string(machine.gpus.place.path(&format!("state/node-{node}/alive"))).unwrap();
        let pid = alive.split_whitespace().next().unwrap().parse().unwrap();
        killed += u32::from(try_signal(pid, "KILL"));
    }
    stdout.extend(lines.map(|line| line.unwrap() + "\n"));
    let ended = child.wait_with_output().unwrap();
    let ran = Ran { stdout, ..ended.into() };
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!((tokens(&ran), killed), (expected, 2));
    assert!(failures(&machine.gpus.place, 5).len() >= 2, "{}", ran.stderr);
    for node in 0..5 {
        machine.replay(&model, node);
    }
}

#[test]
fn a_lost_device_ends_its_rank_and_the_stream_goes_on() {
    let Some(machine) = Machine::new() else { return };
    let model = folder("olmoe");
    let layout = Layout { restarts: "100", ..Layout::new(&model, "ep=2") };
    let mut run = [&RUN[..], &["--prompt-tokens", "3,5,7,11,13", "--memory", "300MiB"]].concat();
    run[1] = "30";
    let expected = machine.alone(&model, &run);
    // Of every life, after some steps: the next one goes on from there.
    for (fault, more) in [("launch:1500:700", &[][..]), ("launch:1500:hang", &["--device-patience", "1s"])] {
        let run = [&run[..], more].concat();
        let ran: Ran = machine.cluster(&layout, &run, &[("FAULT", fault)]).output().unwrap().into();
        assert_eq!(ran.code, Some(0), "{fault}: {}", ran.stderr);
        assert_eq!(tokens(&ran), expected, "{fault}");
        assert!(ran.stderr.contains("the GPU is lost"), "{fault}: {}", ran.stderr);
        assert!(!failures(&machine.gpus.place, 2).is_empty(), "{fault}: no end was recorded");
        machine.replay(&model, 0);
        std::fs::remove_dir_all(machine.gpus.place.path("state")).unwrap();
    }
}

#[test]
fn what_ranks_began_on_devices_goes_on_without_and_the_other_way_round() {
    let Some(machine) = Machine::new() else { return };
    let model = folder("olmoe");
    let mut run = [&RUN[..], &["--prompt-tokens", "3,5,7,11,13,17,19,23,29"]].concat();
    run[1] = "120";
    let expected = machine.alone(&model, &run);
    for (before, after) in [("cuda", "cpu"), ("cpu", "cuda")] {
        let layout = Layout { restarts: "100", device: before, ..Layout::new(&model, "tp=2,ep=2") };
        let mut child = machine.cluster(&layout, &run, &[]).spawn().unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert_eq!(lines.take(20).count(), 20, "it ended early");
        // Its nodes go on without it, until the next one ends them, as they are to be others.
        child.kill().unwrap();
        child.wait().unwrap();
        let layout = Layout { device: after, ..layout };
        let ran: Ran = machine.cluster(&layout, &run, &[]).output().unwrap().into();
        assert_eq!(ran.code, Some(0), "{before} to {after}: {}", ran.stderr);
        assert_eq!(tokens(&ran), expected, "{before} to {after}");
        machine.replay(&model, 0);
        std::fs::remove_dir_all(machine.gpus.place.path("state")).unwrap();
    }
}

#[test]
fn what_cannot_be_is_refused_before_a_node_is_started() {
    let Some(machine) = Machine::new() else { return };
    let model = folder("olmoe");
    let layout = Layout::new(&model, "ep=2");
    let run = [&RUN[..], &["--prompt-tokens", "1"]].concat();
    let refuses_on = |layout: &Layout<'_>, more: &[&str], kind: &str, code: i32, words: &[&str]| {
        let mut command = machine.cluster(layout, &[&run[..], more].concat(), &[]);
        let ran: Ran = command.env("LITE_LLM_STAND_IN", kind).output().unwrap().into();
        ran.refuses(code, words);
        assert!(!machine.gpus.place.path("state/node-0").exists(), "a node was started: {}", ran.stderr);
    };
    let refuses = |more: &[&str], kind: &str, code: i32, words: &[&str]| {
        refuses_on(&layout, more, kind, code, words);
    };
    let other = Layout { device: "cuda:2", ..layout.clone() };
    refuses_on(&other, &[], "90", 1, &["there is no GPU 2", "0 (Stand-in 0), 1 (Stand-in 1)"]);
    refuses(&[], "0", 1, &["the CUDA driver has no device"]);
    refuses(&["--logits", "f"], "90", 2, &["--logits is for one process"]);
    // A step of as many positions has more blocks than a grid.
    std::fs::write(machine.gpus.place.path("wide.toml"), "[limits]\nstep_positions_max = 40000\n").unwrap();
    refuses(&["--config", "wide.toml"], "90", 1, &["do not compute steps of 40000", "step_positions_max"]);
}
