//! The families: each file turns the `config.json` of one `model_type` into an [`Arch`].
//!
//! To add one, write its file and its line in [`FAMILIES`].

mod llama;
mod mixtral;
mod olmoe;
mod qwen2_moe;
mod qwen3_moe;
mod tiered_moe;

use crate::arch::{Arch, Layer, MoeNames, QkNorm, Rope, RopeScaling};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

/// More layers than any model has.
const LAYERS_MAX: usize = 4096;
/// More experts than any layer has.
const EXPERTS_MAX: usize = 1 << 20;

type Read = fn(&Config<'_>) -> Result<Arch, CheckpointError>;

/// Every family by its `model_type`.
pub const FAMILIES: &[(&str, Read)] = &[
    ("llama", llama::read),
    ("mixtral", mixtral::read),
    ("olmoe", olmoe::read),
    ("qwen2_moe", qwen2_moe::read),
    ("qwen3_moe", qwen3_moe::read),
    ("tiered_moe", tiered_moe::read),
];

/// Experts as `mlp.experts.N.{gate,up,down}_proj`, the router as `mlp.gate`.
const MLP_EXPERTS: MoeNames =
    MoeNames { block: "mlp", router: "gate", expert: ["gate_proj", "up_proj", "down_proj"] };

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
    if let Some(method) = config.quantisation() {
        return Err(config.unsupported(
            "quantization_config",
            &method,
            "give the checkpoint with plain weights",
        ));
    }
    let arch = read(config)?;
    check(config, &arch)?;
    Ok(arch)
}

/// What all families share; each changes what is its own.
fn common(config: &Config<'_>, family: &'static str) -> Result<Arch, CheckpointError> {
    let activation = config.text_or("hidden_act", "silu")?;
    if activation != "silu" {
        return Err(config.unsupported("hidden_act", &activation, "only silu is computed"));
    }
    let hidden = config.size("hidden_size")?;
    let heads = config.size("num_attention_heads")?;
    let head_dim = config.size_or("head_dim", hidden / heads.max(1))?;
    let layers = config.size("num_hidden_layers")?;
    if layers > LAYERS_MAX {
        return Err(config.invalid("num_hidden_layers", "no model has that many"));
    }
    Ok(Arch {
        family,
        hidden,
        heads,
        kv_heads: config.size_or("num_key_value_heads", heads)?,
        head_dim,
        vocab: config.size("vocab_size")?,
        context: config.count("max_position_embeddings")?,
        norm_eps: config.number_or("rms_norm_eps", 1e-6)? as f32,
        rope: rope(config, head_dim)?,
        qk_norm: QkNorm::None,
        qkv_bias: false,
        o_bias: false,
        clip_qkv: None,
        tied: config.flag_or("tie_word_embeddings", false)?,
        layers: vec![Layer { window: None, dense: None }; layers],
        moe: None,
        eos: config.tokens("eos_token_id")?,
    })
}

fn rope(config: &Config<'_>, dims: usize) -> Result<Rope, CheckpointError> {
    let parameters = config.part("rope_parameters")?;
    let scaling = match &parameters {
        Some(parameters) => Some(parameters.clone()),
        None => config.part("rope_scaling")?,
    };
    let theta = match &parameters {
        Some(parameters) => parameters.number_or("rope_theta", 10000.0)?,
        None => config.number_or("rope_theta", 10000.0)?,
    };
    let scaling = match scaling {
        None => RopeScaling::None,
        Some(part) => {
            let kind = if part.has("rope_type") {
                part.text("rope_type")?
            } else {
                part.text_or("type", "default")?
            };
            match kind.as_str() {
                "default" => RopeScaling::None,
                "linear" => RopeScaling::Linear { factor: part.number("factor")? },
                "llama3" => RopeScaling::Llama3 {
                    factor: part.number("factor")?,
                    low: part.number("low_freq_factor")?,
                    high: part.number("high_freq_factor")?,
                    original: part.number("original_max_position_embeddings")?,
                },
                other => {
                    return Err(part.unsupported(
                        "rope_type",
                        other,
                        "default, linear and llama3 are computed",
                    ));
                }
            }
        }
    };
    let numbers = match scaling {
        RopeScaling::None => vec![theta],
        RopeScaling::Linear { factor } => vec![theta, factor],
        RopeScaling::Llama3 { factor, low, high, original } => vec![theta, factor, low, high, original],
    };
    if numbers.iter().any(|number| !(number.is_finite() && *number > 0.0)) {
        return Err(config.invalid("rope_theta", "it and the numbers of its scaling must be positive"));
    }
    Ok(Rope { theta, dims, scaling })
}

/// Windows by `layer_types`, or by `use_sliding_window` for the layers from `max_window_layers` on.
fn windows(config: &Config<'_>, arch: &mut Arch) -> Result<(), CheckpointError> {
    let used = config.flag_or("use_sliding_window", false)?;
    let window = config.optional_count("sliding_window")?.filter(|&window| used && window > 0);
    let from = config.size_or("max_window_layers", 0)?;
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
            None => i >= from,
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
    if !arch.heads.is_multiple_of(arch.kv_heads) {
        return Err(config.invalid("num_key_value_heads", "it must divide num_attention_heads"));
    }
    if !arch.rope.dims.is_multiple_of(2) || arch.rope.dims > arch.head_dim {
        return Err(config.invalid("head_dim", "the rotated dimensions must be even and within the head"));
    }
    if !(arch.norm_eps.is_finite() && arch.norm_eps >= 0.0) {
        return Err(config.invalid("rms_norm_eps", "it must be a small positive number"));
    }
    if let Some(moe) = &arch.moe
        && (moe.top_k == 0 || moe.top_k > moe.experts)
    {
        return Err(config.invalid("num_experts_per_tok", "it must be 1 to the number of experts"));
    }
    Ok(())
}
