//! The forward pass of one batch step: every row through every layer, experts as they come.
//!
//! All rows share each matrix product; the bits of a row depend on that row alone. Attention is per row, over pages.
//! `experts` is the mixture with the protocol of need, provision and release, `router` what it selects; `output` chooses
//! tokens and digests.

mod attention;
mod cache;
mod experts;
mod latent;
mod output;
mod router;
mod tiered;

pub(crate) use experts::ROWS_TOGETHER;

pub use cache::KvCache;

use crate::arch::Activation;
use crate::kernels::{Isa, Product, clamped_swiglu, convert, layer_norm, linear_all, rms_norm, swiglu};
use crate::model::Model;
use crate::weights::{Base, GatedBlock, GatedViews, NormWeights};
use lite_llm_core::ids::{ExpertKey, Slot};
use lite_llm_core::input::RowResult;
use lite_llm_core::output::Forward;
use thiserror::Error;

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
    /// Asks for the experts that a layer's routers have chosen: distinct, ascending.
    ///
    /// # Errors
    /// If the step is given up.
    fn need(&mut self, layer: u32, experts: &[ExpertKey]) -> Result<(), Stopped>;

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
}

/// The running values of a step.
pub(crate) struct Batch {
    pub(crate) at: Vec<At>,
    /// The residual stream: positions x hidden.
    pub(crate) x: Vec<f32>,
    /// The normalised input of a block: positions x hidden.
    pub(crate) normed: Vec<f32>,
    /// What is digested of each row.
    pub(crate) digests: Vec<blake3::Hasher>,
}

impl Model {
    /// Computes a step.
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
        source: &mut dyn ExpertSource,
        mut capture: Option<&mut dyn Capture>,
    ) -> Result<Vec<RowResult>, StepError> {
        let base = self.base.as_ref().expect("base parameters are loaded before the first step");
        let mut batch = self.embed(base, step);
        for (layer, weights) in base.layers.iter().enumerate() {
            self.normalise(&mut batch, &weights.attention_norm);
            self.attend(layer, weights, step, cache, &mut batch);
            self.normalise(&mut batch, &weights.block_norm);
            if let Some(dense) = &weights.dense {
                let y = self.gated(dense, &batch.normed, batch.at.len());
                self.add(&mut batch.x, &y);
            } else {
                self.mixture(layer, weights, step, source, &mut capture, &mut batch)?;
            }
        }
        self.choose(base, step, &mut batch, &mut capture)
    }

    fn embed(&self, base: &Base, step: &Forward) -> Batch {
        let hidden = self.arch().hidden;
        let table = self.checkpoint.bytes(&base.embedding);
        let size = hidden * base.embedding.dtype.bytes();
        let positions = step.rows.iter().map(|row| row.tokens.len()).sum::<usize>();
        let mut batch = Batch {
            at: Vec::with_capacity(positions),
            x: vec![0.0; positions * hidden],
            normed: vec![0.0; positions * hidden],
            digests: vec![blake3::Hasher::new(); step.rows.len()],
        };
        for (index, row) in (0..).zip(&step.rows) {
            for (position, &token) in (row.start..).zip(&row.tokens) {
                let out = &mut batch.x[batch.at.len() * hidden..][..hidden];
                let bytes = &table[token as usize * size..][..size];
                convert::widen(Isa::Scalar, base.embedding.dtype, bytes, out);
                for value in out {
                    *value *= self.arch().multipliers.embedding;
                }
                batch.at.push(At { row: index, request: row.request, position });
            }
        }
        batch
    }

    fn normalise(&self, batch: &mut Batch, weights: &NormWeights) {
        let hidden = self.arch().hidden;
        for (x, out) in batch.x.chunks_exact(hidden).zip(batch.normed.chunks_exact_mut(hidden)) {
            self.norm(x, weights, out);
        }
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
        let multiplier = self.arch().multipliers.residual;
        for (x, y) in x.iter_mut().zip(y) {
            *x += y * multiplier;
        }
    }

    /// `down(silu(gate x) * up x)` of some rows.
    fn gated(&self, block: &GatedBlock, x: &[f32], rows: usize) -> Vec<f32> {
        self.gated_all(&[(block.views(), rows)], Activation::SwiGlu, x)
    }

    /// The same of several blocks of one shape, each with its rows of `x`.
    fn gated_all(&self, blocks: &[(GatedViews<'_>, usize)], activation: Activation, x: &[f32]) -> Vec<f32> {
        let Some((GatedViews { matrices: [gate, _, down], .. }, _)) = blocks.first() else {
            return Vec::new();
        };
        let (inputs, width, outputs) = (gate.inputs(), gate.outputs(), down.outputs());
        let rows: usize = blocks.iter().map(|(_, rows)| rows).sum();
        let [mut gates, mut ups, mut h] = [0, 1, 2].map(|_| vec![0.0; rows * width]);
        let mut products = Vec::with_capacity(2 * blocks.len());
        let (mut x, mut gate_rest, mut up_rest) = (x, &mut gates[..], &mut ups[..]);
        for (block, rows) in blocks {
            let ([gate, up, _], [gate_bias, up_bias, _], rows) = (block.matrices, block.biases(), *rows);
            let mine = x.split_off(..rows * inputs).expect("rows for every block");
            let gates = gate_rest.split_off_mut(..rows * width).expect("rows for every block");
            let ups = up_rest.split_off_mut(..rows * width).expect("rows for every block");
            products.push(Product { x: mine, rows, w: gate, bias: gate_bias, out: gates });
            products.push(Product { x: mine, rows, w: up, bias: up_bias, out: ups });
        }
        linear_all(&self.pool, self.isa, products);
        match activation {
            Activation::SwiGlu => swiglu(self.isa, &gates, &ups, &mut h),
            Activation::Clamped { alpha, limit } => {
                clamped_swiglu(self.isa, &gates, &ups, alpha, limit, &mut h);
            }
        }
        let mut y = vec![0.0; rows * outputs];
        let mut products = Vec::with_capacity(blocks.len());
        let (mut h, mut y_rest) = (&h[..], &mut y[..]);
        for (block, rows) in blocks {
            let ([_, _, w], [_, _, bias], rows) = (block.matrices, block.biases(), *rows);
            let x = h.split_off(..rows * width).expect("rows for every block");
            let out = y_rest.split_off_mut(..rows * outputs).expect("rows for every block");
            products.push(Product { x, rows, w, bias, out });
        }
        linear_all(&self.pool, self.isa, products);
        y
    }
}
