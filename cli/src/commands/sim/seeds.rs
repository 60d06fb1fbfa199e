//! Many seeds, on all cores.

use super::SimArgs;
use super::tables::Sums;
use crate::exit::Exit;
use crate::terminal::tell;
use indicatif::{ProgressBar, ProgressStyle};
use lite_llm_sim::cluster::run::run;
use lite_llm_sim::hazard::Hazard;
use std::num::NonZero;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::Instant;

pub(super) fn run_all(args: &SimArgs, hazards: &[Hazard]) -> anyhow::Result<Exit> {
    let (next, sums, started) = (AtomicU64::new(0), Mutex::new(Sums::default()), Instant::now());
    let bar = ProgressBar::new(args.seeds);
    let style = ProgressStyle::with_template("{pos} of {len} seeds {bar:40} {eta} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let workers = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| {
        for _ in 0..workers {
            scope.spawn(|| {
                loop {
                    let nth = next.fetch_add(1, Ordering::Relaxed);
                    if nth >= args.seeds {
                        return;
                    }
                    let seed = args.from.saturating_add(nth);
                    let Ok(setup) = args.setup(seed, hazards) else { return };
                    let report = run(&setup);
                    let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
                    sums.add(&report);
                    bar.set_message(format!("{} violated", sums.failed.len()));
                    bar.inc(1);
                    if let Some(found) = &report.violation {
                        let line = found.to_string();
                        let line: String =
                            line.lines().next().unwrap_or_default().chars().take(300).collect();
                        bar.suspend(|| {
                            tell!("seed {seed}: {line}\n  lite-llm sim --seed {seed}{}", args.flags())
                        });
                    }
                }
            });
        }
    });
    bar.finish_and_clear();
    let sums = sums.into_inner().unwrap_or_else(PoisonError::into_inner);
    sums.print(started.elapsed(), args.json)?;
    Ok(if sums.failed.is_empty() { Exit::Ok } else { Exit::Corrupt })
}
