//! Launches that are recorded once and then given to a stream together, with one call.

use super::CudaError;
use super::driver::refusal;
use super::gpu::Gpu;
use super::stream::Stream;
use cudarc::driver::result::{graph, stream};
use cudarc::driver::sys::{CUgraph, CUgraphExec, CUgraphInstantiate_flags, CUstreamCaptureMode};
use std::sync::Arc;

/// Recorded launches, with their arguments as they were. The driver keeps them in memory of its own.
#[derive(Debug)]
pub(crate) struct Graph {
    gpu: Arc<Gpu>,
    raw: CUgraphExec,
}

// SAFETY: a handle of the driver, which may move to another thread.
unsafe impl Send for Graph {}

impl Stream {
    /// Records what a stream is given meanwhile; none of it is done. Only launches may be given to it.
    ///
    /// # Errors
    /// If the driver makes no graph of it; or if the device is lost, which whatever comes next says too.
    pub(crate) fn record<E: From<CudaError>>(
        &self,
        launches: impl FnOnce() -> Result<(), E>,
    ) -> Result<Graph, E> {
        // Other threads load experts meanwhile, which is none of this stream's business.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream lives.
        unsafe { stream::begin_capture(self.raw, mode) }.map_err(refusal("cuStreamBeginCapture"))?;
        let launched = launches();
        // SAFETY: the recording was begun above, and ends whatever came of the launches.
        let recorded = unsafe { stream::end_capture(self.raw) }.map_err(refusal("cuStreamEndCapture"));
        let recorded = Recorded(recorded?);
        launched?;
        // SAFETY: the recording lives.
        let raw = unsafe { graph::instantiate(recorded.0, CUgraphInstantiate_flags(0)) };
        Ok(Graph { gpu: Arc::clone(&self.gpu), raw: raw.map_err(refusal("cuGraphInstantiate"))? })
    }

    /// Launches a graph.
    ///
    /// # Safety
    /// What its launches need lives and is as it was when they were recorded, until the stream has been waited for.
    ///
    /// # Errors
    /// If the device is lost.
    pub(crate) unsafe fn replay(&self, graph: &Graph) -> Result<(), CudaError> {
        // SAFETY: graph and stream live; the rest is the caller's.
        unsafe { graph::launch(graph.raw, self.raw) }.map_err(refusal("cuGraphLaunch"))
    }
}

/// A recording, until something is made of it.
struct Recorded(CUgraph);

impl Drop for Recorded {
    fn drop(&mut self) {
        // SAFETY: it was made once.
        let _ = unsafe { graph::destroy(self.0) };
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if self.gpu.takes_back() {
            // SAFETY: it was made once; whoever drops it has waited for the stream that it was launched in.
            let _ = unsafe { graph::exec_destroy(self.raw) };
        }
    }
}
