//! Records that the journal does not have yet. A sync takes some of a core, and so does waking the journal: records that nobody
//! waits for gather for a while.

use lite_llm_core::event::Event;
use lite_llm_core::journal::Record;
use lite_llm_core::output::Output;
use std::time::{Duration, Instant};

/// Records that gather at most.
const GATHERED_MAX: usize = 256;
/// A record with more is large: none gather with it.
const LARGE: usize = 1 << 16;

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
        let at_once = self.waited_for || self.records.len() >= GATHERED_MAX || last.payload.len() > LARGE;
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use lite_llm_core::ids::{RequestId, Seq, StepId};

    const HOUR: Duration = Duration::from_secs(3600);

    fn token(offset: u32) -> Output {
        Output::Token { id: RequestId::new("a").unwrap(), offset, token: 7, after: Seq(1) }
    }

    fn record(seq: u64, bytes: usize) -> Record {
        Record { seq, time_ns: seq, digest: [0; 32], payload: vec![0; bytes] }
    }

    fn is_due(owed: &Owed) -> bool {
        owed.due().unwrap() <= Instant::now()
    }

    #[test]
    fn records_that_nobody_waits_for_gather() {
        let mut owed = Owed::new(HOUR);
        assert_eq!(owed.due(), None);
        let step =
            Event::StepDone { step: StepId(1), positions: 1, hits: 0, misses: 0, ahead: 0, foreseen: 0 };
        for (seq, output) in [(1, token(1)), (2, Output::Event { seq: Seq(2), event: step }), (3, token(9))] {
            owed.push(record(seq, 10));
            owed.follows(&output);
            assert!(!is_due(&owed), "{output:?}");
        }
        assert!(owed.due().unwrap() <= Instant::now() + HOUR);
        assert_eq!(owed.take().map(|record| record.seq).collect::<Vec<_>>(), [1, 2, 3]);
        assert_eq!(owed.due(), None);
    }

    #[test]
    fn a_stream_begins_and_ends_at_once() {
        let end = Output::Refuse {
            id: RequestId::new("a").unwrap(),
            refusal: lite_llm_core::output::Refusal::Invalid,
            reason: String::new(),
            after: Seq(2),
        };
        for output in [token(0), end, Output::Ready { after: Seq(2) }] {
            let mut owed = Owed::new(HOUR);
            owed.push(record(1, 10));
            owed.follows(&token(1));
            owed.push(record(2, 10));
            owed.follows(&output);
            // What comes behind does not make them wait.
            owed.push(record(3, 10));
            owed.follows(&token(2));
            assert!(is_due(&owed), "{output:?}");
            assert_eq!(owed.take().count(), 3);
            owed.push(record(4, 10));
            assert!(!is_due(&owed), "only what was owed was waited for");
        }
    }

    #[test]
    fn little_gathers() {
        let mut owed = Owed::new(HOUR);
        owed.push(record(1, LARGE + 1));
        assert!(is_due(&owed));
        let mut owed = Owed::new(HOUR);
        (0..GATHERED_MAX as u64 - 1).for_each(|seq| owed.push(record(seq, LARGE)));
        assert!(!is_due(&owed));
        owed.push(record(GATHERED_MAX as u64, 10));
        assert!(is_due(&owed));
    }
}
