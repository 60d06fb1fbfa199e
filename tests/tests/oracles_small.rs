//! The small oracles of `tests/oracles`: rotary scalings, windows longer and shorter than the prompt, dense layers among
//! mixtures, quantised and fused tensors, prompts of 300 tokens, one layer, and shapes that are multiples of nothing.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_model::kernels::Isa;
use lite_llm_tests::harness::{How, PLAIN, Seen, open, run};
use safetensors::SafeTensors;
use serde_json::Value;
use std::path::{Path, PathBuf};

const ORACLES: [&str; 19] = [
    "dynamic_beyond",
    "dynamic_within",
    "fp8",
    "glm4_moe",
    "granitemoe",
    "linear",
    "llama3",
    "longrope_llama",
    "longrope_long",
    "longrope_short",
    "mxfp4",
    "olmoe",
    "window_gpt_oss",
    "window_mixtral",
    "window_qwen2",
    "window_qwen3",
    "yarn",
    "yarn_deepseek_v2",
    "yarn_deepseek_v3",
];

const VOCAB: usize = 96;

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("oracles").join(name)
}

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|n| u32::try_from(n.as_u64().unwrap()).unwrap()).collect()
}

/// A copy of a case, in the spelling of transformers 5 or 4, opened for the context that the oracle was made for.
fn copy(name: &str, spelling: &str, oracle: &Value) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let text = std::fs::read(folder(name).join(spelling)).unwrap();
    let mut config: Value = serde_json::from_slice(&text).unwrap();
    if let Some(context) = oracle["case"].get("context") {
        config["serve_context"] = context.clone();
    }
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    std::fs::copy(folder(name).join("model.safetensors"), dir.path().join("model.safetensors")).unwrap();
    dir
}

fn check(name: &str, seen: &Seen, p: usize, oracle: &Value, expected: &[f32]) {
    assert_eq!(seen.tokens, numbers(&oracle["greedy"][p]), "{name}, prompt {p}: greedy tokens");
    let (of_logits, of_weights) =
        if oracle["case"]["family"] == "gpt_oss" { (5e-4, 5e-5) } else { (2e-4, 3e-5) };
    let positions = numbers(&oracle["positions"][p]);
    assert_eq!(expected.len(), positions.len() * VOCAB);
    let mut worst = 0.0f32;
    for (position, expected) in positions.iter().zip(expected.chunks_exact(VOCAB)) {
        for (bits, expected) in seen.logits[position].iter().zip(expected) {
            worst = worst.max((f32::from_bits(*bits) - expected).abs());
        }
    }
    assert!(worst < of_logits, "{name}, prompt {p}: logits differ by {worst}");
    for (layer, routes) in oracle["router"][p].as_object().unwrap() {
        let layer: u32 = layer.parse().unwrap();
        for (i, &position) in positions.iter().enumerate() {
            let (experts, weights) = &seen.routes[&(layer, position)];
            assert_eq!(
                *experts,
                numbers(&routes["ids"][i]),
                "{name}: experts of layer {layer} at {position}"
            );
            for (bits, expected) in weights.iter().zip(routes["weights"][i].as_array().unwrap()) {
                let difference = f64::from(f32::from_bits(*bits)) - expected.as_f64().unwrap();
                assert!(difference.abs() < of_weights, "{name}: weights of layer {layer}: {difference}");
            }
        }
    }
}

/// Both spellings against transformers; and the bits of the first against other ways to compute them.
#[test]
fn what_is_published_gives_what_transformers_gives() {
    let vectors = [Isa::Avx2, Isa::Neon].into_iter().find(|isa| isa.available());
    let isa = vectors.unwrap_or(Isa::Scalar);
    for name in ORACLES {
        let oracle: Value =
            serde_json::from_slice(&std::fs::read(folder(name).join("oracle.json")).unwrap()).unwrap();
        let bytes = std::fs::read(folder(name).join("oracle.safetensors")).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        for spelling in ["config.json", "config_v4.json"] {
            let dir = copy(name, spelling, &oracle);
            let model = open(dir.path(), How { isa, ..PLAIN });
            for (p, prompt) in oracle["prompts"].as_array().unwrap().iter().enumerate() {
                let steps = oracle["greedy"][p].as_array().unwrap().len();
                let seen = run(&model, &[0], &numbers(prompt), steps, PLAIN);
                let data = tensors.tensor(&format!("prompt{p}.logits")).unwrap().data();
                let expected: Vec<f32> =
                    data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
                check(name, &seen, p, &oracle, &expected);
                if spelling == "config.json" {
                    let isa = if p == 0 { Isa::Scalar } else { isa };
                    let how = How { chunk: 37, threads: 2, isa, resident: false, batch: 2 };
                    let again = run(&open(dir.path(), how), &[0], &numbers(prompt), steps, how);
                    assert_eq!(again, seen, "{name}, prompt {p}: bits of {how:?}");
                }
            }
        }
    }
}
