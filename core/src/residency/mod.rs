//! Which expert is in which slot of the hot arena, what is being loaded, and what has to go.
//!
//! A slot is pinned while a wave of a step may read it; only an unpinned slot is ever given to another expert. Eviction
//! goes by placement, then by use (halved now and then), then by how long the layer-by-layer walk of a step will not
//! come by: cyclic access defeats plain recency.

mod table;

use crate::config::Placement;
use crate::digest::Digest;
use crate::engine::Context;
use crate::event::Event;
use crate::ids::{ExpertKey, LoadId, Slot, index, len32};
use crate::input::Fault;
use crate::output::Output;
use crate::state::State;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::{format, string::String, vec::Vec};
use serde::{Deserialize, Serialize};
pub(crate) use table::{Content, Table};

/// An expert with the parameters of the checkpoint, or as modified.
pub(crate) type Held = (ExpertKey, Option<Digest>);

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Load {
    slot: Slot,
    failures: u32,
}

/// The hot arena, and what is on its way into it.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Residency {
    pub(crate) hot: Table,
    loads: BTreeMap<LoadId, Load>,
    /// Slots that a step waits for, in order.
    demanded: VecDeque<Slot>,
    /// Experts to load ahead into free slots.
    ahead: VecDeque<Held>,
    next_load: LoadId,
}

/// What became of a load.
pub(crate) enum Outcome {
    /// The expert is there.
    Ready(Held),
    /// It is tried again.
    Retried,
    /// It could not be loaded.
    Lost(ExpertKey, Fault),
}

impl Residency {
    pub(crate) fn new(shelf_slots: u32, shelves: u32, next_load: LoadId) -> Self {
        Self { hot: Table::new(shelf_slots, shelves), next_load, ..Self::default() }
    }

    pub(crate) const fn next_load(&self) -> LoadId {
        self.next_load
    }

    /// Whether anything is coming or is to come.
    pub(crate) fn loading(&self) -> bool {
        !self.loads.is_empty() || !self.demanded.is_empty() || !self.ahead.is_empty()
    }

    /// Whether the driver is writing into any slot.
    pub(crate) fn in_flight(&self) -> bool {
        !self.loads.is_empty()
    }

    /// Experts to load ahead while slots are free.
    pub(crate) fn want(&mut self, experts: VecDeque<Held>) {
        self.ahead = experts;
    }

    pub(crate) fn wanted(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Empties every slot whose tier is not among `tiers`; returns how many.
    pub(crate) fn demote(&mut self, tiers: &[u32]) -> u32 {
        self.ahead.retain(|(key, _)| tiers.contains(&key.tier));
        let obsolete = self.hot.slots().filter(|(_, state)| {
            state.pins == 0 && matches!(state.content, Content::Ready((key, _)) if !tiers.contains(&key.tier))
        });
        let obsolete: Vec<Slot> = obsolete.map(|(slot, _)| slot).collect();
        for slot in &obsolete {
            self.hot.clear(*slot);
        }
        len32(obsolete.len())
    }

    /// Whether nothing reads this blob from the disk, nor will.
    pub(crate) fn forget(&mut self, key: ExpertKey, blob: Digest) -> bool {
        self.ahead.retain(|&held| held != (key, Some(blob)));
        self.hot.slot_of((key, Some(blob))).is_none_or(|(_, ready)| ready)
    }

    /// Forgets loads ahead that have not begun.
    pub(crate) fn stop_ahead(&mut self) {
        self.ahead.clear();
    }

    /// Releases what a step that is over still holds, and its loads that have not begun.
    pub(crate) fn release_all(&mut self) {
        self.hot.unpin_all();
        while let Some(slot) = self.demanded.pop_front() {
            self.hot.clear(slot);
        }
    }

    fn issue(&mut self, cx: &mut Context<'_>, slot: Slot, failures: u32) {
        let (expert, blob) = self.hot.coming_to(slot);
        let load = self.next_load;
        self.next_load.0 += 1;
        self.loads.insert(load, Load { slot, failures });
        cx.say(Output::Load { load, expert, blob, slot });
    }

    fn loaded(&mut self, cx: &mut Context<'_>, load: LoadId, fault: Option<Fault>, retries: u32) -> Outcome {
        let Load { slot, failures } = self.loads.remove(&load).expect("Loaded answers a Load under way");
        let held = self.hot.coming_to(slot);
        match fault {
            None => {
                self.hot.arrived(slot);
                Outcome::Ready(held)
            }
            Some(_) if failures < retries => {
                cx.event(Event::LoadRetried { expert: held.0, failures: failures + 1 });
                self.issue(cx, slot, failures + 1);
                Outcome::Retried
            }
            Some(fault) => {
                self.hot.clear(slot);
                Outcome::Lost(held.0, fault)
            }
        }
    }

    /// # Panics
    /// If the tables contradict each other.
    pub(crate) fn check(&self) {
        self.hot.check();
        assert_eq!(
            self.hot.coming(),
            self.loads.len() + self.demanded.len(),
            "whatever is coming is loaded or queued"
        );
    }
}

impl State {
    /// The shelf that an expert belongs to.
    pub(crate) fn shelf(&self, key: ExpertKey) -> u32 {
        let topology = &self.config.topology;
        if topology.pipeline * topology.expert == 1 {
            return 0;
        }
        let plan = self.plan();
        let stage = topology.stage(plan.layers, key.layer);
        stage * topology.expert + topology.holder(plan.experts_of_layer(), plan.ordinal(key))
    }

    /// Shelves of the arena.
    pub(crate) const fn shelves(&self) -> u32 {
        self.config.topology.pipeline * self.config.topology.expert
    }

    /// Gives a slot to an expert that a step demands, evicting if need be; `None` if every slot is in use.
    pub(crate) fn demand(&mut self, held: Held) -> Option<Slot> {
        let (plan, tiers) = (self.plan(), self.generations.active_tiers());
        let layers = &plan.moe_layers;
        let ordinal = |layer: u32| layers.binary_search(&layer).expect("an expert is in a mixture layer");
        let here = ordinal(held.0.layer);
        let worth = |(other, blob): Held, uses: u32| {
            // What no new position can select goes first: tiers that are masked, parameters that were replaced.
            let current = tiers.contains(&other.tier) && self.current_blob(other) == blob;
            let placement: Option<Placement> = current.then(|| self.placement(other.tier));
            let steps_away = (ordinal(other.layer) + layers.len() - here - 1) % layers.len();
            (placement, uses, core::cmp::Reverse(steps_away))
        };
        let (shelf, hot) = (self.shelf(held.0), &self.residency.hot);
        let slot = hot.free(shelf).or_else(|| hot.least(shelf, worth))?;
        self.residency.hot.assign(slot, held);
        self.residency.demanded.push_back(slot);
        Some(slot)
    }

    /// Starts loads: demanded ones first, those ahead with half of the depth once requests are served.
    pub(crate) fn issue_loads(&mut self, cx: &mut Context<'_>) {
        let depth = index(self.config.limits.loads_max);
        while self.residency.loads.len() < depth {
            let Some(slot) = self.residency.demanded.pop_front() else { break };
            self.residency.issue(cx, slot, 0);
        }
        let depth = if self.steps.current.is_some() { depth.div_ceil(2) } else { depth };
        while self.residency.loads.len() < depth && self.residency.demanded.is_empty() {
            let Some(held) = self.residency.ahead.pop_front() else { break };
            if self.residency.hot.slot_of(held).is_some() {
                continue;
            }
            // What finds no room is loaded when it is demanded.
            if let Some(slot) = self.residency.hot.free(self.shelf(held.0)) {
                self.residency.hot.assign(slot, held);
                self.residency.issue(cx, slot, 0);
            }
        }
    }

    pub(crate) fn loaded(&mut self, cx: &mut Context<'_>, load: LoadId, fault: Option<Fault>) {
        match self.residency.loaded(cx, load, fault, self.config.limits.retries_max) {
            Outcome::Ready(key) => self.provide(cx, key),
            Outcome::Retried => {}
            Outcome::Lost(key, fault) => {
                let ExpertKey { layer, tier, group, expert } = key;
                let reason: String = format!(
                    "expert {expert} of group {group}, tier {tier}, layer {layer} cannot be loaded: {fault}"
                );
                if self.boot == crate::boot::Boot::Experts {
                    return self.exit_with(cx, reason);
                }
                self.lost(cx, key, &reason);
                self.switch_lost(cx, key, reason);
            }
        }
    }
}
