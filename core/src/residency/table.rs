//! One arena: which expert is in which of its slots, who uses them, and which can go.

use super::Held;
use crate::ids::{Slot, index, len32};
use crate::plant::{self, Bug};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

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
    /// How often it was released, halved now and then. Goes with an expert from arena to arena, and out of them.
    uses: u32,
}

/// The slots of an arena, or those of all ranks: one shelf of equal length for each (stage, expert rank), whose experts
/// fit nowhere else. The tensor ranks of a shelf hold the same experts in the same slots, each its rows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Table {
    slots: Vec<SlotState>,
    shelf_slots: u32,
    by_held: BTreeMap<Held, Slot>,
}

impl Table {
    pub(super) fn new(shelf_slots: u32, shelves: u32) -> Self {
        let slots = alloc::vec![SlotState::default(); index(shelf_slots) * index(shelves)];
        Self { slots, shelf_slots, by_held: BTreeMap::new() }
    }

    pub(crate) fn slots(&self) -> impl Iterator<Item = (Slot, &SlotState)> {
        (0..).map(Slot).zip(&self.slots)
    }

    fn shelf(&self, shelf: u32) -> impl Iterator<Item = (Slot, &SlotState)> {
        let first = shelf * self.shelf_slots;
        (first..).map(Slot).zip(&self.slots[index(first)..index(first + self.shelf_slots)])
    }

    /// Experts that are there.
    pub(crate) fn ready(&self) -> u32 {
        len32(self.slots.iter().filter(|slot| matches!(slot.content, Content::Ready(_))).count())
    }

    /// Slots with an expert that is to come.
    pub(super) fn coming(&self) -> usize {
        self.slots.iter().filter(|slot| matches!(slot.content, Content::Coming(_))).count()
    }

    /// Slots that are in use.
    pub(super) fn pinned(&self) -> usize {
        self.slots.iter().filter(|slot| slot.pins > 0).count()
    }

    /// Experts that are there or coming.
    pub(super) fn held(&self) -> impl Iterator<Item = (Held, Slot)> {
        self.by_held.iter().map(|(&held, &slot)| (held, slot))
    }

    pub(super) fn uses(&self, slot: Slot) -> u32 {
        self.slots[index(slot.0)].uses
    }

    /// The slot of an expert that is there (`true`) or coming.
    pub(crate) fn slot_of(&self, held: Held) -> Option<(Slot, bool)> {
        let slot = *self.by_held.get(&held)?;
        Some((slot, matches!(self.slots[index(slot.0)].content, Content::Ready(_))))
    }

    /// The expert that is to come to a slot.
    pub(super) fn coming_to(&self, slot: Slot) -> Held {
        let content = self.slots[index(slot.0)].content;
        let Content::Coming(held) = content else {
            unreachable!("slot {slot} waits for an expert, and has {content:?}")
        };
        held
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

    pub(super) fn unpin_all(&mut self) {
        for slot in &mut self.slots {
            slot.pins = 0;
        }
    }

    /// Halves all counts of use, so that what was popular long ago can go.
    pub(super) fn age(&mut self) {
        for slot in &mut self.slots {
            slot.uses /= 2;
        }
    }

    /// Of the unpinned slots with an expert, the one whose expert is the least worth keeping, and how much it is. Of
    /// equals, the first.
    pub(super) fn least<K: Ord>(&self, shelf: u32, worth: impl Fn(Held, u32) -> K) -> Option<(K, Slot)> {
        let mut least: Option<(K, Slot)> = None;
        for (slot, state) in self.shelf(shelf) {
            if let Content::Ready(held) = state.content
                && (state.pins == 0 || plant::is(Bug::SlotEarly))
            {
                let worth = worth(held, state.uses);
                if least.as_ref().is_none_or(|(known, _)| worth < *known) {
                    least = Some((worth, slot));
                }
            }
        }
        least
    }

    pub(super) fn free(&self, shelf: u32) -> Option<Slot> {
        self.shelf(shelf).find(|(_, state)| state.content == Content::Empty).map(|(slot, _)| slot)
    }

    /// Gives a slot to an expert that is to come; returns the one that has to go, with its count of use.
    pub(super) fn assign(&mut self, slot: Slot, held: Held, uses: u32) -> Option<(Held, u32)> {
        let state = &mut self.slots[index(slot.0)];
        assert!(state.pins == 0 || plant::is(Bug::SlotEarly), "a pinned slot is never overwritten");
        let old = match state.content {
            Content::Empty => None,
            Content::Ready(old) => {
                self.by_held.remove(&old);
                Some((old, state.uses))
            }
            Content::Coming(old) => unreachable!("slot {slot} still waits for {old:?}"),
        };
        *state = SlotState { content: Content::Coming(held), pins: 0, uses };
        assert!(self.by_held.insert(held, slot).is_none(), "an expert has one slot of an arena");
        old
    }

    /// The expert that was to come is there.
    pub(super) fn arrived(&mut self, slot: Slot) {
        let held = self.coming_to(slot);
        self.slots[index(slot.0)].content = Content::Ready(held);
    }

    /// Empties a slot; returns what was there or to come, with its count of use.
    pub(super) fn clear(&mut self, slot: Slot) -> Option<(Held, u32)> {
        let SlotState { content, uses, .. } = core::mem::take(&mut self.slots[index(slot.0)]);
        let (Content::Ready(held) | Content::Coming(held)) = content else { return None };
        self.by_held.remove(&held);
        Some((held, uses))
    }

    /// # Panics
    /// If slots and keys contradict each other.
    pub(super) fn check(&self) {
        let held = self.slots().filter_map(|(slot, state)| match state.content {
            Content::Empty => None,
            Content::Coming(held) | Content::Ready(held) => Some((held, slot)),
        });
        let mut held: Vec<_> = held.collect();
        held.sort_unstable();
        assert!(held.iter().copied().eq(self.by_held.iter().map(|(k, s)| (*k, *s))), "slots and keys agree");
    }
}
