//! Choice of a token from logits. Weights are integers, so that sums and thresholds are exact in any order.

use super::math::exp;
use super::{Isa, versioned};
use std::cmp::Ordering;
use thiserror::Error;

/// Weights that are found together.
const WEIGHTS_TOGETHER: usize = 512;
const TWO_52: f64 = 4_503_599_627_370_496.0;

/// A logit is NaN or infinite: the request has to end with a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
#[error("the logit of token {token} is not finite")]
pub struct NonFinite {
    /// The lowest such token.
    pub token: u32,
}

/// How a token is sampled.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Params {
    /// Divides the logits; 0 or less takes the largest logit.
    pub temperature: f32,
    /// Number of largest logits that stay; 0 for all.
    pub top_k: u32,
    /// Share of the weight, from the largest down, that stays; 1 for all.
    pub top_p: f32,
    /// Least weight, as a share of the largest, that stays; 0 for all.
    pub min_p: f32,
}

impl Default for Params {
    fn default() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, min_p: 0.0 }
    }
}

/// The token with the largest logit, the lowest among equals.
///
/// # Panics
/// If there is no logit.
pub fn argmax(logits: &[f32]) -> Result<u32, NonFinite> {
    assert!(!logits.is_empty(), "no logits");
    check(logits)?;
    let mut best = 0;
    for (token, logit) in logits.iter().enumerate() {
        if *logit > logits[best] {
            best = token;
        }
    }
    Ok(best as u32)
}

/// The token that `draw`, uniform over all `u64`, chooses.
///
/// Weights are `round(exp((l - max) / temperature) * 2^32)`. Candidates stand by descending logit, then ascending id;
/// top-k, top-p and min-p keep a run from the front, in this order, and always the first.
///
/// # Panics
/// If there is no logit.
pub fn sample(isa: Isa, logits: &[f32], params: &Params, draw: u64) -> Result<u32, NonFinite> {
    let best = argmax(logits)?;
    if params.is_greedy() {
        return Ok(best);
    }
    let max = logits[best as usize];
    let mut candidates: Vec<Candidate> = Vec::new();
    let mut block = [0; WEIGHTS_TOGETHER];
    for (at, logits) in logits.chunks(WEIGHTS_TOGETHER).enumerate() {
        let weights = &mut block[..logits.len()];
        weigh(isa, logits, max, params.temperature, weights);
        let first = (at * WEIGHTS_TOGETHER) as u32;
        for ((token, logit), &mut weight) in (first..).zip(logits).zip(weights) {
            if weight > 0 {
                // The two zeros are equal logits.
                candidates.push(Candidate { logit: logit + 0.0, token, weight });
            }
        }
    }
    let top_k = params.top_k as usize;
    if top_k > 0 && top_k < candidates.len() {
        candidates.select_nth_unstable_by(top_k - 1, Candidate::order);
        candidates.truncate(top_k);
    }
    if let Some(share) = params.top_p_share() {
        keep_top_p(&mut candidates, share);
    }
    if let Some(share) = params.min_p_share() {
        keep_min_p(&mut candidates, share);
    }
    Ok(choose(&mut candidates, draw))
}

/// A token that may be chosen.
#[derive(Clone, Copy)]
struct Candidate {
    logit: f32,
    token: u32,
    weight: u64,
}

impl Candidate {
    /// By descending logit, then ascending id: no two are equal.
    fn order(&self, other: &Self) -> Ordering {
        other.logit.total_cmp(&self.logit).then(self.token.cmp(&other.token))
    }
}

fn sum(candidates: &[Candidate]) -> u128 {
    candidates.iter().map(|candidate| u128::from(candidate.weight)).sum()
}

/// The length of the shortest run, in order, whose weight reaches something; all if none does. It is brought to the front,
/// its last candidate to its end, and the rest stays in any order: a vocabulary is not sorted for one token.
fn shortest_run(candidates: &mut [Candidate], reaches: impl Fn(u128) -> bool) -> usize {
    let (mut start, mut end, mut before) = (0, candidates.len(), 0u128);
    while end - start > 1 {
        let half = (end - start) / 2;
        candidates[start..end].select_nth_unstable_by(half, Candidate::order);
        let with_half = before + sum(&candidates[start..start + half]);
        if reaches(with_half) {
            end = start + half;
        } else {
            (start, before) = (start + half, with_half);
        }
    }
    end
}

/// Divides the positive and multiplies the negative logits of the tokens in `history` by `penalty`, each token once.
///
/// # Panics
/// If a token has no logit.
pub fn penalise(logits: &mut [f32], history: &[u32], penalty: f32) {
    let mut tokens = history.to_vec();
    tokens.sort_unstable();
    tokens.dedup();
    for token in tokens {
        let logit = &mut logits[token as usize];
        *logit = if *logit < 0.0 { *logit * penalty } else { *logit / penalty };
    }
}

fn check(logits: &[f32]) -> Result<(), NonFinite> {
    match logits.iter().position(|logit| !logit.is_finite()) {
        Some(token) => Err(NonFinite { token: token as u32 }),
        None => Ok(()),
    }
}

versioned! {
    /// `round(exp((l - max) / temperature) * 2^32)`, ties to even, for logits of at most `max`.
    fn weigh(logits: &[f32], max: f32, temperature: f32, out: &mut [u64]) = weigh_body
}

#[inline(always)]
fn weigh_body(logits: &[f32], max: f32, temperature: f32, out: &mut [u64]) {
    for (logit, out) in logits.iter().zip(out) {
        let x = (logit - max) / temperature;
        // The product is exact. Beside 2^52 there is room for whole numbers only, and these are the low bits.
        let rounded = f64::from(exp(x)) * 4_294_967_296.0 + TWO_52;
        let weight = rounded.to_bits() - TWO_52.to_bits();
        // e^-23 * 2^32 is 0.44.
        *out = if x < -23.0 { 0 } else { weight };
    }
}

impl Params {
    /// Whether the largest logit is taken, without a draw.
    pub fn is_greedy(&self) -> bool {
        self.temperature <= 0.0 || self.temperature.is_nan()
    }

    /// The share that top-p keeps, in multiples of 2^-32; none if it keeps all.
    pub fn top_p_share(&self) -> Option<u64> {
        (!(self.top_p >= 1.0 || self.top_p.is_nan())).then(|| share(self.top_p))
    }

    /// The share of the largest weight that min-p asks for, in multiples of 2^-32; none if it keeps all.
    pub fn min_p_share(&self) -> Option<u64> {
        (self.min_p > 0.0 || self.min_p.is_nan()).then(|| share(self.min_p.min(1.0)))
    }
}

/// A share as a multiple of 2^-32, rounded to nearest even.
fn share(value: f32) -> u64 {
    (f64::from(value) * 4_294_967_296.0).round_ties_even() as u64
}

/// Keeps the shortest run whose weight reaches the share of the whole.
fn keep_top_p(candidates: &mut Vec<Candidate>, share: u64) {
    let threshold = sum(candidates) * u128::from(share);
    let kept = shortest_run(candidates, |sum| sum << 32 >= threshold);
    candidates.truncate(kept);
}

/// Keeps the run before the first weight that does not reach the share of the largest.
fn keep_min_p(candidates: &mut Vec<Candidate>, share: u64) {
    let first = candidates.iter().copied().min_by(Candidate::order).expect("the largest logit is one");
    let threshold = u128::from(first.weight) * u128::from(share);
    let reaches = |candidate: &&Candidate| u128::from(candidate.weight) << 32 >= threshold;
    let below = candidates.iter().filter(|candidate| !reaches(candidate)).copied().min_by(Candidate::order);
    if let Some(below) = below {
        let first = (first.logit.to_bits(), first.token);
        candidates.retain(|candidate| {
            (candidate.logit.to_bits(), candidate.token) == first || candidate.order(&below).is_lt()
        });
    }
}

fn choose(candidates: &mut [Candidate], draw: u64) -> u32 {
    let target = (u128::from(draw) * sum(candidates)) >> 64;
    let run = shortest_run(candidates, |sum| sum > target);
    candidates[run - 1].token
}
