//! Text to tokens and back, and chat templates: `tokenizer.json`, `tokenizer_config.json`, `chat_template.jinja`.

use lite_llm_core::digest::Digest;
use minijinja::syntax::SyntaxConfig;
use minijinja::{Environment, ErrorKind, Value, context};
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};
use thiserror::Error;

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

/// A message of a chat.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it: `system`, `user`, `assistant`.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    fn value(&self) -> Value {
        Value::from_pairs([("role", self.role.as_str()), ("content", self.content.as_str())])
    }
}

/// A tokenizer with its chat template.
#[derive(Debug)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    template: Option<String>,
    bos: String,
    eos: String,
    digest: Digest,
}

impl Tokenizer {
    /// Opens the tokenizer of a checkpoint directory; `None` if it has none.
    ///
    /// # Errors
    /// If a file is there and cannot be used.
    pub fn open(dir: &Path) -> Result<Option<Self>, TokenizerError> {
        let path = dir.join("tokenizer.json");
        let Some(bytes) = read(&path)? else { return Ok(None) };
        let inner = tokenizers::Tokenizer::from_bytes(&bytes)
            .map_err(|error| TokenizerError::File { path, what: error.to_string() })?;
        let path = dir.join("tokenizer_config.json");
        let config_bytes = read(&path)?.unwrap_or_else(|| b"{}".to_vec());
        let config: serde_json::Value = serde_json::from_slice(&config_bytes)
            .map_err(|error| TokenizerError::File { path, what: format!("it is not JSON: {error}") })?;
        let jinja = read(&dir.join("chat_template.jinja"))?;
        let template = match &jinja {
            Some(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
            None => template_of(&config),
        };
        let mut hasher = blake3::Hasher::new();
        for part in [&bytes, &config_bytes, &jinja.unwrap_or_default()] {
            hasher.update(&(part.len() as u64).to_le_bytes()).update(part);
        }
        let special = |key: &str| {
            let value = &config[key];
            value.as_str().or_else(|| value["content"].as_str()).unwrap_or_default().to_owned()
        };
        let digest = Digest(*hasher.finalize().as_bytes());
        Ok(Some(Self { inner, template, bos: special("bos_token"), eos: special("eos_token"), digest }))
    }

    /// Digest of tokenizer and template.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The tokens of a text, with the special tokens that the post-processor adds.
    ///
    /// # Errors
    /// If the tokenizer refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        self.tokens(text, true)
    }

    fn tokens(&self, text: &str, special: bool) -> Result<Vec<u32>, TokenizerError> {
        let encoding =
            self.inner.encode(text, special).map_err(|error| TokenizerError::Encode(error.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The text of tokens, special ones left out.
    ///
    /// # Errors
    /// If the tokenizer cannot decode them.
    pub fn decode(&self, tokens: &[u32]) -> Result<String, TokenizerError> {
        self.inner.decode(tokens, true).map_err(|error| TokenizerError::Decode(error.to_string()))
    }

    /// The tokens of a chat, ready for the assistant's answer. The template writes the special tokens itself.
    ///
    /// # Errors
    /// If there is no template, or it refuses the messages.
    pub fn chat(&self, messages: &[Message]) -> Result<Vec<u32>, TokenizerError> {
        let text = self.chat_text(messages, true)?;
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
    ) -> Result<String, TokenizerError> {
        let template = self.template.as_deref().ok_or_else(|| {
            TokenizerError::Chat("this checkpoint has no chat template; give the prompt as text".into())
        })?;
        let mut environment = Environment::new();
        let whitespace = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(whitespace.map_err(|error| TokenizerError::Chat(error.to_string()))?);
        environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", |what: String| -> Result<String, minijinja::Error> {
            Err(minijinja::Error::new(ErrorKind::InvalidOperation, what))
        });
        let failed = |error: minijinja::Error| TokenizerError::Chat(error.to_string());
        environment.add_template("chat", template).map_err(failed)?;
        let chat = environment.get_template("chat").map_err(failed)?;
        chat.render(context! {
            messages => messages.iter().map(Message::value).collect::<Vec<_>>(),
            add_generation_prompt,
            bos_token => self.bos.as_str(),
            eos_token => self.eos.as_str(),
        })
        .map_err(failed)
    }
}

fn read(path: &Path) -> Result<Option<Vec<u8>>, TokenizerError> {
    match std::fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(TokenizerError::File { path: path.into(), what: error.to_string() }),
    }
}

/// One template, or the one called `default` of several.
fn template_of(config: &serde_json::Value) -> Option<String> {
    match &config["chat_template"] {
        serde_json::Value::String(template) => Some(template.clone()),
        serde_json::Value::Array(list) => {
            let default = list.iter().find(|entry| entry["name"] == "default").or(list.first())?;
            default["template"].as_str().map(Into::into)
        }
        _ => None,
    }
}
