//! A device that is used: its context, the kernels loaded into it, and the bytes that may be taken of its memory.

use super::CudaError;
use super::cache::Cache;
use super::driver::{self, refusal};
use super::functions::Functions;
use super::nvrtc::Nvrtc;
use super::self_test::{self, Tried};
use cudarc::driver::result::{self, ctx, device, module, primary_ctx};
use cudarc::driver::sys::{CUcontext, CUdevice, CUmodule};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// How long a device may be without progress, if nobody says otherwise. A kernel of the largest step takes milliseconds.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A device with its kernels. Threads share it; each makes it current before its first call (`enter`).
#[derive(Debug)]
pub struct Gpu {
    device: CUdevice,
    context: CUcontext,
    modules: Vec<CUmodule>,
    pub(crate) functions: Functions,
    /// As its maker calls it.
    name: String,
    /// The driver, and what the kernels were made by and for.
    made_by: String,
    /// How long it may be without progress.
    pub(crate) patience: Duration,
    /// Bytes that may be taken, and those that are.
    limit: AtomicU64,
    taken: AtomicU64,
    /// Nothing is given back any more: work may be under way for ever, and whoever gives back what it uses waits for it.
    lost: AtomicBool,
    /// How often whoever waits for other ranks was told to give that up.
    interrupts: AtomicU64,
    exchanges: Mutex<Exchanges>,
}

/// How values go to other ranks, as people are told.
#[derive(Debug, Default)]
struct Exchanges {
    said: String,
    /// It was not yet asked for.
    is_new: bool,
    /// Why NCCL did not do, when it was tried.
    refusal: Option<String>,
}

// SAFETY: handles of the driver may be used from any thread in which the context is current; nothing here is changed but atomics.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

impl Gpu {
    /// Opens a device by its number, with kernels compiled for it or from the user's cache, each of which gives the golden bits.
    ///
    /// # Errors
    /// If there is no driver, device or compiler, one of them fails, or a kernel gives other bits.
    pub fn open(number: u32, patience: Duration) -> Result<Arc<Self>, CudaError> {
        let this = Self::open_untried(number, patience)?;
        match self_test::try_kernels(&this)?.into_iter().find(|tried| !tried.is_right()) {
            None => Ok(this),
            Some(tried) => Err(this.wrong(tried)),
        }
    }

    /// The same of the device that a node of this number has, if nobody says which: nodes take turns, and share devices if there are
    /// fewer.
    ///
    /// # Errors
    /// As above.
    pub fn open_for(node: u32, patience: Duration) -> Result<Arc<Self>, CudaError> {
        let devices = driver::find()?.devices.len() as u32;
        Self::open(node % devices.max(1), patience)
    }

    /// Opens it without a look at what its kernels give.
    ///
    /// # Errors
    /// If there is no driver, device or compiler, or one of them fails.
    pub fn open_untried(number: u32, patience: Duration) -> Result<Arc<Self>, CudaError> {
        let found = driver::find()?;
        let own = found.device(number)?;
        let nvrtc = Nvrtc::find()?;
        let built = Cache::of_user().kernels(&nvrtc, nvrtc.target(own.capability)?)?;
        let ((major, minor), nvrtc) = (found.version, nvrtc.number());
        let made_by =
            format!("driver of CUDA {major}.{minor}, kernels by NVRTC {nvrtc} for {}", built.target);
        let device = device::get(number as i32).map_err(refusal("cuDeviceGet"))?;
        // SAFETY: the handle is the driver's own.
        let context = unsafe { primary_ctx::retain(device) }.map_err(refusal("cuDevicePrimaryCtxRetain"))?;
        let mut this = Self {
            device,
            context,
            modules: Vec::new(),
            functions: Functions::default(),
            name: own.name.clone(),
            made_by,
            patience,
            limit: AtomicU64::new(0),
            taken: AtomicU64::new(0),
            lost: AtomicBool::new(false),
            interrupts: AtomicU64::new(0),
            exchanges: Mutex::default(),
        };
        this.enter()?;
        let mut loaded = Vec::new();
        for of_source in &built.modules {
            // PTX is a text, whose end is a zero byte.
            let mut code = of_source.code.clone();
            code.push(0);
            // SAFETY: the image is what the compiler made, and lives until the call returns.
            let module = unsafe { module::load_data(code.as_ptr().cast()) };
            let module = module.map_err(refusal("cuModuleLoadData"))?;
            this.modules.push(module);
            loaded.push((of_source.name.as_str(), module));
        }
        this.functions = Functions::of(&loaded)?;
        Ok(Arc::new(this))
    }

    /// What a kernel with other bits means.
    pub fn wrong(&self, tried: Tried) -> CudaError {
        let Tried { kernel, expected, found } = tried;
        CudaError::Bits { kernel, device: self.name.clone(), made_by: self.made_by.clone(), expected, found }
    }

    /// As its maker calls it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes the device current in this thread.
    ///
    /// # Errors
    /// If it is lost.
    pub(crate) fn enter(&self) -> Result<(), CudaError> {
        // SAFETY: the context lives as long as this.
        unsafe { ctx::set_current(self.context) }.map_err(refusal("cuCtxSetCurrent"))
    }

    /// Bytes of its memory that nobody has, and all.
    ///
    /// # Errors
    /// If it is lost.
    pub fn memory(&self) -> Result<(u64, u64), CudaError> {
        self.enter()?;
        let (free, total) = result::mem_get_info().map_err(refusal("cuMemGetInfo"))?;
        Ok((free as u64, total as u64))
    }

    /// Gives the device up: whatever it has is left to the end of the process.
    pub(crate) fn lose(&self) {
        self.lost.store(true, Ordering::Release);
    }

    /// Makes the device current to give something back to it; whether that may be done.
    pub(super) fn takes_back(&self) -> bool {
        !self.lost.load(Ordering::Acquire) && self.enter().is_ok()
    }

    /// What tells it from every other device.
    ///
    /// # Errors
    /// If it is lost.
    pub(crate) fn uuid(&self) -> Result<[u8; 16], CudaError> {
        let uuid = result::device::get_uuid(self.device).map_err(refusal("cuDeviceGetUuid"))?;
        Ok(uuid.bytes.map(|byte| byte as u8))
    }

    /// Ends waiting for other ranks: a step was given up, or an epoch is over. It is said before the thread that computes is told why.
    pub(crate) fn interrupt(&self) {
        self.interrupts.fetch_add(1, Ordering::AcqRel);
    }

    /// How often that was.
    pub(crate) fn interrupts(&self) -> u64 {
        self.interrupts.load(Ordering::Acquire)
    }

    fn exchanges(&self) -> std::sync::MutexGuard<'_, Exchanges> {
        self.exchanges.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says how values go to other ranks from now on.
    pub(crate) fn say_exchanges(&self, how: String) {
        let mut exchanges = self.exchanges();
        if exchanges.said != how {
            (exchanges.said, exchanges.is_new) = (how, true);
        }
    }

    /// What was said of it since the last time.
    pub(crate) fn news(&self) -> Option<String> {
        let mut exchanges = self.exchanges();
        std::mem::take(&mut exchanges.is_new).then(|| exchanges.said.clone())
    }

    /// NCCL was tried and did not do: it is not tried again.
    pub(crate) fn refuse_nccl(&self, why: String) {
        self.exchanges().refusal = Some(why);
    }

    /// Why it did not do, if it was tried.
    pub(crate) fn nccl_refusal(&self) -> Option<String> {
        self.exchanges().refusal.clone()
    }

    /// Lets so many bytes be taken, in all.
    pub(crate) fn set_limit(&self, bytes: u64) {
        self.limit.store(bytes, Ordering::Relaxed);
    }

    /// Bytes that may be taken, and those that are.
    pub(crate) fn budget(&self) -> (u64, u64) {
        (self.limit.load(Ordering::Relaxed), self.taken.load(Ordering::Relaxed))
    }

    /// Counts bytes as taken; whether that is within the limit.
    pub(super) fn take(&self, bytes: u64) -> bool {
        let limit = self.limit.load(Ordering::Relaxed);
        let within = |taken: u64| taken.checked_add(bytes).filter(|&taken| taken <= limit);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok()
    }

    pub(super) fn give_back(&self, bytes: u64) {
        self.taken.fetch_sub(bytes, Ordering::Relaxed);
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if !self.takes_back() {
            return;
        }
        for &module in &self.modules {
            // SAFETY: it was loaded into this context, and nobody has a function of it after this.
            let _ = unsafe { module::unload(module) };
        }
        // SAFETY: it was retained once.
        let _ = unsafe { primary_ctx::release(self.device) };
    }
}
