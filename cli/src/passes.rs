//! A text through a model, window by window: what `trace` and `perplexity` have in common.

use crate::exit::{fault, usage};
use crate::prompt::{TokenList, read_stdin, read_text_file};
use crate::serve::Service;
use crate::settings::Settings;
use crate::state::StateDir;
use anyhow::{Context, bail};
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::{Body, Priority, Sampling, SwitchTarget};
use lite_llm_core::output::{FinishReason, Refusal};
use lite_llm_core::plan::Identity;
use lite_llm_hw::node::StreamEvent;
use lite_llm_model::tokenizer::Tokenizer;
use lite_llm_model::{Capture, Checkpoint};
use std::cell::Cell;
use std::path::{Path, PathBuf};

/// Positions that see each other, unless the command line says otherwise or the model has fewer.
const WINDOW: u32 = 2048;

/// Which text, and how it is cut.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Text")]
pub(crate) struct TextArgs {
    /// The text; - for standard input. It is taken as it is, with the special tokens that the tokenizer adds
    #[arg(long, value_name = "FILE", required_unless_present = "tokens", conflicts_with = "tokens")]
    text: Option<PathBuf>,
    /// Token ids instead of a text, as they are
    #[arg(long, value_name = "1,2,3")]
    tokens: Option<TokenList>,
    /// Only the first tokens of the text
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    first: Option<u32>,
    /// The most tokens that see each other [default: 2048, or the context of the model if that is shorter]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..))]
    window: Option<u32>,
}

impl TextArgs {
    /// The tokens of the text.
    pub(crate) fn read(&self, checkpoint: &Checkpoint) -> anyhow::Result<Vec<u32>> {
        let mut tokens = match (&self.text, &self.tokens) {
            (_, Some(list)) => list.0.clone(),
            (path, None) => self.encode(path.as_deref().unwrap_or(Path::new("-")), checkpoint)?,
        };
        if let Some(first) = self.first {
            tokens.truncate(first as usize);
        }
        let vocab = checkpoint.arch().vocab;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= vocab) {
            bail!("token {token} is beyond the vocabulary of {vocab} tokens");
        }
        Ok(tokens)
    }

    fn encode(&self, path: &Path, checkpoint: &Checkpoint) -> anyhow::Result<Vec<u32>> {
        let tokenizer = Tokenizer::of(checkpoint)?.with_context(|| {
            format!("{} has no tokenizer.json: give token ids with --tokens", checkpoint.dir().display())
        })?;
        let text = if path == Path::new("-") { read_stdin()? } else { read_text_file(path)? };
        Ok(tokenizer.encode(&text)?)
    }

    /// Tokens of the longest window.
    pub(crate) fn window(&self, checkpoint: &Checkpoint) -> anyhow::Result<u32> {
        let context = checkpoint.arch().context;
        match self.window {
            Some(window) if window > context => {
                Err(usage(format!("--window {window} is more than the context of this model, {context}")))
            }
            Some(window) => Ok(window),
            None => Ok(context.min(WINDOW)),
        }
    }
}

/// A node that computes one window after another.
pub(crate) struct Passes {
    service: Service,
    bar: ProgressBar,
    done: Cell<u64>,
}

impl Passes {
    /// Starts a node whose captures are looked at, lets `body` compute `count` windows with it, and ends it. Nothing of
    /// it is kept.
    pub(crate) fn run<T>(
        model: &Path,
        settings: &Settings,
        capture: Box<dyn Capture + Send>,
        count: usize,
        body: impl FnOnce(&Self) -> anyhow::Result<T>,
    ) -> anyhow::Result<T> {
        let mut state = StateDir::choose(None)?;
        let run = || {
            let service = Service::start(model, &state, settings, Some(capture))?;
            let bar = ProgressBar::new(count as u64);
            if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos} of {len} windows, {eta} left") {
                bar.set_style(style);
            }
            let passes = Self { service, bar, done: Cell::new(0) };
            let result = body(&passes);
            passes.bar.finish_and_clear();
            // A node that failed says why better than the stream that broke off.
            passes.service.stop()?;
            result
        };
        let result = run();
        state.discard();
        result
    }

    /// What the node's journal would belong to.
    pub(crate) fn identity(&self) -> &Identity {
        self.service.node().identity()
    }

    /// Bytes that an expert takes in memory.
    pub(crate) fn slot_bytes(&self) -> anyhow::Result<u64> {
        Ok(self.service.node().status()?.carving.slot_bytes)
    }

    /// Computes what follows under these tiers.
    pub(crate) fn switch(&self, tiers: &[String]) -> anyhow::Result<()> {
        let switched = self.service.node().switch(SwitchTarget::Tiers(tiers.to_vec()), None);
        let switched = switched.recv().context("stopped before the text was through")?;
        switched.map_err(|reason| anyhow::anyhow!("cannot switch to tiers {}: {reason}", tiers.join(",")))?;
        Ok(())
    }

    /// Computes a window, from an empty context on.
    pub(crate) fn pass(&self, tokens: &[u32]) -> anyhow::Result<()> {
        let number = self.done.get();
        let id = RequestId::new(format!("window-{number}")).map_err(anyhow::Error::msg)?;
        // A request has to ask for a token; nobody looks at it.
        let body = Body {
            prompt: tokens.to_vec(),
            max_tokens: 1,
            sampling: Sampling::default(),
            priority: Priority::Batch,
            deadline_ns: None,
            ignore_eos: true,
            stop: Vec::new(),
        };
        let events = self.service.node().submit(id, body, 0);
        loop {
            match events.recv() {
                Ok(StreamEvent::Finish { reason: FinishReason::Fault(reason), .. }) => {
                    return Err(fault(format!("window {number} could not be computed: {reason}")));
                }
                Ok(StreamEvent::Finish { reason: FinishReason::Length, .. }) => break,
                Ok(StreamEvent::Finish { reason, .. }) => bail!("window {number} ended early: {reason:?}"),
                Ok(StreamEvent::Refused { refusal: Refusal::NotServing, .. }) | Err(_) => {
                    bail!("stopped before the text was through");
                }
                Ok(StreamEvent::Refused { reason, .. }) => bail!("window {number} is refused: {reason}"),
                Ok(StreamEvent::Accepted { .. } | StreamEvent::Token { .. }) => {}
            }
        }
        self.done.set(number + 1);
        self.bar.inc(1);
        Ok(())
    }
}
