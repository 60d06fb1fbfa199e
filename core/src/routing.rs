//! Which experts a position selects: pure functions of scores, masks and a seed.
//!
//! The order is score descending, then the seeded hash of (seed, layer, position, expert) ascending, then the expert's
//! number. The hash is drawn only where scores are equal. Scores must be finite; the caller refuses others before.

use crate::random::{Purpose, draw};
use alloc::vec::Vec;
use core::cmp::Ordering;

/// Names the ties of one position in one layer.
#[derive(Clone, Copy, Debug)]
pub struct Ties {
    /// The routing seed.
    pub seed: u64,
    /// Decoder layer.
    pub layer: u32,
    /// Position in the sequence.
    pub position: u32,
}

impl Ties {
    fn hash(self, candidate: u32) -> u64 {
        let id = u64::from(self.layer) << 32 | u64::from(candidate);
        draw(self.seed, Purpose::Tie, id, u64::from(self.position))
    }

    fn order(self, a: (f32, u32), b: (f32, u32)) -> Ordering {
        // The two zeros are equal scores.
        (b.0 + 0.0)
            .total_cmp(&(a.0 + 0.0))
            .then_with(|| self.hash(a.1).cmp(&self.hash(b.1)))
            .then(a.1.cmp(&b.1))
    }
}

/// The `k` best of the candidates, best first; all of them if they are fewer.
pub fn top_k(ties: Ties, candidates: impl IntoIterator<Item = (f32, u32)>, k: usize) -> Vec<u32> {
    let mut best: Vec<(f32, u32)> = Vec::with_capacity(k + 1);
    for candidate in candidates {
        let at = best.partition_point(|&other| ties.order(other, candidate) == Ordering::Less);
        if at < k {
            best.insert(at, candidate);
            best.truncate(k);
        }
    }
    best.into_iter().map(|(_, id)| id).collect()
}

/// How a group of experts is scored by its members.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GroupScore {
    /// The largest.
    Max,
    /// The sum of the two largest.
    SumOfTop2,
}

/// Only the experts of the best groups are candidates.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GroupLimit {
    /// Groups of equal size, in order of expert number.
    pub groups: usize,
    /// How many of them stay.
    pub keep: usize,
    /// How a group is scored.
    pub score: GroupScore,
}

/// The `k` best experts of those that `eligible` lets through, in the best groups if there is a limit; best first.
pub fn select(
    ties: Ties,
    scores: &[f32],
    eligible: impl Fn(u32) -> bool,
    limit: Option<GroupLimit>,
    k: usize,
) -> Vec<u32> {
    let all = || (0u32..).zip(scores).map(|(id, &score)| (score, id)).filter(|&(_, id)| eligible(id));
    let Some(GroupLimit { groups, keep, score }) = limit.filter(|limit| limit.keep < limit.groups) else {
        return top_k(ties, all(), k);
    };
    let size = crate::ids::len32(scores.len() / groups.max(1)).max(1);
    let mut of_groups: Vec<(f32, u32)> = Vec::new();
    for group in 0..crate::ids::len32(groups) {
        let mut two = [f32::NEG_INFINITY; 2];
        for (value, _) in all().filter(|&(_, id)| id / size == group) {
            if value > two[0] {
                two = [value, two[0]];
            } else if value > two[1] {
                two[1] = value;
            }
        }
        if two[0] > f32::NEG_INFINITY {
            let second = if two[1] > f32::NEG_INFINITY { two[1] } else { 0.0 };
            of_groups.push((if score == GroupScore::Max { two[0] } else { two[0] + second }, group));
        }
    }
    // Groups take their ties from numbers above those of experts.
    let numbered = of_groups.into_iter().map(|(score, group)| (score, u32::MAX - group));
    let kept = top_k(ties, numbered, keep);
    top_k(ties, all().filter(|&(_, id)| kept.contains(&(u32::MAX - id / size))), k)
}

/// How many tiers, groups of each and experts of each group a hierarchical router selects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hierarchy {
    /// Tiers of a position.
    pub tiers: usize,
    /// Groups of a tier.
    pub groups: usize,
    /// Experts of a group.
    pub experts: usize,
}

/// Selects tiers, in each of them groups, in each of those experts: `[tier, group, expert]`, ascending by expert.
///
/// Candidates are scores with numbers, and no number may stand for two of them: ties are drawn by it. `groups` gives
/// those of a tier, `experts` those of a group.
pub fn select_hierarchical(
    ties: Ties,
    hierarchy: Hierarchy,
    tiers: &[(f32, u32)],
    mut groups: impl FnMut(u32) -> Vec<(f32, u32)>,
    mut experts: impl FnMut(u32) -> Vec<(f32, u32)>,
) -> Vec<[u32; 3]> {
    let mut selected = Vec::new();
    for tier in top_k(ties, tiers.iter().copied(), hierarchy.tiers) {
        for group in top_k(ties, groups(tier), hierarchy.groups) {
            for expert in top_k(ties, experts(group), hierarchy.experts) {
                selected.push([tier, group, expert]);
            }
        }
    }
    selected.sort_unstable_by_key(|&[_, _, expert]| expert);
    selected
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    const TIES: Ties = Ties { seed: 1, layer: 2, position: 3 };

    /// The definition: sort everything, take the front.
    fn naive(ties: Ties, candidates: &[(f32, u32)], k: usize) -> Vec<u32> {
        let mut sorted = candidates.to_vec();
        sorted.sort_by(|a, b| {
            let hash = |id: u32| {
                draw(
                    ties.seed,
                    Purpose::Tie,
                    u64::from(ties.layer) << 32 | u64::from(id),
                    u64::from(ties.position),
                )
            };
            b.0.partial_cmp(&a.0).expect("finite").then(hash(a.1).cmp(&hash(b.1))).then(a.1.cmp(&b.1))
        });
        sorted.into_iter().take(k).map(|(_, id)| id).collect()
    }

    proptest! {
        #[test]
        fn top_k_is_the_front_of_the_sorted(
            scores in prop::collection::vec(prop_oneof![Just(0.0f32), Just(-0.0), Just(1.0), -2.0f32..2.0], 0..40),
            k in 0usize..12,
        ) {
            let candidates: Vec<(f32, u32)> = scores.iter().copied().zip(0..).collect();
            prop_assert_eq!(top_k(TIES, candidates.iter().copied(), k), naive(TIES, &candidates, k));
        }

        /// Groups by full sorts, then experts by full sorts.
        #[test]
        fn a_group_limit_is_its_definition(
            scores in prop::collection::vec(prop_oneof![Just(0.25f32), -2.0f32..2.0], 12),
            mask: u16,
            keep in 1usize..4,
            sum: bool,
            k in 1usize..5,
        ) {
            let score = if sum { GroupScore::SumOfTop2 } else { GroupScore::Max };
            let eligible = |id: u32| mask >> id & 1 == 1;
            let mut groups = vec![];
            for group in 0..4u32 {
                let mut members: Vec<f32> =
                    (group * 3..group * 3 + 3).filter(|&id| eligible(id)).map(|id| scores[id as usize]).collect();
                members.sort_by(|a, b| b.total_cmp(a));
                let used = if sum { 2 } else { 1 };
                if !members.is_empty() {
                    groups.push((members.iter().take(used).sum::<f32>(), u32::MAX - group));
                }
            }
            let kept: Vec<u32> = naive(TIES, &groups, keep).into_iter().map(|number| u32::MAX - number).collect();
            let all = (0u32..).zip(&scores).filter(|&(id, _)| eligible(id) && kept.contains(&(id / 3)));
            let candidates: Vec<(f32, u32)> = all.map(|(id, &score)| (score, id)).collect();
            let limit = GroupLimit { groups: 4, keep, score };
            prop_assert_eq!(select(TIES, &scores, eligible, Some(limit), k), naive(TIES, &candidates, k));
        }

        #[test]
        fn only_eligible_experts_of_kept_groups_are_selected(
            scores in prop::collection::vec(-2.0f32..2.0, 16),
            mask: u16,
            keep in 1usize..4,
        ) {
            let limit = GroupLimit { groups: 4, keep, score: GroupScore::SumOfTop2 };
            let selected = select(TIES, &scores, |id| mask >> id & 1 == 1, Some(limit), 3);
            let mut groups: Vec<u32> = selected.iter().map(|id| id / 4).collect();
            groups.sort_unstable();
            groups.dedup();
            prop_assert!(groups.len() <= keep);
            prop_assert!(selected.iter().all(|id| mask >> id & 1 == 1));
        }
    }

    #[test]
    fn ties_depend_on_seed_layer_and_position() {
        let equal = || (0..8).map(|id| (0.5, id));
        let first = top_k(TIES, equal(), 8);
        assert_ne!(first, (0..8).collect::<Vec<u32>>());
        assert_eq!(first, top_k(TIES, equal(), 8));
        for other in [Ties { seed: 9, ..TIES }, Ties { layer: 9, ..TIES }, Ties { position: 9, ..TIES }] {
            assert_ne!(first, top_k(other, equal(), 8));
        }
    }

    #[test]
    fn a_hierarchy_selects_tier_group_expert() {
        let hierarchy = Hierarchy { tiers: 1, groups: 2, experts: 1 };
        let selected = select_hierarchical(
            TIES,
            hierarchy,
            &[(0.1, 0), (0.9, 2)],
            |tier| if tier == 2 { vec![(0.3, 10), (0.1, 11), (0.2, 12)] } else { vec![] },
            |group| if group == 10 { vec![(1.0, 20), (2.0, 21)] } else { vec![(2.0, 24), (1.0, 25)] },
        );
        assert_eq!(selected, [[2, 10, 21], [2, 12, 24]]);
    }
}
