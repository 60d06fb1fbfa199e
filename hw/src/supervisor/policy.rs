//! Whether a process that died is started again.

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;
use std::time::Duration;

use serde::Serialize;

/// The exit code of an internal error.
const BUG: i32 = 4;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub enum Exit {
    /// By itself, with this code.
    Code(i32),
    /// By a signal.
    Signal(i32),
}

impl From<ExitStatus> for Exit {
    fn from(status: ExitStatus) -> Self {
        match (status.code(), status.signal()) {
            (Some(code), _) => Self::Code(code),
            (None, Some(signal)) => Self::Signal(signal),
            (None, None) => Self::Code(-1),
        }
    }
}

impl fmt::Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exit code {code}"),
            Self::Signal(signal) => write!(f, "signal {signal}"),
        }
    }
}

/// How often a process may be started again: so many times within any window, each time after a longer pause.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RestartBudget {
    /// Restarts within a window; 0 never restarts.
    pub restarts_max: usize,
    /// The window.
    pub window: Duration,
    /// The first pause; it doubles with each further restart in the window.
    pub pause_min: Duration,
    /// The longest pause.
    pub pause_max: Duration,
}

impl Default for RestartBudget {
    fn default() -> Self {
        Self {
            restarts_max: 10,
            window: Duration::from_secs(600),
            pause_min: Duration::from_millis(100),
            pause_max: Duration::from_secs(10),
        }
    }
}

/// What to do about a death.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Start it again after this pause.
    Restart(Duration),
    /// The process ended by its own decision, or was asked to: there is nothing to repair.
    Over,
    /// Starting it again would not help.
    GiveUp(String),
}

/// The deaths so far.
#[derive(Clone, Debug)]
pub struct Policy {
    budget: RestartBudget,
    /// Times of the restarts within the window.
    restarts: Vec<Duration>,
    /// Where the last life panicked.
    panicked_at: Option<u64>,
}

impl Policy {
    /// Nothing has died yet.
    pub fn new(budget: RestartBudget) -> Self {
        Self { budget, restarts: Vec::new(), panicked_at: None }
    }

    /// Judges a death at `now`, since any fixed moment. `panic_record` is the record at which the journal panics when
    /// it is folded: then every life dies there.
    pub fn decide(&mut self, now: Duration, exit: Exit, panic_record: Option<u64>) -> Decision {
        if !matches!(exit, Exit::Signal(_) | Exit::Code(BUG)) {
            return Decision::Over;
        }
        let before = std::mem::replace(&mut self.panicked_at, panic_record);
        if let Some(record) = panic_record.filter(|_| before == panic_record) {
            return Decision::GiveUp(format!(
                "it panics at record {record} of the journal each time; keep the state directory as the bug report, and \
                 start with another one"
            ));
        }
        self.restarts.retain(|at| now.saturating_sub(*at) < self.budget.window);
        let count = self.restarts.len();
        if count >= self.budget.restarts_max {
            return Decision::GiveUp(format!(
                "it was restarted {count} times within {} s, the last time it ended by {exit}",
                self.budget.window.as_secs()
            ));
        }
        self.restarts.push(now);
        let factor = 1u32.checked_shl(u32::try_from(count).unwrap_or(u32::MAX)).unwrap_or(u32::MAX);
        Decision::Restart(self.budget.pause_min.saturating_mul(factor).min(self.budget.pause_max))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const KILLED: Exit = Exit::Signal(9);

    const fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    fn policy(restarts_max: usize) -> Policy {
        let budget = RestartBudget { restarts_max, window: s(60), pause_min: s(1), pause_max: s(3) };
        Policy::new(budget)
    }

    #[test]
    fn only_signals_and_bugs_are_repaired() {
        for code in [0, 1, 2, 3, 5, -1] {
            assert_eq!(policy(9).decide(s(1), Exit::Code(code), None), Decision::Over);
        }
        for exit in [KILLED, Exit::Signal(11), Exit::Code(4)] {
            assert_eq!(policy(9).decide(s(1), exit, None), Decision::Restart(s(1)));
        }
    }

    #[test]
    fn the_budget_is_spent_within_the_window() {
        let mut policy = policy(3);
        for (at, pause) in [(1, 1), (2, 2), (3, 3)] {
            assert_eq!(policy.decide(s(at), KILLED, None), Decision::Restart(s(pause)));
        }
        assert!(matches!(policy.decide(s(4), KILLED, None), Decision::GiveUp(_)));
        assert_eq!(policy.decide(s(61), KILLED, None), Decision::Restart(s(3)));
        assert!(matches!(policy.decide(s(61), KILLED, None), Decision::GiveUp(_)));
        assert_eq!(policy.decide(s(600), KILLED, None), Decision::Restart(s(1)));
        let mut none = Policy::new(RestartBudget { restarts_max: 0, ..RestartBudget::default() });
        assert!(matches!(none.decide(s(1), KILLED, None), Decision::GiveUp(_)));
    }

    #[test]
    fn the_same_panic_twice_is_the_end() {
        let mut policy = policy(9);
        assert!(matches!(policy.decide(s(1), Exit::Code(4), Some(17)), Decision::Restart(_)));
        assert!(matches!(policy.decide(s(2), Exit::Code(4), Some(18)), Decision::Restart(_)));
        let Decision::GiveUp(why) = policy.decide(s(3), Exit::Code(4), Some(18)) else {
            panic!("a third life would die there too")
        };
        assert!(why.contains("record 18"), "{why}");
    }
}
