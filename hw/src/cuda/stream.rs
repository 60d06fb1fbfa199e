//! A stream: launches and copies that the device does one after another, and waiting for them with a deadline.

use super::CudaError;
use super::driver::refusal;
use super::functions::Function;
use super::gpu::Gpu;
use cudarc::driver::result::{self, event, stream};
use cudarc::driver::sys::{self, CUevent, CUresult, CUstream};
use std::ffi::c_void;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Arguments of a kernel, at most.
const ARGUMENTS_MAX: usize = 24;
/// How long the end of work is looked for without a pause: most of it ends sooner.
const BUSY: Duration = Duration::from_micros(200);
/// The pause after that.
const PAUSE: Duration = Duration::from_micros(20);

/// An argument of a kernel, typed as the kernel has it.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Arg {
    /// An address of the device; 0 is null.
    At(u64),
    /// `u64`.
    Long(u64),
    /// `u32`.
    Word(u32),
    /// `float`.
    Value(f32),
}

impl Arg {
    /// The bytes of the argument, first ones first: hosts of GPUs are little-endian.
    const fn cell(self) -> u64 {
        match self {
            Self::At(value) | Self::Long(value) => value,
            Self::Word(value) => value as u64,
            Self::Value(value) => value.to_bits() as u64,
        }
    }
}

/// A stream of a device. It is used by one thread at a time.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(super) gpu: Arc<Gpu>,
    pub(super) raw: CUstream,
    end: CUevent,
}

// SAFETY: handles of the driver may move to another thread.
unsafe impl Send for Stream {}

impl Stream {
    /// A stream that does not wait for others.
    ///
    /// # Errors
    /// If the device is lost.
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        gpu.enter()?;
        let raw = stream::create(stream::StreamKind::NonBlocking).map_err(refusal("cuStreamCreate"))?;
        let end = event::create(sys::CUevent_flags::CU_EVENT_DISABLE_TIMING);
        Ok(Self { gpu: Arc::clone(gpu), raw, end: end.map_err(refusal("cuEventCreate"))? })
    }

    /// Launches a kernel: blocks, threads of a block, arguments.
    ///
    /// # Safety
    /// The arguments are those of the kernel in order and type, and their addresses are of memory as large as the kernel reads and
    /// writes, which lives until the stream has been waited for.
    ///
    /// # Errors
    /// If the device is lost.
    ///
    /// # Panics
    /// If there are more arguments than any kernel has.
    pub(crate) unsafe fn launch(
        &self,
        function: Function,
        blocks: [u32; 3],
        threads: u32,
        arguments: &[Arg],
    ) -> Result<(), CudaError> {
        debug_assert!(blocks.iter().all(|&count| count > 0) && threads.is_multiple_of(32));
        let (mut cells, mut places) = ([0u64; ARGUMENTS_MAX], [std::ptr::null_mut(); ARGUMENTS_MAX]);
        for ((cell, place), argument) in cells.iter_mut().zip(&mut places).zip(arguments) {
            *cell = argument.cell();
            *place = std::ptr::from_mut(cell).cast::<c_void>();
        }
        let places = &mut places[..arguments.len()];
        let ([x, y, z], stream) = (blocks, self.raw);
        // SAFETY: the caller's; cells live until the call returns, which copies them.
        let launched =
            unsafe { result::launch_kernel(function.0, (x, y, z), (threads, 1, 1), 0, stream, places) };
        launched.map_err(refusal("cuLaunchKernel"))
    }

    /// Copies bytes to the device.
    ///
    /// # Safety
    /// Both sides have so many bytes, the host's is pinned, and nobody writes or drops either before the stream has been waited for.
    ///
    /// # Errors
    /// If the device is lost.
    pub(crate) unsafe fn up(&self, from: *const u8, to: u64, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        let copied = unsafe { sys::cuMemcpyHtoDAsync_v2(to, from.cast(), bytes, self.raw) };
        copied.result().map_err(refusal("cuMemcpyHtoDAsync"))
    }

    /// Copies bytes from the device.
    ///
    /// # Safety
    /// Both sides have so many bytes, the host's is pinned, and nobody uses it before the stream has been waited for.
    ///
    /// # Errors
    /// If the device is lost.
    pub(crate) unsafe fn down(&self, from: u64, to: *mut u8, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: the caller's.
        let copied = unsafe { sys::cuMemcpyDtoHAsync_v2(to.cast(), from, bytes, self.raw) };
        copied.result().map_err(refusal("cuMemcpyDtoHAsync"))
    }

    /// Waits for all that it was given.
    ///
    /// # Errors
    /// If the device is lost, or has not come to the end after as long as it may be without progress.
    pub(crate) fn wait(&self) -> Result<(), CudaError> {
        // SAFETY: event and stream live.
        unsafe { event::record(self.end, self.raw) }.map_err(refusal("cuEventRecord"))?;
        let began = Instant::now();
        loop {
            // SAFETY: the event lives.
            match unsafe { event::query(self.end) } {
                Ok(()) => return Ok(()),
                Err(error) if error.0 == CUresult::CUDA_ERROR_NOT_READY => {}
                Err(error) => return Err(refusal("cuEventQuery")(error)),
            }
            let waited = began.elapsed();
            if waited > self.gpu.patience {
                return Err(CudaError::Hang { patience: self.gpu.patience });
            }
            if waited < BUSY { std::thread::yield_now() } else { std::thread::sleep(PAUSE) }
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if !self.gpu.takes_back() {
            return;
        }
        // SAFETY: both were created once, and are used by nobody after this.
        unsafe {
            let _ = event::destroy(self.end);
            let _ = stream::destroy(self.raw);
        }
    }
}
