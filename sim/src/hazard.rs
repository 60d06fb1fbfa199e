//! Every kind of fault that a simulated cluster knows, each with its name, what it does and how often it may happen.
//!
//! A hazard names a decision by its meaning; [`crate::decision`] says whether it happens. The numbers below are file
//! formats (a decision log holds the names) and seeds of draws (the number of the variant), so that variants are only
//! ever added at the end of their group's range.

use std::fmt;

/// What part of the world a hazard strikes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Area {
    /// Messages between machines.
    Network,
    /// Processes.
    Process,
    /// Clocks.
    Clock,
    /// Disks.
    Disk,
    /// Compute devices and copies to them.
    Device,
    /// Shards and manifests.
    Data,
    /// What people do at a bad moment.
    Operator,
}

impl fmt::Display for Area {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Network => "network",
            Self::Process => "process",
            Self::Clock => "clock",
            Self::Disk => "disk",
            Self::Device => "device",
            Self::Data => "data",
            Self::Operator => "operator",
        })
    }
}

/// A hazard's entry in the table.
#[derive(Clone, Copy, Debug)]
pub struct About {
    /// Its name on the command line and in decision logs.
    pub name: &'static str,
    /// Its area.
    pub area: Area,
    /// What happens, for people.
    pub what: &'static str,
    /// How often it happens at most, in a million of its opportunities.
    pub per_million: u32,
}

macro_rules! hazards {
    ($($variant:ident = $number:literal $name:literal $area:ident $rate:literal $what:literal,)*) => {
        /// A kind of fault.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Hazard {
            $(#[doc = $what] $variant = $number,)*
        }

        impl Hazard {
            /// All of them, in the order of the table.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)*];

            /// Its entry in the table.
            #[must_use]
            pub const fn about(self) -> About {
                match self {
                    $(Self::$variant => About {
                        name: $name, area: Area::$area, what: $what, per_million: $rate,
                    },)*
                }
            }
        }
    };
}

hazards! {
    LoseMessage = 1 "lose-message" Network 30_000 "A message is lost.",
    DelayMessage = 2 "delay-message" Network 30_000 "A message is late, and later ones overtake it.",
    DoubleMessage = 3 "double-message" Network 20_000 "A message arrives twice.",
    CorruptMessage = 4 "corrupt-message" Network 10_000 "Bits of a message change; its checksum must tell.",
    Partition = 5 "partition" Network 60_000 "Some nodes hear nothing of the others, both ways or one way.",
    Clog = 6 "clog" Network 60_000 "Everything on a link is late for a while.",
    ResetConnection = 7 "reset-connection" Network 40_000 "What is under way on a link is lost at once.",

    Crash = 16 "crash" Process 400 "A process dies between two outputs.",
    CrashRecovering = 17 "crash-recovering" Process 60_000 "A process dies while it reads its journal.",
    CrashSupervisor = 18 "crash-supervisor" Process 1_500 "The supervisor dies between two outputs.",
    Pause = 19 "pause" Process 25_000 "A process stands still for a while, and does not know it.",
    SlowStart = 20 "slow-start" Process 100_000 "A process takes long to start.",
    CrashLoop = 21 "crash-loop" Process 20_000 "A process dies at its next starts too.",
    UnseenExit = 22 "unseen-exit" Process 300_000 "Nobody tells the supervisor that a process has ended.",
    SlowFence = 23 "slow-fence" Process 900_000 "A process that is to be ended cannot be reached for a while.",

    ClockOffset = 32 "clock-offset" Clock 500_000 "A clock begins anywhere.",
    ClockDrift = 33 "clock-drift" Clock 500_000 "A clock runs fast or slow, within the stated bound.",
    ClockBack = 34 "clock-back" Clock 20_000 "A wall clock is set back.",
    ClockJump = 35 "clock-jump" Clock 20_000 "A wall clock jumps ahead.",

    ReadError = 48 "read-error" Disk 20_000 "A read fails, once.",
    UnreadableSector = 49 "unreadable-sector" Disk 10_000 "A sector cannot be read any more.",
    WriteError = 50 "write-error" Disk 1_000 "A write fails.",
    SyncError = 51 "sync-error" Disk 1_000 "A sync fails, and its dirty pages are dropped.",
    FullAppend = 52 "full-append" Disk 500 "The disk is full in the middle of a write.",
    FullRename = 53 "full-rename" Disk 15_000 "The disk is full when a file is renamed.",
    Rot = 54 "rot" Disk 10_000 "A synced bit changes for good.",
    MisdirectRead = 55 "misdirect-read" Disk 15_000 "A read returns another place.",
    MisdirectWrite = 56 "misdirect-write" Disk 2_000 "A write lands in another place.",
    PhantomWrite = 57 "phantom-write" Disk 2_000 "A write is acknowledged and never reaches the medium.",
    StaleRead = 58 "stale-read" Disk 15_000 "A read returns what was there before the last write.",
    StallDisk = 59 "stall-disk" Disk 2_000 "An operation takes very long.",
    SlowDisk = 60 "slow-disk" Disk 50_000 "An operation takes longer than others.",
    EndLength = 61 "end-length" Disk 700_000 "A crash leaves part of an unsynced length.",
    EndSector = 62 "end-sector" Disk 900_000 "A crash leaves an unsynced sector zero, garbage, shorn or unreadable.",
    EndName = 63 "end-name" Disk 500_000 "A crash keeps a name that was not synced with its directory.",

    AllocationFails = 80 "allocation-fails" Device 20_000 "Memory for the arenas cannot be had.",
    DeviceLost = 81 "device-lost" Device 1_000 "The device is gone in the middle of a step.",
    DeviceHang = 82 "device-hang" Device 4_000 "A step never ends.",
    DeviceError = 83 "device-error" Device 3_000 "The device reports an uncorrectable error.",
    LateCopy = 84 "late-copy" Device 50_000 "A copy ends late, after later ones.",
    FailedCopy = 85 "failed-copy" Device 10_000 "A copy fails.",
    WrongCopy = 86 "wrong-copy" Device 2_000 "A copy delivers wrong bytes and reports success.",
    SlowDevice = 87 "slow-device" Device 20_000 "A step takes long.",

    CorruptShard = 96 "corrupt-shard" Data 2_000 "Bytes of a shard are wrong.",
    TruncatedShard = 97 "truncated-shard" Data 2_000 "A shard is too short.",
    StaleShard = 98 "stale-shard" Data 2_000 "A shard is of another version.",
    MissingShard = 99 "missing-shard" Data 2_000 "A shard is not there.",
    DamagedManifest = 100 "damaged-manifest" Data 15_000 "The manifest cannot be read.",
    OtherManifest = 101 "other-manifest" Data 15_000 "The manifest is of another version.",

    OperatorSwitch = 112 "operator-switch" Operator 100_000 "An operator switches tiers.",
    OperatorDrain = 113 "operator-drain" Operator 3_000 "An operator drains the cluster.",
    OperatorRestart = 114 "operator-restart" Operator 15_000 "An operator restarts a node.",
    OperatorUpgrade = 115 "operator-upgrade" Operator 5_000 "An operator starts a node with a newer version.",
    OperatorSnapshot = 116 "operator-snapshot" Operator 20_000 "An operator wants a snapshot.",
}

impl Hazard {
    /// The hazard of a name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|hazard| hazard.about().name == name)
    }

    /// The hazard of a name, or every hazard of an area's name.
    ///
    /// # Errors
    /// For people, with the way to the list.
    pub fn parse_list(list: &str) -> Result<Vec<Self>, String> {
        let mut found = Vec::new();
        for word in list.split(',').map(str::trim).filter(|word| !word.is_empty()) {
            let before = found.len();
            let fits = |hazard: &Self| {
                word == "all" || hazard.about().name == word || hazard.about().area.to_string() == word
            };
            found.extend(Self::ALL.iter().copied().filter(fits));
            if found.len() == before && word != "none" {
                return Err(format!(
                    "there is no fault {word:?}; `lite-llm sim --list-faults` names them all"
                ));
            }
        }
        found.sort_unstable();
        found.dedup();
        Ok(found)
    }
}

impl fmt::Display for Hazard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.about().name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_distinct_and_found_again() {
        for &hazard in Hazard::ALL {
            assert_eq!(Hazard::named(hazard.about().name), Some(hazard));
        }
    }

    #[test]
    fn lists_hold_names_and_areas() {
        let clock = Hazard::parse_list("clock").expect("an area");
        assert_eq!(clock, [Hazard::ClockOffset, Hazard::ClockDrift, Hazard::ClockBack, Hazard::ClockJump]);
        assert_eq!(Hazard::parse_list("rot, lose-message"), Ok(vec![Hazard::LoseMessage, Hazard::Rot]));
        assert_eq!(Hazard::parse_list("all").expect("all").len(), Hazard::ALL.len());
        assert_eq!(Hazard::parse_list("none"), Ok(vec![]));
        assert!(Hazard::parse_list("gremlins").expect_err("no such fault").contains("--list-faults"));
    }
}
