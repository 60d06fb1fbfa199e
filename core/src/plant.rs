//! Bugs on request, so that a simulation can be seen to find them: its own test.
//!
//! Without the feature `plant` every question is answered with a constant no, and nothing of it is in the program.

macro_rules! bugs {
    ($($variant:ident $name:literal $area:literal $what:literal,)*) => {
        /// A bug that can be planted.
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        #[repr(u32)]
        pub enum Bug {
            $(#[doc = $what] $variant,)*
        }

        impl Bug {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its name on the command line.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// The part of the system that it is in.
            #[must_use]
            pub const fn area(self) -> &'static str {
                match self { $(Self::$variant => $area,)* }
            }

            /// What is wrong, for people.
            #[must_use]
            pub const fn what(self) -> &'static str {
                match self { $(Self::$variant => $what,)* }
            }
        }
    };
}

bugs! {
    SkipSync "skip-sync" "durability" "Records are said to be durable without a sync.",
    SkipDirSync "skip-dir-sync" "durability" "A new file's name is not made durable.",
    IgnoreSyncError "ignore-sync-error" "durability" "A failed sync counts as done.",
    DamageAsTail "damage-as-tail" "durability" "Damaged records that were synced are taken for a torn tail.",
    TellOwnDurable "tell-own-durable" "durability" "Clients are told what only the leader has on disk.",
    CommitFastest "commit-fastest" "durability" "A record is committed when the fastest member has it.",
    AckUnflushed "ack-unflushed" "durability" "A follower confirms records before they are on disk.",
    SnapshotEarly "snapshot-early" "durability" "A snapshot is written before what it holds is committed.",
    NoFence "no-fence" "fencing" "A leader is replaced while it may still hold a lease.",
    LeaseIgnored "lease-ignored" "fencing" "A leader acts without a lease.",
    AnyLeads "any-leads" "fencing" "A node leads that never had what was told.",
    FloorIgnored "floor-ignored" "fencing" "A node leads whose disk has lost what was told.",
    GenerationForgotten "generation-forgotten" "generations" "Positions are computed again under the present generation.",
    MaskIgnored "mask-ignored" "generations" "Masked tiers may be selected.",
    SlotEarly "slot-early" "slots" "A slot is given away while it is read.",
    CopyUnverified "copy-unverified" "slots" "Wrong bytes of a copy are not found out.",
    ArenasKept "arenas-kept" "slots" "A new epoch believes the arenas of the old one to be empty, and they are not.",
    GatherFirst "gather-first" "collectives" "What several ranks owe is done when the first has answered.",
    ShareMissing "share-missing" "collectives" "An exchange ends before everybody has been heard.",
    LinkDoubled "link-doubled" "collectives" "A message that comes twice is delivered twice.",
    RewindSkipped "rewind-skipped" "resync" "A log with records that its leader does not have is not cut.",
    LacksOne "lacks-one" "resync" "A log is brought up less one record.",
    ReadEarly "read-early" "resync" "A leader reads its log for others before all of it is durable.",
    TrainedByOne "trained-by-one" "resync" "A version of the shards counts when one rank has it.",
    SealedByOne "sealed-by-one" "resync" "A checkpoint counts when one rank has it on disk.",
    ShardsUnverified "shards-unverified" "resync" "The version to go back to is chosen before all disks were read.",
    SilenceIgnored "silence-ignored" "detector" "A silent node is never suspected.",
    HangIgnored "hang-ignored" "detector" "A node that gets nothing done is never suspected.",
    WishesAreProgress "wishes-are-progress" "detector" "What clients ask for counts as progress.",
    OffsetSkipped "offset-skipped" "scheduler" "A client that comes back misses a token.",
    WishForgotten "wish-forgotten" "scheduler" "A wish that was answered is done again when it is asked for again.",
    PagesLost "pages-lost" "scheduler" "The pages of a preempted request are not given back.",
    ClockJumps "clock-jumps" "scheduler" "The time of a log jumps to the clock of its new leader.",
    EpochReused "epoch-reused" "supervisor" "New members are told the epoch of the old ones.",
    RestartUnrecorded "restart-unrecorded" "supervisor" "A node is started again before its end is recorded.",
    LifeReused "life-reused" "supervisor" "A node is started again under the incarnation that it had.",
}

impl Bug {
    /// The bug of a name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|bug| bug.name() == name)
    }
}

#[cfg(feature = "plant")]
mod planted {
    use super::Bug;
    use core::sync::atomic::{AtomicU32, Ordering};

    static PLANTED: AtomicU32 = AtomicU32::new(u32::MAX);

    /// Has one bug, or none, in everything of this process.
    pub fn plant(bug: Option<Bug>) {
        PLANTED.store(bug.map_or(u32::MAX, |bug| bug as u32), Ordering::Relaxed);
    }

    /// Whether a bug is planted.
    #[must_use]
    pub fn is(bug: Bug) -> bool {
        PLANTED.load(Ordering::Relaxed) == bug as u32
    }
}

#[cfg(feature = "plant")]
pub use planted::{is, plant};

/// Whether a bug is planted: never.
#[cfg(not(feature = "plant"))]
#[must_use]
pub const fn is(_: Bug) -> bool {
    false
}
