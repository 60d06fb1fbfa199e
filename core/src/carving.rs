//! How memory is divided, before any of it is taken.

use crate::config::Config;
use crate::ids::len32;
use crate::output::Carving;
use crate::plan::ModelPlan;
use alloc::{format, string::String};

/// Divides the memory of each rank: what must be there, the warm arena, KV pages, then hot slots for as many experts as
/// there are. No expert is in both arenas. `pages_min` are the pages of KV cache that requests have already.
///
/// # Panics
/// If what was divided would not fit.
///
/// # Errors
/// The number of bytes that would do.
pub fn carve(config: &Config, plan: &ModelPlan, pages_min: u32) -> Result<Carving, String> {
    let fixed = plan
        .base_shards
        .iter()
        .chain([&plan.router_bytes, &plan.overhead_bytes])
        .fold(0u64, |sum, bytes| sum.saturating_add(*bytes));
    let experts = experts_of_rank(config, plan);
    let slots_min = plan.top_k.min(experts);
    let pages_bytes = |pages: u32| u64::from(pages).saturating_mul(plan.page_bytes);
    let slots_bytes = |slots: u32| u64::from(slots).saturating_mul(plan.slot_bytes);
    let fit = |bytes: u64, each: u64| u32::try_from(bytes / each.max(1)).unwrap_or(u32::MAX);

    if config.warm_bytes > 0 && config.warm_bytes < plan.slot_bytes {
        return Err(format!(
            "warm_bytes is {}, but an expert of this model has {}: give that or more, or 0 for no warm arena",
            config.warm_bytes, plan.slot_bytes
        ));
    }
    let warm_slots = fit(config.warm_bytes, plan.slot_bytes).min(experts - slots_min);
    let chunk = config.prefill_chunk.min(config.limits.step_positions_max).max(1);
    let pages_most = plan.pages_for(plan.context, chunk).saturating_mul(config.limits.rows_max);
    let (pages_min, pages_max) = match config.cache_positions {
        Some(positions) => {
            let pages = plan.pages_for(positions, chunk).min(pages_most).max(pages_min);
            (pages, pages)
        }
        None => (pages_min, pages_most.max(pages_min)),
    };
    let needed = [fixed, pages_bytes(pages_min), slots_bytes(slots_min), slots_bytes(warm_slots)]
        .into_iter()
        .fold(0u64, u64::saturating_add);
    if config.memory_bytes < needed {
        let warm = match warm_slots {
            0 => String::new(),
            _ => format!(", {} for the warm arena (warm_bytes)", slots_bytes(warm_slots)),
        };
        return Err(format!(
            "memory_bytes is {}, but this model needs at least {needed}: {fixed} for base parameters and buffers, {} for \
             {pages_min} pages of KV cache, {} for {slots_min} experts{warm}",
            config.memory_bytes,
            pages_bytes(pages_min),
            slots_bytes(slots_min)
        ));
    }
    let free = config.memory_bytes - fixed;
    // A quarter for the cache while experts do not all fit, unless somebody knows what it needs; what they leave, too.
    let left = free - slots_bytes(warm_slots);
    let share = fit(left / 4, plan.page_bytes).min(fit(left - slots_bytes(slots_min), plan.page_bytes));
    let pages = share.clamp(pages_min, pages_max);
    let slots = if experts == 0 { 0 } else { fit(left - pages_bytes(pages), plan.slot_bytes).min(experts) };
    let warm_slots = warm_slots.min(experts - slots);
    let left = free - slots_bytes(warm_slots) - slots_bytes(slots);
    let pages = fit(left, plan.page_bytes).clamp(pages_min, pages_max);
    assert!(slots >= slots_min && pages_bytes(pages) <= left, "the carving fits");
    Ok(Carving { slots, warm_slots, slot_bytes: plan.slot_bytes, pages, page_bytes: plan.page_bytes })
}

/// The most experts that a rank may have to hold.
fn experts_of_rank(config: &Config, plan: &ModelPlan) -> u32 {
    let topology = &config.topology;
    let layers = (0..topology.pipeline).map(|stage| {
        let range = topology.layers(plan.layers, stage);
        len32(plan.moe_layers.iter().filter(|layer| range.contains(layer)).count())
    });
    let experts = plan.experts_of_layer().div_ceil(topology.expert);
    layers.max().unwrap_or(0) * experts
}
