//! A place for commands on a machine with GPUs: a stand-in for the driver (`hw/cuda/stand_in`), and NVRTC as it is.

use crate::command::{Place, Ran};
use crate::cuda::{after_the_self_test, compile_driver, counts, nccl_of, say_skipped};
use crate::harness::folder;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

/// The place, with the libraries of such a machine.
pub struct GpuPlace {
    /// Where its commands run.
    pub place: Place,
    libraries: OsString,
    /// The same with NCCL.
    more_libraries: OsString,
    /// Kernels are compiled once for all tests.
    cache: PathBuf,
    before: OnceLock<BTreeMap<String, u64>>,
}

impl GpuPlace {
    /// None, and said so of `what`, where there is no compiler of C++ or no NVRTC. `target` is the folder that Cargo gives to tests.
    ///
    /// # Panics
    /// If the compiler finds an error.
    pub fn new(target: &Path, what: &str) -> Option<Self> {
        let nvrtc = target.parent()?.join("nvrtc");
        let driver = compile_driver(target).filter(|_| nvrtc.join("libnvrtc.so.12").exists());
        let Some(driver) = driver else {
            say_skipped(&format!("{what}, for want of a C++ compiler or hw/cuda/fetch-nvrtc"));
            return None;
        };
        let joined = |paths: &[&PathBuf]| std::env::join_paths(paths).expect("paths without colons");
        let (libraries, more_libraries) =
            (joined(&[&driver, &nvrtc]), joined(&[&driver, &nccl_of(&driver), &nvrtc]));
        let (cache, before) = (target.join("cuda-cache"), OnceLock::new());
        Some(Self { place: Place::new(), libraries, more_libraries, cache, before })
    }

    /// Gives the machine one library more, by its folder.
    ///
    /// # Panics
    /// If there is a colon in it.
    pub fn add_library(&mut self, folder: &Path) {
        let all = std::env::split_paths(&self.libraries).chain([folder.to_owned()]);
        self.libraries = std::env::join_paths(all).expect("paths without colons");
    }

    /// A command, with wishes for the stand-in: names after `LITE_LLM_STAND_IN`, and values. Faults are counted from the end of the
    /// self-test on.
    pub fn command(&self, arguments: &[&str], wishes: &[(&str, &str)]) -> Command {
        let mut command = self.place.command(arguments);
        command.env("XDG_CACHE_HOME", &self.cache);
        command.env("LD_LIBRARY_PATH", &self.libraries).env("LITE_LLM_STAND_IN", "90");
        for (name, value) in wishes {
            let fault = || after_the_self_test(self.before(), value);
            let value = if *name == "FAULT" { fault() } else { (*value).to_owned() };
            command.env(format!("LITE_LLM_STAND_IN_{name}"), value);
        }
        command
    }

    /// Gives a command NCCL, and so many devices.
    pub fn with_nccl(&self, command: &mut Command, devices: u32) {
        command.env("LD_LIBRARY_PATH", &self.more_libraries);
        command.env("LITE_LLM_STAND_IN_NCCL", self.place.path(""));
        command.env("LITE_LLM_STAND_IN_DEVICES", devices.to_string());
    }

    /// How often the stand-in is asked for what by the self-test, which whoever opens a device makes.
    ///
    /// # Panics
    /// If it does not come to its end.
    pub fn before(&self) -> &BTreeMap<String, u64> {
        self.before.get_or_init(|| {
            let (path, model) = (self.place.path("before"), folder("olmoe"));
            let [model, tally] = [&model, &path].map(|path| path.to_str().expect("a path in UTF-8"));
            // Refused when the kernels have been tried, and nothing else was done.
            let arguments = ["run", model, "--prompt-tokens", "1", "--state", "counted"];
            let arguments = [&arguments[..], &["--device", "cuda", "--memory", "1MiB"]].concat();
            let ran = self.command(&arguments, &[("TALLY", tally)]).output().expect("the program runs");
            Ran::from(ran).refuses(1, &["memory_bytes is 1048576"]);
            std::fs::remove_dir_all(self.place.path("counted")).expect("a state of its own");
            counts(&path)
        })
    }
}
