//! From what the user says to token ids.

use crate::exit::usage;
use anyhow::Context;
use clap::Args;
use lite_llm_model::tokenizer::{Message, Tokenizer};
use std::io::{IsTerminal, Read};
use std::path::Path;

/// Bytes of the longest prompt from standard input.
const STDIN_BYTES_MAX: u64 = 64 << 20;

/// What to go on from; standard input if none is given.
#[derive(Clone, Debug, Args)]
#[group(multiple = false)]
pub(crate) struct PromptArgs {
    /// Text; - for standard input. The tokenizer's special tokens are added
    #[arg(long, value_name = "TEXT")]
    pub(crate) prompt: Option<String>,
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
            None => self.chat.is_none() && self.prompt_tokens.is_none(),
        }
    }

    /// The prompt, read from standard input if no argument gives one.
    pub(crate) fn read(&self) -> anyhow::Result<Prompt> {
        if self.takes_stdin() {
            return read_stdin().map(Prompt::Text);
        }
        Ok(match (&self.prompt, &self.chat, &self.prompt_tokens) {
            (_, Some(text), _) => Prompt::Chat(user(text)),
            (_, _, Some(list)) => Prompt::Tokens(list.0.clone()),
            (text, None, None) => Prompt::Text(text.clone().unwrap_or_default()),
        })
    }
}

/// One message of a user.
pub(crate) fn user(text: &str) -> Vec<Message> {
    vec![Message { role: "user".into(), content: text.into() }]
}

/// All of standard input, if it is no terminal.
pub(crate) fn read_stdin() -> anyhow::Result<String> {
    let stdin = std::io::stdin();
    if stdin.is_terminal() {
        return Err(usage("no prompt: give --prompt, --chat or --prompt-tokens, or pipe a text in"));
    }
    let mut text = String::new();
    let read = stdin.lock().take(STDIN_BYTES_MAX + 1).read_to_string(&mut text);
    read.context("cannot read the prompt from standard input")?;
    anyhow::ensure!(
        text.len() as u64 <= STDIN_BYTES_MAX,
        "the prompt on standard input is longer than 64 MiB"
    );
    // The newline that ends a text file is no part of the prompt.
    if text.ends_with('\n') {
        text.pop();
    }
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
            Self::Chat(messages) => needed()?.chat(messages)?,
        })
    }
}
