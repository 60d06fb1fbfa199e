//! `lite-llm run`: one request, or a batch of them.

use crate::commands::batch::{self, BatchArgs};
use crate::exit::{Exit, fault, usage};
use crate::generations::GenerationMap;
use crate::prompt::PromptArgs;
use crate::quantity::duration;
use crate::serve::Service;
use crate::settings::{RuntimeArgs, Settings};
use crate::state::{StateDir, unique};
use crate::stream::{Format, Printer, finish_name, is_complete};
use crate::tensors::Recorder;
use anyhow::bail;
use clap::{Args, ValueEnum};
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::{Body, Priority, Sampling, SwitchTarget};
use lite_llm_core::output::FinishReason;
use lite_llm_core::plan::Identity;
use lite_llm_hw::node::{ExitReport, StreamEvent};
use lite_llm_model::tokenizer::{Detokenizer, Tokenizer};
use lite_llm_model::{Capture, Checkpoint};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::time::{Duration, Instant};

#[derive(Clone, Debug, Args)]
pub(crate) struct RunArgs {
    /// A Hugging Face directory or an imported checkpoint
    pub(crate) model: PathBuf,
    #[command(flatten)]
    pub(crate) prompt: PromptArgs,
    #[command(flatten)]
    pub(crate) request: RequestArgs,
    #[command(flatten)]
    pub(crate) batch: BatchArgs,
    #[command(flatten)]
    pub(crate) runtime: RuntimeArgs,
    /// Where the journal is kept; a private directory, removed after a clean end, if left out
    #[arg(long, help_heading = "State", value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// Idempotency key: the same id with the same request attaches to it
    #[arg(long, help_heading = "State", value_name = "ID", value_parser = request_id)]
    pub(crate) request_id: Option<RequestId>,
    /// Send the stream again from this token on
    #[arg(long, help_heading = "State", value_name = "N", default_value_t = 0)]
    pub(crate) from_offset: u32,
    /// Print each token as it comes
    #[arg(long, help_heading = "Output")]
    pub(crate) stream: bool,
    /// Print one JSON object; with --stream, one for each token before it
    #[arg(long, help_heading = "Output")]
    pub(crate) json: bool,
    /// Write the logits of the prompt's positions as safetensors
    #[arg(long, help_heading = "Output", value_name = "FILE")]
    pub(crate) logits: Option<PathBuf>,
    /// Write the experts of every position, and their weights, as safetensors
    #[arg(long, help_heading = "Output", value_name = "FILE")]
    pub(crate) routes: Option<PathBuf>,
    /// Compute positions under these tiers, in the form that --json reports as generations
    #[arg(long, help_heading = "Runtime", value_name = "JSON", conflicts_with_all = ["tierset", "mode"])]
    pub(crate) generations: Option<GenerationMap>,
    /// Say on standard output that the process lives, for a supervisor
    #[arg(long, hide = true)]
    pub(crate) beats: bool,
}

/// What a request asks for, besides its prompt.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Request")]
pub(crate) struct RequestArgs {
    /// The most tokens to generate
    #[arg(long, value_name = "N", default_value_t = 128, allow_negative_numbers = true)]
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

fn request_id(text: &str) -> Result<RequestId, String> {
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

/// A model that was looked at, and what was decided for it.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) settings: Settings,
    pub(crate) context: u32,
}

impl RunArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        if self.beats {
            crate::beats::heart()?;
        }
        let opened = self.open()?;
        match &self.batch.batch {
            Some(_) => batch::run(&self, opened),
            None => self.run_one(opened),
        }
    }

    fn open(&self) -> anyhow::Result<Opened> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let mut settings = self.runtime.settle(&checkpoint)?;
        if let Some(map) = &self.generations {
            settings.config.tier_set = map.first().to_vec();
        }
        let tokenizer = Tokenizer::of(&checkpoint)?;
        if tokenizer.is_none() && !self.request.stop.is_empty() {
            bail!("--stop needs a tokenizer, and {} has no tokenizer.json", self.model.display());
        }
        Ok(Opened { tokenizer, settings, context: checkpoint.arch().context })
    }

    fn run_one(&self, opened: Opened) -> anyhow::Result<Exit> {
        if self.batch.out.is_some() {
            return Err(usage("--out belongs to --batch"));
        }
        let prompt = self.prompt.read()?.tokens(opened.tokenizer.as_ref(), &self.model)?;
        check_prompt(&prompt, opened.context)?;
        let id = match &self.request_id {
            Some(id) => id.clone(),
            None => request_id(&unique("request")).map_err(anyhow::Error::msg)?,
        };
        let positions = if self.logits.is_some() { prompt.len() as u32 } else { 0 };
        let recorder = (self.logits.is_some() || self.routes.is_some())
            .then(|| Recorder::new(positions, self.routes.is_some()));
        let state = StateDir::choose(self.state.as_deref())?;
        let ended = self.stream_one(&opened, &state, id, self.request.body(prompt), recorder);
        state.end(matches!(ended, Ok(Exit::Ok)));
        ended
    }

    fn stream_one(
        &self,
        opened: &Opened,
        state: &StateDir,
        id: RequestId,
        body: Body,
        recorder: Option<Recorder>,
    ) -> anyhow::Result<Exit> {
        let capture = recorder.clone().map(|recorder| Box::new(recorder) as Box<dyn Capture + Send>);
        let service = Service::start(&self.model, state, &opened.settings, capture)?;
        if self.beats {
            crate::beats::progress(service.node().handle())?;
        }
        self.force_generations(&service, &id)?;
        if let Some(recorder) = &recorder {
            let status = service.node().status()?;
            recorder.follow(status.requests.iter().find(|r| r.id == id).map(|r| r.number));
        }
        let begun = Instant::now();
        let events = service.node().submit(id.clone(), body, self.from_offset);
        let format = Format { stream: self.stream, json: self.json };
        let mut printer = Printer::new(format, opened.tokenizer.as_ref());
        let mut heard = Heard::default();
        while heard.finish.is_none() {
            match events.recv() {
                Ok(StreamEvent::Accepted { generated }) => heard.generated_before = generated,
                Ok(StreamEvent::Token { offset, token }) => {
                    heard.first_token.get_or_insert_with(|| begun.elapsed());
                    heard.tokens.push(token);
                    printer.token(offset, token)?;
                }
                Ok(StreamEvent::Finish { reason, generated, generations }) => {
                    heard.generations = GenerationMap::report(&generations);
                    heard.finish = Some((reason, generated));
                }
                Ok(StreamEvent::Refused { reason }) => {
                    service.stop()?;
                    bail!("request {id} is refused: {reason}");
                }
                Err(_) => {
                    let report = service.wait()?;
                    bail!(
                        "drained with {} unfinished request{}; the same command with --state {} --request-id {id} \
                         goes on",
                        report.unfinished,
                        if report.unfinished == 1 { "" } else { "s" },
                        state.path().display()
                    );
                }
            }
        }
        heard.total = begun.elapsed();
        let ended = Ended::of(service)?;
        let result = self.result(opened, &id, &heard, &ended);
        printer.end(&result)?;
        if let Some(recorder) = &recorder {
            self.write_tensors(recorder)?;
        }
        match &heard.finish {
            Some((FinishReason::Fault(reason), _)) => {
                Err(fault(format!("request {id} could not be computed: {reason}")))
            }
            Some((reason, _)) if !is_complete(reason) => {
                bail!("request {id} ended early: {}", finish_name(reason))
            }
            _ => Ok(Exit::Ok),
        }
    }

    fn force_generations(&self, service: &Service, id: &RequestId) -> anyhow::Result<()> {
        for (from, tiers) in self.generations.iter().flat_map(GenerationMap::later) {
            // Its outcome is seen in the generations of the result.
            drop(service.node().switch(SwitchTarget::Tiers(tiers.to_vec()), Some((id.clone(), from))));
        }
        Ok(())
    }

    fn write_tensors(&self, recorder: &Recorder) -> anyhow::Result<()> {
        if let Some(path) = &self.logits {
            recorder.write_logits(path)?;
        }
        if let Some(path) = &self.routes {
            recorder.write_routes(path)?;
        }
        Ok(())
    }

    fn result(&self, opened: &Opened, id: &RequestId, heard: &Heard, ended: &Ended) -> Value {
        let mut text = Detokenizer::new(opened.tokenizer.as_ref());
        let mut whole: String = heard.tokens.iter().map(|&token| text.push(token)).collect();
        whole.push_str(&text.end());
        let (reason, generated) = match &heard.finish {
            Some((reason, generated)) => (finish_name(reason), *generated),
            None => ("unfinished", heard.tokens.len() as u32),
        };
        let seconds = heard.total.as_secs_f64();
        let computed = generated.saturating_sub(heard.generated_before);
        json!({
            "request_id": id.as_str(),
            "tokens": heard.tokens,
            "offset": self.from_offset,
            "generated": generated,
            "text": opened.tokenizer.as_ref().map(|_| whole),
            "finish_reason": reason,
            "identity": identity(&ended.identity),
            "routing_seed": ended.routing_seed,
            "generations": heard.generations,
            "digest": ended.report.digest.to_string(),
            "state_digest": ended.report.state_digest.to_string(),
            "incarnation": ended.report.incarnation.0,
            "timings": {
                "load_ms": millis(ended.load_time),
                "first_token_ms": heard.first_token.map(millis),
                "total_ms": millis(heard.total),
                "tokens_per_s": if seconds > 0.0 { f64::from(computed) / seconds } else { 0.0 },
            },
        })
    }
}

fn check_prompt(prompt: &[u32], context: u32) -> anyhow::Result<()> {
    if prompt.is_empty() {
        bail!("the prompt is empty: give at least one token");
    }
    if prompt.len() as u64 > u64::from(context) {
        bail!("the prompt has {} tokens, the context of this model {context}: shorten it", prompt.len());
    }
    Ok(())
}

fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// What came over the stream.
#[derive(Debug, Default)]
struct Heard {
    tokens: Vec<u32>,
    generated_before: u32,
    finish: Option<(FinishReason, u32)>,
    generations: Value,
    first_token: Option<Duration>,
    total: Duration,
}

/// What is known once the node has ended.
#[derive(Debug)]
struct Ended {
    identity: Identity,
    routing_seed: Option<u64>,
    report: ExitReport,
    load_time: Duration,
}

impl Ended {
    fn of(service: Service) -> anyhow::Result<Self> {
        let (identity, routing_seed) = (service.node().identity().clone(), service.routing_seed);
        let load_time = service.load_time;
        let report = service.stop()?;
        Ok(Self { identity, routing_seed, report, load_time })
    }
}

/// What a journal belongs to, as JSON.
pub(crate) fn identity(identity: &Identity) -> Value {
    json!({
        "contract": identity.contract,
        "weights": identity.weights.to_string(),
        "architecture": identity.architecture.to_string(),
        "tokenizer": identity.tokenizer.to_string(),
    })
}
