//! The doctor's word held against runs: for each budget that it names, what it says before and what `lite-llm bench` then does.
//!
//! Not a bench of Criterion: it wants a quotient, not a time. It runs the program itself, as a user does.

use lite_llm_benches::{olmoe_native, olmoe_of_integers};
use lite_llm_model::kernels::Quantised;
use lite_llm_tests::command::{Place, Ran};
use serde_json::Value;
use std::path::Path;

/// Tokens of the text whose experts are traced, and of the runs.
const TRACED: &str = "300";
const RUN: &str = "150";

fn main() {
    println!("model  memory     hits said  had     tokens/s said  had     said of had");
    let models = [
        ("bf16", olmoe_native()),
        ("q8", olmoe_of_integers(Quantised::Q8)),
        ("q4", olmoe_of_integers(Quantised::Q4)),
    ];
    for (name, dir) in models {
        let place = Place::new();
        trace(&place, &dir);
        let found = of(&place, &dir, "doctor", &["--trace", "trace", "--json"]).json();
        for budget in found["model"]["budgets"].as_array().expect("budgets") {
            let memory = budget["memory_bytes"].to_string();
            let run = ["--prompt", "8", "--decode", RUN, "--memory", &memory, "--json"];
            let had = of(&place, &dir, "bench", &run).json();
            let number = |from: &Value, name: &str| from[name].as_f64().expect("a number");
            let hits = [budget, &had].map(|from| 100.0 * number(from, "hit_rate"));
            let tokens = [budget, &had].map(|from| number(from, "decode_tokens_per_s"));
            println!(
                "{name:<7}{:<11}{:<11}{:<8}{:<15.1}{:<8.1}{:.2}",
                format!("{:.2} GiB", number(budget, "memory_bytes") / f64::from(1 << 30)),
                format!("{:.0} %", hits[0]),
                format!("{:.0} %", hits[1]),
                tokens[0],
                tokens[1],
                tokens[0] / tokens[1]
            );
        }
    }
}

/// Has the model write a text, and says which experts it uses in a file.
fn trace(place: &Place, dir: &Path) {
    let sampled = ["--max-tokens", TRACED, "--temperature", "1", "--ignore-eos", "--json"];
    let written = of(place, dir, "run", &[&["--prompt-tokens", "5,6,7"], &sampled[..]].concat()).json();
    let tokens: Vec<String> =
        written["tokens"].as_array().expect("tokens").iter().map(Value::to_string).collect();
    let traced = of(place, dir, "trace", &["--tokens", &tokens.join(","), "--out", "trace"]);
    assert_eq!(traced.code, Some(0), "{}", traced.stderr);
}

fn of(place: &Place, dir: &Path, command: &str, arguments: &[&str]) -> Ran {
    place.run([&[command, dir.to_str().expect("a path of UTF-8")], arguments].concat())
}
