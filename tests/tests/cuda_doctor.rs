//! `lite-llm doctor --device cuda` on machines without a GPU: refusals, and with a stand-in for the driver all that comes before a
//! launch: the compiler is the real one (`hw/cuda/fetch-nvrtc`), and so is the cache.

use lite_llm_hw::cuda::nvrtc::Nvrtc;
use lite_llm_hw::cuda::{CudaError, driver};
use lite_llm_tests::command::{Place, Ran};
use lite_llm_tests::cuda::{compile_driver, say_skipped};
use std::path::{Path, PathBuf};

const ARGUMENTS: [&str; 3] = ["doctor", "--device", "cuda"];

/// What the doctor says of a machine with this driver and the libraries of these folders.
fn look(place: &Place, driver: &str, folders: &[&Path], more: &[&str]) -> Ran {
    let mut command = place.command(ARGUMENTS.iter().chain(more));
    command.env("XDG_CACHE_HOME", place.path("cache")).env("LITE_LLM_STAND_IN", driver);
    let folders = std::env::join_paths(folders).unwrap();
    command.env("LD_LIBRARY_PATH", folders).output().unwrap().into()
}

/// Runs a command there, with wishes for the stand-in: what its variables end with, and values.
fn run(place: &Place, arguments: &[&str], folders: &[&Path], wishes: &[(&str, &str)]) -> Ran {
    let mut command = place.command(arguments);
    // Kernels are compiled once for all tests.
    command.env("XDG_CACHE_HOME", Path::new(env!("CARGO_TARGET_TMPDIR")).join("cuda-cache"));
    for (name, value) in wishes {
        command.env(format!("LITE_LLM_STAND_IN{name}"), value);
    }
    let folders = std::env::join_paths(folders).unwrap();
    command.env("LD_LIBRARY_PATH", folders).output().unwrap().into()
}

fn stand_in() -> Option<PathBuf> {
    let folder = compile_driver(Path::new(env!("CARGO_TARGET_TMPDIR")));
    if folder.is_none() {
        say_skipped(
            "the doctor with a stand-in for the driver, for want of Linux and a C++ compiler (c++, or CXX)",
        );
    }
    folder
}

fn nvrtc() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).parent()?.join("nvrtc");
    let there = folder.join("libnvrtc.so.12").exists();
    if !there {
        say_skipped(&format!("the doctor with NVRTC, for want of {}", folder.display()));
    }
    there.then_some(folder)
}

#[test]
fn without_a_driver_the_doctor_says_what_is_missing() {
    let place = Place::new();
    if !matches!(driver::find(), Err(CudaError::NoDriver)) {
        return say_skipped("the refusal without a driver: this machine has one");
    }
    for more in [&[][..], &["--json"]] {
        let ran = look(&place, "90", &[], more);
        ran.refuses(1, &["no CUDA driver", "libcuda.so.1", "install NVIDIA's driver", "--device cuda"]);
        assert_eq!(ran.stdout, "");
    }
    assert!(!place.path("cache").exists());
}

#[test]
fn nothing_is_said_of_a_model_on_a_gpu() {
    let place = Place::new();
    place.run(["doctor", "m", "--device", "cuda"]).refuses(2, &["nothing is measured on a GPU yet"]);
    place.run(["doctor", "--device", "tpu"]).refuses(2, &["tpu", "cpu", "cuda"]);
}

#[test]
fn a_driver_that_fails_or_has_nothing_is_refused() {
    let Some(driver) = stand_in() else { return };
    let place = Place::new();
    look(&place, "0", &[&driver], &[]).refuses(1, &["no device", "CUDA_VISIBLE_DEVICES"]);
    let words = ["cuInit", "system has unsupported display driver", "nvidia-smi"];
    look(&place, "fails", &[&driver], &[]).refuses(1, &words);
}

#[test]
fn without_nvrtc_devices_are_said_and_it_fails() {
    let Some(driver) = stand_in() else { return };
    if !matches!(Nvrtc::find(), Err(CudaError::NoNvrtc)) {
        return say_skipped("the doctor without NVRTC: this machine has it");
    }
    let place = Place::new();
    let ran = look(&place, "90", &[&driver], &[]);
    assert_eq!(ran.code, Some(1), "{}", ran.stderr);
    for part in
        ["CUDA 12.8", "Stand-in 1", "9.0", "24.0 GiB", "not compiled", "libnvrtc.so.12", "nobody has tried"]
    {
        assert!(ran.stdout.contains(part), "{part} in {}", ran.stdout);
    }
}

/// Kernels for devices of a capability are compiled once, to this target.
fn compiled_once(capability: &str, target: &str) {
    let (Some(driver), Some(nvrtc)) = (stand_in(), nvrtc()) else { return };
    let (place, folders) = (Place::new(), [&*driver, &*nvrtc]);
    let first = look(&place, capability, &folders, &["--json"]).json();
    assert_eq!(first["devices"].as_array().unwrap().len(), 2);
    let [kernels] = &first["kernels"].as_array().unwrap()[..] else { panic!("one target: {first}") };
    assert_eq!((&kernels["target"], &kernels["from_cache"]), (&target.into(), &false.into()), "{first}");
    assert!(kernels["code_bytes"].as_u64().unwrap() > 10_000, "{first}");
    assert_eq!((&first["refusal"], &first["runs_models"]), (&serde_json::Value::Null, &true.into()));
    assert!(Path::new(kernels["kept_in"].as_str().unwrap()).starts_with(place.path("cache")));
    let again = look(&place, capability, &folders, &["--json"]).json();
    assert_eq!(again["kernels"][0]["from_cache"], true, "{again}");
    assert_eq!(again["kernels"][0]["code_bytes"], kernels["code_bytes"]);
    let words = look(&place, capability, &folders, &[]).stdout;
    for part in ["Stand-in 0", target, "from the cache", "nobody has tried"] {
        assert!(words.contains(part), "{part} in {words}");
    }
}

#[test]
fn kernels_are_compiled_once_for_a_kind_of_device() {
    compiled_once("90", "sm_90");
}

#[test]
fn what_the_compiler_does_not_know_is_left_to_the_driver() {
    compiled_once("990", "compute_121");
}

#[test]
fn kernels_are_compiled_where_no_cache_can_be() {
    let (Some(driver), Some(nvrtc)) = (stand_in(), nvrtc()) else { return };
    let place = Place::new();
    std::fs::write(place.path("cache"), "").unwrap();
    let ran = look(&place, "990", &[&*driver, &*nvrtc], &[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    for part in ["compute_121", "compiled in", "not kept", "XDG_CACHE_HOME"] {
        assert!(ran.stdout.contains(part), "{part} in {}", ran.stdout);
    }
}

/// The kernels that a process launched, those with a bug on purpose apart, and how often.
fn launched(counts: &Path) -> Vec<(String, u64)> {
    let counts = std::fs::read_to_string(counts).unwrap();
    let lines = counts.lines().map(|line| line.split_once(' ').unwrap());
    let lines = lines.map(|(what, count)| (what.to_owned(), count.parse().unwrap()));
    let kernels = lines.skip_while(|(what, _)| what != "kernels").skip(1);
    kernels.filter(|(what, _)| !what.starts_with("planted")).collect()
}

/// The kernels that a doctor found wrong on a device.
fn wrong(found: &serde_json::Value, device: usize) -> Vec<&str> {
    let kernels = found["golden"][device]["kernels"].as_array().unwrap();
    kernels.iter().filter(|of| of["golden"] == false).map(|of| of["kernel"].as_str().unwrap()).collect()
}

/// Kernels that are wrong together, and what is wrong then: apart from each other where one would hide the other.
fn passes(kernels: &[(String, u64)]) -> Vec<(Vec<String>, Vec<String>)> {
    let split = |names: &str| names.split(", ").map(str::to_owned).collect::<Vec<_>>();
    let each = |of: &str, names: &str| {
        let with = |name: String| of.replace('*', &name);
        split(names).into_iter().map(with).collect::<Vec<_>>()
    };
    let (types, storages) = ("f32, bf16, f16", "f32, bf16, f16, mxfp4, e4m3, q8, q4");
    let attention = "attention f32, attention bf16, attention f16, attention over latents";
    let mut passes = vec![
        (each("write_cache_*", types), split(&format!("{attention}, convert"))),
        (each("attention_scores_*", types), split(attention)),
        (each("attention_mix_*", types), split(attention)),
        (split("attention_sum, sample"), split(&format!("{attention}, sample"))),
        (
            split("argmax, embed_f32, embed_q8, rope, route"),
            split("rope, rope of neighbours, convert, embed f32, embed q8, route, argmax, sample"),
        ),
    ];
    let forms = ["one", "few", "some", "many"];
    for form in forms {
        let rows = if form == "one" { "row" } else { "rows" };
        let of_form = each(&format!("linear_{form}_{rows}_*"), storages);
        passes.push((of_form, each(&format!("linear * of {form} {rows}"), storages)));
    }
    let rest = kernels.iter().map(|(name, _)| name.clone()).filter(|name| {
        let is_input = ["repack", "quantise"].contains(&name.as_str());
        !is_input && passes.iter().all(|(broken, _)| !broken.contains(name))
    });
    let of_rest = "rms_norm, rms_norm of latents, layer_norm, exp, sigmoid, silu, gate, clamped gate, \
                   clamped gate of every size, combine, add, clip, divide, arrange, convert, embed bf16, embed f16, \
                   embed q4, route by tiers, route sparsely, penalise, users of experts, exp of 16777216 inputs";
    let rest = (rest.collect(), split(of_rest));
    passes.push(rest);
    passes
}

#[test]
fn every_kernel_gives_the_golden_bits_or_is_refused() {
    let (Some(driver), Some(nvrtc)) = (stand_in(), nvrtc()) else { return };
    let (place, folders) = (Place::new(), [&*driver, &*nvrtc]);
    let doctor = [&ARGUMENTS[..], &["--json"]].concat();
    let counts = place.path("counts");
    let there = ("", "90");
    let found = run(&place, &doctor, &folders, &[there, ("_TALLY", counts.to_str().unwrap())]);
    assert_eq!(found.code, Some(0), "{}{}", found.stdout, found.stderr);
    let found = found.json();
    for device in [0, 1] {
        assert_eq!(found["golden"][device]["device"], device);
        assert!(wrong(&found, device).is_empty() && !found["golden"][device]["kernels"].is_null());
    }
    let kernels = launched(&counts);
    assert!(kernels.len() > 50 && kernels.iter().all(|(_, count)| *count > 0), "{kernels:?}");

    // Kernels that are wrong by a bit at each of their launches.
    let look = |broken: &[String]| {
        let faults: Vec<String> = broken.iter().map(|kernel| format!("{kernel}:*:flip")).collect();
        let ran = run(&place, &doctor, &folders, &[there, ("_FAULT", &faults.join(","))]);
        assert_eq!(ran.code, Some(1), "{broken:?}: {}{}", ran.stdout, ran.stderr);
        let found: serde_json::Value = serde_json::from_str(&ran.stdout).unwrap();
        let names: Vec<String> = wrong(&found, 0).into_iter().map(str::to_owned).collect();
        let refusal = found["refusal"].as_str().unwrap();
        let first = format!("the kernel {} gives other bits than the contract on Stand-in 0", names[0]);
        assert!(refusal.contains(&first), "{refusal}");
        names
    };
    for (broken, expected) in passes(&kernels) {
        assert_eq!(look(&broken), expected, "{broken:?}");
    }
    // The last bit of an input may be lost where all is rounded.
    for (input, products) in [("repack", 20), ("quantise", 8)] {
        let found = look(&[input.to_owned()]);
        assert!(found.iter().all(|name| name.starts_with("linear")), "{input}: {found:?}");
        assert!(products / 2 < found.len() && found.len() <= products, "{input}: {found:?}");
    }
    let ran = run(&place, &ARGUMENTS, &folders, &[there, ("_FAULT", "clip:*:flip")]);
    for part in ["61 of 62 give the golden bits", "not clip", "refused", "sm_90"] {
        assert!(ran.stdout.contains(part), "{part} in {}", ran.stdout);
    }
}

#[test]
fn a_start_with_a_wrong_kernel_is_refused() {
    let (Some(driver), Some(nvrtc)) = (stand_in(), nvrtc()) else { return };
    let (place, folders) = (Place::new(), [&*driver, &*nvrtc]);
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures/olmoe");
    let run_model =
        ["run", model.to_str().unwrap(), "--prompt-tokens", "1", "--state", "s", "--device", "cuda"];
    let wishes = [("", "90"), ("_FAULT", "linear_few_rows_bf16:2:flip")];
    let words =
        ["linear bf16 of few rows", "Stand-in 0", "driver of CUDA 12.8", "NVRTC 12", "sm_90", "--device cpu"];
    run(&place, &run_model, &folders, &wishes).refuses(1, &words);
    // A fault of the device meanwhile is the device's.
    for fault in ["launch:7:700", "fetch:9:214"] {
        let ran = run(&place, &run_model, &folders, &[("", "90"), ("_FAULT", fault)]);
        ran.refuses(1, &["the CUDA driver refuses"]);
    }
    assert_eq!(run(&place, &run_model, &folders, &[("", "90")]).code, Some(0));
}
