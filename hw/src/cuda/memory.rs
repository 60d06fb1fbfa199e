//! Memory: of the device, within its budget; and of the host, pinned, so that copies need no other.

use super::CudaError;
use super::driver::refusal;
use super::gpu::Gpu;
use cudarc::driver::result;
use cudarc::driver::sys::CUresult;
use std::sync::Arc;

/// Pieces of memory begin at multiples of this: kernels load sixteen bytes at once.
pub(crate) const ALIGN: u64 = 256;
/// Bytes that are copied and compared at once.
const PIECE: usize = 16 << 20;
/// Pinned memory begins at a multiple of this, as direct reads from a disk want it.
const PAGE: usize = 4096;

/// Memory of the device. What is in it at first is anything.
#[derive(Debug)]
pub(crate) struct Memory {
    gpu: Arc<Gpu>,
    at: u64,
    bytes: u64,
}

impl Memory {
    /// Takes memory.
    ///
    /// # Errors
    /// If the budget or the device does not have so much.
    pub(crate) fn new(gpu: &Arc<Gpu>, what: &'static str, bytes: u64) -> Result<Self, CudaError> {
        gpu.enter()?;
        let bytes = bytes.max(1).next_multiple_of(ALIGN);
        if !gpu.take(bytes) {
            let (limit, taken) = gpu.budget();
            return Err(CudaError::Budget { what, bytes, limit, taken });
        }
        let size = usize::try_from(bytes).unwrap_or(usize::MAX);
        // SAFETY: what is in it at first is read by nobody: kernels read what was written before.
        match unsafe { result::malloc_sync(size) } {
            Ok(at) => Ok(Self { gpu: Arc::clone(gpu), at, bytes }),
            Err(error) => {
                gpu.give_back(bytes);
                if error.0 == CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                    let (free, _) = gpu.memory()?;
                    return Err(CudaError::Memory { what, bytes, free });
                }
                Err(refusal("cuMemAlloc")(error))
            }
        }
    }

    /// Where it begins, in the device's addresses.
    pub(crate) const fn at(&self) -> u64 {
        self.at
    }

    /// Copies bytes to a place of it, and returns when they are there: what was copied is copied back and compared, as it stays for as
    /// long as the process does. A copy that differs is made once more.
    ///
    /// # Errors
    /// If the device is lost.
    ///
    /// # Panics
    /// If they do not fit.
    pub(crate) fn fill(&self, offset: u64, bytes: &[u8]) -> Result<(), CudaError> {
        assert!(offset + bytes.len() as u64 <= self.bytes, "what is copied fits");
        let mut back = vec![0; bytes.len().min(PIECE)];
        for (piece, at) in bytes.chunks(PIECE).zip((self.at + offset..).step_by(PIECE)) {
            let back = &mut back[..piece.len()];
            let mut again = true;
            loop {
                // SAFETY: the place is of this memory, as the assertion says.
                unsafe { result::memcpy_htod_sync(at, piece) }.map_err(refusal("cuMemcpyHtoD"))?;
                // SAFETY: as above.
                unsafe { result::memcpy_dtoh_sync(back, at) }.map_err(refusal("cuMemcpyDtoH"))?;
                if back == piece {
                    break;
                }
                if !std::mem::take(&mut again) {
                    return Err(CudaError::Copy { bytes: piece.len() as u64 });
                }
            }
        }
        Ok(())
    }

    /// Copies back what is at its beginning.
    ///
    /// # Errors
    /// If the device is lost.
    ///
    /// # Panics
    /// If there are not so many bytes.
    pub(crate) fn read(&self, into: &mut [u8]) -> Result<(), CudaError> {
        assert!(into.len() as u64 <= self.bytes, "what is copied back is there");
        self.gpu.enter()?;
        // SAFETY: the place is of this memory, as the assertion says.
        unsafe { result::memcpy_dtoh_sync(into, self.at) }.map_err(refusal("cuMemcpyDtoH"))
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        self.gpu.give_back(self.bytes);
        if self.gpu.takes_back() {
            // SAFETY: it was allocated once; whoever drops it has waited for the streams that use it.
            let _ = unsafe { result::memory_free(self.at) };
        }
    }
}

/// Pinned memory of the host, zero at first.
#[derive(Debug)]
pub(crate) struct Pinned {
    gpu: Arc<Gpu>,
    raw: *mut u8,
    start: *mut u8,
    bytes: usize,
}

// SAFETY: it is memory that this owns.
unsafe impl Send for Pinned {}
// SAFETY: nothing is read or written by a shared reference but through pointers, whose users see to that themselves.
unsafe impl Sync for Pinned {}

impl Pinned {
    /// Takes memory.
    ///
    /// # Errors
    /// If the system does not have so much that may be pinned.
    pub(crate) fn new(gpu: &Arc<Gpu>, bytes: usize) -> Result<Self, CudaError> {
        gpu.enter()?;
        let whole = bytes.saturating_add(PAGE);
        // SAFETY: it is written below, before anybody reads it.
        let raw = unsafe { result::malloc_host(whole, 0) };
        let raw = raw.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => CudaError::Pinned { bytes: bytes as u64 },
            _ => refusal("cuMemHostAlloc")(error),
        })?;
        let raw: *mut u8 = raw.cast();
        // SAFETY: there are as many bytes as were asked for, and nobody else has them.
        unsafe { raw.write_bytes(0, whole) };
        let start = raw.wrapping_add(raw.align_offset(PAGE));
        Ok(Self { gpu: Arc::clone(gpu), raw, start, bytes })
    }

    /// Where it begins: at a page boundary.
    pub(crate) const fn start(&self) -> *mut u8 {
        self.start
    }

    /// How much it is.
    pub(crate) const fn len(&self) -> usize {
        self.bytes
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.gpu.takes_back() {
            // SAFETY: it was allocated once; whoever drops it has waited for the copies that use it.
            let _ = unsafe { result::free_host(self.raw.cast()) };
        }
    }
}
