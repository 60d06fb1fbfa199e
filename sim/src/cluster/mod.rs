//! Nodes of a simulated cluster, from the production core: what a driver of a real machine does with disks, in the
//! hands of a run's decisions.

pub mod journal;
pub mod message;
pub mod supervisor;
