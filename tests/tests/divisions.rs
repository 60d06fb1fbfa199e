//! Experts divided into tiers by list and by use, traces, and the perplexity of TierSets, through the command.

use lite_llm_model::Checkpoint;
use lite_llm_model::checkpoint::import::import;
use lite_llm_model::checkpoint::tiers::{parse_tiers, read_tiers};
use lite_llm_model::tokenizer::Tokenizer;
use lite_llm_model::trace::{LayerUse, Trace};
use lite_llm_tests::command::{Place, Ran};
use lite_llm_tests::harness::{PLAIN, folder, open, run};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::collections::BTreeSet;
use std::path::Path;

const PROMPT: [u32; 9] = [265, 338, 449, 471, 56, 294, 193, 318, 99];

fn oracle(family: &str) -> Value {
    serde_json::from_slice(&std::fs::read(folder(family).join("oracle.json")).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

fn joined(tokens: &[u32]) -> String {
    tokens.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

fn trace(place: &Place, model: &Path, tokens: &[u32], more: &[&str]) -> Trace {
    let tokens = joined(tokens);
    let arguments = ["trace", model.to_str().unwrap(), "--tokens", &tokens, "--out", "trace"];
    let ran = place.run(arguments.iter().chain(more));
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    Trace::read(&place.path("trace")).unwrap()
}

/// The import has these experts in its first tier, and with all tiers the bits of its source.
#[track_caller]
fn check(native: &Path, first: &[(u32, &[u32])]) {
    let reference = run(&open(&folder("olmoe"), PLAIN), &[0], &PROMPT, 6, PLAIN);
    let model = open(native, PLAIN);
    assert_eq!(run(&model, &[0, 1], &PROMPT, 6, PLAIN), reference);
    let checkpoint = Checkpoint::open(native).unwrap();
    for layer in 0..3 {
        for ordinal in 0..8 {
            assert_eq!(checkpoint.ordinal(checkpoint.key(layer, ordinal)), Some(ordinal));
        }
    }
    for (tier, inside) in [(0, true), (1, false)] {
        let seen = run(&model, &[tier], &PROMPT, 6, PLAIN);
        assert_ne!(seen, reference);
        for ((layer, _), (experts, _)) in &seen.routes {
            let (_, list) = first.iter().find(|(of, _)| of == layer).unwrap();
            assert!(
                experts.iter().all(|expert| list.contains(expert) == inside),
                "layer {layer}: {experts:?}"
            );
        }
    }
}

#[test]
fn experts_are_divided_by_list() {
    let dir = tempfile::tempdir().unwrap();
    let same: &[u32] = &[1, 4, 5, 6];
    for (i, spec) in ["core:@1+4-6,others:@0+2-3+7:cold", "core:@6+5+4+1,others:rest", "core:@1+4-6,others:4"]
        .into_iter()
        .enumerate()
    {
        let native = dir.path().join(i.to_string());
        import(&folder("olmoe"), &native, Some(&parse_tiers(spec).unwrap()), 1, |_, _| {}).unwrap();
        check(&native, &[(0, same), (1, same), (2, same)]);
    }
    let list = dir.path().join("tiers.json");
    let layers = json!({ "0": [7, 0], "1": [3, 2], "2": [0, 1] });
    let tiers = json!([{ "name": "core", "layers": layers }, { "name": "others", "placement": "cold" }]);
    std::fs::write(&list, tiers.to_string()).unwrap();
    let native = dir.path().join("by layer");
    import(&folder("olmoe"), &native, Some(&read_tiers(&list).unwrap()), 1, |_, _| {}).unwrap();
    check(&native, &[(0, &[0, 7]), (1, &[2, 3]), (2, &[0, 1])]);
    // In their original order they need no list, and the manifest has none.
    let native = dir.path().join("plain");
    import(&folder("olmoe"), &native, Some(&parse_tiers("a:@0-2,b:rest").unwrap()), 1, |_, _| {}).unwrap();
    let manifest: Value =
        serde_json::from_slice(&std::fs::read(native.join("manifest.json")).unwrap()).unwrap();
    assert_eq!(manifest["experts"][0].get("tiers"), None);
    // What a tier holds decides what a TierSet computes: it is part of the identity.
    let digest = |name: &str| {
        let checkpoint = Checkpoint::open(&dir.path().join(name)).unwrap();
        checkpoint.architecture_digest(lite_llm_model::kernels::DType::F32)
    };
    let digests = BTreeSet::from(["0", "1", "2", "by layer", "plain"].map(|name| digest(name).to_string()));
    assert_eq!(digests.len(), 3);
}

#[test]
fn a_division_that_does_not_fit_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = folder("olmoe");
    let refused = |spec: &str| {
        let division = parse_tiers(spec).unwrap();
        import(&source, &dir.path().join("x"), Some(&division), 1, |_, _| {}).unwrap_err().to_string()
    };
    for (spec, words) in [
        ("a:@0-8", "the tiers have 9 experts, the checkpoint 8 a layer"),
        ("a:@0-6+8", "lists expert 8 of layer 0; the layer has experts 0 to 7"),
        ("a:@0-4,b:@4-6", "expert 4 of layer 0 is listed for tier a and for tier b"),
        ("a:@0+0,b:rest", "expert 0 of layer 0 is listed for tier a and for tier a"),
        ("a:@0-3,b:2", "the tiers have 6 experts"),
        ("a:8,b:rest", "tier b has no experts"),
        ("a:9,b:rest", "tier a asks for 9 experts, and layer 0 has 8 left"),
    ] {
        let error = refused(spec);
        assert!(error.contains(words), "{spec}: {error}");
    }
    for spec in ["a:@", "a:@1-", "a:@3-1", "a:@1,2", "a:@x", "a:@0-4294967295", "a:rest,b:rest", "a:@1x2"] {
        assert!(parse_tiers(spec).is_err(), "{spec}");
    }
    let list = dir.path().join("tiers.json");
    let of_file = |tiers: Value| {
        std::fs::write(&list, tiers.to_string()).unwrap();
        let division = match read_tiers(&list) {
            Ok(division) => division,
            Err(error) => return error,
        };
        import(&source, &dir.path().join("x"), Some(&division), 1, |_, _| {}).unwrap_err().to_string()
    };
    for (tiers, words) in [
        (json!({}), "no list of tiers"),
        (json!([]), "there are no tiers"),
        (json!([{ "name": "a", "placement": "moon" }]), "\"moon\" is none of hot"),
        (json!([{ "name": "a", "experts": [], "layers": {} }]), "give one of them"),
        (json!([{ "name": "a", "layers": { "0": [0] } }, { "name": "b" }]), "lists nothing for layer 1"),
        (
            json!([{ "name": "a", "layers": { "0": [0], "1": [0, 1], "2": [0] } }, { "name": "b" }]),
            "1 experts in layer 0 and 2 in layer 1",
        ),
        (
            json!([{ "name": "a", "layers": { "0": [0], "1": [0], "2": [0] } }]),
            "in layer 0, 7 of 8 experts are in no tier (expert 1, 2, 3, 4, 5, 6, 7)",
        ),
    ] {
        let error = of_file(tiers);
        assert!(error.contains(words), "{error}");
    }
}

#[test]
fn a_trace_counts_what_the_oracle_routes_and_divides_by_use() {
    let place = Place::new();
    let (family, source) = (oracle("olmoe"), folder("olmoe"));
    let prompt = numbers(&family["prompts"][2]);
    let whole = trace(&place, &source, &prompt, &[]);
    assert_eq!((whole.tokens, whole.experts, whole.layers.len()), (33, 8, 3));
    for of_layer in &whole.layers {
        let routes = &family["router"][2][of_layer.layer.to_string()];
        let (mut counts, mut weights) = (vec![0u64; 8], vec![0.0; 8]);
        for (ids, of) in routes["ids"].as_array().unwrap().iter().zip(routes["weights"].as_array().unwrap()) {
            for (id, weight) in numbers(ids).into_iter().zip(of.as_array().unwrap()) {
                counts[id as usize] += 1;
                weights[id as usize] += weight.as_f64().unwrap();
            }
        }
        assert_eq!(of_layer.counts, counts);
        assert!(of_layer.weights.iter().zip(weights).all(|(found, of)| (found - of).abs() < 1e-3));
    }
    // Windows cut what sees each other, and every position counts once, however it is computed.
    let cut = trace(&place, &source, &prompt, &["--window", "8", "--threads", "1", "--isa", "scalar"]);
    assert_eq!((cut.tokens, cut.window), (33, 8));
    assert!(cut.layers.iter().all(|of| of.counts.iter().sum::<u64>() == 66));
    let again = trace(&place, &source, &prompt, &["--window", "8", "--prefill-chunk", "3", "--threads", "2"]);
    assert_eq!(again, cut);

    // An import has the weights of its source: its trace is the same.
    let whole = trace(&place, &source, &prompt, &[]);
    let spec = ["--tiers", "core:3,others:rest:cold", "--by-use", "trace"];
    let arguments = ["import", source.to_str().unwrap(), "native"];
    assert_eq!(place.run(arguments.iter().chain(&spec)).code, Some(0));
    assert_eq!(trace(&place, &place.path("native"), &prompt, &[]), whole);
    let most: Vec<(u32, Vec<u32>)> = whole.layers.iter().map(|of| (of.layer, most_used(of, 3))).collect();
    let most: Vec<(u32, &[u32])> = most.iter().map(|(layer, list)| (*layer, list.as_slice())).collect();
    check(&place.path("native"), &most);
    assert!(most.iter().any(|(_, list)| **list != [0, 1, 2]), "{most:?}");
}

/// The first by count, then by weight.
fn most_used(of: &LayerUse, count: usize) -> Vec<u32> {
    let mut experts: Vec<(u64, f64, u32)> = (0u32..8)
        .zip(&of.counts)
        .zip(&of.weights)
        .map(|((expert, &count), &weight)| (count, weight, expert))
        .collect();
    experts.sort_by(|a, b| b.partial_cmp(a).unwrap());
    experts.truncate(count);
    experts.into_iter().map(|(_, _, expert)| expert).collect()
}

#[test]
fn a_trace_of_another_model_is_refused() {
    let place = Place::new();
    let good = trace(&place, &folder("mixtral"), &PROMPT, &[]);
    let by_use = |place: &Place, text: &str| -> Ran {
        std::fs::write(place.path("trace"), text).unwrap();
        let source = folder("olmoe");
        place.run(["import", source.to_str().unwrap(), "x", "--tiers", "a:3,b:5", "--by-use", "trace"])
    };
    by_use(&place, &serde_json::to_string(&good).unwrap())
        .refuses(1, &["trace is of a model with weights", "trace a text"]);
    by_use(&place, "{\"format\": 2}").refuses(1, &["format 2", "reads 1"]);
    by_use(&place, "[]").refuses(1, &["no routing trace"]);
    let mut short = serde_json::to_value(&good).unwrap();
    short["layers"][0]["counts"] = json!([1]);
    by_use(&place, &short.to_string()).refuses(1, &["a count and a weight for each expert"]);
    let llama = folder("llama");
    place.run(["trace", llama.to_str().unwrap(), "--tokens", "5"]).refuses(1, &["dense model"]);
    let mixtral = folder("mixtral");
    let mixtral = mixtral.to_str().unwrap();
    place.run(["trace", mixtral, "--tokens", "5,999"]).refuses(1, &["token 999", "512"]);
    place.run(["trace", mixtral, "--tokens", "5", "--tierset", "all"]).refuses(2, &["all tiers"]);
    place.run(["trace", mixtral]).refuses(2, &["--text"]);
    place.run(["trace", mixtral, "--text", "nowhere"]).refuses(1, &["nowhere"]);
    place.run(["perplexity", mixtral, "--tokens", "5"]).refuses(1, &["nothing to predict"]);
    place
        .run(["perplexity", mixtral, "--tokens", "5,6", "--window", "4", "--stride", "5"])
        .refuses(2, &["--stride 5"]);
    place.run(["perplexity", mixtral, "--tokens", "5,6", "--window", "99999999"]).refuses(2, &["context"]);
}

fn perplexity(place: &Place, model: &Path, tokens: &[u32], more: &[&str]) -> Value {
    let tokens = joined(tokens);
    let arguments = ["perplexity", model.to_str().unwrap(), "--tokens", &tokens, "--json"];
    place.run(arguments.iter().chain(more)).json()
}

/// The sum of -log softmax of the oracle's logits, position by position.
fn expected(family: &str, prompt: &[u32]) -> f64 {
    let bytes = std::fs::read(folder(family).join("oracle.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let logits = tensors.tensor("prompt2.logits").unwrap();
    let logits: Vec<f64> =
        logits.data().chunks_exact(4).map(|b| f64::from(f32::from_le_bytes(b.try_into().unwrap()))).collect();
    let rows = logits.chunks_exact(512).zip(&prompt[1..]);
    rows.map(|(row, &token)| row.iter().map(|l| l.exp()).sum::<f64>().ln() - row[token as usize]).sum()
}

#[test]
fn perplexity_is_that_of_the_oracles_logits() {
    let place = Place::new();
    for family in ["llama", "olmoe", "deepseek_v3", "gpt_oss", "granitemoe"] {
        let prompt = numbers(&oracle(family)["prompts"][2]);
        let found = perplexity(&place, &folder(family), &prompt, &[]);
        let nll = found["tiersets"][0]["nll"].as_f64().unwrap();
        let of_oracle = expected(family, &prompt);
        assert!((nll - of_oracle).abs() < 5e-3, "{family}: {nll}, the oracle has {of_oracle}");
        assert_eq!((&found["tokens"], &found["scored"]), (&json!(33), &json!(32)));
        let perplexity = found["tiersets"][0]["perplexity"].as_f64().unwrap();
        assert!((perplexity - (of_oracle / 32.0).exp()).abs() < 1e-3 * perplexity);
    }
}

#[test]
fn perplexity_has_the_same_bits_however_it_is_computed() {
    let place = Place::new();
    let prompt = numbers(&oracle("olmoe")["prompts"][2]);
    let of = |more: &[&str]| {
        let more = [&["--window", "12", "--stride", "5"], more].concat();
        perplexity(&place, &folder("olmoe"), &prompt, &more)["tiersets"][0]["nll"].as_f64().unwrap().to_bits()
    };
    let reference = of(&["--threads", "1", "--isa", "scalar"]);
    for more in
        [&["--threads", "2"][..], &["--prefill-chunk", "1"], &["--prefill-chunk", "5", "--threads", "3"]]
    {
        assert_eq!(of(more), reference, "{more:?}");
    }
    let whole = perplexity(&place, &folder("olmoe"), &prompt, &[])["tiersets"][0]["nll"].clone();
    assert_ne!(whole.as_f64().unwrap().to_bits(), reference, "windows matter");
}

#[test]
fn tiersets_trade_quality_for_memory() {
    let place = Place::new();
    let source = folder("olmoe");
    // What the model says by itself: a text that it predicts well.
    let family = oracle("olmoe");
    let text = [numbers(&family["prompts"][2]), numbers(&family["greedy"][2]["tokens"])].concat();
    trace(&place, &source, &text, &[]);
    let arguments = ["import", source.to_str().unwrap(), "native", "--tiers", "core:4,others:rest:cold"];
    assert_eq!(place.run(arguments.iter().chain(&["--by-use", "trace"])).code, Some(0));
    let native = place.path("native");
    let all = perplexity(&place, &native, &text, &["--all-tiersets"]);
    let sets = all["tiersets"].as_array().unwrap();
    let names: Vec<&Value> = sets.iter().map(|set| &set["tiers"]).collect();
    assert_eq!(names, [&json!(["core"]), &json!(["others"]), &json!(["core", "others"])]);
    // All tiers are the source, to the bit; and the sets are what each gives by itself.
    let of_source = perplexity(&place, &source, &text, &[]);
    assert_eq!(sets[2]["nll"], of_source["tiersets"][0]["nll"]);
    let alone = perplexity(&place, &native, &text, &["--tierset", "core"]);
    assert_eq!(sets[0], alone["tiersets"][0]);
    assert_eq!(perplexity(&place, &native, &text, &["--mode", "max"])["tiersets"][0], sets[2]);
    let nll: Vec<f64> = sets.iter().map(|set| set["nll"].as_f64().unwrap()).collect();
    assert!(nll[2] < nll[0] && nll[0] < nll[1], "most used beats least used, all beats both: {nll:?}");
    let bytes = |i: usize| sets[i]["expert_bytes"].as_u64().unwrap();
    assert_eq!((bytes(0), 2 * bytes(0)), (bytes(1), bytes(2)));
    let table =
        place.run(["perplexity", native.to_str().unwrap(), "--tokens", &joined(&text), "--all-tiersets"]);
    assert!(
        table.stdout.contains("core,others") && table.stdout.contains("56 of 57 tokens scored"),
        "{}",
        table.stdout
    );
    assert!(place.private_states().is_empty());
}

#[test]
fn a_text_is_cut_as_the_tokenizer_cuts_it_and_memory_is_bounded() {
    let place = Place::new();
    let dir = folder("qwen3_moe");
    let model = dir.to_str().unwrap();
    let text = "Kill it anywhere: the text is what it would have been.\n";
    std::fs::write(place.path("text"), text).unwrap();
    let ids = Tokenizer::open(&dir).unwrap().unwrap().encode(text).unwrap();
    let window = ["--window", "16"];
    let of_ids = perplexity(&place, &dir, &ids, &window);
    let of_text = |more: &[&str]| {
        let arguments = ["perplexity", model, "--text", "text", "--json"];
        place.run(arguments.iter().chain(&window).chain(more))
    };
    assert_eq!(of_text(&[]).json(), of_ids);
    let first = of_text(&["--first", "9"]).json();
    assert_eq!(first, perplexity(&place, &dir, &ids[..9], &window));

    let small = of_text(&["--memory", "1MiB"]);
    small.refuses(1, &["at least"]);
    let minimum = small.stderr.split("at least ").nth(1).unwrap();
    let minimum: String = minimum.chars().take_while(char::is_ascii_digit).collect();
    assert_eq!(of_text(&["--memory", &minimum]).json(), of_ids);
    let trace = place.run(["trace", model, "--text", "text", "--memory", &minimum, "--window", "16"]).json();
    assert_eq!(trace["tokens"], ids.len());
    assert!(place.private_states().is_empty());
    place
        .run(["trace", folder("olmoe").to_str().unwrap(), "--text", "text"])
        .refuses(1, &["tokenizer.json", "--tokens"]);
}
