//! What tests of models on a machine with GPUs have in common: requests there, the tokens of the CPU, and full replays on it.

use crate::command::{self, Ran};
use crate::cuda::counts;
use crate::gpu_place::GpuPlace;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A machine with a GPU, and what requests are like there.
pub struct Machine {
    /// Where its commands run.
    pub gpus: GpuPlace,
    /// Tokens of prompts, at most.
    pub length: u64,
    /// Tokens that are chosen after a prompt.
    pub chosen: &'static str,
}

impl Machine {
    /// None, and said so, where there is no compiler of C++ or no NVRTC.
    pub fn new(target: &str, what: &str) -> Option<Self> {
        let gpus = GpuPlace::new(Path::new(target), what)?;
        Some(Self { gpus, length: 78, chosen: "5" })
    }

    /// Runs a command, with wishes for the stand-in.
    pub fn run(&self, arguments: &[&str], wishes: &[(&str, &str)]) -> Ran {
        command::run(self.gpus.command(arguments, wishes))
    }

    /// Generates on a device, into a state directory of that name.
    pub fn generate(&self, model: &Path, state: &str, more: &[&str], wishes: &[(&str, &str)]) -> Ran {
        let prompt = prompt(model, self.length);
        let mut arguments = vec!["run", model.to_str().unwrap(), "--prompt-tokens", &prompt, "--json"];
        arguments.extend([
            "--state",
            state,
            "--request-id",
            "one",
            "--max-tokens",
            self.chosen,
            "--ignore-eos",
        ]);
        arguments.extend(more);
        self.run(&arguments, wishes)
    }

    /// The tokens of the CPU.
    pub fn expected(&self, model: &Path, more: &[&str]) -> Value {
        let more: Vec<&str> = [more, &["--device", "cpu"]].concat();
        let ran = self.generate(model, "cpu", &more, &[]);
        let tokens = ran.json()["tokens"].clone();
        std::fs::remove_dir_all(self.gpus.place.path("cpu")).unwrap();
        tokens
    }

    /// Checks tokens against the CPU's, and every digest by a full replay on the CPU.
    #[track_caller]
    pub fn check(&self, model: &Path, more: &[&str], wishes: &[(&str, &str)], expected: &Value) {
        let more: Vec<&str> = [more, &["--device", "cuda"]].concat();
        let found = self.generate(model, "gpu", &more, wishes).json();
        assert_eq!(found["tokens"], *expected, "{} {more:?}", model.display());
        self.replay(model);
        std::fs::remove_dir_all(self.gpus.place.path("gpu")).unwrap();
    }

    /// The tokens of five requests that share steps, in one run on a device with so much memory: prompts of several lengths, and for
    /// each a way of choosing so many tokens. Its state directory is the one that [`Self::replay`] recomputes.
    #[track_caller]
    pub fn batch(
        &self,
        model: &Path,
        ways: [&str; 5],
        chosen: u32,
        [device, memory]: [&str; 2],
    ) -> Vec<Value> {
        let place = &self.gpus.place;
        let mut lines = String::new();
        for (number, (length, way)) in [3, 70, 1, 40, 5].into_iter().zip(ways).enumerate() {
            let prompt: Vec<u64> = (0..length).map(|i| (i * 31 + number as u64) % 90 + 2).collect();
            lines += &format!(
                "{{\"id\": \"r{number}\", \"prompt_tokens\": {prompt:?}, \"max_tokens\": {chosen}, \"seed\": {number}, {way}}}\n"
            );
        }
        std::fs::write(place.path("in"), lines).unwrap();
        for kept in ["gpu", "out"] {
            let path = place.path(kept);
            std::fs::remove_dir_all(&path).or_else(|_| std::fs::remove_file(&path)).ok();
        }
        let arguments = ["run", model.to_str().unwrap(), "--batch", "in", "--out", "out", "--state", "gpu"];
        let arguments = [&arguments[..], &["--device", device, "--memory", memory]].concat();
        let ran = self.run(&arguments, &[("SEED", "3")]);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let out = std::fs::read_to_string(place.path("out")).unwrap();
        let mut lines: Vec<Value> = out.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        lines.sort_by_key(|line| line["id"].to_string());
        lines.into_iter().map(|line| line["tokens"].clone()).collect()
    }

    /// Recomputes what a device computed on the CPU.
    #[track_caller]
    pub fn replay(&self, model: &Path) {
        let replayed = self.gpus.place.run(["replay", "gpu", "--full", model.to_str().unwrap()]);
        assert_eq!(replayed.code, Some(0), "{}: {}{}", model.display(), replayed.stdout, replayed.stderr);
        assert!(replayed.stdout.contains("every digest and token equal"), "{}", replayed.stdout);
    }

    /// The least memory that a model is served with.
    pub fn least(&self, model: &Path, more: &[&str]) -> u64 {
        let more: Vec<&str> = [more, &["--device", "cuda", "--memory", "1MiB"]].concat();
        let refused = self.generate(model, "least", &more, &[]);
        refused.refuses(1, &["memory_bytes is 1048576", "at least"]);
        std::fs::remove_dir_all(self.gpus.place.path("least")).unwrap();
        let after = refused.stderr.split("at least ").nth(1).unwrap();
        after.chars().take_while(char::is_ascii_digit).collect::<String>().parse().unwrap()
    }

    /// A native checkpoint of a model.
    pub fn import(&self, model: &Path, more: &[&str]) -> PathBuf {
        let target = self.gpus.place.path("native");
        let mut arguments = vec!["import", model.to_str().unwrap(), target.to_str().unwrap()];
        arguments.extend(more);
        let ran = self.gpus.place.run(arguments);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        target
    }

    /// How many of each call there were in a run with so many tokens, after the self-test.
    pub fn tally(&self, model: &Path, more: &[&str], tokens: usize) -> BTreeMap<String, u64> {
        let (count, file) = (tokens.to_string(), self.gpus.place.path("tally"));
        let more = [more, &["--max-tokens", &count, "--device", "cuda"]].concat();
        let prompt = prompt(model, self.length);
        let mut arguments = vec!["run", model.to_str().unwrap(), "--prompt-tokens", &prompt, "--json"];
        arguments.extend(["--ignore-eos"]);
        arguments.extend(more);
        let found = self.run(&arguments, &[("TALLY", file.to_str().unwrap())]).json();
        assert_eq!(found["tokens"].as_array().unwrap().len(), tokens);
        let mut tally = counts(&file);
        tally.iter_mut().for_each(|(what, count)| *count -= self.gpus.before()[what]);
        tally
    }
}

/// Tokens for a model: more than a page of positions, where its context has room.
pub fn prompt(model: &Path, length: u64) -> String {
    let config = std::fs::read(model.join("config.json")).or_else(|_| {
        // A native checkpoint says it elsewhere; those here are of the fixtures.
        std::fs::read(folder("fixtures").join("olmoe/config.json"))
    });
    let config: Value = serde_json::from_slice(&config.unwrap()).unwrap();
    let context = config["max_position_embeddings"].as_u64().unwrap_or(64);
    let tokens = (0..length.min(context - 12)).map(|i| (i * 37 % 91 + 2).to_string());
    tokens.collect::<Vec<_>>().join(",")
}

/// A folder of the tests.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(name)
}
