//! Values that go from device to device, by NCCL. It moves them and adds nothing up; where they go is arranged on the device, and the host
//! waits for none of them.

use super::super::CudaError;
use super::super::nccl::communicator::{Communicator, Part};
use super::mirror::Results;
use super::run::Run;
use super::transport::{Gather, Transport};
use super::{Failed, Step};
use lite_llm_model::ExpertSource;
use std::ops::Range;
use std::sync::Arc;

/// Parts begin at multiples of so many values, so that sixteen bytes are copied at once.
const ALIGN: usize = 4;

/// The ranks of an epoch, each with a device of its own.
#[derive(Debug)]
pub(super) struct Direct {
    ranks: Arc<Communicator>,
}

impl Direct {
    pub(super) const fn new(ranks: Arc<Communicator>) -> Self {
        Self { ranks }
    }

    /// Moves parts.
    fn exchange(&self, run: &Run<'_>, sends: &[Part], receives: &[Part]) -> Result<(), CudaError> {
        run.flush()?;
        // SAFETY: the parts are pieces of `Room`, each with a place of its own, which live until the stream was waited for: a step does not
        // end before.
        unsafe { self.ranks.exchange(run.stream, sends, receives) }
    }

    /// Where parts are sent from and received. A part that stands where another is to come is put aside first.
    fn places(gather: &Gather<'_>, aside: u64, room: usize) -> (u64, Vec<u64>) {
        let &Gather { columns, rows, from, to, own, .. } = gather;
        let mut used = 0;
        let aside: Vec<u64> = columns
            .iter()
            .map(|columns| {
                let at = Run::value(aside, used);
                used += (rows * columns.len()).next_multiple_of(ALIGN);
                at
            })
            .collect();
        let values = |at: u64, count: usize| at..at + 4 * count as u64;
        let (part, all) = (values(from, rows * columns[own].len()), values(to, rows * gather.width()));
        let is_beside = part.end <= all.start || all.end <= part.start;
        let is_there = rows == 1 && from == Run::value(to, columns[own].start);
        let sent_from = if is_beside || is_there { from } else { aside[own] };
        // A single row has its parts one after the other as they come.
        let is_aside = rows > 1 || sent_from != from;
        assert!(!is_aside || used <= room, "exchanges of a step that was planned fit");
        let received = |(aside, columns): (u64, &Range<usize>)| {
            if rows == 1 { Run::value(to, columns.start) } else { aside }
        };
        (sent_from, aside.into_iter().zip(columns).map(received).collect())
    }
}

impl Transport for Direct {
    fn gather(&mut self, run: &Run<'_>, _: &dyn ExpertSource, gather: &Gather<'_>) -> Result<(), Failed> {
        let &Gather { ranks, own, columns, rows, from, to, .. } = gather;
        let (width, own_width) = (gather.width() as u32, columns[own].len() as u32);
        // Nobody has anything, or all of it is in its place.
        if rows == 0 || width == 0 {
            return Ok(());
        }
        let (sent_from, places) = Self::places(gather, run.room.gathered, run.sizes.gathered);
        let copy = |(x, stride): (u64, u32), out: (u64, u32, u32), n: u32| match n {
            0 => Ok(()),
            n => run.arrange((x, stride, 0), 0, out, n, rows as u32),
        };
        if sent_from != from {
            copy((from, own_width), (sent_from, own_width, 0), own_width)?;
        }
        let others = || (0..ranks.len()).filter(|&part| part != own);
        let part = |rank: usize, at: u64, part: usize| Part {
            rank: ranks[rank],
            at,
            values: rows * columns[part].len(),
        };
        let sends: Vec<Part> = others().map(|other| part(other, sent_from, own)).collect();
        let receives: Vec<Part> = others().map(|other| part(other, places[other], other)).collect();
        self.exchange(run, &sends, &receives)?;
        for (part, columns) in columns.iter().enumerate() {
            let place = if part == own { sent_from } else { places[part] };
            let there = Run::value(to, columns.start);
            if rows == 1 && place == there {
                continue;
            }
            let n = columns.len() as u32;
            copy((place, n), (to, width, columns.start as u32), n)?;
        }
        Ok(())
    }

    fn hand_on(
        &mut self,
        run: &Run<'_>,
        source: &dyn ExpertSource,
        (to, exchange): (u32, u32),
        step: &mut Step<'_, '_>,
        results: &mut Results,
    ) -> Result<(), Failed> {
        let values = run.at.len() * run.sizes.hidden;
        // The host digests what goes to the next stage, so that it has a copy.
        run.ask_to_hand_on(results)?;
        self.exchange(run, &[Part { rank: to, at: run.room.x, values }], &[])?;
        let bytes = run.to_hand_on(step, results)?;
        Ok(source.hand_on(to, exchange, &bytes[4 * values..])?)
    }

    fn take_over(
        &mut self,
        run: &Run<'_>,
        source: &dyn ExpertSource,
        (from, exchange): (u32, u32),
        step: &mut Step<'_, '_>,
    ) -> Result<(), Failed> {
        let values = run.at.len() * run.sizes.hidden;
        self.exchange(run, &[], &[Part { rank: from, at: run.room.x, values }])?;
        step.outcome.take_over(&source.take_over(from, exchange)?, 0);
        Ok(())
    }
}
