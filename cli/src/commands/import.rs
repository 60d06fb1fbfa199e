//! `lite-llm import`: from a Hugging Face directory or a GGUF file to a native checkpoint, whole or in tiers.

use crate::exit::{Exit, usage};
use crate::quantity::Size;
use crate::terminal;
use clap::{Args, ValueEnum};
use indicatif::{ProgressBar, ProgressStyle};
use lite_llm_model::checkpoint::import::{Wanted, import};
use lite_llm_model::checkpoint::tiers::{Division, parse_tiers, read_tiers};
use lite_llm_model::kernels::Quantised;
use lite_llm_model::trace::Trace;
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The Hugging Face directory, or a GGUF file whose tensors are F32, F16, BF16, Q8_0 or Q4_0
    source: PathBuf,
    /// The checkpoint to make; begun again after a crash, it goes on
    target: PathBuf,
    /// Tiers of experts: NAME:EXPERTS[:hot|warm|cold],...; one tier of all if left out
    ///
    /// EXPERTS is a count (the first of each layer that no other tier has, or with --by-use the most used), a list like
    /// @0-3+9 (experts 0, 1, 2, 3 and 9 of each layer), or `rest` (all that are left). For a model whose router selects
    /// tiers: GROUPSxEXPERTS, as the router has them.
    #[arg(long, value_name = "SPEC")]
    tiers: Option<String>,
    /// Tiers from a JSON file, which may list other experts in each layer
    ///
    /// [{"name": "core", "placement": "hot", "layers": {"0": [1, 5], "1": [0, 2]}}, {"name": "rest", "placement":
    /// "cold"}]. A tier has "layers", or "experts": the same list in each layer, or neither: the rest.
    #[arg(long, value_name = "FILE", conflicts_with = "tiers")]
    tiers_file: Option<PathBuf>,
    /// Let counts of --tiers take the most used experts of each layer, by a trace of this model
    #[arg(long, value_name = "TRACE", requires = "tiers")]
    by_use: Option<PathBuf>,
    /// Make integers of all matrices but routers: 8.5 or 4.5 bits a weight, of which the output changes
    #[arg(long, value_name = "FORM")]
    quantise: Option<Integers>,
    /// The directory of a GGUF file's config.json and tokenizer, as published; its own if left out
    #[arg(long, value_name = "DIR")]
    with: Option<PathBuf>,
    /// Threads that hash and pack; one per core if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// Integers with a scale for each 32 inputs.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Integers {
    /// Of 8 bits, near what is published
    Q8,
    /// Of 4 bits, half as large and coarser
    Q4,
}

impl From<Integers> for Quantised {
    fn from(integers: Integers) -> Self {
        match integers {
            Integers::Q8 => Self::Q8,
            Integers::Q4 => Self::Q4,
        }
    }
}

impl ImportArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        let division = self.division()?;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.threads.map_or(cores, usize::from);
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {eta} left") {
            bar.set_style(style);
        }
        let wanted = Wanted {
            division: division.as_ref(),
            quantise: self.quantise.map(Quantised::from),
            with: self.with.as_deref(),
        };
        let imported = import(&self.source, &self.target, wanted, threads, |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        let imported = imported?;
        let mut out = terminal::stdout();
        if self.json {
            let value = json!({
                "path": self.target.display().to_string(),
                "written": imported.written,
                "kept": imported.kept,
                "bytes": imported.bytes,
            });
            writeln!(out, "{value}")?;
        } else {
            writeln!(
                out,
                "{}: {} in {} files, {} of them kept from an earlier attempt",
                self.target.display(),
                Size(imported.bytes),
                imported.written + imported.kept,
                imported.kept
            )?;
        }
        Ok(Exit::Ok)
    }

    /// What the tiers are to be.
    fn division(&self) -> anyhow::Result<Option<Division>> {
        let division = match (&self.tiers, &self.tiers_file) {
            (Some(spec), _) => parse_tiers(spec).map_err(|error| usage(format!("--tiers: {error}")))?,
            (None, Some(path)) => read_tiers(path).map_err(anyhow::Error::msg)?,
            (None, None) => return Ok(None),
        };
        Ok(Some(match &self.by_use {
            None => division,
            Some(path) => division.by_use(Trace::read(path).map_err(anyhow::Error::msg)?),
        }))
    }
}
