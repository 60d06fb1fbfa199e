//! Layouts and values that no golden checkpoint has: fused experts, 16-bit floats, numbers that are not finite.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::digest::Digest;
use lite_llm_model::kernels::convert::{f16_bits, f16_value};
use lite_llm_model::{Checkpoint, KvCache, StepError, Workspace};
use lite_llm_tests::harness::{Experts, GOLDEN, PLAIN, first_step, folder, open, run};
use safetensors::tensor::{Dtype, TensorView};
use safetensors::{SafeTensors, serialize};
use std::collections::BTreeMap;
use std::path::Path;

const PROMPT: [u32; 9] = [265, 338, 449, 471, 56, 294, 193, 318, 99];

/// Name, type, shape, bytes.
type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn read(name: &str) -> Tensors {
    let bytes = std::fs::read(folder(name).join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    tensors
        .tensors()
        .into_iter()
        .map(|(name, view)| (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect()
}

fn write(name: &str, tensors: &Tensors, dir: &Path) {
    let views: Vec<(&String, TensorView<'_>)> = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| (name, TensorView::new(*dtype, shape.clone(), bytes).unwrap()))
        .collect();
    std::fs::write(dir.join("model.safetensors"), serialize(views, None).unwrap()).unwrap();
    std::fs::copy(folder(name).join("config.json"), dir.join("config.json")).unwrap();
}

#[test]
fn fused_experts_are_those_of_their_own_tensors() {
    for (name, block, parts) in [
        ("olmoe", "mlp", ["gate_proj", "up_proj", "down_proj"]),
        ("mixtral", "block_sparse_moe", ["w1", "w3", "w2"]),
    ] {
        let mut tensors = read(name);
        for layer in 0..3 {
            let experts = format!("model.layers.{layer}.{block}.experts");
            let mut take = |expert: usize, part: &str| {
                tensors.remove(&format!("{experts}.{expert}.{part}.weight")).unwrap()
            };
            let (mut gate_up, mut down) = (Vec::new(), Vec::new());
            let mut shapes = (vec![], vec![]);
            for expert in 0..8 {
                let [gate, up, bottom] = parts.map(|part| take(expert, part));
                gate_up.extend([gate.2, up.2].concat());
                down.extend(bottom.2);
                shapes = (vec![8, 2 * gate.1[0], gate.1[1]], vec![8, bottom.1[0], bottom.1[1]]);
            }
            tensors.insert(format!("{experts}.gate_up_proj"), (Dtype::F32, shapes.0, gate_up));
            tensors.insert(format!("{experts}.down_proj"), (Dtype::F32, shapes.1, down));
        }
        let dir = tempfile::tempdir().unwrap();
        write(name, &tensors, dir.path());
        let digest = |dir: &Path| Checkpoint::open(dir).unwrap().weights_digest(1).unwrap();
        assert_eq!(digest(dir.path()), digest(&folder(name)), "{name}");
        let reference = run(&open(&folder(name), PLAIN), &[0], &PROMPT, 6, PLAIN);
        assert_eq!(run(&open(dir.path(), PLAIN), &[0], &PROMPT, 6, PLAIN), reference, "{name}");
    }
}

/// Arithmetic is in f32 whatever the storage: weights rounded to binary16 give the same bits stored as either.
#[test]
fn half_precision_weights_are_widened_exactly() {
    // Those in one file of 32-bit floats.
    let single = GOLDEN.into_iter().filter(|name| !name.ends_with("_bf16") && !name.ends_with("_sharded"));
    for family in single {
        let (mut half, mut single) = (read(family), read(family));
        for (name, tensor) in &mut half {
            let values =
                tensor.2.chunks_exact(4).map(|b| f16_bits(f32::from_le_bytes(b.try_into().unwrap())));
            let values: Vec<u16> = values.collect();
            tensor.0 = Dtype::F16;
            tensor.2 = values.iter().flat_map(|bits| bits.to_le_bytes()).collect();
            single.get_mut(name).unwrap().2 =
                values.iter().flat_map(|&bits| f16_value(bits).to_le_bytes()).collect();
        }
        let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        write(family, &half, a.path());
        write(family, &single, b.path());
        let seen = |dir: &Path| run(&open(dir, PLAIN), &[0], &PROMPT, 6, PLAIN);
        assert_eq!(seen(a.path()), seen(b.path()), "{family}");
    }
}

fn failure(poisoned: &str) -> StepError {
    let mut tensors = read("olmoe");
    tensors.get_mut(poisoned).unwrap().2[..4].copy_from_slice(&f32::NAN.to_le_bytes());
    let dir = tempfile::tempdir().unwrap();
    write("olmoe", &tensors, dir.path());
    let model = open(dir.path(), PLAIN);
    let mut experts = Experts::load(&model);
    let mut cache = KvCache::new(&model, 1).unwrap();
    let step = first_step(&model, PROMPT.to_vec(), None);
    model.forward(&step, &mut cache, &mut Workspace::default(), &mut experts, None).unwrap_err()
}

#[test]
fn numbers_that_are_not_finite_name_layer_and_position() {
    let router = failure("model.layers.1.mlp.gate.weight");
    assert_eq!(router, StepError::NonFinite { row: 0, layer: 1, position: 0 });
    let logits = failure("lm_head.weight");
    assert_eq!(logits, StepError::NonFinite { row: 0, layer: 3, position: 8 });
}

#[test]
fn impossible_sizes_are_refused_before_anything_is_allocated() {
    let text = std::fs::read_to_string(folder("olmoe").join("config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_str(&text).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (key, value) in [
        ("num_hidden_layers", serde_json::json!(16_000_000)),
        ("rope_parameters", serde_json::json!({ "rope_theta": 1e4, "rope_type": "linear", "factor": 0.0 })),
        ("rope_parameters", serde_json::json!({ "rope_theta": -1.0, "rope_type": "default" })),
    ] {
        let mut config = config.clone();
        config[key] = value;
        std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        assert!(error.contains("config.json"), "{error}");
        assert!(!error.contains("safetensors"), "{key} is refused first: {error}");
    }
}

/// The plan counts what the working memory of a step grows to, and not much more.
#[test]
fn the_memory_plan_has_room_for_the_workspace() {
    for name in GOLDEN {
        let model = open(&folder(name), PLAIN);
        let mut experts = Experts::load(&model);
        let groups = u32::try_from(model.kv_groups().len()).unwrap();
        let mut cache = KvCache::new(&model, 8 * groups).unwrap();
        let mut workspace = Workspace::default();
        let step = first_step(&model, (3..67).collect(), Some(experts.resident()));
        model.forward(&step, &mut cache, &mut workspace, &mut experts, None).unwrap();
        let overhead =
            |positions, rows| model.plan(positions, rows, Digest::default()).unwrap().overhead_bytes;
        let planned = overhead(64, 1) - overhead(0, 0);
        let kept = workspace.bytes() as u64;
        assert!(kept <= planned, "{name}: {kept} bytes are kept, {planned} are planned");
        assert!(planned <= 3 * kept, "{name}: {planned} bytes are planned for {kept}");
    }
}
