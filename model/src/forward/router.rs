//! The router of a layer: which experts each position selects, and with what weights.

use super::{Batch, Layer, StepError};
use crate::arch::{Moe, Score};
use crate::kernels::math::{sigmoid_in_place, softmax_in_place};
use crate::kernels::{Buffer, Isa, Product, Products};
use crate::model::Model;
use lite_llm_core::routing::{Ties, select, top_k};

/// Keeps the sum of sigmoids from being 0 where all of them underflow.
const SIGMOID_SUM: f32 = 1e-20;

/// What selecting costs for each output of a router, in values that are merely touched.
const SELECTION_COST: usize = 16;

/// The experts of one position by original number, ascending, and their weights.
#[derive(Debug, Default)]
pub(crate) struct Route {
    pub(crate) experts: Vec<u32>,
    pub(crate) weights: Vec<f32>,
}

impl Route {
    /// Those experts, each with its weight, in ascending order.
    fn of(mut experts: Vec<u32>, weight: impl Fn(u32) -> f32) -> Self {
        experts.sort_unstable();
        let weights = experts.iter().map(|&expert| weight(expert)).collect();
        Self { experts, weights }
    }

    /// Divides the weights by their sum, which is added in ascending order of expert, `more` last.
    pub(super) fn normalise(&mut self, more: f32) {
        let sum = self.weights.iter().fold(0.0, |sum: f32, weight| sum + weight) + more;
        for weight in &mut self.weights {
            *weight /= sum;
        }
    }
}

/// What a position is routed in.
#[derive(Debug, Default)]
pub(super) struct Routed {
    pub(super) route: Route,
    /// The outputs of the router, then what is made of them.
    scores: Vec<f32>,
    finite: bool,
}

/// What routers work in.
#[derive(Debug, Default)]
pub(super) struct Room {
    pub(super) routed: Vec<Routed>,
    logits: Buffer,
    eligible: Vec<bool>,
}

impl Room {
    pub(super) fn bytes(&self) -> usize {
        let of_one = |one: &Routed| 4 * (one.scores.capacity() + 2 * one.route.experts.capacity());
        self.routed.iter().map(|one| size_of::<Routed>() + of_one(one)).sum::<usize>() + self.logits.bytes()
    }
}

impl Model {
    /// Chooses the experts of every position.
    pub(super) fn route<'a>(
        &self,
        layer: Layer<'_>,
        moe: &Moe,
        batch: &Batch<'_>,
        room: &'a mut Room,
        products: &mut Products,
    ) -> Result<&'a [Routed], StepError> {
        let Layer { index, step, .. } = layer;
        let router = self.routers[index].as_ref().expect("routers are loaded before the first step");
        let (rows, width) = (batch.at.len(), moe.router_rows());
        let logits = room.logits.values(rows * width);
        let product = Product::new(batch.normed, router.matrix.view(), router.bias.as_deref(), &mut *logits);
        products.compute(&self.pool, self.isa, [product]);
        // Experts of tiers outside the TierSet are masked out: they have no share of a softmax and are never selected.
        room.eligible.clear();
        room.eligible.extend(self.checkpoint.eligible(index as u32, &step.tiers));
        if room.routed.len() < rows {
            room.routed.resize_with(rows, Routed::default);
        }
        let (logits, eligible) = (&*logits, &room.eligible[..]);
        self.pool.each_row(&mut room.routed[..rows], 1, SELECTION_COST * width, &|i, routed| {
            let Routed { route, scores, finite } = &mut routed[0];
            scores.clear();
            scores.extend_from_slice(&logits[i * width..][..width]);
            *finite = scores.iter().all(|score| score.is_finite());
            if !*finite {
                return;
            }
            let ties = Ties { seed: self.routing_seed, layer: index as u32, position: batch.positions[i] };
            *route = if let Some(router) = &moe.tiered {
                super::tiered::route(self.isa, router, ties, &step.tiers, moe.normalise, scores)
            } else {
                route_one(self.isa, moe, ties, eligible, router.correction.as_deref(), scores)
            };
            for weight in &mut route.weights {
                *weight *= moe.scaling;
            }
        });
        let routed = &room.routed[..rows];
        match batch.at.iter().zip(routed).find(|(_, routed)| !routed.finite) {
            None => Ok(routed),
            Some((at, _)) => {
                Err(StepError::NonFinite { row: at.row, layer: index as u32, position: at.position })
            }
        }
    }
}

/// Routes one position by the outputs of its layer's router.
pub(crate) fn route_one(
    isa: Isa,
    moe: &Moe,
    ties: Ties,
    eligible: &[bool],
    correction: Option<&[f32]>,
    logits: &mut [f32],
) -> Route {
    let may = |expert: u32| eligible[expert as usize];
    let choose = |scores: &[f32]| select(ties, scores, may, moe.group_limit, moe.top_k);
    let mut more = 0.0;
    let mut route = match moe.score {
        Score::Softmax => {
            mask(logits, eligible);
            softmax_in_place(isa, logits);
            Route::of(choose(logits), |expert| logits[expert as usize])
        }
        Score::SoftmaxOfSelected => {
            let mut route = Route::of(choose(logits), |expert| logits[expert as usize]);
            softmax_in_place(isa, &mut route.weights);
            route
        }
        Score::Sigmoid => {
            sigmoid_in_place(isa, logits);
            more = SIGMOID_SUM;
            let correction = correction.expect("a router of sigmoids has a correction");
            let corrected: Vec<f32> =
                logits.iter().zip(correction).map(|(score, more)| score + more).collect();
            Route::of(choose(&corrected), |expert| logits[expert as usize])
        }
        Score::Sparsemixer { jitter } => sparsemixer(isa, ties, eligible, jitter, logits),
    };
    if moe.normalise {
        route.normalise(more);
    }
    route
}

/// The best expert, weighed by a softmax over those whose relative distance from it is at most twice the jitter; then
/// the best of the others, in the same way without the first.
fn sparsemixer(isa: Isa, ties: Ties, eligible: &[bool], jitter: f32, logits: &[f32]) -> Route {
    let mut chosen: Vec<(u32, f32)> = Vec::new();
    while chosen.len() < 2 {
        let open =
            |expert: u32| eligible[expert as usize] && chosen.iter().all(|&(other, _)| other != expert);
        let candidates = (0u32..).zip(logits).filter(|&(expert, _)| open(expert));
        let Some(&best) = top_k(ties, candidates.clone().map(|(id, &logit)| (logit, id)), 1).first() else {
            break;
        };
        let max = logits[best as usize];
        let far = |logit: f32| {
            let magnitude = logit.abs();
            (max - logit) / if magnitude < max { max } else { magnitude } > 2.0 * jitter
        };
        let near: Vec<u32> =
            candidates.filter(|&(_, &logit)| !far(logit)).map(|(expert, _)| expert).collect();
        let mut shares: Vec<f32> = near.iter().map(|&expert| logits[expert as usize]).collect();
        softmax_in_place(isa, &mut shares);
        let at = near.binary_search(&best).expect("the best is near itself");
        chosen.push((best, shares[at]));
    }
    let experts = chosen.iter().map(|&(expert, _)| expert).collect();
    Route::of(experts, |expert| chosen.iter().find(|&&(of, _)| of == expert).map_or(0.0, |&(_, share)| share))
}

fn mask(logits: &mut [f32], eligible: &[bool]) {
    for (logit, eligible) in logits.iter_mut().zip(eligible) {
        if !eligible {
            *logit = f32::NEG_INFINITY;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::Activation;
    use proptest::prelude::*;

    const TIES: Ties = Ties { seed: 1, layer: 2, position: 3 };

    fn moe(score: Score, normalise: bool) -> Moe {
        Moe {
            experts: 8,
            top_k: 2,
            intermediate: 1,
            score,
            normalise,
            scaling: 1.0,
            group_limit: None,
            tiered: None,
            router_bias: false,
            activation: Activation::SwiGlu,
            expert_bias: false,
            shared: None,
            routers: &[],
            forms: &[],
        }
    }

    proptest! {
        #[test]
        fn masked_experts_have_no_part(
            logits in prop::collection::vec(prop_oneof![Just(0.0f32), Just(1.5), -20.0f32..20.0], 8),
            others in prop::collection::vec(-20.0f32..20.0, 8),
            correction in prop::collection::vec(-1.0f32..1.0, 8),
            mask in 1u8..=255,
            kind in 0usize..4,
            normalise: bool,
        ) {
            let scores = [
                Score::Softmax,
                Score::SoftmaxOfSelected,
                Score::Sigmoid,
                Score::Sparsemixer { jitter: 0.1 },
            ];
            let moe = moe(scores[kind], normalise);
            let eligible: Vec<bool> = (0..8).map(|expert| mask >> expert & 1 == 1).collect();
            let of = |logits: &[f32]| route_one(Isa::detect(), &moe, TIES, &eligible, Some(&correction), &mut logits.to_vec());
            let found = of(&logits);
            let count = usize::try_from(mask.count_ones()).unwrap();
            prop_assert_eq!(found.experts.len(), count.min(2));
            prop_assert!(found.experts.is_sorted() && found.experts.iter().all(|&id| eligible[id as usize]));
            prop_assert!(found.weights.iter().all(|weight| (0.0..=1.0001).contains(weight)));
            // Whatever the others score.
            let mixed: Vec<f32> = (0..8).map(|i| if eligible[i] { logits[i] } else { others[i] }).collect();
            let again = of(&mixed);
            prop_assert_eq!(found.experts, again.experts);
            prop_assert_eq!(found.weights, again.weights);
        }
    }

    /// Far experts have no share: alone in reach, the best weighs 1.
    #[test]
    fn the_sparse_mixer_weighs_by_what_is_near() {
        let mut eligible = vec![true; 4];
        let route = sparsemixer(Isa::Scalar, TIES, &eligible, 0.1, &[1.0, 4.0, 3.9, -2.0]);
        assert_eq!(route.experts, [1, 2]);
        let near = 1.0 / (1.0 + f64::exp(-0.1));
        assert!((f64::from(route.weights[0]) - near).abs() < 1e-6, "{:?}", route.weights);
        assert_eq!(route.weights[1].to_bits(), 1.0f32.to_bits());
        eligible[1] = false;
        let route = sparsemixer(Isa::Scalar, TIES, &eligible, 0.1, &[1.0, 4.0, 3.9, -2.0]);
        assert_eq!(route.experts, [0, 2]);
    }
}
