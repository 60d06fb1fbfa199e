//! NVRTC, NVIDIA's compiler as a library.

use super::CudaError;
use super::kernels::{Compiler, HEADERS, OPTIONS, Source, Target};
use cudarc::nvrtc::result;
use cudarc::nvrtc::sys::{self, nvrtcProgram, nvrtcResult};
use std::ffi::{CString, c_char};

/// The major version that this program knows: another one may answer with what is no value of a result here.
const MAJOR: u32 = 12;

/// The compiler, which is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nvrtc {
    major: u32,
    minor: u32,
}

impl Nvrtc {
    /// Opens the library.
    ///
    /// # Errors
    /// If it is not there, fails, or is of another major version.
    pub fn find() -> Result<Self, CudaError> {
        // SAFETY: opening the library runs what it does when it is loaded, and that is the compiler of this machine.
        if !unsafe { sys::is_culib_present() } {
            return Err(CudaError::NoNvrtc);
        }
        let (mut major, mut minor) = (0, 0);
        // SAFETY: it writes two integers, which live until the call returns.
        answer("nvrtcVersion", unsafe { sys::nvrtcVersion(&raw mut major, &raw mut minor) })?;
        let (major, minor) = (major.unsigned_abs(), minor.unsigned_abs());
        if major != MAJOR {
            return Err(CudaError::OtherNvrtc { major, minor });
        }
        Ok(Self { major, minor })
    }

    /// Its version, as people write it.
    pub fn number(&self) -> String {
        format!("{}.{}", self.major, self.minor)
    }

    /// What suits a device of this capability (ten times it).
    ///
    /// # Errors
    /// If nothing does.
    pub fn target(&self, capability: u32) -> Result<Target, CudaError> {
        let mut count = 0;
        // SAFETY: it writes one integer, which lives until the call returns.
        answer("nvrtcGetNumSupportedArchs", unsafe { sys::nvrtcGetNumSupportedArchs(&raw mut count) })?;
        let mut made = vec![0; usize::try_from(count).unwrap_or(0)];
        // SAFETY: it writes as many integers as it has just said, and that many there are.
        answer("nvrtcGetSupportedArchs", unsafe { sys::nvrtcGetSupportedArchs(made.as_mut_ptr()) })?;
        let made: Vec<u32> = made.into_iter().map(i32::unsigned_abs).collect();
        let nothing = || CudaError::Architecture { version: self.number(), capability };
        Target::of(capability, &made).ok_or_else(nothing)
    }
}

impl Compiler for Nvrtc {
    fn version(&self) -> String {
        format!("NVRTC {}", self.number())
    }

    fn compile(&self, source: &Source, target: Target) -> Result<Vec<u8>, CudaError> {
        let program = Program::of(source)?;
        let options: Vec<String> = std::iter::once(format!("--gpu-architecture={target}"))
            .chain(OPTIONS.map(str::to_owned))
            .collect();
        // SAFETY: the program lives.
        unsafe { result::compile_program(program.0, &options) }.map_err(|error| CudaError::Compile {
            source_name: source.name.to_owned(),
            target,
            why: error.to_string(),
            log: program.log(),
        })?;
        match target {
            Target::Cubin(_) => program.code("nvrtcGetCUBIN", sys::nvrtcGetCUBINSize, sys::nvrtcGetCUBIN),
            Target::Ptx(_) => program.code("nvrtcGetPTX", sys::nvrtcGetPTXSize, sys::nvrtcGetPTX),
        }
    }
}

/// A source in the compiler's hands.
struct Program(nvrtcProgram);

impl Program {
    fn of(source: &Source) -> Result<Self, CudaError> {
        let text = |text: &str| CString::new(text).expect("no source has a zero byte");
        let (name, code) = (text(source.name), text(source.text));
        let (names, codes): (Vec<CString>, Vec<CString>) =
            HEADERS.iter().map(|header| (text(header.name), text(header.text))).unzip();
        let pointers = |texts: &[CString]| texts.iter().map(|text| text.as_ptr()).collect::<Vec<_>>();
        let (names, codes, mut program) = (pointers(&names), pointers(&codes), std::ptr::null_mut());
        // SAFETY: texts end with a zero byte and live until the call returns, which copies them; there are as many names as
        // texts of headers.
        let created = unsafe {
            sys::nvrtcCreateProgram(
                &raw mut program,
                code.as_ptr(),
                name.as_ptr(),
                HEADERS.len() as i32,
                codes.as_ptr(),
                names.as_ptr(),
            )
        };
        answer("nvrtcCreateProgram", created)?;
        Ok(Self(program))
    }

    /// What the compiler said of it.
    fn log(&self) -> String {
        // SAFETY: the program lives.
        let log = unsafe { result::get_program_log(self.0) }.unwrap_or_default();
        let bytes: Vec<u8> = log.into_iter().map(|byte| byte as u8).take_while(|byte| *byte != 0).collect();
        String::from_utf8_lossy(&bytes).trim().to_owned()
    }

    /// What came of it, in one of its forms.
    fn code(
        &self,
        call: &'static str,
        size: unsafe fn(nvrtcProgram, *mut usize) -> nvrtcResult,
        get: unsafe fn(nvrtcProgram, *mut c_char) -> nvrtcResult,
    ) -> Result<Vec<u8>, CudaError> {
        let mut bytes = 0;
        // SAFETY: the program lives, and one size is written.
        answer(call, unsafe { size(self.0, &raw mut bytes) })?;
        let mut code = vec![0u8; bytes];
        // SAFETY: the program lives, and as many bytes are written as it has just said.
        answer(call, unsafe { get(self.0, code.as_mut_ptr().cast()) })?;
        Ok(code)
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: the program lives, and nobody has it after this. What cannot be given back is lost.
        let _ = unsafe { result::destroy_program(self.0) };
    }
}

fn answer(call: &'static str, answer: nvrtcResult) -> Result<(), CudaError> {
    answer.result().map_err(|error| CudaError::Nvrtc { call, why: error.to_string() })
}
