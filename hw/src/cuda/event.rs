//! Marks in streams: one stream follows another up to a mark, and the host asks whether it has been passed.

use super::CudaError;
use super::driver::refusal;
use super::gpu::Gpu;
use super::stream::Stream;
use cudarc::driver::result::{event, stream};
use cudarc::driver::sys::{CUevent, CUevent_flags, CUevent_wait_flags, CUresult};
use std::sync::Arc;

/// A mark, wherever a stream was last given it.
#[derive(Debug)]
pub(crate) struct Event {
    gpu: Arc<Gpu>,
    raw: CUevent,
}

// SAFETY: a handle of the driver, which may move to another thread.
unsafe impl Send for Event {}

impl Event {
    /// A mark that no stream has.
    ///
    /// # Errors
    /// If the device is lost.
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self, CudaError> {
        gpu.enter()?;
        let raw = event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(refusal("cuEventCreate"))?;
        Ok(Self { gpu: Arc::clone(gpu), raw })
    }

    /// Whether all is done that its stream was given before it.
    ///
    /// # Errors
    /// If the device is lost.
    pub(crate) fn is_passed(&self) -> Result<bool, CudaError> {
        // SAFETY: the event lives.
        match unsafe { event::query(self.raw) } {
            Ok(()) => Ok(true),
            Err(error) if error.0 == CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            Err(error) => Err(refusal("cuEventQuery")(error)),
        }
    }
}

impl Stream {
    /// Marks the end of all that it was given until now.
    ///
    /// # Errors
    /// If the device is lost.
    pub(crate) fn mark(&self, event: &Event) -> Result<(), CudaError> {
        // SAFETY: event and stream live.
        unsafe { event::record(event.raw, self.raw) }.map_err(refusal("cuEventRecord"))
    }

    /// Begins what it is given from now on after the mark, in whichever stream that is.
    ///
    /// # Errors
    /// If the device is lost.
    pub(crate) fn follow(&self, event: &Event) -> Result<(), CudaError> {
        let flags = CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: event and stream live.
        unsafe { stream::wait_event(self.raw, event.raw, flags) }.map_err(refusal("cuStreamWaitEvent"))
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if self.gpu.takes_back() {
            // SAFETY: it was created once, and is used by nobody after this.
            let _ = unsafe { event::destroy(self.raw) };
        }
    }
}
