//! A communicator: the ranks of an epoch, which move values from device to device. None of its calls waits: whoever has to, asks how
//! it goes, and stops asking when the step is given up or the epoch is over.

use super::super::CudaError;
use super::super::gpu::Gpu;
use super::super::stream::Stream;
use super::{Config, Handle, IN_PROGRESS, Nccl, REMOTE_ERROR, SUCCESS, SYSTEM_ERROR, UniqueId, WORDS};
use std::ffi::{c_int, c_void};
use std::sync::Arc;
use std::sync::atomic::{AtomicPtr, Ordering};
use std::time::{Duration, Instant};

/// The pause between two looks at what goes on without us.
const PAUSE: Duration = Duration::from_micros(50);

/// Values that go to a rank or come from it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    /// Which rank.
    pub(crate) rank: u32,
    /// Where they stand on the device.
    pub(crate) at: u64,
    /// How many; nothing is done about none.
    pub(crate) values: usize,
}

/// One rank's end of a communicator.
#[derive(Debug)]
pub(crate) struct Communicator {
    nccl: &'static Nccl,
    gpu: Arc<Gpu>,
    /// Null once it was aborted.
    raw: AtomicPtr<c_void>,
    /// How often waiting had been interrupted before it was agreed on: whoever waits gives up when it is more.
    since: u64,
}

impl Communicator {
    /// Joins the others. It is left to the caller to say to all whether everybody has.
    ///
    /// # Errors
    /// If waiting is interrupted. The inner one says why it could not join, for people.
    pub(crate) fn join(
        nccl: &'static Nccl,
        gpu: &Arc<Gpu>,
        id: UniqueId,
        (rank, ranks): (u32, u32),
        since: u64,
        wait: Duration,
    ) -> Result<Result<Arc<Self>, String>, CudaError> {
        gpu.enter()?;
        let (mut raw, mut config): (Handle, Config) = (std::ptr::null_mut(), Config::without_waiting());
        // SAFETY: the handle and the configuration live until the call returns, which keeps neither; the device is current.
        let code =
            unsafe { (nccl.init_rank)(&raw mut raw, ranks as c_int, id, rank as c_int, &raw mut config) };
        let this = Self { nccl, gpu: Arc::clone(gpu), raw: AtomicPtr::new(raw), since };
        let began = Instant::now();
        let mut state = code;
        while state == IN_PROGRESS {
            if this.is_interrupted() {
                this.abort();
                return Err(CudaError::Stopped);
            }
            if began.elapsed() > wait {
                this.abort();
                return Ok(Err(format!("NCCL did not bring the ranks together in {wait:?}")));
            }
            std::thread::sleep(PAUSE);
            state = this.state();
        }
        if state != SUCCESS {
            this.abort();
            return Ok(Err(format!("ncclCommInitRankConfig: {}", nccl.text(state))));
        }
        Ok(Ok(Arc::new(this)))
    }

    /// Moves values: all parts at once, in no order. What a rank sends to another it receives in the order of its parts.
    ///
    /// # Safety
    /// The parts are memory of this device, which lives until the stream has been waited for; none that is received overlaps another.
    ///
    /// # Errors
    /// If waiting is interrupted, or the exchange fails here.
    pub(crate) unsafe fn exchange(
        self: &Arc<Self>,
        stream: &Stream,
        sends: &[Part],
        receives: &[Part],
    ) -> Result<(), CudaError> {
        self.look()?;
        let raw = self.raw.load(Ordering::Acquire);
        stream.begin_exchange()?;
        // SAFETY: the communicator was not aborted, which only this thread does; stream and memory are the caller's.
        let code = unsafe {
            let began = (self.nccl.group_start)();
            let sent = sends.iter().filter(|part| part.values > 0).map(|part| {
                let (from, to) = (part.at as *const c_void, part.rank as c_int);
                (self.nccl.send)(from, part.values, WORDS, to, raw, stream.raw())
            });
            let received = receives.iter().filter(|part| part.values > 0).map(|part| {
                let (to, from) = (part.at as *mut c_void, part.rank as c_int);
                (self.nccl.receive)(to, part.values, WORDS, from, raw, stream.raw())
            });
            let refused = std::iter::once(began).chain(sent).chain(received).find(|code| !is_begun(*code));
            // A group is ended whatever came of its parts.
            let ended = (self.nccl.group_end)();
            refused.unwrap_or(ended)
        };
        let mut state = code;
        // What is queued in the stream after it comes after it only once it has been issued.
        while state == IN_PROGRESS {
            if self.is_interrupted() {
                self.abort();
                return Err(CudaError::Stopped);
            }
            std::thread::yield_now();
            state = self.state();
        }
        if state != SUCCESS {
            return Err(self.failed("ncclGroupEnd", state));
        }
        stream.end_exchange(self)
    }

    /// Whether an exchange that is waited for may still end well.
    ///
    /// # Errors
    /// If waiting is interrupted, or the communicator has failed: it is aborted then, and what was under way ends.
    pub(crate) fn look(&self) -> Result<(), CudaError> {
        if self.raw.load(Ordering::Acquire).is_null() {
            return Err(CudaError::Stopped);
        }
        if self.is_interrupted() {
            self.abort();
            return Err(CudaError::Stopped);
        }
        match self.state() {
            SUCCESS | IN_PROGRESS => Ok(()),
            code => Err(self.failed("ncclCommGetAsyncError", code)),
        }
    }

    /// Whether it is of an epoch that is over, or of a step that was given up.
    fn is_interrupted(&self) -> bool {
        self.gpu.interrupts() != self.since
    }

    /// How it is.
    fn state(&self) -> c_int {
        let mut state = SUCCESS;
        let raw = self.raw.load(Ordering::Acquire);
        // SAFETY: the communicator was not aborted; it writes one integer, which lives until the call returns.
        let code = unsafe { (self.nccl.async_error)(raw, &raw mut state) };
        if code == SUCCESS { state } else { code }
    }

    /// What an error means. Where it may be that another rank is gone, the supervisor will say so: this process ends only if
    /// it does not.
    fn failed(&self, call: &'static str, code: c_int) -> CudaError {
        self.abort();
        let wait =
            if matches!(code, REMOTE_ERROR | SYSTEM_ERROR) { self.gpu.patience } else { Duration::ZERO };
        let began = Instant::now();
        while !self.is_interrupted() {
            if began.elapsed() >= wait {
                return CudaError::Nccl { call, why: self.nccl.text(code) };
            }
            std::thread::sleep(PAUSE);
        }
        CudaError::Stopped
    }

    /// Ends it, with all that is under way in it.
    fn abort(&self) {
        let raw = self.raw.swap(std::ptr::null_mut(), Ordering::AcqRel);
        if !raw.is_null() {
            // SAFETY: the handle is NCCL's own, and nobody has it any more.
            let _ = unsafe { (self.nccl.abort)(raw) };
        }
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        // To end it well all ranks would have to come together once more. Nothing is under way in it: whoever drops it has waited for
        // the stream.
        if self.gpu.takes_back() {
            self.abort();
        }
    }
}

/// Whether a call within a group was taken, which may go on without the caller.
const fn is_begun(code: c_int) -> bool {
    matches!(code, SUCCESS | IN_PROGRESS)
}
