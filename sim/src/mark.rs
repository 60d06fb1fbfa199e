//! What is to happen in some runs: the branches that faults are injected for. A mark that no run of a set ever hits is a
//! knob that does nothing, and fails the test of that set.

use std::fmt;

macro_rules! marks {
    ($($variant:ident $name:literal $what:literal,)*) => {
        /// Something that is to happen now and then.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
        #[repr(u8)]
        pub enum Mark {
            $(#[doc = $what] $variant,)*
        }

        impl Mark {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its name.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)* }
            }

            /// What happens, for people.
            #[must_use]
            pub const fn what(self) -> &'static str {
                match self { $(Self::$variant => $what,)* }
            }
        }
    };
}

marks! {
    Recovered "recovered" "A node folds records of an earlier life.",
    RecoveredSnapshot "recovered-snapshot" "A node begins from a snapshot.",
    DiskReplaced "disk-replaced" "A journal cannot be read, and its disk is replaced.",
    Torn "torn" "A life begins with a log whose tail was cut, and nobody has said yet that it is whole.",
    WholeAgain "whole-again" "Such a log is known to be whole.",
    OpenFailed "open-failed" "A journal cannot be opened now, and can later.",
    Rewound "rewound" "A log is cut to what its leader has.",
    Installed "installed" "A log is replaced by a snapshot of its leader.",
    SnapshotWritten "snapshot-written" "A snapshot becomes durable.",
    StepRetried "step-retried" "A step is tried again.",
    LoadRetried "load-retried" "A load is tried again.",
    StepAborted "step-aborted" "A rank gives up a step because another cannot go on.",
    Foreseen "foreseen" "An expert is needed whose load foresight had begun.",
    ForeseenWrongly "foreseen-wrongly" "Foresight loaded what was not needed.",
    Compared "compared" "Steps with foresight and without were compared.",
    Waves "waves" "The experts of a layer come in more than one wave.",
    Preempted "preempted" "A request gives its pages to another.",
    Staged "staged" "An expert is loaded into the warm arena.",
    Promoted "promoted" "An expert comes from the warm arena.",
    Demoted "demoted" "An expert goes to the warm arena.",
    WrongBytes "wrong-bytes" "Wrong bytes are told by their checksum.",
    BootFailed "boot-failed" "A boot ends with a fault.",
    Switched "switched" "A switch of tiers is committed.",
    WishRefused "wish-refused" "What the operator wishes is not done, now or ever.",
    WishAgain "wish-again" "A wish that was answered is asked for again, and answered as before.",
    NotLeader "not-leader" "A command comes to a rank that does not lead.",
    NoLease "no-lease" "A command comes to a leader without a lease.",
    Reattached "reattached" "A client finds its stream again in another epoch.",
    Cancelled "cancelled" "A client no longer wants its stream.",
    DeadlineOver "deadline-over" "A stream ends because its time is over.",
    FaultEnded "fault-ended" "A stream ends because it could not be computed.",
    Complete "complete" "A stream ends as it was asked for.",
    EpochSkipped "epoch-skipped" "An epoch is given up before it was active.",
    LeaderChanged "leader-changed" "Another node leads than in the epoch before.",
    StandByUsed "stand-by-used" "A node that had no seat gets one.",
    FalselySuspected "falsely-suspected" "A node is suspected that lives.",
    FoundSilent "found-silent" "A node is suspected because it is silent.",
    FoundStuck "found-stuck" "A node is suspected because it gets nothing done.",
    NeverHeard "never-heard" "A node never beats after its start.",
    RestartWished "restart-wished" "A node is ended because the operator wishes it another life.",
    GaveUp "gave-up" "A node is left to the operator.",
    RefusedVersion "refused-version" "A node of another version takes no part.",
    Waiting "waiting" "A replica waits for the disk of one of its nodes.",
    SupervisorRecovered "supervisor-recovered" "The supervisor folds its journal and goes on.",
    Drained "drained" "A cluster finishes and stops, and is started again.",
    ShardsFound "shards-found" "A node finds checkpoints of an optimizer's shards on its disk.",
    ShardFetched "shard-fetched" "A shard of an optimizer comes from another node.",
    ShardLoaded "shard-loaded" "A shard of an optimizer comes from a disk.",
    Sealed "sealed" "A version of an optimizer's shards is on the disk of every rank.",
    WentBack "went-back" "All go back to a checkpoint.",
    ShardsMissed "shards-missed" "Nobody goes back further than a checkpoint whose disks are not read yet.",
    Corrupted "corrupted" "A message is not heard because its checksum is wrong.",
    Stale "stale" "A message of another epoch or life is not heard.",
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// How often each mark was hit.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Marks([u64; Mark::ALL.len()]);

impl Default for Marks {
    fn default() -> Self {
        Self([0; Mark::ALL.len()])
    }
}

impl Marks {
    /// Counts a mark.
    pub const fn hit(&mut self, mark: Mark) {
        self.0[mark as usize] += 1;
    }

    /// How often a mark was hit.
    #[must_use]
    pub const fn count(&self, mark: Mark) -> u64 {
        self.0[mark as usize]
    }

    /// Adds those of another run.
    pub fn add(&mut self, other: &Self) {
        for (sum, more) in self.0.iter_mut().zip(other.0) {
            *sum += more;
        }
    }
}
