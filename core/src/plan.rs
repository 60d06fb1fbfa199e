//! What the core knows of a checkpoint: its shape in experts and bytes. Tensors and files are the driver's.

use crate::config::Placement;
use crate::digest::Digest;
use crate::ids::ExpertKey;
use alloc::{format, string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// What a journal belongs to. State of another identity is refused, never mixed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Version of the numeric contract.
    pub contract: u32,
    /// Layout-independent digest of the weights.
    pub weights: Digest,
    /// Digest of the canonical architecture, tiers and TierSets.
    pub architecture: Digest,
    /// Digest of tokenizer and chat template.
    pub tokenizer: Digest,
}

/// A tier: groups of experts in every mixture layer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct TierPlan {
    /// The tier's name, as TierSets use it.
    pub name: String,
    /// Groups of a layer.
    pub groups: u32,
    /// Experts of a group.
    pub experts: u32,
    /// Where they belong, unless the configuration says otherwise.
    pub placement: Placement,
}

/// The shape of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ModelPlan {
    /// Version of the manifest format; this core reads version 1.
    pub format: u32,
    /// What it is.
    pub identity: Identity,
    /// Tiers, smallest first.
    pub tiers: Vec<TierPlan>,
    /// Decoder layers.
    pub layers: u32,
    /// The layers that have experts, ascending.
    pub moe_layers: Vec<u32>,
    /// The most experts that one position selects in one layer.
    pub top_k: u32,
    /// Bytes of one expert's slot.
    pub slot_bytes: u64,
    /// Bytes of each shard of base parameters.
    pub base_shards: Vec<u64>,
    /// Bytes of all router parameters.
    pub router_bytes: u64,
    /// Bytes that the process needs besides: code, buffers, activations of the largest step.
    pub overhead_bytes: u64,
    /// Positions in one page of KV cache.
    pub page_positions: u32,
    /// Bytes of one page of KV cache: the layers of one group.
    pub page_bytes: u64,
    /// The groups of layers that have pages of their own, all of one size: how many last positions, its own included, a
    /// position sees in their layers; all if `None`.
    pub kv_groups: Vec<Option<u32>>,
    /// Longest sequence, in positions.
    pub context: u32,
    /// Token ids are below this.
    pub vocab: u32,
    /// Token ids that end a stream.
    pub eos: Vec<u32>,
}

impl ModelPlan {
    /// The version of the manifest format that this core reads.
    pub const FORMAT: u32 = 1;
    const COUNT_MAX: u32 = 1 << 20;

    /// Checks that the plan can be worked with at all: nothing is allocated for one that cannot.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub fn check(&self) -> Result<(), String> {
        if self.format != Self::FORMAT {
            return Err(format!(
                "manifest format {} is not {}: import the checkpoint again",
                self.format,
                Self::FORMAT
            ));
        }
        if self.page_positions == 0 || self.page_bytes == 0 || self.context == 0 || self.vocab == 0 {
            return Err("page size, context and vocabulary must not be 0".into());
        }
        if self.kv_groups.is_empty() || self.kv_groups.contains(&Some(0)) {
            return Err("the KV cache needs a group of layers, and a window at least one position".into());
        }
        let moe = !self.moe_layers.is_empty();
        if moe && (self.tiers.is_empty() || self.top_k == 0 || self.slot_bytes == 0) {
            return Err("a model with mixture layers needs tiers, top_k and a slot size".into());
        }
        if !self.moe_layers.is_sorted_by(|a, b| a < b) {
            return Err("mixture layers must ascend".into());
        }
        if self.layers == 0 || self.moe_layers.last().is_some_and(|&last| last >= self.layers) {
            return Err(format!("mixture layers must be of the model's {} layers", self.layers));
        }
        let mut experts: u32 = 0;
        for tier in &self.tiers {
            let count = tier.groups.checked_mul(tier.experts).filter(|&n| n > 0);
            experts = count
                .and_then(|n| experts.checked_add(n))
                .filter(|&n| n <= Self::COUNT_MAX)
                .ok_or_else(|| format!("tier {} has no or too many experts", tier.name))?;
        }
        let groups_max = crate::ids::index(Self::COUNT_MAX);
        if self.moe_layers.len() > groups_max || self.kv_groups.len() > groups_max {
            return Err("too many layers".into());
        }
        Ok(())
    }

    /// The first page of a sequence, by its place, that the computation of a position reads in layers of this window.
    #[must_use]
    pub fn first_place(&self, window: Option<u32>, position: u32) -> u32 {
        window.map_or(0, |window| position.saturating_add(1).saturating_sub(window) / self.page_positions)
    }

    /// The most pages that a sequence of some positions needs at once, if up to `chunk` of them are computed together.
    #[must_use]
    pub fn pages_for(&self, positions: u32, chunk: u32) -> u32 {
        let all = positions.div_ceil(self.page_positions);
        let of_group = |window: &Option<u32>| match window {
            None => all,
            // The positions before the chunk that its first one sees, and the chunk, wherever pages begin.
            Some(window) => {
                let seen = (window - 1).saturating_add(chunk - 1);
                all.min(seen.div_ceil(self.page_positions).saturating_add(1))
            }
        };
        self.kv_groups.iter().map(of_group).fold(0, u32::saturating_add)
    }

    /// Resolves tier names to indices, ascending; no names mean every tier.
    ///
    /// # Errors
    /// The unknown name and the known ones.
    pub fn tier_set(&self, names: &[String]) -> Result<Vec<u32>, String> {
        if names.is_empty() {
            return Ok((0..).zip(&self.tiers).map(|(i, _)| i).collect());
        }
        let mut set = Vec::new();
        for name in names {
            let tier = (0..).zip(&self.tiers).find(|(_, tier)| tier.name == *name).map(|(i, _)| i);
            set.push(tier.ok_or_else(|| {
                let known: Vec<&str> = self.tiers.iter().map(|t| t.name.as_str()).collect();
                format!("unknown tier {name:?}; this checkpoint has {}", known.join(", "))
            })?);
        }
        set.sort_unstable();
        set.dedup();
        Ok(set)
    }

    /// Every expert of the given tiers, ascending.
    pub fn experts<'a>(&'a self, tiers: &'a [u32]) -> impl Iterator<Item = ExpertKey> + 'a {
        self.moe_layers.iter().flat_map(move |&layer| {
            tiers.iter().flat_map(move |&tier| {
                let plan = &self.tiers[crate::ids::index(tier)];
                (0..plan.groups).flat_map(move |group| {
                    (0..plan.experts).map(move |expert| ExpertKey { layer, tier, group, expert })
                })
            })
        })
    }

    /// Experts of a mixture layer, over all tiers.
    #[must_use]
    pub fn experts_of_layer(&self) -> u32 {
        self.tiers.iter().map(|tier| tier.groups * tier.experts).sum()
    }

    /// The place of an expert among those of its layer, in ascending order of keys.
    #[must_use]
    pub fn ordinal(&self, key: ExpertKey) -> u32 {
        let tier = crate::ids::index(key.tier);
        let before: u32 = self.tiers[..tier].iter().map(|tier| tier.groups * tier.experts).sum();
        before + key.group * self.tiers[tier].experts + key.expert
    }

    /// Whether the key names an expert of this checkpoint.
    #[must_use]
    pub fn has(&self, key: ExpertKey) -> bool {
        let tier = self.tiers.get(crate::ids::index(key.tier));
        self.moe_layers.binary_search(&key.layer).is_ok()
            && tier.is_some_and(|t| key.group < t.groups && key.expert < t.experts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;

    /// What a sequence needs is what it touches, wherever chunks begin.
    #[test]
    fn pages_are_bounded_by_the_window_and_a_chunk() {
        for window in 1..20 {
            for chunk in 1..10 {
                let plan = ModelPlan { page_positions: 4, kv_groups: vec![Some(window)], ..blank() };
                let touched =
                    |start: u32| (start + chunk).div_ceil(4) - plan.first_place(Some(window), start);
                let most = (0..60).map(touched).max();
                assert_eq!(most, Some(plan.pages_for(70, chunk)), "window {window}, chunk {chunk}");
                let both = ModelPlan { kv_groups: vec![None, Some(window)], ..plan.clone() };
                assert_eq!(both.pages_for(70, chunk), 18 + plan.pages_for(70, chunk));
                assert_eq!(both.pages_for(3, chunk), 2, "no more than the sequence itself");
            }
        }
    }

    fn blank() -> ModelPlan {
        ModelPlan {
            format: ModelPlan::FORMAT,
            identity: Identity::default(),
            tiers: vec![],
            moe_layers: vec![],
            layers: 1,
            top_k: 0,
            slot_bytes: 0,
            base_shards: vec![],
            router_bytes: 0,
            overhead_bytes: 0,
            page_positions: 4,
            page_bytes: 40,
            kv_groups: vec![None],
            context: 100,
            vocab: 10,
            eos: vec![],
        }
    }
}
