//! A generation means one thing for ever, and generations come in order.

use super::Checker;
use crate::cluster::watch::Fact;
use lite_llm_core::ids::Generation;
use std::collections::BTreeMap;

/// Every rank enters the same generations with the same tiers.
#[derive(Debug, Default)]
pub struct GenerationsFixed(BTreeMap<(u32, Generation), Vec<u32>>);

impl Checker for GenerationsFixed {
    fn name(&self) -> &'static str {
        "generations-fixed"
    }

    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
        let Fact::Entered { replica, generation, tiers } = *fact else { return Ok(()) };
        let known = self.0.entry((replica, generation)).or_insert_with(|| tiers.to_vec());
        if known == tiers {
            return Ok(());
        }
        Err(format!("generation {generation} of replica {replica} has tiers {tiers:?}, and had {known:?}"))
    }
}
