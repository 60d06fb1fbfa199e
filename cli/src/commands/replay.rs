//! `lite-llm replay`: prove a journal, by its digests alone or by computing everything again.

use crate::divergence::Divergence;
use crate::exit::{Exit, usage};
use crate::history::{History, Moment};
use crate::recompute::{OtherBits, Recompute};
use crate::terminal;
use clap::Args;
use lite_llm_core::output::Output;
use lite_llm_model::kernels::Isa;
use serde_json::{Value, json};
use std::io::Write;
use std::path::{Path, PathBuf};

#[derive(Debug, Args)]
pub(crate) struct ReplayArgs {
    /// The state directory of a run
    state: PathBuf,
    /// Compute every step again with this checkpoint, and compare the digests of its rows
    #[arg(long, value_name = "MODEL")]
    full: Option<PathBuf>,
    /// Stop after this record
    #[arg(long, value_name = "SEQ")]
    until: Option<u64>,
    /// Compute threads of a full replay
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What a replay has proved.
#[derive(Debug)]
pub(crate) struct Proof {
    /// The first record and the last.
    pub(crate) records: (u64, u64),
    /// Lives of the process.
    pub(crate) incarnation: u64,
    /// Head of the digest chain.
    pub(crate) digest: String,
    /// Digest of the whole state.
    pub(crate) state_digest: String,
    /// Outputs that the fold regenerated.
    pub(crate) outputs: u64,
    /// Tokens among them that were new, not sent again.
    pub(crate) tokens: u64,
    /// Torn bytes at the end, left out.
    pub(crate) torn_bytes: u64,
    /// Steps, rows and unknown steps of a full replay.
    pub(crate) recomputed: Option<(u64, u64, u64)>,
}

impl ReplayArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        if self.until == Some(0) {
            return Err(usage("--until is the number of a record; the first is 1"));
        }
        let proof = prove(&self.state, self.full.as_deref(), self.until, usize::from(self.threads));
        let mut out = terminal::stdout();
        if let (Err(error), true) = (&proof, self.json)
            && let Some(divergence) = error.downcast_ref::<Divergence>()
        {
            writeln!(out, "{}", divergence.to_json())?;
        }
        let proof = proof?;
        if self.json {
            writeln!(out, "{}", proof.to_json())?;
        } else {
            out.write_all(proof.to_string().as_bytes())?;
        }
        Ok(Exit::Ok)
    }
}

/// Replays a journal.
///
/// # Errors
/// If it cannot be read, or at its first divergence.
pub(crate) fn prove(
    state: &Path,
    full: Option<&Path>,
    until: Option<u64>,
    threads: usize,
) -> anyhow::Result<Proof> {
    let mut history = History::open(state)?;
    let first = history.engine.next_seq().0;
    let last = history.scanned.records.last().map_or(first - 1, |record| record.seq);
    anyhow::ensure!(
        until.is_none_or(|until| (first..=last).contains(&until)),
        "the journal has no record {}: it {}",
        until.unwrap_or_default(),
        if first <= last {
            format!("has {first} to {last}")
        } else {
            format!("ends with its snapshot, at {last}")
        }
    );
    let mut recompute = None;
    if let (Some(dir), true) = (full, history.engine.view().plan().is_some()) {
        let mut model = Recompute::of(&history.engine, dir, state, Isa::detect(), threads)?;
        model.begin(&history.engine)?;
        recompute = Some(model);
    }
    let (mut outputs, mut tokens) = (0, 0);
    let walked = history.walk(until, |moment: &Moment<'_>| {
        outputs += moment.outputs.len() as u64;
        let resent = matches!(moment.input, lite_llm_core::input::Input::Submit { .. });
        if !resent {
            tokens += moment.outputs.iter().filter(|o| matches!(o, Output::Token { .. })).count() as u64;
        }
        if let (Some(dir), None, true) = (full, &recompute, moment.engine.view().plan().is_some()) {
            recompute = Some(Recompute::of(moment.engine, dir, state, Isa::detect(), threads)?);
        }
        recompute.as_mut().map_or(Ok(()), |model| model.follow(moment))
    });
    if let Err(error) = walked {
        return Err(match error.downcast::<OtherBits>() {
            Ok(bits) => bits.in_the_state(&history)?.into(),
            Err(error) => error,
        });
    }
    let engine = &history.engine;
    Ok(Proof {
        records: (first, engine.next_seq().0 - 1),
        incarnation: engine.view().incarnation().0,
        digest: engine.digest().to_string(),
        state_digest: engine.state_digest().to_string(),
        outputs,
        tokens,
        torn_bytes: history.scanned.cut.as_ref().map_or(0, |cut| cut.bytes),
        recomputed: recompute.map(|model| (model.steps, model.rows, model.unknown)),
    })
}

impl Proof {
    fn to_json(&self) -> Value {
        json!({
            "verified": true,
            "first": self.records.0,
            "last": self.records.1,
            "incarnation": self.incarnation,
            "digest": self.digest,
            "state_digest": self.state_digest,
            "outputs": self.outputs,
            "tokens": self.tokens,
            "torn_bytes": self.torn_bytes,
            "full": self.recomputed.map(|(steps, rows, unknown)| json!({
                "steps": steps, "rows": rows, "unknown_steps": unknown,
            })),
        })
    }
}

impl std::fmt::Display for Proof {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (first, last) = self.records;
        if last < first {
            writeln!(f, "verified: no records after the snapshot, state {}", self.state_digest)?;
        } else {
            writeln!(f, "verified: records {first} to {last}, a digest at each")?;
        }
        writeln!(f, "  lives      {}", self.incarnation)?;
        writeln!(f, "  tokens     {}, among {} regenerated outputs", self.tokens, self.outputs)?;
        writeln!(f, "  digest     {}", self.digest)?;
        writeln!(f, "  state      {}", self.state_digest)?;
        if self.torn_bytes > 0 {
            writeln!(f, "  torn tail  {} bytes, never acknowledged, left out", self.torn_bytes)?;
        }
        if let Some((steps, rows, unknown)) = self.recomputed {
            writeln!(f, "  recomputed {steps} steps, {rows} rows: every digest and token equal")?;
            if unknown > 0 {
                writeln!(f, "  not known  {unknown} steps that began before the snapshot")?;
            }
        }
        Ok(())
    }
}
