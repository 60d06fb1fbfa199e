//! How a cluster stands: what the supervisor knows, the nodes' processes, and what the engines of the leaders are doing.

use super::Loop;
use crate::node::Status;
use lite_llm_core::cluster::membership::{Member, Membership};
use lite_llm_core::cluster::orders::{Activity, LogEnd};
use lite_llm_core::cluster::supervisor::{ClusterConfig, Failure, ReplicaStanding, Standing};
use lite_llm_core::ids::{Incarnation, RequestId, Seq};
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// How a cluster stands.
#[derive(Clone, Debug)]
pub struct ClusterStatus {
    /// The life of the supervisor.
    pub incarnation: Incarnation,
    /// How it is run.
    pub config: ClusterConfig,
    /// Whether it drains.
    pub draining: bool,
    /// In their order.
    pub replicas: Vec<ReplicaStatus>,
    /// In their order.
    pub nodes: Vec<NodeStatus>,
    /// Requests that a client of this process waits for: whose replica, and the tokens that it was told, up to an offset.
    pub told: BTreeMap<RequestId, (u32, u32)>,
}

/// How a replica stands.
#[derive(Clone, Debug)]
pub struct ReplicaStatus {
    /// Who is in it, if anybody was ever.
    pub membership: Option<Membership>,
    /// Where it is.
    pub standing: ReplicaStanding,
    /// A record that is known to be committed.
    pub committed: Seq,
    /// What the engine of its leader is doing; `None` if it does not lead yet, or does not answer.
    pub leader: Option<Status>,
}

/// How a node stands.
#[derive(Clone, Debug)]
pub struct NodeStatus {
    /// Its newest life.
    pub member: Member,
    /// Where it is in it.
    pub standing: Standing,
    /// Its process, if it is on this machine and there.
    pub pid: Option<u32>,
    /// Where its agent is, if it is on another machine.
    pub agent: Option<SocketAddr>,
    /// The replica that it has a seat in, or had last, and its rank there if it is a member now.
    pub replica: Option<u32>,
    /// See `replica`.
    pub rank: Option<u32>,
    /// What it was doing, and where its log ended, when it last said so.
    pub beat: Option<(Activity, LogEnd)>,
    /// How the last life ended whose end was recorded.
    pub failure: Option<Failure>,
    /// Why it is given up, and the remedy.
    pub given_up: Option<String>,
    /// Restarts that count against the budget.
    pub restarts: u32,
}

impl Loop {
    /// How everything stands, with what leaders said of themselves.
    pub(super) fn status(&self, mut seen: BTreeMap<Member, Status>) -> ClusterStatus {
        let (view, now) = (self.supervisor.view(), self.supervisor.now());
        let replicas = view.replicas(now).map(|replica| ReplicaStatus {
            membership: replica.membership.cloned(),
            standing: replica.standing,
            committed: replica.committed,
            leader: replica.membership.and_then(|membership| seen.remove(&membership.leading())),
        });
        let replicas: Vec<ReplicaStatus> = replicas.collect();
        let rank_of =
            |member: Member| replicas.iter().find_map(|replica| replica.membership.as_ref()?.rank_of(member));
        let nodes = view.nodes().filter_map(|(member, _)| {
            let node = view.node(member.node, now)?;
            Some(NodeStatus {
                member,
                standing: node.standing,
                pid: self.processes.pid(member),
                agent: self.elsewhere.agent(member.node),
                replica: node.replica,
                rank: rank_of(member),
                beat: node.beat.map(|beat| (beat.activity, beat.log)),
                failure: node.failure.cloned(),
                given_up: node.given_up.map(str::to_owned),
                restarts: node.restarts,
            })
        });
        ClusterStatus {
            incarnation: view.incarnation(),
            config: view.config().clone(),
            draining: view.is_draining(),
            nodes: nodes.collect(),
            replicas,
            told: self.requests.told(),
        }
    }
}
