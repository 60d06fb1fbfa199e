//! What a request asks for, as flags.

use crate::quantity::duration;
use clap::{Args, ValueEnum};
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::{Body, Priority, Sampling};
use std::time::Duration;

/// What a request asks for, besides its prompt.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Request")]
pub(crate) struct RequestArgs {
    /// The most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128)]
    pub(crate) max_tokens: u32,
    /// 0 always takes the likeliest token
    #[arg(long, value_name = "T", default_value_t = 0.0, value_parser = non_negative)]
    pub(crate) temperature: f32,
    /// Only the likeliest N tokens; 0 for all
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) top_k: u32,
    /// Only the likeliest tokens that together have this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = probability)]
    pub(crate) top_p: f32,
    /// Only tokens at least this likely, relative to the likeliest
    #[arg(long, value_name = "P", default_value_t = 0.0, value_parser = probability)]
    pub(crate) min_p: f32,
    /// Divides the logits of tokens already seen; 1 changes nothing
    #[arg(long, value_name = "R", default_value_t = 1.0, value_parser = positive)]
    pub(crate) repetition_penalty: f32,
    /// Seed of the draws
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) seed: u64,
    /// End the stream at this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    pub(crate) stop: Vec<String>,
    /// Go on past the tokens that end a stream
    #[arg(long)]
    pub(crate) ignore_eos: bool,
    /// End the request unfinished after this time
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) deadline: Option<Duration>,
    /// Whether somebody waits for it
    #[arg(long, value_name = "P", default_value = "interactive")]
    pub(crate) priority: PriorityName,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum PriorityName {
    Interactive,
    Batch,
}

impl From<PriorityName> for Priority {
    fn from(name: PriorityName) -> Self {
        match name {
            PriorityName::Interactive => Self::Interactive,
            PriorityName::Batch => Self::Batch,
        }
    }
}

/// A request id on the command line.
pub(crate) fn request_id(text: &str) -> Result<RequestId, String> {
    RequestId::new(text).map_err(String::from)
}

fn float(text: &str, holds: impl Fn(f32) -> bool, what: &str) -> Result<f32, String> {
    let value: f32 = text.parse().map_err(|_| format!("{text:?} is no number"))?;
    if value.is_finite() && holds(value) { Ok(value) } else { Err(format!("it must be {what}")) }
}

fn non_negative(text: &str) -> Result<f32, String> {
    float(text, |x| x >= 0.0, "0 or more")
}

fn positive(text: &str) -> Result<f32, String> {
    float(text, |x| x > 0.0, "more than 0")
}

fn probability(text: &str) -> Result<f32, String> {
    float(text, |x| (0.0..=1.0).contains(&x), "0 to 1")
}

impl RequestArgs {
    /// The request for a prompt.
    pub(crate) fn body(&self, prompt: Vec<u32>) -> Body {
        Body {
            prompt,
            max_tokens: self.max_tokens,
            sampling: Sampling {
                temperature: self.temperature,
                top_k: self.top_k,
                top_p: self.top_p,
                min_p: self.min_p,
                repetition_penalty: self.repetition_penalty,
                seed: self.seed,
            },
            priority: self.priority.into(),
            deadline_ns: self.deadline.map(|d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX)),
            ignore_eos: self.ignore_eos,
            stop: self.stop.clone(),
        }
    }
}
