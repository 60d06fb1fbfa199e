//! How many workers help where others want their cores too.
//!
//! A worker that has to share its core is of little help, and may be a burden: whoever waits for its last task waits for the others'
//! turn. Which it is depends on kernels, scheduler and machine. So it is tried: where a worker is kept from its core, the pool computes
//! with one worker more or less for a while, compares how many tasks were done, and stays with what did more. Nothing of this is
//! in results: tasks are the same, whoever runs them.

use std::time::{Duration, Instant};

/// How long a number of workers is tried, and how long the better one serves until the next trial.
const TRIAL: Duration = Duration::from_millis(100);
const SERVICE: Duration = Duration::from_secs(1);
/// A longer pause between two jobs is nobody's work: what was counted before it is forgotten.
const PAUSE: Duration = Duration::from_millis(20);
/// Others want a worker's core if they had it for so long of the time in which they are counted.
const LOST: Duration = Duration::from_millis(20);
const COUNTED: Duration = Duration::from_millis(100);

/// What a worker notices when it gives its core up and gets it back.
#[derive(Debug)]
pub(super) struct Turns {
    began: Instant,
    lost: Duration,
}

impl Turns {
    pub(super) const fn new(now: Instant) -> Self {
        Self { began: now, lost: Duration::ZERO }
    }

    /// Whether others want the core, now that they had it from `gave` to `back`.
    pub(super) fn crowded(&mut self, gave: Instant, back: Instant) -> bool {
        if gave.duration_since(self.began) > COUNTED {
            *self = Self::new(gave);
        }
        self.lost += back.duration_since(gave);
        self.lost >= LOST
    }
}

/// The caller's choice of how many workers help.
#[derive(Debug)]
pub(super) struct Crowd {
    workers: usize,
    /// What is counted now; nothing while no core is wanted by others: then all help.
    count: Option<Count>,
    /// So many did most.
    best: usize,
    /// Tasks a second with so many workers, the newer counts for more.
    rates: Vec<Option<f64>>,
    /// Whether the last trial was with more than the best.
    more: bool,
}

/// What is done with some workers.
#[derive(Debug)]
struct Count {
    helping: usize,
    began: Instant,
    last: Instant,
    tasks: usize,
    crowded: bool,
}

impl Count {
    const fn new(helping: usize, now: Instant) -> Self {
        Self { helping, began: now, last: now, tasks: 0, crowded: false }
    }
}

impl Crowd {
    pub(super) fn new(workers: usize) -> Self {
        Self { workers, count: None, best: workers, rates: vec![None; workers + 1], more: false }
    }

    /// How many workers may help with a job of so many tasks; `crowded` if one noticed since that others want its core. The time is
    /// only asked for where they do.
    pub(super) fn helping(&mut self, tasks: usize, crowded: bool, now: impl FnOnce() -> Instant) -> usize {
        if self.count.is_none() && !crowded {
            return self.workers;
        }
        let now = now();
        let Some(count) = &mut self.count else {
            self.best = self.workers;
            self.rates.fill(None);
            self.count = Some(Count { tasks, ..Count::new(self.workers, now) });
            return self.workers;
        };
        if now.duration_since(count.last) > PAUSE {
            *count = Count::new(count.helping, now);
        }
        count.crowded |= crowded;
        count.last = now;
        let serves = count.helping == self.best && self.rates[self.best].is_some();
        let took = now.duration_since(count.began);
        if took >= if serves { SERVICE } else { TRIAL } {
            let rate = count.tasks as f64 / took.as_secs_f64();
            let (helping, crowded) = (count.helping, count.crowded);
            if helping == self.workers && !crowded {
                // The others are gone.
                self.count = None;
                return self.workers;
            }
            let known = &mut self.rates[helping];
            *known = Some(known.map_or(rate, |known| (known + rate) / 2.0));
            let next = self.next(helping);
            self.count = Some(Count::new(next, now));
        }
        let count = self.count.as_mut().expect("it was just counted");
        count.tasks += tasks;
        count.helping
    }

    /// With how many to go on after a count.
    fn next(&mut self, counted: usize) -> usize {
        if counted != self.best {
            if self.rates[counted] > self.rates[self.best] {
                self.best = counted;
            }
            return self.best;
        }
        // One more and one fewer in turn, where there are both.
        self.more = self.best == 0 || (self.best < self.workers && !self.more);
        if self.more { self.best + 1 } else { self.best - 1 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pool whose jobs take as long as `job` says for so many workers, and whose workers notice others if `crowded`.
    struct Simulated {
        crowd: Crowd,
        now: Instant,
    }

    impl Simulated {
        /// Goes on for some time; how much of it each number of workers had.
        fn run(&mut self, time: Duration, crowded: bool, job: impl Fn(usize) -> Duration) -> Vec<f64> {
            let mut had = vec![0.0; self.crowd.workers + 1];
            let (end, mut helped) = (self.now + time, false);
            while self.now < end {
                let now = self.now;
                let helping = self.crowd.helping(8, crowded && helped, || now);
                helped = helping > 0;
                self.now += job(helping);
                had[helping] += job(helping).as_secs_f64() / time.as_secs_f64();
            }
            had
        }
    }

    fn simulated(workers: usize) -> Simulated {
        Simulated { crowd: Crowd::new(workers), now: Instant::now() }
    }

    const SLOW: Duration = Duration::from_micros(520);
    const FAST: Duration = Duration::from_micros(500);

    #[test]
    fn all_help_where_nobody_else_wants_their_cores() {
        let mut pool = simulated(3);
        assert_eq!(pool.run(Duration::from_secs(5), false, |_| FAST)[..3], [0.0; 3]);
        assert!(pool.crowd.count.is_none());
    }

    #[test]
    fn a_worker_that_is_a_burden_rests_until_its_core_is_free() {
        let mut pool = simulated(1);
        let had = pool.run(Duration::from_secs(20), true, |helping| if helping == 0 { FAST } else { SLOW });
        assert!(had[0] > 0.85, "{had:?}");
        let had = pool.run(Duration::from_secs(20), true, |helping| if helping == 1 { FAST } else { SLOW });
        assert!(had[1] > 0.75, "it is a help again: {had:?}");
        pool.run(Duration::from_secs(3), true, |helping| if helping == 0 { FAST } else { SLOW });
        let had = pool.run(Duration::from_secs(20), false, |_| FAST);
        assert!(had[1] > 0.9, "nobody is there any more: {had:?}");
        assert!(pool.crowd.count.is_none());
    }

    #[test]
    fn of_many_as_many_help_as_do_most() {
        let mut pool = simulated(7);
        let job = |helping: usize| FAST + Duration::from_micros(20) * helping.abs_diff(4) as u32;
        pool.run(Duration::from_secs(10), true, job);
        let had = pool.run(Duration::from_secs(20), true, job);
        assert!(had[4] > 0.8, "{had:?}");
        assert!(had[3] > 0.0 && had[5] > 0.0, "both sides are tried: {had:?}");
    }

    #[test]
    fn a_pause_counts_for_nothing() {
        let mut pool = simulated(1);
        let job = |helping: usize| if helping == 0 { FAST } else { SLOW };
        for _ in 0..200 {
            // Between two steps of 50 ms nobody asks for anything for a second.
            pool.run(Duration::from_millis(50), true, job);
            pool.now += Duration::from_secs(1);
        }
        assert_eq!(pool.crowd.rates, [None, None], "no count was long enough");
    }

    #[test]
    fn a_core_is_wanted_if_others_had_much_of_it() {
        let now = Instant::now();
        let at = |ms| now + Duration::from_millis(ms);
        let mut turns = Turns::new(now);
        assert!(!turns.crowded(at(10), at(20)));
        assert!(turns.crowded(at(50), at(61)));
        let mut turns = Turns::new(now);
        assert!(!turns.crowded(at(10), at(20)));
        assert!(!turns.crowded(at(200), at(211)), "long ago");
    }
}
