//! A cluster of processes: [`head`] is the supervisor's process with the clients, [`rank`] a node's.
//!
//! All decisions are the core's (`docs/cluster.md`): a node drives a `Peer` as [`node::Node`](crate::node::Node) drives an
//! engine, the head drives a `Supervisor`. Both say everything again until it is answered, so that a message that is lost
//! does no harm.

pub mod agent;
mod book;
mod elsewhere;
pub mod head;
mod processes;
pub mod rank;
mod requests;
mod said;
mod wishes;

pub use agent::AgentOptions;
pub use head::{ClusterStatus, Head, HeadOptions};
pub use processes::end_all;
pub use rank::RankOptions;
pub use said::is_said;

use crate::net::NetError;
use crate::node::NodeError;
use std::io;

/// Why a process of a cluster cannot go on.
#[derive(Debug, thiserror::Error)]
pub enum ClusterError {
    /// Model, journal or a thread of it.
    #[error(transparent)]
    Node(#[from] NodeError),
    /// The network.
    #[error(transparent)]
    Net(#[from] NetError),
    /// A process cannot be started or ended.
    #[error("cannot {what} a node's process: {source}")]
    Process {
        /// What.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
    /// A file of the cluster cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    File {
        /// Which.
        path: std::path::PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The cluster refuses this node, or cannot go on.
    #[error("{0}")]
    Refused(String),
    /// The log of this rank does not lead where its leader's does.
    #[error(
        "record {seq} of this rank's log has digest {found}, and its leader's {expected}: one of them has computed something \
         else; compare their journals"
    )]
    Diverged {
        /// Before which record.
        seq: lite_llm_core::ids::Seq,
        /// The leader's.
        expected: lite_llm_core::digest::Digest,
        /// This rank's.
        found: lite_llm_core::digest::Digest,
    },
}
