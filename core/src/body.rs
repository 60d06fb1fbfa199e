//! What a client asks for, and which values of it make sense.

use crate::ids::index;
use alloc::{format, string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// Stop texts of one request, and bytes of each.
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;

/// How the next token is chosen from the logits.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// 0 chooses the likeliest token.
    pub temperature: f32,
    /// Only the k likeliest tokens; 0 means all.
    pub top_k: u32,
    /// Only the likeliest tokens that together have this probability; 1 means all.
    pub top_p: f32,
    /// Only tokens at least this likely, relative to the likeliest; 0 means all.
    pub min_p: f32,
    /// Divides (or multiplies, if negative) the logits of tokens already seen; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Seed of the draws.
    pub seed: u64,
}

impl Default for Sampling {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0, repetition_penalty: 1.0, seed: 0 }
    }
}

/// Who goes first.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Priority {
    /// Somebody waits for it.
    #[default]
    Interactive,
    /// It may wait.
    Batch,
}

/// What a client asks for.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Body {
    /// Token ids.
    pub prompt: Vec<u32>,
    /// The most tokens to generate.
    pub max_tokens: u32,
    /// How to choose tokens.
    pub sampling: Sampling,
    /// Before whom.
    pub priority: Priority,
    /// Nanoseconds after acceptance at which the request ends unfinished.
    pub deadline_ns: Option<u64>,
    /// Whether to go on past the checkpoint's end-of-stream tokens.
    pub ignore_eos: bool,
    /// Texts that end the stream; the driver, which has the tokenizer, reports them in
    /// [`RowResult::stop`](crate::input::RowResult::stop).
    pub stop: Vec<String>,
}

impl Body {
    /// Checks everything against a model.
    ///
    /// # Errors
    /// The first thing that is wrong, with the values that would do.
    pub fn check(&self, vocab: u32, context: u32) -> Result<(), String> {
        self.check_prompt(vocab, context)?;
        self.check_values()
    }

    /// Checks the prompt against a model.
    ///
    /// # Errors
    /// If it is empty, longer than the context, or has a token that is no token of the vocabulary.
    pub fn check_prompt(&self, vocab: u32, context: u32) -> Result<(), String> {
        if self.prompt.is_empty() {
            return Err("the prompt is empty; give at least one token".into());
        }
        if let Some(token) = self.prompt.iter().find(|&&token| token >= vocab) {
            return Err(format!("token {token} of the prompt is not below the vocabulary of {vocab}"));
        }
        let len = self.prompt.len();
        if len > index(context) {
            return Err(format!("the prompt has {len} tokens, the model's context {context}: shorten it"));
        }
        Ok(())
    }

    /// Checks what needs no model.
    ///
    /// # Errors
    /// If a value is out of its range.
    pub fn check_values(&self) -> Result<(), String> {
        if self.max_tokens == 0 {
            return Err("max_tokens is 0; ask for at least one token".into());
        }
        let bad = |stop: &String| stop.is_empty() || stop.len() > STOP_BYTES_MAX;
        if self.stop.len() > STOPS_MAX || self.stop.iter().any(bad) {
            return Err(format!("stop takes up to {STOPS_MAX} texts of 1 to {STOP_BYTES_MAX} bytes"));
        }
        self.sampling.check()
    }
}

impl Sampling {
    fn check(&self) -> Result<(), String> {
        let Self { temperature, top_k: _, top_p, min_p, repetition_penalty: penalty, seed: _ } = *self;
        for (name, value, good, range) in [
            ("temperature", temperature, (0.0..=100.0).contains(&temperature), "0 to 100"),
            ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0, up to 1"),
            ("min_p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1"),
            ("repetition_penalty", penalty, (0.01..=100.0).contains(&penalty), "0.01 to 100"),
        ] {
            if !good {
                return Err(format!("{name} is {value}; it must be {range}"));
            }
        }
        Ok(())
    }
}
