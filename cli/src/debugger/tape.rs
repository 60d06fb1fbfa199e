//! A journal as a tape: wound to any record, forward or back, with what happened there and the state that it left.

use crate::history::{History, describe};
use anyhow::Context;
use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::input::Input;
use lite_llm_core::journal::Record;
use lite_llm_core::output::Output;
use lite_llm_core::replay::{decode_input, fold};
use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// States that are kept, evenly over the tape, so that no step is far from one.
const MARKS_MAX: u64 = 64;
/// Records between two kept states, at least.
const MARK_EVERY: u64 = 128;

/// A journal that can be wound.
#[derive(Debug)]
pub(crate) struct Tape {
    /// Where it came from.
    pub(crate) name: String,
    records: Vec<Record>,
    /// States after some records; the first is the one before the first record.
    marks: BTreeMap<u64, Engine>,
    /// The last record that folds, and why the next does not.
    broken: Option<(u64, String)>,
    /// What was last shown, and the state after it: stepping forward is one record's work.
    last: Option<(u64, Engine)>,
}

/// One place on a tape.
#[derive(Debug)]
pub(crate) struct Frame {
    /// The record; none at the beginning.
    pub(crate) record: Option<(Record, Input)>,
    /// What followed from it.
    pub(crate) outputs: Vec<Output>,
    /// The state before it.
    pub(crate) before: Engine,
    /// The state after it.
    pub(crate) after: Engine,
}

impl Tape {
    /// Reads the journal of a state directory and folds it once.
    ///
    /// # Errors
    /// If there is no journal, or it is damaged. One that diverges, or at which the engine panics, is opened up to there.
    pub(crate) fn open(dir: &Path) -> anyhow::Result<Self> {
        Ok(Self::of(dir.display().to_string(), History::open(dir)?))
    }

    /// A journal that was read.
    pub(crate) fn of(name: String, history: History) -> Self {
        let mut engine = history.engine;
        let records = history.scanned.records;
        let first = engine.next_seq().0 - 1;
        let every = MARK_EVERY.max(records.len() as u64 / MARKS_MAX);
        let mut marks = BTreeMap::from([(first, engine.clone())]);
        let mut broken = None;
        for record in &records {
            match catch_unwind(AssertUnwindSafe(|| fold(&mut engine, [record], |_, _| {}))) {
                Ok(Ok(())) => {}
                Ok(Err(error)) => broken = Some((record.seq - 1, error.to_string())),
                Err(_) => {
                    broken = Some((record.seq - 1, format!("the engine panics at record {}", record.seq)))
                }
            }
            if broken.is_some() {
                break;
            }
            if (record.seq - first).is_multiple_of(every) {
                marks.insert(record.seq, engine.clone());
            }
        }
        Self { name, records, marks, broken, last: None }
    }

    /// The first place, before any record, and the last that folds.
    pub(crate) fn range(&self) -> (u64, u64) {
        let first = *self.marks.keys().next().expect("the beginning is always kept");
        let last = self.broken.as_ref().map(|(last, _)| *last);
        (first, last.unwrap_or_else(|| self.records.last().map_or(first, |record| record.seq)))
    }

    /// Why the tape ends before the journal does.
    pub(crate) fn broken(&self) -> Option<&str> {
        self.broken.as_ref().map(|(_, why)| why.as_str())
    }

    fn record(&self, seq: u64) -> Option<&Record> {
        let first = self.records.first()?.seq;
        self.records.get(usize::try_from(seq.checked_sub(first)?).ok()?)
    }

    /// A record in one line.
    pub(crate) fn line(&self, seq: u64) -> Option<String> {
        let record = self.record(seq)?;
        Some(decode_input(&record.payload).map_or_else(|error| error.to_string(), |input| describe(&input)))
    }

    /// The last place whose record is not later than a time.
    pub(crate) fn at_time(&self, time_ns: u64) -> u64 {
        let (first, last) = self.range();
        let before = self.records.partition_point(|record| record.time_ns <= time_ns) as u64;
        (first + before).min(last)
    }

    /// The time of a place.
    pub(crate) fn time(&self, seq: u64) -> u64 {
        self.record(seq)
            .map_or_else(|| self.records.first().map_or(0, |record| record.time_ns), |r| r.time_ns)
    }

    /// The state after a record.
    fn state(&mut self, seq: u64) -> anyhow::Result<Engine> {
        let kept = self.marks.range(..=seq).next_back().map(|(at, engine)| (*at, engine));
        let (mut at, mut engine) = kept.context("the tape begins later")?;
        if let Some((last, state)) = &self.last
            && (at..=seq).contains(last)
        {
            (at, engine) = (*last, state);
        }
        let mut engine = engine.clone();
        while at < seq {
            at += 1;
            let record = self.record(at).with_context(|| format!("there is no record {at}"))?;
            fold(&mut engine, [record], |_, _| {})?;
        }
        Ok(engine)
    }

    /// What is at a place.
    ///
    /// # Errors
    /// If it is not on the tape.
    pub(crate) fn frame(&mut self, seq: u64) -> anyhow::Result<Frame> {
        let (first, last) = self.range();
        anyhow::ensure!(
            (first..=last).contains(&seq),
            "there is no record {seq} in {}: it has {} to {last}, and {first} for the state before them",
            self.name,
            first + 1
        );
        if seq == first {
            let state = self.state(seq)?;
            return Ok(Frame { record: None, outputs: Vec::new(), before: state.clone(), after: state });
        }
        let before = self.state(seq - 1)?;
        let record = self.record(seq).context("a record of the tape")?.clone();
        let input = decode_input(&record.payload).context("a record that was folded")?;
        let (mut after, mut outputs) = (before.clone(), Vec::new());
        fold(&mut after, [&record], |_, output| outputs.push(output.clone()))?;
        self.last = Some((seq, after.clone()));
        Ok(Frame { record: Some((record, input)), outputs, before, after })
    }

    /// The next place after this one, or before it, where a text is in the input or in what followed.
    pub(crate) fn find(&mut self, from: u64, text: &str, back: bool) -> anyhow::Result<Option<u64>> {
        let (first, last) = self.range();
        let text = text.to_lowercase();
        let places: Box<dyn Iterator<Item = u64>> =
            if back { Box::new((first + 1..from).rev()) } else { Box::new(from + 1..=last) };
        for seq in places {
            let frame = self.frame(seq)?;
            let input = frame.record.as_ref().map(|(_, input)| format!("{} {input:?}", describe(input)));
            let outputs = frame.outputs.iter().map(|output| format!("{output:?}"));
            if input.into_iter().chain(outputs).any(|line| line.to_lowercase().contains(&text)) {
                return Ok(Some(seq));
            }
        }
        Ok(None)
    }
}

impl Frame {
    /// The record's number, or that of the one before the first.
    pub(crate) fn seq(&self) -> u64 {
        self.after.next_seq().0 - 1
    }

    /// Everything but the state, a line each: what the record is, what followed, and all of it.
    pub(crate) fn lines(&self) -> Vec<String> {
        let Some((record, input)) = &self.record else {
            return vec![format!("the beginning, digest {}", self.after.digest())];
        };
        let mut lines = vec![
            format!("record  {} at {} ns", record.seq, record.time_ns),
            format!("digest  {} before", Digest(record.digest)),
            format!("        {} after", self.after.digest()),
            format!("input   {}", describe(input)),
        ];
        lines.extend(self.outputs.iter().map(|output| format!("output  {output:?}")));
        lines.extend(format!("{input:#?}").lines().map(str::to_owned));
        lines
    }
}
