//! Slots that the kernel cannot write: what is read for them goes to a room of the host, is verified there, and is brought on from
//! there. Reader and verifier are those of slots of the host; where a read goes is all that differs.

use std::fmt::Debug;
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Instant;

use lite_llm_core::input::Fault;

use super::reader::{Answer, Bell, Load, Tell, Told};
use crate::arena::SlotWriter;

/// Where experts are read to on their way to slots that are not the host's.
pub(crate) trait Staging: Debug + Send + Sync {
    /// Whether a slot is one that the kernel cannot write.
    fn stages(&self, slot: &SlotWriter) -> bool {
        slot.address().is_some()
    }

    /// A room for an expert, if one is free now.
    fn room(&self) -> Option<SlotWriter>;

    /// Brings experts from their rooms to their slots and says what came of each, until no more come. It has a thread of its own.
    fn run(&self, verified: &Receiver<Staged>, outlet: &Outlet);
}

/// An expert in its room, verified.
#[derive(Debug)]
pub(crate) struct Staged {
    pub(crate) load: Load,
    pub(crate) room: SlotWriter,
    pub(super) began: Instant,
}

/// Whom it is said to that an expert is where it should be.
pub(crate) struct Outlet {
    pub(super) tell: Tell,
    pub(super) bell: Arc<dyn Bell>,
}

impl Outlet {
    /// Lets go of room and slot, and says what came of the load.
    /// Whether anybody heard it.
    pub(crate) fn answer(&self, staged: Staged, result: Result<(), Fault>) -> bool {
        let Staged { load, room, began } = staged;
        let (epoch, number) = (load.epoch, load.load);
        // Whoever hears of it may give the slot to somebody else at once; the reader may wait for a room.
        drop((load, room));
        self.bell.ring();
        (self.tell)(Told::Answer(Answer { epoch, load: number, result, took: began.elapsed() }))
    }

    /// Says that what the slots are of answers no more.
    pub(crate) fn lost(&self, what: String) {
        // Nobody hears it where the node is closed.
        let _ = (self.tell)(Told::DeviceLost(what));
    }
}
