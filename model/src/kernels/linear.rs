//! Dot products and matrix products by one order of operations.
//!
//! The inputs are padded with pairs of +0 to a multiple of 16 and cut into chunks of 1024 at absolute offsets. In a
//! chunk, lane l starts at +0 and takes `fma(x[k], w[k], acc)` for the k with k mod 16 = l, ascending. The lanes are
//! added left to right, starting from the first; so are the chunks; a bias is added last. Only outputs are divided
//! among threads. Matrices of integers have an order of their own (`grouped`).

use super::buffer::{Buffer, Parts, emptied};
use super::convert::{bf16_value, e2m1_value, e4m3_value, f16_value};
use super::packed::{
    CHUNK, E4M3_BLOCK, LANES, MXFP4_BLOCK, PackedView, Storage, TILE_OUTPUTS, padded_inputs,
};
use super::pool::Pool;
use super::quantise::Quantised;
use super::{DType, Isa};
use std::ops::Range;

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod grouped;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod scaled;

/// Rows that one pass over a tile of weights serves.
const BLOCK_ROWS: usize = 6;
/// Tiles that a block of several rows goes through together, at most: as many sums as hide the latency of a product.
const TILES_OF_ROWS: usize = 2;
/// How far ahead of their use weights are asked for.
#[cfg(target_arch = "x86_64")]
const AHEAD_BYTES: usize = 8192;
#[cfg(target_arch = "x86_64")]
const CACHE_LINE: usize = 64;
/// How much smaller than a thread's share of the work the smallest tasks are, so that none waits long for the last one of another.
const SMALLEST_TASKS: usize = 128;
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

/// The dot product with ones.
#[inline(always)]
pub(super) fn sum_body(x: &[f32]) -> f32 {
    let mut total = 0.0;
    for (index, x) in x.chunks(CHUNK).enumerate() {
        let chunk = dot_chunk(x, &[1.0; CHUNK][..x.len()]);
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
    x: &'a [f32],
    picked: Option<&'a [u32]>,
    rows: usize,
    w: PackedView<'a>,
    bias: Option<&'a [f32]>,
    out: Parts<'a, f32>,
    plan: Plan,
}

/// Where a product stands among those that are computed with it.
#[derive(Clone, Copy, Debug, Default)]
struct Plan {
    /// Where its input starts in the repacked ones. Neighbours with the same input have one copy.
    at: usize,
    /// Blocks of rows that are repacked before its own.
    first_block: usize,
}

impl<'a> Product<'a> {
    /// `x` is rows x inputs, `out` is rows x outputs, both row-major; the bias has one value for each output.
    ///
    /// # Panics
    /// If a slice does not fit the shape.
    pub fn new(x: &'a [f32], w: PackedView<'a>, bias: Option<&'a [f32]>, out: &'a mut [f32]) -> Self {
        // Without outputs, whatever rows there are give nothing.
        let rows = out.len().checked_div(w.outputs()).unwrap_or_else(|| x.len() / w.inputs());
        assert_eq!(x.len(), rows * w.inputs(), "the input does not fit the shape");
        Self::of_rows(x, None, rows, w, bias, out)
    }

    /// The same of those rows of `x` that are picked, in their order.
    ///
    /// # Panics
    /// If a slice does not fit the shape, or a row is not there.
    pub fn of_picked(
        x: &'a [f32],
        rows: &'a [u32],
        w: PackedView<'a>,
        bias: Option<&'a [f32]>,
        out: &'a mut [f32],
    ) -> Self {
        let there = x.len().checked_div(w.inputs()).unwrap_or(usize::MAX);
        assert!(rows.iter().all(|&row| (row as usize) < there), "a row that is not there");
        Self::of_rows(x, Some(rows), rows.len(), w, bias, out)
    }

    fn of_rows(
        x: &'a [f32],
        picked: Option<&'a [u32]>,
        rows: usize,
        w: PackedView<'a>,
        bias: Option<&'a [f32]>,
        out: &'a mut [f32],
    ) -> Self {
        assert_eq!(out.len(), rows * w.outputs(), "the output does not fit the shape");
        assert!(bias.is_none_or(|bias| bias.len() == w.outputs()), "the bias does not fit the shape");
        Self { x, picked, rows, w, bias, out: Parts::new(out), plan: Plan::default() }
    }

    fn row(&self, row: usize) -> &'a [f32] {
        let row = self.picked.map_or(row, |picked| picked[row] as usize);
        &self.x[row * self.w.inputs()..][..self.w.inputs()]
    }

    /// Values of the repacked input.
    fn repacked(&self) -> usize {
        let inputs = self.w.inputs();
        self.rows * if self.grouped().is_some() { grouped::row_words(inputs) } else { padded_inputs(inputs) }
    }

    fn grouped(&self) -> Option<Quantised> {
        self.w.storage().grouped()
    }

    fn tiles(&self) -> usize {
        self.w.outputs().div_ceil(TILE_OUTPUTS)
    }

    /// Tiles that one pass goes through: several where registers have room for their sums.
    fn tiles_together(&self, isa: Isa) -> usize {
        let several = self.rows > 1 && (self.grouped().is_some() || isa == Isa::Avx512);
        if several { TILES_OF_ROWS } else { 1 }
    }

    fn work(&self) -> usize {
        self.rows * padded_inputs(self.w.inputs()) * self.tiles() * TILE_OUTPUTS
    }

    fn has_input_of(&self, other: &Self) -> bool {
        let same_rows = match (self.picked, other.picked) {
            (None, None) => true,
            (Some(rows), Some(others)) => std::ptr::eq(rows, others),
            _ => false,
        };
        let same_form = self.w.inputs() == other.w.inputs() && self.grouped() == other.grouped();
        same_rows && std::ptr::eq(self.x, other.x) && same_form
    }
}

/// Some tiles of a product, which a thread computes one after the other.
#[derive(Clone, Debug)]
struct Task {
    product: usize,
    tiles: Range<usize>,
}

/// Products that are computed together, and the memory that this takes: it is kept from one use to the next.
#[derive(Debug, Default)]
pub struct Products {
    list: Vec<Product<'static>>,
    tasks: Vec<Task>,
    repacked: Buffer,
}

impl Products {
    /// Computes products that do not wait for each other, shared among the threads as one.
    ///
    /// The bits of a row depend on that row, the weights and the bias alone.
    ///
    /// # Panics
    /// If this machine lacks `isa`.
    pub fn compute<'a>(&mut self, pool: &Pool, isa: Isa, products: impl IntoIterator<Item = Product<'a>>) {
        assert!(isa.available(), "this machine lacks the instruction set");
        let mut list: Vec<Product<'a>> = emptied(std::mem::take(&mut self.list));
        list.extend(products.into_iter().filter(|product| product.out.len() > 0));
        let work = plan(&mut list);
        let shared = work.all >= PARALLEL_FROM && pool.threads() > 1;
        share_out(&list, isa, work.all, if shared { pool.threads() } else { 1 }, &mut self.tasks);
        let inputs = Parts::new(self.repacked.values(work.inputs));
        pool.rows(work.blocks, work.inputs, &|block| {
            let product = &list[list.partition_point(|product| product.plan.first_block <= block) - 1];
            repack(isa, product, block - product.plan.first_block, &inputs);
        });
        let inputs = self.repacked.written(work.inputs);
        let tasks = &self.tasks;
        pool.run_with_room(tasks.len(), shared, &|task, room| {
            let Task { product, tiles } = tasks[task].clone();
            let product = &list[product];
            let x = &inputs[product.plan.at..][..product.repacked()];
            linear_part(isa, x, product, tiles, room);
        });
        self.list = emptied(list);
    }

    /// Bytes that it keeps.
    pub fn bytes(&self) -> usize {
        let lists =
            self.list.capacity() * size_of::<Product<'_>>() + self.tasks.capacity() * size_of::<Task>();
        self.repacked.bytes() + lists
    }
}

/// One product, in memory of its own: `x` is `rows` x inputs, `out` is `rows` x outputs, both row-major.
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
    assert_eq!(out.len(), rows * w.outputs(), "the output does not fit the shape");
    Products::default().compute(pool, isa, [Product::new(x, *w, bias, out)]);
}

/// What products take together.
struct Work {
    /// Values of the repacked inputs.
    inputs: usize,
    /// Blocks of rows to repack.
    blocks: usize,
    /// Multiplications.
    all: usize,
}

/// Places the products among each other.
fn plan(products: &mut [Product<'_>]) -> Work {
    let mut work = Work { inputs: 0, blocks: 0, all: 0 };
    for i in 0..products.len() {
        let (before, rest) = products.split_at_mut(i);
        let product = &mut rest[0];
        product.plan = Plan { at: work.inputs, first_block: work.blocks };
        match before.last().filter(|last| last.has_input_of(product)) {
            Some(last) => product.plan.at = last.plan.at,
            None => {
                work.inputs += product.repacked();
                work.blocks += product.rows.div_ceil(BLOCK_ROWS);
            }
        }
        work.all += product.work();
    }
    work
}

/// Cuts products into tasks: the first are large, for memory gives the most in long streams, and the last small, so that threads
/// are done at about the same time.
fn share_out(products: &[Product<'_>], isa: Isa, all: usize, threads: usize, tasks: &mut Vec<Task>) {
    tasks.clear();
    let (mut left, smallest) = (all, all / threads / SMALLEST_TASKS);
    for (at, product) in products.iter().enumerate() {
        let (tiles, together) = (product.tiles(), product.tiles_together(isa));
        let of_pass = product.work().div_ceil(tiles) * together;
        let mut first = 0;
        while first < tiles {
            let passes = (left / (2 * threads)).max(smallest) / of_pass.max(1);
            let next = match threads {
                1 => tiles,
                _ => tiles.min(first + passes.max(1) * together),
            };
            tasks.push(Task { product: at, tiles: first..next });
            left = left.saturating_sub((next - first).div_ceil(together) * of_pass);
            first = next;
        }
    }
}

/// The rows in blocks of about equal size, at most six each.
fn blocks(rows: usize) -> impl Iterator<Item = Range<usize>> {
    let count = rows.div_ceil(BLOCK_ROWS);
    (0..count).map(move |block| block * rows / count..(block + 1) * rows / count)
}

/// Puts a block of rows into the order in which the tiles read it: chunks, in a chunk lanes, in a lane the blocks of
/// rows, in a block the steps, in a step the rows. For integers they are quantised.
fn repack(isa: Isa, product: &Product<'_>, block: usize, inputs: &Parts<'_, f32>) {
    if let Some(kind) = product.grouped() {
        return grouped::quantise_block(isa, kind, product, block, inputs);
    }
    let rows = blocks(product.rows).nth(block).expect("a block of this product");
    match rows.len() {
        1 => repack_rows::<1>(product, rows.start, inputs),
        2 => repack_rows::<2>(product, rows.start, inputs),
        3 => repack_rows::<3>(product, rows.start, inputs),
        4 => repack_rows::<4>(product, rows.start, inputs),
        5 => repack_rows::<5>(product, rows.start, inputs),
        6 => repack_rows::<6>(product, rows.start, inputs),
        _ => unreachable!("a block has 1 to 6 rows"),
    }
}

fn repack_rows<const ROWS: usize>(product: &Product<'_>, first: usize, inputs: &Parts<'_, f32>) {
    let rows: [&[f32]; ROWS] = std::array::from_fn(|row| product.row(first + row));
    let padded = padded_inputs(product.w.inputs());
    for start in (0..padded).step_by(CHUNK) {
        let rows = rows.map(|row| &row[start..row.len().min(start + CHUNK)]);
        let steps = CHUNK.min(padded - start) / LANES;
        for lane in 0..LANES {
            let at = product.plan.at + start * product.rows + (lane * product.rows + first) * steps;
            // SAFETY: blocks, lanes and chunks have places of their own, and one task has the block.
            let target = unsafe { inputs.part(at..at + steps * ROWS) };
            for (step, target) in target.as_chunks_mut::<ROWS>().0.iter_mut().enumerate() {
                for (target, row) in target.iter_mut().zip(rows) {
                    *target = row.get(step * LANES + lane).copied().unwrap_or(0.0);
                }
            }
        }
    }
}

fn linear_part(isa: Isa, x: &[f32], product: &Product<'_>, tiles: Range<usize>, room: &mut Buffer) {
    if let Some(kind) = product.grouped() {
        return grouped::part(isa, kind, x, product, tiles);
    }
    let together = product.tiles_together(isa);
    let rows = together * product.rows;
    let (sums, totals) = room.values(2 * rows * TILE_OUTPUTS).as_chunks_mut().0.split_at_mut(rows);
    for first in tiles.clone().step_by(together) {
        let tiles = first..tiles.end.min(first + together);
        let rows = tiles.len() * product.rows;
        linear_tiles(isa, x, product, tiles, &mut sums[..rows], &mut totals[..rows]);
    }
}

/// Some tiles of outputs for all rows. There is room for the sums of one chunk and of all so far, tile by tile, row by row.
fn linear_tiles(
    isa: Isa,
    x: &[f32],
    product: &Product<'_>,
    tiles: Range<usize>,
    sums: &mut [[f32; TILE_OUTPUTS]],
    totals: &mut [[f32; TILE_OUTPUTS]],
) {
    let Product { rows, w, bias, .. } = *product;
    let padded = padded_inputs(w.inputs());
    if padded == 0 {
        totals.fill([0.0; TILE_OUTPUTS]);
    }
    for start in (0..padded).step_by(CHUNK) {
        let entries = CHUNK.min(padded - start);
        let x = &x[start * rows..][..entries * rows];
        let bytes = w.storage().chunk_bytes(CHUNK) * (start / CHUNK)..;
        let mut weights: [&[u8]; TILES_OF_ROWS] = [&[]; TILES_OF_ROWS];
        for (weights, tile) in weights.iter_mut().zip(tiles.clone()) {
            *weights = &w.tile(tile)[bytes.clone()][..w.storage().chunk_bytes(entries)];
        }
        let weights = &weights[..tiles.len()];
        if start == 0 {
            chunk_sums(isa, w.storage(), x, weights, totals);
            continue;
        }
        chunk_sums(isa, w.storage(), x, weights, sums);
        for (total, sum) in totals.as_flattened_mut().iter_mut().zip(sums.as_flattened()) {
            *total += sum;
        }
    }
    let first = tiles.start * TILE_OUTPUTS;
    let width = (tiles.len() * TILE_OUTPUTS).min(w.outputs() - first);
    for row in 0..rows {
        let at = row * w.outputs() + first;
        // SAFETY: every tile has places of its own in a row, and one task has the tile; it uses one row at a time.
        let out = unsafe { product.out.part(at..at + width) };
        for (out, totals) in
            out.chunks_mut(TILE_OUTPUTS).zip(totals.chunks_exact(rows).map(|rows| &rows[row]))
        {
            out.copy_from_slice(&totals[..out.len()]);
        }
        add_bias(bias, first, out);
    }
}

fn add_bias(bias: Option<&[f32]>, first: usize, out: &mut [f32]) {
    if let Some(bias) = bias {
        for (out, bias) in out.iter_mut().zip(&bias[first..]) {
            *out += bias;
        }
    }
}

/// Asks for what follows these bytes of the weights a while later. A task's tiles are one stream from memory, from the first to
/// the last, which is gone through faster than the hardware looks ahead.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn fetch_ahead(from: *const u8, bytes: usize) {
    use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
    for line in (0..bytes).step_by(CACHE_LINE) {
        // SAFETY: it reads nothing: the address may be any. SSE is part of the architecture.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(AHEAD_BYTES + line).cast()) };
    }
}

/// The results of one chunk for some tiles, for every row.
fn chunk_sums(isa: Isa, storage: Storage, x: &[f32], w: &[&[u8]], sums: &mut [[f32; TILE_OUTPUTS]]) {
    #[cfg(target_arch = "x86_64")]
    if isa == Isa::Avx512 {
        return avx512::chunk_sums(storage, x, w, sums);
    }
    let rows = sums.len() / w.len();
    for (w, sums) in w.iter().zip(sums.chunks_exact_mut(rows)) {
        match isa {
            Isa::Scalar => chunk_sums_scalar(storage, x, w, sums),
            #[cfg(target_arch = "x86_64")]
            Isa::Avx2 => avx2::chunk_sums(storage, x, w, sums),
            #[cfg(target_arch = "aarch64")]
            Isa::Neon => neon::chunk_sums(storage, x, w, sums),
            missing => missing.is_missing(),
        }
    }
}

fn chunk_sums_scalar(storage: Storage, x: &[f32], w: &[u8], sums: &mut [[f32; TILE_OUTPUTS]]) {
    let rows = sums.len();
    let entry = storage.entry_bytes();
    let steps = x.len() / rows.max(1) / LANES;
    let (factors, w) = w.split_at(storage.factor_bytes(steps * LANES));
    for lane in 0..LANES {
        let w = &w[lane * steps * entry..][..steps * entry];
        let x = &x[lane * steps * rows..][..steps * rows];
        for block in blocks(rows) {
            let x = &x[block.start * steps..block.end * steps];
            let mut acc = [[0.0f32; TILE_OUTPUTS]; BLOCK_ROWS];
            for (step, (x, w)) in x.chunks_exact(block.len()).zip(w.chunks_exact(entry)).enumerate() {
                let weights = widen_entry(storage, step * LANES + lane, factors, w);
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

/// The weights of an entry: those of an input of the chunk, whose factors stand before them.
fn widen_entry(storage: Storage, input: usize, factors: &[u8], bytes: &[u8]) -> [f32; TILE_OUTPUTS] {
    let mut values = [0.0; TILE_OUTPUTS];
    match storage {
        Storage::Plain(DType::F32) => {
            for (value, four) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(*four);
            }
        }
        Storage::Plain(dtype @ (DType::Bf16 | DType::F16)) => {
            let widen = if dtype == DType::Bf16 { bf16_value } else { f16_value };
            for (index, four) in bytes.as_chunks::<4>().0.iter().enumerate() {
                values[index] = widen(u16::from_le_bytes([four[0], four[1]]));
                values[index + 8] = widen(u16::from_le_bytes([four[2], four[3]]));
            }
        }
        Storage::Mxfp4 => {
            let factors = &factors.as_chunks::<2>().0[input / MXFP4_BLOCK * TILE_OUTPUTS..][..TILE_OUTPUTS];
            for (index, (value, factor)) in values.iter_mut().zip(factors).enumerate() {
                let code = bytes[index % 8] >> (index / 8 * 4);
                *value = 2.0 * e2m1_value(code) * bf16_value(u16::from_le_bytes(*factor));
            }
        }
        Storage::E4m3 => {
            let factor = f32::from_le_bytes(factors.as_chunks::<4>().0[input / E4M3_BLOCK]);
            for (value, code) in values.iter_mut().zip(bytes) {
                *value = e4m3_value(*code) / 256.0 * factor;
            }
        }
        Storage::Grouped(_) => unreachable!("integers have products of their own"),
    }
    values
}
