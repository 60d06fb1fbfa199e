//! The driver's calls, by cudarc, as far as the scenarios make them.

use cudarc::driver::DriverError;
use cudarc::driver::result::{self, stream::StreamKind};
use cudarc::driver::sys::{
    CUcontext, CUevent, CUevent_flags, CUevent_wait_flags, CUfunction, CUgraphExec, CUgraphInstantiate_flags,
    CUmodule, CUstream, CUstreamCaptureMode,
};
use std::ffi::{CString, c_void};
use std::ptr;

/// The code of a call that fails, or nothing.
pub(crate) fn code<T>(result: Result<T, DriverError>) -> u32 {
    result.err().map_or(0, |error| error.0 as u32)
}

/// A device with a module in it.
pub(crate) struct Gpu {
    module: CUmodule,
}

/// As an image: the stand-in looks for names in it.
pub(crate) const KERNELS: &str = ".version 8.0\n.entry add(\n.entry planted_overrun(\n";

/// An argument of a launch.
pub(crate) enum Argument {
    At(u64),
    Word(u32),
    Value(f32),
}

pub(crate) use Argument::{At, Value, Word};

pub(crate) fn open() -> CUcontext {
    open_device(0)
}

/// Opens a device by its number, and makes it current.
pub(crate) fn open_device(number: i32) -> CUcontext {
    result::init().unwrap();
    let device = result::device::get(number).unwrap();
    // SAFETY: the device is there.
    let context = unsafe { result::primary_ctx::retain(device) }.unwrap();
    // SAFETY: the context was made just now.
    unsafe { result::ctx::set_current(context) }.unwrap();
    context
}

/// Makes a device current that was opened.
pub(crate) fn enter(context: CUcontext) {
    // SAFETY: the context is there.
    unsafe { result::ctx::set_current(context) }.unwrap();
}

impl Gpu {
    pub(crate) fn open() -> Self {
        Self::open_device(0)
    }

    pub(crate) fn open_device(number: i32) -> Self {
        open_device(number);
        Self::load(&CString::new(KERNELS).unwrap().into_bytes_with_nul()).unwrap()
    }

    pub(crate) fn load(image: &[u8]) -> Result<Self, DriverError> {
        // SAFETY: machine code says how long it is, PTX ends with a zero.
        unsafe { result::module::load_data(image.as_ptr().cast()) }.map(|module| Self { module })
    }

    pub(crate) fn function(&self, name: &str) -> Result<CUfunction, DriverError> {
        // SAFETY: the module is loaded.
        unsafe { result::module::get_function(self.module, CString::new(name).unwrap()) }
    }

    pub(crate) fn launch(
        &self,
        name: &str,
        [grid, threads]: [(u32, u32, u32); 2],
        stream: CUstream,
        arguments: &[Argument],
    ) -> Result<(), DriverError> {
        self.launch_with(name, [grid, threads], 0, stream, arguments)
    }

    /// The same, with so many bytes of shared memory beside the kernel's own.
    pub(crate) fn launch_with(
        &self,
        name: &str,
        [grid, threads]: [(u32, u32, u32); 2],
        shared_bytes: u32,
        stream: CUstream,
        arguments: &[Argument],
    ) -> Result<(), DriverError> {
        let function = self.function(name)?;
        let mut list: Vec<*mut c_void> = arguments
            .iter()
            .map(|argument| match argument {
                At(at) => ptr::from_ref(at).cast_mut().cast(),
                Word(word) => ptr::from_ref(word).cast_mut().cast(),
                Value(value) => ptr::from_ref(value).cast_mut().cast(),
            })
            .collect();
        // SAFETY: the arguments are those of the kernel, or the scenario is about what happens if not.
        unsafe { result::launch_kernel(function, grid, threads, shared_bytes, stream, &mut list) }
    }

    /// x += y * multiplier.
    pub(crate) fn add(
        &self,
        stream: CUstream,
        x: u64,
        y: u64,
        multiplier: f32,
        n: usize,
    ) -> Result<(), DriverError> {
        let arguments = [At(x), At(y), Value(multiplier), Word(n as u32)];
        self.launch("add", [(1, 1, 1), (32, 1, 1)], stream, &arguments)
    }
}

pub(crate) fn room(bytes: usize) -> Result<u64, DriverError> {
    // SAFETY: nothing is read before it is written, or the scenario is about that.
    unsafe { result::malloc_sync(bytes) }
}

pub(crate) fn free(at: u64) -> Result<(), DriverError> {
    // SAFETY: it is an allocation, or the scenario is about what happens if not.
    unsafe { result::free_sync(at) }
}

pub(crate) fn put(values: &[f32]) -> u64 {
    let at = room(values.len() * 4).unwrap();
    // SAFETY: there is so much room.
    unsafe { result::memcpy_htod_sync(at, values) }.unwrap();
    at
}

pub(crate) fn read(at: u64, count: usize) -> Result<Vec<f32>, DriverError> {
    let mut values = vec![0.0; count];
    // SAFETY: there are so many values.
    unsafe { result::memcpy_dtoh_sync(&mut values, at) }.map(|()| values)
}

pub(crate) fn put_later(at: u64, values: &[f32], stream: CUstream) -> Result<(), DriverError> {
    // SAFETY: the values live until the stream was waited for.
    unsafe { result::memcpy_htod_async(at, values, stream) }
}

pub(crate) fn copy_later(to: u64, from: u64, count: usize, stream: CUstream) {
    // SAFETY: both have so many values.
    unsafe { result::memcpy_dtod_async(to, from, count * 4, stream) }.unwrap();
}

pub(crate) fn stream() -> CUstream {
    result::stream::create(StreamKind::NonBlocking).unwrap()
}

pub(crate) fn wait(stream: CUstream) -> Result<(), DriverError> {
    // SAFETY: the stream is there.
    unsafe { result::stream::synchronize(stream) }
}

pub(crate) fn record(stream: CUstream) -> CUevent {
    let event = result::event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING).unwrap();
    // SAFETY: both are there.
    unsafe { result::event::record(event, stream) }.unwrap();
    event
}

pub(crate) fn query(event: CUevent) -> Result<(), DriverError> {
    // SAFETY: the event is there.
    unsafe { result::event::query(event) }
}

pub(crate) fn follow(stream: CUstream, event: CUevent) -> Result<(), DriverError> {
    // SAFETY: both are there.
    unsafe { result::stream::wait_event(stream, event, CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
}

pub(crate) fn capture(stream: CUstream, record: impl FnOnce()) -> Result<CUgraphExec, DriverError> {
    // SAFETY: the stream is there.
    unsafe {
        result::stream::begin_capture(stream, CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL)
    }?;
    record();
    // SAFETY: the stream is there, and captured.
    let graph = unsafe { result::stream::end_capture(stream) }?;
    // SAFETY: the graph is there.
    let executable = unsafe { result::graph::instantiate(graph, CUgraphInstantiate_flags(0)) };
    // SAFETY: what was made of it needs it no longer.
    unsafe { result::graph::destroy(graph) }?;
    executable
}

pub(crate) fn replay(graph: CUgraphExec, stream: CUstream) -> Result<(), DriverError> {
    // SAFETY: both are there.
    unsafe { result::graph::launch(graph, stream) }
}

pub(crate) fn pin(bytes: usize) -> Result<*mut c_void, DriverError> {
    // SAFETY: nothing is read before it is written.
    unsafe { result::malloc_host(bytes, 0) }
}

/// A page of zeros that is pinned.
pub(crate) fn pinned_page() -> &'static [f32] {
    let at = pin(4096).unwrap().cast::<f32>();
    // SAFETY: there is so much, from the beginning of a page, for as long as the process lives.
    unsafe {
        at.write_bytes(0, 1024);
        std::slice::from_raw_parts(at, 1024)
    }
}

/// Reads device memory as a program must not.
pub(crate) fn touch(at: u64) -> u32 {
    // SAFETY: there is none: that is what the scenario is about, and the process ends here.
    unsafe { (at as *const u32).read_volatile() }
}
