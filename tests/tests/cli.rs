//! The command as users and scripts meet it: results, refusals, exit codes.

use lite_llm_model::synth::{SynthFamily, SynthSpec, synth};
use lite_llm_tests::command::{Place, Ran, child_of, parse_stream, signal, wait_until};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

const PROMPT: [&str; 2] = ["--prompt", "kill it anywhere"];

/// A place with a small mixture in `m`.
fn place() -> Place {
    place_of(SynthSpec::of(SynthFamily::Olmoe))
}

fn place_of(spec: SynthSpec) -> Place {
    let place = Place::new();
    synth(&place.path("m"), &spec).unwrap();
    place
}

fn run(place: &Place, more: &[&str]) -> Ran {
    place.run(["run", "m"].iter().chain(&PROMPT).chain(&["--ignore-eos", "--max-tokens", "12"]).chain(more))
}

/// A request of many tokens, in `state`. Nobody reads them, so that the process stays even when it is done.
fn long(place: &Place, tokens: &str) -> std::process::Child {
    let arguments = ["run", "m", "--max-tokens", tokens, "--ignore-eos", "--stream", "--json"];
    let arguments = arguments.iter().chain(&PROMPT).chain(&["--state", "state", "--request-id", "long"]);
    let mut child = place.command(arguments).spawn().unwrap();
    // The first token says that it serves.
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
    assert!(line.contains("offset"), "{line}");
    child
}

#[test]
fn help_and_usage_errors() {
    let place = Place::new();
    let help = place.run(["--help"]);
    assert_eq!(help.code, Some(0));
    insta::assert_snapshot!("help", help.stdout);
    let help = place.run(["run", "-h"]);
    assert_eq!(help.code, Some(0));
    insta::assert_snapshot!("run_help", help.stdout);
    let mut errors = String::new();
    for arguments in [
        &["dance"][..],
        &["run"],
        &["run", "m", "--memory", "12GB"],
        &["run", "m", "--temperature", "-1"],
        &["run", "m", "--prompt-tokens", "1,x"],
        &["run", "m", "--prompt", "a", "--chat", "b"],
        &["run", "m", "--request-id", "a b"],
        &["run", "m", "--generations", "[]"],
        &["synth", "d", "--family", "gpt"],
        &["supervise", "--", "demo"],
        &["ctl", "state", "tierset"],
        &["ctl", "state", "mode", "fast", "--at", "nowhere"],
        &["replay", "state", "--until", "0"],
    ] {
        let ran = place.run(arguments);
        ran.refuses(2, &[]);
        errors.push_str(&format!("$ lite-llm {}\n{}\n", arguments.join(" "), ran.stderr));
    }
    insta::assert_snapshot!("usage_errors", errors);
}

#[test]
fn a_model_is_made_run_inspected_and_replayed() {
    let place = Place::new();
    let made = place.run(["synth", "m", "--family", "olmoe", "--layers", "2", "--json"]).json();
    assert_eq!(made["files"], 1);
    let result = run(&place, &["--json", "--state", "state"]).json();
    assert_eq!(result["tokens"].as_array().unwrap().len(), 12);
    assert_eq!(result["finish_reason"], "length");
    assert!(result["text"].is_string());
    assert_eq!(
        result["generations"],
        json!([
            { "from": 0, "until": result["generations"][0]["until"], "generation": 0, "tiers": ["all"] }
        ])
    );
    for digest in [&result["state_digest"], &result["identity"]["weights"]] {
        assert_eq!(digest.as_str().unwrap().len(), 64);
    }

    let model = place.run(["inspect", "m", "--json"]).json();
    assert_eq!((&model["family"], &model["layers"]), (&json!("olmoe"), &json!(2)));
    let state = place.run(["inspect", "state", "--records", "--json"]).json();
    assert_eq!(state["lifecycle"], "Stopped");
    assert_eq!(state["state_digest"], result["state_digest"]);
    assert_eq!(state["records"].as_array().unwrap().len() as u64, state["last"].as_u64().unwrap());
    let segment = state["segments"][0]["name"].as_str().unwrap();
    // Whatever its name is.
    std::fs::copy(place.path("state").join(segment), place.path("copied")).unwrap();
    let segment = place.run(["inspect", "copied", "--json"]).json();
    assert_eq!(segment["first"], 1);

    let replay = place.run(["replay", "state", "--full", "m", "--json"]).json();
    assert_eq!(replay["state_digest"], result["state_digest"]);
    assert_eq!(replay["digest"], result["digest"]);
    assert_eq!(replay["tokens"], 12);
    assert_eq!(replay["full"]["steps"], 12);
    let part = place.run(["replay", "state", "--until", "5", "--json"]).json();
    assert_eq!(part["last"], 5);
    // Private states are for runs without --state, and go.
    assert_eq!(run(&place, &[]).code, Some(0));
    assert!(place.private_states().is_empty());
}

#[test]
fn the_bits_do_not_depend_on_how() {
    let place = place();
    let mut reference: Option<(Value, Vec<u8>)> = None;
    let minimum = {
        let refused = run(&place, &["--memory", "1MiB", "--logits", "l"]);
        refused.refuses(1, &["at least"]);
        let number = refused.stderr.split("at least ").nth(1).unwrap();
        number.split(|c: char| !c.is_ascii_digit()).next().unwrap().to_owned()
    };
    let warm = 192 << 10;
    let with_warm = (minimum.parse::<u64>().unwrap() + warm).to_string();
    for how in [
        &["--threads", "1", "--isa", "scalar"][..],
        &["--threads", "2"],
        &["--prefill-chunk", "1"],
        &["--prefill-chunk", "7", "--snapshot-every", "10"],
        &["--journal-max", "256KiB"],
        &["--memory", &minimum],
        &["--memory", &minimum, "--foresight", "on"],
        &["--memory", &with_warm, "--warm", &warm.to_string()],
    ] {
        let more = ["--json", "--temperature", "0.9", "--seed", "3", "--logits", "l", "--routes", "r"];
        let ran = run(&place, &[how, &more].concat());
        let tokens = ran.json()["tokens"].clone();
        let bytes =
            [std::fs::read(place.path("l")).unwrap(), std::fs::read(place.path("r")).unwrap()].concat();
        let (expected, bits) = reference.get_or_insert((tokens.clone(), bytes.clone()));
        assert_eq!(*expected, tokens, "{how:?}");
        assert!(*bits == bytes, "{how:?}: other logits or routes");
    }
    let bytes = std::fs::read(place.path("l")).unwrap();
    let logits = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let shape = logits.tensor("logits").unwrap().shape().to_vec();
    assert_eq!(shape[1], 512);
    let bytes = std::fs::read(place.path("r")).unwrap();
    let routes = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    // The last token is not computed: nothing follows it.
    assert_eq!(routes.tensor("experts").unwrap().shape(), [4, shape[0] + 11, 4]);
    assert_eq!(routes.tensor("weights").unwrap().shape(), [4, shape[0] + 11, 4]);
}

#[test]
fn the_same_command_attaches_and_another_body_is_refused() {
    let place = place();
    let key = ["--state", "state", "--request-id", "one"];
    let tensors = || [std::fs::read(place.path("l")).unwrap(), std::fs::read(place.path("r")).unwrap()];
    let wanted = ["--json", "--logits", "l", "--routes", "r"];
    let first = run(&place, &[&key[..], &wanted].concat()).json();
    let bits = tensors();
    let again = run(&place, &[&key[..], &wanted].concat()).json();
    assert!(tensors() == bits, "what no journal has is computed again");
    assert_eq!(first["tokens"], again["tokens"]);
    assert_eq!(again["incarnation"], 2);
    let steps = place.run(["replay", "state", "--full", "m", "--json"]).json()["full"]["steps"].clone();
    assert_eq!(steps, 12, "nothing was computed again");
    let rest = run(&place, &[&key[..], &["--json", "--from-offset", "5"]].concat()).json();
    assert_eq!(rest["tokens"].as_array().unwrap()[..], first["tokens"].as_array().unwrap()[5..]);
    run(&place, &[&key[..], &["--temperature", "1"]].concat()).refuses(1, &["another body"]);
    run(&place, &[&key[..], &["--from-offset", "13"]].concat()).refuses(1, &["beyond"]);
    place.run(["replay", "state", "--until", "9999"]).refuses(1, &["no record 9999", "it has 1 to"]);
}

#[test]
fn bad_input_says_what_and_why() {
    let place = place();
    place.run(["run", "nowhere", "--prompt", "a"]).refuses(1, &["nowhere", "checkpoint directory"]);
    place.run(["run", "m", "--prompt-tokens", "99999"]).refuses(1, &["99999", "512"]);
    place.run(["run", "m", "--prompt", ""]).refuses(1, &["empty"]);
    let tokens = vec!["5"; 3000].join(",");
    place.run(["run", "m", "--prompt-tokens", &tokens]).refuses(1, &["3000 tokens", "2048"]);
    run(&place, &["--tierset", "nope"]).refuses(2, &["unknown tier", "all"]);
    run(&place, &["--mode", "nope"]).refuses(2, &["unknown mode", "balanced"]);
    run(&place, &["--config", "nowhere.toml"]).refuses(1, &["nowhere.toml"]);
    std::fs::write(place.path("c.toml"), "thread = 2\n").unwrap();
    run(&place, &["--config", "c.toml"]).refuses(2, &["c.toml", "thread"]);
    std::fs::write(place.path("c.toml"), "threads = 1\nmemory = \"2GiB\"\n[limits]\nrows_max = 0\n").unwrap();
    run(&place, &["--config", "c.toml"]).refuses(2, &["c.toml", "limits.rows_max"]);
    place.run(["replay", "nowhere"]).refuses(1, &["nowhere"]);
    place.run(["replay", "m"]).refuses(1, &["no journal"]);
    place.run(["inspect", "m/config.json"]).refuses(1, &["no crash report"]);
    place.run(["ctl", "nowhere", "status"]).refuses(1, &["nowhere"]);
    place.run(["ctl", "m", "status"]).refuses(1, &["no running process"]);
    place.run(["synth", "m", "--family", "olmoe"]).refuses(1, &["empty directory"]);
    place.run(["synth", "n", "--family", "olmoe", "--top-k", "99"]).refuses(2, &["top_k"]);
    place.run(["import", "m", "n", "--tiers", "a:1"]).refuses(1, &["16"]);
    place.run(["import", "m", "n", "--tiers", "a"]).refuses(2, &["NAME:EXPERTS"]);
}

/// Made without floats on the way, computed to the same tokens however, journalled and proved; and what is refused.
#[test]
fn integers_are_imported_synthesised_and_run() {
    let place = place();
    let made = place.run([
        "synth",
        "q",
        "--family",
        "olmoe",
        "--quantise",
        "q4",
        "--tiers",
        "core:6,rest:rest:cold",
        "--json",
    ]);
    assert!(made.json()["bytes"].as_u64().unwrap() < 2 << 20, "{}", made.stdout);
    assert_eq!(
        place.run(["import", "m", "n", "--quantise", "q4", "--tiers", "core:6,rest:rest:cold"]).code,
        Some(0)
    );
    let of = |model: &str, more: &[&str]| {
        let arguments = ["run", model, "--ignore-eos", "--max-tokens", "12", "--json"];
        place.run(arguments.iter().chain(&PROMPT).chain(more)).json()["tokens"].clone()
    };
    let tokens = of("q", &["--state", "state", "--request-id", "one"]);
    assert_eq!(tokens.as_array().unwrap().len(), 12);
    for model in ["q", "n"] {
        assert_eq!(
            of(model, &["--isa", "scalar", "--threads", "1", "--prefill-chunk", "3"]),
            tokens,
            "{model}"
        );
    }
    let full = place.run(["replay", "state", "--full", "q"]);
    assert_eq!(full.code, Some(0), "{}", full.stderr);
    assert_eq!(place.run(["import", "m", "f", "--tiers", "core:6,rest:rest:cold"]).code, Some(0));
    place.run(["replay", "state", "--full", "f"]).refuses(1, &["weights"]);
    place.run(["import", "n", "o", "--quantise", "q8"]).refuses(1, &["native checkpoint already"]);
    place.run(["import", "m", "o", "--quantise", "q5"]).refuses(2, &["q8", "q4"]);
    place.run(["synth", "q", "--family", "olmoe", "--quantise", "q8"]).refuses(1, &["it exists already"]);
}

#[test]
fn a_missing_shard_is_named() {
    let place = Place::new();
    let made = place.run(["synth", "m", "--family", "mixtral", "--shard-size", "2MiB", "--json"]).json();
    assert!(made["files"].as_u64().unwrap() > 2);
    let shard = "model-00002-of-";
    let names = std::fs::read_dir(place.path("m")).unwrap().map(|e| e.unwrap().path());
    let path = names.into_iter().find(|p| p.to_str().unwrap().contains(shard)).unwrap();
    std::fs::remove_file(path).unwrap();
    run(&place, &[]).refuses(1, &[shard]);
    assert!(place.private_states().is_empty(), "nothing was begun");
}

#[test]
fn a_state_belongs_to_one_model_and_one_process() {
    let place = place();
    let spec = SynthSpec { seed: 1, ..SynthSpec::of(SynthFamily::Olmoe) };
    synth(&place.path("other"), &spec).unwrap();
    let mut child = long(&place, "2000");
    run(&place, &["--state", "state"]).refuses(1, &["in use"]);
    child.kill().unwrap();
    child.wait().unwrap();
    let other = ["run", "other", "--prompt", "a", "--state", "state"];
    place.run(other).refuses(1, &["identity"]);
    place.run(["replay", "state", "--full", "other"]).refuses(1, &["weights"]);
    assert_eq!(place.run(["replay", "state", "--full", "m"]).code, Some(0));
    run(&place, &["--state", "state", "--kv-type", "bf16"]).refuses(1, &["identity"]);
    run(&place, &["--state", "state", "--routing-seed", "5"]).refuses(1, &["routing_seed"]);
}

#[test]
fn a_damaged_journal_is_found() {
    let place = place();
    assert_eq!(run(&place, &["--state", "state"]).code, Some(0));
    // What comes after it shows that the damaged part had been durable.
    assert_eq!(run(&place, &["--state", "state"]).code, Some(0));
    let state = place.run(["inspect", "state", "--json"]).json();
    let path = place.path("state").join(state["segments"][0]["name"].as_str().unwrap());
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[4096 + 100] ^= 1;
    std::fs::write(&path, bytes).unwrap();
    for arguments in
        [&["replay", "state"][..], &["inspect", "state"], &["run", "m", "--prompt", "a", "--state", "state"]]
    {
        place.run(arguments).refuses(3, &["damaged"]);
    }
}

#[test]
fn signals_drain_and_the_next_life_goes_on() {
    // Slow enough to be interrupted.
    let place = place_of(SynthSpec { layers: 16, ..SynthSpec::of(SynthFamily::Olmoe) });
    let mut child = long(&place, "2000");
    // The second signal leaves the unfinished to the next life at once.
    signal(child.id(), "TERM");
    signal(child.id(), "INT");
    let mut rest = Vec::new();
    std::io::Read::read_to_end(child.stdout.as_mut().unwrap(), &mut rest).unwrap();
    let ran: Ran = child.wait_with_output().unwrap().into();
    ran.refuses(1, &["unfinished request", "--request-id long"]);
    let state = place.run(["inspect", "state", "--json"]).json();
    assert_eq!(state["unfinished"][0]["id"], "long");
    assert_eq!(state["lifecycle"], "Stopped");
    let arguments = ["run", "m", "--max-tokens", "2000", "--ignore-eos", "--json", "--state", "state"];
    let done = place.run(arguments.iter().chain(&PROMPT).chain(&["--request-id", "long"])).json();
    assert_eq!(done["tokens"].as_array().unwrap().len(), 2000);
}

#[test]
fn a_signal_while_the_model_is_opened_is_not_lost() {
    let place = place();
    let arguments =
        ["run", "m", "--max-tokens", "2000", "--ignore-eos", "--state", "state", "--drain-bound", "0s"];
    let mut child = place.command(arguments.iter().chain(&PROMPT)).spawn().unwrap();
    // The lock is taken first of all, but signals are listened for before it.
    wait_until(&mut child, || place.path("state/lock").exists());
    signal(child.id(), "TERM");
    let ran: Ran = child.wait_with_output().unwrap().into();
    ran.refuses(1, &["draining"]);
    assert_eq!(place.run(["inspect", "state", "--json"]).json()["lifecycle"], "Stopped");
}

#[test]
fn a_running_process_is_steered() {
    // More tokens than anybody waits for: the request is unfinished until it is cancelled.
    let place = place_of(SynthSpec { context: 1 << 16, ..SynthSpec::of(SynthFamily::Olmoe) });
    let mut child = long(&place, "60000");
    let ctl = |more: &[&str]| place.run(["ctl", "state"].iter().chain(more));
    let status = ctl(&["status", "--json"]).json();
    assert!(status["reading"].as_str().unwrap().starts_with("experts are "), "{status}");
    assert_eq!((&status["tiers"], &status["requests"][0]["id"]), (&json!(["all"]), &json!("long")));
    assert!(ctl(&["snapshot", "--json"]).json()["snapshot_before"].as_u64().unwrap() > 1);
    ctl(&["tierset", "nope"]).refuses(1, &["unknown tier"]);
    assert_eq!(ctl(&["mode", "max", "--json"]).json()["generation"], 0);
    ctl(&["cancel", "nobody"]).refuses(1, &["no such request"]);
    ctl(&["restart", "0"]).refuses(1, &["one process, not a cluster"]);
    assert_eq!(ctl(&["cancel", "long"]).code, Some(0));
    let mut out = Vec::new();
    std::io::Read::read_to_end(child.stdout.as_mut().unwrap(), &mut out).unwrap();
    let ran: Ran = child.wait_with_output().unwrap().into();
    ran.refuses(1, &["cancelled"]);
    assert!(String::from_utf8(out).unwrap().contains("\"finish_reason\":\"cancelled\""));
    assert!(!place.path("state/control.sock").exists());
    let names = std::fs::read_dir(place.path("state")).unwrap().map(|e| e.unwrap().file_name());
    let snapshot = names.map(|n| n.into_string().unwrap()).find(|n| n.starts_with("snapshot-")).unwrap();
    let snapshot = place.run(["inspect", &format!("state/{snapshot}"), "--json"]).json();
    assert_eq!(snapshot["kind"], "snapshot");
    assert_eq!(place.run(["replay", "state", "--full", "m"]).code, Some(0));
}

#[test]
fn tiers_are_chosen_reported_and_forced() {
    let place = Place::new();
    let spec = ["synth", "m", "--family", "olmoe", "--tiers", "small:8,large:8:cold"];
    assert_eq!(place.run(spec).code, Some(0));
    let plain = run(&place, &["--json"]).json();
    assert_eq!(plain["generations"][0]["tiers"], json!(["small", "large"]));
    let fast = run(&place, &["--json", "--mode", "fast"]).json();
    assert_eq!(fast["generations"][0]["tiers"], json!(["small"]));
    assert_ne!(fast["tokens"], plain["tokens"]);
    let named = run(&place, &["--json", "--tierset", "small"]).json();
    assert_eq!(fast["tokens"], named["tokens"]);
    let map =
        json!([{ "from": 0, "tiers": ["small"] }, { "from": 20, "tiers": ["small", "large"] }]).to_string();
    let forced = run(&place, &["--json", "--generations", &map]).json();
    assert_eq!(forced["generations"][0]["until"], 20);
    assert_eq!(forced["generations"][1]["tiers"], json!(["small", "large"]));
    // What is reported is a map that can be forced again.
    let again = run(&place, &["--json", "--generations", &forced["generations"].to_string()]).json();
    assert_eq!(forced["tokens"], again["tokens"]);
    assert_eq!(forced["generations"], again["generations"]);
}

#[test]
fn requests_end_as_asked() {
    let place = place();
    let whole = run(&place, &["--json"]).json();
    let text = whole["text"].as_str().unwrap();
    // Two characters from the middle that are no broken piece.
    let letters: Vec<char> = text.chars().collect();
    let plain = |pair: &&[char]| pair.iter().all(char::is_ascii_graphic);
    let stop: String = letters.windows(2).skip(2).find(plain).unwrap().iter().collect();
    let stopped = run(&place, &["--json", "--stop", &stop]).json();
    assert_eq!(stopped["finish_reason"], "stop");
    let tokens = stopped["tokens"].as_array().unwrap();
    assert_eq!(whole["tokens"].as_array().unwrap()[..tokens.len()], tokens[..]);
    assert!(stopped["text"].as_str().unwrap().contains(&stop));
    let late =
        ["--json", "--deadline", "0", "--priority", "batch", "--state", "state", "--request-id", "late"];
    let late = run(&place, &late);
    late.refuses(1, &["deadline"]);
    let result: Value = serde_json::from_str(&late.stdout).unwrap();
    assert_eq!(result["finish_reason"], "deadline");
    assert!(place.private_states().is_empty());
}

#[test]
fn a_private_state_is_kept_and_named_after_any_end_but_a_clean_one() {
    let place = place();
    let ran = run(&place, &["--deadline", "0"]);
    ran.refuses(1, &["deadline", "journal is kept"]);
    let [state] = &place.private_states()[..] else { panic!("one state is kept") };
    assert!(ran.stderr.contains(state.to_str().unwrap()), "{}", ran.stderr);
    let mode = std::os::unix::fs::PermissionsExt::mode(&state.metadata().unwrap().permissions());
    assert_eq!(mode & 0o777, 0o700, "prompts are private");
    let state = state.to_str().unwrap();
    assert_eq!(place.run(["replay", state, "--full", "m"]).code, Some(0));
}

#[test]
fn standard_input_and_output_are_pipes() {
    let place = place();
    let mut command = place.command(["run", "m", "--max-tokens", "12", "--ignore-eos", "--json"]);
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(b"kill it anywhere\n").unwrap();
    let piped: Ran = child.wait_with_output().unwrap().into();
    assert_eq!(piped.json()["tokens"], run(&place, &["--json"]).json()["tokens"]);
    let (tokens, result) = parse_stream(&run(&place, &["--json", "--stream"]).stdout);
    assert_eq!(tokens.iter().map(|(offset, _)| *offset).collect::<Vec<_>>(), (0..12).collect::<Vec<_>>());
    let listed: Vec<Value> = tokens.iter().map(|(_, token)| json!(token)).collect();
    assert_eq!(result.unwrap()["tokens"], json!(listed));
    let streamed = run(&place, &["--stream"]).stdout;
    assert_eq!(streamed, run(&place, &[]).stdout);
    // A reader that goes away is no bug of ours.
    let mut child = long(&place, "2000");
    drop(child.stdout.take());
    assert_eq!(child.wait_with_output().unwrap().status.code(), Some(1));
}

#[test]
fn completions_and_demo() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish"] {
        let script = place.run(["completions", shell]);
        assert!(script.code == Some(0) && script.stdout.contains("supervise"), "{shell}");
    }
    let demo = place.run(["demo", "--keep", "kept"]);
    assert_eq!(demo.code, Some(0), "{}{}", demo.stdout, demo.stderr);
    assert!(demo.stdout.ends_with("kept      kept\n"), "{}", demo.stdout);
    assert_eq!(place.run(["replay", "kept/killed", "--full", "kept/model"]).code, Some(0));
    // A supervisor that finds other bits says so: here the journal is replayed against other weights.
    place.run(["demo", "--keep", "kept"]).refuses(1, &["already"]);
}

#[test]
fn a_supervised_run_prints_each_token_once() {
    let place = place();
    let arguments = ["--max-tokens", "600", "--ignore-eos", "--temperature", "1", "--stream"];
    let plain = place.run(["run", "m"].iter().chain(&PROMPT).chain(&arguments));
    assert_eq!(plain.code, Some(0));
    let supervise = ["supervise", "--max-restarts", "20", "--", "run", "m"];
    let more = ["--state", "state"];
    let mut child =
        place.command(supervise.iter().chain(&PROMPT).chain(&arguments).chain(&more)).spawn().unwrap();
    let supervisor = child.id();
    for _ in 0..4 {
        // Wherever the life is: before its lock, while it loads, in a token.
        wait_until(&mut child, || child_of(supervisor).is_some());
        signal(child_of(supervisor).unwrap(), "KILL");
        wait_until(&mut child, || child_of(supervisor).is_none());
    }
    let ran: Ran = child.wait_with_output().unwrap().into();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(ran.stdout, plain.stdout);
    assert!(ran.stderr.contains("crash report: "), "{}", ran.stderr);
    let report = ran.stderr.lines().find_map(|line| line.strip_prefix("crash report: ")).unwrap();
    assert_eq!(place.run(["inspect", report, "--json"]).json()["exit"], json!({ "Signal": 9 }));
}
