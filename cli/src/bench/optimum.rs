//! The most hits that any eviction could have had, Belady's optimum on a trace of accesses; and those of plain recency.

use std::collections::{BTreeMap, BTreeSet};

/// Hits of the policy that evicts what is used again last, or never (L. A. Belady, 1966), with `capacity` places of which
/// `inside` are taken when the trace begins. What is accessed has to be inside; nothing else is ever brought in.
///
/// The engine pins what a layer needs until it has it all, which this does not: it is a bound, which can be missed by a
/// little with very few places.
pub(crate) fn hits<K: Ord + Copy>(trace: &[K], inside: &[K], capacity: usize) -> u64 {
    // For each access, when the next one to the same is.
    let mut next = vec![usize::MAX; trace.len()];
    let mut seen: BTreeMap<K, usize> = BTreeMap::new();
    for (at, key) in trace.iter().enumerate().rev() {
        next[at] = seen.insert(*key, at).unwrap_or(usize::MAX);
    }
    // Whoever is inside, by when it is accessed next; the key tells apart those that never are.
    let mut used_at: BTreeMap<K, usize> = BTreeMap::new();
    let mut by_use: BTreeSet<(usize, K)> = BTreeSet::new();
    for key in inside.iter().take(capacity) {
        let first = seen.get(key).copied().unwrap_or(usize::MAX);
        if used_at.insert(*key, first).is_none() {
            by_use.insert((first, *key));
        }
    }
    let mut hits = 0;
    for (at, key) in trace.iter().enumerate() {
        if let Some(was) = used_at.remove(key) {
            by_use.remove(&(was, *key));
            hits += 1;
        } else if used_at.len() >= capacity {
            let Some((_, evicted)) = by_use.pop_last() else { continue };
            used_at.remove(&evicted);
        }
        used_at.insert(*key, next[at]);
        by_use.insert((next[at], *key));
    }
    hits
}

/// Hits of the policy that evicts what was used the longest time ago (LRU), under the same conditions.
pub(crate) fn hits_of_recency<K: Ord + Copy>(trace: &[K], inside: &[K], capacity: usize) -> u64 {
    let mut used_at: BTreeMap<K, usize> = BTreeMap::new();
    let mut by_use: BTreeMap<usize, K> = BTreeMap::new();
    let mut hits = 0;
    let accesses = inside.iter().take(capacity).map(|key| (key, false));
    for (now, (key, counts)) in accesses.chain(trace.iter().map(|key| (key, true))).enumerate() {
        if let Some(was) = used_at.insert(*key, now) {
            by_use.remove(&was);
            hits += u64::from(counts);
        } else if used_at.len() > capacity
            && let Some((_, evicted)) = by_use.pop_first()
        {
            used_at.remove(&evicted);
        }
        by_use.insert(now, *key);
    }
    hits
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// The best of all choices, by trying each.
    fn best(trace: &[u8], inside: &[u8], capacity: usize) -> u64 {
        let Some((key, rest)) = trace.split_first() else { return 0 };
        if inside.contains(key) {
            return 1 + best(rest, inside, capacity);
        }
        let with = |evicted: Option<usize>| {
            let mut inside = inside.to_vec();
            evicted.map(|at| inside.remove(at));
            inside.push(*key);
            best(rest, &inside, capacity)
        };
        if inside.len() < capacity {
            return with(None);
        }
        (0..inside.len()).map(|at| with(Some(at))).max().unwrap_or(0)
    }

    #[test]
    fn a_cycle_longer_than_the_capacity_still_hits() {
        let trace: Vec<u8> = (0..40).map(|at| at % 4).collect();
        // Recency would never hit. The optimum keeps two of the four, and lets go of the third place's.
        assert_eq!(hits(&trace, &[], 3), 24);
        assert_eq!(hits(&trace, &[], 4), 36);
        assert_eq!(hits(&trace, &[0, 1, 2, 3], 4), 40);
        assert_eq!(hits_of_recency(&trace, &[0, 1, 2], 3), 3, "those that are there at first");
        assert_eq!(hits_of_recency(&trace, &[], 4), 36);
        assert_eq!(hits_of_recency(&[1, 2, 1, 3, 1, 2], &[], 2), 2);
    }

    proptest! {
        #[test]
        fn it_is_the_best_of_all_choices(
            trace in prop::collection::vec(0u8..5, 0..9),
            inside in prop::collection::btree_set(0u8..5, 0..3),
            capacity in 1usize..4,
        ) {
            let inside: Vec<u8> = inside.into_iter().take(capacity).collect();
            prop_assert_eq!(hits(&trace, &inside, capacity), best(&trace, &inside, capacity));
        }
    }
}
