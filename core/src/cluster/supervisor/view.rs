//! A read-only look at a supervisor, for drivers, checkers and status pages.

use super::node::{Life, Node};
use super::replica::Missing;
use super::words::Failure;
use super::{ClusterConfig, State, Supervisor};
use crate::cluster::membership::{Epoch, Member, Membership, NodeId};
use crate::cluster::orders::Beat;
use crate::ids::{Incarnation, Seq, index};
use crate::time::Time;
use alloc::{string::String, vec::Vec};

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

/// What is known of a node.
#[derive(Clone, Copy, Debug)]
pub struct NodeView<'a> {
    /// Its newest life.
    pub member: Member,
    /// Where it is in it.
    pub standing: Standing,
    /// What it last said of itself in this life.
    pub beat: Option<&'a Beat>,
    /// The replica that it has a seat in, or had last.
    pub replica: Option<u32>,
    /// How the last life ended whose end was recorded.
    pub failure: Option<&'a Failure>,
    /// Why it is given up, and the remedy.
    pub given_up: Option<&'a str>,
    /// Restarts that count: more than the budget leave the node to the operator.
    pub restarts: u32,
}

/// Where a replica is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ReplicaStanding {
    /// Its leader may act.
    Active,
    /// The logs of its members are being made one.
    Joining,
    /// Too few nodes beat.
    WaitsForNodes,
    /// Only these nodes' disks hold what was told.
    WaitsForDisks(Vec<NodeId>),
    /// A leader that may still act is not to be replaced yet.
    WaitsForLease,
    /// It has finished everything.
    Drained,
    /// It never will, and why.
    Hopeless(String),
}

/// What is known of a replica.
#[derive(Clone, Debug)]
pub struct ReplicaView<'a> {
    /// Who is in it, if anybody was ever.
    pub membership: Option<&'a Membership>,
    /// Where it is.
    pub standing: ReplicaStanding,
    /// A record that is known to be committed, and with it all before it.
    pub committed: Seq,
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
            (node.member(id), standing(node))
        })
    }

    /// Whether a replica that has not finished waits for a node that only the operator has begin again.
    #[must_use]
    pub fn needs_operator(&self) -> bool {
        let replicas = (0..).zip(&self.0.replicas);
        replicas.filter(|(_, replica)| !replica.is_over()).any(|(id, _)| self.0.lacks_nodes(id))
    }

    /// The version of the optimizer's shards that every rank has had, and the newest that all had on disk.
    #[must_use]
    pub const fn shards(&self) -> (u64, u64) {
        self.0.shards.versions()
    }

    /// All that is known of a node at a time; `None` if the cluster has none of this number.
    #[must_use]
    pub fn node(&self, id: NodeId, now: Time) -> Option<NodeView<'a>> {
        let node = self.0.nodes.get(index(id.0))?;
        Some(NodeView {
            member: node.member(id),
            standing: standing(node),
            beat: node.beat.as_ref(),
            replica: node.home,
            failure: node.failure.as_ref(),
            given_up: node.hopeless.as_deref().filter(|_| node.life == Life::GivenUp),
            restarts: node.restarts_within(now, self.0.config.restarts.window_ns),
        })
    }

    /// All that is known of each replica at a time, in their order.
    pub fn replicas(&self, now: Time) -> impl Iterator<Item = ReplicaView<'a>> + use<'a> {
        let state = self.0;
        (0..).zip(&state.replicas).map(move |(id, replica)| {
            let standing = if replica.drained.is_some() {
                ReplicaStanding::Drained
            } else if let Some(reason) = &replica.hopeless {
                ReplicaStanding::Hopeless(reason.clone())
            } else if state.is_whole(replica) {
                if replica.active { ReplicaStanding::Active } else { ReplicaStanding::Joining }
            } else if now < state.quiet_until {
                ReplicaStanding::WaitsForLease
            } else {
                match state.choose(now, id) {
                    Ok(_) => ReplicaStanding::Joining,
                    Err(Missing::Nodes) => ReplicaStanding::WaitsForNodes,
                    Err(Missing::Holder) => ReplicaStanding::WaitsForDisks(replica.holders()),
                    Err(Missing::Fence) => ReplicaStanding::WaitsForLease,
                }
            };
            ReplicaView { membership: replica.membership.as_ref(), standing, committed: replica.floor() }
        })
    }

    /// How the cluster is run.
    #[must_use]
    pub const fn config(&self) -> &'a ClusterConfig {
        &self.0.config
    }

    /// The life of the supervisor.
    #[must_use]
    pub const fn incarnation(&self) -> Incarnation {
        self.0.incarnation
    }

    /// Whether everything is to finish and stop.
    #[must_use]
    pub const fn is_draining(&self) -> bool {
        self.0.drain.is_some()
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

const fn standing(node: &Node) -> Standing {
    match node.life {
        Life::Down { .. } => Standing::Down,
        Life::Starting { .. } => Standing::Starting,
        Life::Up => Standing::Up,
        Life::Fencing { .. } => Standing::Fencing,
        Life::Capturing => Standing::Capturing,
        Life::GivenUp => Standing::GivenUp,
        Life::Stopped => Standing::Stopped,
    }
}
