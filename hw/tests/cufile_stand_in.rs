//! The stand-in for cuFile (`hw/cuda/stand_in/cufile`), driven by cudarc: that it brings the bytes of files to who uses it rightly, and
//! that it finds who does not. What it reports ends the process: each scenario is a process of its own, this program again.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(target_os = "linux")]

use cudarc::cufile::result as cufile;
use cudarc::cufile::sys::{
    self, CUfileDescr_t, CUfileDescr_t__bindgen_ty_1, CUfileFileHandleType, CUfileHandle_t,
};
use cudarc::driver::result;
use lite_llm_tests::cuda::{compile_cufile, compile_driver, cufile_to_link, say_skipped};
use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::process::Command;

const SCENARIO: &str = "LITE_LLM_TEST_SCENARIO";
const BYTES: usize = 64 << 10;

/// A file of such bytes, opened past the cache, and memory of a device, where the library was opened.
struct Ground {
    file: File,
    bytes: Vec<u8>,
    at: u64,
}

impl Ground {
    fn new() -> Self {
        let this = Self::unopened();
        cufile::driver_open().unwrap();
        this
    }

    fn unopened() -> Self {
        result::init().unwrap();
        let device = result::device::get(0).unwrap();
        // SAFETY: the device is there, and its context was made just now.
        unsafe { result::ctx::set_current(result::primary_ctx::retain(device).unwrap()) }.unwrap();
        let mut written = tempfile::NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let bytes: Vec<u8> = (0..BYTES).map(|at| (at * 7 % 251) as u8).collect();
        written.write_all(&bytes).unwrap();
        let file = File::options().read(true).custom_flags(libc::O_DIRECT).open(written.path()).unwrap();
        // SAFETY: nobody reads it before it is written.
        let at = unsafe { result::malloc_sync(BYTES) }.unwrap();
        Self { file, bytes, at }
    }

    fn known(&self) -> CUfileHandle_t {
        let handle = CUfileDescr_t__bindgen_ty_1 { fd: self.file.as_raw_fd() };
        let type_ = CUfileFileHandleType::CU_FILE_HANDLE_TYPE_OPAQUE_FD;
        cufile::handle_register(&CUfileDescr_t { type_, handle, fs_ops: std::ptr::null() }).unwrap()
    }

    fn know_memory(&self, bytes: usize) {
        // SAFETY: it has so many bytes.
        unsafe { cufile::buf_register(self.at as usize as *const _, bytes, 0) }.unwrap();
    }

    fn forget_memory(&self) {
        // SAFETY: the stand-in finds what is wrong with it.
        unsafe { cufile::buf_deregister(self.at as usize as *const _) }.unwrap();
    }

    fn back(&self) -> Vec<u8> {
        let mut back = vec![0; BYTES];
        // SAFETY: the memory has so many bytes.
        unsafe { result::memcpy_dtoh_sync(&mut back, self.at) }.unwrap();
        back
    }
}

/// Reads, rightly or not: the stand-in finds that.
fn read(file: CUfileHandle_t, base: u64, offset: i64, bytes: usize) -> isize {
    // SAFETY: no memory of this process is touched but by the stand-in, which ends it before it touches what is wrong.
    unsafe { sys::cuFileRead(file, base as usize as *mut _, bytes, 0, offset) }
}

fn forget(file: CUfileHandle_t) {
    // SAFETY: as above.
    unsafe { sys::cuFileHandleDeregister(file) };
}

fn right() {
    let ground = Ground::new();
    let file = ground.known();
    ground.know_memory(BYTES);
    assert_eq!(read(file, ground.at, 0, BYTES), BYTES as isize);
    assert!(ground.back() == ground.bytes);
    assert_eq!(read(file, ground.at, 4096, 8192), 8192);
    assert!(ground.back()[4096..12288] == ground.bytes[..8192]);
    ground.forget_memory();
    // Memory that is not known is read into too.
    assert_eq!(read(file, ground.at, 0, 4096), 4096);
    forget(file);
    cufile::driver_close().unwrap();
}

fn faults() {
    let ground = Ground::new();
    let file = ground.known();
    assert_eq!(read(file, ground.at, 0, BYTES), -1);
    assert_eq!(std::io::Error::last_os_error().raw_os_error(), Some(5));
    assert_eq!(read(file, ground.at, 0, BYTES), -5030);
    assert_eq!(read(file, ground.at, 0, BYTES), BYTES as isize / 2);
    for _ in 0..2 {
        assert_eq!(read(file, ground.at, 0, BYTES), BYTES as isize);
        let back = ground.back();
        let differing: u32 = back.iter().zip(&ground.bytes).map(|(a, b)| (a ^ b).count_ones()).sum();
        assert_eq!(differing, 1);
    }
    forget(file);
    cufile::driver_close().unwrap();
}

type Scenario = (&'static str, fn(), &'static str);

/// What is wrong, and what is said of it.
const WRONG: &[Scenario] = &[
    (
        "before it is opened",
        || {
            Ground::unopened().known();
        },
        "before it is opened",
    ),
    (
        "after it is closed",
        || {
            let ground = Ground::new();
            let file = ground.known();
            forget(file);
            cufile::driver_close().unwrap();
            read(file, ground.at, 0, 4096);
        },
        "after it is closed",
    ),
    (
        "a file that was forgotten",
        || {
            let ground = Ground::new();
            let file = ground.known();
            forget(file);
            read(file, ground.at, 0, 4096);
        },
        "of a file that was forgotten",
    ),
    (
        "a file that is not known",
        || {
            read(std::ptr::dangling_mut(), Ground::new().at, 0, 4096);
        },
        "of a file that was never made known",
    ),
    (
        "a file that is known at the end",
        || {
            Ground::new().known();
            cufile::driver_close().unwrap();
        },
        "cuFileDriverClose while file",
    ),
    (
        "memory that is known at the end",
        || {
            Ground::new().know_memory(BYTES);
            cufile::driver_close().unwrap();
        },
        "cuFileDriverClose while memory is known",
    ),
    (
        "beyond an allocation",
        || {
            let ground = Ground::new();
            read(ground.known(), ground.at, 4096, BYTES);
        },
        "into what is no memory of a device, or beyond it",
    ),
    (
        "beyond what is known",
        || {
            let ground = Ground::new();
            ground.know_memory(BYTES / 2);
            read(ground.known(), ground.at, 4096, BYTES / 2);
        },
        "beyond memory that is known",
    ),
    (
        "by another beginning",
        || {
            let ground = Ground::new();
            ground.know_memory(BYTES);
            read(ground.known(), ground.at + 4096, 0, 4096);
        },
        "known by another beginning",
    ),
    (
        "memory of the host",
        || {
            let (ground, host) = (Ground::new(), vec![0u8; BYTES]);
            read(ground.known(), host.as_ptr().addr() as u64, 0, BYTES);
        },
        "into what is no memory of a device",
    ),
    (
        "memory that was freed",
        || {
            let ground = Ground::new();
            ground.know_memory(BYTES);
            // SAFETY: it was allocated once.
            unsafe { result::memory_free(ground.at) }.unwrap();
            ground.forget_memory();
        },
        "memory that was freed before",
    ),
    (
        "memory that a copy uses",
        || {
            let ground = Ground::new();
            let file = ground.known();
            let stream = result::stream::create(result::stream::StreamKind::NonBlocking).unwrap();
            for _ in 0..64 {
                // SAFETY: all is there until the end of the process.
                unsafe { result::memcpy_htod_async(ground.at, &ground.bytes, stream) }.unwrap();
            }
            read(file, ground.at, 0, 4096);
        },
        "still used by a copy from the host",
    ),
];

fn play(scenario: &str, fault: &str) -> Option<(bool, String)> {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (Some(driver), Some(library)) = (compile_driver(tmp), compile_cufile(tmp)) else {
        say_skipped("the stand-in for cuFile, for want of Linux and a C++ compiler (c++, or CXX)");
        return None;
    };
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "scenario", "--nocapture"]).env(SCENARIO, scenario);
    command.env("LITE_LLM_STAND_IN", "90").env("LITE_LLM_STAND_IN_CUFILE_FAULT", fault);
    command.env("LD_LIBRARY_PATH", std::env::join_paths([driver, cufile_to_link(&library)]).unwrap());
    let output = command.output().unwrap();
    Some((output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned()))
}

/// Played by the tests beside it, with libraries to open; by itself it is nothing.
#[test]
fn scenario() {
    let Ok(wanted) = std::env::var(SCENARIO) else { return };
    let all: [Scenario; 2] = [("right", right, ""), ("faults", faults, "")];
    let (_, play, _) = all.iter().chain(WRONG).find(|(name, ..)| *name == wanted).expect("a scenario");
    play();
}

#[test]
fn right_uses_bring_the_bytes_of_files_and_faults_as_they_are_wished() {
    for (scenario, fault) in [("right", ""), ("faults", "1:5,2:5030,3:short,4+:flip")] {
        let Some((ended_well, said)) = play(scenario, fault) else { return };
        // Not every file system has reads past the cache.
        assert!(ended_well || said.contains("InvalidInput"), "{scenario}: {said}");
    }
}

#[test]
fn wrong_uses_are_found() {
    for (scenario, _, words) in WRONG {
        let Some((ended_well, said)) = play(scenario, "") else { return };
        let found = said.contains("stand-in for ") && said.contains(words);
        assert!(!ended_well && found || said.contains("InvalidInput"), "{scenario}: {said}");
    }
}
