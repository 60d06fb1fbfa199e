//! What memory delivers in the very seconds of a run: plain reading by turns with its steps.
//!
//! Neighbours on a shared machine take from memory as they please, by a third within seconds. A reading before the run says little of
//! it; short ones between its layers see what the layers saw. They are told apart from the time of the steps.

use lite_llm_hw::bandwidth::PlainReading;
use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of a turn of reading: a few milliseconds. What the last one left in caches, steps have long displaced.
const TURN_BYTES: usize = 64 << 20;
/// How long steps have their turn.
const STEPS: Duration = Duration::from_millis(20);

/// Bytes that were read, and how long it took.
#[derive(Clone, Copy, Debug, Default)]
struct Read {
    bytes: u64,
    took: Duration,
}

#[derive(Debug, Default)]
struct Turns {
    /// What is read; nothing where steps do not wait for memory alone.
    plain: Option<PlainReading>,
    /// In one stream a thread, and in four.
    ways: [Read; 2],
    last: Option<Instant>,
    /// Nanoseconds that were taken from the step with this request and position.
    taken: BTreeMap<(u64, u32), u64>,
}

/// Readings between the layers of steps that decode.
#[derive(Clone, Debug)]
pub(crate) struct Roof {
    /// Positions of each prompt.
    prompt: u32,
    turns: Arc<Mutex<Turns>>,
}

impl Roof {
    pub(crate) fn new(prompt: u32) -> Self {
        Self { prompt, turns: Arc::default() }
    }

    /// Has readings begin. Only where every expert is in memory: elsewhere loads would go on meanwhile.
    pub(crate) fn raise(&self, threads: usize) -> io::Result<()> {
        self.turns().plain = Some(PlainReading::new(threads, TURN_BYTES)?);
        Ok(())
    }

    /// Bytes of memory that readings have.
    pub(crate) fn bytes(&self) -> u64 {
        self.turns().plain.as_ref().map_or(0, |plain| plain.bytes() as u64)
    }

    /// Bytes a second of the way that was faster; nothing if there was no turn of each.
    pub(crate) fn bytes_per_s(&self) -> Option<f64> {
        let rates = self.turns().ways.map(|read| read.bytes as f64 / read.took.as_secs_f64());
        // Without a turn it is no number.
        rates.iter().all(|rate| rate.is_finite()).then(|| rates[0].max(rates[1]))
    }

    /// Nanoseconds that readings took from the step that computed this position.
    pub(crate) fn taken_ns(&self, request: u64, position: u32) -> u64 {
        self.turns().taken.get(&(request, position)).copied().unwrap_or(0)
    }

    /// A layer of a step knows its experts.
    pub(crate) fn routed(&self, request: u64, position: u32) {
        if position >= self.prompt {
            self.turns().maybe(request, position);
        }
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turns {
    /// Reads, if it is time to.
    fn maybe(&mut self, request: u64, position: u32) {
        let Some(plain) = &self.plain else { return };
        let began = Instant::now();
        if self.last.get_or_insert(began).elapsed() < STEPS {
            return;
        }
        let ways = &mut self.ways;
        // By turns.
        let (way, took) =
            if ways[0].bytes > ways[1].bytes { (1, plain.pass::<4>()) } else { (0, plain.pass::<1>()) };
        ways[way].bytes += plain.bytes() as u64;
        ways[way].took += took;
        *self.taken.entry((request, position)).or_insert(0) += began.elapsed().as_nanos() as u64;
        self.last = Some(Instant::now());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn readings_have_turns_once_they_are_wanted() {
        let roof = Roof::new(8);
        let steps = |roof: &Roof, positions: std::ops::Range<u32>| {
            for position in positions {
                roof.routed(1, position);
                std::thread::sleep(STEPS);
            }
        };
        steps(&roof, 8..10);
        assert!(roof.bytes_per_s().is_none(), "nobody wanted any");
        roof.raise(2).unwrap();
        assert_eq!(roof.bytes(), TURN_BYTES as u64);
        steps(&roof, 4..8);
        assert!(roof.bytes_per_s().is_none(), "prompts are let alone");
        steps(&roof, 8..11);
        assert!(roof.bytes_per_s().unwrap() > 0.0);
        assert_eq!(
            (roof.taken_ns(1, 8), roof.taken_ns(2, 9)),
            (0, 0),
            "the first one begins the first turn of steps"
        );
        assert!(roof.taken_ns(1, 9) > 0 && roof.taken_ns(1, 10) > 0);
    }
}
