//! What the command refuses before it does anything: each with its exit code, what it is about and the remedy.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_tests::command::Place;
use std::os::unix::fs::PermissionsExt;

/// A place with a small model in it.
fn place() -> Place {
    let place = Place::new();
    let synth = place.run([
        "synth",
        "model",
        "--family",
        "olmoe",
        "--layers",
        "1",
        "--hidden",
        "32",
        "--experts",
        "4",
        "--top-k",
        "2",
        "--vocab",
        "300",
    ]);
    assert_eq!(synth.code, Some(0), "{}", synth.stderr);
    place
}

#[test]
fn a_configuration_is_refused_by_file_and_key() {
    let place = place();
    for (text, parts) in [
        ("threads = 65000", &["config.toml", "threads is 65000", "1 to 1024"][..]),
        ("threads = 0", &["config.toml", "threads is 0"]),
        ("mode = \"max\"\ntierset = [\"all\"]", &["config.toml", "both tierset and mode"]),
        ("[modes]\nx = []", &["config.toml", "modes.x has no tiers"]),
        ("journal_max = 1", &["config.toml", "journal_max", "give at least"]),
        ("memory = \"many\"", &["config.toml", "memory"]),
        ("drain_bound = \"soon\"", &["config.toml", "drain_bound"]),
        ("treads = 1", &["config.toml", "treads"]),
    ] {
        std::fs::write(place.path("config.toml"), text).unwrap();
        let run = ["run", "model", "--prompt-tokens", "5", "--max-tokens", "1", "--config", "config.toml"];
        place.run(run).refuses(2, parts);
    }
    // A device has no end.
    let run = ["run", "model", "--prompt-tokens", "5", "--max-tokens", "1", "--config", "/dev/zero"];
    place.run(run).refuses(2, &["/dev/zero", "longer than any configuration"]);
    let run = ["run", "model", "--prompt-tokens", "5", "--max-tokens", "1", "--journal-max", "0"];
    place.run(run).refuses(2, &["--journal-max", "give at least"]);
}

#[test]
fn a_directory_with_something_else_in_it_is_no_state() {
    let place = place();
    let before = std::fs::read_dir(place.path("model")).unwrap().count();
    for supervised in [false, true] {
        let mut line = vec!["run", "model", "--prompt-tokens", "5", "--max-tokens", "1", "--state", "model"];
        if supervised {
            line.splice(0..0, ["supervise", "--"]);
        }
        place.run(line).refuses(1, &["model is no state directory", "--state"]);
    }
    assert_eq!(std::fs::read_dir(place.path("model")).unwrap().count(), before, "nothing is written there");
}

#[test]
fn a_state_directory_is_its_user_s_alone() {
    let place = place();
    let line = ["run", "model", "--prompt-tokens", "5", "--max-tokens", "1", "--request-id", "r", "--state"];
    let plain: Vec<&str> = line.into_iter().chain(["plain"]).collect();
    let supervised: Vec<&str> = ["supervise", "--"].into_iter().chain(line).chain(["supervised"]).collect();
    for (line, state) in [(plain, "plain"), (supervised, "supervised")] {
        let ran = place.run(line);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let mode = std::fs::metadata(place.path(state)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700, "{state}");
    }
}

#[test]
fn help_of_a_supervised_run_is_no_mistake_and_a_negative_number_is_named() {
    let place = Place::new();
    let help = place.run(["supervise", "--", "run", "--help"]);
    assert_eq!(help.code, Some(0), "{}", help.stderr);
    assert!(help.stdout.contains("--max-tokens"), "{}", help.stdout);
    place.run(["run", "m", "--prompt", "a", "--max-tokens", "-1"]).refuses(2, &["invalid value '-1'"]);
}
