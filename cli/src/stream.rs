//! What `run` prints of a stream.

use crate::terminal;
use lite_llm_core::output::FinishReason;
use lite_llm_model::tokenizer::{Detokenizer, Tokenizer};
use serde_json::{Value, json};
use std::io::{self, Write};

/// How a stream is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    /// Each token as it comes, not all at the end.
    pub(crate) stream: bool,
    /// JSON for scripts.
    pub(crate) json: bool,
}

/// Shows one stream on standard output.
#[derive(Debug)]
pub(crate) struct Printer<'a> {
    format: Format,
    text: Detokenizer<'a>,
    has_text: bool,
    first: bool,
}

impl<'a> Printer<'a> {
    pub(crate) fn new(format: Format, tokenizer: Option<&'a Tokenizer>) -> Self {
        Self { format, text: Detokenizer::new(tokenizer), has_text: tokenizer.is_some(), first: true }
    }

    /// Shows a token.
    pub(crate) fn token(&mut self, offset: u32, token: u32) -> io::Result<()> {
        if !self.format.stream {
            return Ok(());
        }
        let piece = self.text.push(token);
        let mut out = terminal::stdout();
        match (self.format.json, self.has_text) {
            (true, true) => writeln!(out, "{}", json!({ "offset": offset, "token": token, "text": piece }))?,
            (true, false) => writeln!(out, "{}", json!({ "offset": offset, "token": token }))?,
            (false, true) => out.write_all(piece.as_bytes())?,
            (false, false) if self.first => write!(out, "{token}")?,
            (false, false) => write!(out, " {token}")?,
        }
        self.first = false;
        out.flush()
    }

    /// Shows the end, of which `result` is the JSON form.
    pub(crate) fn end(&mut self, result: &Value) -> io::Result<()> {
        let mut out = terminal::stdout();
        if self.format.json {
            writeln!(out, "{result}")?;
        } else if self.format.stream {
            writeln!(out, "{}", self.text.end())?;
        } else if let Some(text) = result["text"].as_str() {
            writeln!(out, "{text}")?;
        } else {
            let tokens = result["tokens"].as_array().map_or(&[][..], Vec::as_slice);
            let words: Vec<String> = tokens.iter().map(Value::to_string).collect();
            writeln!(out, "{}", words.join(" "))?;
        }
        out.flush()
    }
}

/// The word for the end of a stream.
pub(crate) fn finish_name(reason: &FinishReason) -> &'static str {
    match reason {
        FinishReason::Eos => "eos",
        FinishReason::Stop => "stop",
        FinishReason::Length => "length",
        FinishReason::Cancelled => "cancelled",
        FinishReason::Deadline => "deadline",
        FinishReason::Fault(_) => "fault",
    }
}

/// Whether a stream that ended so is what was asked for.
pub(crate) fn is_complete(reason: &FinishReason) -> bool {
    matches!(reason, FinishReason::Eos | FinishReason::Stop | FinishReason::Length)
}
