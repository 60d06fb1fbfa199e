//! What must hold in every run, each rule as a checker that is told facts and shares no code with what it checks.
//!
//! An embedder's own rules are checkers too: give them to [`ClusterSetup`](super::run::ClusterSetup).

mod committed;
mod generations;
mod leases;
mod queues;

pub use committed::{CommittedOnce, first_bytes};
pub use generations::GenerationsFixed;
pub use leases::LeasesApart;
pub use queues::QueuesBounded;

use super::watch::Fact;
use lite_llm_core::topology::Topology;

/// A rule.
pub trait Checker {
    /// Its name, as failures show it.
    fn name(&self) -> &'static str;

    /// Takes a fact.
    ///
    /// # Errors
    /// What is wrong, for people: the run ends.
    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String>;
}

/// The rules of every cluster.
#[must_use]
pub fn all(topology: &Topology) -> Vec<Box<dyn Checker>> {
    vec![
        Box::new(CommittedOnce::new(topology)),
        Box::new(LeasesApart::default()),
        Box::new(GenerationsFixed::default()),
        Box::new(QueuesBounded),
    ]
}
