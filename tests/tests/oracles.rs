//! Every golden checkpoint against what Hugging Face transformers gives for it, and against itself: the bits must not
//! depend on chunking, batch, threads, instruction set or the order in which experts come.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_model::Checkpoint;
use lite_llm_model::kernels::Isa;
use lite_llm_model::tokenizer::{Message, Tokenizer};
use lite_llm_tests::harness::{GOLDEN, How, PLAIN, Seen, every_form, folder, open, run};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::Path;
use std::time::UNIX_EPOCH;

fn json(dir: &Path, file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join(file)).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|n| u32::try_from(n.as_u64().unwrap()).unwrap()).collect()
}

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let data = tensors.tensor(name).unwrap().data().to_vec();
    data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// Largest differences of logits and of routers' weights. Values of gpt-oss are larger, and so is the error of its oracle.
fn tolerance(name: &str) -> (f32, f64) {
    if name == "gpt_oss" { (5e-4, 5e-5) } else { (2e-4, 3e-5) }
}

/// One prompt of a folder against its oracle.
fn check(name: &str, seen: &Seen, p: usize, oracle: &Value, tensors: &SafeTensors<'_>) {
    let prompt = numbers(&oracle["prompts"][p]);
    assert_eq!(seen.tokens, numbers(&oracle["greedy"][p]["tokens"]), "{name}, prompt {p}: greedy tokens");
    let vocab = 512;
    let expected = floats(tensors, &format!("prompt{p}.logits"));
    let greedy = floats(tensors, &format!("prompt{p}.greedy_logits"));
    let mut worst = 0.0f32;
    for position in 0..prompt.len() + 23 {
        let row = if position < prompt.len() {
            &expected[position * vocab..][..vocab]
        } else {
            &greedy[(position + 1 - prompt.len()) * vocab..][..vocab]
        };
        for (bits, expected) in seen.logits[&u32::try_from(position).unwrap()].iter().zip(row) {
            worst = worst.max((f32::from_bits(*bits) - expected).abs());
        }
    }
    let (of_logits, of_weights) = tolerance(name);
    assert!(worst < of_logits, "{name}, prompt {p}: logits differ by {worst}");
    for (layer, routes) in oracle["router"][p].as_object().into_iter().flatten() {
        let layer: u32 = layer.parse().unwrap();
        for position in 0..prompt.len() {
            let (experts, weights) = &seen.routes[&(layer, u32::try_from(position).unwrap())];
            assert_eq!(*experts, numbers(&routes["ids"][position]), "{name}: experts of layer {layer}");
            for (bits, expected) in weights.iter().zip(routes["weights"][position].as_array().unwrap()) {
                let difference = f64::from(f32::from_bits(*bits)) - expected.as_f64().unwrap();
                assert!(
                    difference.abs() < of_weights,
                    "{name}: weights of layer {layer} differ by {difference}"
                );
            }
        }
    }
}

fn check_folder(name: &str, dir: &Path) {
    let (oracle, bytes) = (json(dir, "oracle.json"), std::fs::read(dir.join("oracle.safetensors")).unwrap());
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let model = open(dir, PLAIN);
    for p in 0..3 {
        let seen = run(&model, &[0], &numbers(&oracle["prompts"][p]), 24, PLAIN);
        check(name, &seen, p, &oracle, &tensors);
    }
}

#[test]
fn every_family_gives_what_transformers_gives() {
    for name in GOLDEN {
        check_folder(name, &folder(name));
    }
}

#[test]
fn the_spelling_of_the_hub_is_read_too() {
    for name in GOLDEN {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(folder(name)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
        std::fs::rename(dir.path().join("config_v4.json"), dir.path().join("config.json")).unwrap();
        check_folder(name, dir.path());
    }
}

#[test]
fn bits_do_not_depend_on_how_they_are_computed() {
    let isas: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.available()).collect();
    for (name, dir) in every_form() {
        let prompts = &json(&dir, "oracle.json")["prompts"];
        let prompt = numbers(prompts.as_array().unwrap().last().unwrap());
        let prompt = &prompt[..prompt.len().min(48)];
        let reference = run(&open(&dir, PLAIN), &[0], prompt, 8, PLAIN);
        for &isa in &isas {
            for threads in [1, 2] {
                let model = open(&dir, How { threads, isa, ..PLAIN });
                for (chunk, resident, batch) in [(1, false, 1), (7, true, 2), (64, false, 8), (13, false, 3)]
                {
                    let how = How { chunk, threads, isa, resident, batch };
                    assert_eq!(run(&model, &[0], prompt, 8, how), reference, "{name}, {how:?}");
                }
            }
        }
    }
}

#[test]
fn shards_and_one_file_have_one_digest() {
    let digest = |name: &str| Checkpoint::open(&folder(name)).unwrap().weights_digest(2).unwrap();
    assert_eq!(digest("mixtral"), digest("mixtral_sharded"));
    assert_ne!(digest("mixtral"), digest("mixtral_bf16"));
}

#[test]
fn tokenizers_and_templates_give_what_transformers_gives() {
    for name in ["mixtral", "qwen3_moe"] {
        let dir = folder(name);
        let tokenizer = Tokenizer::open(&dir).unwrap().unwrap();
        let oracle = json(&dir, "tokenizer_oracle.json");
        for text in oracle["texts"].as_array().unwrap() {
            let ids = numbers(&text["ids"]);
            assert_eq!(tokenizer.encode(text["text"].as_str().unwrap()).unwrap(), ids, "{name}: {text}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), text["decoded_skip_special"].as_str().unwrap());
        }
        for chat in oracle["chats"].as_array().unwrap() {
            let messages: Vec<Message> = serde_json::from_value(chat["messages"].clone()).unwrap();
            let open = chat["add_generation_prompt"].as_bool().unwrap();
            let text = tokenizer.chat_text(&messages, open, UNIX_EPOCH).unwrap();
            assert_eq!(text, chat["text"].as_str().unwrap(), "{name}");
            if open {
                assert_eq!(tokenizer.chat(&messages, UNIX_EPOCH).unwrap(), numbers(&chat["ids"]), "{name}");
            }
        }
    }
}
