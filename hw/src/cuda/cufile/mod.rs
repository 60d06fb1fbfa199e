//! cuFile, the library of GPUDirect Storage: reads that go from a file into memory of a GPU, past memory of the host.
//!
//! Where it cannot do that it may copy through the host by itself and say nothing (its compat mode). That is what the reader of the
//! cold tier does better: the mode is switched off before the library is opened, and where that cannot be done or be seen, nothing is
//! read this way.

mod calls;

use super::gpu::Gpu;
use calls::{Calls, Description};
use std::ffi::{c_long, c_void};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// What helps against most of what may be missing.
const INSTALL: &str = "install GPUDirect Storage (nvidia-fs) and see what gdscheck -p says, or give uring";

/// Bits of what it says of itself: that it may do so, and that disks are read from peer to peer.
const ALLOWS_COMPAT_MODE: u32 = 1;
const NVME_P2P: u32 = 11;

/// Why nothing can be read straight into a GPU, and what to do.
#[derive(Debug)]
pub(crate) struct Missing {
    pub(crate) why: String,
    pub(crate) remedy: &'static str,
}

impl Missing {
    pub(crate) fn new(why: impl Into<String>) -> Self {
        Self { why: why.into(), remedy: INSTALL }
    }
}

/// The library, opened.
#[derive(Debug)]
pub(crate) struct CuFile {
    gpu: Arc<Gpu>,
    calls: &'static Calls,
    /// What of the kernel moves the bytes.
    mover: String,
    /// Bytes of devices that may be known to it, in all.
    known_max: u64,
}

impl CuFile {
    /// Opens it, if it is there and reads past the host.
    ///
    /// # Errors
    /// What is missing.
    pub(crate) fn open(gpu: &Arc<Gpu>) -> Result<Arc<Self>, Missing> {
        let calls = Calls::find().map_err(Missing::new)?;
        gpu.enter().map_err(|error| Missing::new(error.to_string()))?;
        let is_strict = calls.forbid_compat_mode();
        // SAFETY: it takes nothing.
        unsafe { (calls.open)() }.result("cuFileDriverOpen").map_err(Missing::new)?;
        // From here on it is closed again.
        let mut this = Self { gpu: Arc::clone(gpu), calls, mover: String::new(), known_max: 0 };
        this.look(is_strict)?;
        Ok(Arc::new(this))
    }

    /// Looks what moves the bytes, which may not be the host.
    fn look(&mut self, is_strict: bool) -> Result<(), Missing> {
        let found = self.calls.properties().map_err(Missing::new)?;
        self.known_max = 1024 * u64::from(found.pinned_kb);
        let has = |flags: u32, bit: u32| flags >> bit & 1 == 1;
        let (allows, p2p) = (has(found.control, ALLOWS_COMPAT_MODE), has(found.status, NVME_P2P));
        self.mover = match (found.nvfs_major, found.nvfs_minor) {
            (0, 0) if !p2p => {
                let why =
                    "cuFile is in its compat mode, which copies through the host: there is no nvidia-fs";
                return Err(Missing::new(why));
            }
            _ if allows && !is_strict => {
                return Err(Missing {
                    why: "cuFile does not let its compat mode be switched off, so that it may copy through the host"
                        .into(),
                    remedy: "set allow_compat_mode to false in cufile.json, or give uring",
                });
            }
            (0, 0) => "peer to peer".into(),
            (major, minor) => format!("nvidia-fs {major}.{minor}"),
        };
        Ok(())
    }

    /// What of the kernel moves the bytes, for people.
    pub(crate) fn mover_name(&self) -> &str {
        &self.mover
    }

    /// Bytes of devices that may be known to it, in all, as it says.
    pub(crate) const fn known_max(&self) -> u64 {
        self.known_max
    }

    /// Makes a file known, which was opened for reads past the cache.
    ///
    /// # Errors
    /// If its file system or disk cannot do that.
    pub(crate) fn file(self: &Arc<Self>, file: File) -> Result<CuFileHandle, String> {
        let (mut raw, mut described) = (std::ptr::null_mut(), Description::of_fd(file.as_raw_fd()));
        // SAFETY: both live until the call returns, and the file for as long as it is known.
        let known = unsafe { (self.calls.register_file)(&raw mut raw, &raw mut described) };
        known.result("cuFileHandleRegister")?;
        Ok(CuFileHandle { library: Arc::clone(self), raw, _file: file })
    }

    /// Makes memory of the device known, so that reads need no other. Where there is no room for it the library reads by way of memory
    /// of the device that it has itself.
    ///
    /// # Safety
    /// All of it is of one allocation, which outlives what is returned.
    ///
    /// # Errors
    /// Why it is not known, for people.
    pub(crate) unsafe fn memory(self: &Arc<Self>, at: u64, bytes: usize) -> Result<CuFileMemory, String> {
        self.gpu.enter().map_err(|error| error.to_string())?;
        // SAFETY: the caller's.
        let known = unsafe { (self.calls.register_memory)(pointer(at), bytes, 0) };
        known.result("cuFileBufRegister")?;
        Ok(CuFileMemory { library: Arc::clone(self), at })
    }
}

/// An address of the device, as the library takes it.
const fn pointer(at: u64) -> *mut c_void {
    at as usize as *mut c_void
}

impl Drop for CuFile {
    fn drop(&mut self) {
        if self.gpu.takes_back() {
            // SAFETY: it was opened once, and all files and memory that it knew have kept it until they were forgotten.
            let _ = unsafe { (self.calls.close)() };
        }
    }
}

/// A file that the library knows.
#[derive(Debug)]
pub(crate) struct CuFileHandle {
    library: Arc<CuFile>,
    raw: *mut c_void,
    /// Closed after it was forgotten.
    _file: File,
}

// SAFETY: a handle of the library, which any thread may use.
unsafe impl Send for CuFileHandle {}
// SAFETY: as above.
unsafe impl Sync for CuFileHandle {}

impl CuFileHandle {
    /// Reads at a byte of the file into memory of the device, and returns when the bytes are there: how many.
    ///
    /// # Safety
    /// There are so many bytes at `from` in the allocation that begins at `base`, and nobody uses them before it returns.
    ///
    /// # Errors
    /// If disk, library or device fail.
    pub(crate) unsafe fn read(&self, offset: u64, base: u64, from: u64, bytes: usize) -> io::Result<usize> {
        self.library.gpu.enter().map_err(io::Error::other)?;
        let (offset, from) = (offset as c_long, from as c_long);
        // SAFETY: the caller's; the file is known until this is dropped.
        let read = unsafe { (self.library.calls.read)(self.raw, pointer(base), bytes, offset, from) };
        match read {
            // The system's error.
            -1 => Err(io::Error::last_os_error()),
            // The library's, of which it may have more than anybody knows: it stays a number.
            ..0 => Err(io::Error::other(format!("cuFile's error {}", -read))),
            _ => Ok(read as usize),
        }
    }
}

impl Drop for CuFileHandle {
    fn drop(&mut self) {
        if self.library.gpu.takes_back() {
            // SAFETY: it was made known once, and nobody reads it any more.
            unsafe { (self.library.calls.forget_file)(self.raw) };
        }
    }
}

/// Memory of the device that the library knows.
#[derive(Debug)]
pub(crate) struct CuFileMemory {
    library: Arc<CuFile>,
    at: u64,
}

impl Drop for CuFileMemory {
    fn drop(&mut self) {
        if self.library.gpu.takes_back() {
            // SAFETY: it was made known once, and nobody reads into it any more.
            let _ = unsafe { (self.library.calls.forget_memory)(pointer(self.at)) };
        }
    }
}
