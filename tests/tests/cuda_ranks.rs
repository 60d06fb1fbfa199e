//! Ranks of a model on devices, over the stand-in for the driver: whatever the layout and whoever is killed, the stream is that of one
//! process on the CPU, and the journals are recomputed there to equal digests. Nothing here has met a GPU.

use lite_llm_tests::command::{self, Ran, failures, tokens};
use lite_llm_tests::cuda::{compile_cufile, counts, say_skipped};
use lite_llm_tests::gpu_ranks::{Layout, Machine, RUN, prompt};
use lite_llm_tests::harness::folder;
use std::io::{BufRead, BufReader};
use std::path::Path;

/// The machine, whose ranks exchange through the host.
fn machine() -> Option<Machine> {
    Machine::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "ranks on a stand-in for GPUs")
}

#[test]
fn every_layout_has_the_stream_of_the_cpu() {
    let Some(machine) = machine() else { return };
    let [prompt, long] = [70, 100].map(prompt);
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
    // A step of 100 positions that use 3 experts each: more results than ranks have places for.
    let run_long = [&RUN[..RUN.len() - 1], &["100", "--prompt-tokens", &long, "--memory", "400MiB"]].concat();
    let model = folder("deepseek_v2");
    let expected = machine.alone(&model, &run_long);
    for topology in ["ep=3", "tp=2,ep=2"] {
        machine.check(&Layout::new(&model, topology), &run_long, &[("SEED", "6")], &expected);
    }
    // All nodes on one device, which is not the first.
    let model = folder("olmoe");
    let layout = Layout { device: "cuda:1", ..Layout::new(&model, "ep=2") };
    machine.check(&layout, &run, &[], &machine.alone(&model, &run));
}

#[test]
fn experts_come_and_go_in_every_rank_with_the_same_bits() {
    let Some(machine) = machine() else { return };
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
fn experts_come_straight_from_the_file_into_every_rank() {
    let Some(mut machine) = machine() else { return };
    machine.gpus.add_library(&compile_cufile(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap());
    let (model, tallies) = (machine.gpus.place.path("native"), machine.gpus.place.path("reads"));
    let (native, files) = (model.to_str().unwrap(), tallies.join("%p"));
    let files = files.to_str().unwrap();
    let imported = machine.gpus.place.run(["import", folder("olmoe").to_str().unwrap(), native]);
    assert_eq!(imported.code, Some(0), "{}", imported.stderr);
    std::fs::create_dir(&tallies).unwrap();
    let prompt = prompt(20);
    let run = [&RUN[..], &["--prompt-tokens", &prompt]].concat();
    let expected = machine.alone(&model, &run);
    for (topology, io) in [("ep=2", &[][..]), ("ep=2", &["--io", "direct"]), ("pp=2", &["--io", "direct"])] {
        let layout = Layout::new(&model, topology);
        let memory = (machine.least(&layout, &run) + (30 << 10)).to_string();
        let run = [&run[..], io, &["--memory", &memory]].concat();
        let said = machine.check(&layout, &run, &[("SEED", "1"), ("CUFILE_TALLY", files)], &expected);
        if said.contains("O_DIRECT") {
            return say_skipped("experts straight into ranks: this file system has no reads past the cache");
        }
        for node in ["node 0", "node 1"] {
            let words = "experts are read straight into memory of the GPU (GPUDirect Storage, nvidia-fs 2.17), and verified after a \
                         copy back; all slots are registered with cuFile";
            assert!(said.contains(&format!("{node} in incarnation 1: {words}")), "{topology} {node}: {said}");
        }
        // Whoever opens the library reads a piece of each shard first, also the head, where it was asked for.
        let shards = std::fs::read_dir(&model).unwrap().map(|entry| entry.unwrap().file_name());
        let trials = shards.filter(|name| name.to_str().unwrap().starts_with("experts-")).count() as u64;
        let counts = std::fs::read_dir(&tallies).unwrap().map(|file| counts(&file.unwrap().path()));
        let counts: Vec<_> = counts.collect();
        let ranks: Vec<_> = counts.iter().filter(|counts| counts["reads"] > trials).collect();
        assert_eq!(ranks.len(), 2, "{topology}: {counts:?}");
        assert!(
            ranks.iter().all(|counts| counts["known"] == counts["reads"]),
            "slots are registered: {counts:?}"
        );
        std::fs::remove_dir_all(&tallies).unwrap();
        std::fs::create_dir(&tallies).unwrap();
    }
    // Where it cannot be had that is refused, or another way is used and each node says why.
    let layout = Layout::new(&model, "ep=2");
    let without = |io: &[&str], layout: &Layout<'_>, wish: &str| -> Ran {
        let run = [&run[..], io, &["--memory", "300MiB"]].concat();
        command::run(machine.cluster(layout, &run, &[("CUFILE", wish)]))
    };
    let refused = without(&["--io", "direct"], &layout, "files");
    refused.refuses(1, &["cannot be read with direct", "cuFileHandleRegister fails", "(5008)"]);
    let rows = Layout::new(&model, "tp=2");
    let refused = without(&["--io", "direct"], &rows, "");
    refused.refuses(1, &["cannot be read with direct", "each rank cuts its rows", "tp=1"]);
    let ran = without(&[], &layout, "fails");
    assert_eq!((ran.code, tokens(&ran)), (Some(0), expected), "{}", ran.stderr);
    let words = "; not straight into memory of the GPU: cuFileDriverOpen fails";
    assert_eq!(ran.stderr.matches(words).count(), 2, "{}", ran.stderr);
}

/// Steps of decode are recorded the second time their shape comes: what is between two exchanges is a graph.
#[test]
fn ranks_find_users_and_record_steps_where_all_experts_are_resident() {
    let Some(machine) = machine() else { return };
    let mut run = [&RUN[..], &["--prompt-tokens", "3,5,7,11,13,17,19,23,29", "--memory", "400MiB"]].concat();
    run[1] = "12";
    for (name, topology) in [
        ("olmoe", "tp=2"),
        ("olmoe", "pp=2"),
        ("olmoe", "ep=2"),
        ("gpt_oss", "tp=2,ep=2"),
        ("qwen2_moe", "ep=3"),
        ("deepseek_v2", "ep=2,pp=2"),
        ("deepseek_v2", "tp=2,pp=2"),
        ("llama", "tp=2"),
    ] {
        let model = folder(name);
        let (layout, expected) = (Layout::new(&model, topology), machine.alone(&model, &run));
        let tallies = machine.tallies(&layout, &run, &[("SEED", "4")], &expected);
        for of_rank in &tallies {
            // Eleven of decode: one by one, recorded, and known nine times.
            assert_eq!(of_rank["replay"], 10 * of_rank["graph"], "{name} {topology}: {of_rank:?}");
            assert!(of_rank["graph"] > 0, "{name} {topology}: {of_rank:?}");
        }
        // A stage may have no experts.
        let finds = tallies.iter().any(|of_rank| of_rank["find_users"] > 0);
        assert_eq!(finds, name != "llama", "{name} {topology}: {tallies:?}");
    }
    // A driver that makes one graph, and no more after it.
    let model = folder("olmoe");
    let (layout, expected) = (Layout::new(&model, "tp=2"), machine.alone(&model, &run));
    for of_rank in machine.tallies(&layout, &run, &[("FAULT", "graph:3:801")], &expected) {
        assert_eq!(of_rank["replay"], 1, "{of_rank:?}");
    }
}

#[test]
fn rows_of_many_requests_share_the_steps_of_ranks() {
    let Some(machine) = machine() else { return };
    let model = folder("olmoe");
    let cluster = ["supervise", "--nodes", "4", "--topology", "tp=2,pp=2", "--"];
    let batch = machine.batch();
    assert_eq!(machine.results(batch, &cluster, &model, "cuda"), machine.results(batch, &[], &model, "cpu"));
}

#[test]
fn ranks_that_are_killed_cost_no_bit() {
    let Some(machine) = machine() else { return };
    let model = folder("olmoe");
    // One stands by, and takes the seat of the first that is killed. What a device may be asked for is left to the supervisor.
    let layout = Layout { nodes: 5, restarts: "100", ..Layout::new(&model, "tp=2,ep=2") };
    let mut run = [&RUN[..], &["--prompt-tokens", "3,5,7,11,13,17,19,23,29"]].concat();
    run[1] = "120";
    let expected = machine.alone(&model, &run);
    let ran = machine.kills(machine.cluster(&layout, &run, &[]), &[(20, 0), (60, 2)]);
    assert_eq!(tokens(&ran), expected);
    assert!(failures(&machine.gpus.place, 5).len() >= 2, "{}", ran.stderr);
    for node in 0..5 {
        machine.replay(&model, node);
    }
}

#[test]
fn a_lost_device_ends_its_rank_and_the_stream_goes_on() {
    let Some(machine) = machine() else { return };
    let model = folder("olmoe");
    let layout = Layout { restarts: "100", ..Layout::new(&model, "ep=2") };
    let mut run = [&RUN[..], &["--prompt-tokens", "3,5,7,11,13", "--memory", "300MiB"]].concat();
    run[1] = "30";
    let expected = machine.alone(&model, &run);
    // Of every life, after some steps: the next one goes on from there.
    for (fault, more) in [("launch:1500:700", &[][..]), ("launch:1500:hang", &["--device-patience", "1s"])] {
        let run = [&run[..], more].concat();
        let ran = command::run(machine.cluster(&layout, &run, &[("FAULT", fault)]));
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
    let Some(machine) = machine() else { return };
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
        let ran = command::run(machine.cluster(&layout, &run, &[]));
        assert_eq!(ran.code, Some(0), "{before} to {after}: {}", ran.stderr);
        assert_eq!(tokens(&ran), expected, "{before} to {after}");
        machine.replay(&model, 0);
        std::fs::remove_dir_all(machine.gpus.place.path("state")).unwrap();
    }
}

#[test]
fn what_cannot_be_is_refused_before_a_node_is_started() {
    let Some(machine) = machine() else { return };
    let model = folder("olmoe");
    let layout = Layout::new(&model, "ep=2");
    let run = [&RUN[..], &["--prompt-tokens", "1"]].concat();
    let refuses_on = |layout: &Layout<'_>, more: &[&str], kind: &str, code: i32, words: &[&str]| {
        let mut command = machine.cluster(layout, &[&run[..], more].concat(), &[]);
        command.env("LITE_LLM_STAND_IN", kind);
        let ran = command::run(command);
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
