//! The NEON forms of a chunk: 16 outputs in four registers.
//!
//! A block of six rows has 24 sums in registers, which leaves room for the weights of an entry. Codes are widened to floats,
//! exactly, and multiplied with the factor of their block, which is the decoded weight; then it goes as with any other.

use super::super::packed::{E4M3_BLOCK, MXFP4_BLOCK};
use super::{BLOCK_ROWS, CHUNK, DType, LANES, Storage, TILE_OUTPUTS, blocks};
use crate::kernels::Isa;
use std::arch::aarch64::*;
use std::arch::asm;

/// Something of 16 outputs, in their order.
type Tile = [float32x4_t; 4];

// What a chunk is made of: the loops are compiled for each.
const F32: u8 = 0;
const BF16: u8 = 1;
const F16: u8 = 2;
/// Codes of four bits.
const MXFP4: u8 = 3;
/// Codes of eight.
const E4M3: u8 = 4;

/// An expression with the kind of a storage as a constant.
macro_rules! of_kind {
    ($storage:expr, $kind:ident => $value:expr) => {
        match $storage {
            Storage::Plain(DType::F32) => of_kind!(@ $kind, F32, $value),
            Storage::Plain(DType::Bf16) => of_kind!(@ $kind, BF16, $value),
            Storage::Plain(DType::F16) => of_kind!(@ $kind, F16, $value),
            Storage::Mxfp4 => of_kind!(@ $kind, MXFP4, $value),
            Storage::E4m3 => of_kind!(@ $kind, E4M3, $value),
            Storage::Grouped(_) => unreachable!("integers have products of their own"),
        }
    };
    (@ $kind:ident, $is:ident, $value:expr) => {{
        const $kind: u8 = $is;
        $value
    }};
}

const fn is_coded(kind: u8) -> bool {
    kind == MXFP4 || kind == E4M3
}

/// Steps of a lane that share factors; all of them where there are none.
const fn block_steps(kind: u8) -> usize {
    match kind {
        MXFP4 => MXFP4_BLOCK / LANES,
        E4M3 => E4M3_BLOCK / LANES,
        _ => CHUNK / LANES,
    }
}

const fn factor_bytes(kind: u8) -> usize {
    match kind {
        MXFP4 => TILE_OUTPUTS * 2,
        E4M3 => 4,
        _ => 0,
    }
}

const fn entry_bytes(kind: u8) -> usize {
    match kind {
        F32 => TILE_OUTPUTS * 4,
        MXFP4 => TILE_OUTPUTS / 2,
        E4M3 => TILE_OUTPUTS,
        _ => TILE_OUTPUTS * 2,
    }
}

/// A lane of a chunk.
#[derive(Clone, Copy)]
struct Lane {
    /// Those of the first block.
    factors: *const u8,
    /// The first entry.
    entries: *const u8,
}

impl Lane {
    fn of_chunk(storage: Storage, w: &[u8], lane: usize, steps: usize) -> Self {
        let first = storage.factor_bytes(steps * LANES) + lane * steps * storage.entry_bytes();
        Self { factors: w.as_ptr(), entries: w[first..].as_ptr() }
    }
}

pub(super) fn chunk_sums(storage: Storage, x: &[f32], w: &[u8], sums: &mut [[f32; TILE_OUTPUTS]]) {
    assert!(Isa::Neon.available(), "this machine lacks NEON");
    // Both slices hold whole lanes: the pointer arithmetic below relies on these equations.
    let rows = sums.len();
    let entries = x.len() / rows;
    assert!(x.len() == entries * rows && entries.is_multiple_of(LANES) && entries <= CHUNK);
    assert_eq!(w.len(), storage.chunk_bytes(entries));
    let steps = entries / LANES;
    // From two blocks of rows on a lane is widened once, instead of for each; it stays in the first-level cache.
    let widened = storage != Storage::Plain(DType::F32) && rows > BLOCK_ROWS;
    let mut room = [[0.0; TILE_OUTPUTS]; CHUNK / LANES];
    for lane in 0..LANES {
        let x = &x[lane * steps * rows..][..steps * rows];
        let weights = Lane::of_chunk(storage, w, lane, steps);
        // SAFETY: NEON was checked. The lane has `steps` entries of the storage, widened ones of f32, and `x` as many groups of
        // one value for each row.
        unsafe {
            if widened {
                of_kind!(storage, KIND => widen::<KIND>(weights, &mut room[..steps]));
                let weights = Lane { factors: std::ptr::null(), entries: room.as_ptr().cast() };
                lane_of_rows::<F32>(x, weights, steps, lane == 0, sums);
            } else {
                of_kind!(storage, KIND => lane_of_rows::<KIND>(x, weights, steps, lane == 0, sums));
            }
        }
    }
}

/// One lane for all blocks of rows.
///
/// # Safety
/// The lane has `steps` entries of the kind and `x` as many groups of one value for each row.
#[target_feature(enable = "neon")]
unsafe fn lane_of_rows<const KIND: u8>(
    x: &[f32],
    lane: Lane,
    steps: usize,
    first: bool,
    sums: &mut [[f32; TILE_OUTPUTS]],
) {
    for block in blocks(sums.len()) {
        let x = &x[block.start * steps..block.end * steps];
        let sums = &mut sums[block];
        // SAFETY: the caller's promise is passed on with the rows as the constant.
        unsafe {
            match sums.len() {
                1 => lane_of_block::<KIND, 1>(x, lane, first, sums),
                2 => lane_of_block::<KIND, 2>(x, lane, first, sums),
                3 => lane_of_block::<KIND, 3>(x, lane, first, sums),
                4 => lane_of_block::<KIND, 4>(x, lane, first, sums),
                5 => lane_of_block::<KIND, 5>(x, lane, first, sums),
                6 => lane_of_block::<KIND, 6>(x, lane, first, sums),
                _ => unreachable!("a block has 1 to 6 rows"),
            }
        }
    }
}

/// # Safety
/// The lane has an entry of the kind for each group of `ROWS` values of `x`.
#[target_feature(enable = "neon")]
unsafe fn lane_of_block<const KIND: u8, const ROWS: usize>(
    x: &[f32],
    lane: Lane,
    first: bool,
    sums: &mut [[f32; TILE_OUTPUTS]],
) {
    let mut acc = [[vdupq_n_f32(0.0); 4]; ROWS];
    for (block, x) in x.as_chunks::<ROWS>().0.chunks(block_steps(KIND)).enumerate() {
        // SAFETY: the block is one of the lane.
        let by = unsafe { load_factors::<KIND>(lane, block) };
        for (step, x) in (block * block_steps(KIND)..).zip(x) {
            // SAFETY: the step is one of the lane.
            let weights = unsafe { load_weights::<KIND>(lane, step, by) };
            for (x, acc) in x.iter().zip(&mut acc) {
                multiply(*x, weights, acc);
            }
        }
    }
    for (sums, acc) in sums.iter_mut().zip(acc) {
        add_sums(acc, first, sums);
    }
}

/// The weights of a lane as floats.
///
/// # Safety
/// The lane has an entry of the kind for each of `out`.
#[target_feature(enable = "neon")]
unsafe fn widen<const KIND: u8>(lane: Lane, out: &mut [[f32; TILE_OUTPUTS]]) {
    for (block, out) in out.chunks_mut(block_steps(KIND)).enumerate() {
        // SAFETY: the block is one of the lane, and so are its steps.
        unsafe {
            let by = load_factors::<KIND>(lane, block);
            for (step, out) in (block * block_steps(KIND)..).zip(out) {
                store(load_weights::<KIND>(lane, step, by), out);
            }
        }
    }
}

/// `acc = fma(x, weights, acc)`.
#[inline]
#[target_feature(enable = "neon")]
fn multiply(x: f32, weights: Tile, acc: &mut Tile) {
    for (acc, weights) in acc.iter_mut().zip(weights) {
        *acc = vfmaq_n_f32(*acc, weights, x);
    }
}

/// Adds the results of a lane to the sums or, for the first lane, puts them there.
#[inline]
#[target_feature(enable = "neon")]
fn add_sums(mut acc: Tile, first: bool, sums: &mut [f32; TILE_OUTPUTS]) {
    if !first {
        for (acc, sums) in acc.iter_mut().zip(sums.as_chunks::<4>().0) {
            // SAFETY: the chunk is four floats.
            *acc = vaddq_f32(unsafe { vld1q_f32(sums.as_ptr()) }, *acc);
        }
    }
    store(acc, sums);
}

#[inline]
#[target_feature(enable = "neon")]
fn store(tile: Tile, out: &mut [f32; TILE_OUTPUTS]) {
    for (four, out) in tile.into_iter().zip(out.as_chunks_mut::<4>().0) {
        // SAFETY: the chunk is four floats.
        unsafe { vst1q_f32(out.as_mut_ptr(), four) };
    }
}

/// The factors of a block; ones, which nothing is multiplied with, for weights that have none.
///
/// # Safety
/// The block is one of the lane's.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_factors<const KIND: u8>(lane: Lane, block: usize) -> Tile {
    // SAFETY: the caller promises 32 bytes or 4; the loads need no alignment.
    unsafe {
        let at = lane.factors.wrapping_add(block * factor_bytes(KIND));
        match KIND {
            MXFP4 => upper_halves([vld1q_u16(at.cast()), vld1q_u16(at.add(16).cast())]),
            E4M3 => [vdupq_n_f32(at.cast::<f32>().read_unaligned()); 4],
            _ => [vdupq_n_f32(1.0); 4],
        }
    }
}

/// The weights of an entry: codes are multiplied with their factors.
///
/// # Safety
/// The step is one of the lane's.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_weights<const KIND: u8>(lane: Lane, step: usize, by: Tile) -> Tile {
    // SAFETY: the caller promises an entry of the kind; the loads need no alignment.
    let mut weights = unsafe { load_entry::<KIND>(lane.entries.add(step * entry_bytes(KIND))) };
    if is_coded(KIND) {
        for (weight, by) in weights.iter_mut().zip(by) {
            *weight = vmulq_f32(*weight, by);
        }
    }
    weights
}

/// An entry as floats: of codes twice what MXFP4's mean, a 256th of what E4M3's do.
///
/// # Safety
/// An entry of the kind is readable at `at`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn load_entry<const KIND: u8>(at: *const u8) -> Tile {
    // SAFETY: the caller promises as many bytes as the kind's entries have; the loads need no alignment.
    unsafe {
        match KIND {
            F32 => {
                let at = at.cast::<f32>();
                [vld1q_f32(at), vld1q_f32(at.add(4)), vld1q_f32(at.add(8)), vld1q_f32(at.add(12))]
            }
            BF16 => {
                let words = [vld1q_u32(at.cast()), vld1q_u32(at.add(16).cast())];
                let low = words.map(|words| vreinterpretq_f32_u32(vshlq_n_u32::<16>(words)));
                let upper = vdupq_n_u32(0xffff_0000);
                let high = words.map(|words| vreinterpretq_f32_u32(vandq_u32(words, upper)));
                [low[0], low[1], high[0], high[1]]
            }
            F16 => {
                let pairs = [vld1q_u16(at.cast()), vld1q_u16(at.add(16).cast())];
                let low = widen_halves(vuzp1q_u16(pairs[0], pairs[1]));
                let high = widen_halves(vuzp2q_u16(pairs[0], pairs[1]));
                [low[0], low[1], high[0], high[1]]
            }
            MXFP4 => {
                let pairs = vld1_u8(at);
                const TABLE: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];
                // The sign of a zero is lost: no sum that begins with +0 can tell.
                let table = vld1q_s8(TABLE.as_ptr());
                let low = widen_bytes(vqtbl1_s8(table, vand_u8(pairs, vdup_n_u8(15))));
                let high = widen_bytes(vqtbl1_s8(table, vshr_n_u8::<4>(pairs)));
                [low[0], low[1], high[0], high[1]]
            }
            _ => {
                let codes = vld1q_u8(at);
                let low = widen_codes(vget_low_u8(codes));
                let high = widen_codes(vget_high_u8(codes));
                [low[0], low[1], high[0], high[1]]
            }
        }
    }
}

/// The values of bfloat16.
#[inline]
#[target_feature(enable = "neon")]
fn upper_halves([low, high]: [uint16x8_t; 2]) -> Tile {
    [vget_low_u16(low), vget_high_u16(low), vget_low_u16(high), vget_high_u16(high)]
        .map(|words| vreinterpretq_f32_u32(vshll_n_u16::<16>(words)))
}

#[inline]
#[target_feature(enable = "neon")]
fn widen_bytes(bytes: int8x8_t) -> [float32x4_t; 2] {
    let words = vmovl_s8(bytes);
    [vget_low_s16(words), vget_high_s16(words)].map(|words| vcvtq_f32_s32(vmovl_s16(words)))
}

/// Codes of E4M3 as binary16, whose exponent is 8 less: the conversion is exact, small numbers included.
#[inline]
#[target_feature(enable = "neon")]
fn widen_codes(codes: uint8x8_t) -> [float32x4_t; 2] {
    let words = vmovl_u8(codes);
    let sign = vandq_u16(vshlq_n_u16::<8>(words), vdupq_n_u16(0x8000));
    let rest = vandq_u16(vshlq_n_u16::<7>(words), vdupq_n_u16(0x3f80));
    widen_halves(vorrq_u16(sign, rest))
}

/// The values of binary16, exactly. The intrinsics that do it came after the oldest compiler that this is written for.
#[inline]
#[target_feature(enable = "neon")]
pub(super) fn widen_halves(halves: uint16x8_t) -> [float32x4_t; 2] {
    let (low, high): (float32x4_t, float32x4_t);
    // SAFETY: two conversions from a register to others; the first of them is written while the operand is still needed.
    unsafe {
        asm!(
            "fcvtl {low:v}.4s, {halves:v}.4h",
            "fcvtl2 {high:v}.4s, {halves:v}.8h",
            low = out(vreg) low,
            high = lateout(vreg) high,
            halves = in(vreg) halves,
            options(pure, nomem, nostack),
        );
    }
    [low, high]
}
