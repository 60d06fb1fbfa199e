//! What ranks exchange in a step: columns of results, results of experts, and what a stage hands on.

use super::output::digest_values;
use super::{Batch, ExpertSource, Stopped, exchange};
use crate::kernels::Buffer;
use crate::model::Model;
use crate::share::Share;
use lite_llm_core::digest::Digest;
use lite_llm_core::input::RowResult;
use std::ops::Range;

/// An exchange, and who carries it.
#[derive(Clone, Copy)]
pub(super) struct Among<'a> {
    pub(super) source: &'a dyn ExpertSource,
    pub(super) exchange: u32,
}

impl Among<'_> {
    /// The exchange after this one.
    pub(super) fn next(self) -> Self {
        Self { exchange: self.exchange + 1, ..self }
    }
}

/// What is digested of a row. A stage that is not the last hands on what it has digested: a row has the digest that one
/// machine would give it.
#[derive(Debug)]
pub(crate) struct RowDigest {
    hasher: blake3::Hasher,
    fed: Option<Vec<u8>>,
}

impl RowDigest {
    pub(super) fn new(share: &Share) -> Self {
        Self { hasher: blake3::Hasher::new(), fed: (!share.is_last_stage()).then(Vec::new) }
    }

    pub(super) fn update(&mut self, bytes: &[u8]) -> &mut Self {
        self.hasher.update(bytes);
        if let Some(fed) = &mut self.fed {
            fed.extend_from_slice(bytes);
        }
        self
    }

    pub(super) fn digest(&self) -> Digest {
        Digest(*self.hasher.finalize().as_bytes())
    }
}

impl Model {
    /// Values of all tensor ranks together, rows x all columns, of this one's, rows x its columns. With one tensor rank these
    /// are its own.
    pub(super) fn gather<'a>(
        &self,
        own: &'a [f32],
        rows: usize,
        columns: impl Fn(u32) -> Range<usize>,
        room: &'a mut Buffer,
        among: Among<'_>,
    ) -> Result<&'a [f32], Stopped> {
        if !self.share.is_tensor() {
            return Ok(own);
        }
        let whole = room.values(rows * columns(self.share.topology().tensor - 1).end);
        self.gather_into(own, rows, columns, whole, among)?;
        Ok(whole)
    }

    /// The same for several ranks, into memory of the caller.
    pub(super) fn gather_into(
        &self,
        own: &[f32],
        rows: usize,
        columns: impl Fn(u32) -> Range<usize>,
        whole: &mut [f32],
        among: Among<'_>,
    ) -> Result<(), Stopped> {
        let all = whole.len().checked_div(rows).unwrap_or(0);
        let parts = among.source.gather(&self.share.tensor_ranks(), among.exchange, &bytes_of(own))?;
        for (part, columns) in parts.iter().zip((0..).map(columns)) {
            let width = columns.len();
            assert_eq!(part.len(), 4 * rows * width, "a rank of this very version computes the same rows");
            for (row, values) in part.chunks_exact((4 * width).max(1)).enumerate() {
                read_values(values, &mut whole[row * all + columns.start..][..width]);
            }
        }
        Ok(())
    }

    /// Takes what the stage before computed.
    pub(super) fn take_over(
        &self,
        x: &mut [f32],
        digests: &mut [RowDigest],
        source: &dyn ExpertSource,
    ) -> Result<(), Stopped> {
        let from = self.share.in_stage(self.share.seat().pipeline - 1);
        let bytes = source.take_over(from, exchange::of_stage(self.share.layers(self.arch()).start))?;
        read_values(taken_over(&bytes, x.len(), digests), x);
        Ok(())
    }

    /// Gives the next stage what this one computed; what it says of its rows is what it has digested so far.
    pub(super) fn hand_on(
        &self,
        batch: &mut Batch<'_>,
        source: &dyn ExpertSource,
    ) -> Result<Vec<RowResult>, Stopped> {
        let to = self.share.in_stage(self.share.seat().pipeline + 1);
        let exchange = exchange::of_stage(self.share.layers(self.arch()).end);
        source.hand_on(to, exchange, &handed_on(batch.x, batch.digests))?;
        // Ranks of a stage are compared by what they hand on.
        for (at, x) in batch.at.iter().zip(batch.x.chunks_exact(self.arch().hidden)) {
            digest_values(&mut batch.digests[at.row as usize], x);
        }
        let digests = batch.digests.iter().map(RowDigest::digest);
        Ok(digests.map(|digest| RowResult { token: None, stop: false, digest }).collect())
    }
}

/// What a stage hands on: its residual stream, and of each row what it has digested so far.
pub(super) fn handed_on(x: &[f32], digests: &[RowDigest]) -> Vec<u8> {
    let mut bytes = bytes_of(x);
    for RowDigest { fed, .. } in digests {
        let fed = fed.as_deref().unwrap_or_default();
        bytes.extend((fed.len() as u64).to_le_bytes());
        bytes.extend_from_slice(fed);
    }
    bytes
}

/// The same as the next stage takes it: the bytes of so many values, while what was digested goes to its rows.
pub(super) fn taken_over<'a>(bytes: &'a [u8], values: usize, digests: &mut [RowDigest]) -> &'a [u8] {
    let (values, mut rest) = bytes.split_at(4 * values);
    for digest in digests {
        let (length, fed) =
            rest.split_first_chunk::<8>().expect("a stage hands on what it digested of each row");
        let (fed, after) = fed.split_at(u64::from_le_bytes(*length) as usize);
        digest.update(fed);
        rest = after;
    }
    values
}

/// Values as they travel: little-endian.
pub(super) fn bytes_of(values: &[f32]) -> Vec<u8> {
    if cfg!(target_endian = "little") {
        return bytemuck::cast_slice(values).to_vec();
    }
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

pub(super) fn read_values(bytes: &[u8], into: &mut [f32]) {
    for (bytes, value) in bytes.as_chunks::<4>().0.iter().zip(into) {
        *value = f32::from_le_bytes(*bytes);
    }
}
