//! What processes of a cluster say to each other.

use crate::node::Status;
use lite_llm_core::cluster::membership::{Member, NodeId};
use lite_llm_core::cluster::message::Message;
use lite_llm_core::cluster::orders::{Beat, Orders};
use lite_llm_core::cluster::supervisor::Ending;
use lite_llm_core::ids::Seq;
use lite_llm_core::input::Input;
use lite_llm_core::output::Output;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;

/// A message between two processes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) enum Said {
    /// Between ranks.
    Rank(Box<Message>),
    /// From a node: how it stands, and where it is to be told.
    Beat { beat: Box<Beat>, address: SocketAddr },
    /// To a node: how things stand, and where everybody is.
    Orders { orders: Box<Orders>, book: Vec<(NodeId, SocketAddr)> },
    /// To a node, from the clients.
    Ask { replica: u32, input: Box<Input> },
    /// From a node, to the clients.
    Tell(Box<Output>),
    /// From a node: what was asked is not taken, and why.
    Refused { input: Box<Input>, reason: String },
    /// To a node: say what you are doing.
    Look,
    /// From a node: what it is doing.
    Seen { member: Member, status: Box<Status> },
    /// From the agent of a node on another machine.
    Agent(Box<AgentSays>),
    /// To it.
    Wanted(Box<Wanted>),
}

/// How an agent stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct AgentSays {
    /// Which node it is, if it was one before.
    pub(super) node: Option<NodeId>,
    /// Where it is to be told.
    pub(super) address: SocketAddr,
    /// Lives that are over, until the head knows.
    pub(super) ended: Vec<Ended>,
}

/// The end of a life.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Ended {
    pub(super) member: Member,
    pub(super) ending: Ending,
    /// The last record of its journal, or why it cannot be read.
    pub(super) tail: Result<Option<Seq>, String>,
    /// The end of its journal, as JSON.
    pub(super) journal: String,
}

/// What an agent is to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Wanted {
    /// Which node it is.
    pub(super) node: NodeId,
    /// What all nodes are started with.
    pub(super) settings: String,
    /// A life that is to run, unless it has ended.
    pub(super) start: Option<Member>,
    /// A life that is to end.
    pub(super) kill: Option<Member>,
    /// Ends that the head knows.
    pub(super) known: Vec<Member>,
    /// Why there is nothing for it to do.
    pub(super) refused: Option<String>,
}

impl Wanted {
    pub(super) const fn of(node: NodeId) -> Self {
        Self { node, settings: String::new(), start: None, kill: None, known: Vec::new(), refused: None }
    }
}

/// Whether bytes are what processes of a cluster say to each other; for those who attack it.
///
/// # Panics
/// If what was read is not written as it was.
#[must_use]
pub fn is_said(bytes: &[u8]) -> bool {
    Said::decode(bytes).is_some_and(|said| {
        let again = said.encode();
        assert_eq!(Said::decode(&again).expect("what is written can be read").encode(), again);
        true
    })
}

impl Said {
    pub(super) fn encode(&self) -> Vec<u8> {
        postcard::to_allocvec(self).expect("the vocabulary always encodes")
    }

    /// `None` for what is none: whoever sent it has the key, and another version.
    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        postcard::take_from_bytes(bytes).ok().filter(|(_, rest)| rest.is_empty()).map(|(said, _)| said)
    }
}
