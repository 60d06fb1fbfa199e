//! Nobody acts for a replica once somebody of a later epoch has.

use super::Checker;
use crate::cluster::watch::Fact;
use lite_llm_core::cluster::membership::{Epoch, Member, Membership};
use std::collections::BTreeMap;

/// Leases never overlap: who accepts or tells is of the newest epoch in which anybody did.
#[derive(Debug, Default)]
pub struct LeasesApart(BTreeMap<u32, (Epoch, Member)>);

impl LeasesApart {
    fn acts(&mut self, member: Member, membership: &Membership) -> Result<(), String> {
        let (newest, by) = self.0.entry(membership.replica).or_insert((membership.epoch, member));
        if membership.epoch < *newest {
            return Err(format!("{member} acts in {}, after {by} has acted in {newest}", membership.epoch));
        }
        if membership.epoch == *newest && member != *by {
            return Err(format!("{member} and {by} both act in {newest}"));
        }
        (*newest, *by) = (membership.epoch, member);
        Ok(())
    }
}

impl Checker for LeasesApart {
    fn name(&self) -> &'static str {
        "leases-apart"
    }

    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Told { member, membership, .. } | Fact::Took { member, membership } => {
                self.acts(*member, membership)
            }
            _ => Ok(()),
        }
    }
}
