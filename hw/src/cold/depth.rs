//! How many pieces are in flight: few keep a device waiting, many only make each wait longer.
//!
//! Depth is tried: doubled or halved for a while and kept if the throughput says so. Integers only, and time is an argument.

/// Pieces in flight at least.
pub(super) const DEPTH_MIN: u32 = 4;
/// Pieces in flight at most.
pub(super) const DEPTH_MAX: u32 = 64;
/// With which it begins.
const DEPTH_START: u32 = 8;
/// Bytes after which a depth is judged, for each piece of it.
const WINDOW_BYTES: u64 = 4 << 20;
/// Windows between two trials.
const HOLD: u32 = 16;

/// The depth, and what is known of it.
#[derive(Debug)]
pub(super) struct Depth {
    depth: u32,
    trial: Trial,
    /// Bytes a millisecond at the depth that is relied on; 0 if none was measured.
    rate: u64,
    /// The window under way: since when, and how many bytes.
    since_ns: Option<u64>,
    bytes: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Trial {
    /// So many windows before the next one, and whether that is of a greater depth.
    Hold { windows: u32, up: bool },
    /// Twice the depth that is relied on.
    Up,
    /// Half of it.
    Down,
}

impl Depth {
    pub(super) const fn new() -> Self {
        Self {
            depth: DEPTH_START,
            trial: Trial::Hold { windows: 0, up: true },
            rate: 0,
            since_ns: None,
            bytes: 0,
        }
    }

    /// Pieces that may be in flight.
    pub(super) const fn now(&self) -> u32 {
        self.depth
    }

    /// Takes note of what came. A queue that was not full says nothing of its depth: `full` is whether it was.
    pub(super) fn came(&mut self, bytes: u64, full: bool, now_ns: u64) {
        if !full {
            self.since_ns = None;
            return;
        }
        let Some(since) = self.since_ns else {
            (self.since_ns, self.bytes) = (Some(now_ns), 0);
            return;
        };
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes < WINDOW_BYTES * u64::from(self.depth) {
            return;
        }
        // Less than a millisecond says more of the clock than of the device.
        let took_us = now_ns.saturating_sub(since) / 1000;
        if took_us >= 1000 {
            self.judge(self.bytes.saturating_mul(1000) / took_us);
            self.since_ns = None;
        }
    }

    fn judge(&mut self, rate: u64) {
        match self.trial {
            Trial::Hold { windows: 0, up } => {
                self.rate = rate;
                self.attempt(up);
            }
            Trial::Hold { windows, up } => self.trial = Trial::Hold { windows: windows - 1, up },
            // A greater depth must be worth its latency, a smaller one may not cost.
            Trial::Up if rate > self.rate + self.rate / 32 => {
                self.rate = rate;
                self.attempt(true);
            }
            Trial::Down if rate >= self.rate - self.rate / 64 => {
                self.rate = rate;
                self.attempt(false);
            }
            Trial::Up => self.settle(self.depth / 2, false),
            Trial::Down => self.settle(self.depth * 2, true),
        }
    }

    fn attempt(&mut self, up: bool) {
        let depth = if up { self.depth * 2 } else { self.depth / 2 };
        if (DEPTH_MIN..=DEPTH_MAX).contains(&depth) {
            self.depth = depth;
            self.trial = if up { Trial::Up } else { Trial::Down };
        } else {
            self.settle(self.depth, !up);
        }
    }

    fn settle(&mut self, depth: u32, up: bool) {
        self.depth = depth.clamp(DEPTH_MIN, DEPTH_MAX);
        self.trial = Trial::Hold { windows: HOLD, up };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The share of windows that are spent at each depth, on a device whose throughput is a function of it.
    fn visits(rate_mb_s: impl Fn(u32, u64) -> u64) -> Vec<(u32, u32)> {
        let (mut depth, mut now) = (Depth::new(), 1_000_000_000);
        let mut visits = std::collections::BTreeMap::new();
        for round in 0..40_000u64 {
            let piece = 1 << 20;
            now += piece * 1000 / rate_mb_s(depth.now(), round).max(1);
            depth.came(piece, true, now);
            assert!((DEPTH_MIN..=DEPTH_MAX).contains(&depth.now()), "{depth:?}");
            if round > 10_000 {
                *visits.entry(depth.now()).or_default() += 1;
            }
        }
        visits.into_iter().collect()
    }

    fn share_of(visits: &[(u32, u32)], depths: std::ops::RangeInclusive<u32>) -> u32 {
        let all: u32 = visits.iter().map(|(_, count)| count).sum();
        let within = visits.iter().filter(|(depth, _)| depths.contains(depth));
        within.map(|(_, count)| count).sum::<u32>() * 100 / all
    }

    #[test]
    fn it_settles_where_the_device_has_enough() {
        // Each piece in flight brings 200 MB/s, up to the device's own limit.
        for (limit, knee) in [(600, 4), (1600, 8), (3200, 16), (6400, 32), (20_000, 64)] {
            let visits = visits(|depth, _| (u64::from(depth) * 200).min(limit));
            assert!(share_of(&visits, knee..=knee) > 75, "limit {limit}: {visits:?}");
        }
    }

    #[test]
    fn a_device_that_suffers_from_depth_gets_little() {
        let visits = visits(|depth, _| 4000 / u64::from(depth));
        assert!(share_of(&visits, DEPTH_MIN..=DEPTH_MIN) > 75, "{visits:?}");
    }

    #[test]
    fn it_stays_within_bounds_whatever_is_measured() {
        // A device without rhyme or reason, from a linear generator.
        let noise = |round: u64| round.wrapping_mul(6_364_136_223_846_793_005).rotate_left(20) % 5000;
        visits(|_, round| noise(round));
        let mut depth = Depth::new();
        for now in [0, u64::MAX, 0, 1, u64::MAX] {
            depth.came(u64::MAX / 4, true, now);
        }
    }

    #[test]
    fn a_queue_that_is_not_full_says_nothing() {
        let mut depth = Depth::new();
        for round in 0..10_000 {
            depth.came(1 << 20, round % 3 != 0, round * 300_000);
        }
        assert_eq!(depth.now(), DEPTH_START);
    }
}
