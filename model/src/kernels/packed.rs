//! Packed weights: one layout for decode and prefill.
//!
//! Outputs are cut into tiles of 16 (the last padded with zeros) and the inputs are padded with zeros to a multiple of
//! 16. A tile holds its chunks of 1024 inputs in order; a chunk holds its 16 lanes in order; lane l holds, for
//! ascending k with k mod 16 = l, one entry: the weights of the 16 outputs at input k. An entry of `F32` is 16 floats.
//! An entry of a 16-bit type is eight `u32`, of which the i-th has output i in its low and output i + 8 in its high
//! half, so that widening bfloat16 takes one shift and one mask. All values are little-endian.
//!
//! Quantised weights stay as they are: an entry of MXFP4 is eight bytes, of which the i-th has output i in its low and
//! output i + 8 in its high half; an entry of E4M3 is sixteen bytes. Before the entries of a chunk stand its factors: of
//! MXFP4 for each 32 inputs and each output half of the power of two, in bfloat16; of E4M3 for each 128 inputs one
//! `f32`, the published factor times 256. The kernels multiply each weight with its factor, which rounds once: that is
//! the weight that a decoder gives.
//!
//! Integers with a scale for each 32 inputs are another thing: their inputs are padded to a multiple of 32 and their groups
//! stand in order, two together, without chunks and lanes. First the scales of both groups, 16 of binary16 each; then the
//! integers of one and of the other, unsigned: 8 bits as value + 128, in eight vectors of 64 bytes, of which vector v has at
//! byte 4o + i output o at input 4v + i; 4 bits as value + 8, in four such vectors, whose high halves are 16 inputs further
//! on. A group that has no partner stands alone.

use super::DType;
use super::quantise::{GROUP, Quantised};
use thiserror::Error;

/// Outputs in a tile.
pub const TILE_OUTPUTS: usize = 16;
/// Lanes of a dot product.
pub const LANES: usize = 16;
/// Inputs in a chunk of a dot product.
pub const CHUNK: usize = 1024;
/// Bytes of four inputs, or of eight, of all outputs of a tile.
pub(super) const GROUP_VECTOR_BYTES: usize = 64;
/// Inputs of MXFP4 that share a factor.
pub const MXFP4_BLOCK: usize = 32;
/// Inputs of E4M3, and as many outputs, that share a factor.
pub const E4M3_BLOCK: usize = 128;

/// How the weights of a packed matrix are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Storage {
    /// As numbers of a type.
    Plain(DType),
    /// Four bits each (E2M1), 32 inputs of an output with a power of two.
    Mxfp4,
    /// A byte each (E4M3), 128 inputs of 128 outputs with a factor.
    E4m3,
    /// Integers, 32 inputs of an output with a scale; their products quantise the other side too.
    Grouped(Quantised),
}

impl From<Quantised> for Storage {
    fn from(kind: Quantised) -> Self {
        Self::Grouped(kind)
    }
}

impl From<DType> for Storage {
    fn from(dtype: DType) -> Self {
        Self::Plain(dtype)
    }
}

impl Storage {
    /// The type that holds its weights, decoded, exactly.
    pub const fn dtype(self) -> DType {
        match self {
            Self::Plain(dtype) => dtype,
            Self::Mxfp4 => DType::Bf16,
            Self::E4m3 | Self::Grouped(_) => DType::F32,
        }
    }

    /// Bytes of the weights of 16 outputs at one input.
    pub(super) const fn entry_bytes(self) -> usize {
        match self {
            Self::Plain(dtype) => TILE_OUTPUTS * dtype.bytes(),
            Self::Mxfp4 => TILE_OUTPUTS / 2,
            Self::E4m3 | Self::Grouped(Quantised::Q8) => TILE_OUTPUTS,
            Self::Grouped(Quantised::Q4) => TILE_OUTPUTS / 2,
        }
    }

    /// The integers that it has with scales of groups, if it has.
    pub(crate) const fn grouped(self) -> Option<Quantised> {
        match self {
            Self::Grouped(kind) => Some(kind),
            Self::Plain(_) | Self::Mxfp4 | Self::E4m3 => None,
        }
    }

    /// Inputs that share factors; `None` where there are none.
    pub(super) const fn block(self) -> Option<usize> {
        match self {
            Self::Plain(_) => None,
            Self::Mxfp4 => Some(MXFP4_BLOCK),
            Self::E4m3 => Some(E4M3_BLOCK),
            Self::Grouped(_) => Some(GROUP),
        }
    }

    /// Bytes of the factors before that many entries of a chunk.
    pub(super) const fn factor_bytes(self, entries: usize) -> usize {
        match self {
            Self::Plain(_) => 0,
            Self::Mxfp4 => entries.div_ceil(MXFP4_BLOCK) * TILE_OUTPUTS * 2,
            Self::E4m3 => entries.div_ceil(E4M3_BLOCK) * 4,
            Self::Grouped(_) => entries.div_ceil(GROUP) * TILE_OUTPUTS * 2,
        }
    }

    /// Bytes of a chunk of that many entries.
    pub(super) const fn chunk_bytes(self, entries: usize) -> usize {
        self.factor_bytes(entries) + entries * self.entry_bytes()
    }

    /// Inputs, padded to what the layout wants a multiple of.
    const fn padded(self, inputs: usize) -> Option<usize> {
        inputs.checked_next_multiple_of(if self.grouped().is_some() { GROUP } else { LANES })
    }

    /// Bytes of a tile, if they can be counted.
    fn tile_bytes(self, padded: usize) -> Option<usize> {
        let whole = (padded / CHUNK).checked_mul(self.chunk_bytes(CHUNK))?;
        whole.checked_add(self.chunk_bytes(padded % CHUNK))
    }
}

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
    storage: Storage,
    outputs: usize,
    inputs: usize,
    bytes: &'a [u8],
}

impl<'a> PackedView<'a> {
    /// A view of `bytes`, whose length has to be what [`packed_len`] says.
    pub fn new(
        storage: impl Into<Storage>,
        outputs: usize,
        inputs: usize,
        bytes: &'a [u8],
    ) -> Result<Self, PackedError> {
        let storage = storage.into();
        let expected =
            packed_len(storage, outputs, inputs).ok_or(PackedError::TooLarge { outputs, inputs })?;
        if bytes.len() != expected {
            return Err(PackedError::Length { expected, found: bytes.len() });
        }
        Ok(Self { storage, outputs, inputs, bytes })
    }

    /// How the weights are stored.
    pub fn storage(&self) -> Storage {
        self.storage
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
        let padded = self.storage.padded(self.inputs).expect("the matrix is there");
        let size = self.storage.tile_bytes(padded).expect("the matrix is there");
        &self.bytes[tile * size..][..size]
    }
}

/// Bytes of a packed matrix, or `None` where the number does not fit.
pub fn packed_len(storage: impl Into<Storage>, outputs: usize, inputs: usize) -> Option<usize> {
    let storage = storage.into();
    let tiles = outputs.div_ceil(TILE_OUTPUTS);
    let padded = storage.padded(inputs)?;
    // The row-major source has to be addressable too, whatever it is decoded to.
    outputs.checked_mul(inputs)?.checked_mul(4)?;
    padded.checked_mul(storage.entry_bytes())?;
    tiles.checked_mul(storage.tile_bytes(padded)?)
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

/// Packs MXFP4: the code of an output at an input, and the published exponent of an output in a block of inputs.
///
/// # Panics
/// If the slice has another length than the shape gives.
pub fn pack_mxfp4(
    outputs: usize,
    inputs: usize,
    code: impl Fn(usize, usize) -> u8,
    exponent: impl Fn(usize, usize) -> u8,
    dst: &mut [u8],
) {
    pack_codes(Storage::Mxfp4, outputs, inputs, dst, |place, chunk| {
        let Place { output, input, entry, within, factor } = place;
        chunk[entry + within % 8] |= (code(output, input) & 15) << (within / 8 * 4);
        let half = half_power(exponent(output, input / MXFP4_BLOCK));
        chunk[factor + within * 2..][..2].copy_from_slice(&half.to_le_bytes());
    });
}

/// Packs E4M3: the code of an output at an input, and the published factor of a block of outputs and inputs. A code that
/// is no number makes its whole block none.
///
/// # Panics
/// If the slice has another length than the shape gives.
pub fn pack_e4m3(
    outputs: usize,
    inputs: usize,
    code: impl Fn(usize, usize) -> u8,
    factor_of: impl Fn(usize, usize) -> f32,
    dst: &mut [u8],
) {
    pack_codes(Storage::E4m3, outputs, inputs, dst, |place, chunk| {
        let Place { output, input, entry, within, factor } = place;
        let code = code(output, input);
        chunk[entry + within] = code;
        let four = &mut chunk[factor..][..4];
        let known = f32::from_le_bytes([four[0], four[1], four[2], four[3]]);
        let value = if code & 0x7f == 0x7f || known.is_nan() {
            f32::NAN
        } else {
            factor_of(output / E4M3_BLOCK, input / E4M3_BLOCK) * 256.0
        };
        four.copy_from_slice(&value.to_le_bytes());
    });
}

/// Packs rows of groups, as [`quantise_row`](super::quantise::quantise_row) makes them.
///
/// # Panics
/// If a slice has another length than the shape gives.
pub fn pack_groups(kind: Quantised, outputs: usize, inputs: usize, rows: &[u8], dst: &mut [u8]) {
    let expected = packed_len(kind, outputs, inputs).expect("the matrix is too large to address");
    assert_eq!(dst.len(), expected, "the packed slice does not fit the shape");
    assert_eq!(rows.len(), outputs * kind.row_bytes(inputs), "the rows do not fit the shape");
    let groups = inputs.div_ceil(GROUP);
    if groups == 0 {
        return;
    }
    let flipped = if kind == Quantised::Q8 { 0x8080_8080 } else { 0 };
    let tile_bytes = Storage::Grouped(kind).tile_bytes(groups * GROUP).expect("the matrix can be addressed");
    let rows_of_tile = TILE_OUTPUTS * kind.row_bytes(inputs);
    for (dst, rows) in dst.chunks_exact_mut(tile_bytes).zip(rows.chunks(rows_of_tile)) {
        dst.fill(0);
        for (output, row) in rows.chunks_exact(kind.row_bytes(inputs)).enumerate() {
            for (group, block) in row.chunks_exact(kind.group_bytes()).enumerate() {
                let (scales, codes) = place_of_group(kind, group, groups);
                dst[scales + 2 * output..][..2].copy_from_slice(&block[..2]);
                for (vector, four) in block[2..].as_chunks::<4>().0.iter().enumerate() {
                    let word = u32::from_le_bytes(*four) ^ flipped;
                    let at = codes + vector * GROUP_VECTOR_BYTES + 4 * output;
                    dst[at..at + 4].copy_from_slice(&word.to_le_bytes());
                }
            }
        }
    }
}

/// Where in a tile the scales and the integers of a group stand.
#[inline(always)]
pub(super) const fn place_of_group(kind: Quantised, group: usize, groups: usize) -> (usize, usize) {
    let (scales, codes) = (2 * TILE_OUTPUTS, TILE_OUTPUTS * kind.code_bytes());
    let (pair, within) = (group / 2, group % 2);
    let start = pair * 2 * (scales + codes);
    let together = if pair * 2 + 1 < groups { 2 } else { 1 };
    (start + within * scales, start + together * scales + within * codes)
}

/// Where a weight and its factor go in their chunk.
struct Place {
    output: usize,
    input: usize,
    /// Of its entry.
    entry: usize,
    /// Its output in the tile.
    within: usize,
    /// Of the factors of its block.
    factor: usize,
}

fn pack_codes(
    storage: Storage,
    outputs: usize,
    inputs: usize,
    dst: &mut [u8],
    mut put: impl FnMut(Place, &mut [u8]),
) {
    let expected = packed_len(storage, outputs, inputs).expect("the matrix is too large to address");
    assert_eq!(dst.len(), expected, "the packed slice does not fit the shape");
    dst.fill(0);
    let padded = padded_inputs(inputs);
    let tile_bytes = storage.tile_bytes(padded).expect("the matrix can be addressed");
    let block = storage.block().expect("quantised weights have factors");
    for (tile, dst) in dst.chunks_mut(tile_bytes.max(1)).enumerate() {
        for (chunk, dst) in dst.chunks_mut(storage.chunk_bytes(CHUNK)).enumerate() {
            let entries = CHUNK.min(padded - chunk * CHUNK);
            let first = storage.factor_bytes(entries);
            let of_block = storage.factor_bytes(block);
            for at in 0..entries {
                let input = input_of_entry(chunk * CHUNK + at, padded);
                for within in 0..TILE_OUTPUTS.min(outputs - tile * TILE_OUTPUTS) {
                    if input < inputs {
                        let output = tile * TILE_OUTPUTS + within;
                        let entry = first + at * storage.entry_bytes();
                        let factor = (input - chunk * CHUNK) / block * of_block;
                        put(Place { output, input, entry, within, factor }, dst);
                    }
                }
            }
        }
    }
}

/// Half of the power of two that an exponent of MXFP4 stands for, as bfloat16: the codes are kept as twice their value.
const fn half_power(exponent: u8) -> u16 {
    match exponent {
        0 => 0x0020,
        1 => 0x0040,
        u8::MAX => 0x7fc0,
        exponent => (exponent as u16 - 1) << 7,
    }
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
    let entry = Storage::Plain(dtype).entry_bytes();
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

pub(super) const fn padded_inputs(inputs: usize) -> usize {
    inputs.next_multiple_of(LANES)
}
