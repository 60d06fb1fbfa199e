//! Text to tokens and back: `tokenizer.json` with what `tokenizer_config.json` changes in it, chat templates, and text
//! from a stream of tokens.
//!
//! What transformers does with these files is done here. Only the text of bytes that are no UTF-8 is better: its
//! decoder loses good characters beside bad bytes.

mod chat;
mod python;
mod stream;

pub use chat::Message;
pub use stream::Detokenizer;

use crate::checkpoint::Checkpoint;
use chat::Templates;
use lite_llm_core::digest::Digest;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use thiserror::Error;
use tokenizers::models::ModelWrapper;
use tokenizers::{AddedToken, Decoder};

/// The special tokens that have names in `tokenizer_config.json`.
const NAMED: [&str; 7] =
    ["bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token"];

/// Why text cannot be turned into tokens or back.
#[derive(Debug, Error)]
pub enum TokenizerError {
    /// A file cannot be read or is not what it should be.
    #[error("{}: {what}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The text cannot be tokenised.
    #[error("the text cannot be tokenised: {0}")]
    Encode(String),
    /// The tokens are no text.
    #[error("the tokens cannot be decoded: {0}")]
    Decode(String),
    /// The chat template refuses the messages, or there is none.
    #[error("the chat template cannot be applied: {0}")]
    Chat(String),
}

/// A tokenizer with its chat template.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Whether characters that are no tokens are spelt in tokens of bytes.
    byte_fallback: bool,
    templates: Templates,
    digest: Digest,
}

impl Tokenizer {
    /// The tokenizer of a checkpoint; `None` if it has none.
    ///
    /// # Errors
    /// If a file is there and cannot be used, or the model has no embedding for one of the tokens.
    pub fn of(checkpoint: &Checkpoint) -> Result<Option<Self>, TokenizerError> {
        let tokenizer = Self::open(checkpoint.dir())?;
        let vocab = checkpoint.arch().vocab;
        if let Some(tokenizer) = &tokenizer
            && let Some((token, id)) = tokenizer.last_token()
            && id as usize >= vocab
        {
            let what = format!(
                "token {id} ({token:?}) is beyond the embedding, which has {vocab} rows: the tokenizer is of another \
                 model"
            );
            return Err(TokenizerError::File { path: checkpoint.dir().join("tokenizer.json"), what });
        }
        Ok(tokenizer)
    }

    /// Opens the tokenizer of a directory; `None` if it has none.
    ///
    /// # Errors
    /// If a file is there and cannot be used.
    pub fn open(dir: &Path) -> Result<Option<Self>, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let Some(bytes) = read(&path)? else { return Ok(None) };
        let file =
            |error: tokenizers::Error| TokenizerError::File { path: path.clone(), what: error.to_string() };
        let mut inner = tokenizers::Tokenizer::from_bytes(&bytes).map_err(file)?;
        if draws(inner.get_model()) {
            let what = "model.dropout draws the tokens of a text by chance, and a text has the same ones each time; set it \
                        to null"
                .into();
            return Err(TokenizerError::File { path, what });
        }
        // How the last training cut and filled its batches is no part of a text.
        inner.with_truncation(None).map_err(file)?;
        inner.with_padding(None);
        let config_path = dir.join("tokenizer_config.json");
        let config_bytes = read(&config_path)?.unwrap_or_else(|| b"{}".to_vec());
        let config: Value = serde_json::from_slice(&config_bytes).map_err(|error| TokenizerError::File {
            path: config_path.clone(),
            what: format!("it is not JSON: {error}"),
        })?;
        let named = named_tokens(&config);
        configure(&mut inner, &config, &named)
            .map_err(|what| TokenizerError::File { path: config_path, what })?;
        let jinja = read(&dir.join("chat_template.jinja"))?;
        let mut hasher = blake3::Hasher::new();
        for part in [&bytes, &config_bytes, jinja.as_ref().unwrap_or(&Vec::new())] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        let decoder = serde_json::to_value(inner.get_decoder()).unwrap_or_default();
        Ok(Some(Self {
            byte_fallback: has_type(&decoder, "ByteFallback"),
            inner,
            templates: Templates::new(&config, jinja.as_deref(), named),
            digest: Digest(*hasher.finalize().as_bytes()),
        }))
    }

    /// Digest of tokenizer and template.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The token with the largest number, and the number.
    fn last_token(&self) -> Option<(String, u32)> {
        self.inner.get_vocab(true).into_iter().max_by_key(|&(_, id)| id)
    }

    /// The tokens of a text, with the special tokens that the post-processor adds.
    ///
    /// # Errors
    /// If the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.tokens(text, true)
    }

    fn tokens(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        // Nobody asks where in the text a token was.
        let encoding = self.inner.encode_fast(text, special);
        let encoding = encoding.map_err(|error| TokenizerError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, special ones left out. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// If the tokenizer cannot decode them.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        let decoded = match self.inner.get_decoder() {
            Some(decoder) if self.byte_fallback => decoder.decode(self.pieces(tokens)),
            _ => self.inner.decode(tokens, true),
        };
        decoded.map_err(|error| TokenizerError::Decode(error.to_string()))
    }

    /// Whether a token is no text.
    fn is_special(&self, token: u32) -> bool {
        let added = self.inner.get_added_vocabulary();
        self.inner.id_to_token(token).is_none_or(|token| added.is_special_token(&token))
    }

    /// What the tokens say, special ones left out, each run of bytes as one piece of text.
    fn pieces(&self, tokens: &[u32]) -> Vec<String> {
        let (mut pieces, mut bytes) = (Vec::new(), Vec::new());
        for &token in tokens.iter().filter(|&&token| !self.is_special(token)) {
            let Some(text) = self.inner.id_to_token(token) else { continue };
            if let Some(byte) = byte_of(&text) {
                bytes.push(byte);
                continue;
            }
            if !bytes.is_empty() {
                pieces.push(String::from_utf8_lossy(&std::mem::take(&mut bytes)).into_owned());
            }
            pieces.push(text);
        }
        if !bytes.is_empty() {
            pieces.push(String::from_utf8_lossy(&bytes).into_owned());
        }
        pieces
    }

    /// The tokens of a chat, ready for the assistant's answer. The template writes the special tokens itself, and the
    /// date if it likes: `now`.
    ///
    /// # Errors
    /// If there is no template, or it refuses the messages.
    pub fn chat(&self, messages: &[Message], now: SystemTime) -> Result<Vec<u32>, TokenizerError> {
        let text = self.chat_text(messages, true, now)?;
        self.tokens(&text, false)
    }

    /// The text of a chat, as the template writes it.
    ///
    /// # Errors
    /// If there is no template, or it refuses the messages.
    pub fn chat_text(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        now: SystemTime,
    ) -> Result<String, TokenizerError> {
        self.templates.render(messages, add_generation_prompt, now).map_err(TokenizerError::Chat)
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    match crate::files::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TokenizerError::File { path: path.into(), what: error.to_string() }),
    }
}

/// Whether one text may have other tokens each time.
fn draws(model: &ModelWrapper) -> bool {
    match model {
        ModelWrapper::BPE(model) => model.dropout.is_some_and(|part| part > 0.0),
        ModelWrapper::Unigram(model) => model.alpha.is_some_and(|alpha| alpha > 0.0),
        ModelWrapper::WordPiece(_) | ModelWrapper::WordLevel(_) => false,
    }
}

/// The named special tokens that the configuration has.
fn named_tokens(config: &Value) -> BTreeMap<&'static str, String> {
    let text = |value: &Value| value.as_str().or_else(|| value["content"].as_str()).map(Into::into);
    NAMED.into_iter().filter_map(|name| Some((name, text(&config[name])?))).collect()
}

/// What `tokenizer_config.json` changes: added tokens that `tokenizer.json` has otherwise or not at all. What is added at
/// the ends of a text `tokenizer.json` says alone: `add_bos_token` is for tokenizers without one.
fn configure(
    inner: &mut tokenizers::Tokenizer,
    config: &Value,
    named: &BTreeMap<&'static str, String>,
) -> Result<(), String> {
    let mut listed = BTreeMap::new();
    for (id, token) in config["added_tokens_decoder"].as_object().into_iter().flatten() {
        let id: u32 = id.parse().map_err(|_| format!("added_tokens_decoder: {id:?} is no token id"))?;
        let mut token: AddedToken = serde_json::from_value(token.clone())
            .map_err(|error| format!("added_tokens_decoder: token {id}: {error}"))?;
        token.special |= named.values().any(|named| *named == token.content);
        listed.insert(id, token);
    }
    let there = inner.get_added_tokens_decoder();
    let mut more: Vec<AddedToken> = listed
        .into_iter()
        .filter(|(id, token)| there.get(id) != Some(token))
        .map(|(_, token)| token)
        .collect();
    for content in named.values() {
        if !there.values().chain(&more).any(|token| token.content == *content) {
            more.push(AddedToken::from(content.as_str(), true));
        }
    }
    inner.add_tokens(more).map_err(|error| format!("added_tokens_decoder: {error}"))?;
    Ok(())
}

/// The byte that a token like `<0x0A>` stands for.
fn byte_of(token: &str) -> Option<u8> {
    let hex = token.strip_prefix("<0x")?.strip_suffix('>')?;
    u8::from_str_radix(hex, 16).ok().filter(|_| hex.len() == 2)
}

/// Whether a part of a tokenizer is or has one of this type.
fn has_type(part: &Value, name: &str) -> bool {
    match part {
        Value::Object(map) => {
            map.get("type").is_some_and(|t| t == name) || map.values().any(|v| has_type(v, name))
        }
        Value::Array(list) => list.iter().any(|value| has_type(value, name)),
        _ => false,
    }
}
