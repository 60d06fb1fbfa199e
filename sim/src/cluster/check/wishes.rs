//! A wish of the operator is done once: whoever tells what came of it tells the same.

use super::Checker;
use crate::cluster::watch::Fact;
use lite_llm_core::ids::WishId;
use lite_llm_core::output::{Granted, Output, Refusal};
use std::collections::BTreeMap;

/// What came of a wish never changes, but for what is to be asked for again.
#[derive(Debug, Default)]
pub struct WishesOnce(BTreeMap<WishId, Result<Granted, (Refusal, String)>>);

impl Checker for WishesOnce {
    fn name(&self) -> &'static str {
        "wishes-once"
    }

    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
        let Fact::Told { output: Output::Answered { id, outcome, .. }, .. } = fact else { return Ok(()) };
        if matches!(outcome, Err((Refusal::NotServing, _))) {
            return Ok(());
        }
        let known = self.0.entry(*id).or_insert_with(|| outcome.clone());
        if known == outcome {
            Ok(())
        } else {
            Err(format!("of wish {id} came {known:?}, and now {outcome:?}"))
        }
    }
}
