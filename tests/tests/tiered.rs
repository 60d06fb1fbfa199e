//! The tiered router end to end: what it must equal, what must not change it, and what is refused.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::config::Placement;
use lite_llm_core::ids::ExpertKey;
use lite_llm_model::Checkpoint;
use lite_llm_model::checkpoint::Tier;
use lite_llm_model::checkpoint::config::Config;
use lite_llm_model::checkpoint::import::import;
use lite_llm_model::checkpoint::tiers::parse_tiers;
use lite_llm_model::families;
use lite_llm_model::kernels::Isa;
use lite_llm_model::synth::{SynthFamily, SynthSpec, synth};
use lite_llm_tests::harness::{How, PLAIN, folder, open, run};
use safetensors::tensor::TensorView;
use safetensors::{SafeTensors, serialize};
use serde_json::{Value, json};
use std::path::Path;

const PROMPT: [u32; 9] = [265, 338, 449, 471, 56, 294, 193, 318, 99];

fn spec(family: SynthFamily) -> SynthSpec {
    SynthSpec { layers: 2, hidden: 64, heads: 4, intermediate: 32, ..SynthSpec::of(family) }
}

/// A router with one tier of one group has nothing to decide but the expert, and is Mixtral's.
#[test]
fn one_tier_of_one_group_is_a_flat_router() {
    let dir = tempfile::tempdir().unwrap();
    let (tiered, flat) = (dir.path().join("tiered"), dir.path().join("flat"));
    let all = Tier { name: "all".into(), experts: 6, groups: 1, placement: Placement::Hot };
    let shape = SynthSpec { experts: 6, top_k: 2, tiers: vec![all], ..spec(SynthFamily::TieredMoe) };
    synth(&tiered, &shape).unwrap();
    synth(&flat, &SynthSpec { experts: 6, top_k: 2, ..spec(SynthFamily::Mixtral) }).unwrap();
    let bytes = std::fs::read(tiered.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut renamed = Vec::new();
    for (name, view) in tensors.tensors() {
        let (mut shape, mut data) = (view.shape().to_vec(), view.data());
        if name.ends_with("mlp.gate.weight") {
            // The rows of the tier and of the group.
            data = &data[2 * shape[1] * 4..];
            shape[0] -= 2;
        }
        let name = name.replace("mlp.", "block_sparse_moe.");
        let name = name.replace("gate_proj", "w1").replace("up_proj", "w3").replace("down_proj", "w2");
        renamed.push((name, TensorView::new(view.dtype(), shape, data).unwrap()));
    }
    std::fs::write(flat.join("model.safetensors"), serialize(renamed, None).unwrap()).unwrap();
    let runs = [&tiered, &flat].map(|dir| run(&open(dir, PLAIN), &[0], &PROMPT, 8, PLAIN));
    assert_eq!(runs[0], runs[1]);
}

#[test]
fn no_schedule_changes_a_bit_and_masked_tiers_are_never_selected() {
    let dir = tempfile::tempdir().unwrap();
    let (source, target) = (dir.path().join("source"), dir.path().join("native"));
    synth(&source, &spec(SynthFamily::TieredMoe)).unwrap();
    import(&source, &target, None, 1, |_, _| {}).unwrap();
    let mut tokens = Vec::new();
    for tiers in [&[0u32, 1][..], &[0], &[1]] {
        let reference = run(&open(&source, PLAIN), tiers, &PROMPT, 8, PLAIN);
        let selected = tiers.len() * 2;
        for (experts, weights) in reference.routes.values() {
            assert_eq!(experts.len(), selected, "one expert of each of two groups of each tier");
            assert!(experts.iter().all(|expert| tiers.contains(&u32::from(*expert >= 4))), "{experts:?}");
            let sum: f32 = weights.iter().map(|&bits| f32::from_bits(bits)).sum();
            assert!((sum - 1.0).abs() < 1e-5);
        }
        for how in [
            How { chunk: 1, ..PLAIN },
            How { chunk: 7, threads: 2, isa: Isa::detect(), resident: false, batch: 3 },
            How { isa: Isa::detect(), batch: 8, ..PLAIN },
        ] {
            for dir in [&source, &target] {
                assert_eq!(run(&open(dir, how), tiers, &PROMPT, 8, how), reference, "{tiers:?} {how:?}");
            }
        }
        tokens.push(reference.tokens);
    }
    assert!(tokens[0] != tokens[1] && tokens[1] != tokens[2], "tiers matter: {tokens:?}");
}

#[test]
fn keys_say_tier_group_and_expert() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    synth(&path, &spec(SynthFamily::TieredMoe)).unwrap();
    let checkpoint = Checkpoint::open(&path).unwrap();
    assert_eq!(checkpoint.key(1, 3), ExpertKey { layer: 1, tier: 0, group: 1, expert: 1 });
    assert_eq!(checkpoint.key(1, 12), ExpertKey { layer: 1, tier: 1, group: 1, expert: 2 });
    for ordinal in 0..16 {
        assert_eq!(checkpoint.ordinal(checkpoint.key(0, ordinal)), Some(ordinal));
    }
    assert_eq!(checkpoint.ordinal(ExpertKey { layer: 0, tier: 0, group: 2, expert: 0 }), None);
    assert_eq!(checkpoint.ordinal(ExpertKey { layer: 0, tier: 0, group: 0, expert: 2 }), None);
}

#[test]
fn tiers_that_are_not_the_routers_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    synth(&source, &spec(SynthFamily::TieredMoe)).unwrap();
    let refused = |source: &Path, tiers: &str| {
        let tiers = parse_tiers(tiers).unwrap();
        import(source, &dir.path().join("native"), Some(&tiers), 1, |_, _| {}).unwrap_err().to_string()
    };
    let error = refused(&source, "small:8,large:8");
    assert!(error.contains("small:2x2,large:2x6"), "{error}");
    let error = refused(&folder("olmoe"), "a:2x4");
    assert!(error.contains("tier a has groups"), "{error}");
    assert!(parse_tiers("a:0x4").is_err() && parse_tiers("a:2x").is_err());
    // Other placements are the user's to choose.
    let tiers = parse_tiers("small:2x2:warm,large:2x6:cold").unwrap();
    import(&source, &dir.path().join("native"), Some(&tiers), 1, |_, _| {}).unwrap();
    let native = Checkpoint::open(&dir.path().join("native")).unwrap();
    assert_eq!(native.tiers()[1].placement, Placement::Cold);
}

#[test]
fn an_impossible_router_is_refused_by_key() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("model");
    synth(&path, &spec(SynthFamily::TieredMoe)).unwrap();
    let good: Value = serde_json::from_slice(&std::fs::read(path.join("config.json")).unwrap()).unwrap();
    let tier = |name: &str, groups: u64| json!({ "name": name, "groups": groups, "experts": 2 });
    for (key, value, word) in [
        ("k_tier", json!(3), "k_tier: 3 are more"),
        ("k_group", json!(3), "k_group: 3 are more"),
        ("k_expert", json!(3), "k_expert: 3 are more"),
        ("k_expert", json!(0), "k_expert"),
        ("tiers", json!([]), "1 to 64 tiers"),
        ("tiers", json!([tier("a", 2), tier("a", 2)]), "there twice"),
        ("tiers", json!([tier("a", 0), tier("b", 2)]), "groups"),
        ("tiers", json!([tier("a", 1 << 24), tier("b", 2)]), "that many experts"),
        ("tiers", json!("many"), "no list of objects"),
        ("tiers", json!([{ "name": "a", "groups": 2, "experts": 2, "placement": "moon" }]), "moon"),
    ] {
        let mut config = good.clone();
        config[key] = value;
        let text = config.to_string();
        let read = families::read(&Config::parse(Path::new("config.json"), text.as_bytes()).unwrap());
        let error = read.unwrap_err().to_string();
        assert!(error.contains(word), "{error}");
    }
}
