//! The core's own time: nanoseconds given with each input. The core reads no clock.

use serde::{Deserialize, Serialize};

/// A moment, in nanoseconds since an epoch of the driver's choice; monotone over the life of a journal.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Time(pub u64);

impl Time {
    /// The moment `ns` nanoseconds later, saturating at the end of time.
    #[must_use]
    pub const fn after_ns(self, ns: u64) -> Self {
        Self(self.0.saturating_add(ns))
    }
}
