//! A supervisor over real processes: scripts that die in each way, and a node that is killed again and again.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use lite_llm_core::config::Config;
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::Body;
use lite_llm_hw::node::{Node, NodeOptions, StreamEvent};
use lite_llm_hw::supervisor::{
    Delivered, Exit, Outcome, RestartBudget, Supervisor, SupervisorOptions, WatchLimits,
};
use rustix::process::{Signal, getpid, kill_process};

const SOON: Duration = Duration::from_millis(200);
const NEVER: Duration = Duration::from_secs(3600);

fn supervisor(state_dir: &Path, restarts_max: usize, silence_max: Duration) -> Supervisor {
    let pause = Duration::from_millis(1);
    Supervisor::new(SupervisorOptions {
        state_dir: state_dir.into(),
        budget: RestartBudget { restarts_max, window: NEVER, pause_min: pause, pause_max: pause },
        limits: WatchLimits { silence_max, stuck_max: silence_max },
        pass_stderr: false,
    })
}

fn script(text: &str) -> Command {
    let mut command = Command::new("sh");
    command.args(["-c", text]);
    command
}

fn report(outcome: &Outcome, index: usize) -> serde_json::Value {
    serde_json::from_str(&std::fs::read_to_string(&outcome.reports[index]).unwrap()).unwrap()
}

#[test]
fn a_killed_process_is_recorded_and_started_again() {
    let state = tempfile::tempdir().unwrap();
    let mut lines = Vec::new();
    let lives = [
        "echo one; echo '{\"beat\":\"progress\",\"record\":42}'; echo gone >&2; kill -9 $$",
        "echo two; exit 4",
        "echo three; exit 0",
    ];
    let outcome = supervisor(state.path(), 5, NEVER)
        .run(
            |life| script(lives[life as usize]),
            |line| {
                lines.push(line.to_owned());
                Ok(())
            },
        )
        .unwrap();
    assert_eq!((outcome.exit, outcome.restarts, outcome.gave_up.clone()), (Exit::Code(0), 2, None));
    assert_eq!(lines, ["one", "two", "three"], "beats are not passed on");
    let first = report(&outcome, 0);
    assert_eq!((&first["exit"]["Signal"], &first["progress"]), (&9.into(), &42.into()));
    assert_eq!(first["stderr"], serde_json::json!(["gone"]));
    assert_eq!(report(&outcome, 1)["exit"]["Code"], 4);
}

#[test]
fn a_refusal_is_no_crash_and_a_budget_ends() {
    let state = tempfile::tempdir().unwrap();
    let run =
        |text: &'static str| supervisor(state.path(), 2, NEVER).run(|_| script(text), |_| Ok(())).unwrap();
    let refused = run("exit 3");
    assert_eq!((refused.exit, refused.restarts, refused.reports.len()), (Exit::Code(3), 0, 0));
    let doomed = run("kill -11 $$");
    assert_eq!((doomed.exit, doomed.restarts, doomed.reports.len()), (Exit::Signal(11), 2, 3));
    assert!(doomed.gave_up.unwrap().contains("restarted 2 times"));
}

#[test]
fn silence_and_standstill_are_ended_by_force() {
    let state = tempfile::tempdir().unwrap();
    let run =
        |text: &'static str| supervisor(state.path(), 0, SOON).run(|_| script(text), |_| Ok(())).unwrap();
    let silent = run("exec sleep 3600");
    assert_eq!((silent.exit, report(&silent, 0)["verdict"].clone()), (Exit::Signal(9), "Silent".into()));
    let stuck =
        run("while :; do echo '{\"beat\":\"progress\",\"record\":7,\"busy\":true}'; sleep 0.02; done");
    assert_eq!(report(&stuck, 0)["verdict"]["Stuck"]["record"], 7);
    let closed = run("exec >&- 2>&-; exec sleep 3600");
    assert_eq!(closed.exit, Exit::Signal(9), "a closed output is silence too");
}

#[test]
fn who_asks_for_a_stop_gets_no_restart() {
    let state = tempfile::tempdir().unwrap();
    for (text, exit) in [
        ("trap 'exit 0' TERM; echo ready; while :; do sleep 0.02; done", Exit::Code(0)),
        ("echo ready; exec sleep 3600", Exit::Signal(15)),
    ] {
        let supervisor = supervisor(state.path(), 5, NEVER);
        let handle = supervisor.handle();
        let outcome = supervisor
            .run(
                |_| script(text),
                |line| {
                    assert_eq!(line, "ready");
                    handle.stop();
                    Ok(())
                },
            )
            .unwrap();
        assert_eq!((outcome.exit, outcome.restarts, outcome.gave_up), (exit, 0, None));
    }
}

fn fixture() -> std::path::PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/olmoe")
}

fn oracle() -> (Vec<u32>, Vec<u32>) {
    let text = std::fs::read_to_string(fixture().join("oracle.json")).unwrap();
    let oracle: serde_json::Value = serde_json::from_str(&text).unwrap();
    let tokens = |value: &serde_json::Value| serde_json::from_value(value.clone()).unwrap();
    (tokens(&oracle["prompts"][2]), tokens(&oracle["greedy"][2]["tokens"]))
}

/// The process of the test below: a node that says its tokens, and kills itself after some of them. Run by itself it
/// has nothing to do.
#[test]
fn child_node() {
    let Ok(state) = std::env::var("LITE_LLM_TEST_STATE") else { return };
    let kill_after: u32 = std::env::var("LITE_LLM_TEST_KILL_AFTER").unwrap().parse().unwrap();
    let config = Config { memory_bytes: 512 << 20, ..Config::default() };
    let node = Node::start(NodeOptions { threads: 1, ..NodeOptions::new(fixture(), state, config) }).unwrap();
    let (prompt, greedy) = oracle();
    let body = Body { prompt, max_tokens: greedy.len() as u32, ..Body::default() };
    let mut said = 0;
    for event in node.submit(RequestId::new("r").unwrap(), body, 0) {
        if let StreamEvent::Token { offset, token } = event {
            println!("\ntoken {offset} {token}");
            said += 1;
            if said == kill_after {
                kill_process(getpid(), Signal::KILL).unwrap();
            }
        }
    }
}

#[test]
fn a_stream_survives_kills_and_reaches_its_client_once() {
    let state = tempfile::tempdir().unwrap();
    let (_, greedy) = oracle();
    let mut delivered = Delivered::default();
    let (mut tokens, mut heard) = (Vec::new(), 0);
    let outcome = supervisor(state.path(), 20, NEVER)
        .run(
            |life| {
                let mut child = Command::new(std::env::current_exe().unwrap());
                child.args(["--exact", "child_node", "--nocapture"]);
                child.env("LITE_LLM_TEST_STATE", state.path());
                child.env("LITE_LLM_TEST_KILL_AFTER", (1 + 6 * life).to_string());
                child
            },
            |line| {
                let mut words = line.split(' ');
                if words.next() == Some("token") {
                    let mut number = || words.next().unwrap().parse::<u32>().unwrap();
                    let (offset, token) = (number(), number());
                    heard += 1;
                    if delivered.take(offset, token).unwrap() {
                        tokens.push(token);
                    }
                }
                Ok(())
            },
        )
        .unwrap();
    assert_eq!((outcome.exit, outcome.gave_up.clone()), (Exit::Code(0), None));
    assert_eq!(tokens, greedy);
    assert!(outcome.restarts >= 4 && heard > greedy.len(), "{outcome:?}");
    let last = report(&outcome, outcome.reports.len() - 1);
    assert_eq!(last["journal"]["incarnation"], outcome.restarts);
    assert!(last["journal"]["state_digest"].is_string() && last["journal"]["error"].is_null());
}
