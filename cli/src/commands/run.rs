//! `lite-llm run`: one request, or a batch of them.

use crate::commands::batch::{self, BatchArgs};
use crate::device::DeviceArgs;
use crate::exit::{Exit, fault, usage};
use crate::generations::GenerationMap;
use crate::history::History;
use crate::prompt::PromptArgs;
use crate::recompute::Recompute;
use crate::request::{RequestArgs, request_id};
use crate::serve::Service;
use crate::settings::{RuntimeArgs, Settings, no_tier};
use crate::state::{StateDir, unique};
use crate::stream::{Format, Printer, finish_name, is_complete};
use crate::tensors::{Recorder, Wanted};
use crate::whole_file::check_target;
use anyhow::{Context, anyhow, bail};
use clap::Args;
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::{Body, SwitchTarget};
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
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Where the journal is kept; a private directory, removed after a clean end, if left out
    #[arg(long, help_heading = "State", value_name = "DIR")]
    pub(crate) state: Option<PathBuf>,
    /// Idempotency key: the same id with the same request attaches to it
    #[arg(long, help_heading = "State", value_name = "ID", value_parser = request_id)]
    pub(crate) request_id: Option<RequestId>,
    /// Send the stream again from this token on
    #[arg(long, help_heading = "State", value_name = "N", default_value_t = 0, requires_all = ["state", "request_id"])]
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

/// A model that was looked at, and what was decided for it.
#[derive(Debug)]
pub(crate) struct Opened {
    pub(crate) tokenizer: Option<Tokenizer>,
    pub(crate) settings: Settings,
    pub(crate) vocab: u32,
    pub(crate) context: u32,
    /// Layers that have experts.
    layers: usize,
}

impl RunArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        if self.beats {
            crate::beats::heart()?;
        }
        // Whatever can be refused is refused before a model is opened, which may take long.
        self.check()?;
        let opened = self.open()?;
        match &self.batch.batch {
            Some(_) => batch::run(&self, opened),
            None => self.run_one(opened),
        }
    }

    pub(crate) fn check(&self) -> anyhow::Result<()> {
        if self.batch.batch.is_none() && self.batch.out.is_some() {
            return Err(usage("--out belongs to --batch"));
        }
        self.request.body(Vec::new()).check_values().map_err(usage)?;
        for path in self.logits.iter().chain(&self.routes) {
            check_target(path)?;
        }
        Ok(())
    }

    pub(crate) fn open(&self) -> anyhow::Result<Opened> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let mut settings = self.runtime.settle(&checkpoint)?;
        self.device.settle(&mut settings);
        if let Some(map) = &self.generations {
            let known: Vec<String> = checkpoint.tiers().iter().map(|tier| tier.name.clone()).collect();
            if let Some(unknown) = map.tiers().find(|tier| !known.contains(tier)) {
                return Err(usage(format!("--generations: {}", no_tier(unknown, &known))));
            }
            settings.config.tier_set = map.first().to_vec();
        }
        if self.logits.is_some() {
            settings.expect_all_logits();
        }
        let tokenizer = Tokenizer::of(&checkpoint)?;
        if tokenizer.is_none() && !self.request.stop.is_empty() {
            bail!("--stop needs a tokenizer, and {} has no tokenizer.json", self.model.display());
        }
        let arch = checkpoint.arch();
        let (vocab, layers) = (arch.vocab as u32, arch.moe_layers().len());
        Ok(Opened { tokenizer, settings, vocab, context: arch.context, layers })
    }

    fn run_one(&self, mut opened: Opened) -> anyhow::Result<Exit> {
        let prompt = self.prompt.read()?.tokens(opened.tokenizer.as_ref(), &self.model)?;
        let body = self.request.body(prompt);
        body.check_prompt(opened.vocab, opened.context).map_err(anyhow::Error::msg)?;
        let positions = body.prompt.len() as u64 + u64::from(body.max_tokens);
        opened.settings.expect_positions(positions.min(u64::from(opened.context)));
        let id = match &self.request_id {
            Some(id) => id.clone(),
            None => request_id(&unique("request")).map_err(anyhow::Error::msg)?,
        };
        let state = StateDir::choose(self.state.as_deref())?;
        if self.from_offset > 0 && !state.has_journal() {
            bail!("there is no stream to send again: {} has no journal", state.path().display());
        }
        let ended = self.stream_one(&opened, &state, &id, body);
        state.end(matches!(ended, Ok(Ok(()))));
        ended?.map(|()| Exit::Ok)
    }

    /// What is to be kept of the request, if anything.
    fn recorder(&self, opened: &Opened, body: &Body) -> Option<Recorder> {
        let wanted = Wanted {
            logits: self.logits.clone(),
            routes: self.routes.clone(),
            prompt: body.prompt.len() as u32,
            layers: opened.layers,
        };
        (self.logits.is_some() || self.routes.is_some()).then(|| Recorder::new(wanted))
    }

    /// Runs the request to its end; what it returns then says how that was.
    ///
    /// # Errors
    /// If it was broken off.
    fn stream_one(
        &self,
        opened: &Opened,
        state: &StateDir,
        id: &RequestId,
        body: Body,
    ) -> anyhow::Result<anyhow::Result<()>> {
        let recorder = self.recorder(opened, &body);
        let prompt = recorder.as_ref().map(|_| body.prompt.clone()).unwrap_or_default();
        let capture = recorder.clone().map(|recorder| Box::new(recorder) as Box<dyn Capture + Send>);
        let service = Service::start(&self.model, state, &opened.settings, capture)?;
        if self.beats {
            crate::beats::progress(service.node().handle())?;
        }
        self.force_generations(&service, id)?;
        if let Some(recorder) = &recorder {
            let status = service.node().status()?;
            let known = status.requests.iter().find(|r| r.id == *id).map(|r| r.number);
            recorder.follow(known, status.requests.iter().map(|r| r.number));
        }
        let heard = match self.hear(opened, service, id, body).with_context(|| state.goes_on(Some(id)))? {
            Ok(heard) => heard,
            Err(refused) => return Ok(Err(refused)),
        };
        let ended_early = match &heard.reason {
            FinishReason::Fault(reason) => {
                Some(fault(format!("request {id} could not be computed: {reason}")))
            }
            reason if is_complete(reason) => None,
            reason => Some(anyhow!("request {id} ended early: {}", finish_name(reason))),
        };
        if let Some(error) = ended_early {
            return Ok(Err(error));
        }
        if let Some(recorder) = recorder {
            // The last token was chosen, and never computed.
            let positions = prompt.len() as u32 + heard.generated.saturating_sub(1);
            if !recorder.is_complete(positions) {
                self.recompute(opened, state, id, &prompt, &recorder)?;
            }
            recorder.write(positions)?;
        }
        Ok(Ok(()))
    }

    /// Shows the stream, stops the node, and shows the result; none if the request is refused.
    fn hear(
        &self,
        opened: &Opened,
        service: Service,
        id: &RequestId,
        body: Body,
    ) -> anyhow::Result<anyhow::Result<Heard>> {
        let begun = Instant::now();
        let events = service.node().submit(id.clone(), body, self.from_offset);
        let format = Format { stream: self.stream, json: self.json };
        let mut printer = Printer::new(format, opened.tokenizer.as_ref());
        let (mut tokens, mut generated_before, mut first_token) = (Vec::new(), 0, None);
        loop {
            match events.recv() {
                Ok(StreamEvent::Accepted { generated }) => generated_before = generated,
                Ok(StreamEvent::Token { offset, token }) => {
                    first_token.get_or_insert_with(|| begun.elapsed());
                    tokens.push(token);
                    printer.token(offset, token)?;
                }
                Ok(StreamEvent::Finish { reason, generated, generations }) => {
                    let total = begun.elapsed();
                    let generations = GenerationMap::report(&generations);
                    let heard = Heard {
                        tokens,
                        generated_before,
                        reason,
                        generated,
                        generations,
                        first_token,
                        total,
                    };
                    let ended = Ended::of(service)?;
                    printer.end(&self.result(opened, id, &heard, &ended))?;
                    return Ok(Ok(heard));
                }
                Ok(StreamEvent::Refused { reason, .. }) => {
                    service.stop()?;
                    return Ok(Err(anyhow!("request {id} is refused: {reason}")));
                }
                Err(_) => return Err(service.unfinished()),
            }
        }
    }

    /// Computes a stream once more that an earlier process finished: what the journal says has no logits and no routes.
    fn recompute(
        &self,
        opened: &Opened,
        state: &StateDir,
        id: &RequestId,
        prompt: &[u32],
        recorder: &Recorder,
    ) -> anyhow::Result<()> {
        let mut history = History::open(state.path())?;
        history.walk(None, |_| Ok(()))?;
        let Settings { isa, threads, .. } = opened.settings;
        let mut model = Recompute::of(&history.engine, &self.model, state.path(), isa, threads)?;
        recorder.begin_again(0);
        model.ended(&history.engine, id, prompt, &mut recorder.clone())
    }

    fn force_generations(&self, service: &Service, id: &RequestId) -> anyhow::Result<()> {
        for (from, tiers) in self.generations.iter().flat_map(GenerationMap::later) {
            // Its outcome is seen in the generations of the result.
            drop(service.node().switch(SwitchTarget::Tiers(tiers.to_vec()), Some((id.clone(), from))));
        }
        Ok(())
    }

    fn result(&self, opened: &Opened, id: &RequestId, heard: &Heard, ended: &Ended) -> Value {
        let mut text = Detokenizer::new(opened.tokenizer.as_ref());
        let mut whole: String = heard.tokens.iter().map(|&token| text.push(token)).collect();
        whole.push_str(&text.end());
        let seconds = heard.total.as_secs_f64();
        let computed = heard.generated.saturating_sub(heard.generated_before);
        json!({
            "request_id": id.as_str(),
            "tokens": heard.tokens,
            "offset": self.from_offset,
            "generated": heard.generated,
            "text": opened.tokenizer.as_ref().map(|_| whole),
            "finish_reason": finish_name(&heard.reason),
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

fn millis(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// What came over the stream.
#[derive(Debug)]
struct Heard {
    tokens: Vec<u32>,
    generated_before: u32,
    reason: FinishReason,
    generated: u32,
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
