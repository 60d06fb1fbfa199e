//! Multi-head latent attention: what is cached of a position is one latent and one rotated key, shared by all heads.
//!
//! A head's key is a product with the latent, so its score is a dot product of the latent with the query taken through
//! that product's transpose; and its mix of values is a product with the mix of latents. Keys and values are never made,
//! neither for a prefill nor for decode: the bits of a position may not depend on which of the two computed it.

use super::{Batch, KvCache};
use crate::arch::Latent;
use crate::kernels::{Product, linear_all, rms_norm};
use crate::model::Model;
use crate::weights::{LatentWeights, LayerWeights, Matrix};
use lite_llm_core::output::Forward;

/// Epsilon of the norms within: a constant of these models, whatever their configuration says of the others.
const NORM_EPS: f32 = 1e-6;

impl Model {
    /// The mixed values of every position: positions x heads x value dimension.
    pub(super) fn attend_latents(
        &self,
        layer: usize,
        weights: &LayerWeights,
        (weights_of, latent): (&LatentWeights, Latent),
        step: &Forward,
        cache: &mut KvCache,
        batch: &Batch,
    ) -> Vec<f32> {
        let attention = &self.arch().attention;
        let (rows, heads) = (batch.at.len(), attention.heads);
        let (plain, rotated, values) = (latent.plain, attention.head_dim - latent.plain, attention.value_dim);
        let [mut first, mut cached] =
            self.project([&weights_of.query, &weights_of.latent], &batch.normed, rows);
        let queries = match &weights_of.query_norm {
            None => first,
            Some((norm, second)) => {
                self.norm_parts(&mut first, norm, NORM_EPS);
                let [queries] = self.project([second], &first, rows);
                queries
            }
        };
        // By head, as each has matrices of its own: the plain part through the transposed keys, then the rotated part.
        let width = latent.rank + rotated;
        let mut apart = vec![0.0; heads * rows * plain];
        for (i, query) in queries.chunks_exact(attention.head_dim).enumerate() {
            let (row, head) = (i / heads, i % heads);
            apart[(head * rows + row) * plain..][..plain].copy_from_slice(&query[..plain]);
        }
        let through = self.by_head(weights_of, &apart, rows, [plain, latent.rank], |(query, _)| query);
        let mut q = vec![0.0; rows * heads * width];
        for (i, q) in q.chunks_exact_mut(width).enumerate() {
            let (row, head) = (i / heads, i % heads);
            let (of_latent, of_rotated) = q.split_at_mut(latent.rank);
            of_latent.copy_from_slice(&through[(head * rows + row) * latent.rank..][..latent.rank]);
            of_rotated.copy_from_slice(&queries[i * attention.head_dim + plain..][..rotated]);
            self.rotate(of_rotated, batch.at[row].position);
        }
        let mut normed = vec![0.0; latent.rank];
        for (i, key) in cached.chunks_exact_mut(width).enumerate() {
            let (of_latent, of_rotated) = key.split_at_mut(latent.rank);
            rms_norm(self.isa, of_latent, &weights_of.latent_norm, NORM_EPS, &mut normed);
            of_latent.copy_from_slice(&normed);
            self.rotate(of_rotated, batch.at[i].position);
        }
        let mixed = self.attend_over_pages(layer, weights, step, cache, (&q, &cached, &[]));
        let mut apart = vec![0.0; heads * rows * latent.rank];
        for (i, mix) in mixed.chunks_exact(latent.rank).enumerate() {
            let (row, head) = (i / heads, i % heads);
            apart[(head * rows + row) * latent.rank..][..latent.rank].copy_from_slice(mix);
        }
        let of_heads = self.by_head(weights_of, &apart, rows, [latent.rank, values], |(_, value)| value);
        let mut out = vec![0.0; rows * heads * values];
        for (i, out) in out.chunks_exact_mut(values).enumerate() {
            let (row, head) = (i / heads, i % heads);
            out.copy_from_slice(&of_heads[(head * rows + row) * values..][..values]);
        }
        out
    }

    /// A product with a matrix of each head: heads x rows x inputs into heads x rows x outputs.
    fn by_head(
        &self,
        weights: &LatentWeights,
        x: &[f32],
        rows: usize,
        [inputs, outputs]: [usize; 2],
        matrix: impl Fn(&(Matrix, Matrix)) -> &Matrix,
    ) -> Vec<f32> {
        let mut out = vec![0.0; weights.heads.len() * rows * outputs];
        let of_heads = x.chunks_exact(rows * inputs).zip(out.chunks_exact_mut(rows * outputs));
        let products = weights.heads.iter().zip(of_heads).map(|(head, (x, out))| {
            let w = matrix(head).view();
            Product { x, rows, w, bias: None, out }
        });
        linear_all(&self.pool, self.isa, products.collect());
        out
    }
}
