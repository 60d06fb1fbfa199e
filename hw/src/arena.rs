//! An arena: slots of one size in one piece of memory. The hot and the warm one are all the memory that experts get. Of a model
//! on the CPU it is an anonymous map; of one on a GPU the hot one is memory of the device, the warm one is pinned.
//!
//! The engine says who may use a slot when: a slot is written only by the loader that has its `Load` or
//! `Stage`, and read only between `Provide` and `Released`. The arena does not take its word for it. Each slot counts its readers and knows
//! its writer, and a use that breaks the protocol panics before a byte is touched.

use std::ops::{Deref, DerefMut, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use lite_llm_core::ids::Slot;
use memmap2::{Advice, MmapMut, MmapRaw};

use crate::cold::Direct;
use crate::cuda::cufile::CuFileMemory;
use crate::cuda::memory::{Memory, Pinned};
use crate::cuda::{CudaError, Gpu};

/// Slots begin on page boundaries, as direct reads from a disk want it.
pub const SLOT_ALIGN: u64 = 4096;

/// A slot with a writer; any smaller number counts readers.
const WRITING: u32 = u32::MAX;

/// Why an arena cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ArenaError {
    /// A slot is not whole pages.
    #[error("a slot of {0} bytes is not a multiple of {SLOT_ALIGN}")]
    Unaligned(u64),
    /// The slots do not fit the budget.
    #[error("{slots} slots of {slot_bytes} bytes are above the budget of {budget} bytes")]
    Budget {
        /// How many slots.
        slots: u32,
        /// Bytes of a slot.
        slot_bytes: u64,
        /// Bytes that there are.
        budget: u64,
    },
    /// The GPU, or memory that is pinned for it, cannot be had.
    #[error(transparent)]
    Gpu(#[from] CudaError),
    /// The system refuses.
    #[error("cannot map {bytes} bytes for experts: {source}")]
    Map {
        /// How much.
        bytes: u64,
        /// Why.
        source: std::io::Error,
    },
}

/// What slots lie in.
#[derive(Debug)]
enum Place {
    Map(MmapRaw),
    Pinned(Pinned),
    Device(Memory),
}

/// The slots of an arena.
#[derive(Debug)]
pub struct Arena {
    /// Where files are read straight into it: whether the library knows it, or why not. It goes before the memory does.
    known: Option<Result<CuFileMemory, String>>,
    place: Place,
    slot_bytes: usize,
    users: Box<[AtomicU32]>,
}

impl Arena {
    /// Maps `slots` slots of `slot_bytes` bytes, all zero and not yet backed by memory, within `budget` bytes.
    ///
    /// # Errors
    /// If the slots are above the budget, or not whole pages, or the address space cannot be had.
    pub fn new(slots: u32, slot_bytes: u64, budget: u64) -> Result<Arc<Self>, ArenaError> {
        let length = Self::length(slots, slot_bytes, budget)?;
        let bytes = length as u64;
        let map = MmapMut::map_anon(length.max(1)).map_err(|source| ArenaError::Map { bytes, source })?;
        // Decode reads experts end to end: with small pages it would wait for page walks. A kernel without large pages
        // refuses, and nothing is lost but time.
        let _ = map.advise(Advice::HugePage);
        Ok(Self::of(Place::Map(map.into()), slots, length))
    }

    /// The same in memory that is pinned for copies to a GPU.
    ///
    /// # Errors
    /// If the slots are above the budget, or not whole pages, or so much cannot be pinned.
    pub(crate) fn pinned(
        gpu: &Arc<Gpu>,
        slots: u32,
        slot_bytes: u64,
        budget: u64,
    ) -> Result<Arc<Self>, ArenaError> {
        let length = Self::length(slots, slot_bytes, budget)?;
        Ok(Self::of(Place::Pinned(Pinned::new(gpu, length)?), slots, length))
    }

    /// The same in memory of a GPU, within its budget. The bytes of such slots are the device's alone: [`SlotWriter::address`]
    /// says where they are. Where files are read straight into them, they are made known for it.
    ///
    /// # Errors
    /// If the slots are not whole pages, or the GPU does not have so much.
    pub(crate) fn on_device(
        gpu: &Arc<Gpu>,
        slots: u32,
        slot_bytes: u64,
        direct: Option<&Direct>,
    ) -> Result<Arc<Self>, ArenaError> {
        let length = Self::length(slots, slot_bytes, u64::MAX)?;
        let memory = Memory::new(gpu, "slots of experts", length as u64)?;
        // SAFETY: all is of this memory, and the arena lets go of both in this order.
        let know = |direct: &Direct| unsafe { direct.know(memory.at(), length) };
        let known = direct.filter(|_| length > 0).map(know);
        Ok(Self::known(known, Place::Device(memory), slots, length))
    }

    fn length(slots: u32, slot_bytes: u64, budget: u64) -> Result<usize, ArenaError> {
        if !slot_bytes.is_multiple_of(SLOT_ALIGN) {
            return Err(ArenaError::Unaligned(slot_bytes));
        }
        let fits = u64::from(slots).checked_mul(slot_bytes).filter(|&bytes| bytes <= budget);
        let bytes = fits.ok_or(ArenaError::Budget { slots, slot_bytes, budget })?;
        Ok(usize::try_from(bytes).unwrap_or(usize::MAX))
    }

    fn of(place: Place, slots: u32, length: usize) -> Arc<Self> {
        Self::known(None, place, slots, length)
    }

    fn known(
        known: Option<Result<CuFileMemory, String>>,
        place: Place,
        slots: u32,
        length: usize,
    ) -> Arc<Self> {
        let users = (0..slots).map(|_| AtomicU32::new(0)).collect();
        Arc::new(Self { known, place, slot_bytes: length / (slots.max(1) as usize), users })
    }

    /// Where the slots begin in the memory of a GPU, and bytes of each; none if they are the host's.
    pub(crate) const fn on_gpu(&self) -> Option<(u64, u64)> {
        match &self.place {
            Place::Device(memory) => Some((memory.at(), self.slot_bytes as u64)),
            Place::Map(_) | Place::Pinned(_) => None,
        }
    }

    /// Whether the library that reads files straight into the slots knows them, or why not; none if nothing is read so.
    pub(crate) fn registered(&self) -> Option<Result<(), &str>> {
        self.known.as_ref().map(|known| known.as_ref().map(|_| ()).map_err(String::as_str))
    }

    /// Number of slots.
    pub fn slots(&self) -> usize {
        self.users.len()
    }

    /// Takes a slot to write into it.
    ///
    /// # Panics
    /// If somebody reads or writes it: the engine gave a slot that is in use to a load.
    pub fn write(self: &Arc<Self>, slot: Slot) -> SlotWriter {
        let users = self.users(slot);
        if let Err(users) = users.compare_exchange(0, WRITING, Ordering::Acquire, Ordering::Relaxed) {
            panic!("slot {slot} is to be written while it is in use ({})", Users(users));
        }
        SlotWriter { arena: Arc::clone(self), slot }
    }

    /// Takes one of some slots that nobody uses, if there is one, to write into it.
    ///
    /// # Panics
    /// If there are no such slots.
    pub(crate) fn write_any(self: &Arc<Self>, mut of: Range<u32>) -> Option<SlotWriter> {
        let free = |slot: &u32| {
            let users = self.users(Slot(*slot));
            users.compare_exchange(0, WRITING, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        of.find(free).map(|slot| SlotWriter { arena: Arc::clone(self), slot: Slot(slot) })
    }

    /// Takes a slot to read it.
    ///
    /// # Panics
    /// If somebody writes it: the engine provided an expert that is not there yet.
    pub fn read(self: &Arc<Self>, slot: Slot) -> SlotReader {
        let users = self.users(slot);
        let more = |users: u32| users.checked_add(1).filter(|&users| users < WRITING);
        if let Err(users) = users.fetch_update(Ordering::Acquire, Ordering::Relaxed, more) {
            panic!("slot {slot} is to be read while it is in use ({})", Users(users));
        }
        SlotReader { arena: Arc::clone(self), slot }
    }

    fn users(&self, slot: Slot) -> &AtomicU32 {
        let count = self.slots();
        self.users.get(slot.0 as usize).unwrap_or_else(|| panic!("slot {slot} is not one of {count}"))
    }

    fn start(&self, slot: Slot) -> *mut u8 {
        let offset = slot.0 as usize * self.slot_bytes;
        let (start, bytes) = match &self.place {
            Place::Map(map) => (map.as_mut_ptr(), map.len()),
            Place::Pinned(pinned) => (pinned.start(), pinned.len()),
            Place::Device(_) => panic!("the bytes of slot {slot} are in the memory of a GPU"),
        };
        assert!(slot.0 < self.users.len() as u32 && offset + self.slot_bytes <= bytes);
        // SAFETY: the assertion above says that offset and slot lie in the memory.
        unsafe { start.add(offset) }
    }
}

struct Users(u32);

impl std::fmt::Display for Users {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0 == WRITING { f.write_str("a writer") } else { write!(f, "{} readers", self.0) }
    }
}

/// The only one who uses a slot.
#[derive(Debug)]
pub struct SlotWriter {
    arena: Arc<Arena>,
    slot: Slot,
}

impl SlotWriter {
    /// The arena that the slot is of.
    pub(crate) const fn arena(&self) -> &Arc<Arena> {
        &self.arena
    }

    /// Which slot it is.
    pub(crate) const fn slot(&self) -> Slot {
        self.slot
    }

    /// Where the slot begins, for a kernel that writes to it. No reference to its bytes may be made before it is done.
    pub(crate) fn start(&mut self) -> *mut u8 {
        self.arena.start(self.slot)
    }

    /// Bytes of the slot.
    pub(crate) fn bytes(&self) -> usize {
        self.arena.slot_bytes
    }

    /// Where the slot begins in the memory of a GPU; none if it is the host's.
    pub(crate) fn address(&self) -> Option<u64> {
        self.arena.on_gpu().map(|(start, bytes)| start + u64::from(self.slot.0) * bytes)
    }
}

impl Deref for SlotWriter {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the slot lies in the memory, which lives as long as `arena`; its count is WRITING until this is dropped,
        // so there is no other reference, and `&self` allows no mutable one of this writer's.
        unsafe { std::slice::from_raw_parts(self.arena.start(self.slot), self.arena.slot_bytes) }
    }
}

impl DerefMut for SlotWriter {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `&mut self` makes this the only reference.
        unsafe { std::slice::from_raw_parts_mut(self.arena.start(self.slot), self.arena.slot_bytes) }
    }
}

impl Drop for SlotWriter {
    fn drop(&mut self) {
        let before = self.arena.users(self.slot).swap(0, Ordering::Release);
        debug_assert_eq!(before, WRITING, "a writer is alone");
    }
}

/// One of those who read a slot.
#[derive(Debug)]
pub struct SlotReader {
    arena: Arc<Arena>,
    slot: Slot,
}

impl Deref for SlotReader {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: the slot lies in the memory, which lives as long as `arena`; its count is above 0 and below WRITING until
        // this is dropped, so all references to it are shared ones.
        unsafe { std::slice::from_raw_parts(self.arena.start(self.slot), self.arena.slot_bytes) }
    }
}

impl Drop for SlotReader {
    fn drop(&mut self) {
        let before = self.arena.users(self.slot).fetch_sub(1, Ordering::Release);
        debug_assert!(before > 0 && before < WRITING, "a reader was counted");
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use std::panic::{AssertUnwindSafe, catch_unwind};

    #[test]
    fn what_is_written_is_read_in_its_slot_alone() {
        let arena = Arena::new(3, 4096, 3 * 4096).unwrap();
        arena.write(Slot(1)).fill(7);
        assert!(arena.read(Slot(1)).iter().all(|&byte| byte == 7));
        assert!(arena.read(Slot(0)).iter().chain(&*arena.read(Slot(2))).all(|&byte| byte == 0));
        assert_eq!(arena.read(Slot(2)).as_ptr() as usize % 4096, 0);
    }

    #[test]
    fn a_broken_protocol_panics() {
        let arena = Arena::new(2, 4096, 1 << 20).unwrap();
        let refused = |use_it: &dyn Fn()| assert!(catch_unwind(AssertUnwindSafe(use_it)).is_err());
        let reader = arena.read(Slot(0));
        let second = arena.read(Slot(0));
        refused(&|| drop(arena.write(Slot(0))));
        drop(reader);
        refused(&|| drop(arena.write(Slot(0))));
        drop(second);
        let writer = arena.write(Slot(0));
        refused(&|| drop(arena.read(Slot(0))));
        refused(&|| drop(arena.write(Slot(0))));
        drop(arena.write(Slot(1)));
        drop(writer);
        drop(arena.read(Slot(0)));
        refused(&|| drop(arena.read(Slot(2))));
    }

    #[test]
    fn the_budget_is_hard() {
        assert!(matches!(Arena::new(3, 4096, 3 * 4096 - 1), Err(ArenaError::Budget { .. })));
        assert!(matches!(Arena::new(u32::MAX, 1 << 62, u64::MAX), Err(ArenaError::Budget { .. })));
        assert!(matches!(Arena::new(1, 5000, 1 << 20), Err(ArenaError::Unaligned(5000))));
        assert_eq!(Arena::new(0, 0, 0).unwrap().slots(), 0);
    }

    #[test]
    fn threads_share_slots() {
        let arena = Arena::new(4, 4096, 1 << 20).unwrap();
        std::thread::scope(|scope| {
            for slot in 0..4 {
                let arena = &arena;
                scope.spawn(move || {
                    for round in 0..50u8 {
                        arena.write(Slot(slot)).fill(round);
                        let (a, b) = (arena.read(Slot(slot)), arena.read(Slot(slot)));
                        assert!(a.iter().chain(&*b).all(|&byte| byte == round));
                    }
                });
            }
        });
    }
}
