//! GLM-4-MoE: the router of DeepSeek-V3 over plain attention, of whose heads only a part is rotated.

use super::{DEFAULTS, Defaults};
use crate::arch::{Arch, Moe, QkNorm, Score};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;
use lite_llm_core::routing::GroupScore;

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "glm4_moe", Defaults { partial: 0.5, eps: 1e-5, ..DEFAULTS })?;
    arch.attention.qkv_bias = config.flag_or("attention_bias", false)?;
    if config.flag_or("use_qk_norm", false)? {
        arch.attention.qk_norm = QkNorm::PerHead;
    }
    let (experts, top_k) = (super::experts(config)?, config.size("num_experts_per_tok")?);
    let width = config.size("moe_intermediate_size")?;
    let shared = config.optional_count("n_shared_experts")?.map_or(0, |n| n as usize);
    arch.moe = Some(Moe {
        score: Score::Sigmoid,
        normalise: config.flag_or("norm_topk_prob", true)?,
        scaling: config.number_or("routed_scaling_factor", 1.0)? as f32,
        group_limit: super::group_limit(config, experts, GroupScore::SumOfTop2)?,
        shared: super::deepseek::shared_experts(shared, width),
        ..super::mixture(experts, top_k, width, super::MLP_EXPERTS)
    });
    super::first_dense(config, &mut arch)?;
    Ok(arch)
}
