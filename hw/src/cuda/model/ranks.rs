//! What a rank on a device exchanges with the others: from the device into pinned memory, over the links, and back. The exchanges are
//! those of the model on the CPU, number for number and byte for byte, and no sum crosses ranks: each has whole rows of outputs.

use super::super::CudaError;
use super::super::gpu::Gpu;
use super::super::memory::Pinned;
use super::super::stream::Stream;
use super::routes::Users;
use super::run::Run;
use super::{Failed, Step};
use lite_llm_model::forward::exchange;
use lite_llm_model::{ExpertSource, Model};
use std::ops::Range;
use std::sync::Arc;

/// Pinned memory that exchanges go through, one after another.
#[derive(Debug)]
pub(super) struct Post {
    pinned: Pinned,
}

impl Post {
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

/// The other ranks, and how they are reached.
pub(super) enum Among<'a> {
    /// There are none: of a whole model, whose launches may be recorded.
    Nobody,
    /// There may be some.
    Ranks { source: &'a dyn ExpertSource, post: &'a mut Post },
}

impl Among<'_> {
    /// # Panics
    /// If there is nobody.
    fn reach(&mut self) -> (&dyn ExpertSource, &mut Post) {
        match self {
            Self::Nobody => panic!("a whole model exchanges nothing"),
            Self::Ranks { source, post } => (*source, post),
        }
    }
}

impl Run<'_> {
    /// Whether several ranks share the rows of matrices.
    pub(super) const fn is_tensor(&self) -> bool {
        self.model.share().is_tensor()
    }

    /// Values of all tensor ranks together, rows x all columns, of this one's, rows x its columns. Both may be in one place. With one
    /// tensor rank they are there already.
    pub(super) fn gather(
        &self,
        (from, to): (u64, u64),
        rows: usize,
        columns: &dyn Fn(u32) -> Range<usize>,
        exchange: u32,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        let share = self.model.share();
        if !share.is_tensor() {
            return Ok(());
        }
        let (source, post) = among.reach();
        let all = columns(share.topology().tensor - 1).end;
        let own = post.fetch(self.stream, from, rows * columns(share.seat().tensor).len())?;
        let parts = source.gather(&share.tensor_ranks(), exchange, own)?;
        post.send(self.stream, to, 4 * rows * all, |whole| {
            for (part, columns) in parts.iter().zip((0..).map(columns)) {
                let width = 4 * columns.len();
                assert_eq!(part.len(), rows * width, "a rank of this very version computes the same rows");
                for (row, values) in part.chunks_exact(width.max(1)).enumerate() {
                    whole[4 * (row * all + columns.start)..][..width].copy_from_slice(values);
                }
            }
        })?;
        Ok(())
    }

    /// The same of rows of a matrix with so many.
    pub(super) fn gather_rows(
        &self,
        places: (u64, u64),
        rows: u32,
        outputs: u32,
        exchange: u32,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        let columns = |tensor| self.model.share().rows_of(tensor, outputs as usize);
        self.gather(places, rows as usize, &columns, exchange, among)
    }

    /// Normalises whole queries or keys, of which each tensor rank has some heads.
    pub(super) fn norm_of_all(
        &self,
        own: u64,
        (weight, width): (u64, u32),
        columns: &dyn Fn(u32) -> Range<usize>,
        exchange: u32,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        let (whole, rows) = (self.room.whole, self.positions());
        self.gather((own, whole), rows as usize, columns, exchange, among)?;
        self.rms_norm(whole, weight, whole, rows, [width; 2], self.model.arch().norm_eps)?;
        let mine = columns(self.model.share().seat().tensor);
        let count = mine.len() as u32;
        self.arrange((whole, width, mine.start as u32), 0, (own, count, 0), count, rows)?;
        Ok(())
    }

    /// Gives the other expert ranks what this one's experts gave, and takes what theirs did. One alone has all.
    pub(super) fn exchange_results(
        &self,
        layer: usize,
        users: &Users,
        own: &Range<usize>,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        if !self.model.share().is_expert() {
            return Ok(());
        }
        let (source, post) = among.reach();
        let hidden = self.sizes.hidden;
        let [first, end] = [own.start, own.end].map(|expert| users.firsts[expert] as usize);
        let from = Self::value(self.room.results, first * hidden);
        let part = post.fetch(self.stream, from, (end - first) * hidden)?;
        let ranks = self.model.share().expert_ranks();
        let parts = source.gather(&ranks, exchange::of_results(layer), part)?;
        // In the order of ranks they are all results, in the order of experts.
        let bytes = 4 * users.positions.len() * hidden;
        post.send(self.stream, self.room.results, bytes, |all| {
            let mut rest = all;
            for part in parts {
                let into = rest.split_off_mut(..part.len());
                into.expect("ranks of this very version have the same routes").copy_from_slice(&part);
            }
            assert!(rest.is_empty(), "every expert is some rank's");
        })?;
        Ok(())
    }

    /// Takes what the stage before computed.
    pub(super) fn take_over(&self, step: &mut Step<'_, '_>, among: &mut Among<'_>) -> Result<(), Failed> {
        let (source, post) = among.reach();
        let share = self.model.share();
        let from = share.in_stage(share.seat().pipeline - 1);
        let exchange = exchange::of_stage(share.layers(self.model.arch()).start);
        let bytes = source.take_over(from, exchange)?;
        let x = step.outcome.take_over(&bytes, self.at.len() * self.sizes.hidden);
        post.send(self.stream, self.room.x, x.len(), |into| into.copy_from_slice(x))?;
        Ok(())
    }

    /// Gives the next stage what this one computed.
    pub(super) fn hand_on(&self, step: &mut Step<'_, '_>, among: &mut Among<'_>) -> Result<(), Failed> {
        let (source, post) = among.reach();
        let (share, hidden) = (self.model.share(), self.sizes.hidden);
        let x = post.fetch(self.stream, self.room.x, self.at.len() * hidden)?;
        let bytes = step.outcome.hand_on(bytemuck::cast_slice(x), hidden);
        let to = share.in_stage(share.seat().pipeline + 1);
        source.hand_on(to, exchange::of_stage(share.layers(self.model.arch()).end), &bytes)?;
        Ok(())
    }
}

impl Users {
    /// Those of the experts that are this rank's: neighbours.
    pub(super) fn own(&self, model: &Model) -> Range<usize> {
        let seat = model.share().seat().expert;
        let holder = |key| model.holder(key).expect("a key of this checkpoint");
        let first = self.keys.partition_point(|&key| holder(key) < seat);
        first..self.keys.partition_point(|&key| holder(key) <= seat)
    }

    /// The experts that are computed together from one on, up to another. Tensor ranks, which exchange what each group gives, make
    /// the groups of the model on the CPU.
    pub(super) fn together(&self, first: usize, end: usize, is_tensor: bool) -> Range<usize> {
        if !is_tensor {
            return first..end;
        }
        let rows = |end: usize| (self.firsts[end] - self.firsts[first]) as usize;
        let fits = (first + 2..=end).take_while(|&end| rows(end) <= exchange::ROWS_TOGETHER).last();
        first..fits.unwrap_or(first + 1)
    }
}
