//! Every file that the command reads, flipped and cut in every region, under a real process whose memory is limited:
//! the exact result, or a typed error with its documented exit code. Never a panic, never another result.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_tests::command::{Place, Ran, binary};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Address space of each process in KiB: the model, its threads' stacks and the program. A length that damage made up
/// would not fit.
const ADDRESS_SPACE_KIB: u32 = 1 << 20;
/// Regions of a file: each is damaged at its first byte, its last and one between.
const REGIONS: usize = 7;

const RUN: [&str; 8] = ["--prompt", "hello", "--ignore-eos", "--max-tokens", "5", "--threads", "1", "--json"];

/// A checkpoint in `hf`, imported in two tiers as `m`, and the state of a finished run with a snapshot in `state`.
fn place() -> Place {
    let place = Place::new();
    let spec = "--layers 1 --hidden 32 --experts 4 --top-k 2 --vocab 300".split(' ');
    let synth = ["synth", "hf", "--family", "olmoe"].into_iter().chain(spec);
    assert_eq!(place.run(synth).code, Some(0));
    assert_eq!(place.run(["import", "hf", "m", "--tiers", "small:2,large:2:cold"]).code, Some(0));
    place
}

fn limited(place: &Place, arguments: &[&str]) -> Ran {
    let mut command = Command::new("sh");
    let script = format!("ulimit -v {ADDRESS_SPACE_KIB}; exec \"$0\" \"$@\"");
    command.args(["-c", &script]).arg(binary()).args(arguments).current_dir(place.path(""));
    command.env("XDG_STATE_HOME", place.path("home"));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.output().unwrap().into()
}

/// A file's bytes, damaged in one way.
fn damages(bytes: &[u8]) -> Vec<(String, Vec<u8>)> {
    let mut damages = Vec::new();
    for region in 0..REGIONS {
        let (start, end) = (bytes.len() * region / REGIONS, bytes.len() * (region + 1) / REGIONS);
        let mut places = vec![start, usize::midpoint(start, end), end.saturating_sub(1)];
        places.dedup();
        for at in places.into_iter().filter(|&at| at < bytes.len()) {
            let mut flipped = bytes.to_vec();
            flipped[at] ^= 1 << (at % 8);
            damages.push((format!("a bit of byte {at} flipped"), flipped));
        }
        damages.push((format!("cut at {start}"), bytes[..start].to_vec()));
    }
    damages
}

/// Damages each file of a directory in turn, and asks `judge` what a command makes of it.
fn sweep(dir: &Path, mut judge: impl FnMut(&str, &str)) {
    let mut names: Vec<PathBuf> =
        std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect();
    names.sort();
    for path in names.into_iter().filter(|path| path.is_file()) {
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        let whole = std::fs::read(&path).unwrap();
        for (damage, bytes) in damages(&whole) {
            std::fs::write(&path, bytes).unwrap();
            judge(&name, &damage);
        }
        std::fs::write(&path, whole).unwrap();
    }
}

#[track_caller]
fn orderly(ran: &Ran, name: &str, damage: &str) {
    assert!(matches!(ran.code, Some(0 | 1 | 3)), "{name}, {damage}: {:?} {}", ran.code, ran.stderr);
    assert!(!ran.stderr.contains("panicked"), "{name}, {damage}: {}", ran.stderr);
    assert!(ran.code == Some(0) || ran.stderr.contains("error: "), "{name}, {damage}: {}", ran.stderr);
}

fn tokens(ran: &Ran) -> serde_json::Value {
    ran.json()["tokens"].take()
}

#[test]
fn a_damaged_checkpoint_is_refused_or_makes_no_difference() {
    let place = place();
    let run = |model| limited(&place, &[&["run", model], &RUN[..]].concat());
    let whole = tokens(&run("m"));
    let (mut same, mut refused, mut corrupt) = (0, 0, 0);
    sweep(&place.path("m"), |name, damage| {
        let ran = run("m");
        orderly(&ran, name, damage);
        match ran.code {
            Some(0) => {
                assert_eq!(tokens(&ran), whole, "{name}, {damage}");
                same += 1;
            }
            Some(3) => corrupt += 1,
            _ => refused += 1,
        }
        // The shards have a digest each; only what no token of this prompt needs may be passed over.
        let read = name == "base.bin" || name == "experts-00000.bin";
        assert!(!read || ran.code != Some(0) || damage.contains("flipped"), "{name}, {damage}: not seen");
    });
    assert!(same > 0 && refused > 0 && corrupt > 0, "{same} the same, {refused} refused, {corrupt} corrupt");
}

#[test]
fn a_damaged_published_checkpoint_does_no_harm() {
    let place = place();
    let mut refused = 0;
    sweep(&place.path("hf"), |name, damage| {
        // Its formats have no checksums: what is still well-formed is another checkpoint.
        let ran = limited(&place, &[&["run", "hf"], &RUN[..]].concat());
        orderly(&ran, name, damage);
        refused += u32::from(ran.code != Some(0));
        let imported = limited(&place, &["import", "hf", "out"]);
        orderly(&imported, name, damage);
        if imported.code == Some(0) {
            std::fs::remove_dir_all(place.path("out")).unwrap();
        } else {
            assert!(!place.path("out").exists(), "{name}, {damage}: half an import stands");
        }
        for entry in std::fs::read_dir(place.path("")).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap().to_str().unwrap().contains("partial") {
                std::fs::remove_dir_all(path).unwrap();
            }
        }
    });
    assert!(refused > 20, "{refused} refused");
}

#[test]
fn a_damaged_state_gives_the_same_stream_or_says_why_not() {
    let place = place();
    let run: Vec<&str> = ["run", "m"].into_iter().chain(RUN).chain(["--state", "state"]).collect();
    let asked = |id| limited(&place, &[&run[..], &["--request-id", id]].concat());
    let whole = tokens(&asked("one"));
    assert_eq!(tokens(&asked("two")), whole);
    let keep = place.path("keep");
    copy(&place.path("state"), &keep);
    let (mut same, mut corrupt) = (0, 0);
    sweep(&keep, |name, damage| {
        let _ = std::fs::remove_dir_all(place.path("state"));
        copy(&keep, &place.path("state"));
        let replayed = limited(&place, &["replay", "state", "--full", "m"]);
        orderly(&replayed, name, damage);
        let inspected = limited(&place, &["inspect", "state"]);
        orderly(&inspected, name, damage);
        let again = asked("one");
        orderly(&again, name, damage);
        if again.code == Some(0) {
            assert_eq!(tokens(&again), whole, "{name}, {damage}");
            same += 1;
        } else {
            assert_ne!(again.code, replayed.code.filter(|&code| code == 0), "{name}, {damage}");
            corrupt += u32::from(again.code == Some(3));
        }
    });
    assert!(same > 0 && corrupt > 0, "{same} the same, {corrupt} corrupt");
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(|entry| entry.unwrap()) {
        if entry.path().is_file() {
            std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
        }
    }
}
