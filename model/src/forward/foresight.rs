//! What the next mixture layer will probably choose: its router, on what this layer's router sees.
//!
//! The residual stream changes little from one layer to the next, so that most of the choice is known a layer ahead, while
//! the disk has nothing to do. It is a guess: nothing that is computed depends on it.

use super::router;
use super::{Batch, Layer};
use crate::arch::Moe;
use crate::kernels::Products;
use crate::model::Model;
use lite_llm_core::ids::ExpertKey;

/// What guessing works in.
#[derive(Debug, Default)]
pub(super) struct Room {
    router: router::Room,
    /// How much each expert weighs in the routes of all positions, by original number.
    weights: Vec<f32>,
    /// Those that weigh anything, the heaviest first.
    experts: Vec<u32>,
    keys: Vec<ExpertKey>,
}

impl Room {
    pub(super) fn bytes(&self) -> usize {
        let Self { router, weights, experts, keys } = self;
        let lists = 4 * (weights.capacity() + experts.capacity());
        router.bytes() + lists + keys.capacity() * size_of::<ExpertKey>()
    }
}

impl Model {
    /// The experts that the next mixture layer of this rank will probably choose, the likeliest first; none unless the step is to
    /// foresee, or if there is no such layer.
    pub(super) fn foresee<'a>(
        &self,
        layer: Layer<'_>,
        moe: &Moe,
        batch: &Batch<'_>,
        room: &'a mut Room,
        products: &mut Products,
    ) -> &'a [ExpertKey] {
        let Room { router, weights, experts, keys } = room;
        keys.clear();
        let after = self.share.layers(self.arch()).skip_while(|&other| other <= layer.index);
        let next = after.into_iter().find(|&next| self.routers[next].is_some());
        let Some(index) = next.filter(|_| layer.step.foresee) else { return keys };
        // What is not finite is found by the layer that computes it.
        let Ok(routed) = self.route(Layer { index, ..layer }, moe, batch, router, products) else {
            return keys;
        };
        weights.clear();
        weights.resize(moe.experts, 0.0);
        for routed in routed {
            for (&expert, weight) in routed.route.experts.iter().zip(&routed.route.weights) {
                weights[expert as usize] += weight.abs();
            }
        }
        experts.clear();
        experts
            .extend((0u32..).zip(&*weights).filter(|(_, weight)| **weight > 0.0).map(|(expert, _)| expert));
        experts.sort_by(|&one, &other| weights[other as usize].total_cmp(&weights[one as usize]));
        keys.extend(experts.iter().map(|&expert| self.checkpoint.key(index as u32, expert)));
        keys
    }
}
