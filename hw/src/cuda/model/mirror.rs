//! Lists that the host makes for kernels: written to pinned memory, then copied to the same places on the device, all at once.

use super::super::CudaError;
use super::super::gpu::Gpu;
use super::super::memory::Pinned;
use super::super::stream::Stream;
use std::sync::Arc;

/// Lists begin at multiples of this.
const ALIGN: usize = 16;

/// A piece of pinned memory and one of the device that becomes its copy.
#[derive(Debug)]
pub(super) struct Mirror {
    pinned: Pinned,
    device: u64,
    used: usize,
    sent: usize,
}

impl Mirror {
    /// Of so many words, at an address of the device that has as many.
    pub(super) fn new(gpu: &Arc<Gpu>, device: u64, words: usize) -> Result<Self, CudaError> {
        Ok(Self { pinned: Pinned::new(gpu, 4 * words)?, device, used: 0, sent: 0 })
    }

    /// Where lists begin on the device.
    pub(super) const fn device(&self) -> u64 {
        self.device
    }

    /// Forgets all lists. The stream has been waited for since they were sent.
    pub(super) fn clear(&mut self) {
        (self.used, self.sent) = (0, 0);
    }

    /// Writes a list; where it will be on the device once it was sent.
    ///
    /// # Panics
    /// If there is no room, which the sizes of the largest step plan.
    pub(super) fn words(&mut self, list: &[u32]) -> u64 {
        self.put(bytemuck::cast_slice(list))
    }

    /// The same of numbers with 64 bits.
    pub(super) fn longs(&mut self, list: &[u64]) -> u64 {
        self.put(bytemuck::cast_slice(list))
    }

    fn put(&mut self, bytes: &[u8]) -> u64 {
        let at = self.used.next_multiple_of(ALIGN);
        assert!(at + bytes.len() <= self.pinned.len(), "lists of a step that was planned fit");
        // SAFETY: the place is within the memory, as the assertion says; it was not sent yet, so that no copy reads it.
        unsafe { self.pinned.start().add(at).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        self.used = at + bytes.len();
        self.device + at as u64
    }

    /// Copies what was written since the last time to the device.
    pub(super) fn send(&mut self, stream: &Stream) -> Result<(), CudaError> {
        let (from, to) = (self.pinned.start().wrapping_add(self.sent), self.device + self.sent as u64);
        // SAFETY: the bytes are within both memories, as lists are; they are written again only after `clear`, before which the
        // stream was waited for.
        unsafe { stream.up(from, to, self.used - self.sent) }?;
        self.sent = self.used;
        Ok(())
    }

    /// Copies all that was written to the device, and returns when it is there: what was copied is copied back and compared, as it is
    /// there for more than a step. A copy that differs is made once more.
    pub(super) fn send_to_stay(&mut self, stream: &Stream, results: &mut Results) -> Result<(), CudaError> {
        let mut again = true;
        loop {
            self.sent = 0;
            self.send(stream)?;
            results.ask(stream, self.device, self.used / 4)?;
            let back = results.look(stream)?;
            // SAFETY: the memory begins at a page boundary and has so many words; only copies that have ended read it.
            if back == unsafe { std::slice::from_raw_parts(self.pinned.start().cast::<u32>(), self.used / 4) }
            {
                return Ok(());
            }
            if !std::mem::take(&mut again) {
                return Err(CudaError::Copy { bytes: self.used as u64 });
            }
        }
    }
}

/// Pinned memory that results come through.
#[derive(Debug)]
pub(super) struct Results {
    pinned: Pinned,
    used: usize,
}

impl Results {
    pub(super) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, CudaError> {
        Ok(Self { pinned: Pinned::new(gpu, bytes)?, used: 0 })
    }

    /// Asks for words of the device, behind what was asked for since the last look.
    ///
    /// # Panics
    /// If there is no room, which the sizes of the largest step plan.
    pub(super) fn ask(&mut self, stream: &Stream, from: u64, words: usize) -> Result<(), CudaError> {
        assert!(self.used + 4 * words <= self.pinned.len(), "results of a step that was planned fit");
        let to = self.pinned.start().wrapping_add(self.used);
        // SAFETY: the words are within both memories; they are looked at only after the stream was waited for.
        unsafe { stream.down(from, to, 4 * words) }?;
        self.used += 4 * words;
        Ok(())
    }

    /// Waits, and gives all that was asked for, in order.
    pub(super) fn look(&mut self, stream: &Stream) -> Result<&mut [u32], CudaError> {
        stream.wait()?;
        let words = std::mem::take(&mut self.used) / 4;
        // SAFETY: the memory begins at a page boundary and has so many words, all written; the stream was waited for, and the
        // borrow ends before more is asked for.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.pinned.start().cast(), words) })
    }

    /// Forgets what was asked for, after an error.
    pub(super) fn clear(&mut self) {
        self.used = 0;
    }
}
