//! Routers, gates and the combination of experts.

use crate::ready;
use lite_llm_core::routing::{GroupLimit, GroupScore, Hierarchy, Ties, select, select_hierarchical, top_k};
use lite_llm_model::kernels::golden::{Bits, EXP_CHUNK};
use lite_llm_model::kernels::math::{exp, sigmoid, sigmoid_in_place, softmax_in_place};
use lite_llm_model::kernels::*;
use lite_llm_tests::cuda::{Launch, Operands, Shim, assert_bits};

/// What stands for no expert.
const NONE: u32 = 0x7fff_ffff;

/// How outputs of a router become scores; the kernel knows them by number.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Score {
    Softmax,
    SoftmaxOfSelected,
    Sigmoid,
}

/// A router.
struct Router {
    score: Score,
    width: usize,
    top_k: usize,
    normalise: bool,
    limit: Option<GroupLimit>,
    eligible: Vec<bool>,
    correction: Vec<f32>,
}

const SEED: u64 = 0x0123_4567_89ab_cdef;
const LAYER: u32 = 5;
const SCALING: f32 = 2.5;

impl Router {
    /// The experts and weights of a position, made of the model's own parts as its router makes them.
    fn expected(&self, position: u32, logits: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let ties = Ties { seed: SEED, layer: LAYER, position };
        let mut scores = logits.to_vec();
        let eligible = |expert: u32| self.eligible[expert as usize];
        let choose = |scores: &[f32]| {
            let mut chosen = select(ties, scores, eligible, self.limit, self.top_k);
            chosen.sort_unstable();
            chosen
        };
        let weights =
            |experts: &[u32], scores: &[f32]| experts.iter().map(|&expert| scores[expert as usize]).collect();
        let (experts, mut weights): (_, Vec<f32>) = match self.score {
            Score::Softmax => {
                for (score, eligible) in scores.iter_mut().zip(&self.eligible) {
                    *score = if *eligible { *score } else { f32::NEG_INFINITY };
                }
                softmax_in_place(Isa::Scalar, &mut scores);
                let experts = choose(&scores);
                let weights = weights(&experts, &scores);
                (experts, weights)
            }
            Score::SoftmaxOfSelected => {
                let experts = choose(&scores);
                let mut weights: Vec<f32> = weights(&experts, &scores);
                softmax_in_place(Isa::Scalar, &mut weights);
                (experts, weights)
            }
            Score::Sigmoid => {
                sigmoid_in_place(Isa::Scalar, &mut scores);
                let corrected: Vec<f32> =
                    scores.iter().zip(&self.correction).map(|(score, more)| score + more).collect();
                let experts = choose(&corrected);
                let weights = weights(&experts, &scores);
                (experts, weights)
            }
        };
        if self.normalise {
            let more = if self.score == Score::Sigmoid { 1e-20 } else { 0.0 };
            let sum = weights.iter().fold(0.0, |sum: f32, weight| sum + weight) + more;
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        weights.iter_mut().for_each(|weight| *weight *= SCALING);
        (experts, weights)
    }

    fn check(&self, shim: &mut Shim, logits: &[f32]) {
        let rows = logits.len() / self.width;
        let positions: Vec<u32> = (0..rows as u32).map(|row| row * 977).collect();
        let eligible: Vec<u32> = self.eligible.iter().map(|&eligible| u32::from(eligible)).collect();
        let launch = Launch::new("route", [rows as u32, 1, 1], 32).values(logits).words(&eligible);
        let launch = launch.values(&self.correction).words(&positions);
        let launch = launch.room(rows * self.top_k).room(rows * self.top_k).room(rows);
        let launch = launch
            .word(self.width)
            .word(self.top_k)
            .word(self.score as usize)
            .word(usize::from(self.normalise));
        let (groups, keep, by_two) = self
            .limit
            .map_or((0, 0, false), |limit| (limit.groups, limit.keep, limit.score == GroupScore::SumOfTop2));
        let launch = launch.value(SCALING).word(groups).word(keep).word(usize::from(by_two));
        let found = shim.check(&launch.word(SEED as usize).word(LAYER as usize));
        let (experts, weights, faults) = (found.words(4), found.values(5), found.words(6));
        for row in 0..rows {
            let logits = &logits[row * self.width..][..self.width];
            let finite = logits.iter().all(|logit| logit.is_finite());
            assert_eq!(faults[row], u32::from(!finite));
            if !finite {
                continue;
            }
            let (mut of, mut by) = self.expected(positions[row], logits);
            of.resize(self.top_k, NONE);
            by.resize(self.top_k, 0.0);
            let what = format!("{:?} of {} with {:?}", self.score, self.width, self.limit);
            assert_eq!(experts[row * self.top_k..][..self.top_k], of, "{what}");
            assert_bits(&what, &weights[row * self.top_k..][..self.top_k], &by);
        }
    }
}

#[test]
fn experts_are_selected_and_weighed() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(21);
    let limits = [
        None,
        Some((4, 2, GroupScore::Max)),
        Some((4, 3, GroupScore::SumOfTop2)),
        Some((4, 4, GroupScore::Max)),
    ];
    for score in [Score::Softmax, Score::SoftmaxOfSelected, Score::Sigmoid] {
        for (width, top_k) in [(8, 2), (60, 4), (160, 8), (1024, 32)] {
            for (at, limit) in limits.into_iter().enumerate() {
                let mut correction = operands.values(width);
                // Few values, so that there are many ties.
                let mut logits: Vec<f32> =
                    (0..4 * width).map(|_| (operands.word() % 5) as f32 * 0.75 - 1.5).collect();
                if at % 2 == 1 {
                    logits = operands.values(4 * width).iter().map(|logit| logit * 8.0).collect();
                } else {
                    correction.fill(0.25);
                }
                // Zeros of both signs are one score; a position has no number.
                logits[0] = -0.0;
                logits[3] = 0.0;
                logits[2 * width + 5] = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY][at % 3];
                let sparse = width == 8;
                let eligible =
                    (0..width).map(|expert| if sparse { expert == 6 } else { expert % 7 != 3 }).collect();
                let limit = limit.map(|(groups, keep, score)| GroupLimit { groups, keep, score });
                let router = Router { score, width, top_k, normalise: at != 1, limit, eligible, correction };
                router.check(&mut shim, &logits);
            }
        }
    }
    shim.finish("moe.cu");
}

/// A router of three levels: for each tier its groups and the experts of each.
struct Tiers {
    tiers: Vec<(usize, usize)>,
    select: Hierarchy,
    active: Vec<u32>,
    normalise: bool,
}

impl Tiers {
    /// The first child of each tier and group, and behind them all that of nobody.
    fn first_child(&self) -> Vec<u32> {
        let groups: usize = self.tiers.iter().map(|(groups, _)| groups).sum();
        let (mut first, mut group, mut expert) = (vec![], self.tiers.len(), self.tiers.len() + groups);
        for (groups, _) in &self.tiers {
            first.push(group as u32);
            group += groups;
        }
        for &(groups, experts) in &self.tiers {
            for _ in 0..groups {
                first.push(expert as u32);
                expert += experts;
            }
        }
        first.push(expert as u32);
        first
    }

    /// The experts and weights of a position, made of the model's own parts as its router makes them.
    fn expected(&self, position: u32, logits: &[f32]) -> (Vec<u32>, Vec<f32>) {
        let (first, tiers) = (self.first_child(), self.tiers.len());
        let first_expert = first[tiers];
        let children = |row: u32| {
            let end = if row as usize + 1 == tiers { first_expert } else { first[row as usize + 1] };
            first[row as usize] as usize..end as usize
        };
        let mut scores = logits.to_vec();
        let mut of_tiers: Vec<f32> = self.active.iter().map(|&tier| scores[tier as usize]).collect();
        softmax_in_place(Isa::Scalar, &mut of_tiers);
        for (&tier, &share) in self.active.iter().zip(&of_tiers) {
            scores[tier as usize] = share;
            softmax_in_place(Isa::Scalar, &mut scores[children(tier)]);
            for group in children(tier) {
                softmax_in_place(Isa::Scalar, &mut scores[children(group as u32)]);
            }
        }
        let ties = Ties { seed: SEED, layer: LAYER, position };
        let candidates = |row: u32| children(row).map(|row| (scores[row], row as u32)).collect();
        let of_tiers: Vec<(f32, u32)> =
            self.active.iter().map(|&tier| (scores[tier as usize], tier)).collect();
        let selected = select_hierarchical(ties, self.select, &of_tiers, candidates, candidates);
        let experts = selected.iter().map(|&[_, _, expert]| expert - first_expert).collect();
        let share = |row: u32| scores[row as usize];
        let weights =
            selected.iter().map(|&[tier, group, expert]| share(tier) * share(group) * share(expert));
        let mut weights: Vec<f32> = weights.collect();
        if self.normalise {
            let sum = weights.iter().fold(0.0, |sum: f32, weight| sum + weight) + 0.0;
            weights.iter_mut().for_each(|weight| *weight /= sum);
        }
        weights.iter_mut().for_each(|weight| *weight *= SCALING);
        (experts, weights)
    }

    fn check(&self, shim: &mut Shim, logits: &[f32]) {
        let first = self.first_child();
        let (width, tiers) = (*first.last().unwrap() as usize, self.tiers.len());
        let (rows, Hierarchy { tiers: t, groups: g, experts: e }) = (logits.len() / width, self.select);
        let positions: Vec<u32> = (0..rows as u32).map(|row| row * 31 + 2).collect();
        let places = t * g * e;
        let launch = Launch::new("route_tiers", [rows as u32, 1, 1], 32)
            .values(logits)
            .words(&self.active)
            .words(&first);
        let launch = launch.words(&positions).room(rows * places).room(rows * places).room(rows).word(width);
        let launch =
            launch.word(self.active.len()).word(tiers).word(first.len() - 1 - tiers).word(t).word(g).word(e);
        let launch =
            launch.word(usize::from(self.normalise)).value(SCALING).word(SEED as usize).word(LAYER as usize);
        let found = shim.check(&launch);
        for (row, logits) in logits.chunks(width).enumerate() {
            let finite = logits.iter().all(|logit| logit.is_finite());
            assert_eq!(found.words(6)[row], u32::from(!finite));
            if finite {
                let (mut experts, mut weights) = self.expected(positions[row], logits);
                experts.resize(places, NONE);
                weights.resize(places, 0.0);
                assert_eq!(found.words(4)[row * places..][..places], experts);
                assert_bits("tiers", &found.values(5)[row * places..][..places], &weights);
            }
        }
    }
}

#[test]
fn tiers_are_selected_and_weighed() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(24);
    let select = |tiers, groups, experts| Hierarchy { tiers, groups, experts };
    let routers = [
        (vec![(2, 3), (3, 4), (2, 5)], select(2, 2, 3), vec![0, 2]),
        (vec![(1, 40)], select(1, 1, 8), vec![0]),
        (vec![(4, 70), (1, 2), (33, 1)], select(3, 3, 3), vec![0, 1, 2]),
        (vec![(2, 3), (3, 4)], select(2, 4, 4), vec![1]),
    ];
    for (tiers, select, active) in routers {
        for kind in 0..3 {
            let router = Tiers { tiers: tiers.clone(), select, active: active.clone(), normalise: kind != 1 };
            let width = *router.first_child().last().unwrap() as usize;
            let mut logits: Vec<f32> = operands.values(3 * width).iter().map(|logit| logit * 3.0).collect();
            if kind == 0 {
                logits.iter_mut().for_each(|logit| *logit = logit.round());
            }
            if kind == 2 {
                logits[width] = f32::NAN;
            }
            router.check(&mut shim, &logits);
        }
    }
    shim.finish("moe.cu");
}

/// The sparse mixer of a position, made of the model's own parts as its router makes them.
fn sparsely(position: u32, eligible: &[bool], jitter: f32, logits: &[f32]) -> (Vec<u32>, Vec<f32>) {
    let ties = Ties { seed: SEED, layer: LAYER, position };
    let mut chosen: Vec<(u32, f32)> = vec![];
    while chosen.len() < 2 {
        let open =
            |expert: u32| eligible[expert as usize] && chosen.iter().all(|&(other, _)| other != expert);
        let candidates: Vec<(f32, u32)> =
            logits.iter().copied().zip(0..).filter(|&(_, expert)| open(expert)).collect();
        let Some(&best) = top_k(ties, candidates.iter().copied(), 1).first() else { break };
        let max = logits[best as usize];
        let far =
            |logit: f32| (max - logit) / if logit.abs() < max { max } else { logit.abs() } > 2.0 * jitter;
        let near: Vec<(f32, u32)> = candidates.into_iter().filter(|&(logit, _)| !far(logit)).collect();
        let mut shares: Vec<f32> = near.iter().map(|&(logit, _)| logit).collect();
        softmax_in_place(Isa::Scalar, &mut shares);
        let at = near.iter().position(|&(_, expert)| expert == best).unwrap();
        chosen.push((best, shares[at]));
    }
    chosen.sort_unstable_by_key(|&(expert, _)| expert);
    chosen.into_iter().unzip()
}

#[test]
fn two_experts_are_mixed_sparsely() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(25);
    for (width, few) in [(16, false), (70, false), (1024, false), (16, true)] {
        for kind in 0..3 {
            let mut logits: Vec<f32> = operands.values(4 * width).iter().map(|logit| logit * 1.5).collect();
            match kind {
                0 => logits.iter_mut().for_each(|logit| *logit = (*logit * 2.0).round()),
                1 => logits.iter_mut().for_each(|logit| *logit = 3.0 + *logit * 0.1),
                _ => logits[width + 3] = f32::NEG_INFINITY,
            }
            let eligible: Vec<bool> =
                (0..width).map(|expert| if few { expert == 5 } else { expert % 7 != 3 }).collect();
            let words: Vec<u32> = eligible.iter().map(|&eligible| u32::from(eligible)).collect();
            let positions = [0, 1, 7, 4000];
            let launch =
                Launch::new("route_sparsely", [4, 1, 1], 32).values(&logits).words(&words).words(&positions);
            let launch = launch.room(8).room(8).room(4).word(width).value(0.13).word(0).value(SCALING);
            let found = shim.check(&launch.word(SEED as usize).word(LAYER as usize));
            for (row, logits) in logits.chunks(width).enumerate() {
                let finite = logits.iter().all(|logit| logit.is_finite());
                assert_eq!(found.words(5)[row], u32::from(!finite));
                if finite {
                    let (mut experts, mut weights) = sparsely(positions[row], &eligible, 0.13, logits);
                    weights.iter_mut().for_each(|weight| *weight *= SCALING);
                    experts.resize(2, NONE);
                    weights.resize(2, 0.0);
                    assert_eq!(found.words(3)[row * 2..][..2], experts);
                    assert_bits("sparse mixer", &found.values(4)[row * 2..][..2], &weights);
                }
            }
        }
    }
    shim.finish("moe.cu");
}

#[test]
fn gates_are_the_definition() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(22);
    for n in [1, 2, 3, 4, 131, 1000] {
        let mut gates: Vec<f32> = operands.values(n).iter().map(|gate| gate * 60.0).collect();
        let mut ups = operands.values(n);
        // The ends of the exponential, and beyond.
        for (gate, edge) in
            gates.iter_mut().rev().zip([f32::INFINITY, f32::NEG_INFINITY, 88.8, -104.1, 1e30, f32::NAN])
        {
            *gate = edge;
        }
        ups[0] = f32::INFINITY;
        let launch = |kernel| Launch::new(kernel, [2, 1, 1], 64);
        let found = shim.check(&launch("swiglu").values(&gates).values(&ups).room(n).word(n)).values(2);
        let mut expected = vec![0.0; n];
        swiglu(Isa::Scalar, &gates, &ups, &mut expected);
        assert_bits("swiglu", &found, &expected);
        ups.iter_mut().for_each(|up| *up *= 8.0);
        let launch = launch("clamped_swiglu").values(&gates).values(&ups).room(n).word(n);
        let found = shim.check(&launch.value(1.702).value(7.0)).values(2);
        clamped_swiglu(Isa::Scalar, &gates, &ups, 1.702, 7.0, &mut expected);
        assert_bits("clamped_swiglu", &found, &expected);
        let launch = Launch::new("clip", [2, 1, 1], 64).values(&gates).value(0.75).word(n);
        let expected: Vec<f32> = gates.iter().map(|gate| gate.clamp(-0.75, 0.75)).collect();
        assert_bits("clip", &shim.check(&launch).values(0), &expected);
        let (x, y) = (operands.values(n), operands.values(n));
        let launch = Launch::new("add", [2, 1, 1], 64).values(&x).values(&y).value(0.22).word(n);
        let expected: Vec<f32> = x.iter().zip(&y).map(|(x, y)| x + y * 0.22).collect();
        assert_bits("add", &shim.check(&launch).values(0), &expected);
    }
    // A sample of all values, and many where a coefficient of the exponential that is off by a little shows.
    let mut gates: Vec<f32> = (0..=u32::MAX).step_by(65_521).map(f32::from_bits).collect();
    gates.extend((0..1 << 20).map(|_| operands.word() as f32 * -7e-9));
    let ones = vec![1.0; gates.len()];
    let launch = Launch::new("swiglu", [8, 1, 1], 256)
        .values(&gates)
        .values(&ones)
        .room(gates.len())
        .word(gates.len());
    let mut expected = vec![0.0; gates.len()];
    swiglu(Isa::Scalar, &gates, &ones, &mut expected);
    assert_bits("swiglu", &shim.launch(&launch, 0, "").unwrap().values(2), &expected);
}

/// Who uses which expert, as the host finds it: experts by their place, the users of each by their position. Results are changed where they
/// are of these experts, whose users are counted from `base` on, or of nobody.
fn expected_users(
    (experts, faults): (&[u32], &[u32]),
    places: &[u32],
    (k, base): (usize, u32),
    results: &mut [u32],
) -> (Vec<u32>, Vec<u32>, Vec<u32>) {
    let mut all: Vec<(u32, usize)> = vec![];
    for (at, &expert) in experts.iter().enumerate() {
        if faults[at / k] != 0 || expert == NONE {
            results[at] = NONE;
        } else if places[expert as usize] != NONE {
            all.push((places[expert as usize], at));
        }
    }
    all.sort_unstable();
    let (mut used, mut firsts) = (vec![], vec![]);
    for ((user, own), &(place, at)) in (0..).zip(base..).zip(&all) {
        if used.last() != Some(&place) {
            used.push(place);
            firsts.push(user);
        }
        results[at] = own;
    }
    (used, firsts, all.iter().map(|&(_, at)| (at / k) as u32).collect())
}

#[test]
fn users_of_experts_are_found() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(24);
    for (positions, k, width, eligible, threads) in [
        (1, 2, 8, 8, 32),
        (1, 8, 64, 64, 256),
        (3, 4, 16, 3, 64),
        (7, 6, 160, 100, 256),
        (70, 8, 40, 40, 256),
        (9, 32, 1024, 1024, 128),
        (40, 2, 1000, 997, 64),
    ] {
        // A permutation: experts stand elsewhere than their numbers say, and those that are not eligible nowhere.
        let mut order: Vec<u32> = (0..width as u32).collect();
        order.sort_by_cached_key(|_| operands.word());
        let mut experts = vec![];
        for row in 0..positions {
            // Some have fewer, and one nobody.
            let count = if row == 4 { 0 } else { k.min(eligible) - row % 3 % k.min(eligible) };
            let mut own = order[..eligible].to_vec();
            own.sort_by_cached_key(|expert| operands.word() % 64 + expert % 8);
            own.truncate(count);
            own.sort_unstable();
            own.resize(k, NONE);
            experts.extend(own);
        }
        let mut faults = vec![0; positions];
        if positions > 5 {
            // Nobody wrote what such a position would choose.
            faults[5] = 1;
            experts[5 * k..6 * k].fill(0xdead_beef);
        }
        // One rank has all experts, or two share them out: what all find comes together.
        let count = positions * k;
        for first in [eligible, eligible / 3] {
            let shares = [0..first, first..eligible];
            let (mut before, mut results) = (vec![0xa5a5_a5a5; count], vec![0xa5a5_a5a5; count]);
            for (share, base) in
                shares.into_iter().zip([0, count as u32]).filter(|(share, _)| !share.is_empty())
            {
                let (own, room) = (share.len(), share.len().min(count));
                let mut places = vec![NONE; width];
                order[share].iter().zip(0..).for_each(|(&expert, place)| places[expert as usize] = place);
                let begins: Vec<u64> = (0..own).map(|_| u64::from(operands.word()) << 20).collect();
                let launch = Launch::new("find_users", [own as u32, 1, 1], threads).words(&experts);
                let launch = launch.words(&faults).words(&places).longs(&begins);
                let launch = launch.room(2 * room).room(room + 1).room(count).words(&before);
                let found = shim.check(&launch.word(count).word(k).word(room).word(base as usize));
                let (used, mut firsts, mut users) =
                    expected_users((&experts, &faults), &places, (k, base), &mut results);
                let mut at: Vec<u64> = used.iter().map(|&place| begins[place as usize]).collect();
                at.resize(room, 0);
                firsts.resize(room + 1, users.len() as u32);
                users.resize(count, 0);
                let what = format!("{positions} positions, {k} of {own} of {eligible} of {width}");
                assert_eq!(found.longs(4), at, "{what}");
                assert_eq!(found.words(5), firsts, "{what}");
                assert_eq!(found.words(6), users, "{what}");
                assert_eq!(found.words(7), results, "{what}");
                before.copy_from_slice(&results);
            }
        }
    }
    shim.finish("moe.cu");
}

#[test]
fn exponentials_are_the_definition() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(26);
    let values: Vec<f32> = (0..300).map(|_| f32::from_bits(operands.word())).collect();
    let launch = Launch::new("exponentials", [2, 1, 1], 64).values(&values).word(values.len());
    let expected: Vec<f32> = values.iter().map(|&value| exp(value)).collect();
    assert_bits("exponentials", &shim.check(&launch).values(0), &expected);
    // The third and fourth chunk of those that stand 3001 apart.
    let launch = Launch::new("exponential_hashes", [1, 1, 1], 32).room(4).word(2).word(3001).word(2);
    let expected = [2, 3].map(|chunk: u32| {
        let inputs = (0..EXP_CHUNK).map(|i| f32::from_bits(chunk * 3001 * EXP_CHUNK + i));
        let mut hash = Bits::default();
        inputs.for_each(|input| hash.word(exp(input).to_bits()));
        hash.0
    });
    assert_eq!(shim.check(&launch).longs(0), expected);
}

#[test]
fn results_are_combined_in_order() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(23);
    for (hidden, has_shared, has_gates) in
        [(1, false, false), (36, true, true), (131, true, false), (200, false, false)]
    {
        let (rows, top_k, all) = (3, 4, 9);
        let (x, results) = (operands.values(rows * hidden), operands.values(all * hidden));
        let (shared, gates) = (operands.values(rows * hidden), operands.values(rows));
        let weights = operands.values(rows * top_k);
        let users = [8, 0, 3, 1, 2, NONE, NONE, NONE, 7, 4, 5, NONE];
        let launch =
            Launch::new("combine", [2, rows as u32, 1], 32).values(&x).values(&results).words(&users);
        let launch = launch.values(&weights).values_if(has_shared.then_some(&shared[..]));
        let launch = launch.values_if(has_gates.then_some(&gates[..])).value(0.75).word(hidden).word(top_k);
        let mut expected = x;
        for (row, x) in expected.chunks_mut(hidden).enumerate() {
            let mut sum = vec![0.0; hidden];
            for (user, weight) in users[row * top_k..][..top_k].iter().zip(&weights[row * top_k..]) {
                if *user != NONE {
                    axpy(Isa::Scalar, *weight, &results[*user as usize * hidden..][..hidden], &mut sum);
                }
            }
            if has_shared {
                let gate = if has_gates { sigmoid(gates[row]) } else { 1.0 };
                axpy(Isa::Scalar, gate, &shared[row * hidden..][..hidden], &mut sum);
            }
            x.iter_mut().zip(sum).for_each(|(x, sum)| *x += sum * 0.75);
        }
        assert_bits("combine", &shim.check(&launch).values(0), &expected);
    }
}
