//! Published checkpoints that contradict themselves, or ask for what is not computed: refused by name, before anything is
//! allocated for them.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_model::Checkpoint;
use lite_llm_tests::harness::folder;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A tensor of a file: type, shape and bytes.
type Stored = (Dtype, Vec<usize>, Vec<u8>);

/// Opens a checkpoint with another configuration and other tensors; says why it is refused.
fn refusal(
    source: &Path,
    configure: impl FnOnce(&mut Value),
    change: impl FnOnce(&mut BTreeMap<String, Stored>),
) -> String {
    let dir = tempfile::tempdir().unwrap();
    let mut config = serde_json::from_slice(&std::fs::read(source.join("config.json")).unwrap()).unwrap();
    configure(&mut config);
    std::fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let bytes = std::fs::read(source.join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let mut tensors: BTreeMap<String, Stored> = file
        .iter()
        .map(|(name, view)| (name.into(), (view.dtype(), view.shape().to_vec(), view.data().to_vec())))
        .collect();
    change(&mut tensors);
    let views = tensors.iter().map(|(name, (dtype, shape, data))| {
        (name.as_str(), TensorView::new(*dtype, shape.clone(), data).unwrap())
    });
    let written = safetensors::serialize(views, None).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), written).unwrap();
    Checkpoint::open(dir.path()).map_or_else(|error| error.to_string(), |_| "it was opened".into())
}

fn oracle(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("oracles").join(name)
}

#[test]
fn configurations_that_would_change_the_output_are_refused() {
    for (name, key, value, words) in [
        ("deepseek_v2", "topk_method", json!("noaux_tc"), "topk_method = noaux_tc is not supported"),
        ("deepseek_v2", "norm_topk_prob", json!(true), "norm_topk_prob = true is not supported"),
        ("deepseek_v2", "mlp_bias", json!(true), "mlp_bias = true is not supported"),
        ("deepseek_v2", "scoring_func", json!("sigmoid"), "scoring_func = sigmoid is not supported"),
        ("deepseek_v2", "moe_layer_freq", json!(2), "moe_layer_freq"),
        ("deepseek_v2", "topk_group", json!(5), "n_group"),
        ("deepseek_v3", "topk_method", json!("greedy"), "topk_method = greedy is not supported"),
        ("deepseek_v3", "routed_scaling_factor", Value::Null, "routed_scaling_factor: it is missing"),
        ("deepseek_v3", "n_group", Value::Null, "n_group: it is missing"),
        ("deepseek_v3", "n_group", json!(8), "scored by two experts"),
        ("deepseek_v3", "num_experts_per_tok", json!(5), "fewer than the 5 selected"),
        ("deepseek_v3", "num_experts", json!(7), "it contradicts"),
        ("glm4_moe", "use_qk_norm", json!(false), "_norm.weight is not one of a glm4_moe"),
        ("glm4_moe", "rope_parameters", json!({ "partial_rotary_factor": 1.5 }), "partial_rotary_factor"),
        ("gpt_oss", "rope_parameters", Value::Null, "rope_scaling: it is missing"),
        ("gpt_oss", "layer_types", json!(["full_attention"]), "layer_types = nothing"),
        ("gpt_oss", "layer_types", json!(["chunked_attention"]), "layer_types = chunked_attention"),
        ("granitemoe", "logits_scaling", json!(0), "logits_scaling"),
        ("granitemoe", "hidden_act", json!("gelu"), "hidden_act = gelu is not supported"),
        ("llama", "mlp_bias", json!(true), "mlp_bias = true is not supported"),
        ("mixtral", "quantization_config", json!({ "quant_method": "gptq" }), "quantization_config = gptq"),
        ("mixtral", "quantization_config", json!({ "quant_method": "mxfp4" }), "quantization_config = mxfp4"),
        ("phimoe", "num_experts_per_tok", json!(3), "num_experts_per_tok = 3 is not supported"),
        ("qwen2_moe", "use_sliding_window", json!(true), "sliding_window: it must not be 0"),
        ("qwen3_moe", "serve_context", json!(1 << 20), "are more than the"),
    ] {
        let error = refusal(&folder(name), |config| config[key] = value.clone(), |_| ());
        assert!(error.contains(words) && error.contains("/"), "{name}, {key} = {value}: {error}");
    }
    for (name, key, value, words) in [
        ("longrope_short", "serve_context", json!(513), "513 positions are more than the 512"),
        ("dynamic_beyond", "serve_context", json!(257), "257 positions are more than the 256"),
        (
            "fp8",
            "quantization_config",
            json!({ "quant_method": "fp8", "weight_block_size": [64, 64] }),
            "fp8",
        ),
        ("longrope_long", "rope_scaling", json!({ "type": "longrope", "short_factor": [1.0] }), "factor"),
        ("yarn", "rope_parameters", json!({ "rope_type": "yarn", "factor": -2.0 }), "must be positive"),
    ] {
        let error = refusal(&oracle(name), |config| config[key] = value.clone(), |_| ());
        assert!(error.contains(words), "{name}, {key} = {value}: {error}");
    }
}

#[test]
fn tensors_that_contradict_the_configuration_are_refused() {
    let bias = "model.layers.1.mlp.gate.e_score_correction_bias";
    let shorter = |tensor: &mut Stored| {
        tensor.1[0] -= 1;
        let row = tensor.2.len() / (tensor.1[0] + 1);
        tensor.2.truncate(row * tensor.1[0]);
    };
    let of_v3 =
        |change: &dyn Fn(&mut BTreeMap<String, Stored>)| refusal(&folder("deepseek_v3"), |_| (), change);
    let error = of_v3(&|tensors| shorter(tensors.get_mut(bias).unwrap()));
    assert!(error.contains(bias) && error.contains("has shape"), "a bias of the wrong length: {error}");
    let error = of_v3(&|tensors| drop(tensors.remove(bias)));
    assert!(error.contains(bias) && error.contains("missing"), "a missing bias: {error}");
    let expert = "model.layers.1.mlp.experts.3.up_proj.weight";
    let error = of_v3(&|tensors| drop(tensors.remove(expert)));
    assert!(error.contains(expert) && error.contains("missing"), "a missing expert: {error}");
    let error = of_v3(&|tensors| {
        let tensor = tensors[expert].clone();
        tensors.insert("model.layers.1.mlp.experts.8.up_proj.weight".into(), tensor);
    });
    assert!(error.contains("experts.8.up_proj.weight is not one of"), "an expert too many: {error}");
    let error = of_v3(&|tensors| tensors.get_mut(expert).unwrap().0 = Dtype::I32);
    assert!(error.contains(expert) && error.contains("of a type other"), "a type that is not read: {error}");
    let error =
        refusal(&folder("gpt_oss"), |_| (), |tensors| drop(tensors.remove("model.layers.0.self_attn.sinks")));
    assert!(error.contains("sinks") && error.contains("missing"), "{error}");
    let error = refusal(
        &folder("gpt_oss"),
        |_| (),
        |tensors| shorter(tensors.get_mut("model.layers.0.mlp.router.bias").unwrap()),
    );
    assert!(error.contains("router.bias has shape"), "{error}");
}

#[test]
fn quantised_tensors_that_do_not_fit_are_refused() {
    let scales = "model.layers.0.mlp.gate_proj.weight_scale_inv";
    let error = refusal(&oracle("fp8"), |_| (), |tensors| drop(tensors.remove(scales)));
    assert!(error.contains("model.layers.0.mlp.gate_proj.weight"), "no scales: {error}");
    let error = refusal(&oracle("fp8"), |_| (), |tensors| tensors.get_mut(scales).unwrap().1 = vec![4, 1]);
    assert!(error.contains("model.layers.0.mlp.gate_proj.weight"), "scales of another shape: {error}");
    for part in ["gate_up_proj_scales", "down_proj_blocks"] {
        let name = format!("model.layers.0.mlp.experts.{part}");
        let error = refusal(&oracle("mxfp4"), |_| (), |tensors| drop(tensors.remove(&name)));
        assert!(error.contains("mlp.experts"), "without {part}: {error}");
    }
    let error = refusal(&oracle("mxfp4"), |config| config["num_local_experts"] = json!(4), |_| ());
    assert!(error.contains("mlp."), "experts that the configuration does not have: {error}");
}
