//! The supervisor of a cluster: who is which rank in which epoch, who leads, who is dead, and who is started again.
//!
//! It has the engine's door (`crate::chain`): inputs are journalled, outputs wait for the journal where they say so, and a
//! restart folds the journal and feeds `Started`. What nodes say is their whole standing each time, so is what they are
//! told; a lost message costs time and nothing else. `docs/cluster.md` says why this keeps every promise.
//!
//! The driver gives every message that is there before it gives a `Tick`: nodes are suspected on ticks only.

mod config;
mod detector;
mod node;
mod replica;
mod shards;
mod view;
mod words;

pub use config::{ClusterConfig, Restarts, Training};
pub use detector::{Patience, Suspicion};
pub use view::{NodeView, ReplicaStanding, ReplicaView, Standing, SupervisorView};
pub use words::{Cause, Ending, Failure, SupervisorEvent, SupervisorInput, SupervisorOutput};

use super::membership::Epoch;
use crate::chain::{self, Chain, Fold};
use crate::digest::Digest;
use crate::ids::{Incarnation, Seq, index};
use crate::time::Time;
use alloc::{format, string::String, vec::Vec};
use node::Node;
use replica::Replica;
use serde::{Deserialize, Serialize};
use shards::Shards;

/// The state machine of a cluster's supervisor.
pub type Supervisor = Chain<State>;

type Context<'a> = chain::Context<'a, SupervisorOutput>;

impl Context<'_> {
    fn event(&mut self, event: SupervisorEvent) {
        let seq = self.seq;
        self.say(SupervisorOutput::Event { seq, event });
    }
}

/// Everything that a supervisor remembers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    incarnation: Incarnation,
    config: ClusterConfig,
    nodes: Vec<Node>,
    replicas: Vec<Replica>,
    /// The newest that was given to any replica.
    epoch: Epoch,
    /// The input of the last decision that orders rest on.
    decided: Seq,
    /// Until then a former life of the supervisor may have given leases that this one does not know.
    quiet_until: Time,
    drain: Option<Drain>,
    shards: Shards,
    over: bool,
}

/// What the operator wishes.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Drain {
    until: Option<Time>,
}

impl Fold for State {
    type Input = SupervisorInput;
    type Output = SupervisorOutput;

    fn handle(&mut self, cx: &mut Context<'_>, input: SupervisorInput) {
        if self.over && !matches!(input, SupervisorInput::Started { .. }) {
            return;
        }
        match input {
            SupervisorInput::Started { incarnation, config } => self.started(cx, incarnation, config),
            SupervisorInput::Beat(beat) => self.beat(cx, *beat),
            SupervisorInput::Ended { member, ending } => self.ended(cx, member, ending),
            SupervisorInput::Captured { member, tail } => self.captured(cx, member, tail),
            SupervisorInput::Restart { node } => self.restart(cx, node),
            SupervisorInput::Drain { bound_ns } => self.drain(cx, bound_ns),
            SupervisorInput::Tick => {
                self.forgive(cx.now);
                self.suspect(cx);
            }
        }
        if !self.over {
            self.assemble(cx);
            self.train(cx);
            self.finish(cx);
            self.start(cx);
            self.stop(cx);
        }
    }

    fn wait(&self, now: Time) -> SupervisorOutput {
        SupervisorOutput::Wait { until: self.until(now) }
    }

    fn is_wait(output: &SupervisorOutput) -> bool {
        matches!(output, SupervisorOutput::Wait { .. })
    }

    fn state_digest(seq: Seq, digest: Digest) -> SupervisorOutput {
        SupervisorOutput::Event { seq, event: SupervisorEvent::State { digest } }
    }

    fn check(&self) {
        self.assert_invariants();
    }
}

impl State {
    fn started(&mut self, cx: &mut Context<'_>, incarnation: Incarnation, config: ClusterConfig) {
        assert!(
            incarnation > self.incarnation,
            "incarnation {incarnation} is not newer than {}",
            self.incarnation
        );
        let first = self.incarnation == Incarnation(0);
        self.incarnation = incarnation;
        self.decided = cx.seq;
        let topology = self.config.topology;
        if let Err(error) = config.check() {
            return self.exit(cx, Some(error));
        }
        if !first && (config.topology != topology || index(config.nodes) < self.nodes.len()) {
            return self.exit(
                cx,
                Some(format!(
                    "this cluster was begun with {topology:?} on {} nodes: its journals know no other ranks, and no \
                     fewer nodes",
                    self.nodes.len()
                )),
            );
        }
        // Leases of the former life are known, but not all of them: those are granted without waiting for the journal.
        self.quiet_until = if first { cx.now } else { cx.now.after_ns(self.config.longest_lease_ns()) };
        self.nodes.resize_with(index(config.nodes), || Node::new(cx.now));
        self.replicas.resize_with(index(config.topology.data), Replica::default);
        self.config = config;
        if core::mem::take(&mut self.over) {
            // The former life ended as it was meant to; this one begins everything again.
            self.drain = None;
            self.replicas.iter_mut().for_each(Replica::reopen);
            self.nodes.iter_mut().for_each(|node| node.reopen(cx.now));
        }
        self.shards.take_up();
        self.take_up_nodes(cx);
    }

    /// Ends the supervisor once nothing is left to supervise.
    fn stop(&mut self, cx: &mut Context<'_>) {
        if !self.nodes.iter().all(Node::is_over) {
            return;
        }
        let error = if self.drain.is_some() {
            let hopeless: Vec<&str> = self.replicas.iter().filter_map(|r| r.hopeless.as_deref()).collect();
            (!hopeless.is_empty()).then(|| hopeless.join("; "))
        } else {
            Some("no node is left that may be started: restart one, or drain".into())
        };
        self.exit(cx, error);
    }

    fn exit(&mut self, cx: &mut Context<'_>, error: Option<String>) {
        self.over = true;
        cx.say(SupervisorOutput::Exit { error, after: cx.seq });
    }

    /// When something is due without any input; a time that has passed wants a `Tick` at once.
    fn until(&self, now: Time) -> Option<Time> {
        if self.over {
            return None;
        }
        [self.nodes_until(), self.replicas_until(now), self.drain_until(now)].into_iter().flatten().min()
    }

    /// # Panics
    /// If an invariant does not hold.
    fn assert_invariants(&self) {
        let mut epochs = Vec::new();
        for (id, replica) in (0..).zip(&self.replicas) {
            replica.check();
            let Some(membership) = &replica.membership else { continue };
            assert_eq!(membership.replica, id, "a membership is its replica's");
            assert!(membership.epoch <= self.epoch, "no epoch is newer than the newest");
            epochs.push(membership.epoch);
            for member in &membership.members {
                let node = &self.nodes[index(member.node.0)];
                assert_eq!(node.home, Some(id), "a node has a seat in its own replica only");
                assert!(member.incarnation <= node.incarnation, "a member was started");
            }
        }
        self.shards.check(self.config.topology.ranks());
        epochs.sort_unstable();
        assert!(epochs.windows(2).all(|pair| pair[0] < pair[1]), "no epoch is given twice");
    }
}
