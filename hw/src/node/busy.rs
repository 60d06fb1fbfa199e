//! Loaders that are at one job for too long: a disk that hangs under reads that block.

use super::reports::{Report, Reports};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

/// How long one job may take. The largest of experts takes seconds on the slowest of disks.
pub(super) const JOB_MAX: Duration = Duration::from_secs(60);

/// Since when each loader is at its job.
#[derive(Debug)]
pub(super) struct Busy {
    began: Instant,
    /// Nanoseconds after `began`, and one more; 0 while a loader has nothing to do.
    since: Box<[AtomicU64]>,
}

impl Busy {
    pub(super) fn of(loaders: usize) -> Arc<Self> {
        let since = (0..loaders).map(|_| AtomicU64::new(0)).collect();
        Arc::new(Self { began: Instant::now(), since })
    }

    fn now(&self) -> u64 {
        u64::try_from(self.began.elapsed().as_nanos()).unwrap_or(u64::MAX - 1) + 1
    }

    /// Does a job of a loader.
    pub(super) fn at_job<R>(&self, loader: usize, job: impl FnOnce() -> R) -> R {
        self.since[loader].store(self.now(), Ordering::Relaxed);
        let done = job();
        self.since[loader].store(0, Ordering::Relaxed);
        done
    }

    /// How long the one has been at its job that has been so for the longest.
    fn longest(&self) -> Duration {
        let since = self.since.iter().map(|since| since.load(Ordering::Relaxed)).filter(|&since| since > 0);
        since.min().map_or(Duration::ZERO, |since| Duration::from_nanos(self.now().saturating_sub(since)))
    }

    /// Reports the first job that takes longer than it may; ends with it, or when the other end of the channel is dropped.
    pub(super) fn watch(&self, most: Duration, closed: &Receiver<()>, reports: &Reports) {
        while let Err(RecvTimeoutError::Timeout) = closed.recv_timeout(most / 60) {
            if self.longest() > most {
                let what = format!("a loader has been at one job for {most:?}");
                reports.tell(Report::Lost { what });
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Sender, channel, sync_channel};
    use std::thread;

    const MOST: Duration = Duration::from_millis(600);

    struct Heard(Report);

    impl From<Report> for Heard {
        fn from(report: Report) -> Self {
            Self(report)
        }
    }

    /// Watches two loaders, the first of which has jobs of such a length.
    fn watched(jobs: &[Duration]) -> Option<String> {
        let (messages, heard) = sync_channel::<Heard>(4);
        let reports = Reports::to(messages);
        let busy = Busy::of(2);
        let (open, closed): (Sender<()>, _) = channel();
        let (watching, reports) = (Arc::clone(&busy), reports);
        thread::scope(|scope| {
            scope.spawn(move || watching.watch(MOST, &closed, &reports));
            for &job in jobs {
                busy.at_job(0, || thread::sleep(job));
            }
            drop(open);
        });
        heard.try_iter().map(|Heard(report)| format!("{report:?}")).next()
    }

    #[test]
    fn a_job_that_takes_too_long_is_reported() {
        let lost = watched(&[MOST * 2]).expect("it is reported");
        assert!(lost.contains("Lost") && lost.contains("a loader has been at one job"), "{lost}");
    }

    #[test]
    fn many_jobs_may_take_longer_than_one() {
        assert_eq!(watched(&[MOST / 12; 16]), None);
    }
}
