//! Text from a stream of tokens: each piece as soon as nothing that follows can change it.

use super::Tokenizer;

/// What stands for bytes that are no character, or not yet.
const REPLACEMENT: char = '\u{fffd}';

/// Turns a stream of tokens into pieces of text. A character whose bytes are not all there yet is held back; the pieces
/// together are the text of the tokens.
#[derive(Debug)]
pub struct Detokenizer<'a> {
    tokenizer: Option<&'a Tokenizer>,
    /// The tokens from the last that is text by itself on: what a decoder does at the beginning of a text is not done to
    /// what follows them.
    tokens: Vec<u32>,
    /// Bytes of their text that were given out.
    said: usize,
}

impl<'a> Detokenizer<'a> {
    /// Of a tokenizer; without one there is no text.
    pub fn new(tokenizer: Option<&'a Tokenizer>) -> Self {
        Self { tokenizer, tokens: Vec::new(), said: 0 }
    }

    /// Takes a token; gives the text that is now certain.
    pub fn push(&mut self, token: u32) -> String {
        let Some(tokenizer) = self.tokenizer.filter(|tokenizer| !tokenizer.is_special(token)) else {
            return String::new();
        };
        self.tokens.push(token);
        let text = decode(tokenizer, &self.tokens);
        let certain = text.strip_suffix(REPLACEMENT).unwrap_or(&text);
        let piece = certain.get(self.said..).unwrap_or_default().to_owned();
        self.said = self.said.max(certain.len());
        // A token that is whole text by itself is all that what follows it has to know.
        let alone = decode(tokenizer, &[token]);
        if self.tokens.len() > 1 && !alone.is_empty() && !alone.contains(REPLACEMENT) {
            self.tokens = vec![token];
            self.said = alone.len();
        }
        piece
    }

    /// What was held back.
    pub fn end(&mut self) -> String {
        let Some(tokenizer) = self.tokenizer else { return String::new() };
        let text = decode(tokenizer, &std::mem::take(&mut self.tokens));
        let piece = text.get(self.said..).unwrap_or_default().to_owned();
        self.said = 0;
        piece
    }
}

/// Tokens that are no text say nothing.
fn decode(tokenizer: &Tokenizer, tokens: &[u32]) -> String {
    tokenizer.decode(tokens).unwrap_or_default()
}
