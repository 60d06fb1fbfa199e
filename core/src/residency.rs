//! Which expert is in which slot of the hot arena, what is being loaded, and what has to go.
//!
//! A slot is pinned while a wave of a step may read it; only an unpinned slot is ever given to another expert. Eviction
//! goes by placement, then by use (halved now and then), then by how long the layer-by-layer walk of a step will not
//! come by: cyclic access defeats plain recency.

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

/// An expert with the parameters of the checkpoint, or as modified.
pub(crate) type Held = (ExpertKey, Option<Digest>);

/// What a slot holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Content {
    /// Nothing.
    #[default]
    Empty,
    /// An expert that is to come.
    Coming(Held),
    /// An expert, verified.
    Ready(Held),
}

#[derive(Clone, Copy, Debug, Default, Serialize, Deserialize)]
pub(crate) struct SlotState {
    pub(crate) content: Content,
    pub(crate) pins: u32,
    uses: u32,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Load {
    slot: Slot,
    failures: u32,
}

/// The hot arena, or those of all ranks: one shelf of equal length for each (stage, expert rank), whose experts fit
/// nowhere else. The tensor ranks of a shelf hold the same experts in the same slots, each its rows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Residency {
    slots: Vec<SlotState>,
    shelf_slots: u32,
    by_held: BTreeMap<Held, Slot>,
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
        let slots = alloc::vec![SlotState::default(); index(shelf_slots) * index(shelves)];
        Self { slots, shelf_slots, next_load, ..Self::default() }
    }

    pub(crate) const fn next_load(&self) -> LoadId {
        self.next_load
    }

    pub(crate) fn slots(&self) -> impl Iterator<Item = (Slot, &SlotState)> {
        (0..).map(Slot).zip(&self.slots)
    }

    fn shelf(&self, shelf: u32) -> impl Iterator<Item = (Slot, &SlotState)> {
        let first = shelf * self.shelf_slots;
        (first..).map(Slot).zip(&self.slots[index(first)..index(first + self.shelf_slots)])
    }

    /// Whether anything is coming or is to come.
    pub(crate) fn loading(&self) -> bool {
        !self.loads.is_empty() || !self.demanded.is_empty() || !self.ahead.is_empty()
    }

    /// Whether the driver is writing into any slot.
    pub(crate) fn in_flight(&self) -> bool {
        !self.loads.is_empty()
    }

    /// Experts that are there.
    pub(crate) fn ready(&self) -> u32 {
        len32(self.slots.iter().filter(|slot| matches!(slot.content, Content::Ready(_))).count())
    }

    /// Experts to load ahead while slots are free.
    pub(crate) fn want(&mut self, experts: VecDeque<Held>) {
        self.ahead = experts;
    }

    pub(crate) fn wanted(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// The slot of an expert that is there or coming.
    pub(crate) fn slot_of(&self, held: Held) -> Option<(Slot, bool)> {
        let slot = *self.by_held.get(&held)?;
        Some((slot, matches!(self.slots[index(slot.0)].content, Content::Ready(_))))
    }

    pub(crate) fn pin(&mut self, slot: Slot) {
        self.slots[index(slot.0)].pins += 1;
    }

    /// Undoes a pin, and counts a use.
    pub(crate) fn unpin(&mut self, slot: Slot) {
        let state = &mut self.slots[index(slot.0)];
        assert!(state.pins > 0, "slot {slot} is not pinned");
        state.pins -= 1;
        state.uses = state.uses.saturating_add(1);
    }

    /// Halves all counts of use, so that what was popular long ago can go.
    pub(crate) fn age(&mut self) {
        for slot in &mut self.slots {
            slot.uses /= 2;
        }
    }

    /// A slot that may be given away: a free one, or the unpinned one whose expert is the least worth keeping.
    fn victim<K: Ord>(&self, shelf: u32, worth: impl Fn(Held, u32) -> K) -> Option<Slot> {
        let mut best: Option<(K, Slot)> = None;
        for (slot, state) in self.shelf(shelf) {
            match state.content {
                Content::Empty => return Some(slot),
                Content::Ready(key) if state.pins == 0 => {
                    let worth = worth(key, state.uses);
                    if best.as_ref().is_none_or(|(least, _)| worth < *least) {
                        best = Some((worth, slot));
                    }
                }
                Content::Ready(_) | Content::Coming(_) => {}
            }
        }
        best.map(|(_, slot)| slot)
    }

    fn free_slot(&self, shelf: u32) -> Option<Slot> {
        self.shelf(shelf).find(|(_, state)| state.content == Content::Empty).map(|(slot, _)| slot)
    }

    fn assign(&mut self, slot: Slot, held: Held) {
        let state = &mut self.slots[index(slot.0)];
        assert_eq!(state.pins, 0, "a pinned slot is never overwritten");
        if let Content::Ready(old) = state.content {
            self.by_held.remove(&old);
        }
        *state = SlotState { content: Content::Coming(held), pins: 0, uses: 0 };
        assert!(self.by_held.insert(held, slot).is_none(), "an expert has one slot");
    }

    fn clear(&mut self, slot: Slot) {
        let state = &mut self.slots[index(slot.0)];
        if let Content::Ready(key) | Content::Coming(key) = state.content {
            self.by_held.remove(&key);
        }
        *state = SlotState::default();
    }

    /// Empties every slot whose tier is not among `tiers`; returns how many.
    pub(crate) fn demote(&mut self, tiers: &[u32]) -> u32 {
        self.ahead.retain(|(key, _)| tiers.contains(&key.tier));
        let obsolete: Vec<Slot> = self
            .slots()
            .filter(|(_, s)| {
                s.pins == 0 && matches!(s.content, Content::Ready((k, _)) if !tiers.contains(&k.tier))
            })
            .map(|(slot, _)| slot)
            .collect();
        for slot in &obsolete {
            self.clear(*slot);
        }
        len32(obsolete.len())
    }

    /// Whether nothing reads this blob from the disk, nor will.
    pub(crate) fn forget(&mut self, key: ExpertKey, blob: Digest) -> bool {
        self.ahead.retain(|&held| held != (key, Some(blob)));
        self.slot_of((key, Some(blob))).is_none_or(|(_, ready)| ready)
    }

    /// Forgets loads ahead that have not begun.
    pub(crate) fn stop_ahead(&mut self) {
        self.ahead.clear();
    }

    /// Releases what a step that is over still holds, and its loads that have not begun.
    pub(crate) fn release_all(&mut self) {
        while let Some(slot) = self.demanded.pop_front() {
            self.slots[index(slot.0)].pins = 0;
            self.clear(slot);
        }
        for slot in &mut self.slots {
            slot.pins = 0;
        }
    }

    fn issue(&mut self, cx: &mut Context<'_>, slot: Slot, failures: u32) {
        let Content::Coming((expert, blob)) = self.slots[index(slot.0)].content else {
            unreachable!("only what is coming is loaded")
        };
        let load = self.next_load;
        self.next_load.0 += 1;
        self.loads.insert(load, Load { slot, failures });
        cx.say(Output::Load { load, expert, blob, slot });
    }

    fn loaded(&mut self, cx: &mut Context<'_>, load: LoadId, fault: Option<Fault>, retries: u32) -> Outcome {
        let Load { slot, failures } = self.loads.remove(&load).expect("Loaded answers a Load under way");
        let state = &mut self.slots[index(slot.0)];
        let Content::Coming(key) = state.content else {
            unreachable!("a load has a slot until it is answered")
        };
        match fault {
            None => {
                state.content = Content::Ready(key);
                Outcome::Ready(key)
            }
            Some(_) if failures < retries => {
                cx.event(Event::LoadRetried { expert: key.0, failures: failures + 1 });
                self.issue(cx, slot, failures + 1);
                Outcome::Retried
            }
            Some(fault) => {
                state.pins = 0;
                self.clear(slot);
                Outcome::Lost(key.0, fault)
            }
        }
    }

    /// # Panics
    /// If the tables contradict each other.
    pub(crate) fn check(&self) {
        let held = self.slots().filter_map(|(slot, state)| match state.content {
            Content::Empty => None,
            Content::Coming(key) | Content::Ready(key) => Some((key, slot)),
        });
        let mut held: Vec<_> = held.collect();
        held.sort_unstable();
        assert!(held.iter().copied().eq(self.by_held.iter().map(|(k, s)| (*k, *s))), "slots and keys agree");
        let coming = self.slots().filter(|(_, s)| matches!(s.content, Content::Coming(_))).count();
        assert_eq!(coming, self.loads.len() + self.demanded.len(), "whatever is coming is loaded or queued");
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
        let slot = self.residency.victim(self.shelf(held.0), worth)?;
        self.residency.assign(slot, held);
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
            if self.residency.by_held.contains_key(&held) {
                continue;
            }
            // What finds no room is loaded when it is demanded.
            if let Some(slot) = self.residency.free_slot(self.shelf(held.0)) {
                self.residency.assign(slot, held);
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
