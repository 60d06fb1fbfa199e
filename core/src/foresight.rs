//! Whether steps load, while the disk would be idle, what the next layer will probably choose.
//!
//! It pays or not by machine, model and budget, and a load that was wrong is in the way of one that is needed. So it is
//! told by pairs of blocks of decode steps, one with foresight and one without, and what is slower is not done until
//! the next comparison, which comes the later the more often the answer was the same. Only measured durations go in, which
//! are in the journal: a replay decides the same.

use crate::config::Foresight;
use serde::{Deserialize, Serialize};

/// Steps of a block, and the first of them, which still go by what the block before left, that are not counted.
const BLOCK: u32 = 8;
const SKIPPED: u32 = 2;
/// Pairs of blocks in a comparison. The order of each is the other way round than that of the one before.
const PAIRS: u32 = 4;
/// Steps before the first comparison: arenas fill in them.
const FIRST: u32 = 32;
/// Steps from one comparison to the next, at least and at most.
const REST: (u32, u32) = (512, 4096);
/// Foresight pays if steps take less than this with it, of a hundred without; and is given up at once after a pair in which
/// they take more than this.
const PAYS_BELOW: u64 = 99;
const LOSES_ABOVE: u64 = 110;

/// What is known of it, and what is tried.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Comparison {
    /// What the last comparison said.
    pays: bool,
    /// Steps until the next, after the one under way.
    rest: u32,
    now: Phase,
    /// Rows of the steps that are compared.
    rows: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Phase {
    /// So many steps are left until a comparison.
    Rest(u32),
    /// A comparison is under way.
    Compare {
        /// Steps of it that are done.
        done: u32,
        /// Nanoseconds that were counted with foresight, and without.
        with_ns: u64,
        without_ns: u64,
    },
}

/// The outcome of a comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Verdict {
    pub(crate) pays: bool,
    pub(crate) with_ns: u64,
    pub(crate) without_ns: u64,
}

impl Default for Comparison {
    fn default() -> Self {
        Self { pays: false, rest: REST.0, now: Phase::Rest(FIRST), rows: 0 }
    }
}

impl Comparison {
    /// Whether the next decode step is to foresee.
    pub(crate) fn foresees(&self, wish: Foresight) -> bool {
        match (wish, &self.now) {
            (Foresight::Off, _) => false,
            (Foresight::On, _) => true,
            (Foresight::Paired, Phase::Rest(_)) => self.pays,
            (Foresight::Paired, Phase::Compare { done, .. }) => Self::is_with(done / BLOCK),
        }
    }

    /// Whether a block of a comparison is one with foresight: with, without, without, with, and so on.
    const fn is_with(block: u32) -> bool {
        (block / 2 + block).is_multiple_of(2)
    }

    /// Takes what a decode step of so many rows took.
    pub(crate) fn took(&mut self, rows: u32, ns: u64) -> Option<Verdict> {
        if core::mem::replace(&mut self.rows, rows) != rows {
            // Steps of another size say nothing about those before.
            if let Phase::Compare { .. } = self.now {
                self.now = Phase::Compare { done: 0, with_ns: 0, without_ns: 0 };
            }
            return None;
        }
        let (done, with_ns, without_ns) = match &mut self.now {
            Phase::Rest(left) => {
                *left -= 1;
                if *left == 0 {
                    self.now = Phase::Compare { done: 0, with_ns: 0, without_ns: 0 };
                }
                return None;
            }
            Phase::Compare { done, with_ns, without_ns } => {
                if *done % BLOCK >= SKIPPED {
                    let sum = if Self::is_with(*done / BLOCK) { &mut *with_ns } else { &mut *without_ns };
                    *sum = sum.saturating_add(ns);
                }
                *done += 1;
                (*done, u128::from(*with_ns), u128::from(*without_ns))
            }
        };
        let is_pair = done.is_multiple_of(2 * BLOCK);
        let loses = with_ns * 100 > without_ns * u128::from(LOSES_ABOVE);
        if !is_pair || (done < 2 * BLOCK * PAIRS && !loses) {
            return None;
        }
        let pays = with_ns * 100 < without_ns * u128::from(PAYS_BELOW);
        self.rest = if pays == self.pays { self.rest.saturating_mul(2).min(REST.1) } else { REST.0 };
        (self.pays, self.now) = (pays, Phase::Rest(self.rest));
        let ns = |sum: u128| u64::try_from(sum).unwrap_or(u64::MAX);
        Some(Verdict { pays, with_ns: ns(with_ns), without_ns: ns(without_ns) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::random::{Purpose, draw};
    use alloc::vec::Vec;
    use proptest::prelude::*;

    /// What so many steps take, of which each takes `with` thousandths of one without, give or take a tenth.
    fn total(steps: u64, with: u64, seed: u64) -> (u64, u64) {
        let mut comparison = Comparison::default();
        let (mut took, mut without) = (0, 0);
        for step in 0..steps {
            let plain = 900_000 + draw(seed, Purpose::Sample, 0, step) % 200_000;
            let ns = if comparison.foresees(Foresight::Paired) { plain * with / 1000 } else { plain };
            (took, without) = (took + ns, without + plain);
            comparison.took(1, ns);
        }
        (took, without)
    }

    proptest! {
        /// Never more than two hundredths slower than without, up to the half that others have lost by it.
        #[test]
        fn it_costs_little_where_it_does_not_pay(steps in 400u64..10_000, with in 1000u64..1500, seed: u64) {
            let (took, without) = total(steps, with, seed);
            prop_assert!(took * 100 <= without * 102, "{took} {without}");
        }

        #[test]
        fn it_is_used_where_it_pays(steps in 2_000u64..10_000, with in 600u64..900, seed: u64) {
            let (took, without) = total(steps, with, seed);
            let most = 1000 - (1000 - with) * 3 / 4;
            prop_assert!(took * 1000 <= without * most, "{took} {without} {most}");
        }
    }

    #[test]
    fn pairs_change_sides() {
        let blocks: Vec<bool> = (0..8).map(Comparison::is_with).collect();
        assert_eq!(blocks, [true, false, false, true, true, false, false, true]);
    }

    #[test]
    fn steps_of_another_size_begin_a_comparison_anew() {
        let mut comparison = Comparison::default();
        for _ in 0..=FIRST {
            assert_eq!(comparison.took(1, 100), None);
        }
        // Foresight loses in every pair, but no two steps in a row have one size.
        for step in 0..100 {
            assert_eq!(
                comparison.took(1 + step % 2, if comparison.foresees(Foresight::Paired) { 900 } else { 100 }),
                None
            );
        }
    }
}
