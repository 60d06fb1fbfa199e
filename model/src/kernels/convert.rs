//! Conversions between storage types and `f32`: widening is exact, narrowing rounds to nearest even in integers.

use super::{DType, versioned};
use half::f16;

/// The nearest bfloat16, ties to even, as its bits.
#[inline(always)]
pub fn bf16_bits(value: f32) -> u16 {
    // Selects, no branches: half's own form mispredicts on every other random value.
    let bits = value.to_bits();
    let rounded = bits.wrapping_add(0x7fff + (bits >> 16 & 1)) >> 16;
    let quiet = bits >> 16 | 0x40;
    (if bits & 0x7fff_ffff > 0x7f80_0000 { quiet } else { rounded }) as u16
}

/// The nearest binary16, ties to even, as its bits.
#[inline(always)]
pub fn f16_bits(value: f32) -> u16 {
    f16::from_f32_const(value).to_bits()
}

/// The exact value of bfloat16 bits.
#[inline(always)]
pub fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// The exact value of binary16 bits.
#[inline(always)]
pub fn f16_value(bits: u16) -> f32 {
    f16::from_bits(bits).to_f32_const()
}

versioned! {
    /// Widens little-endian storage to `f32`, exactly. `bytes` holds as many values as `out`.
    pub fn widen(dtype: DType, bytes: &[u8], out: &mut [f32]) = widen_body
}

#[inline(always)]
pub(super) fn widen_body(dtype: DType, bytes: &[u8], out: &mut [f32]) {
    assert_eq!(bytes.len(), out.len() * dtype.bytes());
    match dtype {
        DType::F32 => {
            for (value, four) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*four);
            }
        }
        DType::Bf16 => {
            for (value, two) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = bf16_value(u16::from_le_bytes(*two));
            }
        }
        DType::F16 => {
            for (value, two) in out.iter_mut().zip(bytes.as_chunks::<2>().0) {
                *value = f16_value(u16::from_le_bytes(*two));
            }
        }
    }
}

/// Rounds `f32` to little-endian storage. `bytes` holds as many values as `values`.
pub fn narrow(dtype: DType, values: &[f32], bytes: &mut [u8]) {
    assert_eq!(bytes.len(), values.len() * dtype.bytes());
    match dtype {
        DType::F32 => {
            for (four, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
                *four = value.to_le_bytes();
            }
        }
        DType::Bf16 => {
            for (two, value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *two = bf16_bits(*value).to_le_bytes();
            }
        }
        DType::F16 => {
            for (two, value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
                *two = f16_bits(*value).to_le_bytes();
            }
        }
    }
}
