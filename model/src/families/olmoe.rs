//! OLMoE: norms over the whole query and key projections, weights of the selected as the softmax gives them.

use super::{DEFAULTS, Defaults};
use crate::arch::{Arch, Moe, QkNorm};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "olmoe", Defaults { eps: 1e-5, ..DEFAULTS })?;
    let bias = config.flag_or("attention_bias", false)?;
    (arch.attention.qkv_bias, arch.attention.o_bias) = (bias, bias);
    arch.attention.qk_norm = QkNorm::Whole;
    arch.attention.clip_qkv = config.optional_number("clip_qkv")?.map(|limit| limit as f32);
    let (experts, width) = (super::experts(config)?, config.size("intermediate_size")?);
    arch.moe = Some(Moe {
        normalise: config.flag_or("norm_topk_prob", false)?,
        ..super::mixture(experts, config.size("num_experts_per_tok")?, width, super::MLP_EXPERTS)
    });
    Ok(arch)
}
