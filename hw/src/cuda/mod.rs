//! The host side of the kernels for GPUs: which devices there are ([`driver`]), the kernels' sources and what is made of them
//! ([`kernels`]), the compiler that makes it ([`nvrtc`]) and the cache that keeps it ([`cache`]); a device that is used ([`gpu`]), its
//! memory, streams and functions; how experts come to it (`staging.rs`, `upload.rs`, `cufile`), and a model's steps on it (`model`);
//! the library that moves values from device to device (`nccl`); and whether a cluster's nodes could have them ([`ready()`]).
//!
//! The libraries are opened while the program runs, never linked: it is the same program where there is no GPU. Whether a library
//! is there is asked before its first call, which would panic without it.

pub mod cache;
pub(crate) mod cufile;
pub mod driver;
mod event;
mod functions;
pub mod gpu;
mod graph;
pub mod kernels;
pub(crate) mod memory;
pub(crate) mod model;
pub(crate) mod nccl;
pub mod nvrtc;
mod ready;
pub mod self_test;
pub(crate) mod staging;
pub(crate) mod stream;
pub(crate) mod upload;

pub use gpu::{Gpu, PATIENCE};
pub use ready::ready;

use kernels::Target;
use std::time::Duration;

/// Why nothing can be done with a GPU, and what would help.
#[derive(Debug, thiserror::Error)]
pub enum CudaError {
    /// The driver's library is not there.
    #[error(
        "there is no CUDA driver: libcuda.so.1 was not found where the system looks for libraries; install NVIDIA's driver, in a \
         container pass the GPU and its driver through, or leave out --device cuda"
    )]
    NoDriver,
    /// The driver is there and answers with an error.
    #[error(
        "the CUDA driver refuses ({call}: {why}); see whether nvidia-smi sees the GPU, and whether the driver was updated without a \
         restart of the machine"
    )]
    Driver {
        /// What was called.
        call: &'static str,
        /// What it answered.
        why: String,
    },
    /// More than the budget allows is wanted of the device's memory.
    #[error(
        "{what} of {bytes} bytes does not fit the GPU's budget of {limit} bytes, of which {taken} are taken; give --memory more, or \
         --cache-positions less"
    )]
    Budget {
        /// What for.
        what: &'static str,
        /// How much.
        bytes: u64,
        /// What may be taken in all.
        limit: u64,
        /// What is taken.
        taken: u64,
    },
    /// The device does not have as much memory.
    #[error(
        "the GPU has no {bytes} bytes for {what}, only {free} are free; give --memory less, or end whoever else uses it (nvidia-smi)"
    )]
    Memory {
        /// What for.
        what: &'static str,
        /// How much.
        bytes: u64,
        /// What it has.
        free: u64,
    },
    /// The host does not have as much memory that may be pinned.
    #[error(
        "the system does not pin {bytes} bytes of memory for copies to the GPU; give --warm less, or free memory of the host"
    )]
    Pinned {
        /// How much.
        bytes: u64,
    },
    /// Bytes that were copied to the device are not those that were sent.
    #[error(
        "{bytes} bytes that were copied to it are not there as they were sent, and neither were they when sent again"
    )]
    Copy {
        /// How many.
        bytes: u64,
    },
    /// The kernels do not know such a model.
    #[error("the kernels for GPUs do not compute {0}; use --device cpu")]
    Unsupported(String),
    /// A kernel does not compute the contract's bits there.
    #[error(
        "the kernel {kernel} gives other bits than the contract on {device} ({made_by}): expected {expected:016x}, got {found:016x}; \
         update the driver, try another NVRTC of CUDA 12, suspect this GPU, and use --device cpu meanwhile"
    )]
    Bits {
        /// The kernel.
        kernel: String,
        /// The device.
        device: String,
        /// The driver, and what the kernels were made by and for.
        made_by: String,
        /// Hash of the contract's bits.
        expected: u64,
        /// Hash of the bits found.
        found: u64,
    },
    /// The device makes no progress.
    #[error("it has made no progress for {patience:?}")]
    Hang {
        /// How long it was waited for.
        patience: Duration,
    },
    /// Waiting for other ranks was interrupted.
    #[error("the step was given up")]
    Stopped,
    /// NCCL answers with an error while values are moved.
    #[error(
        "NCCL fails ({call}: {why}); set NCCL_DEBUG=WARN to hear more of it; where libnccl.so.2 is not found, ranks exchange through \
         the host"
    )]
    Nccl {
        /// What was called.
        call: &'static str,
        /// What it answered.
        why: String,
    },
    /// The driver is there and has no device.
    #[error(
        "the CUDA driver has no device: see whether nvidia-smi sees a GPU, and whether CUDA_VISIBLE_DEVICES hides it"
    )]
    NoDevice,
    /// The driver does not have that device.
    #[error(
        "there is no GPU {number}: the CUDA driver has {devices}; give --device cuda:N with one of these numbers"
    )]
    OtherDevice {
        /// What was asked for.
        number: u32,
        /// Those that are there.
        devices: String,
    },
    /// The compiler's library is not there.
    #[error(
        "there is no NVRTC, which compiles the kernels: libnvrtc.so.12 was not found where the system looks for libraries; install \
         NVRTC of CUDA 12 (it comes with the toolkit, and by itself), and name its folder in LD_LIBRARY_PATH"
    )]
    NoNvrtc,
    /// The compiler's library is of another CUDA.
    #[error(
        "NVRTC is of CUDA {major}.{minor}, which this program does not know; install NVRTC of CUDA 12, and name its folder first in \
         LD_LIBRARY_PATH"
    )]
    OtherNvrtc {
        /// Its major version.
        major: u32,
        /// Its minor version.
        minor: u32,
    },
    /// The compiler knows nothing that the device could run.
    #[error(
        "NVRTC {version} makes nothing that a device of compute capability {}.{} runs; install a version of CUDA 12 that does",
        capability / 10,
        capability % 10
    )]
    Architecture {
        /// The compiler's version.
        version: String,
        /// Ten times the capability of the device.
        capability: u32,
    },
    /// The compiler answers a call about nothing in particular with an error.
    #[error(
        "NVRTC fails ({call}: {why}); install it again, with libnvrtc-builtins of the same version beside it"
    )]
    Nvrtc {
        /// What was called.
        call: &'static str,
        /// What it answered.
        why: String,
    },
    /// A source does not compile.
    #[error(
        "{source_name} does not compile for {target} ({why}); try another NVRTC of CUDA 12, and report this: the sources are this \
         program's own. The compiler says: {log}"
    )]
    Compile {
        /// The source.
        source_name: String,
        /// What it was to become.
        target: Target,
        /// What the compiler answered.
        why: String,
        /// What it said of the source.
        log: String,
    },
}
