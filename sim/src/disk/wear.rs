//! What befalls a disk while it runs, by the decisions of a run.

use super::Fault;
use crate::atlas::{Atlas, DataClass};
use crate::decision::Decisions;
use crate::hazard::Hazard;
use lite_llm_core::disk::DiskOp;
use lite_llm_core::journal::frame::parse_snapshot_name;

/// An operation takes this long when nothing is wrong; a sync ten times as long.
const OPERATION_NS: u64 = 5_000;

/// Added to a node's number where its second disk is the subject of a decision.
const SECOND: u64 = 1 << 32;

/// The decisions that a disk lives under.
#[derive(Clone, Debug)]
pub(super) struct Wear {
    decisions: Decisions,
    atlas: Atlas,
    node: u32,
    /// Whether it is the node's second disk.
    pub(super) second: bool,
    /// Opportunities so far.
    asked: u64,
    /// Nanoseconds that operations have taken since somebody asked.
    pub(super) took_ns: u64,
}

/// What happens to a read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ReadFault {
    /// It fails, once.
    Error,
    /// A sector of it cannot be read any more.
    Unreadable(u64),
    /// A bit of it changes for good.
    Rot(u64),
    /// It returns another place.
    Misdirected(u64),
    /// It returns what was there before the last write.
    Stale,
}

impl Wear {
    pub(super) const fn new(decisions: Decisions, atlas: Atlas, node: u32) -> Self {
        Self { decisions, atlas, node, second: false, asked: 0, took_ns: 0 }
    }

    /// Whether something happens at the next opportunity.
    pub(super) fn decide(&mut self, hazard: Hazard) -> Option<u64> {
        self.asked += 1;
        let disk = u64::from(self.node) + if self.second { SECOND } else { 0 };
        self.decisions.at(hazard, disk, self.asked)
    }

    /// Whether this disk's journal may be damaged.
    pub(super) fn may_damage(&mut self) -> bool {
        self.atlas.damage(self.node, DataClass::Journal)
    }

    fn damages(&mut self, hazard: Hazard, name: &str) -> Option<u64> {
        let value = self.decide(hazard)?;
        let snapshot = parse_snapshot_name(name).is_some();
        let class = if snapshot { DataClass::Snapshot } else { DataClass::Journal };
        self.atlas.damage(self.node, class).then_some(value)
    }

    /// What happens to a change of the disk. A crash is the process's, not the disk's.
    pub(super) fn change(&mut self, op: DiskOp) -> Option<Fault> {
        self.takes(op);
        let decided = |wear: &mut Self, hazard, fault| wear.decide(hazard).map(|_| fault);
        match op {
            DiskOp::Append => decided(self, Hazard::WriteError, Fault::Io)
                .or_else(|| decided(self, Hazard::FullAppend, Fault::NoSpace)),
            DiskOp::Sync => decided(self, Hazard::SyncError, Fault::Io),
            DiskOp::Rename => decided(self, Hazard::FullRename, Fault::NoSpace),
            DiskOp::SyncDir | DiskOp::Create | DiskOp::Remove | DiskOp::Read | DiskOp::Len | DiskOp::List => {
                None
            }
        }
    }

    /// Whether an append lies about itself: it is in no place, or in another one too.
    pub(super) fn append_lies(&mut self, name: &str) -> Option<Option<u64>> {
        if self.damages(Hazard::PhantomWrite, name).is_some() {
            return Some(None);
        }
        self.damages(Hazard::MisdirectWrite, name).map(Some)
    }

    /// What happens to a read. One that lies counts as damage: a log that seems shorter than it is was cut for good.
    pub(super) fn read(&mut self, name: &str) -> Option<ReadFault> {
        self.takes(DiskOp::Read);
        if self.decide(Hazard::ReadError).is_some() {
            return Some(ReadFault::Error);
        }
        if self.damages(Hazard::StaleRead, name).is_some() {
            return Some(ReadFault::Stale);
        }
        if let Some(value) = self.damages(Hazard::MisdirectRead, name) {
            return Some(ReadFault::Misdirected(value));
        }
        if let Some(value) = self.damages(Hazard::UnreadableSector, name) {
            return Some(ReadFault::Unreadable(value));
        }
        self.damages(Hazard::Rot, name).map(ReadFault::Rot)
    }

    fn takes(&mut self, op: DiskOp) {
        let usual =
            if matches!(op, DiskOp::Sync | DiskOp::SyncDir) { 10 * OPERATION_NS } else { OPERATION_NS };
        let slow = self.decide(Hazard::SlowDisk).map_or(0, |value| value % 20_000_000);
        let stall = self.decide(Hazard::StallDisk).map_or(0, |value| value % 5_000_000_000);
        self.took_ns += usual + slow + stall;
    }
}
