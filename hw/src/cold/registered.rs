//! Which slots the kernel knows: each is registered with its first read, so that no memory is taken before it is used.

use std::sync::Arc;

use super::reader::Queue;
use crate::arena::{Arena, SlotWriter};

/// The slots that are registered, arena by arena. An arena is kept until it is forgotten here.
#[derive(Debug, Default)]
pub(super) struct Registered {
    arenas: Vec<(Arc<Arena>, Vec<Option<u16>>)>,
    count: u16,
}

impl Registered {
    /// The number under which the kernel knows a slot; `None` if it does not.
    pub(super) fn buffer(&mut self, slot: &mut SlotWriter, queue: &mut impl Queue) -> Option<u16> {
        let at = match self.arenas.iter().position(|(arena, _)| Arc::ptr_eq(arena, slot.arena())) {
            Some(at) => at,
            None => {
                self.arenas.push((Arc::clone(slot.arena()), vec![None; slot.arena().slots()]));
                self.arenas.len() - 1
            }
        };
        let number = slot.slot().0 as usize;
        if self.arenas[at].1[number].is_none() && self.count < u16::MAX {
            let (start, bytes) = (slot.start(), slot.bytes());
            // SAFETY: the slot lies in an arena that is kept here until all are forgotten.
            if unsafe { queue.register(self.count, start, bytes) } {
                self.arenas[at].1[number] = Some(self.count);
                self.count += 1;
            }
        }
        self.arenas[at].1[number]
    }

    /// Lets go of all arenas.
    pub(super) fn forget(&mut self, queue: &mut impl Queue) {
        queue.forget(std::mem::take(&mut self.count));
        self.arenas.clear();
    }
}
