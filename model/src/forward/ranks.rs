//! What ranks exchange in a step: columns of results, results of experts, and what a stage hands on.
//!
//! Each exchange of a step has a number that all its ranks agree on without asking: the layer, and the place in it.

use super::{Batch, ExpertSource, Stopped};
use crate::kernels::Buffer;
use crate::model::Model;
use crate::share::Share;
use lite_llm_core::digest::Digest;
use lite_llm_core::input::RowResult;
use std::ops::Range;

/// Exchanges of a layer, at most.
const OF_LAYER: u32 = 1 << 16;
/// Places of exchanges in a layer. A gated block has two: its inner values, its outputs.
const QUERIES: u32 = 0;
const KEYS: u32 = 1;
const MIXED: u32 = 2;
const OUTPUT: u32 = 3;
const BLOCK: u32 = 4;
const RESULTS: u32 = 6;
const HANDED_ON: u32 = 7;
const EXPERTS: u32 = 8;

fn number(layer: usize, place: u32) -> u32 {
    layer as u32 * OF_LAYER + place
}

pub(super) fn of_queries(layer: usize) -> u32 {
    number(layer, QUERIES)
}

pub(super) fn of_keys(layer: usize) -> u32 {
    number(layer, KEYS)
}

pub(super) fn of_mixed(layer: usize) -> u32 {
    number(layer, MIXED)
}

pub(super) fn of_output(layer: usize) -> u32 {
    number(layer, OUTPUT)
}

/// Of the block that every position uses.
pub(super) fn of_block(layer: usize) -> u32 {
    number(layer, BLOCK)
}

/// Of the results of all experts of a layer.
pub(super) fn of_results(layer: usize) -> u32 {
    number(layer, RESULTS)
}

/// Of some experts that are computed together: those of a wave, or the so-manieth of those that are resident.
pub(super) fn of_experts(layer: usize, together: u32) -> u32 {
    number(layer, EXPERTS + 2 * together)
}

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
        let seat = self.share.seat();
        let from = self.share.in_stage(seat.pipeline - 1);
        let bytes = source.take_over(from, number(self.share.layers(self.arch()).start, HANDED_ON))?;
        let (values, mut rest) = bytes.split_at(4 * x.len());
        read_values(values, x);
        for digest in digests {
            let (length, fed) =
                rest.split_first_chunk::<8>().expect("a stage hands on what it digested of each row");
            let (fed, after) = fed.split_at(u64::from_le_bytes(*length) as usize);
            digest.update(fed);
            rest = after;
        }
        Ok(())
    }

    /// Gives the next stage what this one computed; what it says of its rows is what it has digested so far.
    pub(super) fn hand_on(
        &self,
        batch: &Batch<'_>,
        source: &dyn ExpertSource,
    ) -> Result<Vec<RowResult>, Stopped> {
        let mut bytes = bytes_of(batch.x);
        for RowDigest { fed, .. } in &*batch.digests {
            let fed = fed.as_deref().unwrap_or_default();
            bytes.extend((fed.len() as u64).to_le_bytes());
            bytes.extend_from_slice(fed);
        }
        let to = self.share.in_stage(self.share.seat().pipeline + 1);
        source.hand_on(to, number(self.share.layers(self.arch()).end, HANDED_ON), &bytes)?;
        let results = batch.digests.iter().enumerate().map(|(row, digest)| {
            let mut hasher = digest.hasher.clone();
            let of_row = batch.at.iter().zip(batch.x.chunks_exact(self.arch().hidden));
            for (_, x) in of_row.filter(|(at, _)| at.row as usize == row) {
                hasher.update(&bytes_of(x));
            }
            RowResult { token: None, stop: false, digest: Digest(*hasher.finalize().as_bytes()) }
        });
        Ok(results.collect())
    }
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
