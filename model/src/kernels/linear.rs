//! Dot products and matrix products by one order of operations.
//!
//! The inputs are padded with pairs of +0 to a multiple of 16 and cut into chunks of 1024 at absolute offsets. In a
//! chunk, lane l starts at +0 and takes `fma(x[k], w[k], acc)` for the k with k mod 16 = l, ascending. The lanes are
//! added left to right, starting from the first; so are the chunks; a bias is added last. Only outputs are divided
//! among threads.

use super::convert::{bf16_value, f16_value};
use super::packed::{CHUNK, LANES, PackedView, TILE_OUTPUTS, entry_bytes, padded_inputs};
use super::pool::Pool;
use super::{DType, Isa};
use std::ops::Range;
use std::sync::{Arc, Mutex};

#[cfg(target_arch = "x86_64")]
mod avx2;

/// Rows that one pass over a tile of weights serves.
const BLOCK_ROWS: usize = 6;
/// Tiles that a single row goes through together.
const TILES_OF_ONE_ROW: usize = 4;
/// Below this many multiplications a matrix product stays on the calling thread.
const PARALLEL_FROM: usize = 1 << 16;

/// The dot product of two slices of one length; +0 for empty ones. The reference for every other form.
///
/// # Panics
/// If the lengths differ.
pub fn dot(x: &[f32], w: &[f32]) -> f32 {
    dot_body(x, w)
}

#[inline(always)]
pub(super) fn dot_body(x: &[f32], w: &[f32]) -> f32 {
    assert_eq!(x.len(), w.len());
    let mut total = 0.0;
    for (index, (x, w)) in x.chunks(CHUNK).zip(w.chunks(CHUNK)).enumerate() {
        let chunk = dot_chunk(x, w);
        total = if index == 0 { chunk } else { total + chunk };
    }
    total
}

#[inline(always)]
fn dot_chunk(x: &[f32], w: &[f32]) -> f32 {
    let mut lanes = [0.0f32; LANES];
    let (x_steps, x_rest) = x.as_chunks::<LANES>();
    let (w_steps, w_rest) = w.as_chunks::<LANES>();
    for (x, w) in x_steps.iter().zip(w_steps) {
        for lane in 0..LANES {
            lanes[lane] = x[lane].mul_add(w[lane], lanes[lane]);
        }
    }
    if !x_rest.is_empty() {
        // The padding is part of the definition: fma(+0, +0, -0) is +0.
        let mut x = [0.0f32; LANES];
        let mut w = [0.0f32; LANES];
        x[..x_rest.len()].copy_from_slice(x_rest);
        w[..w_rest.len()].copy_from_slice(w_rest);
        for lane in 0..LANES {
            lanes[lane] = x[lane].mul_add(w[lane], lanes[lane]);
        }
    }
    let mut sum = lanes[0];
    for lane in &lanes[1..] {
        sum += lane;
    }
    sum
}

/// A matrix product: `out = x * w^T + bias`.
#[derive(Debug)]
pub struct Product<'a> {
    /// `rows` x inputs, row-major.
    pub x: &'a [f32],
    /// Rows of `x` and `out`.
    pub rows: usize,
    /// The weights.
    pub w: PackedView<'a>,
    /// One value for each output.
    pub bias: Option<&'a [f32]>,
    /// `rows` x outputs, row-major.
    pub out: &'a mut [f32],
}

/// `out = x * w^T + bias`: `x` is `rows` x inputs, `out` is `rows` x outputs, both row-major.
///
/// The bits of a row depend on that row, the weights and the bias alone.
///
/// # Panics
/// If a slice does not fit the shape, or this machine lacks `isa`.
pub fn linear(
    pool: &Pool,
    isa: Isa,
    x: &[f32],
    rows: usize,
    w: &PackedView<'_>,
    bias: Option<&[f32]>,
    out: &mut [f32],
) {
    linear_all(pool, isa, vec![Product { x, rows, w: *w, bias, out }]);
}

/// Several products that do not wait for each other, shared among the threads as one.
///
/// # Panics
/// As [`linear`].
pub fn linear_all(pool: &Pool, isa: Isa, mut products: Vec<Product<'_>>) {
    assert!(isa.available(), "this machine lacks the instruction set");
    products.retain(|product| {
        let Product { x, rows, w, bias, out } = product;
        assert_eq!(x.len(), rows * w.inputs(), "the input does not fit the shape");
        assert_eq!(out.len(), rows * w.outputs(), "the output does not fit the shape");
        assert!(bias.is_none_or(|bias| bias.len() == w.outputs()), "the bias does not fit the shape");
        !out.is_empty()
    });
    let work =
        |p: &Product<'_>| p.rows * p.w.outputs().next_multiple_of(TILE_OUTPUTS) * padded_inputs(p.w.inputs());
    let all: usize = products.iter().map(work).sum();
    let alone = all < PARALLEL_FROM || pool.threads() == 1;
    let mut parts = Vec::new();
    for product in products {
        let tiles = product.w.outputs().div_ceil(TILE_OUTPUTS);
        // As many tasks as its share of the work, so that all are of about equal length.
        let tasks =
            if alone { 1 } else { (pool.threads() * 4 * work(&product)).div_ceil(all).clamp(1, tiles) };
        let Product { x, rows, w, bias, out } = product;
        let x: Arc<[f32]> = repack(x, rows, w.inputs()).into();
        for part in divide(out, w.outputs(), tiles, tasks) {
            parts.push(Mutex::new((Arc::clone(&x), w, bias, part)));
        }
    }
    let run = |task: usize| {
        let mut part = parts[task].lock().expect("a part is locked once");
        let (x, w, bias, part) = &mut *part;
        linear_part(isa, x, w, *bias, part);
    };
    if alone { (0..parts.len()).for_each(run) } else { pool.run(parts.len(), &run) }
}

fn linear_part(isa: Isa, x: &[f32], w: &PackedView<'_>, bias: Option<&[f32]>, part: &mut Part<'_>) {
    let mut tile = 0;
    while tile < part.tiles {
        if isa == Isa::Avx2 && part.rows.len() == 1 && part.tiles - tile >= TILES_OF_ONE_ROW {
            tiles_of_one_row(x, w, bias, tile, part);
            tile += TILES_OF_ONE_ROW;
        } else {
            linear_tile(isa, x, w, bias, tile, part);
            tile += 1;
        }
    }
}

/// The outputs of one task: a run of whole tiles, as one slice in every row.
struct Part<'a> {
    first_tile: usize,
    tiles: usize,
    rows: Vec<&'a mut [f32]>,
    /// The results of one chunk for one tile, row by row.
    sums: Vec<[f32; TILE_OUTPUTS]>,
}

/// Cuts every row of `out` at the same multiples of the tile width.
fn divide(out: &mut [f32], outputs: usize, tiles: usize, tasks: usize) -> Vec<Part<'_>> {
    let bounds: Vec<usize> = (0..=tasks).map(|task| tiles * task / tasks).collect();
    let rows = out.len() / outputs;
    let mut parts: Vec<Part<'_>> = bounds
        .windows(2)
        .map(|b| Part {
            first_tile: b[0],
            tiles: b[1] - b[0],
            rows: Vec::with_capacity(rows),
            sums: vec![[0.0; TILE_OUTPUTS]; rows],
        })
        .collect();
    for mut row in out.chunks_exact_mut(outputs) {
        for part in &mut parts {
            let width = (part.tiles * TILE_OUTPUTS).min(row.len());
            let (mine, rest) = row.split_at_mut(width);
            part.rows.push(mine);
            row = rest;
        }
    }
    parts
}

/// The rows in blocks of about equal size, at most six each.
fn blocks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let count = rows.div_ceil(BLOCK_ROWS);
    (0..count).map(move |block| block * rows / count..(block + 1) * rows / count)
}

/// The input in the order in which the tiles read it: chunks, in a chunk lanes, in a lane the blocks of rows, in a
/// block the steps, in a step the rows.
fn repack(x: &[f32], rows: usize, inputs: usize) -> Vec<f32> {
    let padded = padded_inputs(inputs);
    let mut repacked = vec![0.0f32; rows * padded];
    for (chunk, target) in repacked.chunks_mut(CHUNK * rows).enumerate() {
        let steps = target.len() / (LANES * rows);
        for block in blocks(rows) {
            for lane in 0..LANES {
                let first = chunk * CHUNK + lane;
                let target = &mut target[lane * steps * rows + block.start * steps..][..block.len() * steps];
                for (row, x) in x[block.start * inputs..block.end * inputs].chunks_exact(inputs).enumerate() {
                    let x = x.iter().skip(first).step_by(LANES);
                    for (target, x) in target.iter_mut().skip(row).step_by(block.len()).zip(x) {
                        *target = *x;
                    }
                }
            }
        }
    }
    repacked
}

/// One tile of outputs for all rows.
fn linear_tile(
    isa: Isa,
    x: &[f32],
    w: &PackedView<'_>,
    bias: Option<&[f32]>,
    tile: usize,
    part: &mut Part<'_>,
) {
    let rows = part.rows.len();
    let weights = w.tile(part.first_tile + tile);
    let at = tile * TILE_OUTPUTS;
    let width = TILE_OUTPUTS.min(part.rows[0].len() - at);
    if weights.is_empty() {
        part.rows.iter_mut().for_each(|row| row[at..at + width].fill(0.0));
    }
    for (chunk, weights) in weights.chunks(CHUNK * entry_bytes(w.dtype())).enumerate() {
        let entries = weights.len() / entry_bytes(w.dtype());
        let x = &x[chunk * CHUNK * rows..][..entries * rows];
        chunk_sums(isa, w.dtype(), x, weights, &mut part.sums);
        for (row, sums) in part.rows.iter_mut().zip(&part.sums) {
            for (out, sum) in row[at..at + width].iter_mut().zip(sums) {
                *out = if chunk == 0 { *sum } else { *out + *sum };
            }
        }
    }
    for row in &mut part.rows {
        add_bias(bias, (part.first_tile + tile) * TILE_OUTPUTS, &mut row[at..at + width]);
    }
}

fn add_bias(bias: Option<&[f32]>, first: usize, out: &mut [f32]) {
    if let Some(bias) = bias {
        for (out, bias) in out.iter_mut().zip(&bias[first..]) {
            *out += bias;
        }
    }
}

/// Several whole tiles of outputs for the only row; the last may be cut short by the end of the row.
fn tiles_of_one_row(x: &[f32], w: &PackedView<'_>, bias: Option<&[f32]>, tile: usize, part: &mut Part<'_>) {
    let first = part.first_tile + tile;
    let tiles: [&[u8]; TILES_OF_ONE_ROW] = std::array::from_fn(|i| w.tile(first + i));
    let at = tile * TILE_OUTPUTS;
    let end = part.rows[0].len().min(at + TILES_OF_ONE_ROW * TILE_OUTPUTS);
    let out = &mut part.rows[0][at..end];
    out.fill(0.0);
    let entry = entry_bytes(w.dtype());
    let mut sums = [[0.0; TILE_OUTPUTS]; TILES_OF_ONE_ROW];
    for (chunk, x) in x.chunks(CHUNK).enumerate() {
        let weights = tiles.map(|tile| &tile[chunk * CHUNK * entry..][..x.len() * entry]);
        one_row_sums(w.dtype(), x, weights, &mut sums);
        for (out, sum) in out.iter_mut().zip(sums.as_flattened()) {
            *out = if chunk == 0 { *sum } else { *out + *sum };
        }
    }
    add_bias(bias, first * TILE_OUTPUTS, out);
}

#[cfg(target_arch = "x86_64")]
use avx2::tiles_of_one_row as one_row_sums;
#[cfg(not(target_arch = "x86_64"))]
fn one_row_sums<const TILES: usize>(
    _: DType,
    _: &[f32],
    _: [&[u8]; TILES],
    _: &mut [[f32; TILE_OUTPUTS]; TILES],
) {
    panic!("AVX2 exists on x86-64 only")
}

/// The results of one chunk for one tile, for every row.
fn chunk_sums(isa: Isa, dtype: DType, x: &[f32], w: &[u8], sums: &mut [[f32; TILE_OUTPUTS]]) {
    match isa {
        Isa::Scalar => chunk_sums_scalar(dtype, x, w, sums),
        #[cfg(target_arch = "x86_64")]
        Isa::Avx2 => avx2::chunk_sums(dtype, x, w, sums),
        #[cfg(not(target_arch = "x86_64"))]
        Isa::Avx2 => panic!("AVX2 exists on x86-64 only"),
    }
}

fn chunk_sums_scalar(dtype: DType, x: &[f32], w: &[u8], sums: &mut [[f32; TILE_OUTPUTS]]) {
    let rows = sums.len();
    let entry = entry_bytes(dtype);
    let steps = w.len() / entry / LANES;
    for lane in 0..LANES {
        let w = &w[lane * steps * entry..][..steps * entry];
        let x = &x[lane * steps * rows..][..steps * rows];
        for block in blocks(rows) {
            let x = &x[block.start * steps..block.end * steps];
            let mut acc = [[0.0f32; TILE_OUTPUTS]; BLOCK_ROWS];
            for (x, w) in x.chunks_exact(block.len()).zip(w.chunks_exact(entry)) {
                let weights = widen_entry(dtype, w);
                for (acc, x) in acc.iter_mut().zip(x) {
                    for (acc, w) in acc.iter_mut().zip(&weights) {
                        *acc = x.mul_add(*w, *acc);
                    }
                }
            }
            for (sums, acc) in sums[block].iter_mut().zip(&acc) {
                for (sum, acc) in sums.iter_mut().zip(acc) {
                    *sum = if lane == 0 { *acc } else { *sum + *acc };
                }
            }
        }
    }
}

fn widen_entry(dtype: DType, bytes: &[u8]) -> [f32; TILE_OUTPUTS] {
    let mut values = [0.0; TILE_OUTPUTS];
    match dtype {
        DType::F32 => {
            for (value, four) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*four);
            }
        }
        DType::Bf16 | DType::F16 => {
            let widen = if dtype == DType::Bf16 { bf16_value } else { f16_value };
            for (index, four) in bytes.as_chunks::<4>().0.iter().enumerate() {
                values[index] = widen(u16::from_le_bytes([four[0], four[1]]));
                values[index + 8] = widen(u16::from_le_bytes([four[2], four[3]]));
            }
        }
    }
    values
}
