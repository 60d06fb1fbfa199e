//! Many requests at once: each has its one result, whatever happens.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_model::synth::{SynthFamily, SynthSpec, synth};
use lite_llm_tests::command::{Place, Ran, child_of, signal, try_signal, wait_until};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::process::{Child, ChildStdout};

/// A place with a small mixture in `m`.
fn place() -> Place {
    let place = Place::new();
    synth(&place.path("m"), &SynthSpec::of(SynthFamily::Olmoe)).unwrap();
    place
}

fn write(place: &Place, name: &str, lines: impl IntoIterator<Item = Value>) {
    let text: String = lines.into_iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(place.path(name), text).unwrap();
}

/// So many requests, in `in.jsonl`.
fn write_batch(place: &Place, count: u32, tokens: u32) {
    let of = |i| json!({ "id": format!("r{i}"), "prompt_tokens": [i + 3, 9], "max_tokens": tokens });
    write(place, "in.jsonl", (0..count).map(of));
}

const BATCH: [&str; 5] = ["run", "m", "--batch", "in.jsonl", "--ignore-eos"];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&BATCH, more].concat()
}

/// Results by id; none is there twice.
fn results(text: &str) -> BTreeMap<String, Value> {
    let mut all = BTreeMap::new();
    for line in text.lines() {
        let value: Value = serde_json::from_str(line).unwrap();
        let before = all.insert(value["id"].as_str().unwrap().to_owned(), value);
        assert!(before.is_none(), "{line} is there twice");
    }
    all
}

#[track_caller]
fn ran(ran: &Ran) -> BTreeMap<String, Value> {
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    results(&ran.stdout)
}

/// The results of an undisturbed run.
fn plain(place: &Place) -> BTreeMap<String, Value> {
    ran(&place.run(BATCH))
}

fn first_line(child: &mut Child) -> (String, BufReader<ChildStdout>) {
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    out.read_line(&mut line).unwrap();
    (line, out)
}

#[test]
fn batches_resume() {
    let place = place();
    let lines = [
        json!({ "id": "a", "prompt": "one", "max_tokens": 5 }),
        json!({ "id": "b", "prompt_tokens": [7, 8, 9], "max_tokens": 7, "temperature": 1.0, "seed": 4 }),
        json!({ "prompt": "three", "max_tokens": 3 }),
    ];
    let text: String = lines.iter().map(|line| format!("{line}\n")).collect();
    std::fs::write(place.path("in.jsonl"), text).unwrap();
    let arguments =
        ["run", "m", "--batch", "in.jsonl", "--ignore-eos", "--state", "state", "--out", "out.jsonl"];
    let read = || -> Vec<Value> {
        let text = std::fs::read_to_string(place.path("out.jsonl")).unwrap();
        let mut all: Vec<Value> = text.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
        all.sort_by_key(|value| value["id"].as_str().unwrap().to_owned());
        all
    };
    assert_eq!(place.run(arguments).code, Some(0));
    let whole = read();
    let shape: Vec<(&str, usize)> =
        whole.iter().map(|v| (v["id"].as_str().unwrap(), v["tokens"].as_array().unwrap().len())).collect();
    assert_eq!(shape, [("a", 5), ("b", 7), ("line-3", 3)]);
    let alone =
        ["run", "m", "--prompt-tokens", "7,8,9", "--max-tokens", "7", "--temperature", "1", "--seed", "4"];
    let alone = place.run(alone.iter().chain(&["--ignore-eos", "--json"])).json();
    assert_eq!(alone["tokens"], whole[1]["tokens"], "neighbours change nothing");
    // A crash may tear the last line; what is whole is not done again.
    let text = std::fs::read_to_string(place.path("out.jsonl")).unwrap();
    std::fs::write(place.path("out.jsonl"), &text[..text.len() - 9]).unwrap();
    assert_eq!(place.run(arguments).code, Some(0));
    assert_eq!(read(), whole);
    place.run(["run", "m", "--batch", "in.jsonl", "--out", "out.jsonl"]).refuses(2, &["--state"]);
}

#[test]
fn a_supervised_batch_is_done_once() {
    let place = place();
    write_batch(&place, 24, 90);
    // The journal keeps no more than three streams that have ended; a crash loses the result of none.
    std::fs::write(place.path("c.toml"), "[limits]\nfinished_max = 3\n").unwrap();
    let plain = plain(&place);
    assert_eq!(plain.len(), 24);
    let supervise = ["supervise", "--max-restarts", "50", "--"];
    let more = ["--config", "c.toml", "--state", "state"];
    let mut child = place.command(supervise.iter().chain(&with(&more))).spawn().unwrap();
    let (mut text, mut out) = first_line(&mut child);
    for kill in 1..8 {
        // Each result says that others are under way, and that the one before it may be forgotten.
        if let Some(life) = child_of(child.id()) {
            try_signal(life, "KILL");
        }
        for _ in 0..kill % 3 {
            out.read_line(&mut text).unwrap();
        }
    }
    out.read_to_string(&mut text).unwrap();
    let ended: Ran = child.wait_with_output().unwrap().into();
    assert_eq!(ran(&Ran { stdout: text, ..ended }), plain);
}

#[test]
fn results_that_were_printed_are_printed_again() {
    let place = place();
    write_batch(&place, 5, 4);
    let first = ran(&place.run(with(&["--state", "state"])));
    let again = place.run(with(&["--state", "state"]));
    assert_eq!(ran(&again), first);
    assert!(!again.stderr.contains("memory at most"), "no model was loaded: {}", again.stderr);
    // Another request of the same name is another request.
    write_batch(&place, 5, 6);
    let other = place.run(with(&["--state", "state"]));
    assert_eq!(other.code, Some(1));
    let all = results(&other.stdout);
    assert!(all.values().all(|line| line["error"].as_str().unwrap().contains("another body")), "{all:?}");
    other.refuses(1, &["5 requests of the batch failed"]);
}

#[test]
fn a_stream_that_is_no_longer_kept_is_computed_again() {
    let place = place();
    write_batch(&place, 6, 4);
    std::fs::write(place.path("c.toml"), "[limits]\nfinished_max = 1\n").unwrap();
    let run = with(&["--config", "c.toml", "--state", "state", "--out", "out.jsonl"]);
    let read = || results(&std::fs::read_to_string(place.path("out.jsonl")).unwrap());
    assert_eq!(place.run(&run).code, Some(0));
    let first = read();
    for _ in 0..2 {
        std::fs::remove_file(place.path("out.jsonl")).unwrap();
        let again = place.run(&run);
        assert_eq!(again.code, Some(0), "{}", again.stderr);
        assert_eq!(read(), first);
    }
}

#[test]
fn a_batch_waits_for_a_request_that_is_not_of_it() {
    let place = place();
    write_batch(&place, 4, 4);
    let plain = plain(&place);
    std::fs::write(place.path("c.toml"), "[limits]\nrequests_max = 1\n").unwrap();
    let state = ["--config", "c.toml", "--state", "state"];
    let other =
        ["run", "m", "--prompt-tokens", "5", "--max-tokens", "400", "--ignore-eos", "--stream", "--json"];
    let other = other.iter().chain(&state).chain(&["--request-id", "other"]);
    let mut child = place.command(other).spawn().unwrap();
    first_line(&mut child);
    signal(child.id(), "KILL");
    child.wait().unwrap();
    assert_eq!(ran(&place.run(with(&state))), plain);
}

#[test]
fn a_drained_batch_has_no_result_for_what_was_not_done() {
    let place = place();
    write_batch(&place, 100, 60);
    let plain = plain(&place);
    let run = with(&["--state", "state", "--out", "out.jsonl", "--drain-bound", "0"]);
    let mut child = place.command(&run).spawn().unwrap();
    let text = || std::fs::read_to_string(place.path("out.jsonl")).unwrap_or_default();
    wait_until(&mut child, || !text().is_empty());
    signal(child.id(), "TERM");
    let drained: Ran = child.wait_with_output().unwrap().into();
    drained.refuses(1, &["drained with", "--state state goes on"]);
    let some = results(&text());
    assert!(some.len() < plain.len() && some.iter().all(|(id, line)| plain[id] == *line), "{some:?}");
    assert_eq!(place.run(&run).code, Some(0));
    assert_eq!(results(&text()), plain);
}

#[test]
fn each_line_is_checked_before_a_model_is_loaded() {
    let place = place();
    let good = json!({ "id": "a", "prompt_tokens": [5], "max_tokens": 1 });
    for (line, parts) in [
        (json!({ "id": "a", "promt": "x" }), &["promt"][..]),
        (json!({ "id": "b" }), &["give one of prompt, prompt_tokens and chat"]),
        (json!({ "id": "a", "prompt_tokens": [5] }), &["the id a is there twice"]),
        (json!({ "prompt_tokens": [] }), &["the prompt is empty"]),
        (json!({ "chat": [] }), &["chat has no message"]),
        (json!({ "prompt_tokens": [512] }), &["token 512", "512"]),
        (json!({ "prompt_tokens": vec![5; 3000] }), &["3000 tokens", "2048"]),
        (json!({ "prompt_tokens": [5], "max_tokens": 0 }), &["max_tokens is 0"]),
        (json!({ "prompt_tokens": [5], "temperature": -1.0 }), &["temperature is -1"]),
        (json!({ "prompt_tokens": [5], "stop": [""] }), &["stop"]),
    ] {
        write(&place, "in.jsonl", [good.clone(), line]);
        let refused = place.run(BATCH);
        refused.refuses(1, &["in.jsonl, line 2"]);
        refused.refuses(1, parts);
        assert!(refused.stdout.is_empty() && place.private_states().is_empty());
    }
    std::fs::write(place.path("in.jsonl"), [good.to_string().as_bytes(), b"\n{\"id\": \"\xff\"}\n"].concat())
        .unwrap();
    place.run(BATCH).refuses(1, &["in.jsonl, line 2"]);
    write(&place, "in.jsonl", [good]);
    place.run(with(&["--out", "/dev/null"])).refuses(1, &["/dev/null", "no file"]);
    std::fs::write(place.path("out.jsonl"), "{}\n").unwrap();
    place.run(with(&["--out", "out.jsonl", "--state", "s"])).refuses(1, &["no results: name another file"]);
}

#[test]
fn what_is_no_torn_result_is_never_cut_off() {
    let place = place();
    write_batch(&place, 1, 2);
    let run = with(&["--out", "out.jsonl", "--state", "s"]);
    // The last is a request, the very file that was given as the batch.
    for text in ["a text of somebody", "{\"other\":1}", "{\"other\":", "{\"id\":\"r0\",\"prompt\":\"x\"}"] {
        std::fs::write(place.path("out.jsonl"), text).unwrap();
        for args in [&run[..], &run[..7]] {
            place.run(args).refuses(1, &["out.jsonl", "no results: name another file"]);
            assert_eq!(std::fs::read_to_string(place.path("out.jsonl")).unwrap(), text);
        }
    }
    let all = plain(&place);
    for torn in ["", "{\"i", "{\"id\":\"r0\",\"tok", "{\"id\":\"r0\",\"tok\0\0\0"] {
        std::fs::write(place.path("out.jsonl"), torn).unwrap();
        assert_eq!(place.run(&run).code, Some(0), "{torn:?}");
        assert_eq!(results(&std::fs::read_to_string(place.path("out.jsonl")).unwrap()), all);
    }
    let held = std::fs::File::open(place.path("out.jsonl")).unwrap();
    held.lock().unwrap();
    place.run(&run).refuses(1, &["out.jsonl", "another process is writing"]);
}
