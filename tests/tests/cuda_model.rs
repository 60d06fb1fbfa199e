//! Models with `--device cuda`, over a stand-in for the driver that runs the kernels on the CPU, late and in any order that streams
//! allow: tokens, digests and refusals have to be those of the model on the CPU. Nothing here has met a GPU.

use lite_llm_tests::command::{Ran, child_of, parse_stream, try_signal};
use lite_llm_tests::gpu_machine::{Machine, folder, prompt};
use serde_json::Value;
use std::io::{BufRead, BufReader, Read};
use std::path::PathBuf;
use std::time::Duration;

fn machine() -> Option<Machine> {
    Machine::new(env!("CARGO_TARGET_TMPDIR"), "models on a stand-in for a GPU")
}

/// Every small checkpoint of a folder.
fn models(name: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder(name)).unwrap().map(|entry| entry.unwrap().path());
    let mut models: Vec<PathBuf> = entries.filter(|path| path.join("config.json").exists()).collect();
    models.sort();
    models
}

#[test]
fn every_family_has_the_bits_of_the_cpu() {
    let Some(mut machine) = machine() else { return };
    let all: Vec<PathBuf> = models("fixtures").into_iter().chain(models("oracles")).collect();
    assert!(all.len() > 20, "{all:?}");
    for (seed, model) in all.iter().enumerate() {
        // Those have shorter contexts than their configurations say.
        machine.length = if model.starts_with(folder("oracles")) { 50 } else { 78 };
        let expected = machine.expected(model, &[]);
        // In chunks, so that pages are read that another step wrote.
        let more = ["--memory", "400MiB", "--prefill-chunk", "29"];
        machine.check(model, &more, &[("SEED", &seed.to_string())], &expected);
    }
}

#[test]
fn experts_come_and_go_with_the_same_bits() {
    let Some(mut machine) = machine() else { return };
    machine.length = 20;
    for (seed, name) in ["olmoe", "deepseek_v2", "gpt_oss", "qwen2_moe"].into_iter().enumerate() {
        let (model, seed) = (folder("fixtures").join(name), seed.to_string());
        let expected = machine.expected(&model, &[]);
        for more in [&["--foresight", "on"][..], &["--warm", "120KiB"]] {
            let memory = (machine.least(&model, more) + (100 << 10)).to_string();
            let more = [more, &["--memory", &memory]].concat();
            machine.check(&model, &more, &[("SEED", &seed)], &expected);
        }
    }
}

#[test]
fn every_storage_has_the_bits_of_the_cpu() {
    let Some(mut machine) = machine() else { return };
    machine.length = 20;
    let olmoe = folder("fixtures/olmoe");
    for more in [&["--quantise", "q8"][..], &["--quantise", "q4"], &["--tiers", "core:5:hot,rest:3:cold"]] {
        let native = machine.import(&olmoe, more);
        for kv_type in ["f32", "bf16", "f16"] {
            let kv_type = ["--kv-type", kv_type];
            let expected = machine.expected(&native, &kv_type);
            let memory = (machine.least(&native, &kv_type) + (20 << 10)).to_string();
            let more = [&kv_type[..], &["--memory", &memory]].concat();
            machine.check(&native, &more, &[], &expected);
        }
        std::fs::remove_dir_all(&native).unwrap();
    }
    let tiered = machine.gpus.place.path("tiered");
    let arguments = ["synth", "--family", "tiered_moe", "--hidden", "64", "--layers", "2", "--vocab", "300"];
    let tiers = ["--tiers", "a:2x3:hot,b:3x4:cold", tiered.to_str().unwrap()];
    assert_eq!(machine.gpus.place.run(arguments.iter().chain(&tiers)).code, Some(0));
    let expected = machine.expected(&tiered, &[]);
    machine.check(&tiered, &["--memory", "300MiB"], &[], &expected);
}

#[test]
fn rows_of_many_requests_share_steps() {
    let Some(machine) = machine() else { return };
    let model = folder("fixtures/qwen3_moe");
    // Tokens are chosen on the device, also where those before them count.
    let ways = [
        "\"temperature\": 0.0",
        "\"temperature\": 0.9, \"repetition_penalty\": 1.3",
        "\"temperature\": 0.0, \"repetition_penalty\": 1.3",
        "\"temperature\": 0.9",
        "\"temperature\": 1.5, \"top_k\": 40, \"top_p\": 0.9, \"min_p\": 0.02",
    ];
    let [cuda, cpu] = ["cuda", "cpu"].map(|device| machine.batch(&model, ways, 9, [device, "300MiB"]));
    assert_eq!(cuda, cpu);
}

/// Where all experts are resident a step of decode is told its lists once, and is read from once, however many layers it has.
#[test]
fn nothing_is_asked_of_the_host_in_a_step_with_all_experts() {
    let Some(mut machine) = machine() else { return };
    machine.length = 9;
    let model = folder("fixtures/olmoe");
    let memory = (machine.least(&model, &[]) + (20 << 10)).to_string();
    for (memory, all) in [("300MiB", true), (memory.as_str(), false)] {
        let more = ["--memory", memory];
        let [few, many] = [4, 12].map(|tokens| machine.tally(&model, &more, tokens));
        let more = |what: &str| many[what] - few[what];
        // Each token is chosen there.
        assert_eq!(more("argmax"), 8, "{few:?} {many:?}");
        assert_eq!(many["sample"], 0, "{many:?}");
        // Steps are recorded when there is nothing that the host has to hear of.
        assert_eq!((more("replay"), more("graph")), if all { (8, 0) } else { (0, 0) }, "{few:?} {many:?}");
        assert_eq!(more("fetch") == 8 && more("copy") == 8, all, "{few:?} {many:?}");
        assert!(more("fetch") >= 8 && more("launch") > 8, "{few:?} {many:?}");
    }
    // One that is drawn is chosen there too, also where tokens before it count.
    let drawn = ["--memory", "300MiB", "--temperature", "0.8"];
    let tally = machine.tally(&model, &drawn, 4);
    assert_eq!((tally["argmax"], tally["sample"], tally["penalise"]), (4, 4, 0), "{tally:?}");
    let tally = machine.tally(&model, &[&drawn[..], &["--repetition-penalty", "1.2"]].concat(), 4);
    assert_eq!((tally["argmax"], tally["sample"], tally["penalise"]), (4, 4, 4), "{tally:?}");
}

/// Steps of decode are recorded the second time a shape comes, and launched again: lists change, and now and then the shape does.
#[test]
fn recorded_steps_have_the_bits_of_the_cpu() {
    let Some(mut machine) = machine() else { return };
    (machine.length, machine.chosen) = (57, "80");
    // Pages of a whole sequence and of a window, latent attention, a dense model.
    for (seed, name) in ["olmoe", "gpt_oss", "deepseek_v2", "llama"].into_iter().enumerate() {
        let (model, seed) = (folder("fixtures").join(name), seed.to_string());
        let expected = machine.expected(&model, &[]);
        machine.check(&model, &["--memory", "400MiB"], &[("SEED", &seed)], &expected);
    }
    // A driver that makes no graphs, from the start or later.
    (machine.length, machine.chosen) = (9, "8");
    let (model, tally) = (folder("fixtures/olmoe"), machine.gpus.place.path("tally"));
    let expected = machine.expected(&model, &[]);
    for (fault, said) in [("graph:1:801", true), ("graph:2:801", false)] {
        let wishes = [("FAULT", fault), ("TALLY", tally.to_str().unwrap())];
        let ran = machine.generate(&model, "gpu", &["--memory", "300MiB", "--device", "cuda"], &wishes);
        assert_eq!(ran.json()["tokens"], expected, "{fault}");
        let words = "launched kernel by kernel: the CUDA driver refuses";
        assert_eq!(ran.stderr.matches(words).count(), usize::from(said), "{}", ran.stderr);
        assert!(std::fs::read_to_string(&tally).unwrap().contains("replay 0\n"));
        std::fs::remove_dir_all(machine.gpus.place.path("gpu")).unwrap();
    }
}

/// The layer that first has a value that is not finite is heard of, though the layers after it were computed too.
#[test]
fn values_that_are_not_finite_are_the_fault_of_the_cpu() {
    let Some(machine) = machine() else { return };
    let fixture = folder("fixtures/olmoe");
    let model = machine.gpus.place.path("poisoned");
    std::fs::create_dir(&model).unwrap();
    for entry in std::fs::read_dir(&fixture).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), model.join(entry.file_name())).unwrap();
    }
    let weights = model.join("model.safetensors");
    let clean = std::fs::read(&weights).unwrap();
    let length = u64::from_le_bytes(clean[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&clean[8..8 + length]).unwrap();
    for tensor in ["model.layers.1.post_attention_layernorm.weight", "model.norm.weight"] {
        let mut bytes = clean.clone();
        let [from, until] = [0, 1].map(|i| header[tensor]["data_offsets"][i].as_u64().unwrap() as usize);
        bytes[8 + length..][from..until][..4].copy_from_slice(&f32::INFINITY.to_le_bytes());
        std::fs::write(&weights, bytes).unwrap();
        let [cpu, gpu] = ["cpu", "cuda"].map(|device| {
            let more = ["--device", device, "--memory", "300MiB"];
            let ran = machine.generate(&model, device, &more, &[]);
            std::fs::remove_dir_all(machine.gpus.place.path(device)).unwrap();
            assert_ne!(ran.code, Some(0), "{}", ran.stdout);
            ran.stderr.lines().find(|line| line.starts_with("error")).unwrap().to_owned()
        });
        assert!(cpu.contains("NaN or infinity in layer"), "{cpu}");
        assert_eq!(gpu, cpu, "{tensor}");
    }
}

#[test]
fn bench_runs_there_too() {
    let Some(machine) = machine() else { return };
    let model = folder("fixtures/olmoe");
    let bench = |device: &str| {
        let arguments = ["bench", model.to_str().unwrap(), "--prompt", "8", "--decode", "4", "--batch", "2"];
        let more = ["--memory", "300MiB", "--threads", "1", "--json", "--device", device];
        machine.run(&[&arguments[..], &more].concat(), &[]).json()
    };
    let (gpu, cpu) = (bench("cuda"), bench("cpu"));
    assert_eq!((&gpu["device"], &cpu["device"]), (&"cuda".into(), &"cpu".into()));
    assert_eq!(gpu["tokens_digest"], cpu["tokens_digest"]);
}

#[test]
fn a_lost_device_ends_the_node_and_the_stream_goes_on() {
    let Some(mut machine) = machine() else { return };
    machine.length = 9;
    let model = folder("fixtures/olmoe");
    let expected = machine.expected(&model, &[]);
    let on = ["--device", "cuda", "--memory", "300MiB"];
    let hasty = [&on[..], &["--device-patience", "1s"]].concat();
    // An illegal address, an ECC error, a launch without resources, a kernel that never ends; on the device and on the CPU again.
    let launches = machine.tally(&model, &on[2..], 5)["launch"];
    // Lists that stay are copied back before the first step is read from.
    let lists = format!("fetch:{}:hang", machine.tally(&model, &on[2..], 1)["fetch"] - 1);
    let [lost, hangs] = ["700", "hang"].map(|how| format!("launch:{}:{how}", launches - 9));
    for (fault, more, words, after) in [
        ("launch:150:700", &on[..], "cu", &on[..]),
        ("launch:200:214", &on, "cu", &["--device", "cpu"]),
        ("launch:100:701", &on, "cuLaunchKernel", &on),
        ("launch:190:hang", &hasty, "no progress for 1s", &on),
        ("fetch:60:hang", &hasty, "no progress for 1s", &["--device", "cpu"]),
        (&lists, &hasty, "no progress for 1s", &on),
        // In a recorded step.
        (&lost, &on, "cu", &on),
        (&hangs, &hasty, "no progress for 1s", &on),
        ("replay:2:999", &on, "cuGraphLaunch", &["--device", "cpu"]),
    ] {
        let ran = machine.generate(&model, "gpu", more, &[("FAULT", fault)]);
        ran.refuses(1, &["the GPU is lost", words, "start again", "the journal goes on"]);
        let resumed = machine.generate(&model, "gpu", after, &[]).json();
        assert_eq!(resumed["tokens"], expected, "after {fault}");
        machine.replay(&model);
        std::fs::remove_dir_all(machine.gpus.place.path("gpu")).unwrap();
    }
}

#[test]
fn a_flipped_bit_of_what_stays_is_found() {
    let Some(mut machine) = machine() else { return };
    machine.length = 9;
    let model = folder("fixtures/olmoe");
    let expected = machine.expected(&model, &[]);
    let on = ["--device", "cuda", "--memory", "300MiB", "--threads", "1"];
    // Of base parameters, of experts, of lists that stay: what is copied once more does, twice is too often. The lists are sent before
    // those of the first step.
    let lists = machine.tally(&model, &on[2..], 1)["copy"] - 1;
    for copy in [3, 20, 40, lists] {
        machine.check(&model, &on[2..], &[("FAULT", &format!("copy:{copy}:flip"))], &expected);
        let twice = format!("copy:{copy}:flip,copy:{}:flip", copy + 1);
        let ran = machine.generate(&model, "gpu", &on, &[("FAULT", &twice)]);
        ran.refuses(1, &["not there as they were sent"]);
        std::fs::remove_dir_all(machine.gpus.place.path("gpu")).unwrap();
    }
}

#[test]
fn what_cannot_be_had_is_refused_with_numbers() {
    let Some(mut machine) = machine() else { return };
    machine.length = 9;
    let model = folder("fixtures/olmoe");
    let on = ["--device", "cuda"];
    let small = [("MEMORY", "100000000")];
    let more = [&on[..], &["--memory", "200MiB"]].concat();
    let words =
        ["memory_bytes is 209715200", "100000000 bytes of the GPU", "only 100000000 are free: give at most"];
    machine.generate(&model, "a", &more, &small).refuses(1, &words);
    // Left out, it is what the device has.
    assert_eq!(machine.generate(&model, "b", &on, &small).code, Some(0));
    // Somebody else takes it meanwhile.
    let ran = machine.generate(&model, "c", &on, &[("FAULT", "alloc:1:2")]);
    ran.refuses(1, &["the GPU has no", "slots of experts", "give --memory less"]);
    let ran = machine.generate(&model, "d", &on, &[("FAULT", "module:2:209")]);
    ran.refuses(1, &["the CUDA driver refuses", "cuModuleLoadData"]);
    let more = [&on[..], &["--warm", "1MiB"]].concat();
    let ran = machine.generate(&model, "e", &more, &[("PINNED", "20000")]);
    ran.refuses(1, &["does not pin", "give --warm less"]);
}

#[test]
fn a_device_is_chosen_by_its_number() {
    let Some(mut machine) = machine() else { return };
    machine.length = 20;
    let model = folder("fixtures/qwen2_moe");
    let expected = machine.expected(&model, &[]);
    // Nobody needs the first device, which somebody else has to himself.
    let busy = [("SEED", "5"), ("BUSY", "0")];
    let on = |device| ["--memory", "300MiB", "--device", device];
    machine.generate(&model, "first", &on("cuda"), &busy).refuses(1, &["the CUDA driver refuses", "busy"]);
    let found = machine.generate(&model, "gpu", &on("cuda:1"), &busy).json();
    assert_eq!(found["tokens"], expected);
    machine.replay(&model);
    let words = ["no GPU 2", "0 (Stand-in 0), 1 (Stand-in 1)", "cuda:N"];
    machine.generate(&model, "other", &on("cuda:2"), &[]).refuses(1, &words);
    for name in
        ["cuda:", "cuda:-1", "cuda:+1", "cuda:one", "cuda:99999999999", "cuda1", "gpu:0", "CUDA", "cpu:0"]
    {
        machine
            .generate(&model, "wrong", &["--device", name], &[])
            .refuses(2, &[name, "is no device", "cuda:N"]);
    }
    let looked = machine.run(&["doctor", "--device", "cuda:1", "--json"], &busy).json();
    assert_eq!(looked["golden"].as_array().unwrap().len(), 1, "{looked}");
    assert_eq!(looked["golden"][0]["device"], 1);
    machine.run(&["doctor", "--device", "cuda:7"], &[]).refuses(1, &["no GPU 7", "1 (Stand-in 1)"]);
}

/// Wherever it is killed, in a step or while it starts, the next life goes on with the same bits.
#[test]
fn a_supervised_node_that_is_killed_in_steps_goes_on() {
    let Some(machine) = machine() else { return };
    let model = folder("fixtures/olmoe");
    let prompt = prompt(&model, 20);
    let run =
        ["run", model.to_str().unwrap(), "--prompt-tokens", &prompt, "--max-tokens", "60", "--ignore-eos"];
    let run =
        [&run[..], &["--temperature", "1", "--seed", "3", "--prefill-chunk", "7", "--stream", "--json"]]
            .concat();
    let cpu = machine.run(&[&run[..], &["--device", "cpu"]].concat(), &[]);
    assert_eq!(cpu.code, Some(0), "{}", cpu.stderr);
    let (expected, _) = parse_stream(&cpu.stdout);

    let on = ["--device", "cuda", "--memory", "300MiB", "--state", "gpu", "--request-id", "one"];
    let supervise = ["supervise", "--max-restarts", "50", "--"];
    let line = [&supervise[..], &run, &on].concat();
    let mut child = machine.gpus.command(&line, &[("SEED", "9")]).spawn().unwrap();
    let (supervisor, mut out) = (child.id(), BufReader::new(child.stdout.take().unwrap()));
    let mut text = String::new();
    // Between tokens of the stream the device is in a step: each kill comes a little later in one.
    for kill in 0..8 {
        for _ in 0..4 {
            out.read_line(&mut text).unwrap();
        }
        std::thread::sleep(Duration::from_millis(kill * 2));
        if let Some(life) = child_of(supervisor) {
            try_signal(life, "KILL");
        }
    }
    out.read_to_string(&mut text).unwrap();
    let ran: Ran = child.wait_with_output().unwrap().into();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let (found, result) = parse_stream(&text);
    assert_eq!(found, expected, "each token once, and those of the CPU");
    assert_eq!(result.unwrap()["tokens"].as_array().unwrap().len(), expected.len());
    let deaths = ran.stderr.matches("crash report: ").count();
    assert!(deaths >= 4, "{deaths} deaths: {}", ran.stderr);
    machine.replay(&model);
}
