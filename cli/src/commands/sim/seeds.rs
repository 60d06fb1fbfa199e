//! Many seeds, on all cores.

use super::SimArgs;
use super::tables::Sums;
use crate::exit::{Exit, usage};
use crate::terminal::tell;
use indicatif::{ProgressBar, ProgressStyle};
use lite_llm_sim::cluster::run::run_many;
use lite_llm_sim::hazard::Hazard;
use std::ops::ControlFlow;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

pub(super) fn run_all(args: &SimArgs, hazards: &[Hazard]) -> anyhow::Result<Exit> {
    let Some(end) = args.from.checked_add(args.seeds) else {
        return Err(usage(format!(
            "there are no {} seeds from {} on: the last one is {}",
            args.seeds,
            args.from,
            u64::MAX - 1
        )));
    };
    let (sums, started) = (Mutex::new(Sums::default()), Instant::now());
    let bar = ProgressBar::new(args.seeds);
    let style = ProgressStyle::with_template("{pos} of {len} seeds {bar:40} {eta} {msg}");
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    let setup = |seed| args.setup(seed, hazards);
    run_many(args.from..end, setup, |report| {
        let mut sums = sums.lock().unwrap_or_else(PoisonError::into_inner);
        sums.add(&report);
        bar.set_message(format!("{} violated", sums.failed.len()));
        bar.inc(1);
        if let Some(found) = &report.violation {
            let (seed, line) = (report.seed, found.to_string());
            let line: String = line.lines().next().unwrap_or_default().chars().take(300).collect();
            bar.suspend(|| tell!("seed {seed}: {line}\n  lite-llm sim --seed {seed}{}", args.flags()));
        }
        ControlFlow::Continue(())
    });
    bar.finish_and_clear();
    let sums = sums.into_inner().unwrap_or_else(PoisonError::into_inner);
    sums.print(started.elapsed(), args.json)?;
    Ok(if sums.failed.is_empty() { Exit::Ok } else { Exit::Corrupt })
}
