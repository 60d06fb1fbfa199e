//! Ranks whose values go from device to device by NCCL, over stand-ins for driver and NCCL: the stream is that of one process on the CPU,
//! and the journals are recomputed there to equal digests; and where NCCL cannot be, values go through the host. Nothing here has met a
//! GPU.

use lite_llm_tests::command::{self, failures, tokens};
use lite_llm_tests::cuda::counts;
use lite_llm_tests::gpu_ranks::{Layout, Machine, RUN, prompt};
use lite_llm_tests::harness::folder;
use std::path::Path;

/// What each node says.
const DIRECT: &str = "ranks exchange from device to device, by NCCL 2.27.3";
const THROUGH_THE_HOST: &str = "ranks exchange through the host: ";

/// The machine, which has NCCL and so many devices.
fn machine(devices: u32) -> Option<Machine> {
    let machine =
        Machine::new(Path::new(env!("CARGO_TARGET_TMPDIR")), "ranks on stand-ins for GPUs and NCCL")?;
    Some(Machine { nccl: Some(devices), ..machine })
}

/// How often the processes that ended well were asked for this, one number each.
fn asked_for(machine: &Machine, what: &str) -> Vec<u64> {
    let files = std::fs::read_dir(machine.gpus.place.path("")).unwrap().map(|entry| entry.unwrap().path());
    let tallies = files.filter(|file| file.to_string_lossy().contains("tally-"));
    let counted = tallies.map(|file| {
        let counts = counts(&file);
        std::fs::remove_file(file).unwrap();
        counts[what]
    });
    counted.filter(|count| *count > 0).collect()
}

#[test]
fn every_layout_goes_from_device_to_device_with_the_stream_of_the_cpu() {
    let Some(machine) = machine(4) else { return };
    let prompt = prompt(70);
    let run = [&RUN[..], &["--prompt-tokens", &prompt, "--memory", "400MiB"]].concat();
    let tally = machine.gpus.place.path("tally-%p");
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
            let wishes = [("SEED", &*seed.to_string()), ("TALLY", tally.to_str().unwrap())];
            let said = machine.check(&layout, &run, &wishes, &expected);
            let nodes = layout.nodes as usize;
            assert_eq!(said.matches(DIRECT).count(), nodes, "{name}, {topology}: {said}");
            assert_eq!(asked_for(&machine, "exchange").len(), nodes, "{name}, {topology}");
        }
    }
}

/// Where all experts are there, a rank of a step of decode hears of the host at its beginning and at its end, whatever it exchanges.
#[test]
fn nothing_is_asked_of_the_host_between_exchanges() {
    let Some(machine) = machine(4) else { return };
    let model = folder("olmoe");
    let tallies = |topology: &str, tokens: &str| {
        let layout = Layout::new(&model, topology);
        let mut run = [&RUN[..], &["--prompt-tokens", "3,5,7,11,13,17,19", "--memory", "400MiB"]].concat();
        run[1] = tokens;
        machine.tallies(&layout, &run, &[("SEED", "6")], &machine.alone(&model, &run))
    };
    // All ranks do the same.
    let pairs = ["tp=2", "ep=2"].map(|topology| [tallies(topology, "4"), tallies(topology, "12")]);
    for (few, many) in pairs.iter().flat_map(|[few, many]| few.iter().zip(many)) {
        let more = |what: &str| many[what] - few[what];
        assert_eq!((more("copy"), more("fetch"), more("graph")), (8, 8, 0), "{few:?} {many:?}");
        assert_eq!(more("replay"), 8 * many["graph"], "{few:?} {many:?}");
        // What comes after the last exchange is a graph too.
        assert_eq!(more("exchange"), 8 * (many["graph"] - 1), "{few:?} {many:?}");
        assert!(many["graph"] > 2, "{many:?}");
    }
}

#[test]
fn experts_come_and_go_in_every_rank_with_the_same_bits() {
    let Some(machine) = machine(4) else { return };
    let prompt = prompt(20);
    let run = [&RUN[..], &["--prompt-tokens", &prompt]].concat();
    for (name, topology) in [("olmoe", "tp=2,ep=2"), ("qwen2_moe", "ep=3"), ("deepseek_v2", "tp=2,pp=2")] {
        let model = folder(name);
        let (layout, expected) = (Layout::new(&model, topology), machine.alone(&model, &run));
        let memory = (machine.least(&layout, &run) + (30 << 10)).to_string();
        let run = [&run[..], &["--foresight", "on", "--memory", &memory]].concat();
        let said = machine.check(&layout, &run, &[("SEED", "1")], &expected);
        assert!(said.contains(DIRECT), "{said}");
    }
}

#[test]
fn rows_of_many_requests_share_the_steps_of_ranks() {
    let Some(machine) = machine(4) else { return };
    let (model, batch) = (folder("olmoe"), machine.batch());
    let cluster = ["supervise", "--nodes", "4", "--topology", "tp=2,pp=2", "--"];
    assert_eq!(machine.results(batch, &cluster, &model, "cuda"), machine.results(batch, &[], &model, "cpu"));
}

#[test]
fn ranks_that_are_killed_in_an_exchange_cost_no_bit() {
    let Some(machine) = machine(5) else { return };
    let model = folder("olmoe");
    // One stands by, and takes the seat of the first that is killed. It exchanges something most of the time.
    let layout = Layout { nodes: 5, restarts: "100", ..Layout::new(&model, "tp=2,ep=2") };
    let mut run = [&RUN[..], &["--prompt-tokens", "3,5,7,11,13,17,19,23,29"]].concat();
    run[1] = "120";
    let expected = machine.alone(&model, &run);
    let tally = machine.gpus.place.path("tally-%p");
    let cluster = machine.cluster(&layout, &run, &[("TALLY", tally.to_str().unwrap())]);
    let ran = machine.kills(cluster, &[(20, 0), (60, 2)]);
    assert_eq!(tokens(&ran), expected);
    assert!(ran.stderr.contains(DIRECT), "{}", ran.stderr);
    assert!(!ran.stderr.contains("the GPU is lost"), "who is left goes on: {}", ran.stderr);
    // Some have been of the first epoch and of one after it, each with a communicator of its own. Both deaths may fall into one.
    let joined = asked_for(&machine, "join");
    assert!(joined.iter().any(|&joined| joined >= 2), "{joined:?}: {}", ran.stderr);
    for node in 0..5 {
        machine.replay(&model, node);
    }
}

#[test]
fn an_error_of_nccl_costs_no_bit() {
    let Some(machine) = machine(2) else { return };
    let model = folder("olmoe");
    let layout = Layout { restarts: "100", ..Layout::new(&model, "ep=2") };
    let run = ["--prompt-tokens", "3,5,7,11,13", "--memory", "300MiB", "--device-patience", "1s"];
    let mut run = [&RUN[..], &run].concat();
    run[1] = "30";
    let expected = machine.alone(&model, &run);
    // Of every life, after some steps: an internal error, one that says that another rank is gone, a device that is lost meanwhile.
    for fault in ["exchange:70:3", "exchange:70:6", "launch:1500:700"] {
        let ran = command::run(machine.cluster(&layout, &run, &[("FAULT", fault)]));
        assert_eq!(ran.code, Some(0), "{fault}: {}", ran.stderr);
        assert_eq!(tokens(&ran), expected, "{fault}");
        for words in ["the GPU is lost", DIRECT] {
            assert!(ran.stderr.contains(words), "{fault}: {}", ran.stderr);
        }
        assert!(!failures(&machine.gpus.place, 2).is_empty(), "{fault}: no end was recorded");
        machine.replay(&model, 0);
        machine.forget();
    }
}

#[test]
fn a_bit_that_changes_on_its_way_is_found_by_a_replay() {
    let Some(machine) = machine(2) else { return };
    let model = folder("olmoe");
    let layout = Layout { restarts: "0", ..Layout::new(&model, "tp=2") };
    let run = [&RUN[..], &["--prompt-tokens", "3,5,7,11,13", "--memory", "300MiB"]].concat();
    command::run(machine.cluster(&layout, &run, &[("FAULT", "exchange:5:flip")]));
    // Ranks gather what either has made of it, and have the same: they do not see it.
    let replayed = machine.gpus.place.run(["replay", "state/node-0", "--full", model.to_str().unwrap()]);
    assert_ne!(replayed.code, Some(0), "nobody has noticed: {}", replayed.stdout);
}

#[test]
fn where_nccl_cannot_be_values_go_through_the_host_and_it_is_said() {
    let Some(machine) = machine(2) else { return };
    let model = folder("olmoe");
    let run = ["--prompt-tokens", "3,5,7,11,13", "--memory", "300MiB", "--device-patience", "2s"];
    let run = [&RUN[..], &run].concat();
    let expected = machine.alone(&model, &run);
    let (two, four) = (Layout::new(&model, "ep=2"), Layout::new(&model, "tp=2,ep=2"));
    let through_the_host = |machine: &Machine, layout: &Layout<'_>, wishes: &[(&str, &str)], why: &str| {
        let said = machine.check(layout, &run, wishes, &expected);
        let expected = format!("{THROUGH_THE_HOST}{why}");
        assert_eq!(said.matches(&expected).count(), layout.nodes as usize, "{expected}: {said}");
        assert!(!said.contains(DIRECT), "{said}");
    };
    // Nodes have two devices in turn; or all of them one.
    through_the_host(&machine, &four, &[], "ranks 0 and 2 are on one device");
    let one = Layout { device: "cuda:1", ..two.clone() };
    through_the_host(&machine, &one, &[], "ranks 0 and 1 are on one device");
    let older = [("NCCL_VERSION", "21704")];
    through_the_host(&machine, &two, &older, "rank 0: NCCL is 2.17.4, older than 2.18; install a newer one");
    for (fault, why) in [
        ("unique:1:2", "rank 0: ncclGetUniqueId: unhandled system error"),
        ("join:1:3", "rank 0: ncclCommInitRankConfig: internal error"),
        ("join:1:hang", "rank 0: NCCL did not bring the ranks together in 2s"),
    ] {
        // These are no faults of the self-test, and no other faults are counted.
        through_the_host(&machine, &two, &[("FAULT", fault)], why);
    }
    let without = Machine { nccl: None, ..machine };
    through_the_host(&without, &two, &[], "rank 0: there is no NCCL: libnccl.so.2 was not found");
}
