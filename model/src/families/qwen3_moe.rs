//! Qwen3-MoE: norms on each head of queries and keys, no shared expert.

use crate::arch::{Arch, Moe, QkNorm};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "qwen3_moe")?;
    let bias = config.flag_or("attention_bias", false)?;
    (arch.qkv_bias, arch.o_bias) = (bias, bias);
    arch.qk_norm = QkNorm::PerHead;
    // transformers 5 writes another key than the hub.
    let experts = if config.has("num_experts") { "num_experts" } else { "num_local_experts" };
    arch.moe = Some(Moe {
        experts: config.size(experts)?,
        top_k: config.size("num_experts_per_tok")?,
        intermediate: config.size("moe_intermediate_size")?,
        normalise: config.flag_or("norm_topk_prob", false)?,
        group_limit: None,
        tiered: None,
        shared: None,
        names: super::MLP_EXPERTS,
    });
    super::windows(config, &mut arch)?;
    super::dense_layers(config, &mut arch)?;
    Ok(arch)
}
