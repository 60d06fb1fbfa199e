//! Products with integers of 8 and 4 bits: both sides are quantised in groups of 32, the sums within a group are integers
//! and so exact in any order, and groups are added in ascending order by one chain of fused steps for each output.

use super::super::buffer::Parts;
use super::super::convert::f16_value;
use super::super::packed::{GROUP_VECTOR_BYTES, place_of_group};
use super::super::quantise::{GROUP, GROUP_WORDS, Quantised, quantise_activations};
use super::{BLOCK_ROWS, Isa, Product, TILE_OUTPUTS, TILES_OF_ROWS, add_bias, blocks};
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;

/// What a row of a block makes with the tiles that are gone through together, tile by tile.
type Sums = [f32; TILES_OF_ROWS * TILE_OUTPUTS];

/// A block of rows as integers, group by group: their sums, scales and integers, as `quantise_activations` puts them.
#[derive(Clone, Copy)]
struct Rows<'a> {
    words: &'a [u32],
    rows: usize,
    groups: usize,
}

/// Words of a quantised row.
pub(super) const fn row_words(inputs: usize) -> usize {
    inputs.div_ceil(GROUP) * GROUP_WORDS
}

/// Quantises a block of rows.
pub(super) fn quantise_block(
    isa: Isa,
    kind: Quantised,
    product: &Product<'_>,
    block: usize,
    inputs: &Parts<'_, f32>,
) {
    let rows = blocks(product.rows).nth(block).expect("a block of this product");
    let words = row_words(product.w.inputs());
    let start = product.plan.at + rows.start * words;
    // SAFETY: blocks have places of their own, and one task has the block.
    let target = unsafe { inputs.part(start..start + rows.len() * words) };
    let target = bytemuck::cast_slice_mut(target);
    for (at, row) in rows.clone().enumerate() {
        quantise_activations(isa, kind.bias(), product.row(row), at, rows.len(), target);
    }
}

/// Some tiles of outputs for all rows.
pub(super) fn part(isa: Isa, kind: Quantised, x: &[f32], product: &Product<'_>, tiles: Range<usize>) {
    let Product { w, bias, .. } = *product;
    let (x, words) = (bytemuck::cast_slice::<f32, u32>(x), row_words(w.inputs()));
    let groups = w.inputs().div_ceil(GROUP);
    let mut sums = [[0.0; TILES_OF_ROWS * TILE_OUTPUTS]; BLOCK_ROWS];
    let mut tile = tiles.start;
    while tile < tiles.end {
        let together = product.tiles_together(isa).min(tiles.end - tile);
        let mut weights: [&[u8]; TILES_OF_ROWS] = [&[]; TILES_OF_ROWS];
        for (at, weights) in weights[..together].iter_mut().enumerate() {
            *weights = w.tile(tile + at);
        }
        let first = tile * TILE_OUTPUTS;
        let width = (together * TILE_OUTPUTS).min(w.outputs() - first);
        for block in blocks(product.rows) {
            let sums = &mut sums[..block.len()];
            sums.fill([0.0; TILES_OF_ROWS * TILE_OUTPUTS]);
            let rows = Rows { words: &x[block.start * words..block.end * words], rows: block.len(), groups };
            block_sums(isa, kind, rows, &weights[..together], sums);
            for (row, sums) in block.zip(&*sums) {
                let at = row * w.outputs() + first;
                // SAFETY: every tile has places of its own in a row, and one task has the tile.
                let out = unsafe { product.out.part(at..at + width) };
                out.copy_from_slice(&sums[..width]);
                add_bias(bias, first, out);
            }
        }
        tile += together;
    }
}

/// A block of rows with some tiles.
fn block_sums(isa: Isa, kind: Quantised, x: Rows<'_>, w: &[&[u8]], sums: &mut [Sums]) {
    // The pointer arithmetic of the vector forms relies on these equations.
    assert_eq!(sums.len(), x.rows);
    assert_eq!(x.words.len(), x.rows * x.groups * GROUP_WORDS);
    let tile_bytes = x.groups * TILE_OUTPUTS * kind.group_bytes();
    assert!(w.len() <= TILES_OF_ROWS && w.iter().all(|w| w.len() == tile_bytes));
    match isa {
        Isa::Scalar => block_sums_scalar(kind, x, w, sums),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::block_sums(kind, x, w, sums),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx512 => avx512::block_sums(kind, x, w, sums),
        #[cfg(target_arch = "aarch64")]
        Isa::Neon => neon::block_sums(kind, x, w, sums),
        missing => missing.is_missing(),
    }
}

fn block_sums_scalar(kind: Quantised, x: Rows<'_>, w: &[&[u8]], sums: &mut [Sums]) {
    let Rows { words, rows, groups } = x;
    for (group, x) in words.chunks_exact(rows * GROUP_WORDS).enumerate() {
        let (scales, codes) = place_of_group(kind, group, groups);
        for (row, sums) in sums.iter_mut().enumerate() {
            let scale = f32::from_bits(x[rows + row]);
            let input = |k: usize| (x[2 * rows + k / 4 * rows + row] >> (k % 4 * 8)) as i8;
            let of_tiles = w.iter().zip(sums.as_chunks_mut::<TILE_OUTPUTS>().0);
            for (w, sums) in of_tiles {
                for (output, sum) in sums.iter_mut().enumerate() {
                    let dot: i32 =
                        (0..GROUP).map(|k| integer(kind, &w[codes..], output, k) * i32::from(input(k))).sum();
                    let at = scales + 2 * output;
                    let factor = f16_value(u16::from_le_bytes([w[at], w[at + 1]])) * scale;
                    *sum = factor.mul_add(dot as f32, *sum);
                }
            }
        }
    }
}

/// Asks ahead for as much as the two groups have that the first of them begins.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fetch_groups_ahead(tile: &[u8], group: usize, kind: Quantised, scales: usize) {
    if group.is_multiple_of(2) {
        super::fetch_ahead(tile[scales..].as_ptr(), 2 * TILE_OUTPUTS * kind.group_bytes());
    }
}

/// A weight of a group, by its output in the tile and its input in the group.
fn integer(kind: Quantised, codes: &[u8], output: usize, k: usize) -> i32 {
    let at = |k: usize| codes[k / 4 * GROUP_VECTOR_BYTES + 4 * output + k % 4];
    let code = match kind {
        Quantised::Q8 => at(k),
        Quantised::Q4 => at(k % (GROUP / 2)) >> (k / (GROUP / 2) * 4) & 15,
    };
    i32::from(code) - kind.bias()
}
