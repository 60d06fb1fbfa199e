//! What a model does here, measured: the figures fit each other, whatever the machine is.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_tests::command::Place;
use serde_json::Value;

/// A place with a native mixture of 64 experts in `m`.
fn place() -> Place {
    let place = Place::new();
    let made = place.run([
        "synth",
        "m",
        "--family",
        "olmoe",
        "--layers",
        "4",
        "--hidden",
        "256",
        "--heads",
        "4",
        "--experts",
        "16",
        "--top-k",
        "4",
        "--intermediate",
        "128",
        "--vocab",
        "512",
        "--dtype",
        "bf16",
        "--tiers",
        "all:16",
    ]);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    place
}

fn bench(place: &Place, more: &[&str]) -> Value {
    let ran = place.run([&["bench", "m", "--prompt", "40", "--decode", "48", "--json"], more].concat());
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    ran.json()
}

#[track_caller]
fn number(figures: &Value, name: &str) -> f64 {
    figures[name].as_f64().unwrap_or_else(|| panic!("no number {name} in {figures}"))
}

/// Bytes that the model needs at least, as its refusal says.
fn least(place: &Place) -> u64 {
    let refused = place.run(["bench", "m", "--memory", "1MiB"]);
    refused.refuses(1, &["needs at least"]);
    let (_, rest) = refused.stderr.split_once("needs at least ").unwrap();
    rest.split(':').next().unwrap().parse().unwrap()
}

#[test]
fn figures_fit_each_other_and_the_budget() {
    let place = place();
    let all = bench(&place, &[]);
    for name in ["hit_rate", "belady_hit_rate", "lru_hit_rate", "uniform_hit_rate"] {
        assert_eq!(all[name], 1.0, "{name} where every expert is in memory");
    }
    assert_eq!(all["disk_bytes_per_token"], 0.0);
    // A third of the experts, and pages for all positions.
    let memory = least(&place) + 16 * 196_608 + 8 * 524_288;
    let memory_size = memory.to_string();
    let few = bench(&place, &["--memory", &memory_size, "--foresight", "off", "--report", "page.html"]);
    for figures in [&all, &few] {
        for name in ["prefill_tokens_per_s", "decode_tokens_per_s", "dram_bytes_per_s", "roofline_share"] {
            assert!(number(figures, name) > 0.0, "{name} in {figures}");
        }
        // 4 layers with 4 experts each, and all that is not an expert.
        let least = 16.0 * 196_608.0;
        assert!((least..3.0 * least).contains(&number(figures, "bytes_per_token")), "{figures}");
    }
    let (hits, best) = (number(&few, "hit_rate"), number(&few, "belady_hit_rate"));
    assert!(hits > 0.0 && hits <= best && best < 1.0, "{few}");
    assert!(number(&few, "uniform_hit_rate") < 1.0);
    assert!((number(&few, "disk_bytes_per_token") - (1.0 - hits) * 16.0 * 196_608.0).abs() < 1.0, "{few}");
    assert!(number(&few, "peak_rss_bytes") <= memory as f64 * 1.02, "{few}");
    assert!(number(&few["per_token"], "io_wait_ms") > 0.0);
    assert_eq!(few["tokens_digest"], all["tokens_digest"], "memory changes no token");
    let foresees = bench(&place, &["--memory", &memory_size, "--foresight", "on"]);
    assert_eq!(foresees["tokens_digest"], all["tokens_digest"], "nor does foresight");
    let (ahead, foreseen) =
        (number(&foresees, "loads_ahead_per_token"), number(&foresees, "foreseen_per_token"));
    assert!(0.0 < foreseen && foreseen <= ahead, "{foresees}");
    let read = number(&foresees, "disk_bytes_per_token") / 196_608.0;
    let missed = (1.0 - number(&foresees, "hit_rate")) * 16.0;
    assert!((read - (missed - foreseen + ahead)).abs() < 0.01, "{foresees}");
    let page = std::fs::read_to_string(place.path("page.html")).unwrap();
    // A column of three parts for each step that decodes, but the first token is of the prefill.
    assert_eq!(page.matches("<rect").count(), 3 * 47 + 2 * 5, "{page}");
    assert!(place.private_states().is_empty(), "nothing is left behind");
}

#[test]
fn a_batch_shares_what_it_reads() {
    let place = place();
    let one = bench(&place, &["--threads", "1"]);
    let four = bench(&place, &["--batch", "4", "--threads", "1"]);
    assert!(number(&four, "bytes_per_token") < 0.8 * number(&one, "bytes_per_token"), "{one} {four}");
    assert_ne!(one["tokens_digest"], four["tokens_digest"]);
    assert_eq!(bench(&place, &["--batch", "4"])["tokens_digest"], four["tokens_digest"]);
}

#[test]
fn a_journal_says_how_often_experts_were_there() {
    let place = place();
    let memory = (least(&place) + 16 * 196_608).to_string();
    for memory in [&memory, "1GiB", &memory] {
        let tokens = ["run", "m", "--prompt-tokens", "5,6,7", "--max-tokens", "40", "--temperature", "1"];
        let more = ["--ignore-eos", "--state", "state", "--memory", memory];
        assert_eq!(place.run([&tokens[..], &more].concat()).code, Some(0));
    }
    let state = place.run(["inspect", "state", "--json"]).json();
    let experts = &state["experts"];
    // Two lives needed each expert of each of 42 positions at most once a step; in the other all were there.
    assert!((16.0..=2.0 * 42.0 * 16.0).contains(&number(experts, "needed")), "{experts}");
    let (hits, best) = (number(experts, "hit_rate"), number(experts, "belady_hit_rate"));
    assert!(hits > 0.0 && hits <= best && best < 1.0, "{experts}");
    let all = number(experts, "needed");
    assert!((0.2..0.5).contains(&number(experts, "uniform_hit_rate")), "{experts}");

    // A snapshot has let the boot of this life go, and what was needed before it.
    let more = ["--ignore-eos", "--state", "state", "--memory", &memory, "--snapshot-every", "60"];
    let tokens = ["run", "m", "--prompt-tokens", "5,6,7", "--max-tokens", "40", "--temperature", "1"];
    assert_eq!(place.run([&tokens[..], &more].concat()).code, Some(0));
    let state = place.run(["inspect", "state", "--json"]).json();
    let experts = &state["experts"];
    // Of the step in which that happened nothing counts, and it may have been the last.
    assert!((0.0..all).contains(&number(experts, "needed")), "{experts}");
    assert!(number(experts, "belady_hit_rate") >= number(experts, "hit_rate"), "{experts}");
    let alike = number(experts, "uniform_hit_rate");
    assert!((0.2..0.5).contains(&alike) || number(experts, "needed") == 0.0, "{experts}");
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let place = place();
    place.run(["bench", "m", "--prompt", "9999999"]).refuses(2, &["--prompt 9999999", "context"]);
    place.run(["bench", "m", "--batch", "0"]).refuses(2, &["--batch"]);
    place.run(["bench", "none"]).refuses(1, &["none"]);
    place.run(["bench", "m", "--report", "no/page.html"]).refuses(1, &["no/page.html"]);
}

#[test]
fn the_doctor_says_what_to_expect() {
    let place = place();
    let machine = place.run(["doctor"]);
    assert_eq!(machine.code, Some(0), "{}", machine.stderr);
    for line in ["cores", "kernels", "memory", "reads it", "disk"] {
        assert!(machine.stdout.contains(line), "{line} in {}", machine.stdout);
    }
    let found = place.run(["doctor", "m", "--json"]).json();
    let model = &found["model"];
    assert_eq!((&model["experts"], &model["expert_bytes"]), (&64.into(), &196_608.into()));
    assert_eq!(model["expert_bytes_per_token"], 16 * 196_608);
    let budgets = model["budgets"].as_array().unwrap();
    assert_eq!(budgets.len(), 5);
    for pair in budgets.windows(2) {
        for name in ["memory_bytes", "expert_slots", "hit_rate", "decode_tokens_per_s"] {
            assert!(number(&pair[0], name) > number(&pair[1], name), "{name} in {pair:?}");
        }
    }
    // A run within a budget has as many slots as was said.
    for budget in budgets {
        let memory = budget["memory_bytes"].to_string();
        let figures = bench(&place, &["--memory", &memory, "--cache-positions", "1024"]);
        assert_eq!(figures["expert_slots"], budget["expert_slots"], "{budget}");
    }
    place.run(["doctor", "none"]).refuses(1, &["none"]);
    // With the uses of a text: of this model only.
    assert_eq!(place.run(["trace", "m", "--tokens", "5,6,7,8,5,9", "--out", "trace"]).code, Some(0));
    let with = |trace| place.run(["doctor", "m", "--trace", trace, "--json"]);
    assert!(number(&with("trace").json()["model"]["budgets"][4], "hit_rate") < 1.0);
    let trace = std::fs::read_to_string(place.path("trace")).unwrap();
    let weights = trace.split_once("\"weights\"").unwrap().1.split('"').nth(1).unwrap();
    std::fs::write(place.path("other"), trace.replace(weights, &weights.chars().rev().collect::<String>()))
        .unwrap();
    with("other").refuses(2, &["--trace other", "weights", "trace a text with this model"]);
    place.run(["doctor", "m", "--io", "mmap", "--isa", "scalar"]);
}

/// Expert ranks have slots of their own, and one journal of what all of them need.
#[test]
fn what_ranks_need_is_counted_by_the_slots_of_each() {
    let place = place();
    let run = |memory: &str| {
        let cluster =
            ["supervise", "--nodes", "2", "--topology", "ep=2", "--max-restarts", "0", "--", "run", "m"];
        let tokens = ["--prompt-tokens", "5,6,7", "--max-tokens", "40", "--temperature", "1", "--ignore-eos"];
        place.run([&cluster[..], &tokens, &["--state", "state", "--memory", memory]].concat())
    };
    let refused = run("1MiB");
    let (_, rest) = refused.stderr.split_once("needs at least ").unwrap();
    let least: u64 = rest.split(':').next().unwrap().parse().unwrap();
    assert_eq!(run(&(least + 12 * 196_608).to_string()).code, Some(0));
    let state = place.run(["inspect", "state/node-0", "--json"]).json();
    let experts = &state["experts"];
    let (hits, best) = (number(experts, "hit_rate"), number(experts, "belady_hit_rate"));
    assert!(hits > 0.0 && hits <= best && best < 1.0, "{experts}");
    // Some fourteen slots or more for the 32 experts of a rank.
    assert!((0.4..0.7).contains(&number(experts, "uniform_hit_rate")), "{experts}");
}
