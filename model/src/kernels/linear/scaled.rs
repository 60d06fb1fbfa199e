//! The AVX2 forms of a chunk of quantised weights: codes are widened to floats, exactly, and multiplied with the factor of
//! their block, which is the decoded weight; then it goes as with any other.

use super::super::packed::{E4M3_BLOCK, MXFP4_BLOCK, Storage};
use super::avx2::{add_sums, multiply};
use super::{LANES, TILE_OUTPUTS};
use std::arch::x86_64::*;

/// Codes of four bits.
pub(super) const MXFP4: u8 = 0;
/// Codes of eight.
pub(super) const E4M3: u8 = 1;

/// Steps of a lane that share factors.
pub(super) const fn block_steps(kind: u8) -> usize {
    if kind == MXFP4 { MXFP4_BLOCK / LANES } else { E4M3_BLOCK / LANES }
}

pub(super) const fn entry_bytes(kind: u8) -> usize {
    if kind == MXFP4 { TILE_OUTPUTS / 2 } else { TILE_OUTPUTS }
}

pub(super) const fn factor_bytes(kind: u8) -> usize {
    if kind == MXFP4 { TILE_OUTPUTS * 2 } else { 4 }
}

/// A chunk of one tile for a few rows, six at most.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; `w` is a chunk of the storage with 16 lanes of `steps` entries, and `x` has as many
/// groups of one value for each row.
pub(super) unsafe fn few_rows(
    storage: Storage,
    x: &[f32],
    w: &[u8],
    steps: usize,
    sums: &mut [[f32; TILE_OUTPUTS]],
) {
    // SAFETY: the caller's promise is passed on with the kind and the rows as constants.
    unsafe {
        match (storage, sums.len()) {
            (Storage::Mxfp4, 1) => lanes_of_rows::<MXFP4, 1, 2>(x, w, steps, sums),
            (Storage::Mxfp4, 2) => lanes_of_rows::<MXFP4, 2, 2>(x, w, steps, sums),
            (Storage::Mxfp4, 3) => lanes_of_rows::<MXFP4, 3, 1>(x, w, steps, sums),
            (Storage::Mxfp4, 4) => lanes_of_rows::<MXFP4, 4, 1>(x, w, steps, sums),
            (Storage::Mxfp4, 5) => lanes_of_rows::<MXFP4, 5, 1>(x, w, steps, sums),
            (Storage::Mxfp4, 6) => lanes_of_rows::<MXFP4, 6, 1>(x, w, steps, sums),
            (Storage::E4m3, 1) => lanes_of_rows::<E4M3, 1, 1>(x, w, steps, sums),
            (Storage::E4m3, 2) => lanes_of_rows::<E4M3, 2, 1>(x, w, steps, sums),
            (Storage::E4m3, 3) => lanes_of_rows::<E4M3, 3, 1>(x, w, steps, sums),
            (Storage::E4m3, 4) => lanes_of_rows::<E4M3, 4, 1>(x, w, steps, sums),
            (Storage::E4m3, 5) => lanes_of_rows::<E4M3, 5, 1>(x, w, steps, sums),
            (Storage::E4m3, 6) => lanes_of_rows::<E4M3, 6, 1>(x, w, steps, sums),
            _ => unreachable!("one to six rows of quantised weights"),
        }
    }
}

/// # Safety
/// As of [`few_rows`], with `ROWS` rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn lanes_of_rows<const KIND: u8, const ROWS: usize, const FLIGHT: usize>(
    x: &[f32],
    w: &[u8],
    steps: usize,
    sums: &mut [[f32; TILE_OUTPUTS]],
) {
    let block_steps = const { block_steps(KIND) };
    let entries = (steps * LANES).div_ceil(block_steps * LANES) * factor_bytes(KIND);
    for group in 0..LANES / FLIGHT {
        let mut acc = [[[_mm256_setzero_ps(); 2]; ROWS]; FLIGHT];
        for block in 0..steps.div_ceil(block_steps) {
            let left = steps - block * block_steps;
            // SAFETY: the block is one of the chunk, and each of its steps one of the lane.
            unsafe {
                let by = load_factors::<KIND>(w.as_ptr().add(block * factor_bytes(KIND)));
                for (lane, acc) in acc.iter_mut().enumerate() {
                    let first = (group * FLIGHT + lane) * steps + block * block_steps;
                    let w = w.as_ptr().add(entries + first * entry_bytes(KIND));
                    let x = x.as_ptr().add(first * ROWS);
                    // A constant number of steps is no loop.
                    if left >= block_steps {
                        steps_of_block::<KIND, ROWS>(x, w, block_steps, by, acc);
                    } else {
                        steps_of_block::<KIND, ROWS>(x, w, left, by, acc);
                    }
                }
            }
        }
        for (lane, acc) in acc.iter().enumerate() {
            for (sums, acc) in sums.iter_mut().zip(acc) {
                add_sums(*acc, group + lane == 0, sums);
            }
        }
    }
}

/// # Safety
/// So many entries are readable at `w`, and as many groups of `ROWS` values at `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn steps_of_block<const KIND: u8, const ROWS: usize>(
    x: *const f32,
    w: *const u8,
    steps: usize,
    by: [__m256; 2],
    acc: &mut [[__m256; 2]; ROWS],
) {
    for step in 0..steps {
        // SAFETY: the caller's promise.
        unsafe {
            let [low, high] = load_codes::<KIND>(w.add(step * entry_bytes(KIND)));
            multiply(x.add(step * ROWS), [_mm256_mul_ps(low, by[0]), _mm256_mul_ps(high, by[1])], acc);
        }
    }
}

/// The weights of a lane as floats, entry by entry, in the order of the outputs.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; `w` is a chunk of the storage with 16 lanes of as many entries as `out` has.
pub(super) unsafe fn widen_lane(storage: Storage, lane: usize, w: &[u8], out: &mut [f32]) {
    // SAFETY: the caller's promise is passed on with the kind as the constant.
    unsafe {
        match storage {
            Storage::Mxfp4 => widen::<MXFP4>(lane, w, out),
            Storage::E4m3 => widen::<E4M3>(lane, w, out),
            Storage::Plain(_) | Storage::Grouped(_) => unreachable!("no codes of floats"),
        }
    }
}

/// # Safety
/// As of [`widen_lane`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widen<const KIND: u8>(lane: usize, w: &[u8], out: &mut [f32]) {
    let out = out.as_chunks_mut::<TILE_OUTPUTS>().0;
    let steps = out.len();
    let factors = (steps * LANES).div_ceil(block_steps(KIND) * LANES) * factor_bytes(KIND);
    for (block, out) in out.chunks_mut(block_steps(KIND)).enumerate() {
        let first = lane * steps + block * block_steps(KIND);
        // SAFETY: the block is one of the chunk, its entries are inside the slice, and each has room for 16 floats.
        unsafe {
            let by = load_factors::<KIND>(w.as_ptr().add(block * factor_bytes(KIND)));
            for (step, out) in out.iter_mut().enumerate() {
                let at = factors + (first + step) * entry_bytes(KIND);
                let [low, high] = load_codes::<KIND>(w.as_ptr().add(at));
                _mm256_storeu_ps(out.as_mut_ptr(), _mm256_mul_ps(low, by[0]));
                _mm256_storeu_ps(out.as_mut_ptr().add(8), _mm256_mul_ps(high, by[1]));
            }
        }
    }
}

/// The factors of 16 outputs.
///
/// # Safety
/// They are readable at `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_factors<const KIND: u8>(at: *const u8) -> [__m256; 2] {
    // SAFETY: the caller promises 32 bytes or 4; the loads need no alignment.
    unsafe {
        if KIND == MXFP4 {
            [0, 16].map(|half| {
                let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(at.add(half).cast()));
                _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
            })
        } else {
            [_mm256_set1_ps(at.cast::<f32>().read_unaligned()); 2]
        }
    }
}

/// The codes of 16 outputs as floats: twice what MXFP4's mean, a 256th of what E4M3's do.
///
/// # Safety
/// They are readable at `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_codes<const KIND: u8>(at: *const u8) -> [__m256; 2] {
    // SAFETY: the caller promises 8 bytes or 16; the loads need no alignment.
    unsafe {
        if KIND == MXFP4 {
            let pairs = _mm_loadl_epi64(at.cast());
            let mask = _mm_set1_epi8(15);
            let table = _mm_setr_epi8(0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12);
            [_mm_and_si128(pairs, mask), _mm_and_si128(_mm_srli_epi16::<4>(pairs), mask)].map(|codes| {
                // The sign of a zero is lost: no sum that begins with +0 can tell.
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_shuffle_epi8(table, codes)))
            })
        } else {
            let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(at.cast()));
            let sign = _mm256_and_si256(_mm256_slli_epi16::<8>(words), _mm256_set1_epi16(i16::MIN));
            let rest = _mm256_and_si256(_mm256_slli_epi16::<7>(words), _mm256_set1_epi16(0x3f80));
            // As binary16 its exponent is 8 less: the conversion is exact, small numbers included.
            let halves = _mm256_or_si256(sign, rest);
            [
                _mm256_cvtph_ps(_mm256_castsi256_si128(halves)),
                _mm256_cvtph_ps(_mm256_extracti128_si256::<1>(halves)),
            ]
        }
    }
}
