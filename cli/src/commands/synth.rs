//! `lite-llm synth`: a random checkpoint of any size.

use super::import::Integers;
use crate::exit::{Exit, usage};
use crate::quantity::Size;
use crate::terminal;
use anyhow::Context;
use clap::{Args, ValueEnum};
use lite_llm_model::checkpoint::import::{Wanted, import};
use lite_llm_model::checkpoint::tiers::{Division, parse_tiers};
use lite_llm_model::kernels::DType;
use lite_llm_model::synth::{SynthError, SynthFamily, SynthReport, SynthSpec, synth, synth_native};
use serde_json::json;
use std::io::Write;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub(crate) struct SynthArgs {
    /// The directory to make
    dir: PathBuf,
    /// The family
    #[arg(long)]
    family: Family,
    /// Decoder layers
    #[arg(long, value_name = "N")]
    layers: Option<u32>,
    /// Width of the residual stream
    #[arg(long, value_name = "N")]
    hidden: Option<u32>,
    /// Query heads
    #[arg(long, value_name = "N")]
    heads: Option<u32>,
    /// Key/value heads; must divide the query heads
    #[arg(long, value_name = "N")]
    kv_heads: Option<u32>,
    /// Values in a head; hidden / heads if left out
    #[arg(long, value_name = "N")]
    head_dim: Option<u32>,
    /// Experts of a layer
    #[arg(long, value_name = "N")]
    experts: Option<u32>,
    /// Experts that a position selects
    #[arg(long, value_name = "N")]
    top_k: Option<u32>,
    /// Width of an expert, or of the dense block
    #[arg(long, value_name = "N")]
    intermediate: Option<u32>,
    /// Width of the shared expert of a family that has one
    #[arg(long, value_name = "N")]
    shared_intermediate: Option<u32>,
    /// Tokens; from 259 on a tokenizer is written too
    #[arg(long, value_name = "N")]
    vocab: Option<u32>,
    /// Longest sequence
    #[arg(long, value_name = "N")]
    context: Option<u32>,
    /// Percent of each token's embedding that all have in common: with any, routers prefer the same experts in every text
    #[arg(long, value_name = "PERCENT", default_value_t = 0)]
    skew: u32,
    /// Write a native checkpoint with these tiers of experts: NAME:EXPERTS[:hot|warm|cold],... as of import; tiered_moe
    /// has them in its router, with NAME:GROUPSxEXPERTS
    #[arg(long, value_name = "SPEC")]
    tiers: Option<String>,
    /// Write a native checkpoint whose matrices are integers, as of import; nothing larger is written on the way
    #[arg(long, value_name = "FORM")]
    quantise: Option<Integers>,
    /// Storage type of the weights, or of what is quantised
    #[arg(long, value_name = "TYPE", default_value = "f32")]
    dtype: WeightType,
    /// Seed of the weights; the same seed gives the same bytes
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// The most that one file of weights holds
    #[arg(long, value_name = "SIZE")]
    shard_size: Option<Size>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
#[value(rename_all = "snake_case")]
enum Family {
    Llama,
    Mixtral,
    Olmoe,
    Qwen2Moe,
    Qwen3Moe,
    TieredMoe,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum WeightType {
    F32,
    Bf16,
    F16,
}

impl SynthArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        // The router of a tiered form has the tiers: they are no division.
        let tiers = self.tiers.as_ref().filter(|_| !matches!(self.family, Family::TieredMoe));
        let division = tiers.map(|tiers| parse_tiers(tiers)).transpose();
        let division = division.map_err(|error| usage(format!("--tiers: {error}")))?;
        if let Some(division) = &division {
            let counted = division.check_counts(self.spec()?.experts);
            counted.map_err(|error| usage(format!("--tiers: {error}; give other counts, or --experts")))?;
        }
        let report = match (self.quantise, division) {
            (Some(integers), division) => {
                let wanted =
                    Wanted { division: division.as_ref(), quantise: Some(integers.into()), with: None };
                let written = synth_native(&self.dir, &self.spec()?, wanted, cores(), |_, _| {});
                written.map_err(misused)?
            }
            (None, Some(tiers)) => self.native(&tiers)?,
            (None, None) => write(&self.dir, &self.spec()?)?,
        };
        let mut out = terminal::stdout();
        if self.json {
            let value = json!({
                "path": report.dir.display().to_string(),
                "tensors": report.tensors,
                "parameters": report.parameters,
                "bytes": report.bytes,
                "files": report.shards,
                "tokenizer": report.tokenizer,
            });
            writeln!(out, "{value}")?;
        } else {
            writeln!(
                out,
                "{}: {} parameters in {} tensors, {} in {} file{}{}",
                report.dir.display(),
                report.parameters,
                report.tensors,
                Size(report.bytes),
                report.shards,
                if report.shards == 1 { "" } else { "s" },
                if report.tokenizer { ", with a tokenizer" } else { ", no tokenizer: prompts are token ids" }
            )?;
        }
        Ok(Exit::Ok)
    }

    /// Writes the Hugging Face form aside, then imports it.
    fn native(&self, tiers: &Division) -> anyhow::Result<SynthReport> {
        let Some(name) = self.dir.file_name() else {
            return Err(usage(format!("{} is no name of a directory to make", self.dir.display())));
        };
        // Under this name what a killed attempt left is found, and cleared away.
        let source = self.dir.with_file_name(format!(".{}.source", name.to_string_lossy()));
        clear(&source)?;
        let report = write(&source, &self.spec()?)?;
        let imported = import(&source, &self.dir, Some(tiers), cores(), |_, _| {});
        clear(&source)?;
        let imported = imported?;
        Ok(SynthReport {
            dir: self.dir.clone(),
            bytes: imported.bytes,
            shards: imported.written as u64,
            ..report
        })
    }

    fn spec(&self) -> anyhow::Result<SynthSpec> {
        let family = match self.family {
            Family::Llama => SynthFamily::Llama,
            Family::Mixtral => SynthFamily::Mixtral,
            Family::Olmoe => SynthFamily::Olmoe,
            Family::Qwen2Moe => SynthFamily::Qwen2Moe,
            Family::Qwen3Moe => SynthFamily::Qwen3Moe,
            Family::TieredMoe => SynthFamily::TieredMoe,
        };
        let mut spec = SynthSpec::of(family);
        if let Some(tiers) = self.tiers.as_ref().filter(|_| family == SynthFamily::TieredMoe) {
            let tiers = parse_tiers(tiers).and_then(|division| division.counts());
            spec.tiers = tiers.map_err(|error| usage(format!("--tiers: {error}")))?;
            spec.experts = spec.tiers.iter().fold(0, |sum: u32, tier| sum.saturating_add(tier.experts));
        }
        let mixed = spec.kv_heads == spec.heads;
        for (given, field) in [
            (self.layers, &mut spec.layers),
            (self.hidden, &mut spec.hidden),
            (self.experts, &mut spec.experts),
            (self.intermediate, &mut spec.intermediate),
            (self.shared_intermediate, &mut spec.shared_intermediate),
            (self.vocab, &mut spec.vocab),
            (self.context, &mut spec.context),
        ] {
            *field = given.unwrap_or(*field);
        }
        spec.top_k = self.top_k.unwrap_or(spec.top_k.min(spec.experts));
        spec.heads = self.heads.unwrap_or_else(|| fitting_heads(spec.hidden, spec.heads));
        let implied = if mixed {
            spec.heads
        } else {
            (1..=2).rev().find(|n| spec.heads.is_multiple_of(*n)).unwrap_or(1)
        };
        spec.kv_heads = self.kv_heads.unwrap_or(implied);
        spec.head_dim = self.head_dim.unwrap_or(spec.hidden / spec.heads.max(1));
        spec.dtype = match self.dtype {
            WeightType::F32 => DType::F32,
            WeightType::Bf16 => DType::Bf16,
            WeightType::F16 => DType::F16,
        };
        (spec.seed, spec.skew) = (self.seed, self.skew);
        spec.shard_bytes = self.shard_size.map_or(spec.shard_bytes, |size| size.0);
        Ok(spec)
    }
}

fn clear(dir: &Path) -> anyhow::Result<()> {
    match std::fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

fn write(dir: &Path, spec: &SynthSpec) -> anyhow::Result<SynthReport> {
    synth(dir, spec).map_err(misused)
}

/// What no such checkpoint can be, the command line says.
fn misused(error: SynthError) -> anyhow::Error {
    match error {
        SynthError::Invalid { .. } => usage(error.to_string()),
        other => other.into(),
    }
}

fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// The most heads, up to the usual number, into which the width divides evenly.
fn fitting_heads(hidden: u32, usual: u32) -> u32 {
    (1..=usual).rev().find(|heads| hidden.is_multiple_of(2 * heads)).unwrap_or(1)
}
