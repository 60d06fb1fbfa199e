//! Qwen2-MoE: biases on queries, keys and values; a shared expert behind a sigmoid gate.

use super::DEFAULTS;
use crate::arch::{Arch, Moe, Shared};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "qwen2_moe", DEFAULTS)?;
    arch.attention.qkv_bias = config.flag_or("qkv_bias", true)?;
    let (experts, width) = (super::experts(config)?, config.size("moe_intermediate_size")?);
    let shared = config.size("shared_expert_intermediate_size")?;
    arch.moe = Some(Moe {
        normalise: config.flag_or("norm_topk_prob", false)?,
        shared: Some(Shared { name: "mlp.shared_expert", intermediate: shared, gated: true }),
        ..super::mixture(experts, config.size("num_experts_per_tok")?, width, super::MLP_EXPERTS)
    });
    let below = config.optional_count("max_window_layers")?.unwrap_or(28) as usize;
    let window = super::used_window(config)?;
    super::windows_by(config, &mut arch, window, |layer| layer % 2 == 0 && layer < below)?;
    super::dense_layers(config, &mut arch)?;
    Ok(arch)
}
