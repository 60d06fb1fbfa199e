//! Choice of a token from logits. Weights are integers, so that sums and thresholds are exact in any order.

use super::math::exp;
use super::{Isa, versioned};
use std::cmp::Ordering;
use thiserror::Error;

/// Weights that are found together.
const TOGETHER: usize = 512;
/// Logits that are searched for the largest side by side.
const LANES: usize = 32;
/// A logit so many temperatures below the largest has no weight: e^-23 * 2^32 is 0.44.
const FARTHEST: f32 = 23.0;
/// Buckets of candidates.
const BUCKETS: usize = 2048;
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
    extremes(logits).map(|extremes| extremes.argmax)
}

/// What choosing a token begins with.
struct Extremes {
    argmax: u32,
    max: f32,
    min: f32,
}

fn extremes(logits: &[f32]) -> Result<Extremes, NonFinite> {
    let (mut largest, mut least) = ([f32::NEG_INFINITY; LANES], [f32::INFINITY; LANES]);
    let mut finite = true;
    for logits in logits.chunks(LANES) {
        for ((largest, least), &logit) in largest.iter_mut().zip(&mut least).zip(logits) {
            *largest = if logit > *largest { logit } else { *largest };
            *least = if logit < *least { logit } else { *least };
            finite &= logit.is_finite();
        }
    }
    if !finite {
        let token = logits.iter().position(|logit| !logit.is_finite()).expect("one was met");
        return Err(NonFinite { token: token as u32 });
    }
    let max = largest.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let min = least.into_iter().fold(f32::INFINITY, f32::min);
    let argmax = logits.iter().position(|&logit| logit == max).expect("it is one of them") as u32;
    Ok(Extremes { argmax, max, min })
}

/// The token that `draw`, uniform over all `u64`, chooses.
///
/// Weights are `round(exp((l - max) / temperature) * 2^32)`. Candidates stand by descending logit, then ascending id;
/// top-k, top-p and min-p keep a run from the front, in this order, and always the first.
///
/// # Panics
/// If there is no logit.
pub fn sample(isa: Isa, logits: &[f32], params: &Params, draw: u64) -> Result<u32, NonFinite> {
    let extremes = extremes(logits)?;
    if params.is_greedy() {
        return Ok(extremes.argmax);
    }
    let ranks = Ranks::new(isa, logits, &extremes, params.temperature);
    let mut kept = ranks.whole;
    let top_k = params.top_k as usize;
    if (1..kept.count).contains(&top_k) {
        kept = ranks.shortest_run(|run| run.count >= top_k).0;
    }
    if let Some(share) = params.top_p_share() {
        let threshold = kept.weight * u128::from(share);
        kept = ranks.shortest_run(|run| run.weight << 32 >= threshold).0;
    }
    if let Some(share) = params.min_p_share() {
        let before = ranks.run_before_less_than(share);
        kept = if before.count < kept.count { before } else { kept };
    }
    let target = (u128::from(draw) * kept.weight) >> 64;
    Ok(ranks.shortest_run(|run| run.weight > target).1.token)
}

/// A token that may be chosen.
#[derive(Clone, Copy, Debug)]
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

/// Some candidates from the front, in their order.
#[derive(Clone, Copy, Debug, Default)]
struct Run {
    count: usize,
    weight: u128,
}

impl Run {
    fn with(self, count: usize, weight: u64) -> Self {
        Self { count: self.count + count, weight: self.weight + u128::from(weight) }
    }
}

/// Candidates whose logits are about as far below the largest.
#[derive(Clone, Copy, Debug)]
struct Bucket {
    weight: u64,
    count: u32,
    /// The least weight, or this type's largest value.
    least: u32,
}

/// All candidates, by buckets in their order. A vocabulary is not sorted for one token, and not kept beside the logits: sums of
/// buckets tell in which one a run ends, and that one alone is sorted.
struct Ranks<'a> {
    isa: Isa,
    logits: &'a [f32],
    max: f32,
    temperature: f32,
    /// Buckets for a difference of 1.
    scale: f32,
    buckets: [Bucket; BUCKETS],
    whole: Run,
}

impl<'a> Ranks<'a> {
    fn new(isa: Isa, logits: &'a [f32], extremes: &Extremes, temperature: f32) -> Self {
        let &Extremes { max, min, .. } = extremes;
        let scale = BUCKETS as f32 / (max - min).min(FARTHEST * temperature);
        let buckets = [Bucket { weight: 0, count: 0, least: u32::MAX }; BUCKETS];
        let mut ranks = Self { isa, logits, max, temperature, scale, buckets, whole: Run::default() };
        let (mut weights, mut places) = ([0; TOGETHER], [0; TOGETHER]);
        for logits in logits.chunks(TOGETHER) {
            let (weights, places) = (&mut weights[..logits.len()], &mut places[..logits.len()]);
            weigh(isa, logits, max, temperature, weights);
            ranks.place(logits, places);
            for (&weight, &place) in weights.iter().zip(&*places) {
                let Bucket { weight: sum, count, least } = &mut ranks.buckets[place as usize % BUCKETS];
                // Below 2^31 tokens of at most 2^32.
                *sum += weight;
                *count += u32::from(weight > 0);
                *least = (*least).min(u32::try_from(weight).unwrap_or(u32::MAX));
            }
        }
        ranks.whole =
            ranks.buckets.iter().fold(Run::default(), |run, of| run.with(of.count as usize, of.weight));
        ranks
    }

    /// The buckets of logits. Each rounding keeps the order, so that buckets are in the order of their candidates, and equals in one.
    fn place(&self, logits: &[f32], places: &mut [u32]) {
        place(self.isa, logits, self.max, self.scale, places);
    }

    /// The shortest run that is enough, and its last candidate. All together are.
    fn shortest_run(&self, is_enough: impl Fn(&Run) -> bool) -> (Run, Candidate) {
        let mut run = Run::default();
        for (place, bucket) in self.buckets.iter().enumerate().filter(|(_, bucket)| bucket.count > 0) {
            let with_all = run.with(bucket.count as usize, bucket.weight);
            if !is_enough(&with_all) {
                run = with_all;
                continue;
            }
            for candidate in self.sorted(place) {
                run = run.with(1, candidate.weight);
                if is_enough(&run) {
                    return (run, candidate);
                }
            }
        }
        unreachable!("all together are enough")
    }

    /// The run before the first weight that does not reach the share of the largest logit's; all if each does.
    fn run_before_less_than(&self, share: u64) -> Run {
        let mut largest = [0];
        weigh(self.isa, &[self.max], self.max, self.temperature, &mut largest);
        let threshold = u128::from(largest[0]) * u128::from(share);
        let is_less = |weight: u64| u128::from(weight) << 32 < threshold;
        let mut run = Run::default();
        for (place, bucket) in self.buckets.iter().enumerate().filter(|(_, bucket)| bucket.count > 0) {
            if is_less(bucket.least.into()) {
                for candidate in self.sorted(place) {
                    if is_less(candidate.weight) {
                        return run;
                    }
                    run = run.with(1, candidate.weight);
                }
            } else {
                run = run.with(bucket.count as usize, bucket.weight);
            }
        }
        run
    }

    /// The candidates of a bucket, in their order.
    fn sorted(&self, wanted: usize) -> Vec<Candidate> {
        let mut found = Vec::with_capacity(self.buckets[wanted].count as usize);
        let (mut weights, mut places) = ([0; TOGETHER], [0; TOGETHER]);
        for (at, logits) in self.logits.chunks(TOGETHER).enumerate() {
            let places = &mut places[..logits.len()];
            self.place(logits, places);
            if !places.contains(&(wanted as u32)) {
                continue;
            }
            let weights = &mut weights[..logits.len()];
            weigh(self.isa, logits, self.max, self.temperature, weights);
            let first = (at * TOGETHER) as u32;
            for (((token, logit), &mut place), &mut weight) in (first..).zip(logits).zip(places).zip(weights)
            {
                if place == wanted as u32 && weight > 0 {
                    // The two zeros are equal logits.
                    found.push(Candidate { logit: logit + 0.0, token, weight });
                }
            }
        }
        found.sort_unstable_by(Candidate::order);
        found
    }
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
        *out = if x < -FARTHEST { 0 } else { weight };
    }
}

versioned! {
    /// The numbers of buckets for logits of at most `max`, of which a difference of 1 is so many.
    fn place(logits: &[f32], max: f32, scale: f32, out: &mut [u32]) = place_body
}

#[inline(always)]
fn place_body(logits: &[f32], max: f32, scale: f32, out: &mut [u32]) {
    for (logit, out) in logits.iter().zip(out) {
        // What is no number, and what is too large for one, have a place too: the last.
        *out = ((max - logit) * scale).min((BUCKETS - 1) as f32) as i32 as u32;
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
