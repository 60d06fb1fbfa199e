//! The clocks of a machine. The monotonic one begins anywhere and runs within the stated drift; it stands for what
//! leases are measured with. The wall clock may be set to anything at any time; nothing may depend on it.

use crate::decision::Decisions;
use crate::hazard::Hazard;

const PARTS: u64 = 1_000_000;

/// The clocks of one machine, as functions of the world's time.
#[derive(Clone, Debug)]
pub(super) struct Clock {
    /// What the monotonic clock showed at the world's 0.
    offset_ns: u64,
    /// Nanoseconds that it counts in a million of the world's.
    rate: u64,
    /// The wall clock less the monotonic one.
    wall_ns: i64,
}

impl Clock {
    /// The clock of a machine, within a drift in thousandths.
    pub(super) fn new(decisions: &Decisions, machine: u32, drift_per_mille: u32) -> Self {
        let subject = u64::from(machine);
        let offset = decisions.at(Hazard::ClockOffset, subject, 0);
        let drift = decisions.at(Hazard::ClockDrift, subject, 0);
        let most = u64::from(drift_per_mille) * (PARTS / 1000);
        let rate = drift.map_or(PARTS, |value| PARTS - most + value % (2 * most + 1));
        Self {
            offset_ns: offset.map_or(0, |value| value % 1_000_000_000_000),
            rate,
            wall_ns: 1_700_000_000_000_000_000,
        }
    }

    /// What the monotonic clock shows at a time of the world.
    pub(super) fn at(&self, world_ns: u64) -> u64 {
        self.offset_ns + scale(world_ns, self.rate, PARTS)
    }

    /// The first time of the world at which it shows at least this.
    pub(super) fn when(&self, shown_ns: u64) -> u64 {
        let since = shown_ns.saturating_sub(self.offset_ns);
        let mut world_ns = scale(since, PARTS, self.rate);
        while self.at(world_ns) < shown_ns {
            world_ns += 1;
        }
        world_ns
    }

    /// What the wall clock shows.
    pub(super) fn wall(&self, world_ns: u64) -> u64 {
        self.at(world_ns).saturating_add_signed(self.wall_ns)
    }

    /// Sets the wall clock.
    pub(super) const fn set_wall(&mut self, by_ns: i64) {
        self.wall_ns = self.wall_ns.saturating_add(by_ns);
    }
}

fn scale(ns: u64, by: u64, of: u64) -> u64 {
    if by == of {
        return ns;
    }
    // Whatever a run comes to fits: dividing 128 bits takes ten times as long.
    if let Some(product) = ns.checked_mul(by) {
        return product / of;
    }
    u64::try_from(u128::from(ns) * u128::from(by) / u128::from(of)).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn a_clock_keeps_its_drift_and_wakes_in_time(seed: u64, from in 0u64..1 << 50, ns in 0u64..1 << 45) {
            let decisions = Decisions::always(seed, Hazard::ALL);
            let clock = Clock::new(&decisions, 1, 10);
            let passed = clock.at(from + ns) - clock.at(from);
            prop_assert!(passed >= ns - ns / 100 - 1 && passed <= ns + ns / 100 + 1);
            let shown = clock.at(from) + ns;
            let woken = clock.when(shown);
            prop_assert!(clock.at(woken) >= shown && (woken == 0 || clock.at(woken - 1) < shown));
        }
    }

    #[test]
    fn setting_the_wall_clock_leaves_the_monotonic_one() {
        let mut clock = Clock::new(&Decisions::of_log(1, &[]), 0, 10);
        let (shown, wall) = (clock.at(50), clock.wall(50));
        clock.set_wall(-40);
        assert_eq!((clock.at(50), clock.wall(50)), (shown, wall - 40));
    }
}
