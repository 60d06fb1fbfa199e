//! `lite-llm sim` as a person uses it.

use lite_llm_tests::command::Place;

#[test]
fn seeds_are_run_and_the_same_seeds_give_the_same_digest() {
    let place = Place::new();
    let run = || {
        let ran = place.run(["sim", "--seeds", "4", "--from", "10", "--json"]);
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let object: serde_json::Value = serde_json::from_str(&ran.stdout).expect("one object");
        assert_eq!(object["runs"], 4);
        object["digest"].clone()
    };
    assert_eq!(run(), run());
}

#[test]
fn the_last_seeds_are_run_and_none_beyond_them() {
    let place = Place::new();
    let last = (u64::MAX - 2).to_string();
    let ran =
        place.run(["sim", "--seeds", "2", "--from", &last, "--topology", "dp=1", "--nodes", "1", "--json"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let object: serde_json::Value = serde_json::from_str(&ran.stdout).expect("one object");
    assert_eq!(object["runs"], 2);
    place.run(["sim", "--seeds", "3", "--from", &last]).refuses(2, &["no 3 seeds", &last]);
    place.run(["sim", "--seeds", "0"]).refuses(2, &["--seeds", "0 is not in 1.."]);
}

#[test]
fn a_run_is_logged_drawn_and_replayed() {
    let place = Place::new();
    let digest = |ran: lite_llm_tests::command::Ran| {
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let object: serde_json::Value = serde_json::from_str(&ran.stdout).expect("one object");
        object["digest"].clone()
    };
    let files = ["--log", "run.log", "--timeline", "run.html", "--trace", "run.json"];
    let seeded = digest(place.run(["sim", "--seed", "3", "--json"].iter().chain(&files)));
    assert_eq!(digest(place.run(["sim", "--replay", "run.log", "--json"])), seeded);
    let page = std::fs::read_to_string(place.path("run.html")).expect("it was written");
    assert!(page.starts_with("<!doctype html>") && page.contains("supervisor"));
    let trace = std::fs::read_to_string(place.path("run.json")).expect("it was written");
    assert!(serde_json::from_str::<serde_json::Value>(&trace).is_ok());
    for (damage, parts) in [
        ("nonsense", &["run.log", "no decision log"][..]),
        ("lite-llm decisions 9\n", &["run.log", "version 9", "run its seed again"]),
        ("lite-llm decisions 1\nseed 3\nend 0\n", &["run.log", "topology is missing"]),
    ] {
        std::fs::write(place.path("run.log"), damage).expect("a place to write");
        let ran = place.run(["sim", "--replay", "run.log"]);
        assert_ne!(ran.code, Some(0));
        for part in parts {
            assert!(ran.stderr.contains(part), "{part}: {}", ran.stderr);
        }
    }
}

#[test]
fn a_run_is_stepped_through_in_the_debugger() {
    let place = Place::new();
    place.run(["sim", "--seed", "10", "--faults", "none", "--log", "run.log"]);
    let ran = place.run(["debug", "run.log", "--at", "60", "--print"]);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert!(ran.stderr.contains("nothing is wrong with this run"), "{}", ran.stderr);
    let of = |node: &str| {
        let from = ran.stdout.find(node).unwrap_or_else(|| panic!("{node} is not in {}", ran.stdout));
        let text = &ran.stdout[from + node.len()..];
        text[..text.find("\nnode ").unwrap_or(text.len())].to_owned()
    };
    // Ranks of a replica fold one log.
    assert!(of("node 0").contains("record  60 at ") && of("node 0").contains("lifecycle"));
    assert_eq!(of("node 0").lines().nth(2), of("node 1").lines().nth(2), "the digest before it");
    assert_eq!(place.run(["debug", "run.log", "--at", "60", "--print"]).stdout, ran.stdout);
    std::fs::write(place.path("run.log"), "lite-llm decisions 9\n").expect("a place to write");
    let refused = place.run(["debug", "run.log", "--print"]);
    assert!(refused.stderr.contains("version 9"), "{}", refused.stderr);
}

#[test]
fn what_cannot_be_simulated_is_refused_with_the_remedy() {
    let place = Place::new();
    for (args, parts) in [
        (&["--faults", "gremlins"][..], &["no fault \"gremlins\"", "--list-faults"][..]),
        (&["--topology", "dp=two"], &["dp=two", "write it as dp=2"]),
        (&["--topology", "pp=9"], &["pipeline is 9", "4 layers"]),
        (&["--topology", "pp=2,ep=2", "--nodes", "3"], &["nodes is 3", "needs 4"]),
        (&["--timeline", "run.html"], &["--seed"]),
        (&["--plant", "skip-sync"], &["--features plant"]),
    ] {
        place.run(["sim"].iter().chain(args)).refuses(2, parts);
    }
    let ran = place.run(["sim", "--list-faults"]);
    assert_eq!(ran.stdout.lines().count(), lite_llm_sim::hazard::Hazard::ALL.len());
}
