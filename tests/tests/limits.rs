//! Limits that the system sets: a disk that is full, memory that may not be locked, a group whose memory is bounded. Where this
//! machine lets nobody set them, a test says so and is skipped.
#![allow(clippy::unwrap_used, clippy::expect_used, reason = "a test may panic")]

use lite_llm_tests::command::{Place, Ran, binary};
use std::path::PathBuf;
use std::process::Command;

const RUN: &str = "run m --prompt-tokens 5,6,7 --max-tokens 120 --ignore-eos --temperature 1 --seed 3 --json";

/// A place with a native checkpoint `m` of four layers, with so many experts each, so wide.
fn place(experts: u32, width: u32) -> Place {
    let place = Place::new();
    let shape =
        format!("--layers 4 --hidden {width} --heads 4 --experts {experts} --top-k 4 --intermediate {width}");
    let made = place.run(
        format!("synth m --family olmoe {shape} --vocab 300 --context 1024 --tiers all:{experts}").split(' '),
    );
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    place
}

/// Runs a script in namespaces of its own, if that can be done.
fn in_namespace(place: &Place, script: &str) -> Option<Ran> {
    let may = Command::new("unshare").args(["-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]).status();
    if !may.is_ok_and(|status| status.success()) {
        println!("skipped: this machine lets nobody mount (unshare -Urm)");
        return None;
    }
    let mut command = Command::new("unshare");
    command.args(["-Urm", "bash", "-c", script]).current_dir(place.path(""));
    let ran = command.env("PROGRAM", binary()).env("RUN", RUN).output().expect("a script");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some(Ran { code: ran.status.code(), stdout: text(&ran.stdout), stderr: text(&ran.stderr) })
}

#[test]
fn a_full_disk_ends_a_life_and_costs_no_token() {
    let place = place(16, 128);
    let expected = place.run(RUN.split(' ')).json()["tokens"].clone();
    std::fs::create_dir(place.path("state")).unwrap();
    let script = r#"
        mount -t tmpfs -o size=400k tmpfs state || exit 90
        # A group, and with it a block, for each token.
        $PROGRAM $RUN --sync-every 0s --state state --request-id one > full.out; code=$?
        [ $code = 1 ] || exit 91
        mount -o remount,size=64m state || exit 92
        exec $PROGRAM $RUN --state state --request-id one
    "#;
    let Some(ran) = in_namespace(&place, script) else { return };
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    for part in ["cannot append to segment-", "No space left on device", "--request-id one goes on"] {
        assert!(ran.stderr.contains(part), "{part} in {}", ran.stderr);
    }
    assert_eq!(ran.json()["tokens"], expected);
}

#[test]
fn where_memory_may_not_be_locked_slots_are_read_into_as_they_are() {
    let place = place(16, 128);
    let expected = place.run(RUN.split(' ')).json()["tokens"].clone();
    let script = "ulimit -l 64 && exec $PROGRAM $RUN --memory 52MiB";
    let Some(ran) = in_namespace(&place, script) else { return };
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let alternatives = ["not registered with the kernel, since the limit of locked memory", "pread"];
    assert!(alternatives.iter().any(|part| ran.stderr.contains(part)), "{}", ran.stderr);
    assert_eq!(ran.json()["tokens"], expected);
}

/// A group of processes that may have so many bytes of memory, removed when dropped.
struct Group(PathBuf);

impl Group {
    fn new(bytes: u64) -> Option<Self> {
        let name = format!("lite-llm-test-{}", std::process::id());
        let (old, new) = ("/sys/fs/cgroup/memory", "/sys/fs/cgroup");
        for (root, limit) in [(old, "memory.limit_in_bytes"), (new, "memory.max")] {
            let group = Self(PathBuf::from(root).join(&name));
            if std::fs::create_dir(&group.0).is_ok()
                && std::fs::write(group.0.join(limit), bytes.to_string()).is_ok()
            {
                return Some(group);
            }
        }
        println!("skipped: this machine lets nobody make groups of bounded memory");
        None
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir(&self.0);
    }
}

#[test]
fn a_budget_is_held_in_a_group_that_has_little_more() {
    let place = place(32, 512);
    let expected = place.run(RUN.split(' ')).json()["tokens"].clone();
    let refused = place.run(format!("{RUN} --memory 1MiB").split(' '));
    refused.refuses(1, &["at least "]);
    let least = refused
        .stderr
        .split("at least ")
        .nth(1)
        .unwrap()
        .split(|c: char| !c.is_ascii_digit())
        .next()
        .unwrap();
    let budget = least.parse::<u64>().unwrap() + 64 * 3 * 512 * 512 * 2;
    let Some(group) = Group::new(budget + budget / 50) else { return };
    let script =
        format!("echo $$ > '{}/cgroup.procs' && exec $PROGRAM $RUN --memory {budget}", group.0.display());
    let mut command = Command::new("bash");
    command.args(["-c", &script]).current_dir(place.path("")).env("PROGRAM", binary()).env("RUN", RUN);
    let ran = command.output().expect("a script");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let ran = Ran { code: ran.status.code(), stdout: text(&ran.stdout), stderr: text(&ran.stderr) };
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(ran.json()["tokens"], expected);
}
