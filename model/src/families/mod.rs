//! The families: each file turns the `config.json` of one `model_type` into an [`Arch`].
//!
//! To add one, write its file and its line in [`FAMILIES`].

mod deepseek;
mod glm4_moe;
mod gpt_oss;
mod granitemoe;
mod llama;
mod mixtral;
mod olmoe;
mod phimoe;
mod qwen2_moe;
mod qwen3_moe;
mod rope;
mod tiered_moe;

use crate::arch::{Activation, Arch, Attention, ExpertForm, Layer, Moe, Multipliers, Norm, QkNorm, Score};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;
use lite_llm_core::routing::{GroupLimit, GroupScore};

/// More layers than any model has.
const LAYERS_MAX: usize = 4096;
/// More experts than any layer has.
const EXPERTS_MAX: usize = 1 << 20;

type Read = fn(&Config<'_>) -> Result<Arch, CheckpointError>;

/// Every family by its `model_type`.
pub const FAMILIES: &[(&str, Read)] = &[
    ("deepseek_v2", deepseek::read_v2),
    ("deepseek_v3", deepseek::read_v3),
    ("glm4_moe", glm4_moe::read),
    ("gpt_oss", gpt_oss::read),
    ("granitemoe", granitemoe::read),
    ("llama", llama::read),
    ("mixtral", mixtral::read),
    ("olmoe", olmoe::read),
    ("phimoe", phimoe::read),
    ("qwen2_moe", qwen2_moe::read),
    ("qwen3_moe", qwen3_moe::read),
    ("tiered_moe", tiered_moe::read),
];

/// The form in which transformers 5 writes the experts of any family, if it is asked not to write the hub's.
const FUSED: ExpertForm =
    ExpertForm::Fused { gate_up: "mlp.experts.gate_up_proj", down: "mlp.experts.down_proj" };
/// Experts as `mlp.experts.N.{gate,up,down}_proj`.
const MLP_EXPERTS: &[ExpertForm] =
    &[ExpertForm::Apart { block: "mlp.experts", names: ["gate_proj", "up_proj", "down_proj"] }, FUSED];
/// Experts as `block_sparse_moe.experts.N.{w1,w3,w2}`: gate, up and down.
const BLOCK_SPARSE_EXPERTS: &[ExpertForm] = &[
    ExpertForm::Apart { block: "block_sparse_moe.experts", names: ["w1", "w3", "w2"] },
    FUSED,
    BLOCK_SPARSE_FUSED,
];
/// The same in two tensors.
const BLOCK_SPARSE_FUSED: ExpertForm = ExpertForm::Fused {
    gate_up: "block_sparse_moe.experts.gate_up_proj",
    down: "block_sparse_moe.experts.down_proj",
};

/// The architecture that a configuration states.
///
/// # Errors
/// Names what is unknown, missing, impossible or not supported.
pub fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let family = config.text("model_type")?;
    let Some((_, read)) = FAMILIES.iter().find(|(name, _)| *name == family) else {
        let known: Vec<&str> = FAMILIES.iter().map(|(name, _)| *name).collect();
        return Err(config.unsupported(
            "model_type",
            &family,
            &format!("this program knows {}", known.join(", ")),
        ));
    };
    quantisation(config, &family)?;
    let arch = read(config)?;
    check(config, &arch)?;
    Ok(arch)
}

/// What transformers takes where a configuration is silent.
#[derive(Clone, Copy, Debug)]
struct Defaults {
    /// Base of the rotary frequencies.
    theta: f64,
    /// The part of a head that is rotated.
    partial: f64,
    /// Epsilon of norms.
    eps: f64,
}

/// What most families take.
const DEFAULTS: Defaults = Defaults { theta: 10000.0, partial: 1.0, eps: 1e-6 };

/// Experts of a layer, by whichever of their names is there.
fn experts(config: &Config<'_>) -> Result<usize, CheckpointError> {
    let names = ["num_experts", "num_local_experts", "n_routed_experts"];
    let mut there = names.into_iter().filter(|name| config.has(name));
    let name = there.next().unwrap_or(names[0]);
    let count = config.size(name)?;
    match there.find(|other| config.size(other).is_ok_and(|other| other != count)) {
        None => Ok(count),
        Some(other) => Err(config.invalid(other, &format!("it contradicts {name}, which is {count}"))),
    }
}

/// What all families share; each changes what is its own.
fn common(config: &Config<'_>, family: &'static str, defaults: Defaults) -> Result<Arch, CheckpointError> {
    let activation = config.text_or("hidden_act", "silu")?;
    if activation != "silu" && activation != "swish" {
        return Err(config.unsupported("hidden_act", &activation, "only silu is computed"));
    }
    let hidden = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let head_dim = config.size_or("head_dim", hidden / heads.max(1))?;
    let layers = config.size("num_hidden_layers")?;
    if layers > LAYERS_MAX {
        return Err(config.invalid("num_hidden_layers", "no model has that many"));
    }
    let of_rope = rope::Defaults { theta: defaults.theta, partial: defaults.partial };
    let (rope, context) = rope::read(config, head_dim, of_rope)?;
    Ok(Arch {
        family,
        hidden,
        vocab: config.size("vocab_size")?,
        context,
        norm: Norm::Rms,
        norm_eps: config.number_or("rms_norm_eps", defaults.eps)? as f32,
        attention: Attention {
            heads,
            kv_heads: config.size_or("num_key_value_heads", heads)?,
            head_dim,
            value_dim: head_dim,
            scale: 1.0 / (head_dim as f32).sqrt(),
            qk_norm: QkNorm::None,
            qkv_bias: false,
            o_bias: false,
            clip_qkv: None,
            sinks: false,
            latent: None,
        },
        rope,
        multipliers: Multipliers { embedding: 1.0, residual: 1.0, logits: 1.0 },
        tied: config.flag_or("tie_word_embeddings", false)?,
        head_bias: false,
        layers: vec![Layer { window: None, dense: None }; layers],
        moe: None,
        eos: config.tokens("eos_token_id")?,
    })
}

/// A mixture of which each family changes what is its own.
const fn mixture(experts: usize, top_k: usize, intermediate: usize, forms: &'static [ExpertForm]) -> Moe {
    Moe {
        experts,
        top_k,
        intermediate,
        score: Score::Softmax,
        normalise: false,
        scaling: 1.0,
        group_limit: None,
        tiered: None,
        router_bias: false,
        activation: Activation::SwiGlu,
        expert_bias: false,
        shared: None,
        routers: &["mlp.gate"],
        forms,
    }
}

/// The methods whose weights are decoded: block-scaled E4M3, and MXFP4 where a family is published so.
fn quantisation(config: &Config<'_>, family: &str) -> Result<(), CheckpointError> {
    let Some(part) = config.part("quantization_config")? else { return Ok(()) };
    let method = part.text_or("quant_method", "unnamed")?;
    let fp8 = || {
        Ok::<_, CheckpointError>(
            part.text_or("fmt", "e4m3")? == "e4m3" && part.counts("weight_block_size")? == [128, 128],
        )
    };
    match method.as_str() {
        "mxfp4" if family == "gpt_oss" => Ok(()),
        "fp8" if fp8()? => Ok(()),
        _ => Err(config.unsupported(
            "quantization_config",
            &method,
            "give the checkpoint with plain weights, as E4M3 with scales of 128 x 128 blocks, or gpt_oss as MXFP4",
        )),
    }
}

/// Layers before `first_k_dense_replace` are dense.
fn first_dense(config: &Config<'_>, arch: &mut Arch) -> Result<(), CheckpointError> {
    let first = config.optional_count("first_k_dense_replace")?.unwrap_or(0) as usize;
    let width = config.size("intermediate_size")?;
    for layer in arch.layers.iter_mut().take(first) {
        layer.dense = Some(width);
    }
    if first >= arch.layers.len() {
        arch.moe = None;
    }
    Ok(())
}

/// Groups of experts of which only the best are selected from; no limit where there is one group, or all stay.
fn group_limit(
    config: &Config<'_>,
    experts: usize,
    score: GroupScore,
) -> Result<Option<GroupLimit>, CheckpointError> {
    let (groups, keep) = (config.size_or("n_group", 1)?, config.size_or("topk_group", 1)?);
    if !experts.is_multiple_of(groups) || keep > groups {
        return Err(config.invalid("n_group", "it must divide the experts, and be at least topk_group"));
    }
    if score == GroupScore::SumOfTop2 && experts / groups < 2 {
        return Err(config.invalid("n_group", "groups are scored by two experts, and have one"));
    }
    let selected = config.size("num_experts_per_tok")?;
    if experts / groups * keep < selected {
        let what =
            format!("{keep} groups of {} experts are fewer than the {selected} selected", experts / groups);
        return Err(config.invalid("topk_group", &what));
    }
    Ok((keep < groups).then_some(GroupLimit { groups, keep, score }))
}

/// `sliding_window` where `use_sliding_window` is true.
fn used_window(config: &Config<'_>) -> Result<Option<u32>, CheckpointError> {
    if !config.flag_or("use_sliding_window", false)? {
        return Ok(None);
    }
    config.count("sliding_window").map(Some)
}

/// Windows by `layer_types`, or by a rule where the configuration does not list them.
fn windows_by(
    config: &Config<'_>,
    arch: &mut Arch,
    window: Option<u32>,
    rule: impl Fn(usize) -> bool,
) -> Result<(), CheckpointError> {
    let kinds = config.texts("layer_types")?;
    for (i, layer) in arch.layers.iter_mut().enumerate() {
        let slides = match &kinds {
            Some(kinds) => match kinds.get(i).map(String::as_str) {
                Some("full_attention") => false,
                Some("sliding_attention") => true,
                other => {
                    return Err(config.unsupported(
                        "layer_types",
                        other.unwrap_or("nothing"),
                        "full_attention and sliding_attention are computed, one for each layer",
                    ));
                }
            },
            None => rule(i),
        };
        layer.window = window.filter(|_| slides);
    }
    Ok(())
}

/// Layers that are dense by `mlp_only_layers` and `decoder_sparse_step`.
fn dense_layers(config: &Config<'_>, arch: &mut Arch) -> Result<(), CheckpointError> {
    let only = config.counts("mlp_only_layers")?;
    let step = config.size_or("decoder_sparse_step", 1)?.max(1);
    let width = config.size("intermediate_size")?;
    for (i, layer) in arch.layers.iter_mut().enumerate() {
        let dense = only.contains(&(i as u32)) || !(i + 1).is_multiple_of(step);
        layer.dense = dense.then_some(width);
    }
    if arch.layers.iter().all(|layer| layer.dense.is_some()) {
        arch.moe = None;
    }
    Ok(())
}

/// What must hold for any architecture before anything is allocated.
fn check(config: &Config<'_>, arch: &Arch) -> Result<(), CheckpointError> {
    if !arch.attention.heads.is_multiple_of(arch.attention.kv_heads) {
        return Err(config.invalid("num_key_value_heads", "it must divide num_attention_heads"));
    }
    if !arch.rope.dims.is_multiple_of(2) || arch.rope.dims > arch.attention.head_dim {
        return Err(config.invalid("head_dim", "the rotated dimensions must be even and within the head"));
    }
    if !(arch.norm_eps.is_finite() && arch.norm_eps >= 0.0) {
        return Err(config.invalid("rms_norm_eps", "it must be a small positive number"));
    }
    let numbers = [arch.attention.scale, arch.multipliers.embedding, arch.multipliers.residual];
    let divisor = arch.multipliers.logits;
    if !(numbers.iter().all(|number| number.is_finite()) && divisor.is_finite() && divisor > 0.0) {
        return Err(
            config.invalid("logits_scaling", "it and the multipliers must be finite, and it positive")
        );
    }
    if let Some(moe) = &arch.moe
        && (moe.top_k == 0 || moe.top_k > moe.experts)
    {
        return Err(config.invalid("num_experts_per_tok", "it must be 1 to the number of experts"));
    }
    Ok(())
}
