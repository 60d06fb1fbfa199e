//! The lifecycle as a table that refuses everything it does not list.

use serde::{Deserialize, Serialize};

/// Where the engine is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lifecycle {
    /// Configuration, resources, seed, log.
    #[default]
    Boot,
    /// Manifest, base, experts, routers.
    Loading,
    /// Loaded; no TierSet active yet.
    Warm,
    /// Serving.
    Active,
    /// Serving while new tiers load.
    Reconfiguring,
    /// Finishing what is there.
    Draining,
    /// Over.
    Stopped,
    /// A new life after a crash or a stop.
    Recovering,
}

impl Lifecycle {
    /// Whether `self -> to` is a step of the lifecycle.
    #[must_use]
    pub const fn allows(self, to: Self) -> bool {
        matches!(
            (self, to),
            (Self::Boot | Self::Recovering, Self::Loading)
                | (Self::Loading, Self::Warm)
                | (Self::Warm | Self::Reconfiguring, Self::Active)
                | (Self::Active, Self::Reconfiguring)
                | (Self::Active | Self::Reconfiguring, Self::Draining)
                | (Self::Boot | Self::Loading | Self::Draining | Self::Recovering, Self::Stopped)
                | (_, Self::Recovering)
        )
    }
}
