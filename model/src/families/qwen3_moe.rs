//! Qwen3-MoE: norms on each head of queries and keys, no shared expert.

use super::DEFAULTS;
use crate::arch::{Arch, Moe, QkNorm};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "qwen3_moe", DEFAULTS)?;
    let bias = config.flag_or("attention_bias", false)?;
    (arch.attention.qkv_bias, arch.attention.o_bias) = (bias, bias);
    arch.attention.qk_norm = QkNorm::PerHead;
    let (experts, width) = (super::experts(config)?, config.size("moe_intermediate_size")?);
    arch.moe = Some(Moe {
        normalise: config.flag_or("norm_topk_prob", false)?,
        ..super::mixture(experts, config.size("num_experts_per_tok")?, width, super::MLP_EXPERTS)
    });
    // In every layer: transformers reads neither `max_window_layers` nor `layer_types` for this family.
    let window = super::used_window(config)?;
    arch.layers.iter_mut().for_each(|layer| layer.window = window);
    super::dense_layers(config, &mut arch)?;
    Ok(arch)
}
