//! NCCL, NVIDIA's library that moves values from device to device: opened while the program runs, never linked. Values are moved, and
//! never added up: a sum across ranks would have an order of its own.
//!
//! It is not called through cudarc. That looks for `libnccl.so`, which only those have who compile against it, not for the name under
//! which NCCL is installed; and its results are an enum, which a later NCCL may leave.

pub(crate) mod communicator;

use super::stream::Raw;
use libloading::Library;
use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::sync::OnceLock;

/// The names it has: as it is installed, and as it is compiled against.
const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];
/// The oldest that knows all of [`Config`]: major, minor.
const OLDEST: (u32, u32) = (2, 18);

/// Results of calls.
const SUCCESS: c_int = 0;
/// A call to the system failed, of the network or of shared memory.
const SYSTEM_ERROR: c_int = 2;
/// Another rank failed, or is gone.
const REMOTE_ERROR: c_int = 6;
/// It goes on without the caller, who asks how it ended.
const IN_PROGRESS: c_int = 7;
/// Values of 32 bits, whatever they mean.
const WORDS: c_int = 3;

/// By which the ranks of a communicator find each other.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct UniqueId(pub(crate) [u8; 128]);

/// How a communicator is made: the fields that NCCL 2.18 knows. A later one takes what it does not find here as unsaid.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cluster_size: c_int,
    blocks_min: c_int,
    blocks_max: c_int,
    network: *const c_char,
    split_share: c_int,
}

impl Config {
    /// A communicator whose calls wait for nobody.
    const fn without_waiting() -> Self {
        const UNSAID: c_int = c_int::MIN;
        Self {
            size: size_of::<Self>(),
            magic: 0xcafe_beef,
            // Of the version that the fields are of, in its own numbers.
            version: 2 * 10_000 + 18 * 100,
            blocking: 0,
            cluster_size: UNSAID,
            blocks_min: UNSAID,
            blocks_max: UNSAID,
            network: std::ptr::null(),
            split_share: UNSAID,
        }
    }
}

/// A handle of a communicator.
type Handle = *mut c_void;

/// The library, which is there, and its calls.
#[derive(Debug)]
pub(crate) struct Nccl {
    version: u32,
    get_unique_id: unsafe extern "C" fn(*mut UniqueId) -> c_int,
    init_rank: unsafe extern "C" fn(*mut Handle, c_int, UniqueId, c_int, *mut Config) -> c_int,
    async_error: unsafe extern "C" fn(Handle, *mut c_int) -> c_int,
    abort: unsafe extern "C" fn(Handle) -> c_int,
    group_start: unsafe extern "C" fn() -> c_int,
    group_end: unsafe extern "C" fn() -> c_int,
    send: unsafe extern "C" fn(*const c_void, usize, c_int, c_int, Handle, Raw) -> c_int,
    receive: unsafe extern "C" fn(*mut c_void, usize, c_int, c_int, Handle, Raw) -> c_int,
    error_string: unsafe extern "C" fn(c_int) -> *const c_char,
    /// Last, as calls go with it.
    _library: Library,
}

impl Nccl {
    /// Opens the library, once in a process.
    ///
    /// # Errors
    /// Why it cannot be used, and what helps, for people.
    pub(crate) fn find() -> Result<&'static Self, String> {
        static FOUND: OnceLock<Result<Nccl, String>> = OnceLock::new();
        FOUND.get_or_init(Self::open).as_ref().map_err(Clone::clone)
    }

    fn open() -> Result<Self, String> {
        // SAFETY: opening the library runs what it does when it is loaded, and that is the NCCL of this machine.
        let library = NAMES.into_iter().find_map(|name| unsafe { Library::new(name) }.ok());
        let library = library.ok_or_else(|| {
            "there is no NCCL: libnccl.so.2 was not found where the system looks for libraries; install it, and name its folder \
             in LD_LIBRARY_PATH"
                .to_owned()
        })?;
        // SAFETY: NCCL has said so of this function since its first version.
        let get_version =
            unsafe { call::<unsafe extern "C" fn(*mut c_int) -> c_int>(&library, "ncclGetVersion") }?;
        let mut version = 0;
        // SAFETY: it writes one integer, which lives until the call returns.
        let code = unsafe { get_version(&raw mut version) };
        if code != SUCCESS {
            return Err(format!("NCCL does not say its version (error {code}); install it again"));
        }
        let version = version.unsigned_abs();
        if pair(version) < OLDEST {
            let (major, minor) = OLDEST;
            return Err(format!(
                "NCCL is {}, older than {major}.{minor}; install a newer one",
                number(version)
            ));
        }
        // SAFETY: since that version the functions have these types, as nccl.h says them.
        unsafe {
            Ok(Self {
                version,
                get_unique_id: call(&library, "ncclGetUniqueId")?,
                init_rank: call(&library, "ncclCommInitRankConfig")?,
                async_error: call(&library, "ncclCommGetAsyncError")?,
                abort: call(&library, "ncclCommAbort")?,
                group_start: call(&library, "ncclGroupStart")?,
                group_end: call(&library, "ncclGroupEnd")?,
                send: call(&library, "ncclSend")?,
                receive: call(&library, "ncclRecv")?,
                error_string: call(&library, "ncclGetErrorString")?,
                _library: library,
            })
        }
    }

    /// Its version, as it counts them.
    pub(crate) const fn version(&self) -> u32 {
        self.version
    }

    /// What ranks that are to find each other are told.
    ///
    /// # Errors
    /// What NCCL answers, for people.
    pub(crate) fn unique_id(&self) -> Result<UniqueId, String> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: it writes one identifier, which lives until the call returns.
        match unsafe { (self.get_unique_id)(&raw mut id) } {
            SUCCESS => Ok(id),
            code => Err(format!("ncclGetUniqueId: {}", self.text(code))),
        }
    }

    /// What a result means.
    fn text(&self, code: c_int) -> String {
        // SAFETY: it answers any number with a text that ends and is never freed, or with nothing.
        let text = unsafe { (self.error_string)(code) };
        if text.is_null() {
            return format!("error {code}");
        }
        // SAFETY: as above.
        unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned()
    }
}

/// A function of the library.
///
/// # Safety
/// The function has this type.
unsafe fn call<F: Copy>(library: &Library, name: &str) -> Result<F, String> {
    // SAFETY: the caller's.
    let found = unsafe { library.get::<F>(name.as_bytes()) };
    found.map(|found| *found).map_err(|_| format!("NCCL has no {name}; install it again"))
}

/// Major and minor version.
pub(crate) const fn pair(version: u32) -> (u32, u32) {
    // Before 2.9 it counted otherwise.
    if version < 10_000 {
        (version / 1000, version % 1000 / 100)
    } else {
        (version / 10_000, version % 10_000 / 100)
    }
}

/// A version as people write it.
pub(crate) fn number(version: u32) -> String {
    let (major, minor) = pair(version);
    format!("{major}.{minor}.{}", version % 100)
}
