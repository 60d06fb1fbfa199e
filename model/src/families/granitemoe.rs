//! Granite-MoE: constant factors of embedding, scores, residuals and logits; experts in two tensors.

use super::DEFAULTS;
use crate::arch::{Arch, ExpertForm, Moe, Multipliers, Score};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

const EXPERTS: &[ExpertForm] = &[
    ExpertForm::Fused {
        gate_up: "block_sparse_moe.input_linear.weight",
        down: "block_sparse_moe.output_linear.weight",
    },
    super::BLOCK_SPARSE_FUSED,
];

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "granitemoe", DEFAULTS)?;
    let bias = config.flag_or("attention_bias", false)?;
    (arch.attention.qkv_bias, arch.attention.o_bias) = (bias, bias);
    arch.attention.scale = config.number_or("attention_multiplier", 1.0)? as f32;
    arch.multipliers = Multipliers {
        embedding: config.number_or("embedding_multiplier", 1.0)? as f32,
        residual: config.number_or("residual_multiplier", 1.0)? as f32,
        logits: config.number_or("logits_scaling", 1.0)? as f32,
    };
    let (experts, top_k) = (super::experts(config)?, config.size("num_experts_per_tok")?);
    arch.moe = Some(Moe {
        score: Score::SoftmaxOfSelected,
        routers: &["block_sparse_moe.router.layer", "block_sparse_moe.router"],
        ..super::mixture(experts, top_k, config.size("intermediate_size")?, EXPERTS)
    });
    Ok(arch)
}
