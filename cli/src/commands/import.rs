//! `lite-llm import`: from a Hugging Face directory to a native checkpoint, whole or in tiers.

use crate::exit::{Exit, usage};
use crate::quantity::Size;
use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};
use lite_llm_model::checkpoint::import::{import, parse_tiers};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;

#[derive(Debug, Args)]
pub(crate) struct ImportArgs {
    /// The Hugging Face directory
    source: PathBuf,
    /// The checkpoint to make; begun again after a crash, it goes on
    target: PathBuf,
    /// Tiers of experts: NAME:COUNT[:hot|warm|cold],...; one tier of all if left out
    #[arg(long, value_name = "SPEC")]
    tiers: Option<String>,
    /// Threads that hash; one per core if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    threads: Option<u16>,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

impl ImportArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        let tiers = match &self.tiers {
            Some(spec) => Some(parse_tiers(spec).map_err(|error| usage(format!("--tiers: {error}")))?),
            None => None,
        };
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let threads = self.threads.map_or(cores, usize::from);
        let bar = ProgressBar::new(0);
        if let Ok(style) = ProgressStyle::with_template("{bar:40} {bytes} of {total_bytes}, {eta} left") {
            bar.set_style(style);
        }
        let imported = import(&self.source, &self.target, tiers, threads, |done, total| {
            bar.set_length(total);
            bar.set_position(done);
        });
        bar.finish_and_clear();
        let imported = imported?;
        let mut out = std::io::stdout().lock();
        if self.json {
            let value = json!({
                "path": self.target,
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
}
