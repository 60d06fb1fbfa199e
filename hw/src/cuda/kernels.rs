//! The kernels' sources, which are part of the program, and what they are compiled to.

use super::CudaError;
use serde::{Deserialize, Serialize};
use std::fmt;
use std::num::NonZero;
use std::sync::Mutex;
use std::sync::PoisonError;
use std::sync::atomic::{AtomicUsize, Ordering};

/// A file of `hw/cuda`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Source {
    /// Its name there.
    pub name: &'static str,
    /// What stands in it.
    pub text: &'static str,
}

macro_rules! embedded {
    ($($name:literal),* $(,)?) => {
        &[$(Source { name: $name, text: include_str!(concat!("../../cuda/", $name)) }),*]
    };
}

/// Every source with kernels. Each is compiled by itself.
pub const KERNELS: &[Source] = embedded![
    "arrange.cu",
    "attention.cu",
    "embed.cu",
    "exponential.cu",
    "grouped.cu",
    "linear.cu",
    "moe.cu",
    "norm.cu",
    "rope.cu",
    "sample.cu",
];

/// What they include.
pub const HEADERS: &[Source] = embedded!["contract.cuh", "products.cuh", "words.cuh"];

/// Rule 1 of the numeric contract: nothing is contracted or flushed, divisions and square roots are rounded as IEEE 754 says.
pub const OPTIONS: [&str; 5] =
    ["--std=c++17", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"];

/// What a source is compiled to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Target {
    /// Machine code of devices with this capability (ten times it).
    Cubin(u32),
    /// Code that the driver translates for any device with this capability or more.
    Ptx(u32),
}

impl Target {
    /// What suits a device, of what a compiler makes: machine code if it can, else the nearest that the driver can translate.
    pub fn of(capability: u32, made: &[u32]) -> Option<Self> {
        if made.contains(&capability) {
            return Some(Self::Cubin(capability));
        }
        made.iter().copied().filter(|&below| below < capability).max().map(Self::Ptx)
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cubin(capability) => write!(f, "sm_{capability}"),
            Self::Ptx(capability) => write!(f, "compute_{capability}"),
        }
    }
}

/// What compiles a source: NVRTC, or a stand-in of a test.
pub trait Compiler: Sync {
    /// Its name and version: what is made by another one is something else.
    fn version(&self) -> String;

    /// Compiles a source, with [`HEADERS`] and [`OPTIONS`].
    ///
    /// # Errors
    /// If the compiler fails; of a source, with what it says.
    fn compile(&self, source: &Source, target: Target) -> Result<Vec<u8>, CudaError>;
}

/// A source, compiled.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Module {
    /// The source's name.
    pub name: String,
    /// What it was compiled to.
    pub code: Vec<u8>,
}

/// Compiles every source, on as many threads as the machine has.
///
/// # Errors
/// If one does not compile: the first of them.
pub fn compile(compiler: &dyn Compiler, target: Target) -> Result<Vec<Module>, CudaError> {
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get).min(KERNELS.len());
    let (next, made) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    let work = || {
        while let Some(source) = KERNELS.get(next.fetch_add(1, Ordering::Relaxed)) {
            let module =
                compiler.compile(source, target).map(|code| Module { name: source.name.to_owned(), code });
            made.lock().unwrap_or_else(PoisonError::into_inner).push((source.name, module));
        }
    };
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    let mut made = made.into_inner().unwrap_or_else(PoisonError::into_inner);
    made.sort_by_key(|(name, _)| *name);
    made.into_iter().map(|(_, module)| module).collect()
}

/// Names what comes of the sources: whatever has a part in it, has one in this. The driver has none.
pub fn key(compiler: &dyn Compiler, target: Target) -> [u8; 32] {
    let (version, target) = (compiler.version(), target.to_string());
    let named = KERNELS.iter().chain(HEADERS).flat_map(|source| [source.name, source.text]);
    let parts = [version.as_str(), &target].into_iter().chain(OPTIONS).chain(named);
    let mut hasher = blake3::Hasher::new();
    for part in parts {
        // With its length: what moves from a part to the next is something else.
        hasher.update(&(part.len() as u64).to_le_bytes()).update(part.as_bytes());
    }
    hasher.finalize().into()
}
