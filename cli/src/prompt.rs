//! From what the user says to token ids.

use crate::exit::usage;
use anyhow::Context;
use clap::Args;
use lite_llm_model::tokenizer::{Message, Tokenizer};
use std::fs::File;
use std::io::{IsTerminal, Read};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// Bytes of the longest text from a file or standard input.
const TEXT_BYTES_MAX: u64 = 64 << 20;

/// What to go on from; standard input if none is given.
#[derive(Clone, Debug, Args)]
#[group(multiple = false)]
pub(crate) struct PromptArgs {
    /// Text, --prompt=TEXT if it begins with -; - for standard input. The tokenizer's special tokens are added
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
    /// Text from a file; the newline at its end is left out
    #[arg(long, value_name = "FILE")]
    pub(crate) prompt_file: Option<PathBuf>,
    /// A user's message, put into the checkpoint's chat template
    #[arg(long, value_name = "TEXT")]
    pub(crate) chat: Option<String>,
    /// Token ids, as they are
    #[arg(long, value_name = "1,2,3")]
    pub(crate) prompt_tokens: Option<TokenList>,
}

/// Token ids, separated by commas.
#[derive(Clone, Debug)]
pub(crate) struct TokenList(pub(crate) Vec<u32>);

impl std::str::FromStr for TokenList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let token = |part: &str| {
            part.trim()
                .parse::<u32>()
                .map_err(|_| format!("{part:?} is no token id: give numbers like 1,2,3"))
        };
        text.split(',').map(token).collect::<Result<_, _>>().map(Self)
    }
}

/// What is to be turned into tokens.
#[derive(Clone, Debug)]
pub(crate) enum Prompt {
    /// Plain text.
    Text(String),
    /// A chat.
    Chat(Vec<Message>),
    /// Token ids.
    Tokens(Vec<u32>),
}

impl PromptArgs {
    /// Whether the prompt comes from standard input.
    pub(crate) fn takes_stdin(&self) -> bool {
        match &self.prompt {
            Some(text) => text == "-",
            None => self.prompt_file.is_none() && self.chat.is_none() && self.prompt_tokens.is_none(),
        }
    }

    /// The prompt, read from standard input if no argument gives one.
    pub(crate) fn read(&self) -> anyhow::Result<Prompt> {
        if self.takes_stdin() {
            return stdin_prompt().map(Prompt::Text);
        }
        if let Some(path) = &self.prompt_file {
            return read_text_file(path).map(without_last_newline).map(Prompt::Text);
        }
        Ok(match (&self.prompt, &self.chat, &self.prompt_tokens) {
            (_, Some(text), _) => Prompt::Chat(vec![Message::user(text)]),
            (_, _, Some(list)) => Prompt::Tokens(list.0.clone()),
            (text, None, None) => Prompt::Text(text.clone().unwrap_or_default()),
        })
    }
}

/// The prompt from standard input.
pub(crate) fn stdin_prompt() -> anyhow::Result<String> {
    read_stdin().map(without_last_newline)
}

/// All of standard input, if it is no terminal.
pub(crate) fn read_stdin() -> anyhow::Result<String> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Err(usage("no prompt: give --prompt, --chat or --prompt-tokens, or pipe a text in"));
    }
    read_text(stdin.lock(), "standard input")
}

/// All of a file.
pub(crate) fn read_text_file(path: &Path) -> anyhow::Result<String> {
    let file = File::open(path).with_context(|| format!("cannot read the text {}", path.display()))?;
    read_text(file, &path.display().to_string())
}

/// The newline that ends a text file is no part of a prompt.
fn without_last_newline(mut text: String) -> String {
    if text.ends_with('\n') {
        text.pop();
    }
    text
}

fn read_text(from: impl Read, name: &str) -> anyhow::Result<String> {
    let mut text = String::new();
    let read = from.take(TEXT_BYTES_MAX + 1).read_to_string(&mut text);
    read.with_context(|| format!("cannot read the text from {name}"))?;
    anyhow::ensure!(text.len() as u64 <= TEXT_BYTES_MAX, "the text from {name} is longer than 64 MiB");
    Ok(text)
}

impl Prompt {
    /// The token ids.
    pub(crate) fn tokens(&self, tokenizer: Option<&Tokenizer>, model: &Path) -> anyhow::Result<Vec<u32>> {
        let needed = || {
            tokenizer.with_context(|| {
                format!("{} has no tokenizer.json: give the prompt with --prompt-tokens", model.display())
            })
        };
        Ok(match self {
            Self::Tokens(tokens) => tokens.clone(),
            Self::Text(text) => needed()?.encode(text)?,
            Self::Chat(messages) => needed()?.chat(messages, SystemTime::now())?,
        })
    }
}
