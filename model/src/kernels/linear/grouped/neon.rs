//! The NEON forms: a register is four inputs, or eight halves, of four outputs.
//!
//! Products are made of signed bytes and added up in 16 bits, four sums for each output, as long as these hold them: two of
//! 8 bits (2 * 128 * 127), or the eight of a group of 4 bits, whose weights are unsigned (8 * 15 * 127). The instruction for
//! four products at a time (`sdot`) is not part of every AArch64.

use super::super::neon::widen_halves;
use super::{GROUP_VECTOR_BYTES, GROUP_WORDS, Quantised, Rows, Sums, place_of_group};
use crate::kernels::Isa;
use std::arch::aarch64::*;

/// Outputs of a register, and registers of a tile.
const FOUR: usize = 4;

pub(super) fn block_sums(kind: Quantised, x: Rows<'_>, w: &[&[u8]], sums: &mut [Sums]) {
    assert!(Isa::Neon.available(), "this machine lacks NEON");
    // SAFETY: NEON was just checked, and the caller has held the lengths against each other.
    unsafe {
        match kind {
            Quantised::Q8 => of_kind::<false>(x, w, sums),
            Quantised::Q4 => of_kind::<true>(x, w, sums),
        }
    }
}

/// # Safety
/// The machine has NEON; the rows are those of `x`, and every `w` is a tile of the kind with its groups.
unsafe fn of_kind<const Q4: bool>(x: Rows<'_>, w: &[&[u8]], sums: &mut [Sums]) {
    for (tile, w) in w.iter().enumerate() {
        // As many outputs together as have their sums in registers.
        let together = [4, 2, 2, 1, 1, 1][x.rows - 1];
        for first in (0..FOUR).step_by(together) {
            // SAFETY: the caller's promise is passed on with the rows and registers as constants.
            unsafe {
                match x.rows {
                    1 => of_rows::<Q4, 1, 4>(x, w, tile, first, sums),
                    2 => of_rows::<Q4, 2, 2>(x, w, tile, first, sums),
                    3 => of_rows::<Q4, 3, 2>(x, w, tile, first, sums),
                    4 => of_rows::<Q4, 4, 1>(x, w, tile, first, sums),
                    5 => of_rows::<Q4, 5, 1>(x, w, tile, first, sums),
                    6 => of_rows::<Q4, 6, 1>(x, w, tile, first, sums),
                    _ => unreachable!("a block has 1 to 6 rows"),
                }
            }
        }
    }
}

/// `FOURS` times four outputs of a tile, from those of register `first` on.
///
/// # Safety
/// As of [`of_kind`], with `ROWS` rows, and `first + FOURS` at most 4.
#[target_feature(enable = "neon")]
unsafe fn of_rows<const Q4: bool, const ROWS: usize, const FOURS: usize>(
    x: Rows<'_>,
    w: &[u8],
    tile: usize,
    first: usize,
    sums: &mut [Sums],
) {
    let kind = if Q4 { Quantised::Q4 } else { Quantised::Q8 };
    let mut acc = [[vdupq_n_f32(0.0); FOURS]; ROWS];
    for group in 0..x.groups {
        let (scales, codes) = place_of_group(kind, group, x.groups);
        // SAFETY: the group is one of the rows and of the tile, whose vectors and scales are inside of the slice; the loads
        // need no alignment.
        unsafe {
            let at = x.words.as_ptr().add(group * ROWS * GROUP_WORDS).cast::<i32>();
            let codes = w.as_ptr().add(codes + first * 16);
            let dots = if Q4 {
                dots_of_4::<ROWS, FOURS>(at, codes)
            } else {
                dots_of_8::<ROWS, FOURS>(at.add(2 * ROWS), codes)
            };
            for four in 0..FOURS {
                let scales = vld1_u16(w.as_ptr().add(scales + (first + four) * 2 * FOUR).cast());
                let [scales, _] = widen_halves(vcombine_u16(scales, scales));
                for row in 0..ROWS {
                    let factor = vmulq_n_f32(scales, *at.add(ROWS + row).cast::<f32>());
                    acc[row][four] = vfmaq_f32(acc[row][four], factor, vcvtq_f32_s32(dots[row][four]));
                }
            }
        }
    }
    let at = (tile * FOUR + first) * FOUR;
    for (sums, acc) in sums.iter_mut().zip(acc) {
        for (sums, acc) in sums[at..].as_chunks_mut::<FOUR>().0.iter_mut().zip(acc) {
            // SAFETY: the chunk is four floats.
            unsafe { vst1q_f32(sums.as_mut_ptr(), acc) };
        }
    }
}

/// The sums of a group, of weights of 8 bits.
///
/// # Safety
/// Eight times `ROWS` words are readable at `fours`, and `FOURS` registers of eight vectors at `codes`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn dots_of_8<const ROWS: usize, const FOURS: usize>(
    fours: *const i32,
    codes: *const u8,
) -> [[int32x4_t; FOURS]; ROWS] {
    // Of every four outputs the first two and the other two, each in two parts.
    let mut dots = [[[vdupq_n_s32(0); 2]; FOURS]; ROWS];
    for vector in (0..8).step_by(2) {
        for four in 0..FOURS {
            // SAFETY: the caller's promise.
            let weights = unsafe {
                let at = codes.add(vector * GROUP_VECTOR_BYTES + four * 16);
                [signed(vld1q_u8(at)), signed(vld1q_u8(at.add(GROUP_VECTOR_BYTES)))]
            };
            for (row, dots) in dots.iter_mut().enumerate() {
                // SAFETY: row < ROWS, and the vectors are two of eight.
                let [x, y] = unsafe {
                    [inputs(fours.add(vector * ROWS + row)), inputs(fours.add((vector + 1) * ROWS + row))]
                };
                let low = vmull_s8(vget_low_s8(weights[0]), vget_low_s8(x));
                let low = vmlal_s8(low, vget_low_s8(weights[1]), vget_low_s8(y));
                let high = vmlal_high_s8(vmull_high_s8(weights[0], x), weights[1], y);
                dots[four] = [vpadalq_s16(dots[four][0], low), vpadalq_s16(dots[four][1], high)];
            }
        }
    }
    let mut sums = [[vdupq_n_s32(0); FOURS]; ROWS];
    for (sums, dots) in sums.iter_mut().zip(dots) {
        for (sum, [low, high]) in sums.iter_mut().zip(dots) {
            *sum = vpaddq_s32(low, high);
        }
    }
    sums
}

/// The sums of a group, of weights of 4 bits.
///
/// # Safety
/// A group of `ROWS` rows is readable at `x`, and `FOURS` registers of four vectors at `codes`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn dots_of_4<const ROWS: usize, const FOURS: usize>(
    x: *const i32,
    codes: *const u8,
) -> [[int32x4_t; FOURS]; ROWS] {
    // Of every four outputs the first two and the other two, each in four parts.
    let mut pairs = [[[vdupq_n_s16(0); 2]; FOURS]; ROWS];
    // SAFETY: the caller's promise.
    let fours = unsafe { x.add(2 * ROWS) };
    for vector in 0..4 {
        for four in 0..FOURS {
            // SAFETY: the caller's promise.
            let codes = unsafe { vld1q_u8(codes.add(vector * GROUP_VECTOR_BYTES + four * 16)) };
            let halves = [vandq_u8(codes, vdupq_n_u8(15)), vshrq_n_u8::<4>(codes)];
            for (half, weights) in halves.into_iter().enumerate() {
                let weights = vreinterpretq_s8_u8(weights);
                for (row, pairs) in pairs.iter_mut().enumerate() {
                    // SAFETY: row < ROWS, and the inputs are one of the group's eight vectors.
                    let x = unsafe { inputs(fours.add((vector + half * 4) * ROWS + row)) };
                    let [low, high] = pairs[four];
                    let low = vmlal_s8(low, vget_low_s8(weights), vget_low_s8(x));
                    pairs[four] = [low, vmlal_high_s8(high, weights, x)];
                }
            }
        }
    }
    let mut sums = [[vdupq_n_s32(0); FOURS]; ROWS];
    for (row, (sums, pairs)) in sums.iter_mut().zip(pairs).enumerate() {
        // SAFETY: row < ROWS.
        let bias = vdupq_n_s32(unsafe { *x.add(row) });
        for (sum, [low, high]) in sums.iter_mut().zip(pairs) {
            *sum = vaddq_s32(bias, vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high)));
        }
    }
    sums
}

/// Weights of 8 bits without what was added to them.
#[inline]
#[target_feature(enable = "neon")]
fn signed(codes: uint8x16_t) -> int8x16_t {
    vreinterpretq_s8_u8(veorq_u8(codes, vdupq_n_u8(0x80)))
}

/// Four inputs, for each of four outputs.
///
/// # Safety
/// A word is readable at `at`.
#[inline]
#[target_feature(enable = "neon")]
unsafe fn inputs(at: *const i32) -> int8x16_t {
    // SAFETY: the caller's promise.
    vreinterpretq_s8_s32(vdupq_n_s32(unsafe { *at }))
}
