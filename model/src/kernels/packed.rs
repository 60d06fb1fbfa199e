//! Packed weights: one layout for decode and prefill.
//!
//! Outputs are cut into tiles of 16 (the last padded with zeros) and the inputs are padded with zeros to a multiple of
//! 16. A tile holds its chunks of 1024 inputs in order; a chunk holds its 16 lanes in order; lane l holds, for
//! ascending k with k mod 16 = l, one entry: the weights of the 16 outputs at input k. An entry of `F32` is 16 floats.
//! An entry of a 16-bit type is eight `u32`, of which the i-th has output i in its low and output i + 8 in its high
//! half, so that widening bfloat16 takes one shift and one mask. All values are little-endian.

use super::DType;
use thiserror::Error;

/// Outputs in a tile.
pub const TILE_OUTPUTS: usize = 16;
/// Lanes of a dot product.
pub const LANES: usize = 16;
/// Inputs in a chunk of a dot product.
pub const CHUNK: usize = 1024;

/// The bytes do not fit the shape.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum PackedError {
    /// The shape needs more bytes than a machine can address.
    #[error("a packed matrix of {outputs} outputs and {inputs} inputs is too large to address")]
    TooLarge {
        /// Rows of the matrix.
        outputs: usize,
        /// Columns of the matrix.
        inputs: usize,
    },
    /// The slice has another length than the shape.
    #[error("a packed matrix takes {expected} bytes for its shape but {found} were given")]
    Length {
        /// What the shape needs.
        expected: usize,
        /// What was given.
        found: usize,
    },
}

/// A matrix of `outputs` rows and `inputs` columns in the packed layout.
#[derive(Clone, Copy, Debug)]
pub struct PackedView<'a> {
    dtype: DType,
    outputs: usize,
    inputs: usize,
    bytes: &'a [u8],
}

impl<'a> PackedView<'a> {
    /// A view of `bytes`, whose length has to be what [`packed_len`] says.
    pub fn new(dtype: DType, outputs: usize, inputs: usize, bytes: &'a [u8]) -> Result<Self, PackedError> {
        let expected = packed_len(dtype, outputs, inputs).ok_or(PackedError::TooLarge { outputs, inputs })?;
        if bytes.len() != expected {
            return Err(PackedError::Length { expected, found: bytes.len() });
        }
        Ok(Self { dtype, outputs, inputs, bytes })
    }

    /// The type of the stored weights.
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Rows of the matrix.
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// Columns of the matrix.
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// The packed bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }

    /// Bytes of the tile that starts at output `16 * tile`.
    pub(super) fn tile(&self, tile: usize) -> &'a [u8] {
        let size = padded_inputs(self.inputs) * entry_bytes(self.dtype);
        &self.bytes[tile * size..][..size]
    }
}

/// Bytes of a packed matrix, or `None` where the number does not fit.
pub fn packed_len(dtype: DType, outputs: usize, inputs: usize) -> Option<usize> {
    let tiles = outputs.div_ceil(TILE_OUTPUTS);
    let padded = inputs.checked_next_multiple_of(LANES)?;
    // The row-major source has to be addressable too.
    outputs.checked_mul(inputs)?.checked_mul(dtype.bytes())?;
    tiles.checked_mul(padded)?.checked_mul(entry_bytes(dtype))
}

/// Packs a row-major little-endian matrix (`outputs` rows of `inputs` values) into `dst`.
///
/// # Panics
/// If a slice has another length than the shape gives.
pub fn pack(dtype: DType, outputs: usize, inputs: usize, src: &[u8], dst: &mut [u8]) {
    check_lengths(dtype, outputs, inputs, src.len(), dst.len());
    dst.fill(0);
    let size = dtype.bytes();
    for_each_weight(dtype, outputs, inputs, |row_major, packed| {
        dst[packed..packed + size].copy_from_slice(&src[row_major..row_major + size]);
    });
}

/// The inverse of [`pack`]: writes the row-major little-endian matrix into `dst`.
///
/// # Panics
/// If a slice has another length than the shape gives.
pub fn unpack(dtype: DType, outputs: usize, inputs: usize, src: &[u8], dst: &mut [u8]) {
    check_lengths(dtype, outputs, inputs, dst.len(), src.len());
    let size = dtype.bytes();
    for_each_weight(dtype, outputs, inputs, |row_major, packed| {
        dst[row_major..row_major + size].copy_from_slice(&src[packed..packed + size]);
    });
}

fn check_lengths(dtype: DType, outputs: usize, inputs: usize, row_major: usize, packed: usize) {
    let expected = packed_len(dtype, outputs, inputs).expect("the matrix is too large to address");
    assert_eq!(packed, expected, "the packed slice does not fit the shape");
    assert_eq!(row_major, outputs * inputs * dtype.bytes(), "the row-major slice does not fit the shape");
}

/// Calls `visit(row-major offset, packed offset)`, in bytes, for every weight.
fn for_each_weight(dtype: DType, outputs: usize, inputs: usize, mut visit: impl FnMut(usize, usize)) {
    let size = dtype.bytes();
    let padded = padded_inputs(inputs);
    let entry = entry_bytes(dtype);
    for tile in 0..outputs.div_ceil(TILE_OUTPUTS) {
        for entry_index in 0..padded {
            let k = input_of_entry(entry_index, padded);
            if k >= inputs {
                continue;
            }
            let base = (tile * padded + entry_index) * entry;
            for within in 0..TILE_OUTPUTS.min(outputs - tile * TILE_OUTPUTS) {
                let output = tile * TILE_OUTPUTS + within;
                visit((output * inputs + k) * size, base + offset_in_entry(dtype, within));
            }
        }
    }
}

/// The input that stands at `entry` of a tile whose inputs are padded to `padded`.
fn input_of_entry(entry: usize, padded: usize) -> usize {
    let chunk = entry / CHUNK;
    let steps = CHUNK.min(padded - chunk * CHUNK) / LANES;
    let within = entry % CHUNK;
    chunk * CHUNK + (within % steps) * LANES + within / steps
}

fn offset_in_entry(dtype: DType, output: usize) -> usize {
    match dtype {
        DType::F32 => output * 4,
        DType::Bf16 | DType::F16 => (output % 8) * 4 + (output / 8) * 2,
    }
}

pub(super) const fn entry_bytes(dtype: DType) -> usize {
    TILE_OUTPUTS * dtype.bytes()
}

pub(super) const fn padded_inputs(inputs: usize) -> usize {
    inputs.next_multiple_of(LANES)
}
