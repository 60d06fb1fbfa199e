//! Experts from their files straight into memory of a GPU (`hw/src/cuda/cufile`), over stand-ins for the driver and for cuFile, which
//! refuses every use that is wrong. Nothing here has met a GPU.

use lite_llm_tests::command::Ran;
use lite_llm_tests::cuda::{compile_cufile, counts, cufile_to_link, say_skipped};
use lite_llm_tests::gpu_machine::{Machine, folder};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

const NOT: &str = "not straight into memory of the GPU: ";

/// A machine with a GPU and cuFile, and a native checkpoint there, for which it has a little more memory than the least: experts come
/// and go.
struct Served {
    machine: Machine,
    model: PathBuf,
    memory: String,
    expected: Value,
}

impl Served {
    fn new(name: &str) -> Option<Self> {
        Self::with(name, true)
    }

    fn with(name: &str, has_library: bool) -> Option<Self> {
        let target = env!("CARGO_TARGET_TMPDIR");
        let mut machine = Machine::new(target, "experts straight into a stand-in for a GPU")?;
        machine.length = 20;
        if has_library {
            machine.gpus.add_library(&compile_cufile(Path::new(target))?);
        }
        let model = machine.import(&folder("fixtures").join(name), &[]);
        let memory = (machine.least(&model, &[]) + (60 << 10)).to_string();
        let expected = machine.expected(&model, &[]);
        let this = Self { machine, model, memory, expected };
        if has_library && this.run(&["--io", "direct"], &[]).stderr.contains("O_DIRECT") {
            say_skipped("experts straight into a GPU: this file system has no reads past the cache");
            return None;
        }
        Some(this)
    }

    /// Generates on the device, into a state that nobody needs after it.
    fn run(&self, more: &[&str], wishes: &[(&str, &str)]) -> Ran {
        let on = ["--device", "cuda", "--memory", &self.memory, "--foresight", "off", "--threads", "1"];
        let ran = self.machine.generate(&self.model, "said", &[&on, more].concat(), wishes);
        std::fs::remove_dir_all(self.machine.gpus.place.path("said")).ok();
        ran
    }

    /// Runs to the end, with the tokens of the CPU; how often cuFile was asked for what.
    fn reads(&self, more: &[&str], wishes: &[(&str, &str)]) -> (Ran, BTreeMap<String, u64>) {
        let file = self.machine.gpus.place.path("reads");
        std::fs::remove_file(&file).ok();
        let wishes = [wishes, &[("CUFILE_TALLY", file.to_str().unwrap())]].concat();
        let ran = self.run(more, &wishes);
        assert_eq!(ran.json()["tokens"], self.expected, "{more:?} {wishes:?}");
        (ran, counts(&file))
    }

    /// Shards, of each of which a piece is read before all else.
    fn trials(&self) -> u64 {
        let files = std::fs::read_dir(&self.model).unwrap().map(|entry| entry.unwrap().file_name());
        files.filter(|name| name.to_str().unwrap().starts_with("experts-")).count() as u64
    }

    /// Tokens and, on the CPU, every digest.
    fn check(&self, more: &[&str], wishes: &[(&str, &str)]) {
        let more = [&["--memory", &self.memory], more].concat();
        self.machine.check(&self.model, &more, wishes, &self.expected);
    }
}

#[test]
fn experts_come_straight_from_the_file_with_the_bits_of_the_cpu() {
    for name in ["olmoe", "gpt_oss"] {
        let Some(served) = Served::new(name) else { return };
        let place = &served.machine.gpus.place;
        let pages = ["direct", "pread"].map(|io| {
            let file = place.path("pages");
            let ran = served.run(&["--io", io], &[("TALLY", file.to_str().unwrap())]);
            assert_eq!(ran.json()["tokens"], served.expected, "{io}");
            counts(&file)["pages"]
        });
        let (ran, reads) = served.reads(&[], &[]);
        let words = "experts are read straight into memory of the GPU (GPUDirect Storage, nvidia-fs 2.17)";
        assert!(ran.stderr.contains(words), "it is what is used where nobody says: {}", ran.stderr);
        let of_experts = reads["reads"] - served.trials();
        assert!(of_experts > 20, "experts come and go: {reads:?}");
        assert_eq!(reads["known"], reads["reads"], "slots are registered");
        assert_eq!(pages[1] - pages[0], of_experts, "no expert passes through the host: {pages:?}");
        let registered = "verified after a copy back; all slots are registered with cuFile";
        assert!(ran.stderr.contains(registered), "{}", ran.stderr);
        // What cannot be registered is read into all the same, and it is said, with whatever code it is refused.
        for (wish, known, words) in [
            ("memory", 0, "cuFileBufRegister fails: CU_FILE_GPU_MEMORY_PINNING_FAILED (5036)"),
            ("little", served.trials(), "CU_FILE_GPU_MEMORY_PINNING_FAILED (5036)"),
            ("unknown", 0, "cuFileBufRegister fails: error 5999, with the CUDA driver's error 7"),
        ] {
            let (ran, reads) = served.reads(&["--io", "direct"], &[("CUFILE", wish)]);
            assert_eq!(reads["known"], known, "{wish}: what is tried has room or has not");
            for words in ["; slots are not registered", words, "raise max_device_pinned_mem_size_kb"] {
                assert!(ran.stderr.contains(words), "{wish}: {}", ran.stderr);
            }
        }
        for seed in ["1", "2", "3"] {
            served.check(&["--io", "direct", "--foresight", "on"], &[("SEED", seed)]);
        }
        // What is in a slot goes to the warm arena first, or changes places.
        let warm = ["--warm", "120KiB"];
        let memory = (served.machine.least(&served.model, &warm) + (60 << 10)).to_string();
        for seed in ["4", "5"] {
            let more = ["--warm", "120KiB", "--memory", &memory];
            served.machine.check(&served.model, &more, &[("SEED", seed)], &served.expected);
        }
    }
}

#[test]
fn a_read_that_goes_wrong_once_is_made_once_more() {
    let Some(served) = Served::new("olmoe") else { return };
    let all = served.reads(&[], &[]).1["reads"];
    for (nth, how) in ["flip", "short", "5", "5030", "4"].into_iter().enumerate() {
        let at = served.trials() + (all - served.trials()) * (nth as u64 + 1) / 6;
        let (_, reads) = served.reads(&[], &[("CUFILE_FAULT", &format!("{at}:{how}"))]);
        assert_eq!(reads["reads"], all + 1, "{how} at {at}");
    }
    // Whatever thread it meets.
    let at = served.trials();
    let flips = [5, 9, 14, 20].map(|nth| format!("{}:flip", at + nth)).join(",");
    for seed in ["1", "2"] {
        served.check(&["--io", "direct"], &[("CUFILE_FAULT", &flips), ("SEED", seed)]);
    }
    // So is a bit that is another after the copy back.
    let pages = served.machine.tally(&served.model, &["--memory", &served.memory], 5)["pages_back"];
    let fault = format!("pages_back:{}:flip", pages - 3);
    served.check(&[], &[("FAULT", &fault)]);
}

#[test]
fn a_read_that_stays_wrong_is_a_fault_that_names_the_expert() {
    let Some(served) = Served::new("olmoe") else { return };
    for (how, words) in [
        ("flip", "checksum"),
        ("short", "comes short at byte"),
        ("5", "Input/output error"),
        ("5030", "cuFile's error 5030"),
    ] {
        let fault = format!("{}+:{how}", served.trials() + 9);
        let ran = served.run(&["--io", "direct"], &[("CUFILE_FAULT", &fault)]);
        assert_ne!(ran.code, Some(0), "{how}");
        for words in [words, "experts-", "expert "] {
            let said = ran.stderr.contains(words) || ran.stdout.contains(words);
            assert!(said, "{words}: {}{}", ran.stdout, ran.stderr);
        }
    }
}

#[test]
fn where_it_cannot_be_had_another_way_is_used_and_it_is_said_why() {
    let Some(served) = Served::new("olmoe") else { return };
    for (wish, value, words) in [
        ("CUFILE", "fails", "CU_FILE_DRIVER_NOT_INITIALIZED (5001)"),
        ("CUFILE", "unopened", "cuFileDriverOpen fails: error 5999"),
        ("CUFILE", "compat", "cuFileDriverOpen fails: CU_FILE_NVFS_DRIVER_ERROR (5010)"),
        ("CUFILE", "forced", "compat mode, which copies through the host: there is no nvidia-fs"),
        ("CUFILE", "allowed", "does not let its compat mode be switched off"),
        ("CUFILE", "files", "cuFileHandleRegister fails: CU_FILE_IO_NOT_SUPPORTED (5008)"),
        ("CUFILE_FAULT", "1:5", "cuFileRead fails in a trial: Input/output error"),
        ("CUFILE_FAULT", "1:flip", "does not bring the bytes of the file"),
        ("CUFILE_FAULT", "2:short", "does not bring the bytes of the file"),
    ] {
        let (ran, _) = served.reads(&[], &[(wish, value)]);
        assert!(ran.stderr.contains(&format!("; {NOT}")), "{value}: {}", ran.stderr);
        assert!(ran.stderr.contains(words), "{value}: {}", ran.stderr);
        assert!(ran.stderr.contains("copied to the GPU from there"), "{value}: {}", ran.stderr);
        let refused = served.run(&["--io", "direct"], &[(wish, value)]);
        refused.refuses(1, &["cannot be read with direct", words, "uring", "--io"]);
    }
    // Nobody asks for it where another way is given.
    let file = served.machine.gpus.place.path("unopened");
    let ran = served.run(&["--io", "pread"], &[("CUFILE_TALLY", file.to_str().unwrap())]);
    assert_eq!(ran.json()["tokens"], served.expected);
    assert!(!ran.stderr.contains(NOT) && !file.exists(), "{}", ran.stderr);
}

#[test]
fn without_the_library_it_is_said_and_refused() {
    let Some(served) = Served::with("olmoe", false) else { return };
    let ran = served.run(&[], &[]);
    assert_eq!(ran.json()["tokens"], served.expected);
    if !ran.stderr.contains(NOT) {
        return say_skipped("cuFile that is missing: this machine has it");
    }
    assert!(ran.stderr.contains("libcufile.so.0 was not found"), "{}", ran.stderr);
    let words = ["libcufile.so.0 was not found", "install GPUDirect Storage", "--io"];
    served.run(&["--io", "direct"], &[]).refuses(1, &words);
}

#[test]
fn the_library_is_found_by_the_name_for_programs_that_are_linked_with_it_too() {
    let Some(mut served) = Served::with("olmoe", false) else { return };
    let library = compile_cufile(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    served.machine.gpus.add_library(&cufile_to_link(&library));
    let ran = served.run(&[], &[]);
    assert_eq!(ran.json()["tokens"], served.expected);
    let is_read = ran.stderr.contains("(GPUDirect Storage, nvidia-fs 2.17)");
    assert!(is_read || ran.stderr.contains("O_DIRECT"), "{}", ran.stderr);
}

#[test]
fn a_device_that_is_lost_while_it_is_read_into_ends_the_node_and_the_stream_goes_on() {
    let Some(served) = Served::new("olmoe") else { return };
    let Served { machine, model, memory, expected } = &served;
    let on = ["--device", "cuda", "--memory", memory, "--device-patience", "1s"];
    let all = machine.tally(model, &on[2..], 5)["pages_back"];
    let cpu = ["--device", "cpu"];
    for (how, words, after) in [("700", "cu", &cpu[..]), ("hang", "no progress for 1s", &on[..4])] {
        let fault = format!("pages_back:{}:{how}", all * 2 / 3);
        let ran = machine.generate(model, "gpu", &on, &[("FAULT", &fault)]);
        ran.refuses(1, &["the GPU is lost", words, "start again", "the journal goes on"]);
        let resumed = machine.generate(model, "gpu", after, &[]).json();
        assert_eq!(resumed["tokens"], *expected, "after {fault}");
        machine.replay(model);
        std::fs::remove_dir_all(machine.gpus.place.path("gpu")).unwrap();
    }
}

#[test]
fn the_doctor_says_how_experts_would_come() {
    let whole = "straight into memory of the GPU (GPUDirect Storage, nvidia-fs 2.17); slots are registered, whatever they \
                 take of the GPU's memory; tried in";
    for (has_library, wish, words) in [
        (true, "", whole),
        (
            true,
            "little",
            "nvidia-fs 2.17); slots are registered up to 0 MiB of the GPU's 24576 (max_device_pinned_",
        ),
        (
            true,
            "unknown",
            "; no memory of the GPU can be registered with cuFile: cuFileBufRegister fails: error 5999",
        ),
        (false, "", NOT),
    ] {
        let Some(served) = Served::with("olmoe", has_library) else { return };
        let ran = served.machine.run(&["doctor", "--device", "cuda:0"], &[("CUFILE", wish)]);
        assert_eq!(ran.code, Some(0), "{}{}", ran.stdout, ran.stderr);
        let no_reads = ran.stdout.contains("O_DIRECT");
        assert!(no_reads || ran.stdout.contains(words), "{}", ran.stdout);
    }
}
