//! A mixture layer: route every position, compute each chosen expert once for all positions that chose it, combine.
//!
//! Experts are computed in the order in which they come; their results wait in a buffer and are combined in ascending
//! order of the experts' original numbers, so that the order of arrival never changes a bit.

use super::router::Route;
use super::{Batch, Capture, ExpertSource, StepError};
use crate::arch::Moe;
use crate::kernels::math::sigmoid;
use crate::kernels::{axpy, linear};
use crate::model::Model;
use crate::weights::LayerWeights;
use lite_llm_core::ids::{ExpertKey, Slot};
use lite_llm_core::output::Forward;
use std::collections::BTreeMap;

/// For each expert, the (position, place in its route) pairs that chose it.
type Users = BTreeMap<ExpertKey, Vec<(usize, usize)>>;

/// The most rows of experts that are computed together. A larger expert is computed by itself.
pub(crate) const ROWS_TOGETHER: usize = 64;

/// Neighbours that have no more than [`ROWS_TOGETHER`] users: the fewer products wait for each other, the less do threads.
fn together<'a>(experts: &'a [(ExpertKey, Slot)], users: &Users) -> Vec<&'a [(ExpertKey, Slot)]> {
    let mut rows = 0;
    let chunks = experts.chunk_by(|(key, _), (next, _)| {
        rows += users[key].len();
        let fits = rows + users[next].len() <= ROWS_TOGETHER;
        if !fits {
            rows = 0;
        }
        fits
    });
    chunks.collect()
}

impl Model {
    pub(super) fn mixture(
        &self,
        layer: usize,
        weights: &LayerWeights,
        step: &Forward,
        source: &mut dyn ExpertSource,
        capture: &mut Option<&mut dyn Capture>,
        batch: &mut Batch,
    ) -> Result<(), StepError> {
        let moe = self.arch().moe.as_ref().expect("a mixture layer");
        let hidden = self.arch().hidden;
        let routes = self.route(layer, moe, step, batch)?;
        let mut users = Users::new();
        for (i, route) in routes.iter().enumerate() {
            let at = batch.at[i];
            let digest = &mut batch.digests[at.row as usize];
            for (place, (&expert, weight)) in route.experts.iter().zip(&route.weights).enumerate() {
                digest.update(&expert.to_le_bytes()).update(&weight.to_bits().to_le_bytes());
                let key = self.checkpoint.key(layer as u32, expert);
                users.entry(key).or_default().push((i, place));
            }
            if let Some(capture) = capture {
                capture.routes(at.request, layer as u32, at.position, &route.experts, &route.weights);
            }
        }
        let mut results = vec![0.0; batch.at.len() * moe.top_k * hidden];
        let mut compute = |source: &dyn ExpertSource, experts: &[(ExpertKey, Slot)]| {
            self.experts(source, experts, &users, moe.top_k, batch, &mut results);
        };
        if let Some(resident) = &step.resident {
            let slot = |key: &ExpertKey| {
                let at = resident.binary_search_by_key(key, |&(key, _)| key);
                resident[at.expect("every expert of the tiers is resident")].1
            };
            let experts: Vec<(ExpertKey, Slot)> = users.keys().map(|key| (*key, slot(key))).collect();
            for together in together(&experts, &users) {
                compute(source, together);
            }
        } else {
            let experts: Vec<ExpertKey> = users.keys().copied().collect();
            source.need(layer as u32, &experts)?;
            let mut left = experts.len();
            while left > 0 {
                let mut got = 0;
                loop {
                    let provided = source.provided()?;
                    compute(source, &[(provided.expert, provided.slot)]);
                    got += 1;
                    left -= 1;
                    if got == provided.wave_len {
                        source.released(layer as u32, provided.wave)?;
                        break;
                    }
                }
            }
        }
        self.combine(moe, weights, &routes, &results, batch);
        Ok(())
    }

    /// Computes some experts, each for all its users, and puts each result in its place.
    fn experts(
        &self,
        source: &dyn ExpertSource,
        experts: &[(ExpertKey, Slot)],
        users: &Users,
        top_k: usize,
        batch: &Batch,
        results: &mut [f32],
    ) {
        let hidden = self.arch().hidden;
        let layout = self.expert.as_ref().expect("a mixture has experts");
        let positions = || experts.iter().flat_map(|(key, _)| &users[key]);
        let rows = positions().count();
        let mut x = Vec::with_capacity(rows * hidden);
        for &(position, _) in positions() {
            x.extend_from_slice(&batch.normed[position * hidden..][..hidden]);
        }
        let blocks = experts.iter().map(|(key, slot)| (layout.views(source.slot(*slot)), users[key].len()));
        let activation = self.arch().moe.as_ref().expect("a mixture").activation;
        let y = self.gated_all(&blocks.collect::<Vec<_>>(), activation, &x);
        for (&(position, place), y) in positions().zip(y.chunks_exact(hidden)) {
            results[(position * top_k + place) * hidden..][..hidden].copy_from_slice(y);
        }
    }

    /// Adds the weighted results in ascending order of expert, then the shared expert, to the residual stream.
    fn combine(
        &self,
        moe: &Moe,
        weights: &LayerWeights,
        routes: &[Route],
        results: &[f32],
        batch: &mut Batch,
    ) {
        let hidden = self.arch().hidden;
        let rows = batch.at.len();
        let shared = weights.shared.as_ref().map(|(block, gate)| {
            let y = self.gated(block, &batch.normed, rows);
            let mut gates = vec![1.0; rows];
            if let Some(gate) = gate {
                linear(&self.pool, self.isa, &batch.normed, rows, &gate.view(), None, &mut gates);
                for gate in &mut gates {
                    *gate = sigmoid(*gate);
                }
            }
            (y, gates)
        });
        let mut sum = vec![0.0; hidden];
        for (i, route) in routes.iter().enumerate() {
            sum.fill(0.0);
            for (place, weight) in route.weights.iter().enumerate() {
                let y = &results[(i * moe.top_k + place) * hidden..][..hidden];
                axpy(self.isa, *weight, y, &mut sum);
            }
            if let Some((y, gates)) = &shared {
                axpy(self.isa, gates[i], &y[i * hidden..][..hidden], &mut sum);
            }
            self.add(&mut batch.x[i * hidden..][..hidden], &sum);
        }
    }
}
