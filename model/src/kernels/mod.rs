//! The kernels of the numeric contract (`docs/numerics.md`): plain `f32` arithmetic whose bits depend on the operands
//! alone, never on the batch, the number of threads or the instruction set.
//!
//! Each kernel has a safe scalar form. Where a vector form exists it computes the same operations in the same order,
//! and the tests compare the two bit for bit.

pub mod attention;
pub mod buffer;
pub mod convert;
pub mod golden;
pub mod linear;
pub mod math;
pub mod norm;
pub mod packed;
mod pieces;
pub mod pool;
pub mod quantise;
pub mod rope;
pub mod sample;
mod self_test;
pub mod swiglu;
#[cfg(test)]
mod tests;

pub use attention::{AttentionParams, KvPage, KvShape, PAGE_POSITIONS, PagedKv, attention};
pub use buffer::Buffer;
pub use linear::{Product, Products, dot, linear};
pub use norm::{layer_norm, rms_norm, rms_norm_in_place};
pub use packed::{
    PackedError, PackedView, Storage, TILE_OUTPUTS, pack, pack_e4m3, pack_groups, pack_mxfp4, packed_len,
    unpack,
};
pub(crate) use pieces::Piece;
pub use pool::Pool;
pub use quantise::Quantised;
pub use rope::RopeTable;
pub use sample::{NonFinite, argmax, penalise, sample};
pub use self_test::{SelfTestError, self_test};
pub use swiglu::{axpy, clamped_swiglu, swiglu};

/// Version of the numeric contract. It changes with any change of any bit of any kernel.
pub const CONTRACT_VERSION: u32 = 1;

/// The instruction set that a kernel runs on. The choice changes the time, never the bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Portable Rust; the reference.
    Scalar,
    /// x86-64 with AVX2, FMA and F16C.
    Avx2,
    /// The same with AVX-512 (F, BW and VNNI), which products use; all else is as with AVX2.
    Avx512,
    /// AArch64, little-endian: NEON is part of the architecture.
    Neon,
}

impl Isa {
    /// All of them, the fastest first; a machine has those of one architecture, and the last.
    pub const ALL: [Self; 4] = [Self::Avx512, Self::Avx2, Self::Neon, Self::Scalar];

    /// The fastest instruction set that this machine has.
    pub fn detect() -> Self {
        Self::ALL.into_iter().find(|isa| isa.available()).unwrap_or(Self::Scalar)
    }

    /// Whether this machine has the instruction set.
    pub fn available(self) -> bool {
        match self {
            Self::Scalar => true,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => {
                std::arch::is_x86_feature_detected!("avx2")
                    && std::arch::is_x86_feature_detected!("fma")
                    && std::arch::is_x86_feature_detected!("f16c")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                Self::Avx2.available()
                    && std::arch::is_x86_feature_detected!("avx512f")
                    && std::arch::is_x86_feature_detected!("avx512bw")
                    && std::arch::is_x86_feature_detected!("avx512vnni")
            }
            // Packed weights are little-endian, and its kernels load them as they are.
            #[cfg(target_arch = "aarch64")]
            Self::Neon => cfg!(target_endian = "little") && std::arch::is_aarch64_feature_detected!("neon"),
            _ => false,
        }
    }

    /// The instruction set for kernels of floats.
    pub(crate) const fn of_floats(self) -> Self {
        match self {
            Self::Scalar => Self::Scalar,
            Self::Avx2 | Self::Avx512 => Self::Avx2,
            Self::Neon => Self::Neon,
        }
    }

    /// Ends what was asked for on a machine of another architecture.
    #[cold]
    pub(crate) fn is_missing(self) -> ! {
        panic!("this machine lacks the instruction set {self:?}")
    }
}

/// The type in which weights or cached keys and values are stored. Arithmetic is always `f32`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum DType {
    /// IEEE 754 binary32.
    F32,
    /// The upper half of a binary32.
    Bf16,
    /// IEEE 754 binary16.
    F16,
}

impl DType {
    /// Size of one value in bytes.
    pub const fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 | Self::F16 => 2,
        }
    }
}

/// Defines a kernel twice from one body: as portable code and, compiled for AVX2 with FMA, as vector code. On AArch64 the
/// portable code is compiled for NEON, as all code is.
///
/// The body states every operation (`mul_add` is the only fused one) and the compiler may neither reorder nor contract
/// them, so that both forms give the same bits.
macro_rules! versioned {
    ($(#[$doc:meta])* $vis:vis fn $name:ident($($arg:ident: $type:ty),* $(,)?) = $body:path) => {
        $(#[$doc])*
        $vis fn $name(isa: $crate::kernels::Isa, $($arg: $type),*) {
            #[cfg(target_arch = "x86_64")]
            #[target_feature(enable = "avx2,fma,f16c")]
            fn avx2($($arg: $type),*) {
                $body($($arg),*)
            }
            match isa {
                $crate::kernels::Isa::Scalar => $body($($arg),*),
                #[cfg(target_arch = "x86_64")]
                $crate::kernels::Isa::Avx2 | $crate::kernels::Isa::Avx512 => {
                    assert!(isa.available(), "this machine lacks AVX2, FMA or F16C");
                    // SAFETY: the assertion above established the features that `avx2` is compiled for.
                    unsafe { avx2($($arg),*) }
                }
                #[cfg(target_arch = "aarch64")]
                $crate::kernels::Isa::Neon => $body($($arg),*),
                missing => missing.is_missing(),
            }
        }
    };
}
use versioned;
