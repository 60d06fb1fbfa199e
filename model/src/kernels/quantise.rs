//! Weights and activations as integers with a scale for each group of 32 along K: what rule 8 of the contract defines.
//!
//! A row of a quantised matrix is its groups one after another, the last padded with zeros: a scale in binary16, then the
//! integers. Of 8 bits: 32 bytes, each -127 to 127. Of 4 bits: 16 bytes, of which the j-th has value j in its low and value
//! j + 16 in its high half, each as value + 8. These are the blocks Q8_0 and Q4_0 of GGUF.

use super::convert::{f16_bits, f16_value};
use super::versioned;
use thiserror::Error;

/// Values that share a scale.
pub const GROUP: usize = 32;
/// Words of 32 bits that a group of a row of activations takes: a sum, a scale, and four integers in each of eight.
pub(super) const GROUP_WORDS: usize = 2 + GROUP / 4;
/// Added to a float of small magnitude it leaves the nearest integer, ties to even, in the lowest bits.
const TO_INTEGER: f32 = 12_582_912.0;

/// The integers of a quantised matrix.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Quantised {
    /// -127 to 127; 8.5 bits a weight with the scale.
    Q8,
    /// -8 to 7; 4.5 bits a weight with the scale.
    Q4,
}

/// A weight that cannot be quantised.
#[derive(Clone, Copy, Debug, PartialEq, Error)]
pub enum QuantiseError {
    /// It is NaN or infinite.
    #[error("column {column} is {value}, which no scale can stand for")]
    NotFinite {
        /// Where in the row.
        column: usize,
        /// The value.
        value: f32,
    },
    /// The scale of its group is beyond binary16.
    #[error("column {column} is {value}: the scale of its group is beyond what binary16 holds")]
    TooLarge {
        /// Where in the row.
        column: usize,
        /// The value.
        value: f32,
    },
}

impl Quantised {
    /// Its name, as files and flags have it.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q8 => "q8",
            Self::Q4 => "q4",
        }
    }

    /// Bytes of the integers of a group.
    pub(super) const fn code_bytes(self) -> usize {
        match self {
            Self::Q8 => GROUP,
            Self::Q4 => GROUP / 2,
        }
    }

    /// Bytes of a group: its scale, its integers.
    pub const fn group_bytes(self) -> usize {
        2 + self.code_bytes()
    }

    /// Bytes of a row of so many values.
    pub const fn row_bytes(self, columns: usize) -> usize {
        columns.div_ceil(GROUP) * self.group_bytes()
    }

    /// What is added to an integer where it is kept unsigned.
    pub(super) const fn bias(self) -> i32 {
        match self {
            Self::Q8 => 128,
            Self::Q4 => 8,
        }
    }
}

/// Quantises a row. `row` is as long as [`Quantised::row_bytes`] says.
///
/// The scale of 8 bits is the largest magnitude / 127, that of 4 bits the value of largest magnitude (the first of
/// several) / -8; rounded to f32, then to binary16. An integer is value / scale as it is kept, rounded to nearest even
/// and clamped; 0 where the scale is 0.
///
/// # Errors
/// If a value is not finite, or a scale is beyond binary16.
///
/// # Panics
/// If the lengths do not fit each other.
pub fn quantise_row(kind: Quantised, values: &[f32], row: &mut [u8]) -> Result<(), QuantiseError> {
    assert_eq!(row.len(), kind.row_bytes(values.len()), "the row does not fit its values");
    for (index, (values, block)) in
        values.chunks(GROUP).zip(row.chunks_exact_mut(kind.group_bytes())).enumerate()
    {
        let column = |at: usize| index * GROUP + at;
        let mut group = [0.0; GROUP];
        group[..values.len()].copy_from_slice(values);
        let magnitude = largest_magnitude(&group);
        if !magnitude.is_finite() {
            let at = group.iter().position(|value| !value.is_finite()).expect("one is not finite");
            return Err(QuantiseError::NotFinite { column: column(at), value: group[at] });
        }
        let at = group.iter().position(|value| value.abs() == magnitude).expect("it is the magnitude of one");
        let scale = match kind {
            Quantised::Q8 => magnitude / 127.0,
            Quantised::Q4 => group[at] / -8.0,
        };
        let stored = f16_bits(scale);
        let scale = f16_value(stored);
        if !scale.is_finite() {
            return Err(QuantiseError::TooLarge { column: column(at), value: group[at] });
        }
        // No integer tells the sign of a zero: it is kept as +0.
        block[..2].copy_from_slice(&(if scale == 0.0 { 0 } else { stored }).to_le_bytes());
        let codes = &mut block[2..];
        match kind {
            Quantised::Q8 => {
                let integers = integers(&group, scale, -127, 127);
                codes.iter_mut().zip(integers).for_each(|(code, integer)| *code = integer as u8);
            }
            Quantised::Q4 => {
                let integers = integers(&group, scale, -8, 7).map(|integer| integer.wrapping_add(8) as u8);
                let (low, high) = integers.split_at(GROUP / 2);
                for (code, (low, high)) in codes.iter_mut().zip(low.iter().zip(high)) {
                    *code = low | high << 4;
                }
            }
        }
    }
    Ok(())
}

/// The values of a row: integer times scale, exact.
///
/// # Panics
/// If the lengths do not fit each other.
pub fn dequantise_row(kind: Quantised, row: &[u8], values: &mut [f32]) {
    assert_eq!(row.len(), kind.row_bytes(values.len()), "the row does not fit its values");
    for (values, block) in values.chunks_mut(GROUP).zip(row.chunks_exact(kind.group_bytes())) {
        let scale = f16_value(u16::from_le_bytes([block[0], block[1]]));
        let codes = &block[2..];
        for (at, value) in values.iter_mut().enumerate() {
            let integer = match kind {
                Quantised::Q8 => codes[at] as i8,
                Quantised::Q4 => (codes[at % (GROUP / 2)] >> (at / (GROUP / 2) * 4) & 15) as i8 - 8,
            };
            *value = f32::from(integer) * scale;
        }
    }
}

versioned! {
    /// Quantises the groups of a row of activations, each by itself, and puts them among those of the other rows of a block:
    /// for each group `rows` sums, then `rows` scales, then four integers of each row, eight times. This is row `at`.
    ///
    /// A sum is that of the integers times the negative bias. A group with a value that is not finite has NaN as its scale.
    pub(super) fn quantise_activations(
        bias: i32, values: &[f32], at: usize, rows: usize, block: &mut [u32],
    ) = activations_body
}

#[inline(always)]
fn activations_body(bias: i32, values: &[f32], at: usize, rows: usize, block: &mut [u32]) {
    let (whole, rest) = values.as_chunks::<GROUP>();
    let mut blocks = block.chunks_exact_mut(rows * GROUP_WORDS);
    for (group, block) in whole.iter().zip(&mut blocks) {
        put_group(bias, group, at, rows, block);
    }
    if let (Some(block), false) = (blocks.next(), rest.is_empty()) {
        let mut group = [0.0; GROUP];
        group[..rest.len()].copy_from_slice(rest);
        put_group(bias, &group, at, rows, block);
    }
}

#[inline(always)]
fn put_group(bias: i32, group: &[f32; GROUP], at: usize, rows: usize, block: &mut [u32]) {
    let (scale, integers) = activations_of_group(group);
    let mut sum = 0i32;
    let mut bytes = [0u8; GROUP];
    for (byte, integer) in bytes.iter_mut().zip(&integers) {
        sum = sum.wrapping_add(*integer);
        *byte = *integer as u8;
    }
    block[at] = (-bias * sum) as u32;
    block[rows + at] = scale.to_bits();
    for (four, word) in bytes.as_chunks::<4>().0.iter().zip(block[2 * rows..].chunks_exact_mut(rows)) {
        word[at] = u32::from_le_bytes(*four);
    }
}

/// The scale of a group and its integers.
#[inline(always)]
pub(super) fn activations_of_group(values: &[f32; GROUP]) -> (f32, [i32; GROUP]) {
    let magnitude = largest_magnitude(values);
    if !magnitude.is_finite() {
        return (f32::NAN, [0; GROUP]);
    }
    let scale = magnitude / 127.0;
    (scale, integers(values, scale, -127, 127))
}

/// The largest magnitude of a group; NaN if one is.
#[inline(always)]
fn largest_magnitude(values: &[f32; GROUP]) -> f32 {
    // As integers, magnitudes have the order of the floats, and NaN is above all.
    let mut largest = 0;
    for value in values {
        largest = largest.max(value.to_bits() as i32 & i32::MAX);
    }
    f32::from_bits(largest as u32)
}

/// The nearest integers, ties to even, to the values in steps of the scale; 0 where that is 0.
#[inline(always)]
fn integers(values: &[f32; GROUP], scale: f32, low: i32, high: i32) -> [i32; GROUP] {
    let mut integers = [0; GROUP];
    if scale != 0.0 {
        for (integer, value) in integers.iter_mut().zip(values) {
            // A scale that is subnormal may be rounded down by a third: no quotient is beyond 191, far below what the sum takes.
            // Wrapping, as no check of an overflow that cannot be lets it be done by vectors.
            let rounded =
                ((value / scale + TO_INTEGER).to_bits() as i32).wrapping_sub(TO_INTEGER.to_bits() as i32);
            *integer = rounded.clamp(low, high);
        }
    }
    integers
}
