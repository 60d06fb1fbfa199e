//! Who is in a replica, in which epoch and life.

use crate::ids::{Incarnation, index, len32};
use alloc::vec::Vec;
use core::fmt;
use serde::{Deserialize, Serialize};

/// A node of the cluster: a process on a machine with a disk of its own.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NodeId(pub u32);

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "node {}", self.0)
    }
}

/// A configuration of a replica; grows with every change, over all replicas of a cluster.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Epoch(pub u64);

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "epoch {}", self.0)
    }
}

/// One life of a node. A node that was restarted is another member, so nothing of its former life counts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Member {
    /// Which node.
    pub node: NodeId,
    /// Which life.
    pub incarnation: Incarnation,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in incarnation {}", self.node, self.incarnation)
    }
}

/// The members of a replica in an epoch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Membership {
    /// Which replica, from 0.
    pub replica: u32,
    /// Which epoch.
    pub epoch: Epoch,
    /// One for each rank, in the order of ranks.
    pub members: Vec<Member>,
    /// The rank that leads.
    pub leader: u32,
}

impl Membership {
    /// The rank of a node, if it is a member in this life.
    #[must_use]
    pub fn rank_of(&self, member: Member) -> Option<u32> {
        self.members.iter().position(|&other| other == member).map(len32)
    }

    /// The member that leads.
    ///
    /// # Panics
    /// If the leader is no rank of the membership.
    #[must_use]
    pub fn leading(&self) -> Member {
        self.members[index(self.leader)]
    }
}
