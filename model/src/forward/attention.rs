//! Self-attention: projections over the whole batch, then each row over its pages.

use super::{Batch, KvCache, add};
use crate::arch::QkNorm;
use crate::kernels::{AttentionParams, KvPage, PagedKv, Product, attention, linear_all, rms_norm};
use crate::model::{LayerWeights, Model};
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
        let arch = self.arch();
        let rows = batch.at.len();
        let [mut q, mut k, mut v] = self.project(weights, [0, 1, 2], &batch.normed, rows);
        if let Some(limit) = arch.clip_qkv {
            for value in q.iter_mut().chain(&mut k).chain(&mut v) {
                *value = value.clamp(-limit, limit);
            }
        }
        if let Some((q_weight, k_weight)) = &weights.qk_norm {
            self.norm_heads(&mut q, q_weight);
            self.norm_heads(&mut k, k_weight);
        }
        for (i, at) in batch.at.iter().enumerate() {
            let q = &mut q[i * arch.q_dim()..][..arch.q_dim()];
            let k = &mut k[i * arch.kv_dim()..][..arch.kv_dim()];
            for head in q.chunks_exact_mut(arch.head_dim).chain(k.chunks_exact_mut(arch.head_dim)) {
                self.rope.apply(head, at.position);
            }
        }
        // Rounded to storage before any use, so that every later reader sees what this step sees.
        let mut i = 0;
        for row in &step.rows {
            for (position, _) in (row.start..).zip(&row.tokens) {
                let page = row.pages[position as usize / crate::kernels::PAGE_POSITIONS];
                let (keys, values) =
                    (&k[i * arch.kv_dim()..][..arch.kv_dim()], &v[i * arch.kv_dim()..][..arch.kv_dim()]);
                cache.write(layer, page, position, keys, values);
                i += 1;
            }
        }
        let mut mixed = vec![0.0; rows * arch.q_dim()];
        let params = AttentionParams {
            heads: arch.heads,
            scale: 1.0 / (arch.head_dim as f32).sqrt(),
            window: arch.layers[layer].window,
            sinks: None,
        };
        let mut start = 0;
        for row in &step.rows {
            let pages: Vec<KvPage<'_>> = row.pages.iter().map(|&page| cache.page(layer, page)).collect();
            let kv = PagedKv::new(self.kv, &pages).expect("pages of this shape");
            let positions: Vec<u32> = (row.start..).take(row.tokens.len()).collect();
            let end = start + row.tokens.len() * arch.q_dim();
            attention(&self.pool, self.isa, &q[start..end], &positions, &kv, &params, &mut mixed[start..end]);
            start = end;
        }
        let [y] = self.project(weights, [3], &mixed, rows);
        add(&mut batch.x, &y);
    }

    fn project<const N: usize>(
        &self,
        weights: &LayerWeights,
        which: [usize; N],
        x: &[f32],
        rows: usize,
    ) -> [Vec<f32>; N] {
        let projections =
            which.map(|i| (weights.projections[i].0.view(), weights.projections[i].1.as_deref()));
        let mut outs = projections.map(|(w, _)| vec![0.0; rows * w.outputs()]);
        let products = projections.into_iter().zip(&mut outs);
        let products = products.map(|((w, bias), out)| Product { x, rows, w, bias, out });
        linear_all(&self.pool, self.isa, products.collect());
        outs
    }

    /// The weight is as wide as what is normalised: a head, or the whole projection.
    fn norm_heads(&self, values: &mut [f32], weight: &[f32]) {
        debug_assert_ne!(self.arch().qk_norm, QkNorm::None);
        let mut out = vec![0.0; weight.len()];
        for part in values.chunks_exact_mut(weight.len()) {
            rms_norm(self.isa, part, weight, self.arch().norm_eps, &mut out);
            part.copy_from_slice(&out);
        }
    }
}
