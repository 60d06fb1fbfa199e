//! How experts come to a GPU: from the disk into pinned memory, verified there, and from there, or from the warm arena, into a slot
//! of the device. Each loader has a stream of its own, so that copies run beside each other and beside the steps.
//!
//! What was copied is copied back and compared before anybody hears of it: an expert is verified wherever steps read it. A copy that
//! differs is made once more; then the device is lost.
//!
//! Where files can be read straight into the device, an expert is copied back alone, and verified there. One that is wrong is read once
//! more.

use super::CudaError;
use super::gpu::Gpu;
use super::stream::Stream;
use crate::arena::{Arena, ArenaError, SlotWriter};
use crate::cold::Direct;
use lite_llm_core::ids::{ExpertKey, Slot};
use lite_llm_core::input::Fault;
use lite_llm_model::checkpoint::native::ExpertBlob;
use std::sync::Arc;

/// Where an expert is read to, and where it is copied back to.
const READ: Slot = Slot(0);
const BACK: Slot = Slot(1);

/// A loader's way to the device. Nothing is taken before the first job.
#[derive(Debug)]
pub(crate) struct Uploads {
    gpu: Arc<Gpu>,
    ready: Option<Ready>,
}

#[derive(Debug)]
struct Ready {
    stream: Stream,
    /// Two pinned slots.
    room: Arc<Arena>,
    slot_bytes: usize,
}

impl Uploads {
    pub(crate) const fn new(gpu: Arc<Gpu>) -> Self {
        Self { gpu, ready: None }
    }

    /// Gives the device up, after an error.
    pub(crate) fn lose(&self) {
        self.gpu.lose();
    }

    fn ready(&mut self, slot_bytes: usize) -> Result<&Ready, CudaError> {
        self.gpu.enter()?;
        if self.ready.as_ref().is_none_or(|ready| ready.slot_bytes != slot_bytes) {
            let room = Arena::pinned(&self.gpu, 2, slot_bytes as u64, u64::MAX);
            let room = room.map_err(|error| match error {
                ArenaError::Gpu(error) => error,
                _ => CudaError::Pinned { bytes: 2 * slot_bytes as u64 },
            })?;
            self.ready = Some(Ready { stream: Stream::new(&self.gpu)?, room, slot_bytes });
        }
        Ok(self.ready.as_ref().expect("it was just made"))
    }

    /// Reads an expert and brings it into a slot of the device; what is there goes to `keep` first.
    ///
    /// # Errors
    /// If the device is lost; within, if the expert cannot be read.
    pub(crate) fn load(
        &mut self,
        slot: &SlotWriter,
        keep: Option<SlotWriter>,
        read: impl FnOnce(&mut SlotWriter) -> Result<(), Fault>,
    ) -> Result<Result<(), Fault>, CudaError> {
        let ready = self.ready(slot.bytes())?;
        if let Some(mut keep) = keep {
            ready.down(slot, &mut keep)?;
        }
        let mut room = ready.room.write(READ);
        if let Err(fault) = read(&mut room) {
            return Ok(Err(fault));
        }
        ready.up(&room, slot).map(Ok)
    }

    /// Reads an expert straight into a slot of the device; what is there goes to `keep` first.
    ///
    /// # Errors
    /// If the device is lost; within, if the expert cannot be read.
    pub(crate) fn read(
        &mut self,
        slot: &SlotWriter,
        keep: Option<SlotWriter>,
        direct: &Direct,
        (expert, blob): (ExpertKey, &ExpertBlob),
    ) -> Result<Result<(), Fault>, CudaError> {
        let ready = self.ready(slot.bytes())?;
        if let Some(mut keep) = keep {
            ready.down(slot, &mut keep)?;
        }
        let mut back = ready.room.write(BACK);
        let mut again = true;
        loop {
            if let Err(fault) = direct.read(expert, blob, slot) {
                // Of a device that is lost it is no fault of the file's.
                ready.stream.wait()?;
                return Ok(Err(fault));
            }
            let from = slot.address().expect("a slot of the device");
            // SAFETY: both slots have so many bytes, the host's is pinned, and both are in these hands until it was waited for.
            unsafe { ready.stream.down(from, back.start(), ready.slot_bytes) }?;
            ready.stream.wait()?;
            match direct.verify(expert, blob, &back) {
                Ok(()) => return Ok(Ok(())),
                Err(_) if std::mem::take(&mut again) => {}
                Err(fault) => return Ok(Err(fault)),
            }
        }
    }

    /// Brings an expert from its warm slot into one of the device, or has it change places with what is there.
    ///
    /// # Errors
    /// If the device is lost.
    pub(crate) fn promote(
        &mut self,
        slot: &SlotWriter,
        warm: &mut SlotWriter,
        exchange: bool,
    ) -> Result<(), CudaError> {
        let ready = self.ready(slot.bytes())?;
        if !exchange {
            return ready.up(warm, slot);
        }
        let mut room = ready.room.write(READ);
        ready.down(slot, &mut room)?;
        ready.up(warm, slot)?;
        warm.copy_from_slice(&room);
        Ok(())
    }
}

impl Ready {
    /// Copies a pinned slot into one of the device, and verifies it.
    fn up(&self, from: &SlotWriter, slot: &SlotWriter) -> Result<(), CudaError> {
        let to = slot.address().expect("a slot of the device");
        let mut back = self.room.write(BACK);
        let mut again = true;
        loop {
            // SAFETY: both slots have so many bytes, the host's is pinned, and both are in these hands until it was waited for.
            unsafe { self.stream.up(from.as_ptr(), to, self.slot_bytes) }?;
            // SAFETY: as above; the copy back begins when the copy has ended, as a stream does one thing after another.
            unsafe { self.stream.down(to, back.start(), self.slot_bytes) }?;
            self.stream.wait()?;
            if back[..] == from[..] {
                return Ok(());
            }
            if !std::mem::take(&mut again) {
                return Err(CudaError::Copy { bytes: self.slot_bytes as u64 });
            }
        }
    }

    /// Copies a slot of the device into a pinned one, twice, as nothing else says what it should hold.
    fn down(&self, slot: &SlotWriter, into: &mut SlotWriter) -> Result<(), CudaError> {
        let from = slot.address().expect("a slot of the device");
        let mut back = self.room.write(BACK);
        let mut again = true;
        loop {
            for to in [into.start(), back.start()] {
                // SAFETY: as above.
                unsafe { self.stream.down(from, to, self.slot_bytes) }?;
            }
            self.stream.wait()?;
            if back[..] == into[..] {
                return Ok(());
            }
            if !std::mem::take(&mut again) {
                return Err(CudaError::Copy { bytes: self.slot_bytes as u64 });
            }
        }
    }
}
