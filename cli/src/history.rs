//! A journal read back without being touched: restored, folded record by record, and proved by its digests.

use crate::divergence::{Divergence, difference};
use crate::exit::corrupt;
use anyhow::{Context, bail};
use lite_llm_core::LOGIC_VERSION;
use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::input::Input;
use lite_llm_core::journal::{JournalError, Record, Scanned, scan};
use lite_llm_core::output::Output;
use lite_llm_core::replay::{decode_input, fold};
use lite_llm_hw::disk::FileDisk;
use std::path::Path;

/// A journal and the engine that it begins with.
#[derive(Debug)]
pub(crate) struct History {
    /// What the files say.
    pub(crate) scanned: Scanned,
    /// The state before the first record.
    start: Engine,
    /// The state so far: of the snapshot, or nothing; then of every record that was walked.
    pub(crate) engine: Engine,
}

/// One record, folded.
#[derive(Debug)]
pub(crate) struct Moment<'a> {
    /// As it is on disk.
    pub(crate) record: &'a Record,
    /// What it holds.
    pub(crate) input: &'a Input,
    /// What followed.
    pub(crate) outputs: &'a [Output],
    /// The state after it.
    pub(crate) engine: &'a Engine,
}

impl History {
    /// Reads the journal of a state directory, which another process may have open.
    pub(crate) fn open(state: &Path) -> anyhow::Result<Self> {
        let mut disk = FileDisk::open_read_only(state)?;
        let scanned = scan(&mut disk).with_context(|| format!("in {}", state.display()))?;
        let Some(header) = scanned.header else {
            bail!("{} holds no journal; give the directory that --state named", state.display());
        };
        if header.node == u32::MAX {
            bail!(
                "{} is the state of a cluster, whose own journal is its supervisor's; give one of its nodes', as in {}/node-0",
                state.display(),
                state.display()
            );
        }
        if header.logic_version != LOGIC_VERSION {
            let file = scanned.segments.last().map_or_else(String::new, |segment| segment.name.clone());
            return Err(
                JournalError::Logic { file, found: header.logic_version, expected: LOGIC_VERSION }.into()
            );
        }
        Self::of(scanned)
    }

    /// The history that was read.
    pub(crate) fn of(scanned: Scanned) -> anyhow::Result<Self> {
        let engine = match &scanned.snapshot {
            Some(snapshot) => {
                let engine = Engine::restore(&snapshot.bytes)?;
                if engine.next_seq().0 != snapshot.next || engine.digest().0 != snapshot.digest {
                    return Err(corrupt(format!(
                        "the snapshot before record {} holds the state before record {} with digest {}",
                        snapshot.next,
                        engine.next_seq(),
                        engine.digest()
                    )));
                }
                engine
            }
            None => Engine::new(),
        };
        Ok(Self { scanned, start: engine.clone(), engine })
    }

    /// Folds the records up to `until` and shows each with what followed from it.
    ///
    /// # Errors
    /// At the first record whose digest is not that of the state before it; or what `each` says.
    pub(crate) fn walk(
        &mut self,
        until: Option<u64>,
        mut each: impl FnMut(&Moment<'_>) -> anyhow::Result<()>,
    ) -> anyhow::Result<u64> {
        let mut walked = 0;
        let mut outputs = Vec::new();
        let mut before: Option<&Record> = None;
        for record in &self.scanned.records {
            if until.is_some_and(|until| record.seq > until) {
                break;
            }
            // Checked here first, so that the outputs that led to a divergence can still be shown.
            if record.digest != self.engine.digest().0
                && let Some(before) = before
            {
                return Err(self.diverged(before, record, &outputs)?.into());
            }
            outputs.clear();
            fold(&mut self.engine, [record], |_, output| outputs.push(output.clone()))?;
            let input = decode_input(&record.payload).context("a record that was folded")?;
            each(&Moment { record, input: &input, outputs: &outputs, engine: &self.engine })?;
            before = Some(record);
            walked += 1;
        }
        Ok(walked)
    }

    /// The state before a record, folded anew.
    pub(crate) fn before(&self, seq: u64) -> anyhow::Result<Engine> {
        let mut engine = self.start.clone();
        fold(&mut engine, self.scanned.records.iter().take_while(|record| record.seq < seq), |_, _| {})?;
        Ok(engine)
    }

    /// What is known of the handling of a record that led to another digest than the `next` record has.
    fn diverged(&self, record: &Record, next: &Record, outputs: &[Output]) -> anyhow::Result<Divergence> {
        let input = decode_input(&record.payload).context("a record that was folded")?;
        Ok(Divergence {
            record: record.seq,
            what: format!(
                "{} is handled differently here than by the process that wrote the journal",
                describe(&input)
            ),
            expected: format!("digest {} before record {}", Digest(next.digest), next.seq),
            found: format!("digest {} before record {}", self.engine.digest(), next.seq),
            outputs: outputs.iter().map(|output| format!("{output:?}")).collect(),
            between: "from before the record (-) to after it (+), as it is handled here",
            difference: difference(&self.before(record.seq)?, &self.engine),
        })
    }
}

/// An input in one line, for people.
pub(crate) fn describe(input: &Input) -> String {
    match input {
        Input::Submit { id, body, from } => format!(
            "Submit {id}: {} prompt tokens, at most {} new ones, from offset {from}",
            body.prompt.len(),
            body.max_tokens
        ),
        Input::ManifestRead { plan } => format!("ManifestRead: weights {}", plan.identity.weights),
        Input::Boot { incarnation, .. } => format!("Boot of incarnation {incarnation}"),
        Input::Restarted { incarnation, .. } => format!("Restarted as incarnation {incarnation}"),
        Input::Finished { step, attempt, rows, duration_ns } => {
            let tokens: Vec<String> = rows
                .iter()
                .map(|row| row.token.map_or_else(|| "-".into(), |token| token.to_string()))
                .collect();
            format!(
                "Finished step {step}, attempt {attempt}, {:.3} ms: tokens {}",
                *duration_ns as f64 / 1e6,
                tokens.join(" ")
            )
        }
        Input::Need { step, layer, experts, .. } => {
            format!("Need of step {step}, layer {layer}: {} experts", experts.len())
        }
        Input::Modify { experts } => format!("Modify {} experts", experts.len()),
        Input::Reserved
        | Input::BaseLoaded { .. }
        | Input::RoutersLoaded
        | Input::BootFailed { .. }
        | Input::Loaded { .. }
        | Input::Cancel { .. }
        | Input::Switch { .. }
        | Input::Drain { .. }
        | Input::SnapshotWanted
        | Input::SnapshotDurable { .. }
        | Input::Released { .. }
        | Input::Failed { .. }
        | Input::Tick
        | Input::TelemetryFlushed
        | Input::Retired { .. }
        | Input::Persisted { .. }
        | Input::Wish { .. }
        | Input::ResourcesReleased => format!("{input:?}"),
    }
}
