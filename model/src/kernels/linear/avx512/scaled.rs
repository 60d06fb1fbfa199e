//! The AVX-512 forms of a chunk of quantised weights: sixteen codes become one register of floats, exactly, and are multiplied with
//! the factors of their block, which is the decoded weight; then it goes as with any other.

use super::super::scaled::{E4M3, MXFP4, block_steps, entry_bytes, factor_bytes};
use super::super::{CACHE_LINE, LANES, Storage, TILE_OUTPUTS, fetch_ahead};
use std::arch::x86_64::*;

/// A chunk of one tile for a few rows, six at most: with as many lanes in flight as hide the latency of fma.
///
/// # Safety
/// The machine has AVX-512; `w` is a chunk of the storage with 16 lanes of `steps` entries, and `x` has as many groups of one value
/// for each row.
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
            (Storage::Mxfp4, 1) => lanes_of_rows::<MXFP4, 1, 4>(x, w, steps, sums),
            (Storage::Mxfp4, 2) => lanes_of_rows::<MXFP4, 2, 4>(x, w, steps, sums),
            (Storage::Mxfp4, 3) => lanes_of_rows::<MXFP4, 3, 4>(x, w, steps, sums),
            (Storage::Mxfp4, 4) => lanes_of_rows::<MXFP4, 4, 2>(x, w, steps, sums),
            (Storage::Mxfp4, 5) => lanes_of_rows::<MXFP4, 5, 2>(x, w, steps, sums),
            (Storage::Mxfp4, 6) => lanes_of_rows::<MXFP4, 6, 2>(x, w, steps, sums),
            (Storage::E4m3, 1) => lanes_of_rows::<E4M3, 1, 4>(x, w, steps, sums),
            (Storage::E4m3, 2) => lanes_of_rows::<E4M3, 2, 4>(x, w, steps, sums),
            (Storage::E4m3, 3) => lanes_of_rows::<E4M3, 3, 4>(x, w, steps, sums),
            (Storage::E4m3, 4) => lanes_of_rows::<E4M3, 4, 2>(x, w, steps, sums),
            (Storage::E4m3, 5) => lanes_of_rows::<E4M3, 5, 2>(x, w, steps, sums),
            (Storage::E4m3, 6) => lanes_of_rows::<E4M3, 6, 2>(x, w, steps, sums),
            _ => unreachable!("one to six rows of quantised weights"),
        }
    }
}

/// # Safety
/// As of [`few_rows`], with `ROWS` rows.
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
unsafe fn lanes_of_rows<const KIND: u8, const ROWS: usize, const FLIGHT: usize>(
    x: &[f32],
    w: &[u8],
    steps: usize,
    sums: &mut [[f32; TILE_OUTPUTS]],
) {
    let block_bytes = const { block_steps(KIND) * entry_bytes(KIND) };
    let block_steps = const { block_steps(KIND) };
    let entries = (steps * LANES).div_ceil(block_steps * LANES) * factor_bytes(KIND);
    for group in 0..LANES / FLIGHT {
        let mut acc = [[_mm512_setzero_ps(); ROWS]; FLIGHT];
        for block in 0..steps.div_ceil(block_steps) {
            let left = block_steps.min(steps - block * block_steps);
            // SAFETY: the block is one of the chunk, and each of its steps one of the lane.
            unsafe {
                let by = load_factors::<KIND>(w.as_ptr().add(block * factor_bytes(KIND)));
                for (lane, acc) in acc.iter_mut().enumerate() {
                    let first = (group * FLIGHT + lane) * steps + block * block_steps;
                    let w = w.as_ptr().add(entries + first * entry_bytes(KIND));
                    let x = x.as_ptr().add(first * ROWS);
                    if block.is_multiple_of(CACHE_LINE.div_ceil(block_bytes)) {
                        fetch_ahead(w, block_bytes.max(CACHE_LINE));
                    }
                    // A constant number of steps is no loop.
                    if left == block_steps {
                        steps_of_block::<KIND, ROWS>(x, w, block_steps, by, acc);
                    } else {
                        steps_of_block::<KIND, ROWS>(x, w, left, by, acc);
                    }
                }
            }
        }
        for (lane, acc) in acc.iter().enumerate() {
            for (sums, acc) in sums.iter_mut().zip(acc) {
                super::add_sums(*acc, group + lane == 0, sums);
            }
        }
    }
}

/// # Safety
/// So many entries are readable at `w`, and as many groups of `ROWS` values at `x`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
unsafe fn steps_of_block<const KIND: u8, const ROWS: usize>(
    x: *const f32,
    w: *const u8,
    steps: usize,
    by: __m512,
    acc: &mut [__m512; ROWS],
) {
    let multiply = |step: usize, codes: __m512, acc: &mut [__m512; ROWS]| {
        let weights = _mm512_mul_ps(codes, by);
        for (row, acc) in acc.iter_mut().enumerate() {
            // SAFETY: the caller's promise.
            let x = unsafe { *x.add(step * ROWS + row) };
            *acc = _mm512_fmadd_ps(_mm512_set1_ps(x), weights, *acc);
        }
    };
    for step in (0..steps - steps % 2).step_by(2) {
        // SAFETY: the caller's promise.
        let [even, odd] = unsafe { load_two::<KIND>(w.add(step * entry_bytes(KIND))) };
        multiply(step, even, acc);
        multiply(step + 1, odd, acc);
    }
    if steps % 2 == 1 {
        // SAFETY: the caller's promise.
        let last = unsafe { load_codes::<KIND>(w.add((steps - 1) * entry_bytes(KIND))) };
        multiply(steps - 1, last, acc);
    }
}

/// The weights of a lane as floats, entry by entry.
///
/// # Safety
/// The machine has AVX-512; `w` is a chunk of the storage with 16 lanes of as many entries as `out` has.
pub(super) unsafe fn widen_lane(storage: Storage, lane: usize, w: &[u8], out: &mut [[f32; TILE_OUTPUTS]]) {
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
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
unsafe fn widen<const KIND: u8>(lane: usize, w: &[u8], out: &mut [[f32; TILE_OUTPUTS]]) {
    let steps = out.len();
    let factors = (steps * LANES).div_ceil(block_steps(KIND) * LANES) * factor_bytes(KIND);
    for (block, out) in out.chunks_mut(block_steps(KIND)).enumerate() {
        let first = lane * steps + block * block_steps(KIND);
        // SAFETY: the block is one of the chunk, its entries are inside the slice, and each has room for 16 floats.
        unsafe {
            let by = load_factors::<KIND>(w.as_ptr().add(block * factor_bytes(KIND)));
            for (step, out) in out.iter_mut().enumerate() {
                let at = w.as_ptr().add(factors + (first + step) * entry_bytes(KIND));
                fetch_ahead(at, entry_bytes(KIND));
                _mm512_storeu_ps(out.as_mut_ptr(), _mm512_mul_ps(load_codes::<KIND>(at), by));
            }
        }
    }
}

/// The factors of 16 outputs.
///
/// # Safety
/// They are readable at `at`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
unsafe fn load_factors<const KIND: u8>(at: *const u8) -> __m512 {
    // SAFETY: the caller promises 32 bytes or 4; the loads need no alignment.
    unsafe {
        if KIND == MXFP4 {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(at.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        } else {
            _mm512_set1_ps(at.cast::<f32>().read_unaligned())
        }
    }
}

/// The codes of two entries as floats, as of [`load_codes`].
///
/// # Safety
/// They are readable at `at`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
unsafe fn load_two<const KIND: u8>(at: *const u8) -> [__m512; 2] {
    // SAFETY: the caller promises 16 bytes or 32; the loads need no alignment.
    unsafe {
        if KIND == MXFP4 {
            return [load_codes::<KIND>(at), load_codes::<KIND>(at.add(entry_bytes(KIND)))];
        }
        let words = _mm512_cvtepu8_epi16(_mm256_loadu_si256(at.cast()));
        let rest = _mm512_and_si512(_mm512_slli_epi16::<7>(words), _mm512_set1_epi16(0x3f80));
        let signs = _mm512_set1_epi16(i16::MIN);
        // The sign where the mask is set, the rest elsewhere.
        let halves = _mm512_ternarylogic_epi32::<0xe4>(_mm512_slli_epi16::<8>(words), rest, signs);
        [_mm512_castsi512_si256(halves), _mm512_extracti64x4_epi64::<1>(halves)]
            .map(|half| _mm512_cvtph_ps(half))
    }
}

/// The codes of 16 outputs as floats: twice what MXFP4's mean, a 256th of what E4M3's do.
///
/// # Safety
/// They are readable at `at`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx2,fma,f16c")]
unsafe fn load_codes<const KIND: u8>(at: *const u8) -> __m512 {
    // SAFETY: the caller promises 8 bytes or 16; the loads need no alignment.
    unsafe {
        if KIND == MXFP4 {
            // The first eight outputs are the lower halves of the bytes, the others the upper ones; a look-up reads four bits.
            let pairs = _mm512_broadcast_i64x4(_mm256_cvtepu8_epi32(_mm_loadl_epi64(at.cast())));
            let counts = _mm512_set_epi64(4 << 32 | 4, 4 << 32 | 4, 4 << 32 | 4, 4 << 32 | 4, 0, 0, 0, 0);
            // The sign of a zero is lost: no sum that begins with +0 can tell.
            let table = _mm512_setr_ps(
                0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 0.0, -1.0, -2.0, -3.0, -4.0, -6.0, -8.0, -12.0,
            );
            _mm512_permutexvar_ps(_mm512_srlv_epi32(pairs, counts), table)
        } else {
            let words = _mm256_cvtepu8_epi16(_mm_loadu_si128(at.cast()));
            let sign = _mm256_and_si256(_mm256_slli_epi16::<8>(words), _mm256_set1_epi16(i16::MIN));
            let rest = _mm256_and_si256(_mm256_slli_epi16::<7>(words), _mm256_set1_epi16(0x3f80));
            // As binary16 its exponent is 8 less: the conversion is exact, small numbers included.
            _mm512_cvtph_ps(_mm256_or_si256(sign, rest))
        }
    }
}
