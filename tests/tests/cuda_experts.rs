//! How experts come from the disk to a GPU (`hw/src/cuda/staging.rs`), over a stand-in for the driver: reads of many experts at
//! once, copies up and back that run late and in any order that streams and events allow. Nothing here has met a GPU.

use lite_llm_tests::command::{Ran, parse_stream};
use lite_llm_tests::gpu_machine::{Machine, folder, prompt};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A machine with a GPU, and a native checkpoint there.
struct Served {
    machine: Machine,
    model: PathBuf,
    /// A little more memory than it is served with at least, so that experts come and go.
    memory: String,
}

impl Served {
    fn new(name: &str, more: &[&str]) -> Option<Self> {
        let target = env!("CARGO_TARGET_TMPDIR");
        let mut machine = Machine::new(target, "experts from the disk to a stand-in for a GPU")?;
        machine.length = 20;
        let model = machine.import(&folder("fixtures").join(name), more);
        let memory = (machine.least(&model, &[]) + (60 << 10)).to_string();
        Some(Self { machine, model, memory })
    }

    fn on(&self, io: &'static str) -> Vec<&str> {
        vec!["--device", "cuda", "--memory", &self.memory, "--io", io]
    }

    /// Whether the system of this machine has io_uring.
    fn has_uring(&self) -> bool {
        let ran = self.machine.generate(&self.model, "asked", &["--device", "cpu", "--io", "uring"], &[]);
        std::fs::remove_dir_all(self.machine.gpus.place.path("asked")).ok();
        if ran.code != Some(0) {
            lite_llm_tests::cuda::say_skipped("io_uring for a GPU, which this system does not have");
        }
        ran.code == Some(0)
    }
}

/// The shards in which experts lie.
fn shards(model: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(model).unwrap().map(|entry| entry.unwrap().path());
    let is_shard = |path: &PathBuf| path.file_name().unwrap().to_str().unwrap().starts_with("experts-");
    let shards: Vec<PathBuf> = entries.filter(is_shard).collect();
    assert!(!shards.is_empty());
    shards
}

/// Every way brings experts of a model, with the bits of the CPU.
fn every_way_brings_experts(name: &str, seeds: [u64; 4]) {
    let Some(served) = Served::new(name, &[]) else { return };
    let Served { machine, model, memory } = &served;
    let expected = machine.expected(model, &[]);
    for (io, words) in [("uring", "with io_uring"), ("pread", "with pread"), ("mmap", "with mmap")] {
        if io == "uring" && !served.has_uring() {
            continue;
        }
        let ran = machine.generate(model, "said", &served.on(io), &[]);
        assert_eq!(ran.json()["tokens"], expected, "{name} {io}");
        let said = ran.stderr.contains(words) && ran.stderr.contains("copied to the GPU from there");
        assert!(said, "{}", ran.stderr);
        std::fs::remove_dir_all(machine.gpus.place.path("said")).unwrap();
        for seed in seeds {
            let more = ["--memory", memory, "--io", io, "--foresight", "on"];
            machine.check(model, &more, &[("SEED", &seed.to_string())], &expected);
        }
        // What is in a slot goes to the warm arena first, or changes places.
        let warm = ["--warm", "120KiB", "--io", io];
        let memory = (machine.least(model, &warm) + (60 << 10)).to_string();
        for seed in ["7", "8", "9"] {
            let more = [&warm[..], &["--memory", &memory]].concat();
            machine.check(model, &more, &[("SEED", seed)], &expected);
        }
    }
    // Whatever is best is used where nobody says.
    machine.check(model, &["--memory", memory], &[], &expected);
}

#[test]
fn every_way_brings_experts_of_olmoe() {
    every_way_brings_experts("olmoe", [0, 1, 2, 3]);
}

#[test]
fn every_way_brings_experts_of_gpt_oss() {
    every_way_brings_experts("gpt_oss", [10, 11, 12, 13]);
}

#[test]
fn every_way_brings_experts_of_qwen2_moe() {
    every_way_brings_experts("qwen2_moe", [20, 21, 22, 23]);
}

/// Experts of integers, of which several tiers have slots of their own.
#[test]
fn quantised_and_tiered_experts_come_by_the_same_way() {
    for more in [&["--quantise", "q4"][..], &["--quantise", "q8", "--tiers", "core:5:hot,rest:3:cold"]] {
        let Some(served) = Served::new("olmoe", more) else { return };
        let expected = served.machine.expected(&served.model, &[]);
        for seed in ["1", "2"] {
            let more = ["--memory", &served.memory];
            served.machine.check(&served.model, &more, &[("SEED", seed)], &expected);
        }
    }
}

/// A node begins with a look at all weights: a disk goes wrong after it.
#[test]
fn what_is_damaged_on_the_disk_meanwhile_is_a_fault_that_names_it() {
    let Some(served) = Served::new("olmoe", &[]) else { return };
    let Served { machine, model, memory } = &served;
    let all: Vec<(PathBuf, Vec<u8>)> =
        shards(model).into_iter().map(|path| (path.clone(), std::fs::read(path).unwrap())).collect();
    let prompt = prompt(model, 20);
    let run = ["run", model.to_str().unwrap(), "--prompt-tokens", &prompt, "--max-tokens", "40"];
    let run =
        [&run[..], &["--ignore-eos", "--stream", "--json", "--state", "gpu", "--request-id", "one"]].concat();
    let on = ["--device", "cuda", "--memory", memory, "--foresight", "off"];
    let cpu = machine.gpus.place.run(run.iter().chain(&["--device", "cpu"]));
    let (expected, _) = parse_stream(&cpu.stdout);
    assert_eq!(expected.len(), 40, "{}", cpu.stderr);
    let uring = served.has_uring();
    for io in ["uring", "pread"].into_iter().filter(|io| uring || *io != "uring") {
        for (flips, words) in [(true, "checksum"), (false, "comes short at byte")] {
            std::fs::remove_dir_all(machine.gpus.place.path("gpu")).unwrap();
            let line = [&run[..], &on, &["--io", io]].concat();
            let mut child = machine.gpus.command(&line, &[("SEED", "5")]).spawn().unwrap();
            let mut out = BufReader::new(child.stdout.take().unwrap());
            let mut text = String::new();
            (0..3).for_each(|_| assert!(out.read_line(&mut text).unwrap() > 0));
            for (path, clean) in &all {
                let file = std::fs::File::options().write(true).open(path).unwrap();
                if flips {
                    let bytes: Vec<u8> = clean.iter().map(|byte| byte ^ 4).collect();
                    file.write_all_at(&bytes, 0).unwrap();
                } else {
                    file.set_len(100).unwrap();
                }
            }
            out.read_to_string(&mut text).unwrap();
            let ran: Ran = child.wait_with_output().unwrap().into();
            assert_ne!(ran.code, Some(0), "{io}: {text}");
            for words in [words, "experts-", "expert "] {
                assert!(ran.stderr.contains(words) || text.contains(words), "{io}: {text}{}", ran.stderr);
            }
            all.iter().for_each(|(path, clean)| std::fs::write(path, clean).unwrap());
        }
    }
}

/// A bit that is flipped on the way up or back is copied once more; again and again, the device is lost.
#[test]
fn a_flipped_bit_on_the_way_is_found() {
    let Some(served) = Served::new("olmoe", &[]) else { return };
    let Served { machine, model, memory } = &served;
    let expected = machine.expected(model, &[]);
    let more = ["--memory", memory];
    let on = [&more[..], &["--device", "cuda"]].concat();
    let many = machine.tally(model, &more, 5);
    for what in ["pages", "pages_back"] {
        let all = many[what];
        assert!(all > 20, "experts come and go: {many:?}");
        for at in [all / 4, all / 2, all * 3 / 4] {
            let seed = at.to_string();
            let wishes = format!("{what}:{at}:flip");
            machine.check(model, &more, &[("FAULT", &wishes), ("SEED", &seed)], &expected);
            // Others are copied before it is copied again.
            let wishes = (at..at + 16).map(|at| format!("{what}:{at}:flip")).collect::<Vec<_>>().join(",");
            let ran = machine.generate(model, "gpu", &on, &[("FAULT", &wishes), ("SEED", &seed)]);
            // Of a parameter that is loaded at start it ends the boot sequence.
            ran.refuses(1, &["not there as they were sent"]);
            let of_expert = what == "pages_back";
            assert!(!of_expert || ran.stderr.contains("the GPU is lost"), "{at}: {}", ran.stderr);
            std::fs::remove_dir_all(machine.gpus.place.path("gpu")).unwrap();
        }
    }
}

#[test]
fn a_device_that_is_lost_while_experts_come_ends_the_node_and_the_stream_goes_on() {
    let Some(served) = Served::new("olmoe", &[]) else { return };
    let Served { machine, model, memory } = &served;
    let expected = machine.expected(model, &[]);
    let on = ["--device", "cuda", "--memory", memory];
    let hasty = [&on[..], &["--device-patience", "1s"]].concat();
    let all = machine.tally(model, &on[2..], 5);
    for (sixths, how, more, words, after) in [
        (3, "700", &on[..], "cu", &on[..]),
        (4, "1", &on, "cuMemcpyHtoDAsync", &["--device", "cpu"]),
        (5, "hang", &hasty, "no progress for 1s", &on),
    ] {
        for what in ["pages", "pages_back"] {
            let at = all[what] * sixths / 6;
            let words = if how == "1" && what == "pages_back" { "cuMemcpyDtoHAsync" } else { words };
            let fault = format!("{what}:{at}:{how}");
            let ran = machine.generate(model, "gpu", more, &[("FAULT", &fault)]);
            ran.refuses(1, &["the GPU is lost", words, "start again", "the journal goes on"]);
            let resumed = machine.generate(model, "gpu", after, &[]).json();
            assert_eq!(resumed["tokens"], expected, "after {fault}");
            machine.replay(model);
            std::fs::remove_dir_all(machine.gpus.place.path("gpu")).unwrap();
        }
    }
}

/// What experts pass through is counted, and pinned before any is read.
#[test]
fn rooms_that_cannot_be_pinned_are_refused_with_numbers() {
    let Some(served) = Served::new("olmoe", &[]) else { return };
    let Served { machine, model, memory } = &served;
    if !served.has_uring() {
        return;
    }
    let on = ["--device", "cuda", "--memory", memory, "--io", "uring"];
    let ran = machine.generate(model, "few", &on, &[("PINNED", "20000")]);
    ran.refuses(1, &["does not pin", "free memory of the host"]);
}
