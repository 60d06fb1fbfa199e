//! A read-only look at a supervisor, for drivers, checkers and status pages.

use super::node::Life;
use super::{State, Supervisor};
use crate::cluster::membership::{Epoch, Member, Membership, NodeId};
use crate::ids::index;
use crate::time::Time;

/// What may be looked at.
#[derive(Clone, Copy, Debug)]
pub struct SupervisorView<'a>(&'a State);

/// Where a node is in its present life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Over; the next one begins soon.
    Down,
    /// Started, and not yet heard.
    Starting,
    /// It beats.
    Up,
    /// It is to end, and may still run.
    Fencing,
    /// Over; its log is being captured.
    Capturing,
    /// Over, and the operator's.
    GivenUp,
    /// Over after a drain.
    Stopped,
}

impl Supervisor {
    /// What may be looked at.
    #[must_use]
    pub const fn view(&self) -> SupervisorView<'_> {
        SupervisorView(self.folded())
    }
}

impl<'a> SupervisorView<'a> {
    /// The newest epoch that was given.
    #[must_use]
    pub const fn epoch(&self) -> Epoch {
        self.0.epoch
    }

    /// The membership of each replica that has one, and whether it is active.
    pub fn memberships(&self) -> impl Iterator<Item = (&'a Membership, bool)> + use<'a> {
        self.0.replicas.iter().filter_map(|replica| Some((replica.membership.as_ref()?, replica.active)))
    }

    /// The newest life of each node, and where it is in it.
    pub fn nodes(&self) -> impl Iterator<Item = (Member, Standing)> + use<'a> {
        self.0.ids().map(|id| {
            let node = &self.0.nodes[index(id.0)];
            let standing = match node.life {
                Life::Down { .. } => Standing::Down,
                Life::Starting { .. } => Standing::Starting,
                Life::Up => Standing::Up,
                Life::Fencing { .. } => Standing::Fencing,
                Life::Capturing => Standing::Capturing,
                Life::GivenUp => Standing::GivenUp,
                Life::Stopped => Standing::Stopped,
            };
            (node.member(id), standing)
        })
    }

    /// The version of the optimizer's shards that every rank has had, and the newest that all had on disk.
    #[must_use]
    pub const fn shards(&self) -> (u64, u64) {
        self.0.shards.versions()
    }

    /// Until when a node may believe to hold a lease, by the supervisor's clock.
    #[must_use]
    pub fn lease_until(&self, node: NodeId) -> Option<Time> {
        self.0.nodes.get(index(node.0)).map(|node| node.lease_until)
    }

    /// Whether it has asked to exit.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.0.over
    }
}
