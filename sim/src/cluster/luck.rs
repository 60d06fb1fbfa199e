//! What befalls an actor, each kind counted over all of its lives, so that a decision has its own number.

use crate::hazard::Hazard;
use crate::world::{Context, Wire};

/// The opportunities so far, by hazard.
#[derive(Clone, Debug)]
pub struct Luck(Box<[u64; 256]>);

impl Default for Luck {
    fn default() -> Self {
        Self(Box::new([0; 256]))
    }
}

impl Luck {
    /// Whether a fault befalls this actor at its next opportunity, and how.
    pub fn befalls<M: Wire>(&mut self, cx: &mut Context<'_, M>, hazard: Hazard) -> Option<u64> {
        let nth = &mut self.0[hazard as usize];
        *nth += 1;
        cx.fault(hazard, *nth - 1)
    }
}
