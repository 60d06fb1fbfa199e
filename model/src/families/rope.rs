//! The rotary embedding that a configuration states, in either spelling.

use crate::arch::{Pairs, Rope, RopeScaling};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

/// The rotary embedding of heads of this many values.
pub(super) fn read(config: &Config<'_>, head_dim: usize, context: u32) -> Result<Rope, CheckpointError> {
    let parameters = config.part("rope_parameters")?;
    let of_theta = parameters.as_ref().unwrap_or(config);
    let theta = of_theta.number_or("rope_theta", 10000.0)?;
    let part = stated(config)?;
    let partial = match &parameters {
        Some(parameters) if parameters.has("partial_rotary_factor") => {
            parameters.number("partial_rotary_factor")?
        }
        _ => config.number_or("partial_rotary_factor", 1.0)?,
    };
    if !(partial > 0.0 && partial <= 1.0) {
        return Err(config.invalid("partial_rotary_factor", "it must be above 0 and at most 1"));
    }
    let (scaling, factor) = match &part {
        None => (RopeScaling::None, 1.0),
        Some(part) => scaling(config, part, context)?,
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
    if let RopeScaling::Each { factors } = &scaling
        && factors.len() != dims / 2
    {
        let what = format!("it has {} numbers, {} dimensions are rotated", factors.len(), dims);
        return Err(config.invalid("short_factor", &what));
    }
    Ok(Rope { theta, dims, pairs: Pairs::Halves, scaling, factor })
}

/// What is done to the frequencies, and the factor of sines and cosines.
fn scaling(
    config: &Config<'_>,
    part: &Config<'_>,
    context: u32,
) -> Result<(RopeScaling, f64), CheckpointError> {
    let original = || match config.optional_number("original_max_position_embeddings")? {
        Some(original) => Ok(original),
        None => part.number_or("original_max_position_embeddings", f64::from(context)),
    };
    match kind(part)?.as_str() {
        // Nothing is scaled within the context that the model was trained for, and no longer one is served.
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
            Ok((RopeScaling::Each { factors: part.numbers("short_factor")? }, amplitude))
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

/// `short_mscale`, by which some families state the factor of sines and cosines of short sequences.
pub(super) fn short_amplitude(config: &Config<'_>) -> Result<f64, CheckpointError> {
    let amplitude = stated(config)?.map_or(Ok(1.0), |part| part.number("short_mscale"))?;
    if !(amplitude.is_finite() && amplitude > 0.0) {
        return Err(config.invalid("short_mscale", "it must be positive"));
    }
    Ok(amplitude)
}

/// The longest sequence that is computed with the numbers for short ones, where there are two kinds: for a longer one
/// every position, those before it too, would need the others.
pub(super) fn short_context(config: &Config<'_>, context: u32) -> Result<u32, CheckpointError> {
    let key = "original_max_position_embeddings";
    let original = match stated(config)? {
        _ if config.has(key) => config.count(key)?,
        Some(part) => part.count(key)?,
        None => context,
    };
    Ok(original.min(context))
}

/// The object that states the scaling, if there is one.
fn stated<'a>(config: &Config<'a>) -> Result<Option<Config<'a>>, CheckpointError> {
    let parameters = config.part("rope_parameters")?;
    if parameters.is_some() { Ok(parameters) } else { config.part("rope_scaling") }
}
