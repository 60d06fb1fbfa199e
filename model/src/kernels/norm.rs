//! Normalisation of one row. Sums are dot products with the row itself or with ones.

use super::linear::dot_body;
use super::versioned;

versioned! {
    /// Root-mean-square normalisation: `out = (x * (1 / sqrt(dot(x, x) / n + eps))) * weight`.
    pub fn rms_norm(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) = rms_norm_body
}

versioned! {
    /// [`rms_norm`] of a row in its own place.
    pub fn rms_norm_in_place(row: &mut [f32], weight: &[f32], eps: f32) = rms_norm_in_place_body
}

versioned! {
    /// Layer normalisation: with `d = x - dot(x, 1) / n`, `out = (d * (1 / sqrt(dot(d, d) / n + eps))) * weight`, and
    /// `+ bias` where there is one.
    pub fn layer_norm(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) = layer_norm_body
}

#[inline(always)]
fn rms_norm_body(x: &[f32], weight: &[f32], eps: f32, out: &mut [f32]) {
    assert_eq!(x.len(), out.len(), "the result does not fit the row");
    out.copy_from_slice(x);
    rms_norm_in_place_body(out, weight, eps);
}

#[inline(always)]
fn rms_norm_in_place_body(row: &mut [f32], weight: &[f32], eps: f32) {
    assert_eq!(row.len(), weight.len(), "the row does not fit the weight");
    let scale = 1.0 / (dot_body(row, row) / row.len() as f32 + eps).sqrt();
    for (value, weight) in row.iter_mut().zip(weight) {
        *value = (*value * scale) * weight;
    }
}

#[inline(always)]
fn layer_norm_body(x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32, out: &mut [f32]) {
    assert!(x.len() == weight.len() && x.len() == out.len(), "the row does not fit the weight");
    assert!(bias.is_none_or(|bias| bias.len() == x.len()), "the row does not fit the bias");
    out.fill(1.0);
    let mean = dot_body(x, out) / x.len() as f32;
    for (out, x) in out.iter_mut().zip(x) {
        *out = x - mean;
    }
    let scale = 1.0 / (dot_body(out, out) / x.len() as f32 + eps).sqrt();
    for (out, weight) in out.iter_mut().zip(weight) {
        *out = (*out * scale) * weight;
    }
    if let Some(bias) = bias {
        for (out, bias) in out.iter_mut().zip(bias) {
            *out += bias;
        }
    }
}
