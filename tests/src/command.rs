//! The `lite-llm` command as a process.
#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "this is test code; a panic is a failed test"
)]

use serde_json::Value;
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::OnceLock;
use std::sync::mpsc::channel;
use std::time::Duration;

/// The binary, built with the profile of this test. Cargo builds the binaries of a test's own package only.
pub fn binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| {
        let own = std::env::current_exe().unwrap();
        let profile = own.parent().unwrap().parent().unwrap();
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        // The selection of `cargo test`: dependencies have the features that they have there, and are not built again.
        cargo.args(["build", "--quiet", "--bin", "lite-llm"]);
        if profile.ends_with("release") {
            cargo.arg("--release");
        }
        cargo.current_dir(Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap());
        assert!(cargo.status().unwrap().success(), "lite-llm does not build");
        profile.join("lite-llm")
    })
}

/// What a command said, and how it ended.
#[derive(Debug)]
pub struct Ran {
    /// Exit code; `None` after a signal.
    pub code: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl From<Output> for Ran {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

impl Ran {
    /// The one JSON object on standard output of a command that went well.
    #[track_caller]
    pub fn json(&self) -> Value {
        assert_eq!(self.code, Some(0), "{}", self.stderr);
        serde_json::from_str(&self.stdout).unwrap()
    }

    /// Asserts a refusal with an exit code, whose message has these parts.
    #[track_caller]
    pub fn refuses(&self, code: i32, parts: &[&str]) {
        assert_eq!(self.code, Some(code), "{}\n{}", self.stdout, self.stderr);
        for part in parts {
            assert!(self.stderr.contains(part), "{part:?} is not in: {}", self.stderr);
        }
        assert!(!self.stderr.contains("panicked"), "{}", self.stderr);
    }
}

/// A directory with a home of its own, in which commands run.
#[derive(Debug)]
pub struct Place {
    dir: tempfile::TempDir,
}

impl Default for Place {
    fn default() -> Self {
        Self::new()
    }
}

impl Place {
    /// An empty place.
    pub fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap() }
    }

    /// A path in it.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Where private state directories go.
    pub fn private_states(&self) -> Vec<PathBuf> {
        let Ok(entries) = std::fs::read_dir(self.path("home/lite-llm")) else { return Vec::new() };
        entries.map(|entry| entry.unwrap().path()).collect()
    }

    /// The command, not yet started.
    pub fn command<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(binary());
        command.args(arguments).current_dir(self.dir.path());
        command.env("XDG_STATE_HOME", self.path("home"));
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs the command to its end.
    #[track_caller]
    pub fn run<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Ran {
        run(self.command(arguments))
    }
}

/// Far longer than any command takes.
const PATIENCE: Duration = Duration::from_secs(600);

/// Runs a command to its end. One that hangs fails here, with what it said.
#[track_caller]
pub fn run(mut command: Command) -> Ran {
    ended(command.spawn().unwrap())
}

/// What a command has said when it ends. One that hangs fails here.
#[track_caller]
pub fn ended(child: Child) -> Ran {
    let (pid, (sender, ended)) = (child.id(), channel());
    std::thread::spawn(move || sender.send(child.wait_with_output().unwrap()));
    let in_time = ended.recv_timeout(PATIENCE);
    let hangs = in_time.is_err();
    let output = in_time.or_else(|_| {
        try_signal(pid, "KILL");
        ended.recv()
    });
    let ran = Ran::from(output.unwrap());
    assert!(!hangs, "the command hangs, and said: {}{}", ran.stdout, ran.stderr);
    ran
}

/// The token lines of a stream in JSON, and its result line if it got that far. Half a line is no line.
pub fn parse_stream(stdout: &str) -> (Vec<(u64, u64)>, Option<Value>) {
    let (mut tokens, mut result) = (Vec::new(), None);
    for line in stdout.split_inclusive('\n').filter(|line| line.ends_with('\n')) {
        let value: Value = serde_json::from_str(line).unwrap();
        if value["tokens"].is_array() {
            result = Some(value);
        } else {
            tokens.push((value["offset"].as_u64().unwrap(), value["token"].as_u64().unwrap()));
        }
    }
    (tokens, result)
}

/// Waits until `there` is, for as long as the process lives.
#[track_caller]
pub fn wait_until(child: &mut Child, mut there: impl FnMut() -> bool) {
    while !there() {
        assert!(child.try_wait().unwrap().is_none(), "the process ended before what it was to bring about");
        std::thread::sleep(std::time::Duration::from_millis(2));
    }
}

/// Sends a signal to a process.
#[track_caller]
pub fn signal(pid: u32, name: &str) {
    assert!(try_signal(pid, name));
}

/// Sends a signal to a process, which may have ended; says whether it had not.
pub fn try_signal(pid: u32, name: &str) -> bool {
    let mut kill = Command::new("kill");
    kill.args([&format!("-{name}"), &pid.to_string()]).stderr(Stdio::null());
    kill.status().unwrap().success()
}

/// The process that a process has started and not yet waited for.
pub fn child_of(parent: u32) -> Option<u32> {
    let tasks = std::fs::read_dir(format!("/proc/{parent}/task")).ok()?;
    let children = tasks.filter_map(|task| std::fs::read_to_string(task.ok()?.path().join("children")).ok());
    children
        .flat_map(|list| list.split_whitespace().map(|pid| pid.parse().unwrap()).collect::<Vec<_>>())
        .next()
}

/// The tokens of a stream, each offset once and in order, as the result has them too.
#[track_caller]
pub fn tokens(ran: &Ran) -> Vec<u64> {
    let (stream, result) = parse_stream(&ran.stdout);
    let tokens: Vec<u64> = stream.iter().map(|(_, token)| *token).collect();
    assert!(stream.iter().map(|(offset, _)| *offset).eq(0..tokens.len() as u64), "{stream:?}");
    let result = result.expect("a result");
    let of_result: Vec<u64> =
        result["tokens"].as_array().expect("tokens").iter().filter_map(Value::as_u64).collect();
    assert_eq!(tokens, of_result);
    tokens
}

/// What was recorded of the ends of nodes, in the directory `state` of a place.
pub fn failures(place: &Place, nodes: u32) -> Vec<Value> {
    let dirs = (0..nodes).map(|node| place.path(&format!("state/node-{node}")));
    let files = dirs.flat_map(|dir| std::fs::read_dir(dir).into_iter().flatten().flatten());
    let failures = files.filter(|file| file.file_name().to_string_lossy().starts_with("failure-"));
    failures
        .map(|file| serde_json::from_slice(&std::fs::read(file.path()).expect("a file")).expect("JSON"))
        .collect()
}
