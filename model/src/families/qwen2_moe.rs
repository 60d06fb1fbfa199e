//! Qwen2-MoE: biases on queries, keys and values; a shared expert behind a sigmoid gate.

use crate::arch::{Arch, Moe, Shared};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "qwen2_moe")?;
    arch.qkv_bias = config.flag_or("qkv_bias", true)?;
    arch.moe = Some(Moe {
        experts: config.size("num_experts")?,
        top_k: config.size("num_experts_per_tok")?,
        intermediate: config.size("moe_intermediate_size")?,
        normalise: config.flag_or("norm_topk_prob", false)?,
        group_limit: None,
        tiered: None,
        shared: Some(Shared { intermediate: config.size("shared_expert_intermediate_size")?, gated: true }),
        names: super::MLP_EXPERTS,
    });
    super::windows(config, &mut arch)?;
    super::dense_layers(config, &mut arch)?;
    Ok(arch)
}
