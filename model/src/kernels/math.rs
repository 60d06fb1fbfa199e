//! Transcendentals: the project's own `f32` polynomials, in which every operation and its order is fixed.

use super::linear::sum_body;
use super::versioned;

const LOG2_E: f32 = std::f32::consts::LOG2_E;
/// ln 2 in two parts; the upper has few enough bits that `n * LN2_HIGH` is exact for every n in use.
const LN2_HIGH: f32 = 0.693_359_4;
const LN2_LOW: f32 = -2.121_944_4e-4;
/// 1.5 * 2^23: adding it rounds to an integer, to nearest even, and leaves that integer in the low bits.
const ROUND: f32 = 12_582_912.0;
/// Below this the result is +0.
const EXP_LOWEST: f32 = -104.0;
/// From this on the result is +infinity.
const EXP_HIGHEST: f32 = 89.0;

/// e^x, about one unit in the last place; +0 and +infinity at the ends, subnormals rounded once, one NaN for all NaNs.
#[inline(always)]
pub fn exp(x: f32) -> f32 {
    let low = if x < EXP_LOWEST { EXP_LOWEST } else { x };
    let clamped = if low > EXP_HIGHEST { EXP_HIGHEST } else { low };
    let shifted = clamped.mul_add(LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    // Coefficients of Cephes' expf (S. Moshier), evaluated by Horner's rule with fused steps.
    let mut p = 1.987_569_1e-4f32;
    p = p.mul_add(r, 1.398_199_9e-3);
    p = p.mul_add(r, 8.333_452e-3);
    p = p.mul_add(r, 4.166_579_6e-2);
    p = p.mul_add(r, 1.666_666_5e-1);
    p = p.mul_add(r, 0.5);
    let p = p.mul_add(r * r, r) + 1.0;
    // 2^n in two factors, so that a subnormal result is rounded once, by the second multiplication.
    let exponent = (shifted.to_bits() as i32).wrapping_sub(ROUND.to_bits() as i32);
    let first = exponent >> 1;
    let second = exponent.wrapping_sub(first);
    let scaled = p * power_of_two(first) * power_of_two(second);
    if x.is_nan() { f32::from_bits(0x7fc0_0000) } else { scaled }
}

#[inline(always)]
fn power_of_two(exponent: i32) -> f32 {
    f32::from_bits((exponent.wrapping_add(127) as u32) << 23)
}

/// 1 / (1 + e^-x).
#[inline(always)]
pub fn sigmoid(x: f32) -> f32 {
    1.0 / (1.0 + exp(-x))
}

/// x / (1 + e^-x).
#[inline(always)]
pub fn silu(x: f32) -> f32 {
    x / (1.0 + exp(-x))
}

versioned! {
    /// Replaces every value by its exponential.
    pub fn exp_in_place(values: &mut [f32]) = exp_body
}

versioned! {
    /// Replaces every value by its sigmoid.
    pub fn sigmoid_in_place(values: &mut [f32]) = sigmoid_body
}

versioned! {
    /// Replaces every value by its silu.
    pub fn silu_in_place(values: &mut [f32]) = silu_body
}

versioned! {
    /// Softmax in place; the sum is a dot product with ones.
    pub fn softmax_in_place(values: &mut [f32]) = softmax_body
}

#[inline(always)]
fn softmax_body(values: &mut [f32]) {
    let mut max = f32::NEG_INFINITY;
    for value in &*values {
        max = if *value > max { *value } else { max };
    }
    for value in &mut *values {
        *value -= max;
    }
    exp_body(values);
    let sum = sum_body(values);
    for value in values {
        *value /= sum;
    }
}

#[inline(always)]
pub(super) fn exp_body(values: &mut [f32]) {
    for value in values {
        *value = exp(*value);
    }
}

#[inline(always)]
fn sigmoid_body(values: &mut [f32]) {
    for value in values {
        *value = sigmoid(*value);
    }
}

#[inline(always)]
fn silu_body(values: &mut [f32]) {
    for value in values {
        *value = silu(*value);
    }
}
