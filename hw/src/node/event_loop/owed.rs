//! Records that the journal does not have yet. A sync takes some of a core, and so does waking the journal: records that nobody
//! waits for gather for a while.

use lite_llm_core::event::Event;
use lite_llm_core::journal::Record;
use lite_llm_core::output::Output;
use std::time::{Duration, Instant};

/// Records that gather at most.
const GATHERED_MAX: usize = 256;

/// Records that are still to be handed over, in order.
pub(super) struct Owed {
    records: Vec<Record>,
    /// Somebody waits for the last one.
    waited_for: bool,
    last_time: Instant,
    /// How long records may gather.
    gather: Duration,
}

impl Owed {
    pub(super) fn new(gather: Duration) -> Self {
        Self { records: Vec::new(), waited_for: false, last_time: Instant::now(), gather }
    }

    pub(super) fn push(&mut self, record: Record) {
        self.records.push(record);
    }

    /// Has what is owed handed over at once.
    pub(super) const fn is_waited_for(&mut self) {
        self.waited_for = true;
    }

    /// Takes note of an output that is told when the records are durable. What a stream has said before may wait for more of it,
    /// and so may what is only counted.
    pub(super) const fn follows(&mut self, output: &Output) {
        let may_gather = match output {
            Output::Token { offset, .. } => *offset > 0,
            Output::Event { event, .. } => {
                matches!(event, Event::StepDone { .. } | Event::Compared { .. } | Event::State { .. })
            }
            _ => false,
        };
        self.waited_for |= !may_gather;
    }

    /// When they are to be handed over; `None` if there are none.
    pub(super) fn due(&self) -> Option<Instant> {
        let last = self.records.last()?;
        let at_once = self.waited_for || self.records.len() >= GATHERED_MAX || last.payload.len() > 1 << 16;
        Some(if at_once { self.last_time } else { self.last_time + self.gather })
    }

    /// What is to be handed over now.
    pub(super) fn take(&mut self) -> impl Iterator<Item = Record> {
        if !self.records.is_empty() {
            self.last_time = Instant::now();
        }
        self.waited_for = false;
        self.records.drain(..)
    }
}
