//! A stream: launches and copies that the device does one after another, and waiting for them with a deadline.

use super::CudaError;
use super::driver::refusal;
use super::event::Event;
use super::functions::Function;
use super::gpu::Gpu;
use super::nccl::communicator::Communicator;
use cudarc::driver::result::{self, stream};
use cudarc::driver::sys::{self, CUstream};
use std::cell::RefCell;
use std::collections::VecDeque;
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

/// A stream's handle.
pub(super) type Raw = CUstream;

/// A stream of a device. It is used by one thread at a time.
#[derive(Debug)]
pub(crate) struct Stream {
    pub(super) gpu: Arc<Gpu>,
    pub(super) raw: CUstream,
    end: Event,
    exchanges: RefCell<Exchanges>,
}

/// The exchanges with other ranks that nobody has waited for. What comes before one and after it is the device's own work, and a device
/// that does not get on with that hangs; an exchange takes as long as the others take.
#[derive(Debug, Default)]
struct Exchanges {
    /// Events at the beginning and the end of each.
    pending: VecDeque<(Event, Event, Arc<Communicator>)>,
    /// Where the one that is being queued begins.
    begun: Option<Event>,
    /// Events that are free.
    spare: Vec<Event>,
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
        Ok(Self { gpu: Arc::clone(gpu), raw, end: Event::new(gpu)?, exchanges: RefCell::default() })
    }

    /// Its handle.
    pub(super) const fn raw(&self) -> Raw {
        self.raw
    }

    /// What is queued next moves values between ranks.
    ///
    /// # Errors
    /// If the device is lost.
    pub(super) fn begin_exchange(&self) -> Result<(), CudaError> {
        let event = self.marked()?;
        let mut exchanges = self.exchanges.borrow_mut();
        // One that failed has begun and not ended.
        let failed = exchanges.begun.replace(event);
        exchanges.spare.extend(failed);
        Ok(())
    }

    /// What was queued since then is an exchange of this communicator.
    ///
    /// # Errors
    /// If the device is lost.
    pub(super) fn end_exchange(&self, of: &Arc<Communicator>) -> Result<(), CudaError> {
        let end = self.marked()?;
        let mut exchanges = self.exchanges.borrow_mut();
        let begin = exchanges.begun.take().expect("an exchange ends after it has begun");
        exchanges.pending.push_back((begin, end, Arc::clone(of)));
        Ok(())
    }

    /// An event that is reached here.
    fn marked(&self) -> Result<Event, CudaError> {
        let spare = self.exchanges.borrow_mut().spare.pop();
        let event = spare.map_or_else(|| Event::new(&self.gpu), Ok)?;
        self.mark(&event)?;
        Ok(event)
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
    /// If the device is lost, or has not come to the end after as long as it may be without progress; or if waiting for other ranks is
    /// interrupted. What waited for them ends then, so that the stream can be waited for again.
    pub(crate) fn wait(&self) -> Result<(), CudaError> {
        self.mark(&self.end)?;
        while let Some((begin, end, of)) = self.next_exchange() {
            let ended = self.reach(&begin, None).and_then(|()| self.reach(&end, Some(&of)));
            self.exchanges.borrow_mut().spare.extend([begin, end]);
            if ended.is_err() {
                self.forget_exchanges();
                return ended;
            }
        }
        self.reach(&self.end, None)
    }

    /// Takes the first exchange that nobody has waited for.
    fn next_exchange(&self) -> Option<(Event, Event, Arc<Communicator>)> {
        self.exchanges.borrow_mut().pending.pop_front()
    }

    /// Nobody waits for any of them.
    fn forget_exchanges(&self) {
        let Exchanges { pending, spare, .. } = &mut *self.exchanges.borrow_mut();
        spare.extend(pending.drain(..).flat_map(|(begin, end, _)| [begin, end]));
    }

    /// Waits until an event is passed: as long as the device may be without progress, or as long as an exchange may end well.
    fn reach(&self, event: &Event, exchange: Option<&Communicator>) -> Result<(), CudaError> {
        let began = Instant::now();
        while !event.is_passed()? {
            let waited = began.elapsed();
            match exchange {
                Some(exchange) => exchange.look()?,
                None if waited > self.gpu.patience => {
                    return Err(CudaError::Hang { patience: self.gpu.patience });
                }
                None => {}
            }
            if waited < BUSY { std::thread::yield_now() } else { std::thread::sleep(PAUSE) }
        }
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if self.gpu.takes_back() {
            // SAFETY: it was created once, and is used by nobody after this.
            let _ = unsafe { stream::destroy(self.raw) };
        }
    }
}
