//! Nodes on other machines, as the head sees them: who their agents are, and what is wanted of each.

use super::said::{AgentSays, Ended, Wanted};
use lite_llm_core::cluster::membership::{Member, NodeId};
use lite_llm_core::cluster::supervisor::Ending;
use lite_llm_core::ids::Seq;
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::Range;
use std::time::{Duration, Instant};

/// A node whose agent was not heard for so long may have another.
const SILENCE: Duration = Duration::from_secs(10);

/// What a life left: the end of its log, and its journal's end as JSON.
pub(super) type Left = (Result<Option<Seq>, String>, String);

#[derive(Debug)]
struct Agent {
    address: SocketAddr,
    heard: Instant,
}

/// The nodes of other machines.
#[derive(Debug)]
pub(super) struct Elsewhere {
    nodes: Range<u32>,
    agents: BTreeMap<NodeId, Agent>,
    start: BTreeMap<NodeId, Member>,
    kill: BTreeMap<NodeId, Member>,
    left: BTreeMap<Member, Left>,
    /// Ends that nobody has to confirm.
    ended: Vec<(Member, Ending)>,
}

impl Elsewhere {
    pub(super) const fn new(nodes: Range<u32>) -> Self {
        Self {
            nodes,
            agents: BTreeMap::new(),
            start: BTreeMap::new(),
            kill: BTreeMap::new(),
            left: BTreeMap::new(),
            ended: Vec::new(),
        }
    }

    pub(super) fn has(&self, node: NodeId) -> bool {
        self.nodes.contains(&node.0)
    }

    /// Where the agent of a node is, if it has one.
    pub(super) fn agent(&self, node: NodeId) -> Option<SocketAddr> {
        self.agents.get(&node).map(|agent| agent.address)
    }

    /// A life is to begin, as soon as there is an agent.
    pub(super) fn start(&mut self, member: Member) {
        self.start.insert(member.node, member);
    }

    /// A life is to end. One that no agent ever had does not exist.
    pub(super) fn kill(&mut self, member: Member) {
        if self.start.get(&member.node) == Some(&member) {
            self.start.remove(&member.node);
        }
        if self.agents.contains_key(&member.node) {
            self.kill.insert(member.node, member);
        } else {
            self.ended.push((member, Ending::Unknown));
        }
    }

    /// Ends since the last look.
    pub(super) fn poll(&mut self) -> Vec<(Member, Ending)> {
        std::mem::take(&mut self.ended)
    }

    /// What a life left, said once.
    pub(super) fn take_left(&mut self, member: Member) -> Left {
        self.left.remove(&member).unwrap_or((Err("its machine was not heard".into()), "null".into()))
    }

    /// An agent says how it stands: where to answer, what, and which node has an agent now that had none.
    pub(super) fn hear(&mut self, says: AgentSays, settings: &str) -> (SocketAddr, Wanted, Option<NodeId>) {
        let AgentSays { node, address, ended } = says;
        let free = |node: &NodeId| {
            let agent = self.agents.get(node);
            agent.is_none_or(|agent| agent.address == address || agent.heard.elapsed() > SILENCE)
        };
        let mine = |node: NodeId| self.nodes.contains(&node.0);
        let known = self.agents.iter().find(|(_, agent)| agent.address == address).map(|(&node, _)| node);
        let own = node.filter(|&node| mine(node)).filter(free);
        let fresh = || self.nodes.clone().map(NodeId).find(free);
        let Some(node) = own.or(known).or_else(|| if node.is_none() { fresh() } else { None }) else {
            let refused = Some(match node {
                Some(node) => {
                    format!("{node} has another agent, or is none of this cluster's: give another --state")
                }
                None => "every node has an agent: raise --elsewhere".to_owned(),
            });
            let wanted = Wanted { refused, ..Wanted::of(NodeId(0)) };
            return (address, wanted, None);
        };
        let new = self.agents.insert(node, Agent { address, heard: Instant::now() }).is_none();
        let mut wanted = Wanted::of(node);
        for Ended { member, ending, tail, journal } in ended {
            wanted.known.push(member);
            for wish in [&mut self.start, &mut self.kill] {
                if wish.get(&node) == Some(&member) {
                    wish.remove(&node);
                }
            }
            self.left.insert(member, (tail, journal));
            self.ended.push((member, ending));
        }
        // Old ones are asked for by nobody.
        while self.left.len() > 64 {
            self.left.pop_first();
        }
        settings.clone_into(&mut wanted.settings);
        (wanted.start, wanted.kill) = (self.start.get(&node).copied(), self.kill.get(&node).copied());
        (address, wanted, new.then_some(node))
    }
}
