//! Journals that are whole but wrong, and checkpoints that rot: what is found, and the exit codes 3 and 4.

use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::input::Input;
use lite_llm_core::journal::{Record, Scanned, Store, scan};
use lite_llm_core::output::Output;
use lite_llm_core::replay::{decode_input, encode_input};
use lite_llm_core::time::Time;
use lite_llm_hw::disk::FileDisk;
use lite_llm_tests::command::Place;
use std::path::Path;

const RUN: [&str; 7] = ["run", "m", "--prompt", "hello", "--ignore-eos", "--max-tokens", "6"];

/// A place with a model in `m`, in two tiers, and the state of a finished run in `state`.
fn place() -> Place {
    let place = Place::new();
    let spec = ["synth", "m", "--family", "olmoe", "--layers", "2", "--tiers", "small:8,large:8:cold"];
    assert_eq!(place.run(spec).code, Some(0));
    let ran = place.run(RUN.iter().chain(&["--state", "state", "--request-id", "one"]));
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    place
}

fn read(state: &Path) -> Scanned {
    scan(&mut FileDisk::open_read_only(state).unwrap()).unwrap()
}

/// Writes a journal of these inputs, with the digests that `digest` makes of the right ones.
fn forge(scanned: &Scanned, into: &Path, inputs: &[(u64, Input)], digest: impl Fn(u64, Digest) -> Digest) {
    let header = scanned.header.unwrap();
    let (mut store, _) = Store::open(FileDisk::open(into).unwrap(), &header).unwrap();
    let mut engine = Engine::new();
    for (seq, (time_ns, input)) in (1..).zip(inputs) {
        store.push(seq, *time_ns, digest(seq, engine.digest()).0, encode_input(input)).unwrap();
        let handled = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            engine.handle(Time(*time_ns), input.clone());
            while !matches!(engine.poll(), Output::Wait { .. }) {}
        }));
        if handled.is_err() {
            break;
        }
    }
    store.flush().unwrap();
}

fn inputs(scanned: &Scanned) -> Vec<(u64, Input)> {
    let input = |record: &Record| (record.time_ns, decode_input(&record.payload).unwrap());
    scanned.records.iter().map(input).collect()
}

#[test]
fn a_journal_of_another_fold_diverges_where_it_differs() {
    let place = place();
    let scanned = read(&place.path("state"));
    let inputs = inputs(&scanned);
    forge(&scanned, &place.path("same"), &inputs, |_, digest| digest);
    assert_eq!(place.run(["replay", "same", "--full", "m"]).code, Some(0));

    let other = |seq, digest| if seq == 20 { Digest([9; 32]) } else { digest };
    forge(&scanned, &place.path("other"), &inputs, other);
    let wrong = "09".repeat(32);
    let found = place.run(["replay", "other"]);
    found.refuses(3, &["record 19", "before record 20", &wrong]);
    assert!(!found.stderr.contains("a bug of lite-llm"), "{}", found.stderr);
    // Nothing is known of the other state but its digest: what the record changes here is shown, field by field.
    assert!(found.stderr.contains("state difference"), "{}", found.stderr);
    let json: serde_json::Value =
        serde_json::from_str(&place.run(["replay", "other", "--json"]).stdout).unwrap();
    assert_eq!((&json["verified"], &json["record"]), (&false.into(), &19.into()));
    let difference: Vec<&str> =
        json["difference"].as_array().unwrap().iter().map(|line| line.as_str().unwrap()).collect();
    assert!(!difference.is_empty() && difference.iter().all(|line| line.starts_with(['-', '+'])));
    assert_eq!(place.run(["replay", "other", "--until", "19"]).code, Some(0));
    place.run(["inspect", "other"]).refuses(3, &["record 20"]);
    let shown = place.run(["debug", "other", "--print"]);
    assert_eq!(shown.code, Some(0), "{}", shown.stderr);
    assert!(shown.stdout.starts_with("record  19 "), "it opens up to there: {}", shown.stdout);
    assert!(
        shown.stdout.contains("the tape ends at 19: replay diverges before record 20"),
        "{}",
        shown.stdout
    );
    place.run(RUN.iter().chain(&["--state", "other"])).refuses(3, &["record 20"]);
}

#[test]
fn bits_that_were_never_computed_are_found_by_a_full_replay() {
    let place = place();
    let scanned = read(&place.path("state"));
    let mut inputs = inputs(&scanned);
    let is_result = |(_, input): &(u64, Input)| matches!(input, Input::Finished { .. });
    let at = inputs.iter().position(is_result).unwrap();
    let Input::Finished { rows, .. } = &mut inputs[at].1 else { unreachable!("it was just found") };
    rows[0].digest.0[0] ^= 1;
    forge(&scanned, &place.path("forged"), &inputs, |_, digest| digest);
    // The fold cannot know what the device should have computed.
    assert_eq!(place.run(["replay", "forged"]).code, Some(0));
    let record = format!("record {}", at + 1);
    let same = "state difference, after the journal's results (-) and after those found here (+): none";
    place.run(["replay", "forged", "--full", "m"]).refuses(3, &[&record, "other bits", same]);

    // Another token is another state.
    let token = |(_, input): &mut (u64, Input)| match input {
        Input::Finished { rows, .. } => rows.last_mut().and_then(|row| row.token.as_mut()).map(|t| *t ^= 1),
        _ => None,
    };
    let mut inputs = self::inputs(&scanned);
    let at = inputs.iter_mut().position(|input| token(input).is_some()).unwrap();
    forge(&scanned, &place.path("token"), &inputs, |_, digest| digest);
    let record = format!("record {}", at + 1);
    let parts = [&record, "requests > ", "\n  - ", "\n  + "];
    place.run(["replay", "token", "--full", "m"]).refuses(3, &parts);
}

#[test]
fn a_panic_is_reported_as_the_bug_that_it_is() {
    let place = place();
    let scanned = read(&place.path("state"));
    let mut inputs = inputs(&scanned);
    // No driver answers what nobody asked: the fold panics on it.
    let time = inputs.last().unwrap().0;
    inputs.push((time, Input::BaseLoaded { shard: 7 }));
    forge(&scanned, &place.path("bug"), &inputs, |_, digest| digest);
    for arguments in [&["replay", "bug"][..], &[&RUN[..], &["--state", "bug"]].concat()] {
        let ran = place.run(arguments);
        assert_eq!(ran.code, Some(4), "{}", ran.stderr);
        assert!(ran.stderr.contains("bug"), "{}", ran.stderr);
    }
    let supervised = place.run(["supervise", "--"].iter().chain(&RUN).chain(&["--state", "bug"]));
    assert_ne!(supervised.code, Some(0));
    let record = format!("record {}", inputs.len());
    assert!(supervised.stderr.contains(&record), "{record} is not in: {}", supervised.stderr);
    assert_eq!(supervised.stderr.matches("crash report: ").count(), 2, "{}", supervised.stderr);
    // The debugger goes up to the bug; a report takes it to where it was written.
    let last = inputs.len() - 1;
    let report = std::fs::read_dir(place.path("bug")).unwrap().map(|entry| entry.unwrap().path());
    let report = report.filter(|path| path.extension().is_some_and(|end| end == "json")).min().unwrap();
    for path in [place.path("bug"), report] {
        let shown = place.run(["debug", path.to_str().unwrap(), "--print", "--at", &last.to_string()]);
        assert!(shown.stdout.starts_with(&format!("record  {last} ")), "{}", shown.stdout);
        assert!(shown.stdout.contains(&format!("the engine panics at {record}")), "{}", shown.stdout);
    }
}

#[test]
fn a_debugger_prints_what_a_record_made_of_the_state() {
    let place = place();
    let records = place.run(["inspect", "state", "--records", "--json"]).json()["records"].clone();
    let records = records.as_array().unwrap();
    let finished = |record: &&serde_json::Value| record["input"].as_str().unwrap().starts_with("Finished");
    let record = records.iter().find(finished).unwrap();
    let (seq, digest) = (record["seq"].to_string(), record["digest"].as_str().unwrap());
    let shown = place.run(["debug", "state", "--at", &seq, "--print"]).stdout;
    for part in [&format!("record  {seq} at"), digest, "output  Token", "\nstate\n", "\n+ ", "\n- "] {
        assert!(shown.contains(part), "{part:?} is not in: {shown}");
    }
    let beginning = place.run(["debug", "state", "--at", "0", "--print"]).stdout;
    assert!(beginning.starts_with("the beginning"), "{beginning}");
    let both = place.run(["debug", "state", "state", "--print"]).stdout;
    assert_eq!(both.lines().filter(|line| *line == "state").count(), 4, "a name and a state each");

    place
        .run(["debug", "state", "--at", "100000", "--print"])
        .refuses(1, &["there is no record 100000", "it has 1 to"]);
    place.run(["debug", "m", "--print"]).refuses(1, &["holds no journal"]);
    place.run(["debug", "state"]).refuses(1, &["no terminal", "--print"]);
    place.run([&["debug"][..], &["state"; 9]].concat()).refuses(2, &["9 journals", "up to 8"]);
}

#[test]
fn rotten_checkpoints_are_corruption() {
    let place = place();
    for (name, at) in
        [("base.bin", 10), ("experts-00000.bin", 10), ("tokenizer.json", 10), ("manifest.json", 400)]
    {
        let path = place.path("m").join(name);
        let whole = std::fs::read(&path).unwrap();
        let mut bytes = whole.clone();
        bytes[at] =
            if bytes[at].is_ascii_digit() { b'0' + (bytes[at] - b'0' + 1) % 10 } else { bytes[at] ^ 1 };
        std::fs::write(&path, &bytes).unwrap();
        let ran = place.run(RUN);
        let known = if name == "manifest.json" {
            ran.code == Some(1) || ran.code == Some(3)
        } else {
            ran.code == Some(3)
        };
        assert!(known && ran.stderr.contains(name), "{name}: {:?} {}", ran.code, ran.stderr);
        std::fs::write(&path, whole).unwrap();
    }
    // An expert of the cold tier is read when it is chosen: the request that chose it fails, with the reason.
    let path = place.path("m/experts-00001.bin");
    let mut bytes = std::fs::read(&path).unwrap();
    let half = bytes.len() / 2;
    for at in (half..bytes.len()).step_by(512) {
        bytes[at] ^= 1;
    }
    std::fs::write(&path, bytes).unwrap();
    place.run(RUN).refuses(3, &["experts-00001.bin", "damaged"]);
    assert_eq!(place.run(RUN.iter().chain(&["--tierset", "small"])).code, Some(0));
}
