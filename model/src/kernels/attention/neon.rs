//! The NEON form of the scores: four keys at a time, whose lanes are transposed so that the left-to-right sums of four dot
//! products are fifteen additions.

use crate::kernels::Isa;
use crate::kernels::packed::{CHUNK, LANES};
use std::arch::aarch64::*;

/// Keys that are taken together, and values of a register.
const FOUR: usize = 4;

/// `out[i] = dot(q, keys[i]) * scale`, for keys of one chunk.
pub(super) fn dots(q: &[f32], keys: &[f32], scale: f32, out: &mut [f32]) {
    assert!(Isa::Neon.available(), "this machine lacks NEON");
    assert!(!q.is_empty() && q.len() <= CHUNK);
    assert_eq!(keys.len(), q.len() * out.len());
    for (keys, out) in keys.chunks(FOUR * q.len()).zip(out.chunks_mut(FOUR)) {
        // The places of missing keys are taken by the last one, and their results dropped.
        let key = |index: usize| &keys[index.min(out.len() - 1) * q.len()..][..q.len()];
        let mut scores = [0.0f32; FOUR];
        // SAFETY: NEON was checked, and `scores` takes a register.
        unsafe {
            let sums = four(q, [key(0), key(1), key(2), key(3)]);
            vst1q_f32(scores.as_mut_ptr(), vmulq_n_f32(sums, scale));
        }
        out.copy_from_slice(&scores[..out.len()]);
    }
}

/// The dot products with four keys, which are as long as `q`.
#[target_feature(enable = "neon")]
fn four(q: &[f32], keys: [&[f32]; FOUR]) -> float32x4_t {
    // The sixteen lanes of each key.
    let mut lanes = [[vdupq_n_f32(0.0); LANES / FOUR]; FOUR];
    let (steps, rest) = q.as_chunks::<LANES>();
    for (step, x) in steps.iter().enumerate() {
        for (lanes, key) in lanes.iter_mut().zip(keys) {
            add_products(x, &key.as_chunks().0[step], lanes);
        }
    }
    if !rest.is_empty() {
        // What is missing is +0: the padding of the definition.
        let padded = |values: &[f32]| {
            let mut padded = [0.0; LANES];
            padded[..rest.len()].copy_from_slice(&values[steps.len() * LANES..]);
            padded
        };
        let x = padded(q);
        for (lanes, key) in lanes.iter_mut().zip(keys) {
            add_products(&x, &padded(key), lanes);
        }
    }
    let [a, b, c, d] = lanes;
    let mut sum = vdupq_n_f32(0.0);
    for part in 0..LANES / FOUR {
        for (lane, of_keys) in transpose([a[part], b[part], c[part], d[part]]).into_iter().enumerate() {
            sum = if part + lane == 0 { of_keys } else { vaddq_f32(sum, of_keys) };
        }
    }
    sum
}

/// `lanes = fma(x, key, lanes)`.
#[inline]
#[target_feature(enable = "neon")]
fn add_products(x: &[f32; LANES], key: &[f32; LANES], lanes: &mut [float32x4_t; LANES / FOUR]) {
    let fours = x.as_chunks::<FOUR>().0.iter().zip(key.as_chunks::<FOUR>().0);
    for (lane, (x, key)) in lanes.iter_mut().zip(fours) {
        // SAFETY: each is four floats.
        let (x, key) = unsafe { (vld1q_f32(x.as_ptr()), vld1q_f32(key.as_ptr())) };
        *lane = vfmaq_f32(*lane, x, key);
    }
}

/// Register l of the result holds value l of each register.
#[inline]
#[target_feature(enable = "neon")]
fn transpose([a, b, c, d]: [float32x4_t; FOUR]) -> [float32x4_t; FOUR] {
    // a0 c0 a1 c1, a2 c2 a3 c3; the same of b and d.
    let (low, high) = ([vzip1q_f32(a, c), vzip2q_f32(a, c)], [vzip1q_f32(b, d), vzip2q_f32(b, d)]);
    [
        vzip1q_f32(low[0], high[0]),
        vzip2q_f32(low[0], high[0]),
        vzip1q_f32(low[1], high[1]),
        vzip2q_f32(low[1], high[1]),
    ]
}
