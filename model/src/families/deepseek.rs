//! DeepSeek-V2 and -V3: latent attention, groups of experts of which the best are selected from, shared experts, dense
//! layers first. V3 routes by sigmoids with a bias that only selects, and makes its queries in two steps.

use super::DEFAULTS;
use crate::arch::{Arch, Latent, Moe, Pairs, Score, Shared};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;
use lite_llm_core::routing::GroupScore;

pub(super) fn read_v2(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = common(config, "deepseek_v2", "softmax")?;
    for key in ["norm_topk_prob", "mlp_bias"] {
        if config.flag_or(key, false)? {
            return Err(config.unsupported(key, "true", "this family is computed without"));
        }
    }
    let Some(moe) = &mut arch.moe else { return Ok(arch) };
    let method = config.text_or("topk_method", "greedy")?;
    moe.group_limit = match method.as_str() {
        "greedy" => None,
        "group_limited_greedy" => super::group_limit(config, moe.experts, GroupScore::Max)?,
        other => {
            let known = "greedy and group_limited_greedy are computed";
            return Err(config.unsupported("topk_method", other, known));
        }
    };
    Ok(arch)
}

pub(super) fn read_v3(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = common(config, "deepseek_v3", "sigmoid")?;
    if !config.flag_or("rope_interleave", true)? {
        arch.rope.pairs = Pairs::Halves;
    }
    let method = config.text_or("topk_method", "noaux_tc")?;
    if method != "noaux_tc" {
        return Err(config.unsupported("topk_method", &method, "noaux_tc is computed"));
    }
    // No tensor shows them, and other programs take other numbers where they are missing.
    for key in ["routed_scaling_factor", "n_group", "topk_group"] {
        config.number(key)?;
    }
    if let Some(moe) = &mut arch.moe {
        moe.group_limit = super::group_limit(config, moe.experts, GroupScore::SumOfTop2)?;
        moe.score = Score::Sigmoid;
        moe.normalise = config.flag_or("norm_topk_prob", true)?;
    }
    Ok(arch)
}

fn common(config: &Config<'_>, family: &'static str, scoring: &str) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, family, DEFAULTS)?;
    let found = config.text_or("scoring_func", scoring)?;
    if found != scoring {
        return Err(config.unsupported(
            "scoring_func",
            &found,
            &format!("{scoring} is computed for {family}"),
        ));
    }
    if config.size_or("moe_layer_freq", 1)? != 1 {
        return Err(config.unsupported(
            "moe_layer_freq",
            "above 1",
            "every layer after the dense ones is a mixture",
        ));
    }
    let (plain, rotated) = (config.size("qk_nope_head_dim")?, config.size("qk_rope_head_dim")?);
    let query_rank = config.optional_count("q_lora_rank")?.map(|rank| rank as usize).filter(|&rank| rank > 0);
    let bias = config.flag_or("attention_bias", false)?;
    let of_rope = super::rope::Defaults { theta: DEFAULTS.theta, partial: DEFAULTS.partial };
    (arch.rope, arch.context) = super::rope::read(config, rotated, of_rope)?;
    arch.rope.pairs = Pairs::Neighbours;
    let attention = &mut arch.attention;
    (attention.qkv_bias, attention.o_bias) = (bias, bias);
    attention.kv_heads = attention.heads;
    attention.head_dim = plain + rotated;
    attention.value_dim = config.size("v_head_dim")?;
    attention.latent = Some(Latent { query_rank, rank: config.size("kv_lora_rank")?, plain });
    let longer = super::rope::latent_amplitude(config)?;
    attention.scale = (longer * longer / (attention.head_dim as f64).sqrt()) as f32;
    let width = config.size("moe_intermediate_size")?;
    let shared = config.optional_count("n_shared_experts")?.map_or(0, |n| n as usize);
    let (experts, top_k) = (super::experts(config)?, config.size("num_experts_per_tok")?);
    arch.moe = Some(Moe {
        scaling: config.number_or("routed_scaling_factor", 1.0)? as f32,
        shared: shared_experts(shared, width),
        ..super::mixture(experts, top_k, width, super::MLP_EXPERTS)
    });
    super::first_dense(config, &mut arch)?;
    Ok(arch)
}

/// Several shared experts are published as one of their width together.
pub(super) fn shared_experts(count: usize, width: usize) -> Option<Shared> {
    let intermediate = count.saturating_mul(width);
    (count > 0).then_some(Shared { name: "mlp.shared_experts", intermediate, gated: false })
}
