//! The project's own form: experts in groups, groups in tiers, and a router that selects tier, then group, then expert.
//!
//! Attention is Llama's. `tiers` of the configuration lists `{name, groups, experts, placement}`, with the experts of a
//! group; `k_tier`, `k_group` and `k_expert` say how many are selected at each level.

use super::DEFAULTS;
use crate::arch::{Arch, Moe, TierOfGroups, TieredRouter};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;
use lite_llm_core::config::Placement;
use lite_llm_core::routing::Hierarchy;

/// More tiers than a model has.
const TIERS_MAX: usize = 64;

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "tiered_moe", DEFAULTS)?;
    let select = Hierarchy {
        tiers: config.size("k_tier")?,
        groups: config.size("k_group")?,
        experts: config.size("k_expert")?,
    };
    let router = TieredRouter { tiers: tiers(config)?, select };
    let experts = router.experts();
    if experts > super::EXPERTS_MAX {
        return Err(config.invalid("tiers", "no model has that many experts"));
    }
    for (key, k, least) in [
        ("k_tier", select.tiers, router.tiers.len()),
        ("k_group", select.groups, router.tiers.iter().map(|tier| tier.groups).min().unwrap_or(0)),
        ("k_expert", select.experts, router.tiers.iter().map(|tier| tier.experts).min().unwrap_or(0)),
    ] {
        if k > least {
            return Err(config.invalid(key, &format!("{k} are more than there are to select from: {least}")));
        }
    }
    let width = config.size("moe_intermediate_size")?;
    arch.moe = Some(Moe {
        normalise: config.flag_or("norm_topk_prob", true)?,
        tiered: Some(router),
        ..super::mixture(experts, select.tiers * select.groups * select.experts, width, super::MLP_EXPERTS)
    });
    Ok(arch)
}

fn tiers(config: &Config<'_>) -> Result<Vec<TierOfGroups>, CheckpointError> {
    let parts = config.parts("tiers")?;
    if parts.is_empty() || parts.len() > TIERS_MAX {
        return Err(config.invalid("tiers", &format!("it must list 1 to {TIERS_MAX} tiers")));
    }
    let mut tiers: Vec<TierOfGroups> = Vec::new();
    for part in parts {
        let name = part.text("name")?;
        if name.is_empty() || tiers.iter().any(|tier| tier.name == name) {
            return Err(config.invalid("tiers", &format!("the name {name:?} is empty or there twice")));
        }
        let placement = match part.text_or("placement", "hot")?.as_str() {
            "hot" => Placement::Hot,
            "warm" => Placement::Warm,
            "cold" => Placement::Cold,
            other => return Err(part.unsupported("placement", other, "hot, warm and cold are known")),
        };
        let (groups, experts) = (part.size("groups")?, part.size("experts")?);
        tiers.push(TierOfGroups { name, groups, experts, placement });
    }
    Ok(tiers)
}
