//! `lite-llm debug`: step through journals, and those of simulated runs, forward and back.

use crate::commands::sim;
use crate::debugger::{Tape, print, show};
use crate::exit::{Exit, usage};
use crate::history::History;
use crate::terminal::{self, tell};
use anyhow::{Context, ensure};
use clap::Args;
use lite_llm_sim::cluster::run::run_and_look;
use lite_llm_sim::decision::LogFile;
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

/// Journals that a screen has room for.
const TAPES_MAX: usize = 8;
/// Bytes of the largest crash report.
const REPORT_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, Args)]
pub(crate) struct DebugArgs {
    /// State directories, or crash reports in them, which begin at the crash, or a simulation's decision log, which is run again;
    /// several journals are shown side by side
    #[arg(required = true)]
    states: Vec<PathBuf>,
    /// Begin at this record, not at the last
    #[arg(long, value_name = "SEQ")]
    at: Option<u64>,
    /// Print what happened there and the state as text, and leave
    #[arg(long)]
    print: bool,
    /// Plant this bug in the core before a decision log is run, in a build that has them
    #[arg(long, value_name = "NAME")]
    plant: Option<String>,
}

impl DebugArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        if let Some(name) = &self.plant {
            sim::plant(name)?;
        }
        if self.states.len() > TAPES_MAX {
            return Err(usage(format!(
                "{} journals do not fit on a screen; give up to {TAPES_MAX}",
                self.states.len()
            )));
        }
        let (mut tapes, mut at) = (Vec::new(), self.at);
        for path in &self.states {
            if is_decision_log(path)? {
                tapes.extend(simulated(path)?);
                continue;
            }
            let (dir, last) = place(path)?;
            tapes.push(Tape::open(&dir)?);
            at = at.or(last.filter(|_| tapes.len() == 1));
        }
        tapes.truncate(TAPES_MAX);
        let several = tapes.len() > 1;
        if self.print {
            let mut out = terminal::stdout();
            for tape in &mut tapes {
                if several {
                    writeln!(out, "{}", tape.name)?;
                }
                let (first, last) = tape.range();
                // Journals side by side do not all reach as far.
                let at = at.map_or(last, |at| if several { at.clamp(first, last) } else { at });
                for line in print(tape, at)? {
                    writeln!(out, "{line}")?;
                }
                if let Some(why) = tape.broken() {
                    writeln!(out, "the tape ends at {last}: {why}")?;
                }
            }
            return Ok(Exit::Ok);
        }
        ensure!(
            std::io::stdout().is_terminal() && std::io::stdin().is_terminal(),
            "standard input and output are no terminal; --print gives text"
        );
        show(tapes, at)?;
        Ok(Exit::Ok)
    }
}

fn is_decision_log(path: &Path) -> anyhow::Result<bool> {
    if !path.is_file() {
        return Ok(false);
    }
    let mut start = Vec::new();
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    file.take(64).read_to_end(&mut start)?;
    Ok(start.starts_with(LogFile::HEADER.as_bytes()))
}

/// Runs a decision log again: the journal of each node as it is at the end, or at the first thing that is wrong.
fn simulated(path: &Path) -> anyhow::Result<Vec<Tape>> {
    let (report, journals) = run_and_look(&sim::of_log(path)?);
    match &report.violation {
        Some(violation) => tell!("the run ends: {violation}"),
        None => tell!("nothing is wrong with this run"),
    }
    let mut tapes = Vec::new();
    for (node, journal) in journals.into_iter().enumerate() {
        match journal {
            Ok(scanned) if scanned.header.is_some() => {
                tapes.push(Tape::of(format!("node {node}"), History::of(scanned)?))
            }
            Ok(_) => tell!("node {node} has no journal"),
            Err(error) => tell!("the journal of node {node} cannot be read: {error}"),
        }
    }
    ensure!(!tapes.is_empty(), "no node of this run has a journal");
    Ok(tapes)
}

/// The state directory that is meant, and the record at which a crash report in it was written.
fn place(path: &Path) -> anyhow::Result<(PathBuf, Option<u64>)> {
    if !path.is_file() {
        return Ok((path.to_path_buf(), None));
    }
    let mut text = Vec::new();
    let file = File::open(path).with_context(|| format!("cannot read {}", path.display()))?;
    file.take(REPORT_BYTES_MAX).read_to_end(&mut text)?;
    let report: Option<serde_json::Value> = serde_json::from_slice(&text).ok();
    let last = report.and_then(|report| report["journal"]["last"].as_u64());
    let dir = path.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or_else(|| Path::new("."));
    Ok((dir.to_path_buf(), last))
}
