//! A cluster: replicas of a model, each spread over ranks, under one supervisor.
//!
//! All ranks of a replica fold the same journal. The leader orders inputs; a record counts once it is durable on every
//! member of the epoch, so any member can lead the next epoch, and nothing that was told is lost with a machine.
//! Epochs are the supervisor's: it names the members before anybody may act in it, and marks an epoch active once its
//! members have one log. `docs/cluster.md` says why this is enough.

pub mod collective;
mod gather;
mod link;
pub mod membership;
pub mod message;
pub mod orders;
pub mod peer;
pub mod shards;
pub mod supervisor;

pub use link::LinkHeader;
