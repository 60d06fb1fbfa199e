//! Which copies of what may be damaged at once, so that no test makes a loss legal by accident.
//!
//! The journal of a replica is on the disk of each of its ranks, so all of them but one may be damaged; what one of
//! them lost it gets from another, and then it is whole again. A snapshot stands beside the records that made it on
//! other ranks. Manifest and shards come from a store that every node can read again: there any copy may be damaged.
//! In the unrestricted mode everything may be, and the oracle is: the right bytes, or a halt that says why.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;

/// What is damaged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum DataClass {
    /// Records: of a replica on all its ranks.
    Journal,
    /// Snapshots: the same.
    Snapshot,
    /// The manifest: of the checkpoint, which can be read again.
    Manifest,
    /// Shards: the same.
    Shards,
}

impl DataClass {
    /// Whether a copy that is lost can be had from outside the replica.
    const fn comes_from_outside(self) -> bool {
        matches!(self, Self::Manifest | Self::Shards)
    }
}

#[derive(Debug)]
struct Inner {
    unrestricted: bool,
    /// The nodes of each group that hold the same copies.
    groups: Vec<BTreeSet<u32>>,
    damaged: BTreeSet<u32>,
    /// How often each node's copies were damaged, by node as far as any were.
    damages: Vec<u64>,
    /// The first record that was durable on a node's disk and that damage took, until it has it from another.
    lost: BTreeMap<u32, u64>,
}

/// The atlas of a cluster; clones share it.
#[derive(Clone, Debug)]
pub struct Atlas(Rc<RefCell<Inner>>);

impl Atlas {
    /// An atlas of groups of nodes that hold copies of the same.
    #[must_use]
    pub fn new(groups: Vec<BTreeSet<u32>>, unrestricted: bool) -> Self {
        Self(Rc::new(RefCell::new(Inner {
            unrestricted,
            groups,
            damaged: BTreeSet::new(),
            damages: Vec::new(),
            lost: BTreeMap::new(),
        })))
    }

    /// Whether a node's copy may be damaged now; if so, it counts as damaged from now on.
    #[must_use]
    pub fn damage(&self, node: u32, class: DataClass) -> bool {
        let mut inner = self.0.borrow_mut();
        if class.comes_from_outside() {
            return true;
        }
        let whole_elsewhere = inner
            .groups
            .iter()
            .filter(|group| group.contains(&node))
            .all(|group| group.iter().any(|other| *other != node && !inner.damaged.contains(other)));
        let may = inner.unrestricted || (whole_elsewhere && inner.groups.iter().any(|g| g.contains(&node)));
        if may {
            inner.damaged.insert(node);
            let reach = inner.damages.len().max(node as usize + 1);
            inner.damages.resize(reach, 0);
            inner.damages[node as usize] += 1;
        }
        may
    }

    /// How often a node's copies were damaged so far: whoever reads all of them finds what came before.
    #[must_use]
    pub fn damages(&self, node: u32) -> u64 {
        self.0.borrow().damages.get(node as usize).copied().unwrap_or_default()
    }

    /// Whether anything may be damaged.
    #[must_use]
    pub fn is_unrestricted(&self) -> bool {
        self.0.borrow().unrestricted
    }

    /// A node has everything from others again.
    pub fn whole_again(&self, node: u32) {
        self.0.borrow_mut().damaged.remove(&node);
    }

    /// What was durable on a node's disk is not there, from this record on.
    pub fn lose(&self, node: u32, record: u64) {
        let lost = &mut self.0.borrow_mut().lost;
        let first = lost.entry(node).or_insert(record);
        *first = (*first).min(record);
    }

    /// A node has the log of a leader now: nothing is lost to it that the leader has.
    pub fn joined(&self, node: u32, leader: u32) {
        let lost = &mut self.0.borrow_mut().lost;
        let Some(own) = lost.get(&node).copied().filter(|_| node != leader) else { return };
        match lost.get(&leader).copied() {
            Some(first) => lost.insert(node, own.max(first)),
            None => lost.remove(&node),
        };
    }

    /// Whether damage took a record from every disk of a group.
    #[must_use]
    pub fn is_lost(&self, group: usize, record: u64) -> bool {
        self.group(group).into_iter().all(|node| self.is_lost_to(node, record))
    }

    /// Whether damage took a record from a node's disk, and nobody who has it led that node since.
    #[must_use]
    pub fn is_lost_to(&self, node: u32, record: u64) -> bool {
        self.0.borrow().lost.get(&node).is_some_and(|first| *first <= record)
    }

    /// The nodes now hold copies of the same: a spare has taken a place.
    pub fn regroup(&self, group: usize, nodes: BTreeSet<u32>) {
        self.0.borrow_mut().groups[group] = nodes;
    }

    /// The nodes of a group.
    #[must_use]
    pub fn group(&self, group: usize) -> BTreeSet<u32> {
        self.0.borrow().groups[group].clone()
    }

    /// Whether a node's copy counts as damaged.
    #[must_use]
    pub fn is_damaged(&self, node: u32) -> bool {
        self.0.borrow().damaged.contains(&node)
    }

    /// Whether every copy of a group is damaged: only then may it be that nothing goes on.
    #[must_use]
    pub fn is_gone(&self, group: usize) -> bool {
        let inner = self.0.borrow();
        inner.groups[group].iter().all(|node| inner.damaged.contains(node))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_copy_is_always_whole_unless_anything_goes() {
        let groups = || vec![BTreeSet::from([0, 1, 2]), BTreeSet::from([3])];
        let atlas = Atlas::new(groups(), false);
        assert!(atlas.damage(0, DataClass::Journal) && atlas.damage(2, DataClass::Snapshot));
        assert!(!atlas.damage(1, DataClass::Journal), "it is the last whole one");
        assert!(!atlas.damage(3, DataClass::Journal), "it is alone");
        assert!(!atlas.damage(9, DataClass::Journal), "it holds no copy");
        assert!(atlas.damage(3, DataClass::Shards) && !atlas.is_damaged(3));
        atlas.whole_again(0);
        assert!(atlas.damage(1, DataClass::Journal) && !atlas.is_gone(0));
        let atlas = Atlas::new(groups(), true);
        assert!((0..3).all(|node| atlas.damage(node, DataClass::Journal)));
        assert!(atlas.is_gone(0) && !atlas.is_gone(1));
    }
}
