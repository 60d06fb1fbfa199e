//! Self-attention: projections over the whole batch, then each row over its pages.

use super::{Batch, KvCache};
use crate::arch::Pairs;
use crate::kernels::{AttentionParams, KvPage, PagedKv, Product, attention, linear_all, rms_norm};
use crate::model::Model;
use crate::weights::{Inputs, LayerWeights, Projection};
use lite_llm_core::output::Forward;

impl Model {
    pub(super) fn attend(
        &self,
        layer: usize,
        weights: &LayerWeights,
        step: &Forward,
        cache: &mut KvCache,
        batch: &mut Batch,
    ) {
        let attention = &self.arch().attention;
        let mixed = match (&weights.inputs, attention.latent) {
            (Inputs::Latent(of_latent), Some(latent)) => {
                self.attend_latents(layer, weights, (of_latent, latent), step, cache, batch)
            }
            (Inputs::Plain { projections, qk_norm }, _) => {
                let norms = qk_norm.as_ref().map(|(q, k)| [&q[..], &k[..]]);
                let [q, k, v] = self.keys_and_values(projections, norms, batch);
                self.attend_over_pages(layer, weights, step, cache, (&q, &k, &v))
            }
            (Inputs::Latent(_), None) => unreachable!("latent weights are loaded for latent attention only"),
        };
        let [y] = self.project([&weights.output], &mixed, batch.at.len());
        self.add(&mut batch.x, &y);
    }

    /// Queries, keys and values of every position, rotated.
    fn keys_and_values(
        &self,
        [q, k, v]: &[Projection; 3],
        norms: Option<[&[f32]; 2]>,
        batch: &Batch,
    ) -> [Vec<f32>; 3] {
        let arch = self.arch();
        let attention = &arch.attention;
        let [mut q, mut k, mut v] = self.project([q, k, v], &batch.normed, batch.at.len());
        if let Some(limit) = attention.clip_qkv {
            for value in q.iter_mut().chain(&mut k).chain(&mut v) {
                *value = value.clamp(-limit, limit);
            }
        }
        if let Some([of_q, of_k]) = norms {
            self.norm_parts(&mut q, of_q, arch.norm_eps);
            self.norm_parts(&mut k, of_k, arch.norm_eps);
        }
        for (i, at) in batch.at.iter().enumerate() {
            let q = &mut q[i * attention.q_dim()..][..attention.q_dim()];
            let k = &mut k[i * attention.k_dim()..][..attention.k_dim()];
            let heads = q.chunks_exact_mut(attention.head_dim).chain(k.chunks_exact_mut(attention.head_dim));
            heads.for_each(|head| self.rotate(head, at.position));
        }
        [q, k, v]
    }

    /// Writes keys and values of every position into the cache, and mixes the values that each position sees.
    pub(super) fn attend_over_pages(
        &self,
        layer: usize,
        weights: &LayerWeights,
        step: &Forward,
        cache: &mut KvCache,
        (q, k, v): (&[f32], &[f32], &[f32]),
    ) -> Vec<f32> {
        let heads = self.arch().attention.heads;
        let (of_query, of_output) = (heads * self.kv.key_dim, heads * self.kv.value_dim);
        let of_key = self.kv.kv_heads * self.kv.key_dim;
        let of_value = if self.kv.values_in_keys { 0 } else { self.kv.kv_heads * self.kv.value_dim };
        // Rounded to storage before any use, so that every later reader sees what this step sees.
        let mut i = 0;
        for row in &step.rows {
            for (position, _) in (row.start..).zip(&row.tokens) {
                let page = row.pages[position as usize / crate::kernels::PAGE_POSITIONS];
                let (keys, values) = (&k[i * of_key..][..of_key], &v[i * of_value..][..of_value]);
                cache.write(layer, page, position, keys, values);
                i += 1;
            }
        }
        let mut mixed = vec![0.0; i * of_output];
        let params = AttentionParams {
            heads,
            scale: self.arch().attention.scale,
            window: self.arch().layers[layer].window,
            sinks: weights.sinks.as_deref(),
        };
        let (mut q, mut rest) = (q, &mut mixed[..]);
        for row in &step.rows {
            let pages: Vec<KvPage<'_>> = row.pages.iter().map(|&page| cache.page(layer, page)).collect();
            let kv = PagedKv::new(self.kv, &pages).expect("pages of this shape");
            let positions: Vec<u32> = (row.start..).take(row.tokens.len()).collect();
            let q = q.split_off(..row.tokens.len() * of_query).expect("queries of every row");
            let out = rest.split_off_mut(..row.tokens.len() * of_output).expect("room for every row");
            attention(&self.pool, self.isa, q, &positions, &kv, &params, out);
        }
        mixed
    }

    pub(super) fn project<const N: usize>(
        &self,
        projections: [&Projection; N],
        x: &[f32],
        rows: usize,
    ) -> [Vec<f32>; N] {
        let projections =
            projections.map(|projection| (projection.matrix.view(), projection.bias.as_deref()));
        let mut outs = projections.map(|(w, _)| vec![0.0; rows * w.outputs()]);
        let products = projections.into_iter().zip(&mut outs);
        let products = products.map(|((w, bias), out)| Product { x, rows, w, bias, out });
        linear_all(&self.pool, self.isa, products.collect());
        outs
    }

    pub(super) fn rotate(&self, head: &mut [f32], position: u32) {
        match self.arch().rope.pairs {
            Pairs::Halves => self.rope.apply(head, position),
            Pairs::Neighbours => self.rope.apply_to_neighbours(head, position),
        }
    }

    /// Normalises parts as wide as the weight: a head, or a whole projection.
    pub(super) fn norm_parts(&self, values: &mut [f32], weight: &[f32], eps: f32) {
        let mut out = vec![0.0; weight.len()];
        for part in values.chunks_exact_mut(weight.len()) {
            rms_norm(self.isa, part, weight, eps, &mut out);
            part.copy_from_slice(&out);
        }
    }
}
