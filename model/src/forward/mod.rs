//! The forward pass of one batch step: every row through every layer, experts as they come.
//!
//! All rows share each matrix product; the bits of a row depend on that row alone. Attention is per row, over pages.
//! `gated` is a dense block, `experts` the mixture with the protocol of need, provision and release, `router` what it
//! selects; `output` chooses tokens and digests.

mod attention;
mod cache;
pub mod exchange;
mod experts;
mod foresight;
mod gated;
mod latent;
mod outcome;
mod output;
mod ranks;
mod router;
mod tiered;
mod workspace;

pub(crate) use cache::KvGroups;
pub(crate) use router::route_one;
pub(crate) use tiered::route as route_by_tiers;
pub(crate) use workspace::planned_bytes;

pub use cache::KvCache;
pub use outcome::{Outcome, choice, penalty};
pub use workspace::Workspace;

use crate::arch::Activation;
use crate::kernels::quantise::dequantise_row;
use crate::kernels::{convert, layer_norm, rms_norm};
use crate::model::Model;
use crate::weights::{Base, LayerWeights, NormWeights};
use gated::Block;
use lite_llm_core::ids::{ExpertKey, Slot};
use lite_llm_core::input::RowResult;
use lite_llm_core::output::Forward;
use ranks::Among;
use thiserror::Error;
use workspace::{Rooms, Stream};

/// The step was given up.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the step was given up")]
pub struct Stopped;

/// Why a step has no result.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum StepError {
    /// It was given up.
    #[error(transparent)]
    Stopped(#[from] Stopped),
    /// NaN or infinity.
    #[error("NaN or infinity in row {row}, layer {layer}, position {position}")]
    NonFinite {
        /// The row of the step.
        row: u32,
        /// Decoder layer; the number of layers stands for the logits.
        layer: u32,
        /// Position in the sequence.
        position: u32,
    },
}

/// An expert that is in its slot until its wave is released.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Provided {
    /// The wave.
    pub wave: u32,
    /// Experts of the wave.
    pub wave_len: u32,
    /// Which expert.
    pub expert: ExpertKey,
    /// Where.
    pub slot: Slot,
}

/// Where a step's experts come from.
pub trait ExpertSource {
    /// Asks for the experts that a layer's routers have chosen: distinct, ascending. If the step is to foresee, the next mixture
    /// layer will probably choose those that are `foreseen`, the likeliest first.
    ///
    /// # Errors
    /// If the step is given up.
    fn need(&mut self, layer: u32, experts: &[ExpertKey], foreseen: &[ExpertKey]) -> Result<(), Stopped>;

    /// Waits for the next expert of the layer, in any order within a wave.
    ///
    /// # Errors
    /// If the step is given up.
    fn provided(&mut self) -> Result<Provided, Stopped>;

    /// The bytes of a slot that was provided, or is resident.
    fn slot(&self, slot: Slot) -> &[u8];

    /// Says that no slot of the wave is read any more.
    ///
    /// # Errors
    /// If the step is given up.
    fn released(&mut self, layer: u32, wave: u32) -> Result<(), Stopped>;

    /// Gives other ranks a part, and waits for theirs: the parts of all `ranks`, this one among them, in their order. All of
    /// them number the exchange alike. Only a model with a share of its own asks for this.
    ///
    /// # Errors
    /// If the step is given up.
    fn gather(&self, ranks: &[u32], exchange: u32, part: &[u8]) -> Result<Vec<Vec<u8>>, Stopped> {
        let _ = (ranks, exchange, part);
        unreachable!("a whole model has nobody to exchange with")
    }

    /// Gives the next stage what it goes on from.
    ///
    /// # Errors
    /// If the step is given up.
    fn hand_on(&self, rank: u32, exchange: u32, part: &[u8]) -> Result<(), Stopped> {
        let _ = (rank, exchange, part);
        unreachable!("a whole model has one stage")
    }

    /// Waits for what the stage before hands on.
    ///
    /// # Errors
    /// If the step is given up.
    fn take_over(&self, rank: u32, exchange: u32) -> Result<Vec<u8>, Stopped> {
        let _ = (rank, exchange);
        unreachable!("a whole model has one stage")
    }
}

/// Who wants to see more than tokens.
pub trait Capture {
    /// Whether the logits of every position of a request are wanted; they cost a product each.
    fn wants_logits(&self, request: u64) -> bool;

    /// Logits after a position.
    fn logits(&mut self, request: u64, position: u32, logits: &[f32]);

    /// The experts of a position in a layer, by original number, ascending, with their weights.
    fn routes(&mut self, request: u64, layer: u32, position: u32, experts: &[u32], weights: &[f32]);
}

/// A position of the batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At {
    pub(crate) row: u32,
    pub(crate) request: u64,
    pub(crate) position: u32,
    pub(crate) token: u32,
}

/// A decoder layer of a step.
#[derive(Clone, Copy)]
pub(crate) struct Layer<'a> {
    pub(crate) index: usize,
    pub(crate) weights: &'a LayerWeights,
    pub(crate) step: &'a Forward,
}

/// The running values of a step.
pub(crate) struct Batch<'a> {
    pub(crate) at: &'a [At],
    /// The position of each.
    pub(crate) positions: &'a [u32],
    /// The residual stream: positions x hidden.
    pub(crate) x: &'a mut [f32],
    /// The normalised input of a block: positions x hidden.
    pub(crate) normed: &'a mut [f32],
    /// What is digested of each row.
    pub(crate) digests: &'a mut [ranks::RowDigest],
}

impl Model {
    /// Computes a step. The workspace is any, and the faster for having computed a step of this model before.
    ///
    /// # Errors
    /// If it is given up, or a value is not finite.
    ///
    /// # Panics
    /// If base parameters or routers are not loaded, or the step does not fit the model or the cache.
    pub fn forward(
        &self,
        step: &Forward,
        cache: &mut KvCache,
        workspace: &mut Workspace,
        source: &mut dyn ExpertSource,
        mut capture: Option<&mut dyn Capture>,
    ) -> Result<Vec<RowResult>, StepError> {
        let base = self.base.as_ref().expect("base parameters are loaded before the first step");
        let Workspace { stream, rooms } = workspace;
        let mut batch = self.embed(base, step, stream, source)?;
        for (index, weights) in self.share.layers(self.arch()).zip(&base.layers) {
            let layer = Layer { index, weights, step };
            self.normalise(&mut batch, &weights.attention_norm);
            self.attend(layer, cache, &mut batch, rooms, source)?;
            self.normalise(&mut batch, &weights.block_norm);
            if let Some(dense) = &weights.dense {
                let Rooms { gated, products, added, .. } = rooms;
                let y = added.values(batch.x.len());
                let block = Block { views: dense.views(), picked: None };
                let among = Among { source, exchange: exchange::of_block(index) };
                self.gated([block], Activation::SwiGlu, batch.normed, y, among, (gated, products))?;
                self.add(batch.x, y);
            } else {
                self.mixture(layer, source, &mut capture, &mut batch, rooms)?;
            }
        }
        if !self.share.is_last_stage() {
            return Ok(self.hand_on(&mut batch, source)?);
        }
        self.choose(base, step, &mut batch, &mut capture, rooms, source)
    }

    fn embed<'a>(
        &self,
        base: &Base,
        step: &Forward,
        stream: &'a mut Stream,
        source: &dyn ExpertSource,
    ) -> Result<Batch<'a>, Stopped> {
        let hidden = self.arch().hidden;
        stream.at.clear();
        for (index, row) in (0..).zip(&step.rows) {
            let positions = (row.start..).zip(&row.tokens);
            stream.at.extend(positions.map(|(position, &token)| At {
                row: index,
                request: row.request,
                position,
                token,
            }));
        }
        stream.positions.clear();
        stream.positions.extend(stream.at.iter().map(|at| at.position));
        stream.digests.clear();
        stream.digests.resize_with(step.rows.len(), || ranks::RowDigest::new(&self.share));
        let at = &stream.at[..];
        let x = stream.x.values(at.len() * hidden);
        if !self.share.is_first_stage() {
            self.take_over(x, &mut stream.digests, source)?;
            let normed = stream.normed.values(at.len() * hidden);
            return Ok(Batch { at, positions: &stream.positions, x, normed, digests: &mut stream.digests });
        }
        let table = self.checkpoint.bytes(&base.embedding);
        let (dtype, multiplier) = (base.embedding.dtype, self.arch().multipliers.embedding);
        let grouped = base.embedding.storage().grouped();
        let size = grouped.map_or(hidden * dtype.bytes(), |kind| kind.row_bytes(hidden));
        self.pool.each_row(x, hidden, 1, &|i, out| {
            let row = &table[at[i].token as usize * size..][..size];
            match grouped {
                None => convert::widen(self.isa, dtype, row, out),
                Some(kind) => dequantise_row(kind, row, out),
            }
            for value in out {
                *value *= multiplier;
            }
        });
        let normed = stream.normed.values(at.len() * hidden);
        Ok(Batch { at, positions: &stream.positions, x, normed, digests: &mut stream.digests })
    }

    fn normalise(&self, batch: &mut Batch<'_>, weights: &NormWeights) {
        let hidden = self.arch().hidden;
        let x = &*batch.x;
        self.pool
            .each_row(batch.normed, hidden, 1, &|i, out| self.norm(&x[i * hidden..][..hidden], weights, out));
    }

    fn norm(&self, x: &[f32], weights: &NormWeights, out: &mut [f32]) {
        let eps = self.arch().norm_eps;
        match &weights.bias {
            None => rms_norm(self.isa, x, &weights.weight, eps, out),
            Some(bias) => layer_norm(self.isa, x, &weights.weight, Some(bias), eps, out),
        }
    }

    /// Adds what a block gives to the residual stream.
    fn add(&self, x: &mut [f32], y: &[f32]) {
        let hidden = self.arch().hidden;
        let multiplier = self.arch().multipliers.residual;
        self.pool.each_row(x, hidden, 1, &|i, x| {
            for (x, y) in x.iter_mut().zip(&y[i * hidden..]) {
                *x += y * multiplier;
            }
        });
    }
}
