//! Matrices that a file holds in another form than row-major floats: transposed or interleaved ones, and quantised ones
//! whose values are decoded exactly.

use super::tensors::Span;
use crate::kernels::convert::{self, e2m1_value, e4m3_value};
use crate::kernels::quantise::dequantise_row;
use crate::kernels::{DType, Quantised};
use std::borrow::Cow;

/// Weights that share a scale in MXFP4.
pub(super) const MXFP4_GROUP: usize = 32;

/// How the values of a tensor lie in its file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Form {
    /// Row-major, as they are.
    Plain,
    /// The value of row r and column c is the `first + r * row + c * column`th.
    Strided { first: usize, row: usize, column: usize },
    /// Rows of blocks of 32 values, two in a byte, the low half first; a scale of each block, a power of two.
    Mxfp4 { first: usize, row: usize, scales: Span },
    /// Bytes of E4M3; each square of them shares an f32 that multiplies them, the last squares are cut.
    Fp8 { scales: Span, side: usize },
    /// Rows of integers with a scale for each group of them.
    Groups(Quantised),
    /// Numbers, or rows of groups, whose rows are in the order of rotations of neighbours: in each of so many heads, row 2i + j
    /// is row i of half j.
    Reordered { kind: Option<Quantised>, heads: usize },
    /// In no file: the tensor of that number, row-major, is made whenever it is read.
    Made(usize),
}

/// The row-major bytes of a tensor of `dtype`, of `shape`'s rows and columns. `stored` are its bytes and `scales` those of
/// its scales; both were checked against the shape.
pub(super) fn decode<'a>(
    form: &Form,
    dtype: DType,
    shape: &[usize],
    stored: &'a [u8],
    scales: &[u8],
) -> Cow<'a, [u8]> {
    let rows = shape[0];
    let columns = shape.get(1).copied().unwrap_or(1);
    match *form {
        Form::Plain => Cow::Borrowed(stored),
        Form::Strided { first, row, column } => {
            let size = dtype.bytes();
            let mut bytes = Vec::with_capacity(rows * columns * size);
            for r in 0..rows {
                for c in 0..columns {
                    bytes.extend_from_slice(&stored[(first + r * row + c * column) * size..][..size]);
                }
            }
            Cow::Owned(bytes)
        }
        Form::Mxfp4 { first, row, .. } => {
            let blocks = columns / MXFP4_GROUP;
            let values = (0..rows).flat_map(|r| {
                let from = (first + r * row) * blocks;
                (0..columns).map(move |c| {
                    let block = from + c / MXFP4_GROUP;
                    let pair = stored[block * (MXFP4_GROUP / 2) + c % MXFP4_GROUP / 2];
                    let bits = if c % 2 == 0 { pair & 15 } else { pair >> 4 };
                    mxfp4(bits, scales[block])
                })
            });
            Cow::Owned(floats(dtype, values, rows * columns))
        }
        Form::Fp8 { side, .. } => {
            let squares = columns.div_ceil(side);
            let values = (0..rows).flat_map(|r| {
                (0..columns).map(move |c| {
                    let scale = &scales[(r / side * squares + c / side) * 4..][..4];
                    let scale = f32::from_le_bytes([scale[0], scale[1], scale[2], scale[3]]);
                    e4m3_value(stored[r * columns + c]) * scale
                })
            });
            Cow::Owned(floats(dtype, values, rows * columns))
        }
        Form::Groups(kind) => {
            let mut values = vec![0.0; rows * columns];
            let of_rows = values.chunks_exact_mut(columns.max(1));
            for (values, row) in of_rows.zip(stored.chunks_exact(kind.row_bytes(columns).max(1))) {
                dequantise_row(kind, row, values);
            }
            Cow::Owned(floats(dtype, values.into_iter(), rows * columns))
        }
        Form::Reordered { kind, heads } => {
            let stored = ordered(heads, rows, stored);
            let form = kind.map_or(Form::Plain, Form::Groups);
            Cow::Owned(decode(&form, dtype, shape, &stored, scales).into_owned())
        }
        Form::Made(_) => unreachable!("what is made is no file's"),
    }
}

/// Rows of heads in the order of halves.
pub(super) fn ordered(heads: usize, rows: usize, stored: &[u8]) -> Vec<u8> {
    let (of_head, size) = (rows / heads, stored.len() / rows);
    let mut ordered = Vec::with_capacity(stored.len());
    for row in 0..rows {
        let (head, within) = (row / of_head, row % of_head);
        let (half, pair) = (within / (of_head / 2), within % (of_head / 2));
        ordered.extend_from_slice(&stored[(head * of_head + 2 * pair + half) * size..][..size]);
    }
    ordered
}

fn floats(dtype: DType, values: impl Iterator<Item = f32>, count: usize) -> Vec<u8> {
    let values: Vec<f32> = values.collect();
    let mut bytes = vec![0; count * dtype.bytes()];
    convert::narrow(dtype, &values, &mut bytes);
    bytes
}

/// Four bits times 2 to the scale: exact in bfloat16, which has the exponents. The scale of all ones is no number.
fn mxfp4(bits: u8, scale: u8) -> f32 {
    let value = e2m1_value(bits);
    if scale == u8::MAX {
        return f32::NAN;
    }
    // 2^-127 is subnormal: two factors, each a normal number, multiply exactly.
    let exponent = i32::from(scale) - 127;
    let power = |exponent: i32| f32::from_bits(((exponent + 127) as u32) << 23);
    value * power(exponent / 2) * power(exponent - exponent / 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn four_bits_are_their_table_times_a_power_of_two() {
        assert_eq!(mxfp4(0b0111, 127).to_bits(), 6.0f32.to_bits());
        assert_eq!(mxfp4(0b1001, 128).to_bits(), (-1.0f32).to_bits());
        assert_eq!(mxfp4(0b0001, 0).to_bits(), (2f64.powi(-128) as f32).to_bits());
        assert_eq!(mxfp4(0b0010, 254).to_bits(), (2f64.powi(127) as f32).to_bits());
        assert!(mxfp4(1, 255).is_nan());
        // Every value but the largest scales' overflow survives bfloat16.
        for scale in 0..=252 {
            for bits in 0..16 {
                let value = mxfp4(bits, scale);
                assert_eq!(value.to_bits() & 0xffff, 0, "{bits} at {scale}");
            }
        }
    }

    #[test]
    fn a_byte_is_its_float() {
        for (bits, value) in [
            (0x00, 0.0),
            (0x01, 1.0 / 512.0),
            (0x08, 1.0 / 64.0),
            (0x38, 1.0),
            (0x3c, 1.5),
            (0x7e, 448.0),
            (0xb8, -1.0),
        ] {
            assert_eq!(e4m3_value(bits).to_bits(), f32::to_bits(value), "{bits:02x}");
        }
        assert!(e4m3_value(0x7f).is_nan() && e4m3_value(0xff).is_nan());
    }

    #[test]
    fn strides_pick_rows_and_columns() {
        let stored: Vec<u8> = (0..12u16).flat_map(|i| i.to_le_bytes()).collect();
        let form = Form::Strided { first: 1, row: 2, column: 4 };
        let picked = decode(&form, DType::Bf16, &[2, 3], &stored, &[]);
        let numbers: Vec<u16> = picked.chunks_exact(2).map(|b| u16::from_le_bytes([b[0], b[1]])).collect();
        assert_eq!(numbers, [1, 5, 9, 3, 7, 11]);
    }
}
