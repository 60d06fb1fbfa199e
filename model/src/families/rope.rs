//! The rotary embedding that a configuration states, in either spelling.

use crate::arch::{Pairs, Rope, RopeScaling};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

/// What a family has where its configuration is silent.
#[derive(Clone, Copy, Debug)]
pub(super) struct Defaults {
    /// Base of the frequencies.
    pub(super) theta: f64,
    /// The part of a head that is rotated.
    pub(super) partial: f64,
}

/// The key by which a user states the longest sequence to serve, where the published numbers depend on it.
const SERVED: &str = "serve_context";

/// The rotary embedding of heads of this many values, and the longest sequence that it serves.
///
/// Where the numbers depend on how long a sequence is, transformers changes them for all positions once a sequence grows
/// beyond a bound. A position's bits may not depend on how many follow it: here the longest sequence decides, for every
/// position. It is what `serve_context` says, or else the longest for which nothing is changed.
pub(super) fn read(
    config: &Config<'_>,
    head_dim: usize,
    defaults: Defaults,
) -> Result<(Rope, u32), CheckpointError> {
    let parameters = config.part("rope_parameters")?;
    let of_theta = parameters.as_ref().unwrap_or(config);
    let mut theta = of_theta.number_or("rope_theta", defaults.theta)?;
    let part = stated(config)?;
    let stated_context = config.count("max_position_embeddings")?;
    let lengths = lengths(config, part.as_ref(), stated_context)?;
    let partial = match &parameters {
        Some(parameters) if parameters.has("partial_rotary_factor") => {
            parameters.number("partial_rotary_factor")?
        }
        _ => config.number_or("partial_rotary_factor", defaults.partial)?,
    };
    if !(partial > 0.0 && partial <= 1.0) {
        return Err(config.invalid("partial_rotary_factor", "it must be above 0 and at most 1"));
    }
    let (scaling, factor) = match &part {
        None => (RopeScaling::None, 1.0),
        Some(part) => scaling(config, part, stated_context, lengths)?,
    };
    let numbers = match &scaling {
        RopeScaling::None => vec![theta],
        RopeScaling::Linear { factor } => vec![theta, *factor],
        RopeScaling::Llama3 { factor, low, high, original } => vec![theta, *factor, *low, *high, *original],
        RopeScaling::Yarn { factor, fast, slow, original, .. } => {
            vec![theta, *factor, *fast, *slow, *original]
        }
        RopeScaling::Each { factors } => factors.iter().copied().chain([theta]).collect(),
    };
    if numbers.iter().chain([&factor]).any(|number| !(number.is_finite() && *number > 0.0)) {
        return Err(config.invalid("rope_theta", "it and the numbers of its scaling must be positive"));
    }
    let dims = (head_dim as f64 * partial) as usize;
    if let Some(part) = &part
        && kind(part)? == "dynamic"
        && lengths.served > lengths.unchanged
        && dims > 2
    {
        let (factor, dims) = (part.number("factor")?, dims as f64);
        let longer = f64::from(lengths.served) / f64::from(lengths.unchanged);
        theta *= libm::pow(factor * longer - (factor - 1.0), dims / (dims - 2.0));
    }
    if let RopeScaling::Each { factors } = &scaling
        && factors.len() != dims / 2
    {
        let what = format!("it has {} numbers, {} dimensions are rotated", factors.len(), dims);
        return Err(config.invalid("short_factor and long_factor", &what));
    }
    Ok((Rope { theta, dims, pairs: Pairs::Halves, scaling, factor }, lengths.served))
}

/// Lengths of sequences.
#[derive(Clone, Copy, Debug)]
struct Lengths {
    /// The longest for which the numbers are those of short ones.
    unchanged: u32,
    /// The longest that is served.
    served: u32,
}

fn lengths(config: &Config<'_>, part: Option<&Config<'_>>, stated: u32) -> Result<Lengths, CheckpointError> {
    let kind = part.map_or_else(|| Ok("default".into()), kind)?;
    let (unchanged, most) = match (kind.as_str(), part) {
        ("longrope", Some(part)) => {
            let key = "original_max_position_embeddings";
            let original = if config.has(key) { config.count(key)? } else { part.count(key)? };
            (original.min(stated), stated)
        }
        ("dynamic", Some(part)) => {
            let factor = part.number("factor")?;
            if !(factor.is_finite() && factor >= 1.0) {
                return Err(part.invalid("factor", "it must be at least 1"));
            }
            (stated, (f64::from(stated) * factor) as u32)
        }
        _ => (stated, stated),
    };
    let served = if config.has(SERVED) { config.count(SERVED)? } else { unchanged };
    if served > most {
        let what = format!("{served} positions are more than the {most} that this model is made for");
        return Err(config.invalid(SERVED, &what));
    }
    Ok(Lengths { unchanged, served })
}

/// What is done to the frequencies, and the factor of sines and cosines.
fn scaling(
    config: &Config<'_>,
    part: &Config<'_>,
    context: u32,
    lengths: Lengths,
) -> Result<(RopeScaling, f64), CheckpointError> {
    let original = || match config.optional_number("original_max_position_embeddings")? {
        Some(original) => Ok(original),
        None => part.number_or("original_max_position_embeddings", f64::from(context)),
    };
    match kind(part)?.as_str() {
        // `dynamic` has another base where longer sequences are served.
        "default" | "dynamic" => Ok((RopeScaling::None, 1.0)),
        "linear" => Ok((RopeScaling::Linear { factor: part.number("factor")? }, 1.0)),
        "llama3" => {
            let (low, high) = (part.number("low_freq_factor")?, part.number("high_freq_factor")?);
            let original = part.number("original_max_position_embeddings")?;
            Ok((RopeScaling::Llama3 { factor: part.number("factor")?, low, high, original }, 1.0))
        }
        "yarn" => {
            let original = original()?;
            let factor = part.number_or("factor", f64::from(context) / original)?;
            let (all, plain) = (part.number_or("mscale_all_dim", 0.0)?, part.number_or("mscale", 0.0)?);
            let of_amplitude = if all != 0.0 && plain != 0.0 {
                yarn_amplitude(factor, plain) / yarn_amplitude(factor, all)
            } else {
                yarn_amplitude(factor, 1.0)
            };
            let amplitude = part.number_or("attention_factor", of_amplitude)?;
            let nonzero = |number: f64, default| if number == 0.0 { default } else { number };
            let scaling = RopeScaling::Yarn {
                factor,
                fast: nonzero(part.number_or("beta_fast", 32.0)?, 32.0),
                slow: nonzero(part.number_or("beta_slow", 1.0)?, 1.0),
                original,
                truncate: part.flag_or("truncate", true)?,
            };
            Ok((scaling, amplitude))
        }
        "longrope" => {
            let original = original()?;
            let ratio = part.number_or("factor", f64::from(context) / original)?;
            let plain =
                if ratio <= 1.0 { 1.0 } else { (1.0 + libm::log(ratio) / libm::log(original)).sqrt() };
            let amplitude = part.number_or("attention_factor", plain)?;
            let key = if lengths.served > lengths.unchanged { "long_factor" } else { "short_factor" };
            Ok((RopeScaling::Each { factors: part.numbers(key)? }, amplitude))
        }
        other => Err(part.unsupported(
            "rope_type",
            other,
            "default, linear, dynamic, llama3, yarn and longrope are computed",
        )),
    }
}

/// How much longer vectors are made for a context that is longer by this factor.
fn yarn_amplitude(factor: f64, by: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * by * libm::log(factor) + 1.0 }
}

/// How much longer latent attention makes each of its vectors, beside the rotated parts.
pub(super) fn latent_amplitude(config: &Config<'_>) -> Result<f64, CheckpointError> {
    let Some(part) = stated(config)? else { return Ok(1.0) };
    let all = part.number_or("mscale_all_dim", 0.0)?;
    if kind(&part)? == "default" || all == 0.0 {
        return Ok(1.0);
    }
    Ok(yarn_amplitude(part.number("factor")?, all))
}

/// The name of the scaling, under either key.
fn kind(part: &Config<'_>) -> Result<String, CheckpointError> {
    if part.has("rope_type") { part.text("rope_type") } else { part.text_or("type", "default") }
}

/// `short_mscale` or `long_mscale`, by which a family states the factor of sines and cosines that others compute.
pub(super) fn stated_amplitude(config: &Config<'_>, served: u32) -> Result<f64, CheckpointError> {
    let Some(part) = stated(config)? else { return Ok(1.0) };
    let lengths = lengths(config, Some(&part), config.count("max_position_embeddings")?)?;
    let key = if served > lengths.unchanged { "long_mscale" } else { "short_mscale" };
    let amplitude = part.number(key)?;
    if !(amplitude.is_finite() && amplitude > 0.0) {
        return Err(part.invalid(key, "it must be positive"));
    }
    Ok(amplitude)
}

/// The object that states the scaling, if there is one.
fn stated<'a>(config: &Config<'a>) -> Result<Option<Config<'a>>, CheckpointError> {
    let parameters = config.part("rope_parameters")?;
    if parameters.is_some() { Ok(parameters) } else { config.part("rope_scaling") }
}
