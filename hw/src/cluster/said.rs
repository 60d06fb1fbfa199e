//! What processes of a cluster say to each other.

use lite_llm_core::cluster::membership::NodeId;
use lite_llm_core::cluster::message::Message;
use lite_llm_core::cluster::orders::{Beat, Orders};
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
