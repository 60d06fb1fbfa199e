//! Signs of life. A heart that stops means a process that hangs or is starved; a heart that beats while the record
//! number stands still during a step means a stuck device or loop.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// A sign of life, one JSON line on the node's standard output.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "beat", rename_all = "lowercase")]
pub enum Beat {
    /// The process lives. Sent by a thread that neither device nor disk can block.
    Heart,
    /// How far the node's event loop has come.
    Progress {
        /// The last input that it handled.
        record: u64,
        /// Whether it has something to do: a step under way, or a boot sequence.
        #[serde(default)]
        busy: bool,
    },
}

impl Beat {
    /// The beat that a line of output is, if it is one.
    pub fn parse(line: &str) -> Option<Self> {
        if line.starts_with("{\"beat\":") { serde_json::from_str(line).ok() } else { None }
    }

    /// The beat as a line.
    pub fn line(&self) -> String {
        serde_json::to_string(self).expect("a beat is plain data")
    }
}

/// How long silence is borne.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WatchLimits {
    /// Without any beat.
    pub silence_max: Duration,
    /// Busy at the same record.
    pub stuck_max: Duration,
}

impl Default for WatchLimits {
    fn default() -> Self {
        Self { silence_max: Duration::from_secs(30), stuck_max: Duration::from_secs(600) }
    }
}

/// What the beats say.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Verdict {
    /// Nothing is wrong.
    Alive,
    /// No beat for too long.
    Silent,
    /// Busy without progress for too long.
    Stuck {
        /// The record at which it stands.
        record: u64,
    },
}

/// The beats of one life. Times are since any fixed moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Watch {
    limits: WatchLimits,
    heard: Duration,
    /// When this record was first reported, while busy.
    busy_at: Option<(u64, Duration)>,
}

impl Watch {
    /// Begins to watch a process that starts now.
    pub fn new(limits: WatchLimits, now: Duration) -> Self {
        Self { limits, heard: now, busy_at: None }
    }

    /// Takes a beat.
    pub fn beat(&mut self, now: Duration, beat: &Beat) {
        self.heard = now;
        if let Beat::Progress { record, busy } = *beat {
            self.busy_at = match self.busy_at {
                _ if !busy => None,
                Some((before, since)) if before == record => Some((before, since)),
                _ => Some((record, now)),
            };
        }
    }

    /// Judges.
    pub fn verdict(&self, now: Duration) -> Verdict {
        match self.busy_at {
            _ if now.saturating_sub(self.heard) >= self.limits.silence_max => Verdict::Silent,
            Some((record, since)) if now.saturating_sub(since) >= self.limits.stuck_max => {
                Verdict::Stuck { record }
            }
            _ => Verdict::Alive,
        }
    }

    /// When the verdict can next change without a beat.
    pub fn next_check(&self) -> Duration {
        let silent = self.heard.saturating_add(self.limits.silence_max);
        let stuck = self.busy_at.map(|(_, since)| since.saturating_add(self.limits.stuck_max));
        stuck.map_or(silent, |stuck| stuck.min(silent))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn busy(record: u64) -> Beat {
        Beat::Progress { record, busy: true }
    }

    #[test]
    fn silence_and_standstill_are_told_apart() {
        let mut watch = Watch::new(WatchLimits { silence_max: s(10), stuck_max: s(30) }, s(100));
        assert_eq!((watch.verdict(s(109)), watch.verdict(s(110))), (Verdict::Alive, Verdict::Silent));
        watch.beat(s(105), &busy(7));
        for at in (110..135).step_by(5) {
            watch.beat(s(at), &Beat::Heart);
            watch.beat(s(at), &busy(7));
            assert_eq!(watch.verdict(s(at)), Verdict::Alive);
        }
        assert_eq!(watch.next_check(), s(135));
        assert_eq!(watch.verdict(s(135)), Verdict::Stuck { record: 7 });
        watch.beat(s(134), &busy(8));
        assert_eq!(watch.verdict(s(135)), Verdict::Alive);
        watch.beat(s(136), &Beat::Progress { record: 8, busy: false });
        assert_eq!(watch.next_check(), s(146), "an idle node may stand still for ever");
    }

    #[test]
    fn beats_are_lines() {
        for beat in [Beat::Heart, busy(12)] {
            assert_eq!(Beat::parse(&beat.line()), Some(beat));
        }
        assert_eq!(
            Beat::parse(r#"{"beat":"progress","record":3}"#),
            Some(Beat::Progress { record: 3, busy: false })
        );
        assert_eq!(Beat::parse(r#"{"offset":0,"token":5}"#), None);
        assert_eq!(Beat::parse(r#"{"beat":"drum"}"#), None);
    }
}
