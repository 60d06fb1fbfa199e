//! OLMoE: norms over the whole query and key projections, weights of the selected as the softmax gives them.

use crate::arch::{Arch, Moe, QkNorm};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "olmoe")?;
    let bias = config.flag_or("attention_bias", false)?;
    (arch.qkv_bias, arch.o_bias) = (bias, bias);
    arch.qk_norm = QkNorm::Whole;
    arch.clip_qkv = config.optional_number("clip_qkv")?.map(|limit| limit as f32);
    arch.moe = Some(Moe {
        experts: config.size("num_experts")?,
        top_k: config.size("num_experts_per_tok")?,
        intermediate: config.size("intermediate_size")?,
        normalise: config.flag_or("norm_topk_prob", false)?,
        group_limit: None,
        tiered: None,
        shared: None,
        names: super::MLP_EXPERTS,
    });
    Ok(arch)
}
