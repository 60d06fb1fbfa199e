//! `config.json` and `generation_config.json`, with the field names of hub checkpoints.

use super::{SynthFamily, SynthSpec};
use crate::checkpoint::Tier;
use crate::kernels::DType;
use lite_llm_core::config::Placement;
use serde_json::{Map, Value, json};

/// Ends a stream, pads a batch.
pub(super) const END: u32 = 0;
/// Starts a turn of a chat.
pub(super) const TURN_START: u32 = 1;
/// Ends a turn of a chat.
pub(super) const TURN_END: u32 = 2;

/// `config.json`.
pub(super) fn model(spec: &SynthSpec) -> Value {
    let mut fields = Map::new();
    let mut set = |key: &str, value: Value| {
        fields.insert(key.into(), value);
    };
    let class = match spec.family {
        SynthFamily::Llama => "LlamaForCausalLM",
        SynthFamily::Mixtral => "MixtralForCausalLM",
        SynthFamily::Olmoe => "OlmoeForCausalLM",
        SynthFamily::Qwen2Moe => "Qwen2MoeForCausalLM",
        SynthFamily::Qwen3Moe => "Qwen3MoeForCausalLM",
        SynthFamily::TieredMoe => "TieredMoeForCausalLM",
    };
    set("architectures", json!([class]));
    set("model_type", json!(spec.family.name()));
    set("hidden_act", json!("silu"));
    set("hidden_size", json!(spec.hidden));
    set("initializer_range", json!(0.02));
    set("max_position_embeddings", json!(spec.context));
    set("num_attention_heads", json!(spec.heads));
    set("num_hidden_layers", json!(spec.layers));
    set("num_key_value_heads", json!(spec.kv_heads));
    set("attention_dropout", json!(0.0));
    set("rms_norm_eps", json!(1e-5));
    set("rope_scaling", Value::Null);
    set("rope_theta", json!(10000.0));
    set("tie_word_embeddings", json!(false));
    let dtype = match spec.dtype {
        DType::F32 => "float32",
        DType::Bf16 => "bfloat16",
        DType::F16 => "float16",
    };
    set("torch_dtype", json!(dtype));
    set("use_cache", json!(true));
    set("vocab_size", json!(spec.vocab));
    set("bos_token_id", json!(TURN_START.min(spec.vocab - 1)));
    set("eos_token_id", json!(ends(spec)));
    if spec.family.is_mixture() && spec.family != SynthFamily::TieredMoe {
        set("num_experts_per_tok", json!(spec.top_k));
        set("output_router_logits", json!(false));
        set("router_aux_loss_coef", json!(0.001));
    }
    of_family(spec, set);
    Value::Object(fields)
}

/// What each family has of its own.
fn of_family(spec: &SynthSpec, mut set: impl FnMut(&str, Value)) {
    match spec.family {
        SynthFamily::Llama => {
            set("attention_bias", json!(false));
            set("head_dim", json!(spec.head_dim));
            set("intermediate_size", json!(spec.intermediate));
            set("mlp_bias", json!(false));
        }
        SynthFamily::Mixtral => {
            set("head_dim", json!(spec.head_dim));
            set("intermediate_size", json!(spec.intermediate));
            set("num_local_experts", json!(spec.experts));
            set("router_jitter_noise", json!(0.0));
            set("sliding_window", Value::Null);
        }
        SynthFamily::TieredMoe => {
            let tier = |tier: &Tier| {
                let placement = match tier.placement {
                    Placement::Hot => "hot",
                    Placement::Warm => "warm",
                    Placement::Cold => "cold",
                };
                let (name, groups, experts) = (&tier.name, tier.groups, tier.group_experts());
                json!({ "name": name, "groups": groups, "experts": experts, "placement": placement })
            };
            let groups = spec.tiers.iter().map(|tier| tier.groups).min().unwrap_or(1);
            set("head_dim", json!(spec.head_dim));
            set("k_tier", json!(spec.tiers.len().min(2)));
            set("k_group", json!(groups.min(2)));
            set("k_expert", json!(spec.top_k));
            set("moe_intermediate_size", json!(spec.intermediate));
            set("norm_topk_prob", json!(true));
            set("tiers", json!(spec.tiers.iter().map(tier).collect::<Vec<_>>()));
        }
        SynthFamily::Olmoe => {
            set("attention_bias", json!(false));
            set("clip_qkv", Value::Null);
            set("intermediate_size", json!(spec.intermediate));
            set("norm_topk_prob", json!(false));
            set("num_experts", json!(spec.experts));
        }
        SynthFamily::Qwen2Moe | SynthFamily::Qwen3Moe => {
            // No layer is dense: the width stands here because readers ask for it.
            set("intermediate_size", json!(spec.intermediate));
            set("moe_intermediate_size", json!(spec.intermediate));
            set("num_experts", json!(spec.experts));
            set("decoder_sparse_step", json!(1));
            set("mlp_only_layers", json!([]));
            set("sliding_window", Value::Null);
            set("use_sliding_window", json!(false));
            if spec.family == SynthFamily::Qwen2Moe {
                set("norm_topk_prob", json!(false));
                set("qkv_bias", json!(true));
                set("shared_expert_intermediate_size", json!(spec.shared_intermediate));
            } else {
                set("attention_bias", json!(false));
                set("head_dim", json!(spec.head_dim));
                set("norm_topk_prob", json!(true));
            }
        }
    }
}

/// `generation_config.json`.
pub(super) fn generation(spec: &SynthSpec) -> Value {
    json!({ "bos_token_id": TURN_START.min(spec.vocab - 1), "eos_token_id": ends(spec), "use_cache": true })
}

fn ends(spec: &SynthSpec) -> Vec<u32> {
    [TURN_END, END].into_iter().filter(|&id| id < spec.vocab).collect()
}
