//! Many seeds on all cores.

use super::{ClusterSetup, Report, run};
use std::num::NonZero;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

/// Runs the cluster of each seed, lowest first, and hands each report on as it comes, from any thread. A break lets what runs end
/// and begins no more, so that every seed below one that was handed on is handed on too.
pub fn run_many(
    seeds: Range<u64>,
    setup: impl Fn(u64) -> ClusterSetup + Sync,
    each: impl Fn(Report) -> ControlFlow<()> + Sync,
) {
    let (next, over) = (AtomicU64::new(seeds.start), AtomicBool::new(false));
    let workers = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                // Beyond the end nothing is counted: the last number there is has none after it.
                let take = || {
                    let after = |seed| (seed < seeds.end).then(|| seed + 1);
                    next.fetch_update(Ordering::Relaxed, Ordering::Relaxed, after).ok()
                };
                while !over.load(Ordering::Relaxed) {
                    let Some(seed) = take() else { return };
                    if each(run(&setup(seed))).is_break() {
                        over.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}
