//! cuFile's calls: opened while the program runs, never linked.
//!
//! They do not go through cudarc. That looks for `libcufile.so`, which only those have who compile against it, not for the name under
//! which cuFile is installed; and its results are an enum, which a later cuFile may leave.

use libloading::Library;
use std::ffi::{c_int, c_long, c_uint, c_void};
use std::fmt;
use std::sync::OnceLock;

/// The names it has: as it is installed, and as it is compiled against.
const NAMES: [&str; 2] = ["libcufile.so.0", "libcufile.so"];

/// A parameter of the library: whether it may copy through the host.
const ALLOW_COMPAT_MODE: c_uint = 1;

/// A result: the library's code, and the driver's where that is why.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Status {
    code: c_int,
    of_driver: c_int,
}

/// Names of codes that people may meet, as the library's header has them. All others are numbers.
const CODES: [(c_int, &str); 16] = [
    (5001, "CU_FILE_DRIVER_NOT_INITIALIZED"),
    (5004, "CU_FILE_DRIVER_VERSION_MISMATCH"),
    (5007, "CU_FILE_PLATFORM_NOT_SUPPORTED"),
    (5008, "CU_FILE_IO_NOT_SUPPORTED"),
    (5009, "CU_FILE_DEVICE_NOT_SUPPORTED"),
    (5010, "CU_FILE_NVFS_DRIVER_ERROR"),
    (5011, "CU_FILE_CUDA_DRIVER_ERROR"),
    (5020, "CU_FILE_DIO_NOT_SET"),
    (5022, "CU_FILE_INVALID_VALUE"),
    (5025, "CU_FILE_PERMISSION_DENIED"),
    (5026, "CU_FILE_DRIVER_ALREADY_OPEN"),
    (5030, "CU_FILE_INTERNAL_ERROR"),
    (5033, "CU_FILE_NVFS_SETUP_ERROR"),
    (5034, "CU_FILE_IO_DISABLED"),
    (5036, "CU_FILE_GPU_MEMORY_PINNING_FAILED"),
    (5043, "CU_FILE_NOMEM_ERROR"),
];

impl Status {
    /// # Errors
    /// If it is none of success: the call, and what it answered, for people.
    pub(super) fn result(self, call: &str) -> Result<(), String> {
        if self.code == 0 { Ok(()) } else { Err(format!("{call} fails: {self}")) }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { code, of_driver } = self;
        match CODES.iter().find(|(known, _)| known == code) {
            Some((_, name)) => write!(f, "{name} ({code})")?,
            None => write!(f, "error {code}")?,
        }
        if *of_driver == 0 { Ok(()) } else { write!(f, ", with the CUDA driver's error {of_driver}") }
    }
}

/// A file, as the library is told of it.
#[repr(C)]
#[derive(Debug)]
pub(super) struct Description {
    kind: c_uint,
    handle: Handle,
    operations: *const c_void,
}

#[repr(C)]
union Handle {
    fd: c_int,
    _pointer: *mut c_void,
}

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a file")
    }
}

impl Description {
    /// Of a file that the system has open.
    pub(super) const fn of_fd(fd: c_int) -> Self {
        const OPAQUE_FD: c_uint = 1;
        Self { kind: OPAQUE_FD, handle: Handle { fd }, operations: std::ptr::null() }
    }
}

/// What the library says of itself.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(super) struct Properties {
    pub(super) nvfs_major: c_uint,
    pub(super) nvfs_minor: c_uint,
    poll_bytes: usize,
    direct_bytes: usize,
    /// Bits.
    pub(super) status: c_uint,
    pub(super) control: c_uint,
    features: c_uint,
    cache_kb: c_uint,
    cache_of_buffer_kb: c_uint,
    /// How much memory of devices may be known to it, in KiB.
    pub(super) pinned_kb: c_uint,
    /// Whatever a later one says behind that.
    _later: [u64; 32],
}

impl Properties {
    const UNSAID: Self = Self {
        nvfs_major: 0,
        nvfs_minor: 0,
        poll_bytes: 0,
        direct_bytes: 0,
        status: 0,
        control: 0,
        features: 0,
        cache_kb: 0,
        cache_of_buffer_kb: 0,
        pinned_kb: 0,
        _later: [0; 32],
    };
}

/// The library, which is there, and its calls.
#[derive(Debug)]
pub(super) struct Calls {
    /// Older ones do not know it.
    set_parameter: Option<unsafe extern "C" fn(c_uint, bool) -> Status>,
    pub(super) open: unsafe extern "C" fn() -> Status,
    pub(super) close: unsafe extern "C" fn() -> Status,
    properties: unsafe extern "C" fn(*mut Properties) -> Status,
    pub(super) register_file: unsafe extern "C" fn(*mut *mut c_void, *mut Description) -> Status,
    pub(super) forget_file: unsafe extern "C" fn(*mut c_void),
    pub(super) register_memory: unsafe extern "C" fn(*const c_void, usize, c_int) -> Status,
    pub(super) forget_memory: unsafe extern "C" fn(*const c_void) -> Status,
    pub(super) read: unsafe extern "C" fn(*mut c_void, *mut c_void, usize, c_long, c_long) -> isize,
    /// Last, as calls go with it.
    _library: Library,
}

impl Calls {
    /// Opens the library, once in a process.
    ///
    /// # Errors
    /// Why it cannot be used, for people.
    pub(super) fn find() -> Result<&'static Self, String> {
        static FOUND: OnceLock<Result<Calls, String>> = OnceLock::new();
        FOUND.get_or_init(Self::load).as_ref().map_err(Clone::clone)
    }

    fn load() -> Result<Self, String> {
        // SAFETY: opening the library runs what it does when it is loaded, and that is the cuFile of this machine.
        let library = NAMES.into_iter().find_map(|name| unsafe { Library::new(name) }.ok());
        let library =
            library.ok_or("libcufile.so.0 was not found where the system looks for libraries".to_owned())?;
        // SAFETY: cuFile has these functions since its first version, and the first one since it has parameters, with the types that
        // cufile.h says.
        unsafe {
            Ok(Self {
                set_parameter: call(&library, "cuFileSetParameterBool").ok(),
                open: call(&library, "cuFileDriverOpen")?,
                close: call(&library, "cuFileDriverClose")?,
                properties: call(&library, "cuFileDriverGetProperties")?,
                register_file: call(&library, "cuFileHandleRegister")?,
                forget_file: call(&library, "cuFileHandleDeregister")?,
                register_memory: call(&library, "cuFileBufRegister")?,
                forget_memory: call(&library, "cuFileBufDeregister")?,
                read: call(&library, "cuFileRead")?,
                _library: library,
            })
        }
    }

    /// Has the library refuse what it would copy through the host, before it is opened; whether it will.
    pub(super) fn forbid_compat_mode(&self) -> bool {
        // SAFETY: both are given by value.
        let forbid = |call: unsafe extern "C" fn(_, _) -> Status| unsafe { call(ALLOW_COMPAT_MODE, false) };
        self.set_parameter.is_some_and(|call| forbid(call).result("cuFileSetParameterBool").is_ok())
    }

    /// What it says of itself, once it is open.
    ///
    /// # Errors
    /// What it answers, for people.
    pub(super) fn properties(&self) -> Result<Properties, String> {
        let mut found = Properties::UNSAID;
        // SAFETY: it writes what it says, which lives until it returns; there is more room for it than any version is known to need.
        unsafe { (self.properties)(&raw mut found) }.result("cuFileDriverGetProperties")?;
        Ok(found)
    }
}

/// A function of the library.
///
/// # Safety
/// The function has this type.
unsafe fn call<F: Copy>(library: &Library, name: &str) -> Result<F, String> {
    // SAFETY: the caller's.
    let found = unsafe { library.get::<F>(name.as_bytes()) };
    found.map(|found| *found).map_err(|_| format!("libcufile.so.0 has no {name}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use cudarc::cufile::sys::{CUfileDescr_t, CUfileDrvProps, CUfileError, CUfileOpError};
    use std::mem::offset_of;

    #[test]
    fn what_is_exchanged_lies_as_the_librarys_header_has_it() {
        assert_eq!(size_of::<Status>(), size_of::<CUfileError>());
        assert_eq!(offset_of!(Status, of_driver), offset_of!(CUfileError, cu_err));
        assert_eq!(size_of::<Description>(), size_of::<CUfileDescr_t>());
        assert_eq!(offset_of!(Description, handle), offset_of!(CUfileDescr_t, handle));
        assert_eq!(offset_of!(Description, operations), offset_of!(CUfileDescr_t, fs_ops));
        assert_eq!(offset_of!(Properties, nvfs_minor), offset_of!(CUfileDrvProps, nvfs.minor_version));
        assert_eq!(offset_of!(Properties, status), offset_of!(CUfileDrvProps, nvfs.dstatusflags));
        assert_eq!(offset_of!(Properties, control), offset_of!(CUfileDrvProps, nvfs.dcontrolflags));
        assert_eq!(offset_of!(Properties, features), offset_of!(CUfileDrvProps, fflags));
        assert_eq!(offset_of!(Properties, pinned_kb), offset_of!(CUfileDrvProps, max_device_pinned_mem_size));
        assert!(size_of::<Properties>() > size_of::<CUfileDrvProps>() + 200);
    }

    #[test]
    fn codes_have_their_names_and_unknown_ones_their_number() {
        let words = |code, of_driver| Status { code, of_driver }.result("cuFileX").unwrap_err();
        assert_eq!(words(5010, 0), "cuFileX fails: CU_FILE_NVFS_DRIVER_ERROR (5010)");
        assert_eq!(words(5999, 0), "cuFileX fails: error 5999");
        assert_eq!(
            words(5011, 2),
            "cuFileX fails: CU_FILE_CUDA_DRIVER_ERROR (5011), with the CUDA driver's error 2"
        );
        assert_eq!(Status { code: 0, of_driver: 0 }.result("cuFileX"), Ok(()));
        assert_eq!(CODES[0].0, CUfileOpError::CU_FILE_DRIVER_NOT_INITIALIZED as c_int);
        assert_eq!(CODES[14].0, CUfileOpError::CU_FILE_GPU_MEMORY_PINNING_FAILED as c_int);
    }
}
