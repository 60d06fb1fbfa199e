//! The tiered router of one position: a softmax at each level, tier times group times expert.

use super::router::Route;
use crate::arch::TieredRouter;
use crate::kernels::Isa;
use crate::kernels::math::softmax_in_place;
use lite_llm_core::routing::{Ties, select_hierarchical};

/// Routes a position by the scores of its layer's router, in the order of [`TieredRouter`]'s rows. Tiers that are not
/// active have no share of the softmax over tiers, and are never selected.
pub(crate) fn route(
    isa: Isa,
    router: &TieredRouter,
    ties: Ties,
    active: &[u32],
    normalise: bool,
    scores: &mut [f32],
) -> Route {
    let mut of_tiers: Vec<f32> = active.iter().map(|&tier| scores[tier as usize]).collect();
    softmax_in_place(isa, &mut of_tiers);
    for (&tier, &share) in active.iter().zip(&of_tiers) {
        scores[tier as usize] = share;
        softmax_in_place(isa, &mut scores[router.groups_of(tier as usize)]);
        for group in router.groups_of(tier as usize) {
            softmax_in_place(isa, &mut scores[router.experts_of(group)]);
        }
    }
    // Rows number the candidates, so that ties of different levels and groups are drawn apart.
    let candidates = |rows: std::ops::Range<usize>| rows.map(|row| (scores[row], row as u32)).collect();
    let selected = select_hierarchical(
        ties,
        router.select,
        &active.iter().map(|&tier| (scores[tier as usize], tier)).collect::<Vec<_>>(),
        |tier| candidates(router.groups_of(tier as usize)),
        |group| candidates(router.experts_of(group as usize)),
    );
    let first = router.first_expert();
    let experts = selected.iter().map(|&[_, _, expert]| expert - first as u32).collect();
    let share = |row: u32| scores[row as usize];
    let weights = selected.iter().map(|&[tier, group, expert]| share(tier) * share(group) * share(expert));
    let mut route = Route { experts, weights: weights.collect() };
    if normalise {
        route.normalise(0.0);
    }
    route
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arch::TierOfGroups;
    use lite_llm_core::config::Placement;
    use lite_llm_core::routing::Hierarchy;
    use proptest::prelude::*;

    fn router(select: Hierarchy) -> TieredRouter {
        let tier = |name: &str, groups, experts| TierOfGroups {
            name: name.into(),
            groups,
            experts,
            placement: Placement::Hot,
        };
        TieredRouter { tiers: vec![tier("a", 2, 3), tier("b", 3, 4), tier("c", 2, 5)], select }
    }

    /// The definition, level by level, in f64 and with full sorts.
    fn naive(router: &TieredRouter, active: &[u32], scores: &[f32]) -> Vec<(u32, f64)> {
        let best = |rows: &[usize], k: usize| {
            let sum: f64 = rows.iter().map(|&row| f64::from(scores[row]).exp()).sum();
            let mut list: Vec<(usize, f64)> =
                rows.iter().map(|&row| (row, f64::from(scores[row]).exp() / sum)).collect();
            list.sort_by(|a, b| b.1.total_cmp(&a.1));
            list.truncate(k);
            list
        };
        let groups: usize = router.tiers.iter().map(|tier| tier.groups).sum();
        let mut found = Vec::new();
        for (tier, tier_share) in
            best(&active.iter().map(|&t| t as usize).collect::<Vec<_>>(), router.select.tiers)
        {
            let before: usize = router.tiers[..tier].iter().map(|t| t.groups).sum();
            let rows: Vec<usize> = (0..router.tiers[tier].groups).map(|g| 3 + before + g).collect();
            for (group, group_share) in best(&rows, router.select.groups) {
                let before_tier: usize = router.tiers[..tier].iter().map(|t| t.groups * t.experts).sum();
                let size = router.tiers[tier].experts;
                let first = 3 + groups + before_tier + (group - 3 - before) * size;
                for (expert, share) in best(&(first..first + size).collect::<Vec<_>>(), router.select.experts)
                {
                    found.push(((expert - 3 - groups) as u32, tier_share * group_share * share));
                }
            }
        }
        found.sort_by_key(|&(expert, _)| expert);
        found
    }

    proptest! {
        #[test]
        fn a_route_is_the_definition(
            scores in prop::collection::vec(-4.0f32..4.0, 38),
            mask in 1u32..8,
            tiers in 1usize..4,
            groups in 1usize..3,
            experts in 1usize..4,
            normalise: bool,
        ) {
            let router = router(Hierarchy { tiers, groups, experts });
            prop_assert_eq!(router.rows(), scores.len());
            let active: Vec<u32> = (0..3).filter(|tier| mask >> tier & 1 == 1).collect();
            let mut expected = naive(&router, &active, &scores);
            if normalise {
                let sum: f64 = expected.iter().map(|&(_, weight)| weight).sum();
                expected.iter_mut().for_each(|(_, weight)| *weight /= sum);
            }
            let ties = Ties { seed: 1, layer: 2, position: 3 };
            let found = route(Isa::detect(), &router, ties, &active, normalise, &mut scores.clone());
            let numbers: Vec<u32> = expected.iter().map(|&(expert, _)| expert).collect();
            prop_assert_eq!(&found.experts, &numbers);
            for (found, (_, expected)) in found.weights.iter().zip(expected) {
                prop_assert!((f64::from(*found) - expected).abs() < 1e-5);
            }
        }
    }

    #[test]
    fn equal_scores_are_drawn_apart_at_each_level() {
        let router = router(Hierarchy { tiers: 1, groups: 1, experts: 1 });
        let expert = |position| {
            let ties = Ties { seed: 5, layer: 0, position };
            route(Isa::detect(), &router, ties, &[0, 1, 2], true, &mut [0.0; 38]).experts[0]
        };
        let drawn: std::collections::BTreeSet<u32> = (0..400).map(expert).collect();
        assert_eq!(drawn.len(), 28, "every expert of every group of every tier comes up");
    }
}
