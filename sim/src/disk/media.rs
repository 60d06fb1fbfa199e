//! A file on a simulated medium: what programs see of it, what is safe, and what a crash makes of the rest.

use super::sectors::Bytes;
use super::wear::Wear;
use crate::hazard::Hazard;
use crate::random::Choice;
use std::collections::BTreeSet;
use std::ops::Range;

/// How unsynced sectors, lengths and names end in a crash.
#[derive(Clone, Debug)]
pub enum Ending {
    /// None of it happened.
    Old,
    /// All of it happened.
    New,
    /// Lengths and names happened, bytes are zero.
    Zero,
    /// Lengths and names happened, bytes are anything.
    Garbage,
    /// Lengths and names happened; the first half of each sector did.
    Torn,
    /// Lengths and names happened; what was under way cannot be read.
    Unreadable,
    /// Each by itself, by a seed.
    Any(Box<Choice>),
    /// Each by itself, by the decisions that the disk lives under; without any it is `Old`.
    Decided,
}

/// How one sector ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum SectorEnd {
    New,
    Zero,
    Garbage,
    Torn,
    Unreadable,
}

#[derive(Clone, Debug, Default)]
pub(super) struct File {
    /// As programs see it.
    pub(super) bytes: Bytes,
    /// How much of it is synced.
    pub(super) synced: usize,
    /// Stretches that are in the cache and, whatever was said, on no medium.
    pub(super) dropped: Vec<Range<usize>>,
    /// Sectors that cannot be read, by number.
    pub(super) unreadable: BTreeSet<usize>,
}

impl Ending {
    /// Whether a name that was not synced with its directory is there.
    pub(super) fn name_happened(&mut self, wear: &mut Option<Wear>) -> bool {
        match self {
            Self::Old => false,
            Self::New | Self::Zero | Self::Garbage | Self::Torn | Self::Unreadable => true,
            Self::Any(choice) => choice.chance(500),
            Self::Decided => wear.as_mut().is_some_and(|wear| wear.decide(Hazard::EndName).is_some()),
        }
    }

    /// How many of `unsynced` bytes are there.
    fn length(&mut self, unsynced: usize, wear: &mut Option<Wear>) -> usize {
        match self {
            Self::Old => 0,
            Self::New | Self::Zero | Self::Garbage | Self::Torn | Self::Unreadable => unsynced,
            Self::Any(choice) => choice.index(unsynced + 1),
            Self::Decided => match wear.as_mut().and_then(|wear| wear.decide(Hazard::EndLength)) {
                None => 0,
                // Every other time all of it.
                Some(value) if value.is_multiple_of(2) => unsynced,
                Some(value) => usize::try_from((value >> 1) % (unsynced as u64 + 1)).unwrap_or(0),
            },
        }
    }

    fn sector(&mut self, wear: &mut Option<Wear>) -> SectorEnd {
        const ENDS: [SectorEnd; 4] =
            [SectorEnd::Zero, SectorEnd::Garbage, SectorEnd::Torn, SectorEnd::Unreadable];
        match self {
            Self::Old | Self::New => SectorEnd::New,
            Self::Zero => SectorEnd::Zero,
            Self::Garbage => SectorEnd::Garbage,
            Self::Torn => SectorEnd::Torn,
            Self::Unreadable => SectorEnd::Unreadable,
            // An unreadable sector in a journal stops its reader until somebody writes there: not for tests that expect
            // every ending to be recovered from alone.
            Self::Any(choice) => [SectorEnd::New, ENDS[0], ENDS[1], ENDS[2]][choice.index(4)],
            Self::Decided => {
                let value = wear.as_mut().and_then(|wear| wear.decide(Hazard::EndSector));
                value.map_or(SectorEnd::New, |value| {
                    let allowed = if wear.as_mut().is_some_and(Wear::may_damage) { 4 } else { 3 };
                    ENDS[usize::try_from(value % allowed).unwrap_or(0)]
                })
            }
        }
    }
}

impl File {
    /// The numbers of the sectors in which a stretch lies.
    pub(super) const fn sectors(range: &Range<usize>, sector: usize) -> Range<usize> {
        range.start / sector..range.end.div_ceil(sector)
    }

    pub(super) fn crash(&mut self, ending: &mut Ending, sector_bytes: usize, wear: &mut Option<Wear>) {
        for range in std::mem::take(&mut self.dropped) {
            let end = range.end.min(self.bytes.len());
            self.bytes.zero(range.start.min(end)..end);
        }
        let (synced, len) = (self.synced, self.bytes.len());
        if synced == len {
            return;
        }
        let keep = synced + ending.length(len - synced, wear);
        self.bytes.truncate(keep);
        let mut start = synced / sector_bytes * sector_bytes;
        while start < keep {
            let end = keep.min(start + sector_bytes);
            let unsynced = start.max(synced);
            match ending.sector(wear) {
                SectorEnd::New => {}
                SectorEnd::Zero => self.bytes.zero(unsynced..end),
                SectorEnd::Garbage => {
                    self.bytes.change_each(start..end, |at, part| scramble(at - start, part))
                }
                SectorEnd::Torn => {
                    let middle = (start + sector_bytes / 2).clamp(unsynced, end);
                    self.bytes.zero(middle..end);
                }
                SectorEnd::Unreadable => {
                    self.unreadable.insert(start / sector_bytes);
                }
            }
            start = end;
        }
        self.synced = keep;
    }
}

/// A whole sector becomes something else, what was synced in it too; this is the part of it that begins there.
fn scramble(first: usize, part: &mut [u8]) {
    for (i, byte) in (first..).zip(part) {
        *byte = byte.wrapping_mul(167).wrapping_add(u8::try_from(i % 251).unwrap_or(0)) ^ 0x5a;
    }
}
