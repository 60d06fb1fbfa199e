//! Whether a node's silence, or its lack of progress, means that it is to be replaced: integers only, so that the answer
//! is the same wherever it is folded again.

use crate::cluster::orders::{Activity, Beat};
use crate::plant::{self, Bug};
use crate::time::Time;
use alloc::{format, string::String};
use serde::{Deserialize, Serialize};

/// How long to wait for what, in nanoseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Patience {
    /// Silence is never suspicious before this, however regular the beats were.
    pub silence_min_ns: u64,
    /// Silence is always suspicious after this, however irregular they were.
    pub silence_max_ns: u64,
    /// From the start of a process to its first beat.
    pub starting_ns: u64,
    /// Without progress while parameters are loaded.
    pub loading_ns: u64,
    /// Without progress while logs are brought to one.
    pub joining_ns: u64,
    /// Without progress while there are requests.
    pub serving_ns: u64,
}

impl Default for Patience {
    fn default() -> Self {
        const SECOND: u64 = 1_000_000_000;
        Self {
            silence_min_ns: SECOND / 2,
            silence_max_ns: 10 * SECOND,
            starting_ns: 60 * SECOND,
            loading_ns: 600 * SECOND,
            joining_ns: 60 * SECOND,
            serving_ns: 60 * SECOND,
        }
    }
}

impl Patience {
    pub(super) fn check(&self) -> Result<(), String> {
        for (name, value) in [
            ("silence_min_ns", self.silence_min_ns),
            ("starting_ns", self.starting_ns),
            ("loading_ns", self.loading_ns),
            ("joining_ns", self.joining_ns),
            ("serving_ns", self.serving_ns),
        ] {
            if value == 0 {
                return Err(format!("patience.{name} is 0: every node would be replaced at once"));
            }
        }
        if self.silence_max_ns < self.silence_min_ns {
            return Err(format!(
                "patience.silence_max_ns is {}, less than silence_min_ns, {}",
                self.silence_max_ns, self.silence_min_ns
            ));
        }
        Ok(())
    }

    /// How long there may be no progress; `None` where there need be none.
    fn without_progress(&self, activity: Activity) -> Option<u64> {
        match activity {
            Activity::Idle => None,
            _ if plant::is(Bug::HangIgnored) => None,
            Activity::Loading => Some(self.loading_ns),
            Activity::Joining => Some(self.joining_ns),
            Activity::Serving | Activity::Draining => Some(self.serving_ns),
        }
    }
}

/// Why a node is suspected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Suspicion {
    /// It was not heard for this many nanoseconds.
    Silent(u64),
    /// It is heard, but got nothing done for this many nanoseconds.
    Stuck(Activity, u64),
}

/// Doublings of the bound on silence after suspicions that were false.
const CAUTION_MAX: u32 = 4;
/// Beats in time after which one doubling is taken back.
const BEATS_PER_CAUTION: u32 = 256;

/// What is known of the rhythm of a node's present life.
#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(super) struct Detector {
    heard: Time,
    /// Moving averages of the pause between two beats, and of how far the pauses are from it.
    pause_ns: u64,
    deviation_ns: u64,
    activity: Activity,
    progress: u64,
    progressed: Time,
    /// Outlives the life: how easily this node was wronged.
    caution: u32,
    in_time: u32,
}

impl Detector {
    /// Of a node that was never heard.
    pub(super) const NEW: Self = Self {
        heard: Time(0),
        pause_ns: 0,
        deviation_ns: 0,
        activity: Activity::Idle,
        progress: 0,
        progressed: Time(0),
        caution: 0,
        in_time: 0,
    };

    /// A new life begins; nothing was heard of it yet.
    pub(super) const fn begin(&mut self, now: Time) {
        *self = Self { heard: now, progressed: now, caution: self.caution, ..Self::NEW };
    }

    /// Whether it was heard after a time.
    pub(super) fn heard_since(&self, time: Time) -> bool {
        self.heard > time
    }

    /// It beats; `joined` if it is in the epoch that it should be in.
    pub(super) fn heard(&mut self, now: Time, beat: &Beat, joined: bool) {
        let pause = now.0.saturating_sub(self.heard.0);
        self.heard = now;
        if self.pause_ns == 0 {
            (self.pause_ns, self.deviation_ns) = (pause, pause / 2);
        } else {
            let error = pause.abs_diff(self.pause_ns);
            self.deviation_ns = self.deviation_ns - self.deviation_ns / 4 + error / 4;
            self.pause_ns = self.pause_ns - self.pause_ns / 8 + pause / 8;
        }
        let activity = if joined { beat.activity } else { Activity::Joining };
        if beat.progress != self.progress || activity != self.activity {
            (self.progress, self.activity, self.progressed) = (beat.progress, activity, now);
        }
        self.in_time += 1;
        if self.in_time == BEATS_PER_CAUTION {
            self.in_time = 0;
            self.caution = self.caution.saturating_sub(1);
        }
    }

    /// It was suspected, and lives.
    pub(super) fn wronged(&mut self) {
        self.caution = (self.caution + 1).min(CAUTION_MAX);
    }

    /// The supervisor itself was late by so much: nobody else is to suffer for it.
    pub(super) const fn forgive(&mut self, ns: u64) {
        self.heard = self.heard.after_ns(ns);
        self.progressed = self.progressed.after_ns(ns);
    }

    fn silence_ns(&self, patience: &Patience) -> u64 {
        if plant::is(Bug::SilenceIgnored) {
            return 1 << 50;
        }
        let usual = self.pause_ns.saturating_add(self.deviation_ns.saturating_mul(4));
        let bound = usual.max(patience.silence_min_ns).saturating_mul(1 << self.caution);
        bound.min(patience.silence_max_ns)
    }

    /// When it is to be suspected if nothing is heard until then.
    pub(super) fn until(&self, patience: &Patience) -> Time {
        let silent = self.heard.after_ns(self.silence_ns(patience));
        let stuck = patience.without_progress(self.activity).map(|ns| self.progressed.after_ns(ns));
        stuck.map_or(silent, |stuck| stuck.min(silent))
    }

    pub(super) fn suspicion(&self, now: Time, patience: &Patience) -> Option<Suspicion> {
        let silent = now.0.saturating_sub(self.heard.0);
        if silent >= self.silence_ns(patience) {
            return Some(Suspicion::Silent(silent));
        }
        let still = now.0.saturating_sub(self.progressed.0);
        let stuck = patience.without_progress(self.activity).is_some_and(|ns| still >= ns);
        stuck.then_some(Suspicion::Stuck(self.activity, still))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const PATIENCE: Patience = Patience {
        silence_min_ns: 100,
        silence_max_ns: 5_000,
        starting_ns: 1,
        loading_ns: 4_000,
        joining_ns: 2_000,
        serving_ns: 1_000,
    };

    fn beat(activity: Activity, progress: u64) -> Beat {
        Beat {
            member: Default::default(),
            sent: Time(0),
            facts: Default::default(),
            log: Default::default(),
            torn: false,
            began: Default::default(),
            committed: Default::default(),
            epoch: Default::default(),
            synced: false,
            activity,
            progress,
            diverged: 0,
            drained: false,
            shards: None,
        }
    }

    proptest! {
        #[test]
        fn the_bound_is_exact_and_within_its_limits(pauses in prop::collection::vec(1u64..3_000, 1..60)) {
            let mut detector = Detector::default();
            let mut now = Time(7);
            detector.begin(now);
            for pause in pauses {
                now = now.after_ns(pause);
                detector.heard(now, &beat(Activity::Idle, 0), true);
            }
            let until = detector.until(&PATIENCE);
            prop_assert!(until >= now.after_ns(PATIENCE.silence_min_ns));
            prop_assert!(until <= now.after_ns(PATIENCE.silence_max_ns));
            prop_assert_eq!(detector.suspicion(Time(until.0 - 1), &PATIENCE), None);
            prop_assert!(detector.suspicion(until, &PATIENCE).is_some(), "an alarm finds what it rang for");
        }
    }

    #[test]
    fn regular_beats_make_it_quick_and_irregular_ones_patient() {
        let after = |pauses: [u64; 2]| {
            let mut detector = Detector::default();
            let mut now = Time(0);
            detector.begin(now);
            for round in 0..100 {
                now = now.after_ns(pauses[round % 2]);
                detector.heard(now, &beat(Activity::Idle, 0), true);
            }
            detector.until(&PATIENCE).0 - now.0
        };
        assert!(after([200, 200]) < 300, "{}", after([200, 200]));
        assert!(after([50, 350]) > 600, "{}", after([50, 350]));
    }

    #[test]
    fn a_load_is_no_hang_and_a_hang_is_none_of_silence() {
        let lives = |activity| {
            let mut detector = Detector::default();
            detector.begin(Time(0));
            (1..80).map(|n| Time(n * 50)).find(|&now| {
                detector.heard(now, &beat(activity, 9), true);
                detector.suspicion(now, &PATIENCE).is_some()
            })
        };
        assert_eq!(lives(Activity::Serving), Some(Time(1_050)), "beats alone are no progress");
        assert_eq!(lives(Activity::Loading), None);
        assert_eq!(lives(Activity::Idle), None);
    }

    #[test]
    fn who_does_not_join_is_stuck_whatever_it_says() {
        let mut detector = Detector::default();
        detector.begin(Time(0));
        let stuck = (1..80).map(|n| Time(n * 50)).find(|&now| {
            detector.heard(now, &beat(Activity::Idle, 9), false);
            detector.suspicion(now, &PATIENCE).is_some()
        });
        assert_eq!(stuck, Some(Time(2_050)));
    }

    #[test]
    fn who_was_wronged_is_waited_for_longer_and_the_supervisors_delay_is_its_own() {
        let mut detector = Detector::default();
        detector.begin(Time(0));
        let before = detector.until(&PATIENCE).0;
        detector.wronged();
        assert_eq!(detector.until(&PATIENCE).0, 2 * before);
        detector.begin(Time(10));
        assert_eq!(detector.until(&PATIENCE).0, 10 + 2 * before, "the next life of the node, too");
        detector.forgive(1_000);
        assert_eq!(detector.until(&PATIENCE).0, 1_010 + 2 * before);
        for n in 0..BEATS_PER_CAUTION {
            detector.heard(Time(2_000 + u64::from(n)), &beat(Activity::Idle, 0), true);
        }
        let now = 2_000 + u64::from(BEATS_PER_CAUTION) - 1;
        assert_eq!(detector.until(&PATIENCE).0 - now, before, "but not for ever");
    }
}
