//! The AVX2 forms of a chunk of quantised weights: codes are widened to floats, exactly, and multiplied with the factor of
//! their block, which is the decoded weight; then it goes as with any other.

use super::super::packed::{E4M3_BLOCK, MXFP4_BLOCK, Storage};
use super::avx2::add_sums;
use super::{LANES, TILE_OUTPUTS};
use std::arch::x86_64::*;

/// Codes of four bits.
const MXFP4: u8 = 0;
/// Codes of eight.
const E4M3: u8 = 1;

/// Steps of a lane that share factors.
const fn block_steps(kind: u8) -> usize {
    if kind == MXFP4 { MXFP4_BLOCK / LANES } else { E4M3_BLOCK / LANES }
}

const fn entry_bytes(kind: u8) -> usize {
    if kind == MXFP4 { TILE_OUTPUTS / 2 } else { TILE_OUTPUTS }
}

const fn factor_bytes(kind: u8) -> usize {
    if kind == MXFP4 { TILE_OUTPUTS * 2 } else { 4 }
}

/// A chunk of several tiles for one row.
///
/// # Safety
/// The machine has AVX2, FMA and F16C; every `w` is a chunk of the storage for the values of `x`, which are 16 lanes of
/// equal length.
pub(super) unsafe fn tiles_of_one_row<const TILES: usize>(
    storage: Storage,
    x: &[f32],
    w: [&[u8]; TILES],
    sums: &mut [[f32; TILE_OUTPUTS]; TILES],
) {
    // Two tiles and their factors fit the registers.
    for (w, sums) in w.as_chunks::<2>().0.iter().zip(sums.as_chunks_mut::<2>().0) {
        // SAFETY: the caller's promise is passed on with the kind as the constant.
        unsafe {
            match storage {
                Storage::Mxfp4 => lanes_of_tiles::<MXFP4>(x, *w, sums),
                Storage::E4m3 => lanes_of_tiles::<E4M3>(x, *w, sums),
                Storage::Plain(_) | Storage::Grouped(_) => unreachable!("no codes of floats"),
            }
        }
    }
    const { assert!(TILES.is_multiple_of(2)) };
}

/// # Safety
/// As of [`tiles_of_one_row`].
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn lanes_of_tiles<const KIND: u8>(x: &[f32], w: [&[u8]; 2], sums: &mut [[f32; TILE_OUTPUTS]; 2]) {
    let steps = x.len() / LANES;
    let factors = x.len().div_ceil(block_steps(KIND) * LANES) * factor_bytes(KIND);
    for (lane, x) in x.chunks_exact(steps.max(1)).enumerate() {
        let mut acc = [[_mm256_setzero_ps(); 2]; 2];
        for (block, x) in x.chunks(block_steps(KIND)).enumerate() {
            // SAFETY: the block is one of the chunk.
            let by = w.map(|w| unsafe { load_factors::<KIND>(w.as_ptr().add(block * factor_bytes(KIND))) });
            let first = lane * steps + block * block_steps(KIND);
            for (step, x) in x.iter().enumerate() {
                let x = _mm256_broadcast_ss(x);
                let at = factors + (first + step) * entry_bytes(KIND);
                for ((w, by), acc) in w.iter().zip(by).zip(&mut acc) {
                    // SAFETY: lane < 16 and the step is one of the lane, so that the entry is inside the slice.
                    let [low, high] = unsafe { load_codes::<KIND>(w.as_ptr().add(at)) };
                    acc[0] = _mm256_fmadd_ps(x, _mm256_mul_ps(low, by[0]), acc[0]);
                    acc[1] = _mm256_fmadd_ps(x, _mm256_mul_ps(high, by[1]), acc[1]);
                }
            }
        }
        for (sums, acc) in sums.iter_mut().zip(acc) {
            add_sums(acc, lane == 0, sums);
        }
    }
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
            (Storage::Mxfp4, 1) => lanes_of_rows::<MXFP4, 1>(x, w, steps, sums),
            (Storage::Mxfp4, 2) => lanes_of_rows::<MXFP4, 2>(x, w, steps, sums),
            (Storage::Mxfp4, 3) => lanes_of_rows::<MXFP4, 3>(x, w, steps, sums),
            (Storage::Mxfp4, 4) => lanes_of_rows::<MXFP4, 4>(x, w, steps, sums),
            (Storage::Mxfp4, 5) => lanes_of_rows::<MXFP4, 5>(x, w, steps, sums),
            (Storage::Mxfp4, 6) => lanes_of_rows::<MXFP4, 6>(x, w, steps, sums),
            (Storage::E4m3, 1) => lanes_of_rows::<E4M3, 1>(x, w, steps, sums),
            (Storage::E4m3, 2) => lanes_of_rows::<E4M3, 2>(x, w, steps, sums),
            (Storage::E4m3, 3) => lanes_of_rows::<E4M3, 3>(x, w, steps, sums),
            (Storage::E4m3, 4) => lanes_of_rows::<E4M3, 4>(x, w, steps, sums),
            (Storage::E4m3, 5) => lanes_of_rows::<E4M3, 5>(x, w, steps, sums),
            (Storage::E4m3, 6) => lanes_of_rows::<E4M3, 6>(x, w, steps, sums),
            _ => unreachable!("one to six rows of quantised weights"),
        }
    }
}

/// # Safety
/// As of [`few_rows`], with `ROWS` rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn lanes_of_rows<const KIND: u8, const ROWS: usize>(
    x: &[f32],
    w: &[u8],
    steps: usize,
    sums: &mut [[f32; TILE_OUTPUTS]],
) {
    let factors = (steps * LANES).div_ceil(block_steps(KIND) * LANES) * factor_bytes(KIND);
    for (lane, x) in x.chunks_exact((steps * ROWS).max(1)).enumerate() {
        let mut acc = [[_mm256_setzero_ps(); 2]; ROWS];
        for (block, x) in x.chunks(block_steps(KIND) * ROWS).enumerate() {
            let first = lane * steps + block * block_steps(KIND);
            // SAFETY: the block is one of the chunk, and each step one of the lane.
            let by = unsafe { load_factors::<KIND>(w.as_ptr().add(block * factor_bytes(KIND))) };
            for (step, x) in x.as_chunks::<ROWS>().0.iter().enumerate() {
                let at = factors + (first + step) * entry_bytes(KIND);
                // SAFETY: as above.
                let [low, high] = unsafe { load_codes::<KIND>(w.as_ptr().add(at)) };
                let (low, high) = (_mm256_mul_ps(low, by[0]), _mm256_mul_ps(high, by[1]));
                for (x, acc) in x.iter().zip(&mut acc) {
                    let x = _mm256_broadcast_ss(x);
                    acc[0] = _mm256_fmadd_ps(x, low, acc[0]);
                    acc[1] = _mm256_fmadd_ps(x, high, acc[1]);
                }
            }
        }
        for (sums, acc) in sums.iter_mut().zip(acc) {
            add_sums(acc, lane == 0, sums);
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
