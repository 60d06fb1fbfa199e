//! The published fixtures through the command, as it is without options: the oracles of transformers come out.

use lite_llm_tests::command::Place;
use lite_llm_tests::harness::{GOLDEN, folder};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::Path;

/// The fixtures' own.
const TOLERANCE: f32 = 2e-4;

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Runs a prompt and compares logits, tokens and experts.
fn compare(place: &Place, family: &str, oracle: &Value, p: usize) {
    let list =
        |value: &Value| -> Vec<String> { value.as_array().unwrap().iter().map(Value::to_string).collect() };
    let prompt = list(&oracle["prompts"][p]);
    let dir = folder(family);
    let arguments =
        ["run", dir.to_str().unwrap(), "--prompt-tokens", &prompt.join(","), "--max-tokens", "24"];
    let more: &[&str] = if family == "llama" {
        &["--json", "--logits", "l"]
    } else {
        &["--json", "--logits", "l", "--routes", "r"]
    };
    let result = place.run(arguments.iter().chain(more)).json();
    assert_eq!(result["tokens"], oracle["greedy"][p]["tokens"], "{family}, prompt {p}");

    let bytes = std::fs::read(folder(family).join("oracle.safetensors")).unwrap();
    let expected = SafeTensors::deserialize(&bytes).unwrap();
    let expected = expected.tensor(&format!("prompt{p}.logits")).unwrap();
    let bytes = std::fs::read(place.path("l")).unwrap();
    let found = SafeTensors::deserialize(&bytes).unwrap();
    let found = found.tensor("logits").unwrap();
    assert_eq!(found.shape(), expected.shape());
    let pairs = floats(found.data()).into_iter().zip(floats(expected.data()));
    let worst = pairs.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let tolerance = if family == "gpt_oss" { 5e-4 } else { TOLERANCE };
    assert!(worst <= tolerance, "{family}, prompt {p}: logits differ by {worst}");
    if family != "llama" {
        compare_routes(place, family, &oracle["router"][p], prompt.len());
    }
}

fn compare_routes(place: &Place, family: &str, router: &Value, positions: usize) {
    let bytes = std::fs::read(place.path("r")).unwrap();
    let routes = SafeTensors::deserialize(&bytes).unwrap();
    let experts = routes.tensor("experts").unwrap();
    let [layers, computed, k] = *experts.shape() else { panic!("layers, positions, k") };
    let ids: Vec<u32> =
        experts.data().chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    assert_eq!((router.as_object().unwrap().len(), computed), (layers, positions + 23));
    let numbers = routes.tensor("layers").unwrap().data().to_vec();
    let numbers: Vec<u32> =
        numbers.chunks_exact(4).map(|b| u32::from_le_bytes(b.try_into().unwrap())).collect();
    for (number, expected) in router.as_object().unwrap() {
        // Dense layers have no routes.
        let layer = numbers.binary_search(&number.parse().unwrap()).unwrap();
        for position in 0..positions {
            let found = &ids[(layer * computed + position) * k..][..k];
            let mut expected: Vec<u32> = serde_json::from_value(expected["ids"][position].clone()).unwrap();
            expected.sort_unstable();
            assert_eq!(found, expected, "{family}, layer {layer}, position {position}");
        }
    }
}

#[test]
fn every_published_fixture_gives_its_oracle() {
    let place = Place::new();
    for family in GOLDEN {
        let text = std::fs::read(folder(family).join("oracle.json")).unwrap();
        let oracle: Value = serde_json::from_slice(&text).unwrap();
        for p in 0..oracle["prompts"].as_array().unwrap().len() {
            compare(&place, family, &oracle, p);
        }
    }
}

/// The number after these words.
fn number_after(text: &str, words: &str) -> Option<u64> {
    let digits: String = text.split_once(words)?.1.chars().take_while(char::is_ascii_digit).collect();
    digits.parse().ok()
}

/// Experts come in waves, pages of windows go round, prompts are cut, snapshots are taken: every family gives its oracle's
/// tokens all the same, and a full replay computes the same bits from every snapshot on.
#[test]
fn the_least_memory_and_a_full_replay_give_the_same_of_every_family() {
    let small = ["window_gpt_oss", "window_mixtral", "window_qwen2", "yarn_deepseek_v2", "fp8", "mxfp4"];
    let small = small.map(|name| (name, Path::new(env!("CARGO_MANIFEST_DIR")).join("oracles").join(name)));
    for (name, dir) in GOLDEN.map(|name| (name, folder(name))).into_iter().chain(small) {
        let place = Place::new();
        let oracle: Value = serde_json::from_slice(&std::fs::read(dir.join("oracle.json")).unwrap()).unwrap();
        let p = oracle["prompts"].as_array().unwrap().len() - 1;
        let greedy = oracle["greedy"][p].get("tokens").unwrap_or(&oracle["greedy"][p]);
        let prompt = oracle["prompts"][p].as_array().unwrap().iter().map(Value::to_string);
        let prompt = prompt.collect::<Vec<_>>().join(",");
        let count = greedy.as_array().unwrap().len().to_string();
        let dir = dir.to_str().unwrap();
        let mut memory = 1;
        let ran = loop {
            let ran = place.run([
                "run",
                dir,
                "--prompt-tokens",
                &prompt,
                "--max-tokens",
                &count,
                "--ignore-eos",
                "--memory",
                &memory.to_string(),
                "--prefill-chunk",
                "37",
                "--snapshot-every",
                "500",
                "--state",
                "state",
                "--json",
            ]);
            if let Some(least) = number_after(&ran.stderr, "needs at least ") {
                assert!(memory < least, "{name}: {}", ran.stderr);
                memory = least;
            } else if let Some(more) = number_after(&ran.stderr, "give at least ") {
                memory += more;
                std::fs::remove_dir_all(place.path("state")).unwrap();
            } else {
                break ran;
            }
        };
        assert_eq!(ran.json()["tokens"], *greedy, "{name} in {memory} bytes");
        let replay = place.run(["replay", "state", "--full", dir]);
        assert_eq!(replay.code, Some(0), "{name}: {}", replay.stderr);
    }
}

#[test]
fn chats_and_texts_give_the_tokens_of_the_oracle() {
    let place = Place::new();
    for family in ["mixtral", "qwen3_moe"] {
        let text = std::fs::read(folder(family).join("tokenizer_oracle.json")).unwrap();
        let oracle: Value = serde_json::from_slice(&text).unwrap();
        let dir = folder(family);
        let run = |how: &str, prompt: &str| {
            let arguments = ["run", dir.to_str().unwrap(), how, prompt, "--max-tokens", "4", "--json"];
            place.run(arguments).json()["tokens"].clone()
        };
        let mut compared = 0;
        for chat in oracle["chats"].as_array().unwrap() {
            let [message] = &chat["messages"].as_array().unwrap()[..] else { continue };
            if message["role"] != "user" || chat["add_generation_prompt"] != true {
                continue;
            }
            let ids: Vec<String> = chat["ids"].as_array().unwrap().iter().map(Value::to_string).collect();
            let said = message["content"].as_str().unwrap();
            assert_eq!(run("--chat", said), run("--prompt-tokens", &ids.join(",")), "{family}: {said}");
            compared += 1;
        }
        assert!(compared > 0, "{family} has a chat of one message");
    }
}
