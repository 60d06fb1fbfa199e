//! What a group of ranks does together, as plans: who sends which part to whom, and in which order what comes is combined.
//!
//! A plan is a pure function of the group, so that every rank makes the same one without asking. Parts may arrive in any
//! order, doubled or for another exchange: the result is the same, because it is put together in the order of ranks once all
//! are there. An exchange lives for one tag of one epoch; giving a step up drops it, and nothing of it reaches the next.

use super::message::Tag;
use crate::ids::index;
use crate::plant::{self, Bug};
use alloc::vec::Vec;

/// What is done together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Everybody has a part, and gets all of them in the order of ranks.
    AllGather,
    /// The same, and everybody combines them in the order of ranks: never in the order of arrival.
    AllReduce,
    /// One rank has what everybody gets.
    Broadcast {
        /// Which.
        root: u32,
    },
    /// Everybody has a part for each other rank, and gets the parts for itself.
    AllToAll,
    /// Nobody goes on before everybody has come: empty parts.
    Barrier,
}

/// One thing that a rank sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sending {
    /// To whom.
    pub to: u32,
    /// Which of its own parts: the place of the receiver in the group for an all-to-all, 0 otherwise.
    pub part: usize,
}

/// What a group does together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    kind: Kind,
    /// Ascending.
    ranks: Vec<u32>,
}

impl Plan {
    /// The plan of a group.
    ///
    /// # Panics
    /// If the group is empty, or the root of a broadcast is not in it.
    #[must_use]
    pub fn new(kind: Kind, mut ranks: Vec<u32>) -> Self {
        ranks.sort_unstable();
        ranks.dedup();
        assert!(!ranks.is_empty(), "a group has ranks");
        if let Kind::Broadcast { root } = kind {
            assert!(ranks.contains(&root), "who broadcasts is in the group");
        }
        Self { kind, ranks }
    }

    /// How many parts a rank brings.
    ///
    /// # Panics
    /// If the rank is not in the group.
    #[must_use]
    pub fn parts(&self, me: u32) -> usize {
        let _ = self.place(me);
        match self.kind {
            Kind::AllGather | Kind::AllReduce | Kind::Barrier => 1,
            Kind::Broadcast { root } => usize::from(me == root),
            Kind::AllToAll => self.ranks.len(),
        }
    }

    /// What a rank sends, in this order: to the next rank first, so that not all send to the same one at once.
    ///
    /// # Panics
    /// If the rank is not in the group.
    pub fn sendings(&self, me: u32) -> impl Iterator<Item = Sending> {
        let (place, count) = (self.place(me), self.ranks.len());
        let brings = self.parts(me) > 0;
        (1..count).filter(move |_| brings).map(move |step| {
            let at = (place + step) % count;
            Sending { to: self.ranks[at], part: if self.kind == Kind::AllToAll { at } else { 0 } }
        })
    }

    /// Whose parts a rank needs, its own included, in the order in which they are combined.
    pub fn sources(&self) -> impl Iterator<Item = u32> {
        let root = if let Kind::Broadcast { root } = self.kind { Some(root) } else { None };
        self.ranks.iter().copied().filter(move |rank| root.is_none_or(|root| root == *rank))
    }

    fn place(&self, rank: u32) -> usize {
        self.ranks.binary_search(&rank).expect("a rank of the group")
    }
}

/// One rank's end of an exchange.
#[derive(Clone, Debug)]
pub struct Exchange<T> {
    plan: Plan,
    tag: Tag,
    /// By place among the sources.
    got: Vec<Option<T>>,
    sources: Vec<u32>,
}

impl<T: Clone> Exchange<T> {
    /// Begins an exchange with the parts that this rank brings; what it sends follows.
    ///
    /// # Panics
    /// If the parts are not as many as the plan says.
    pub fn begin(plan: Plan, tag: Tag, me: u32, own: &[T]) -> (Self, Vec<(u32, T)>) {
        assert_eq!(own.len(), plan.parts(me), "a rank brings its parts");
        let sends = plan.sendings(me).map(|sending| (sending.to, own[sending.part].clone())).collect();
        let sources: Vec<u32> = plan.sources().collect();
        let mut exchange = Self { tag, got: sources.iter().map(|_| None).collect(), sources, plan };
        let kept = if exchange.plan.kind == Kind::AllToAll { exchange.plan.place(me) } else { 0 };
        if let Some(part) = own.get(kept) {
            exchange.put(me, part.clone());
        }
        (exchange, sends)
    }

    /// Takes a part. One of another exchange, of nobody's, or that is there already changes nothing.
    pub fn take(&mut self, from: u32, tag: Tag, part: T) -> bool {
        tag == self.tag && self.put(from, part)
    }

    fn put(&mut self, from: u32, part: T) -> bool {
        let Ok(place) = self.sources.binary_search(&from) else { return false };
        let free = self.got[place].is_none();
        if free {
            self.got[place] = Some(part);
        }
        free
    }

    /// Who has not been heard yet, in the order of ranks.
    pub fn missing(&self) -> impl Iterator<Item = u32> {
        self.sources.iter().zip(&self.got).filter(|(_, got)| got.is_none()).map(|(&rank, _)| rank)
    }

    /// All parts in the order of ranks, once they are there.
    #[must_use]
    pub fn parts(&self) -> Option<Vec<(u32, T)>> {
        let parts = self.sources.iter().zip(&self.got);
        if plant::is(Bug::ShareMissing) {
            return Some(parts.filter_map(|(&rank, got)| Some((rank, got.clone()?))).collect());
        }
        // Asked after each part that comes: nothing is copied before the last.
        if self.missing().next().is_some() {
            return None;
        }
        parts.map(|(&rank, got)| Some((rank, got.clone()?))).collect()
    }

    /// All parts combined in the order of ranks, once they are there.
    #[must_use]
    pub fn reduced(&self, combine: impl FnMut(T, T) -> T) -> Option<T> {
        self.parts()?.into_iter().map(|(_, part)| part).reduce(combine)
    }
}

/// The ranks whose bit is set.
#[must_use]
pub fn group(bits: u64) -> Vec<u32> {
    (0..u64::BITS).filter(|&rank| bits >> index(rank) & 1 == 1).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::StepId;
    use alloc::collections::BTreeMap;
    use alloc::string::{String, ToString};
    use alloc::{format, vec};
    use proptest::prelude::*;

    const TAG: Tag = Tag { step: StepId(3), attempt: 1, exchange: 2 };
    const OTHER: Tag = Tag { step: StepId(3), attempt: 0, exchange: 2 };

    fn kinds(root: u32) -> [Kind; 5] {
        [Kind::AllGather, Kind::AllReduce, Kind::Broadcast { root }, Kind::AllToAll, Kind::Barrier]
    }

    proptest! {
        /// Whatever the order of arrival, doubles and strays: everybody gets the parts of all, in the order of ranks.
        #[test]
        fn the_result_is_that_of_the_definition(
            ranks in prop::collection::btree_set(0u32..12, 1..6),
            order in prop::collection::vec(any::<prop::sample::Index>(), 80),
            doubled in any::<u64>(),
        ) {
            let ranks: Vec<u32> = ranks.into_iter().collect();
            for kind in kinds(ranks[ranks.len() / 2]) {
                let plan = Plan::new(kind, ranks.clone());
                let own = |me: u32| -> Vec<String> {
                    (0..plan.parts(me)).map(|part| format!("{me}.{part} ")).collect()
                };
                let mut ends = BTreeMap::new();
                let mut air: Vec<(u32, u32, String)> = vec![];
                for &me in &ranks {
                    let (end, sends) = Exchange::begin(plan.clone(), TAG, me, &own(me));
                    ends.insert(me, end);
                    air.extend(sends.into_iter().map(|(to, part)| (me, to, part)));
                }
                for (nth, at) in order.iter().enumerate() {
                    if air.is_empty() {
                        break;
                    }
                    let at = at.index(air.len());
                    let (from, to, part) = air[at].clone();
                    let end = ends.get_mut(&to).unwrap();
                    prop_assert!(!end.take(from, OTHER, "stray".to_string()));
                    end.take(from, TAG, part);
                    if doubled >> (nth % 64) & 1 == 0 {
                        air.remove(at);
                    }
                }
                for (from, to, part) in air {
                    ends.get_mut(&to).unwrap().take(from, TAG, part);
                }
                for (&me, end) in &ends {
                    let place = ranks.iter().position(|&rank| rank == me).unwrap();
                    let expected: String = match kind {
                        Kind::AllGather | Kind::AllReduce | Kind::Barrier => {
                            ranks.iter().map(|rank| format!("{rank}.0 ")).collect()
                        }
                        Kind::Broadcast { root } => format!("{root}.0 "),
                        Kind::AllToAll => ranks.iter().map(|rank| format!("{rank}.{place} ")).collect(),
                    };
                    prop_assert_eq!(end.missing().count(), 0);
                    prop_assert_eq!(end.reduced(|sum, part| sum + &part), Some(expected));
                }
            }
        }
    }

    #[test]
    fn nothing_comes_of_an_exchange_that_somebody_has_not_joined() {
        let plan = Plan::new(Kind::AllGather, group(0b1011));
        let (mut end, sends) = Exchange::begin(plan, TAG, 1, &["one"]);
        assert_eq!(sends, [(3, "one"), (0, "one")]);
        assert!(end.take(0, TAG, "zero") && !end.take(0, TAG, "again") && !end.take(2, TAG, "nobody"));
        assert_eq!((end.missing().collect::<Vec<_>>(), end.parts()), (vec![3], None));
        assert!(end.take(3, TAG, "three"));
        assert_eq!(end.parts(), Some(vec![(0, "zero"), (1, "one"), (3, "three")]));
    }
}
