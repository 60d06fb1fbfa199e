//! cuFile, the library of GPUDirect Storage: reads that go from a file into memory of a GPU, past memory of the host.
//!
//! Where it cannot do that it may copy through the host by itself and say nothing (its compat mode). That is what the reader of the
//! cold tier does better: the mode is switched off before the library is opened, and where that cannot be done or be seen, nothing is
//! read this way.

use super::gpu::Gpu;
use cudarc::cufile::result::CufileError;
use cudarc::cufile::sys::{self, CUfileDescr_t, CUfileDescr_t__bindgen_ty_1};
use cudarc::cufile::sys::{CUfileDriverControlFlags, CUfileDriverStatusFlags, CUfileFileHandleType};
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

/// What helps against most of what may be missing.
const INSTALL: &str = "install GPUDirect Storage (nvidia-fs) and see what gdscheck -p says, or give uring";

/// A parameter of the library: CUFILE_PARAM_PROPERTIES_ALLOW_COMPAT_MODE. The CUDA that cudarc is asked for does not have it yet.
const ALLOW_COMPAT_MODE: u32 = 1;

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
    /// What of the kernel moves the bytes.
    mover: String,
}

impl CuFile {
    /// Opens it, if it is there and reads past the host.
    ///
    /// # Errors
    /// What is missing.
    pub(crate) fn open(gpu: &Arc<Gpu>) -> Result<Arc<Self>, Missing> {
        // SAFETY: opening the library runs what it does when it is loaded, and that is the one of this machine.
        if !unsafe { sys::is_culib_present() } {
            let why = "libcufile.so was not found where the system looks for libraries (one that is only called libcufile.so.0 \
                       needs a link of that name)";
            return Err(Missing::new(why));
        }
        gpu.enter().map_err(|error| Missing::new(error.to_string()))?;
        let is_strict = forbid_compat_mode();
        // SAFETY: it takes nothing.
        let opened = unsafe { sys::cuFileDriverOpen() }.result();
        opened.map_err(|error| Missing::new(format!("cuFileDriverOpen fails: {}", words(&error))))?;
        // From here on it is closed again.
        let mut this = Self { gpu: Arc::clone(gpu), mover: String::new() };
        this.mover = this.mover(is_strict)?;
        Ok(Arc::new(this))
    }

    /// What moves the bytes, if it is not the host.
    fn mover(&self, is_strict: bool) -> Result<String, Missing> {
        let found = cudarc::cufile::result::driver_get_properties();
        let fails = |error| Missing::new(format!("cuFileDriverGetProperties fails: {}", words(&error)));
        let found = found.map_err(fails)?.nvfs;
        let has = |flags: u32, bit: u32| flags >> bit & 1 == 1;
        let allows = has(found.dcontrolflags, CUfileDriverControlFlags::CU_FILE_ALLOW_COMPAT_MODE as u32);
        let p2p = has(found.dstatusflags, CUfileDriverStatusFlags::CU_FILE_NVME_P2P_SUPPORTED as u32);
        match (found.major_version, found.minor_version) {
            (0, 0) if !p2p => {
                Err(Missing::new("cuFile is in its compat mode, which copies through the host: there is no nvidia-fs"))
            }
            _ if allows && !is_strict => Err(Missing {
                why: "cuFile does not let its compat mode be switched off, so that it may copy through the host".into(),
                remedy: "set allow_compat_mode to false in cufile.json, or give uring",
            }),
            (0, 0) => Ok("peer to peer".into()),
            (major, minor) => Ok(format!("nvidia-fs {major}.{minor}")),
        }
    }

    /// What of the kernel moves the bytes, for people.
    pub(crate) fn mover_name(&self) -> &str {
        &self.mover
    }

    /// Makes a file known, which was opened for reads past the cache.
    ///
    /// # Errors
    /// If its file system or disk cannot do that.
    pub(crate) fn file(self: &Arc<Self>, file: File) -> Result<CuFileHandle, String> {
        let described = CUfileDescr_t {
            type_: CUfileFileHandleType::CU_FILE_HANDLE_TYPE_OPAQUE_FD,
            handle: CUfileDescr_t__bindgen_ty_1 { fd: file.as_raw_fd() },
            fs_ops: std::ptr::null(),
        };
        let raw = cudarc::cufile::result::handle_register(&described);
        let raw = raw.map_err(|error| format!("cuFileHandleRegister fails: {}", words(&error)))?;
        Ok(CuFileHandle { library: Arc::clone(self), raw, _file: file })
    }

    /// Makes memory of the device known, so that reads need no other; not if there is no room for it, and then the library reads by
    /// way of memory of the device that it has itself.
    ///
    /// # Safety
    /// All of it is of one allocation, which outlives what is returned.
    pub(crate) unsafe fn memory(self: &Arc<Self>, at: u64, bytes: usize) -> Option<CuFileMemory> {
        if bytes == 0 || self.gpu.enter().is_err() {
            return None;
        }
        // SAFETY: the caller's.
        let known = unsafe { cudarc::cufile::result::buf_register(at as usize as *const _, bytes, 0) };
        known.ok().map(|()| CuFileMemory { library: Arc::clone(self), at })
    }
}

impl Drop for CuFile {
    fn drop(&mut self) {
        if self.gpu.takes_back() {
            // SAFETY: it was opened once, and all files and memory that it knew have kept it until they were forgotten.
            let _ = unsafe { sys::cuFileDriverClose() }.result();
        }
    }
}

/// Has the library refuse what it would copy through the host; whether it will. Older ones do not know the call.
fn forbid_compat_mode() -> bool {
    type Call = unsafe extern "C" fn(u32, bool) -> sys::CUfileError_t;
    // SAFETY: the library is there, and what it has by this name is such a function.
    let Ok(call) = (unsafe { sys::culib().get::<Call>(b"cuFileSetParameterBool\0") }) else { return false };
    // SAFETY: both are given by value.
    unsafe { call(ALLOW_COMPAT_MODE, false) }.result().is_ok()
}

/// A file that the library knows.
#[derive(Debug)]
pub(crate) struct CuFileHandle {
    library: Arc<CuFile>,
    raw: sys::CUfileHandle_t,
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
        let (offset, from) = (offset as sys::off_t, from as sys::off_t);
        // SAFETY: the caller's; the file is known until this is dropped.
        let read = unsafe { sys::cuFileRead(self.raw, base as usize as *mut _, bytes, offset, from) };
        match read {
            // The system's error.
            -1 => Err(io::Error::last_os_error()),
            // The library's, of which it may have more than cudarc knows: it stays a number.
            ..0 => Err(io::Error::other(format!("cuFile's error {}", -read))),
            _ => Ok(read as usize),
        }
    }
}

impl Drop for CuFileHandle {
    fn drop(&mut self) {
        if self.library.gpu.takes_back() {
            // SAFETY: it was made known once, and nobody reads it any more.
            unsafe { sys::cuFileHandleDeregister(self.raw) };
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
            let _ = unsafe { sys::cuFileBufDeregister(self.at as usize as *const _) }.result();
        }
    }
}

fn words(error: &CufileError) -> String {
    match error {
        CufileError::Cufile(error) => format!("{error:?} ({})", *error as u32),
        CufileError::IO(error) => error.to_string(),
    }
}
