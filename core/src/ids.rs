//! Names of things: newtypes, so that a slot is never taken for a page.

use alloc::string::String;
use core::fmt;
use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty)) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
        pub struct $name(pub $inner);
        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}", self.0)
            }
        }
    };
}

id!(/// The number of an input in the journal, dense from 1; 0 stands before the first.
    Seq(u64));
id!(/// What an operator wishes, named so that asking again does no harm: drawn at random, or counted.
    WishId(u64));
id!(/// One life of a node's process; grows with every restart.
    Incarnation(u64));
id!(/// One batch step of the compute backend.
    StepId(u64));
id!(/// One asked-for copy of an expert into a slot.
    LoadId(u64));
id!(/// A place for one expert in the hot arena.
    Slot(u32));
id!(/// A (TierSet, manifest revision) pair, numbered in order of its commit.
    Generation(u32));
id!(/// A manifest revision: 0 is the checkpoint, each committed modification of experts makes the next.
    Revision(u32));

/// An expert of a checkpoint: layer, tier, group in the tier, expert in the group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct ExpertKey {
    /// Decoder layer, from 0.
    pub layer: u32,
    /// Tier, an index into [`ModelPlan::tiers`](crate::plan::ModelPlan::tiers).
    pub tier: u32,
    /// Group within the tier.
    pub group: u32,
    /// Expert within the group.
    pub expert: u32,
}

/// The client's idempotency key: 1 to [`RequestId::BYTES_MAX`] bytes of visible ASCII.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct RequestId(String);

impl RequestId {
    /// The longest id that is accepted, in bytes.
    pub const BYTES_MAX: usize = 128;

    /// Checks and takes an id.
    ///
    /// # Errors
    /// The reason, for people, if the id is empty, too long or holds anything but visible ASCII.
    pub fn new(id: impl Into<String>) -> Result<Self, &'static str> {
        let id = id.into();
        if id.is_empty() || id.len() > Self::BYTES_MAX {
            return Err("a request id has 1 to 128 bytes");
        }
        if !id.bytes().all(|b| b.is_ascii_graphic()) {
            return Err("a request id holds visible ASCII characters only, no blanks");
        }
        Ok(Self(id))
    }

    /// The id as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for RequestId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A length that a limit has bounded far below `u32::MAX`.
pub(crate) fn len32(len: usize) -> u32 {
    u32::try_from(len).expect("lengths are bounded by Limits")
}

/// An index into memory on every platform that the core supports (32 bits and more).
pub(crate) fn index(n: u32) -> usize {
    usize::try_from(n).expect("usize has at least 32 bits")
}
