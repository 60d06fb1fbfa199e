//! How values go from the device of one rank to that of another. The exchanges are those of the model on the CPU, number for number and
//! byte for byte, and no sum crosses ranks: each has whole rows of outputs. There are two ways. [`Links`] go through pinned memory of
//! the host and the links of the cluster, and are always there; [`Direct`](super::direct::Direct) goes past the host.

use super::super::CudaError;
use super::super::gpu::Gpu;
use super::super::memory::Pinned;
use super::super::stream::Stream;
use super::mirror::Results;
use super::run::Run;
use super::{Failed, Step};
use lite_llm_model::ExpertSource;
use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

/// Parts of several ranks that come together in each of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gather<'a> {
    /// The ranks, in the order of their parts.
    pub(super) ranks: &'a [u32],
    /// Where this one is among them.
    pub(super) own: usize,
    /// The columns of each, one after the other.
    pub(super) columns: &'a [Range<usize>],
    pub(super) rows: usize,
    /// Where this rank's part stands, rows x its columns.
    pub(super) from: u64,
    /// Where all are to stand, rows x all columns. It may be the same place.
    pub(super) to: u64,
    pub(super) exchange: u32,
}

impl Gather<'_> {
    /// All columns.
    pub(super) fn width(&self) -> usize {
        self.columns.last().map_or(0, |last| last.end)
    }

    /// The columns of this rank.
    pub(super) fn own_columns(&self) -> &Range<usize> {
        &self.columns[self.own]
    }
}

/// A way for values. Whatever it queues lives until the stream was waited for. Before it queues what is no launch, it has the run flushed.
pub(super) trait Transport: Debug {
    /// Brings parts together.
    fn gather(&mut self, run: &Run<'_>, source: &dyn ExpertSource, gather: &Gather<'_>)
    -> Result<(), Failed>;

    /// Gives a rank of the next stage the residual stream, and what was digested before it.
    fn hand_on(
        &mut self,
        run: &Run<'_>,
        source: &dyn ExpertSource,
        to: (u32, u32),
        step: &mut Step<'_, '_>,
        results: &mut Results,
    ) -> Result<(), Failed>;

    /// Takes what a rank of the stage before gives. Both have the rank first, and the exchange.
    fn take_over(
        &mut self,
        run: &Run<'_>,
        source: &dyn ExpertSource,
        from: (u32, u32),
        step: &mut Step<'_, '_>,
    ) -> Result<(), Failed>;
}

/// Pinned memory and the links of the cluster.
#[derive(Debug)]
pub(super) struct Links {
    pinned: Pinned,
}

impl Links {
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, CudaError> {
        Ok(Self { pinned: Pinned::new(gpu, bytes)? })
    }

    /// Brings values from the device. What was sent before has arrived then, too.
    ///
    /// # Panics
    /// If there is no room, which the sizes of the largest step plan.
    fn fetch(&mut self, stream: &Stream, from: u64, values: usize) -> Result<&mut [u8], CudaError> {
        let bytes = 4 * values;
        assert!(bytes <= self.pinned.len(), "exchanges of a step that was planned fit");
        if bytes > 0 {
            // SAFETY: the bytes are within both memories; nobody looks at them before the stream was waited for, below.
            unsafe { stream.down(from, self.pinned.start(), bytes) }?;
        }
        stream.wait()?;
        // SAFETY: the memory has so many bytes, all of them written when it was taken. The stream was waited for, and every copy
        // that is queued later takes the memory for itself, which ends the borrow.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pinned.start(), bytes) })
    }

    /// Has bytes written and copied to the device.
    ///
    /// # Panics
    /// As above.
    fn send(
        &mut self,
        stream: &Stream,
        to: u64,
        bytes: usize,
        write: impl FnOnce(&mut [u8]),
    ) -> Result<(), CudaError> {
        assert!(bytes <= self.pinned.len(), "exchanges of a step that was planned fit");
        // Whoever sends has fetched before, or begins a step: nothing of the memory is under way.
        // SAFETY: the memory has so many bytes, all of them written when it was taken.
        write(unsafe { std::slice::from_raw_parts_mut(self.pinned.start(), bytes) });
        if bytes == 0 {
            return Ok(());
        }
        // SAFETY: the bytes are within both memories; the memory is written again only after the stream was waited for.
        unsafe { stream.up(self.pinned.start(), to, bytes) }
    }
}

impl Transport for Links {
    fn gather(
        &mut self,
        run: &Run<'_>,
        source: &dyn ExpertSource,
        gather: &Gather<'_>,
    ) -> Result<(), Failed> {
        let (rows, all) = (gather.rows, gather.width());
        run.flush()?;
        let own = self.fetch(run.stream, gather.from, rows * gather.own_columns().len())?;
        let parts = source.gather(gather.ranks, gather.exchange, own)?;
        self.send(run.stream, gather.to, 4 * rows * all, |whole| {
            for (part, columns) in parts.iter().zip(gather.columns) {
                let width = 4 * columns.len();
                assert_eq!(part.len(), rows * width, "a rank of this very version computes the same rows");
                for (row, values) in part.chunks_exact(width.max(1)).enumerate() {
                    whole[4 * (row * all + columns.start)..][..width].copy_from_slice(values);
                }
            }
        })?;
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
        run.ask_to_hand_on(results)?;
        Ok(source.hand_on(to, exchange, &run.to_hand_on(step, results)?)?)
    }

    fn take_over(
        &mut self,
        run: &Run<'_>,
        source: &dyn ExpertSource,
        (from, exchange): (u32, u32),
        step: &mut Step<'_, '_>,
    ) -> Result<(), Failed> {
        let bytes = source.take_over(from, exchange)?;
        let x = step.outcome.take_over(&bytes, run.at.len() * run.sizes.hidden);
        Ok(self.send(run.stream, run.room.x, x.len(), |into| into.copy_from_slice(x))?)
    }
}
