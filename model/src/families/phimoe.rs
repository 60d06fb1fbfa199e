//! Phi-3.5-MoE: the sparse mixer selects two experts; norms by mean and variance; biases in attention and output.

use super::{DEFAULTS, Defaults};
use crate::arch::{Arch, Moe, Norm, RopeScaling, Score};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "phimoe", Defaults { theta: 1e6, eps: 1e-5, ..DEFAULTS })?;
    let bias = config.flag_or("attention_bias", false)?;
    (arch.attention.qkv_bias, arch.attention.o_bias) = (bias, bias);
    arch.head_bias = config.flag_or("lm_head_bias", false)?;
    arch.norm = Norm::Layer;
    let window = config.optional_count("sliding_window")?.filter(|&window| window > 0);
    for layer in &mut arch.layers {
        layer.window = window;
    }
    if matches!(arch.rope.scaling, RopeScaling::Each { .. }) {
        // This family states the factor of sines and cosines, where others compute it.
        arch.rope.factor = super::rope::stated_amplitude(config, arch.context)?;
    }
    let (experts, top_k) = (super::experts(config)?, config.size("num_experts_per_tok")?);
    if top_k != 2 {
        return Err(config.unsupported(
            "num_experts_per_tok",
            &top_k.to_string(),
            "the sparse mixer selects 2",
        ));
    }
    let jitter = config.number_or("router_jitter_noise", 0.01)? as f32;
    if !(jitter.is_finite() && jitter >= 0.0) {
        return Err(config.invalid("router_jitter_noise", "it must be a small positive number"));
    }
    arch.moe = Some(Moe {
        score: Score::Sparsemixer { jitter },
        routers: &["block_sparse_moe.gate", "mlp.router"],
        ..super::mixture(experts, top_k, config.size("intermediate_size")?, super::BLOCK_SPARSE_EXPERTS)
    });
    Ok(arch)
}
