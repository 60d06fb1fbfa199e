//! The gates of an expert, and the combination of experts.

use super::math::{sigmoid, silu};
use super::versioned;

versioned! {
    /// `out = silu(gate) * up`, value by value.
    pub fn swiglu(gate: &[f32], up: &[f32], out: &mut [f32]) = swiglu_body
}

versioned! {
    /// `out = (up + 1) * (gate * sigmoid(alpha * gate))`, value by value, with the gate at most `limit` and up within
    /// `-limit..limit`.
    pub fn clamped_swiglu(gate: &[f32], up: &[f32], alpha: f32, limit: f32, out: &mut [f32]) = clamped_body
}

versioned! {
    /// `acc = fma(weight, y, acc)`, value by value.
    pub fn axpy(weight: f32, y: &[f32], acc: &mut [f32]) = axpy_body
}

#[inline(always)]
fn swiglu_body(gate: &[f32], up: &[f32], out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len(), "gate, up and out differ in length");
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        *out = silu(*gate) * up;
    }
}

#[inline(always)]
fn clamped_body(gate: &[f32], up: &[f32], alpha: f32, limit: f32, out: &mut [f32]) {
    assert!(gate.len() == up.len() && gate.len() == out.len(), "gate, up and out differ in length");
    for ((out, gate), up) in out.iter_mut().zip(gate).zip(up) {
        let gate = if *gate > limit { limit } else { *gate };
        let up = if *up > limit { limit } else { *up };
        let up = if up < -limit { -limit } else { up };
        *out = (up + 1.0) * (gate * sigmoid(alpha * gate));
    }
}

#[inline(always)]
fn axpy_body(weight: f32, y: &[f32], acc: &mut [f32]) {
    assert_eq!(y.len(), acc.len(), "y and acc differ in length");
    for (acc, y) in acc.iter_mut().zip(y) {
        *acc = weight.mul_add(*y, *acc);
    }
}
