//! What is going to happen, by time; among equals in the order in which it was scheduled.

use std::cmp::Reverse;
use std::collections::BinaryHeap;

/// Bits of a key for the place of its event, and for when it was scheduled; its time is above them.
const PLACE_BITS: u32 = 24;
const ORDER_BITS: u32 = 40;

/// Events by time. Steady use allocates nothing: the heap holds small keys, the events lie in a slab.
#[derive(Debug)]
pub(super) struct Queue<E> {
    /// Each is one number, which is compared faster than three.
    keys: BinaryHeap<Reverse<u128>>,
    events: Vec<Option<E>>,
    free: Vec<u32>,
    scheduled: u64,
}

impl<E> Queue<E> {
    pub(super) const fn new() -> Self {
        Self { keys: BinaryHeap::new(), events: Vec::new(), free: Vec::new(), scheduled: 0 }
    }

    pub(super) fn push(&mut self, at: u64, event: E) {
        let place = if let Some(place) = self.free.pop() {
            self.events[place as usize] = Some(event);
            place
        } else {
            self.events.push(Some(event));
            u32::try_from(self.events.len() - 1).expect("fewer events than memory")
        };
        self.scheduled += 1;
        assert!(place >> PLACE_BITS == 0 && self.scheduled >> ORDER_BITS == 0, "runs are bounded far below");
        let rest = self.scheduled << PLACE_BITS | u64::from(place);
        self.keys.push(Reverse(u128::from(at) << u64::BITS | u128::from(rest)));
    }

    pub(super) fn pop(&mut self) -> Option<(u64, E)> {
        let Reverse(key) = self.keys.pop()?;
        let at = u64::try_from(key >> u64::BITS).expect("the upper half");
        let place = u32::try_from(key & ((1 << PLACE_BITS) - 1)).expect("a few bits");
        self.free.push(place);
        Some((at, self.events[place as usize].take().expect("a key has its event")))
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn by_time_then_by_order() {
        let mut queue = Queue::new();
        for (at, name) in [(5, 'a'), (3, 'b'), (5, 'c'), (3, 'd')] {
            queue.push(at, name);
        }
        assert_eq!(queue.pop(), Some((3, 'b')));
        queue.push(3, 'e');
        assert_eq!(queue.len(), 4);
        let order: String = std::iter::from_fn(|| queue.pop()).map(|(_, name)| name).collect();
        assert_eq!(order, "deac");
    }
}
