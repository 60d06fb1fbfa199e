//! What the command refuses before it does anything: each with its exit code, what it is about and the remedy.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_tests::command::{Place, Ran, signal, wait_until};
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
        ("warm = -1", &["config.toml", "warm"]),
        ("io = \"tape\"", &["config.toml", "io", "uring", "pread", "mmap"]),
        ("drain_bound = \"soon\"", &["config.toml", "drain_bound"]),
        ("sync_every = \"often\"", &["config.toml", "sync_every"]),
        ("treads = 1", &["config.toml", "treads"]),
        ("tierset = [\"fast\"]", &["config.toml", "unknown tier \"fast\"", "all"]),
        ("mode = \"quick\"", &["config.toml", "unknown mode \"quick\"", "balanced"]),
        ("[modes]\nx = [\"fast\"]", &["config.toml", "x: unknown tier \"fast\""]),
        ("[placement]\nfast = \"hot\"", &["config.toml", "placement: unknown tier \"fast\""]),
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
fn a_run_says_how_experts_are_read_and_refuses_what_cannot_be_had() {
    let place = place();
    let run = |model, more: &[&str]| {
        let line = ["run", model, "--prompt-tokens", "5", "--max-tokens", "1"];
        place.run(line.iter().chain(more))
    };
    let cannot = ["uring", "packed from mapped tensors", "import", "--io"];
    run("model", &["--io", "uring"]).refuses(1, &cannot);
    std::fs::write(place.path("config.toml"), "io = \"uring\"").unwrap();
    run("model", &["--config", "config.toml"]).refuses(1, &cannot);
    assert!(run("model", &[]).stderr.contains("experts are packed from mapped tensors"));

    let imported = place.run(["import", "model", "native"]);
    assert_eq!(imported.code, Some(0), "{}", imported.stderr);
    for model in ["model", "native"] {
        let words = ["direct", "memory of a GPU", "give --device cuda", "--io"];
        run(model, &["--io", "direct"]).refuses(1, &words);
    }
    let said = run("native", &["--config", "config.toml", "--io", "mmap"]).stderr;
    assert!(said.contains("experts are read with mmap"), "a flag goes before the file: {said}");
    let said = run("native", &["--io", "pread"]).stderr;
    assert!(said.contains("experts are read with pread"), "{said}");
    let ran = run("native", &[]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let better = ran.stderr.contains("experts are read with io_uring");
    assert!(better || ran.stderr.contains("; not with io_uring: "), "it is said why not: {}", ran.stderr);
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
fn too_little_memory_leaves_nothing() {
    let place = place();
    let run = ["run", "model", "--prompt-tokens", "5", "--memory", "1"];
    place.run(run).refuses(1, &["memory_bytes is 1", "needs at least"]);
    assert!(place.private_states().is_empty());
    place.run(run.iter().chain(&["--state", "s"])).refuses(1, &["memory_bytes is 1"]);
    assert!(!place.path("s/segment-00000000000000000001-00000000000000000001").exists());
}

#[test]
fn tiers_that_are_not_all_experts_are_refused_before_anything_is_written() {
    let place = Place::new();
    for more in [&[][..], &["--quantise", "q8"]] {
        let synth = ["synth", "m", "--family", "olmoe", "--experts", "4", "--tiers", "small:1,large:2"];
        let refused = place.run(synth.iter().chain(more));
        refused.refuses(2, &["--tiers", "the tiers have 3 experts, the checkpoint 4"]);
        assert!(!place.path("m").exists() && !refused.stderr.contains(".m.source"));
    }
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
    for flag in
        ["--max-tokens", "--temperature", "--top-k", "--threads", "--memory", "--prefill-chunk", "--deadline"]
    {
        place.run(["run", "m", "--prompt", "a", flag, "-1"]).refuses(2, &["invalid value '-1'", flag]);
    }
    place
        .run(["supervise", "--nodes", "-1", "--", "run", "m"])
        .refuses(2, &["invalid value '-1'", "--nodes"]);
    place.run(["ctl", "s", "budget", "-1"]).refuses(2, &["invalid value '-1'", "no duration"]);
}

#[test]
fn a_request_is_refused_before_a_model_is_loaded() {
    let place = place();
    let stop = "x".repeat(257);
    for (code, flags, parts) in [
        (2, &["--max-tokens", "0"][..], &["max_tokens is 0"][..]),
        (2, &["--top-p", "0"], &["top_p is 0", "above 0"]),
        (2, &["--temperature", "1e9"], &["temperature is", "0 to 100"]),
        (2, &["--stop", &stop], &["stop takes up to 16 texts"]),
        (2, &["--from-offset", "3"], &["--state", "--request-id"]),
        (1, &["--from-offset", "3", "--state", "new", "--request-id", "r"], &["new has no journal"]),
        (1, &["--logits", "/dev/null"], &["/dev/null", "no file"]),
        (1, &["--routes", "nowhere/routes"], &["nowhere/routes"]),
        (
            2,
            &["--generations", r#"[{"from":0,"tiers":["all"]},{"from":9,"tiers":["x"]}]"#],
            &["unknown tier \"x\""],
        ),
        (2, &["--out", "o"], &["--out belongs to --batch"]),
    ] {
        let ran = place.run(["run", "model", "--prompt-tokens", "5"].iter().chain(flags));
        ran.refuses(code, parts);
        assert!(!ran.stderr.contains("memory at most"), "{}", ran.stderr);
    }
    assert!(place.private_states().is_empty());
    std::fs::write(place.path("notes"), "hello").unwrap();
    place.run(["inspect", "notes"]).refuses(1, &["notes is no checkpoint"]);
    place.run(["inspect", "/dev/zero"]).refuses(1, &["/dev/zero is no checkpoint"]);
}

#[test]
fn output_that_cannot_be_written_loses_nothing() {
    let place = place();
    let run = |more: &str| {
        let line = format!("run model --prompt-tokens 5 --max-tokens 3 --state s --request-id r {more}");
        let mut shell = place.command([] as [&str; 0]);
        let program = shell.get_program().to_owned();
        let mut command = std::process::Command::new("sh");
        command.arg("-c").arg(format!("exec {} {line}", program.to_str().unwrap()));
        command.current_dir(shell.get_current_dir().unwrap()).stdin(std::process::Stdio::null());
        shell = command;
        Ran::from(shell.output().unwrap())
    };
    run(">/dev/full").refuses(1, &["--state s --request-id r goes on", "No space left"]);
    // A closed end is no reason to fail, nor to write into whatever file has its number.
    let quiet = run("2>&-");
    assert_eq!(quiet.code, Some(0));
    let again = run("");
    assert_eq!((again.code, &again.stdout), (Some(0), &quiet.stdout));
    assert_eq!(run(">&-").code, Some(0), "nobody wants to know");
    assert_eq!(place.run(["replay", "s"]).code, Some(0));
}

#[test]
fn a_pipe_where_a_directory_or_a_file_is_asked_for_is_refused() {
    let place = place();
    let make = |path: &str| {
        let made = std::process::Command::new("mkfifo").arg(place.path(path)).status().unwrap();
        assert!(made.success());
    };
    make("pipe");
    place.run(["inspect", "pipe"]).refuses(1, &["pipe", "and no file"]);
    place.run(["replay", "pipe"]).refuses(1, &["pipe", "cannot open the directory"]);
    place.run(["debug", "pipe", "--print"]).refuses(1, &["pipe", "cannot open the directory"]);
    std::fs::create_dir(place.path("state")).unwrap();
    std::fs::write(place.path("state/lock"), "").unwrap();
    std::fs::write(place.path("in.jsonl"), "{\"prompt_tokens\": [5], \"max_tokens\": 1}\n").unwrap();
    make("state/results.jsonl");
    place
        .run(["run", "model", "--batch", "in.jsonl", "--state", "state"])
        .refuses(1, &["results.jsonl", "it is no file"]);
}

#[test]
fn an_interrupted_text_leaves_nothing() {
    let place = place();
    let tokens = vec!["5"; 20_000].join(",");
    for command in ["trace", "perplexity"] {
        let line = [command, "model", "--tokens", &tokens, "--window", "2000"];
        let mut child = place.command(line).spawn().unwrap();
        // Locked, it listens.
        wait_until(&mut child, || place.private_states().iter().any(|state| state.join("lock").exists()));
        signal(child.id(), "INT");
        let ended = Ran::from(child.wait_with_output().unwrap());
        ended.refuses(1, &["stopped before the text was through"]);
        assert!(ended.stdout.is_empty() && place.private_states().is_empty());
    }
}

#[test]
fn paths_may_have_names_that_are_no_text() {
    use std::ffi::{OsStr, OsString};
    use std::os::unix::ffi::OsStrExt;
    let place = place();
    let of = |name: &[u8]| OsStr::from_bytes(name).to_os_string();
    let run = |args: &[&OsString]| place.run(args.iter().map(|arg| arg.as_os_str()));
    let word = |text: &str| OsString::from(text);
    let (model, state, ckpt) = (of(b"m\xff"), of(b"s\xff"), of(b"c\xff"));
    std::fs::rename(place.path("model"), place.path("x").with_file_name(&model)).unwrap();
    let (prompt, five, json) = (word("--prompt-tokens"), word("5"), word("--json"));
    for args in [
        &[&word("run"), &model, &prompt, &five, &word("--state"), &state][..],
        &[&word("import"), &model, &ckpt, &json],
        &[&word("inspect"), &model, &json],
        &[&word("inspect"), &state],
        &[&word("doctor"), &ckpt, &json],
        &[&word("synth"), &of(b"y\xff"), &word("--family"), &word("olmoe"), &json],
    ] {
        let ran = run(args);
        assert_eq!(ran.code, Some(0), "{args:?}: {}", ran.stderr);
    }
    run(&[
        &word("supervise"),
        &word("--nodes"),
        &word("1"),
        &word("--"),
        &word("run"),
        &model,
        &prompt,
        &five,
    ])
    .refuses(2, &["UTF-8", "rename it"]);
}
