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

/// The values of the lower three bits of E2M1; the upper one is the sign.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];

/// The value of the lower four bits: one of sign, two of exponent, one of fraction.
#[inline(always)]
pub fn e2m1_value(bits: u8) -> f32 {
    let value = E2M1[usize::from(bits & 7)];
    if bits & 8 == 0 { value } else { -value }
}

/// A byte of one sign, four exponent and three fraction bits; no infinity, and one magnitude that is no number.
#[inline(always)]
pub fn e4m3_value(bits: u8) -> f32 {
    let (exponent, fraction) = (i32::from(bits >> 3 & 15), f32::from(bits & 7));
    let magnitude = match (exponent, bits & 7) {
        (15, 7) => f32::NAN,
        (0, _) => fraction / 512.0,
        _ => (1.0 + fraction / 8.0) * f32::from_bits(((exponent - 7 + 127) as u32) << 23),
    };
    if bits & 0x80 == 0 { magnitude } else { -magnitude }
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
