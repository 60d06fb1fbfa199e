//! gpt-oss: a sink in every head's softmax, windows in every other layer, a clamped gate, biases everywhere, and experts
//! whose matrices are published transposed, or as MXFP4.

use super::{DEFAULTS, Defaults};
use crate::arch::{Activation, Arch, ExpertForm, Moe, Score};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

const EXPERTS: &[ExpertForm] =
    &[ExpertForm::Columns { gate_up: "mlp.experts.gate_up_proj", down: "mlp.experts.down_proj" }];

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "gpt_oss", Defaults { theta: 150_000.0, eps: 1e-5, ..DEFAULTS })?;
    if !config.has("rope_parameters") && !config.has("rope_scaling") {
        return Err(config.invalid("rope_scaling", "it is missing, and this family is never without"));
    }
    let bias = config.flag_or("attention_bias", true)?;
    (arch.attention.qkv_bias, arch.attention.o_bias) = (bias, bias);
    arch.attention.sinks = true;
    let window = config.optional_count("sliding_window")?.filter(|&window| window > 0);
    // Where the configuration does not say: every other layer, the first of them.
    super::windows_by(config, &mut arch, window, |layer| layer % 2 == 0)?;
    let (experts, top_k) = (super::experts(config)?, config.size("num_experts_per_tok")?);
    let (alpha, limit) = (config.number_or("swiglu_alpha", 1.702)?, config.number_or("swiglu_limit", 7.0)?);
    arch.moe = Some(Moe {
        score: Score::SoftmaxOfSelected,
        router_bias: true,
        activation: Activation::Clamped { alpha: alpha as f32, limit: limit as f32 },
        expert_bias: true,
        routers: &["mlp.router"],
        ..super::mixture(experts, top_k, config.size("intermediate_size")?, EXPERTS)
    });
    Ok(arch)
}
