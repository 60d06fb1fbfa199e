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
                while !over.load(Ordering::Relaxed) {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end {
                        return;
                    }
                    if each(run(&setup(seed))).is_break() {
                        over.store(true, Ordering::Relaxed);
                    }
                }
            });
        }
    });
}
