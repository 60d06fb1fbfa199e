//! `lite-llm bench`: how fast a model runs here, where the time goes, and what would have been possible.

use crate::bench::course::{Course, Watch};
use crate::bench::figures::{Around, Figures};
use crate::bench::picture;
use crate::bench::roof::Roof;
use crate::commands::run::identity;
use crate::device::{DeviceArgs, DeviceName};
use crate::exit::{Exit, fault, usage};
use crate::quantity::Size;
use crate::serve::Service;
use crate::settings::{RuntimeArgs, Settings};
use crate::state::StateDir;
use crate::stream::{finish_name, is_complete};
use crate::terminal::stdout;
use crate::whole_file::{check_target, write_whole};
use anyhow::{Context, anyhow, bail};
use clap::Args;
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::{Body, Sampling};
use lite_llm_core::plan::Identity;
use lite_llm_hw::node::StreamEvent;
use lite_llm_hw::{bandwidth, memory};
use lite_llm_model::Checkpoint;
use lite_llm_model::kernels::PAGE_POSITIONS;
use serde_json::{Value, json};
use std::io::Write;
use std::path::PathBuf;
use std::sync::mpsc::Receiver;

/// Bytes that are read to find out what memory delivers, if the budget has four times as many: more than any cache has.
const READ_BYTES: u64 = 512 << 20;
const READ_BYTES_MIN: u64 = 64 << 20;

#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// A Hugging Face directory or an imported checkpoint
    model: PathBuf,
    /// Tokens of each prompt, chosen at random
    #[arg(long, value_name = "N", default_value_t = 256, value_parser = clap::value_parser!(u32).range(1..))]
    prompt: u32,
    /// Tokens that each request generates
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(2..))]
    decode: u32,
    /// Requests at a time
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    batch: u32,
    /// Of prompts and choices: the same seed gives the same tokens
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Choose the likeliest token, not one at temperature 1: a model with random weights soon repeats itself then
    #[arg(long)]
    greedy: bool,
    /// Print one JSON object
    #[arg(long, help_heading = "Output")]
    json: bool,
    /// Write a page with a picture of it
    #[arg(long, help_heading = "Output", value_name = "FILE")]
    report: Option<PathBuf>,
    #[command(flatten)]
    runtime: RuntimeArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// What a node did.
struct Ran {
    tokens: Vec<Vec<u32>>,
    identity: Identity,
    load_s: f64,
    peak_rss_bytes: u64,
}

impl BenchArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        if let Some(path) = &self.report {
            check_target(path)?;
        }
        let checkpoint = Checkpoint::open(&self.model)?;
        let settings = self.settle(&checkpoint)?;
        let vocab = checkpoint.arch().vocab as u32;
        let step_bytes = checkpoint.step_bytes()?;
        let experts = experts(&checkpoint);
        drop(checkpoint);

        let read_bytes = (settings.config.memory_bytes / 4).clamp(READ_BYTES_MIN, READ_BYTES);
        let read = || {
            bandwidth::memory_read(settings.threads, read_bytes as usize)
                .with_context(|| format!("cannot have {} to read", Size(read_bytes)))
        };
        let before = read()?;
        memory::forget_peak();
        let mut state = StateDir::choose(None)?;
        let watch = Watch::new(Roof::new(self.prompt));
        let ran = self.serve(&settings, &state, &watch, (vocab, experts)).and_then(|ran| {
            let course = Course::read(state.path(), self.prompt, &watch);
            Ok((ran, course.context("the journal of the run")?))
        });
        state.discard();
        let (ran, course) = ran?;
        // Without turns the better minute of the two is the roof: neighbours only ever take from memory.
        let dram_bytes_per_s = match watch.roof.bytes_per_s() {
            Some(rate) => rate,
            None => before.max(read()?),
        };
        let carving = course.carving;
        let around = Around {
            dram_bytes_per_s,
            peak_rss_bytes: ran.peak_rss_bytes,
            step_bytes,
            position_bytes: carving.page_bytes as f64 / PAGE_POSITIONS as f64,
        };
        let figures = Figures::of(&course, &around);
        if let Some(path) = &self.report {
            let title = format!("{}: {} rows on {} threads", self.name(), self.batch, settings.threads);
            write_whole(path, picture::page(&title, &course, &figures).as_bytes())?;
        }
        let mut out = stdout();
        if self.json {
            writeln!(out, "{}", self.object(&settings, &ran, &figures)?)?;
        } else {
            writeln!(out, "{figures}")?;
        }
        Ok(Exit::Ok)
    }

    fn name(&self) -> String {
        self.model.file_name().unwrap_or(self.model.as_os_str()).to_string_lossy().into_owned()
    }

    fn settle(&self, checkpoint: &Checkpoint) -> anyhow::Result<Settings> {
        let mut settings = self.runtime.settle(checkpoint)?;
        self.device.settle(&mut settings);
        let context = checkpoint.arch().context;
        if self.prompt.checked_add(self.decode).is_none_or(|positions| positions > context) {
            let Self { prompt, decode, .. } = self;
            return Err(usage(format!(
                "--prompt {prompt} and --decode {decode} are more than the context of this model, {context}"
            )));
        }
        // A snapshot lets go of records that are read afterwards.
        settings.config.snapshot_every = 0;
        settings.journal_bytes = None;
        // Each has pages of its own, the last of which need not be full.
        let positions = (self.prompt + self.decode).next_multiple_of(PAGE_POSITIONS as u32);
        settings.expect_positions(u64::from(self.batch) * u64::from(positions));
        let limits = &mut settings.config.limits;
        limits.rows_max = limits.rows_max.max(self.batch);
        limits.requests_max = limits.requests_max.max(self.batch);
        Ok(settings)
    }

    /// Runs all requests to their end.
    fn serve(
        &self,
        settings: &Settings,
        state: &StateDir,
        watch: &Watch,
        (vocab, experts): (u32, u64),
    ) -> anyhow::Result<Ran> {
        let service = Service::start(&self.model, state, settings, Some(Box::new(watch.clone())))?;
        let load_s = service.load_time.as_secs_f64();
        let peak = || memory::peak_bytes().context("cannot tell how much memory was used");
        let mut peak_rss_bytes = peak()?;
        // A GPU does not read this memory.
        let on_cpu = self.device.device == DeviceName::Cpu;
        if on_cpu && service.node().status().is_ok_and(|status| u64::from(status.carving.slots) >= experts) {
            watch.roof.raise(settings.threads).context("cannot have memory to read")?;
            memory::forget_peak();
        }
        let identity = service.node().identity().clone();
        let streams: Vec<Receiver<StreamEvent>> = (0..self.batch)
            .map(|number| {
                let id = RequestId::new(format!("bench-{number}")).expect("a good id");
                service.node().submit(id, self.body(number, vocab), 0)
            })
            .collect();
        let mut tokens = Vec::new();
        for stream in streams {
            match hear(&stream) {
                Ok(Some(heard)) => tokens.push(heard),
                Ok(None) => return Err(service.unfinished()),
                Err(error) => return Err(service.stop().err().unwrap_or(error)),
            }
        }
        // What readings have is not the node's, and was there all the time.
        peak_rss_bytes = peak_rss_bytes.max(peak()?.saturating_sub(watch.roof.bytes()));
        service.stop()?;
        Ok(Ran { tokens, identity, load_s, peak_rss_bytes })
    }

    fn body(&self, number: u32, vocab: u32) -> Body {
        // Any tokens will do, but others for each request.
        let mut state = self.seed ^ (u64::from(number) << 32);
        let mut token = || {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            (state >> 33) as u32 % vocab
        };
        let prompt = (0..self.prompt).map(|_| token()).collect();
        let temperature = if self.greedy { 0.0 } else { 1.0 };
        let sampling = Sampling { temperature, seed: self.seed ^ u64::from(number), ..Sampling::default() };
        Body { prompt, max_tokens: self.decode, ignore_eos: true, sampling, ..Body::default() }
    }

    fn object(&self, settings: &Settings, ran: &Ran, figures: &Figures) -> anyhow::Result<Value> {
        let mut object = json!({
            "model": self.name(),
            "identity": identity(&ran.identity),
            "device": self.device.device.to_string(),
            "threads": settings.threads,
            "isa": format!("{:?}", settings.isa).to_lowercase(),
            "memory_bytes": settings.config.memory_bytes,
            "prompt": self.prompt,
            "decode": self.decode,
            "batch": self.batch,
            "seed": self.seed,
            "load_s": ran.load_s,
            "tokens_digest": Digest::of_value(&ran.tokens).to_string(),
        });
        let (Value::Object(all), Value::Object(figures)) = (&mut object, serde_json::to_value(figures)?)
        else {
            bail!("figures are an object");
        };
        all.extend(figures);
        Ok(object)
    }
}

/// Experts over all layers.
fn experts(checkpoint: &Checkpoint) -> u64 {
    let arch = checkpoint.arch();
    arch.moe.as_ref().map_or(0, |moe| moe.experts as u64 * arch.moe_layers().len() as u64)
}

/// The tokens of a stream; nothing if it broke off.
fn hear(stream: &Receiver<StreamEvent>) -> anyhow::Result<Option<Vec<u32>>> {
    let mut tokens = Vec::new();
    loop {
        match stream.recv() {
            Ok(StreamEvent::Accepted { .. }) => {}
            Ok(StreamEvent::Token { token, .. }) => tokens.push(token),
            Ok(StreamEvent::Finish { reason, .. }) if is_complete(&reason) => return Ok(Some(tokens)),
            Ok(StreamEvent::Finish { reason, .. }) => {
                return Err(fault(format!("a request ended early: {}", finish_name(&reason))));
            }
            Ok(StreamEvent::Refused { reason, .. }) => return Err(anyhow!("a request is refused: {reason}")),
            Err(_) => return Ok(None),
        }
    }
}
