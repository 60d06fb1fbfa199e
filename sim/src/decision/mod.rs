//! Decisions: whether a fault happens at a point of a run, and how.
//!
//! A point is named by its meaning: which hazard, of whom, the how-manieth opportunity. What a seed decides there is a
//! pure function of seed and point, so that neither an added draw elsewhere nor a change of the order of calls shifts
//! it. Only what differs from "nothing happens" is kept: that list is a run's decision log. A run can be driven by a
//! log instead of its seed, which is what replay does and what the minimiser shrinks.

mod file;

pub use file::{FileError, LogFile};

use crate::hazard::Hazard;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

/// An opportunity for a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Point {
    /// Of which kind.
    pub hazard: Hazard,
    /// Of whom: a node, or [`link`] of two.
    pub subject: u64,
    /// The how-manieth opportunity of this kind and subject, from 0.
    pub nth: u64,
}

/// A fault that happens.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Decision {
    /// Where.
    pub point: Point,
    /// How: how long, which bit, which sector. Each hazard reads it its own way.
    pub value: u64,
}

/// The subject of a fault on the way from one to another.
#[must_use]
pub const fn link(from: u32, to: u32) -> u64 {
    ((from as u64) << 32) | to as u64
}

/// The finaliser of splitmix64 over a combination of two numbers.
#[must_use]
pub const fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.rotate_left(29) ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0xd1b5_4a32_d192_ed03);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// How often a hazard happens, and where its draws begin.
#[derive(Clone, Copy, Debug, Default)]
struct Odds {
    /// In 2^32.
    rate: u32,
    /// Seed and hazard, mixed: they are the same in every draw.
    base: u64,
}

impl Odds {
    const fn new(seed: u64, hazard: Hazard, rate: u32) -> Self {
        Self { rate, base: mix(seed, hazard as u64) }
    }

    /// What is drawn at a point.
    const fn draw(self, subject: u64, nth: u64) -> u64 {
        mix(mix(self.base, subject), nth)
    }
}

/// Where decisions come from.
#[derive(Clone, Debug)]
enum Source {
    /// A seed: the odds of each hazard, by number.
    Seed(Box<[Odds; 256]>),
    /// A log.
    Log(BTreeMap<Point, u64>),
}

#[derive(Debug)]
struct Inner {
    seed: u64,
    source: Source,
    calm: Cell<bool>,
    taken: RefCell<Vec<Decision>>,
}

/// The decisions of one run; clones share them.
#[derive(Clone, Debug)]
pub struct Decisions(Rc<Inner>);

impl Decisions {
    /// Decisions of a seed among some hazards. Each run picks which of them it has and how often they happen, so that
    /// some runs have one fault often and others all of them now and then.
    #[must_use]
    pub fn of_seed(seed: u64, hazards: &[Hazard]) -> Self {
        let mut odds = [Odds::default(); 256];
        for &hazard in hazards {
            let pick = mix(mix(seed, 0x5a17), hazard as u64);
            if pick.is_multiple_of(3) {
                continue;
            }
            // From a quarter of the most to all of it, each halving as likely as the next.
            let most = u64::from(hazard.about().per_million) * (1 << 32) / 1_000_000;
            let rate = most >> ((pick >> 8) % 3);
            odds[hazard as usize] = Odds::new(seed, hazard, u32::try_from(rate).unwrap_or(u32::MAX));
        }
        Self::new(seed, Source::Seed(Box::new(odds)))
    }

    /// Decisions of a seed in which each hazard happens as often as its table allows.
    #[must_use]
    pub fn always(seed: u64, hazards: &[Hazard]) -> Self {
        let mut odds = [Odds::default(); 256];
        for &hazard in hazards {
            let most = u64::from(hazard.about().per_million) * (1 << 32) / 1_000_000;
            odds[hazard as usize] = Odds::new(seed, hazard, u32::try_from(most).unwrap_or(u32::MAX));
        }
        Self::new(seed, Source::Seed(Box::new(odds)))
    }

    /// The decisions of a log. The seed still decides what is no fault: workloads, latencies.
    #[must_use]
    pub fn of_log(seed: u64, log: &[Decision]) -> Self {
        Self::new(seed, Source::Log(log.iter().map(|decision| (decision.point, decision.value)).collect()))
    }

    fn new(seed: u64, source: Source) -> Self {
        Self(Rc::new(Inner { seed, source, calm: Cell::new(false), taken: RefCell::default() }))
    }

    /// The run's seed.
    #[must_use]
    pub fn seed(&self) -> u64 {
        self.0.seed
    }

    /// Whether a fault happens at a point, and how.
    #[must_use]
    pub fn at(&self, hazard: Hazard, subject: u64, nth: u64) -> Option<u64> {
        let inner = &*self.0;
        if inner.calm.get() {
            return None;
        }
        let point = Point { hazard, subject, nth };
        let value = match &inner.source {
            Source::Seed(odds) => {
                let odds = odds[hazard as usize];
                if odds.rate == 0 {
                    return None;
                }
                let drawn = odds.draw(subject, nth);
                if (drawn >> 32) >= u64::from(odds.rate) {
                    return None;
                }
                mix(drawn, 1)
            }
            Source::Log(log) => *log.get(&point)?,
        };
        inner.taken.borrow_mut().push(Decision { point, value });
        Some(value)
    }

    /// A number that is no fault: the same whether seed or log decides, and named the same way.
    #[must_use]
    pub fn ordinary(&self, purpose: u64, subject: u64, nth: u64) -> u64 {
        mix(mix(mix(!self.0.seed, purpose), subject), nth)
    }

    /// From now on nothing happens any more.
    pub fn calm_down(&self) {
        self.0.calm.set(true);
    }

    /// What has happened so far, in order.
    #[must_use]
    pub fn taken(&self) -> Vec<Decision> {
        self.0.taken.borrow().clone()
    }

    /// How often each hazard has happened so far, by number.
    #[must_use]
    pub fn counts(&self) -> [u64; 256] {
        let mut counts = [0; 256];
        for decision in &*self.0.taken.borrow() {
            counts[decision.point.hazard as usize] += 1;
        }
        counts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(decisions: &Decisions) {
        for nth in 0..2000 {
            let _ = decisions.at(Hazard::LoseMessage, link(1, 2), nth);
            let _ = decisions.at(Hazard::DoubleMessage, link(2, 1), nth);
        }
    }

    #[test]
    fn a_log_decides_as_its_seed_did() {
        let seeded = Decisions::always(7, Hazard::ALL);
        walk(&seeded);
        let taken = seeded.taken();
        assert!(taken.len() > 50, "3 and 2 in a hundred of 2000: {}", taken.len());
        let logged = Decisions::of_log(7, &taken);
        walk(&logged);
        assert_eq!(logged.taken(), taken);
        let half = Decisions::of_log(7, &taken[..10]);
        walk(&half);
        assert_eq!(half.taken(), taken[..10]);
    }

    #[test]
    fn a_draw_elsewhere_shifts_nothing() {
        let (one, other) = (Decisions::always(7, Hazard::ALL), Decisions::always(7, Hazard::ALL));
        let _ = other.at(Hazard::Rot, 4, 4);
        assert_eq!(one.at(Hazard::LoseMessage, 1, 5), other.at(Hazard::LoseMessage, 1, 5));
        assert_eq!(one.ordinary(1, 2, 3), other.ordinary(1, 2, 3));
    }

    #[test]
    fn calm_is_calm() {
        let decisions = Decisions::always(7, Hazard::ALL);
        decisions.calm_down();
        walk(&decisions);
        assert_eq!(decisions.taken(), []);
    }
}
