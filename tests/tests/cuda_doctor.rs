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

#[test]
fn kernels_are_compiled_once_for_a_kind_of_device() {
    let (Some(driver), Some(nvrtc)) = (stand_in(), nvrtc()) else { return };
    let folders = [&*driver, &*nvrtc];
    // What this NVRTC does not know is left to the driver.
    for (capability, target) in [("90", "sm_90"), ("990", "compute_121")] {
        let place = Place::new();
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
    // Where no cache can be, it is compiled all the same.
    let place = Place::new();
    std::fs::write(place.path("cache"), "").unwrap();
    let ran = look(&place, "80", &folders, &[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    for part in ["sm_80", "compiled in", "not kept", "XDG_CACHE_HOME"] {
        assert!(ran.stdout.contains(part), "{part} in {}", ran.stdout);
    }
}
