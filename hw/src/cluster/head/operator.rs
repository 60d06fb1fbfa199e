//! What the operator asks of a running cluster, and who waits for which answer.

use super::Loop;
use super::handle::Reply;
use super::status::ClusterStatus;
use crate::cluster::said::Said;
use crate::cluster::wishes::Wishes;
use crate::node::Status;
use lite_llm_core::cluster::membership::{Member, NodeId};
use lite_llm_core::cluster::supervisor::{Standing, SupervisorInput};
use lite_llm_core::ids::Incarnation;
use lite_llm_core::input::Wish;
use lite_llm_core::output::Granted;
use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

/// How long leaders may take to say what they are doing. One that does not is left out.
const SEEN_WAIT: Duration = Duration::from_secs(2);

/// Something that is asked, and where the answer goes.
#[derive(Debug)]
pub(super) enum Asked {
    Wish { replica: u32, wish: Wish, reply: Reply<Granted> },
    Restart { node: NodeId, reply: Reply<Incarnation> },
    Status { reply: Reply<ClusterStatus> },
}

/// Somebody waits to hear how things stand.
#[derive(Debug)]
struct Look {
    /// Leaders that have not said yet what they are doing.
    missing: BTreeSet<Member>,
    seen: BTreeMap<Member, Status>,
    until: Instant,
    reply: Reply<ClusterStatus>,
}

/// Somebody waits for the next life of a node.
#[derive(Debug)]
struct Restart {
    former: Member,
    reply: Reply<Incarnation>,
}

/// Everybody who waits for something.
#[derive(Debug, Default)]
pub(super) struct Operator {
    pub(super) wishes: Wishes,
    looks: Vec<Look>,
    restarts: Vec<Restart>,
}

impl Operator {
    /// When something is due if nothing happens.
    pub(super) fn again(&self) -> Option<Instant> {
        self.looks.iter().map(|look| look.until).chain(self.wishes.again()).min()
    }

    /// A leader says what it is doing.
    pub(super) fn seen(&mut self, member: Member, status: Status) {
        for look in &mut self.looks {
            if look.missing.remove(&member) {
                look.seen.insert(member, status.clone());
            }
        }
    }
}

impl Loop {
    /// The operator asks something.
    pub(super) fn asked(&mut self, asked: Asked) {
        match asked {
            Asked::Wish { replica, wish, reply } => self.operator.wishes.add(replica, wish, reply),
            Asked::Restart { node, reply } => self.restart(node, reply),
            Asked::Status { reply } => self.look(reply),
        }
    }

    /// Has a node begin a new life. That it was asked for is journalled: the next life of this process knows it.
    fn restart(&mut self, node: NodeId, reply: Reply<Incarnation>) {
        let view = self.supervisor.view();
        let Some((former, standing)) = view.nodes().find(|(member, _)| member.node == node) else {
            let last = view.nodes().count().saturating_sub(1);
            return reply.send(Err(format!("{node} is none of this cluster's: give one of 0 to {last}")));
        };
        if standing == Standing::Stopped {
            return reply.send(Err(stopped(node)));
        }
        self.inbox.push_back(SupervisorInput::Restart { node });
        self.operator.restarts.push(Restart { former, reply });
    }

    /// Asks the leaders what they are doing.
    fn look(&mut self, reply: Reply<ClusterStatus>) {
        let leaders = self.supervisor.view().memberships().filter(|(_, active)| *active);
        let leaders: BTreeSet<Member> = leaders.map(|(membership, _)| membership.leading()).collect();
        for to in leaders.iter().filter_map(|&member| self.book.of(member)) {
            self.mesh.send(to, Said::Look.encode());
        }
        let until = Instant::now() + SEEN_WAIT;
        self.operator.looks.push(Look { missing: leaders, seen: BTreeMap::new(), until, reply });
    }

    /// Answers what can be answered now: nothing is waiting in the inbox.
    pub(super) fn attend(&mut self) {
        let now = Instant::now();
        let ready = |look: &mut Look| look.missing.is_empty() || look.until <= now;
        let looks: Vec<Look> = self.operator.looks.extract_if(.., ready).collect();
        for Look { seen, reply, .. } in looks {
            reply.send(Ok(self.status(seen)));
        }
        let view = self.supervisor.view();
        for waiting in std::mem::take(&mut self.operator.restarts) {
            let node = waiting.former.node;
            let now = view.node(node, self.supervisor.now()).expect("no node goes");
            if let Some(reason) = now.given_up {
                waiting.reply.send(Err(format!("{node} is given up: {reason}")));
            } else if now.standing == Standing::Stopped {
                waiting.reply.send(Err(stopped(node)));
            } else if now.member.incarnation > waiting.former.incarnation {
                waiting.reply.send(Ok(now.member.incarnation));
            } else if waiting.reply.is_awaited() {
                self.operator.restarts.push(waiting);
            }
        }
    }
}

fn stopped(node: NodeId) -> String {
    format!("{node} has stopped: the cluster drains, and begins everything again when it is started")
}
