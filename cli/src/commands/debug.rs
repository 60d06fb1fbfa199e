//! `lite-llm debug`: step through journals, forward and back.

use crate::debugger::{Tape, print, show};
use crate::exit::{Exit, usage};
use crate::terminal;
use anyhow::{Context, ensure};
use clap::Args;
use std::fs::File;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};

/// Journals that a screen has room for.
const TAPES_MAX: usize = 8;
/// Bytes of the largest crash report.
const REPORT_BYTES_MAX: u64 = 16 << 20;

#[derive(Debug, Args)]
pub(crate) struct DebugArgs {
    /// State directories, or crash reports in them, which begin at the crash; several are shown side by side
    #[arg(required = true)]
    states: Vec<PathBuf>,
    /// Begin at this record, not at the last
    #[arg(long, value_name = "SEQ")]
    at: Option<u64>,
    /// Print what happened there and the state as text, and leave
    #[arg(long)]
    print: bool,
}

impl DebugArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        if self.states.len() > TAPES_MAX {
            return Err(usage(format!(
                "{} journals do not fit on a screen; give up to {TAPES_MAX}",
                self.states.len()
            )));
        }
        let (mut tapes, mut at) = (Vec::new(), self.at);
        for path in &self.states {
            let (dir, last) = place(path)?;
            tapes.push(Tape::open(&dir)?);
            at = at.or(last.filter(|_| tapes.len() == 1));
        }
        if self.print {
            let mut out = terminal::stdout();
            for tape in &mut tapes {
                if self.states.len() > 1 {
                    writeln!(out, "{}", tape.name)?;
                }
                let (_, last) = tape.range();
                for line in print(tape, at.unwrap_or(last))? {
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
