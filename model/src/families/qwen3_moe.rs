//! Qwen3-MoE: norms on each head of queries and keys, no shared expert.

use crate::arch::{Arch, Moe, QkNorm};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "qwen3_moe")?;
    let bias = config.flag_or("attention_bias", false)?;
    (arch.attention.qkv_bias, arch.attention.o_bias) = (bias, bias);
    arch.attention.qk_norm = QkNorm::PerHead;
    // transformers 5 writes another key than the hub.
    let experts = if config.has("num_experts") { "num_experts" } else { "num_local_experts" };
    let (experts, width) = (config.size(experts)?, config.size("moe_intermediate_size")?);
    arch.moe = Some(Moe {
        normalise: config.flag_or("norm_topk_prob", false)?,
        ..super::mixture(experts, config.size("num_experts_per_tok")?, width, super::MLP_EXPERTS)
    });
    super::windows(config, &mut arch)?;
    super::dense_layers(config, &mut arch)?;
    Ok(arch)
}
