//! What must hold in every run, each rule as a checker that is told facts and shares no code with what it checks.
//!
//! An embedder's own rules are checkers too, and take part in every run:
//!
//! ```
//! use lite_llm_sim::cluster::check::Checker;
//! use lite_llm_sim::cluster::run::{ClusterSetup, run};
//! use lite_llm_sim::cluster::watch::Fact;
//! use std::rc::Rc;
//!
//! /// No node tells more than so much in a run.
//! struct Quota(u64);
//!
//! impl Checker for Quota {
//!     fn name(&self) -> &'static str {
//!         "quota"
//!     }
//!
//!     fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
//!         self.0 -= u64::from(matches!(fact, Fact::Told { .. }));
//!         if self.0 == 0 { Err("somebody tells too much".into()) } else { Ok(()) }
//!     }
//! }
//!
//! let more = Rc::new(|| vec![Box::new(Quota(100_000)) as Box<dyn Checker>]);
//! let report = run(&ClusterSetup { checkers: Some(more), ..ClusterSetup::of(7) });
//! assert_eq!(report.violation, None);
//! ```

mod committed;
mod generations;
mod leases;
mod queues;
mod shards;
mod wishes;

pub use committed::{CommittedOnce, first_bytes};
pub use generations::GenerationsFixed;
pub use leases::LeasesApart;
pub use queues::QueuesBounded;
pub use shards::ShardsOne;
pub use wishes::WishesOnce;

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
        Box::new(WishesOnce::default()),
    ]
}
