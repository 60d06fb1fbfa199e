//! Nodes of a simulated cluster, from the production core: what a driver of a real machine does with disks, in the
//! hands of a run's decisions.

pub mod check;
pub mod clients;
pub mod journal;
pub mod luck;
pub mod message;
pub mod node;
pub mod operator;
pub mod run;
#[cfg(feature = "proptest")]
pub mod strategy;
pub mod supervisor;
pub mod watch;
