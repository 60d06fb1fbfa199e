//! Stop texts: whether the text of a stream has come to one of them.

use lite_llm_model::tokenizer::Tokenizer;

/// Tokens decoded beyond the longest stop text, so that what a decoder does to the first of a text cannot hide one.
const MARGIN: usize = 16;

/// Whether `token`, after `tokens`, makes the text hold one of `stops`.
///
/// Only the end of the text is decoded: a stop text that ended before this token would have ended the stream there.
pub(super) fn stops(tokenizer: &Tokenizer, stops: &[String], tokens: &[u32], token: u32) -> bool {
    let Some(bytes_max) = stops.iter().map(String::len).max() else { return false };
    let start = tokens.len().saturating_sub(bytes_max + MARGIN);
    let mut tail = tokens[start..].to_vec();
    tail.push(token);
    // Tokens that are no text end no text.
    tokenizer.decode(&tail).is_ok_and(|text| stops.iter().any(|stop| text.contains(stop.as_str())))
}
