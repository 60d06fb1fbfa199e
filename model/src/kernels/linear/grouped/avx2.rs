//! The AVX2 forms: a vector is four inputs, or eight halves, of 8 outputs.
//!
//! Products of 8 bits are of the magnitude of the weights with inputs that have got their signs: both are at most 127 (the
//! weights 128), so that two of them fit 16 bits. Those of 4 bits are of unsigned weights, and eight times two fit.

use super::{GROUP_VECTOR_BYTES, GROUP_WORDS, Quantised, Rows, Sums, fetch_groups_ahead, place_of_group};
use crate::kernels::Isa;
use std::arch::x86_64::*;

/// Outputs of a half of a tile.
const HALF: usize = 8;

pub(super) fn block_sums(kind: Quantised, x: Rows<'_>, w: &[&[u8]], sums: &mut [Sums]) {
    assert!(Isa::Avx2.available(), "this machine lacks AVX2, FMA or F16C");
    // SAFETY: the features were just checked, and the caller has held the lengths against each other.
    unsafe {
        match kind {
            Quantised::Q8 => of_kind::<false>(x, w, sums),
            Quantised::Q4 => of_kind::<true>(x, w, sums),
        }
    }
}

/// # Safety
/// The machine has the features; the rows are those of `x`, and every `w` is a tile of the kind with its groups.
unsafe fn of_kind<const Q4: bool>(x: Rows<'_>, w: &[&[u8]], sums: &mut [Sums]) {
    if let (1, &[w]) = (x.rows, w) {
        // SAFETY: the caller's promise is passed on. A whole tile is one stream from memory.
        return unsafe { of_rows::<Q4, 1, 2>(x, [(w, 0), (w, 1)], 0, sums) };
    }
    for half in 0..2 * w.len() {
        let (of, at) = ([(w[half / 2], half % 2)], half * HALF);
        // SAFETY: the caller's promise is passed on with the rows as the constant.
        unsafe {
            match x.rows {
                2 => of_rows::<Q4, 2, 1>(x, of, at, sums),
                3 => of_rows::<Q4, 3, 1>(x, of, at, sums),
                4 => of_rows::<Q4, 4, 1>(x, of, at, sums),
                5 => of_rows::<Q4, 5, 1>(x, of, at, sums),
                6 => of_rows::<Q4, 6, 1>(x, of, at, sums),
                _ => unreachable!("a block has 1 to 6 rows, and 1 tile or, of several rows, 2"),
            }
        }
    }
}

/// Some halves of tiles, each with its tile; their results go to `first` and after it.
///
/// # Safety
/// As of [`of_kind`], with `ROWS` rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn of_rows<const Q4: bool, const ROWS: usize, const HALVES: usize>(
    x: Rows<'_>,
    w: [(&[u8], usize); HALVES],
    first: usize,
    sums: &mut [Sums],
) {
    let kind = if Q4 { Quantised::Q4 } else { Quantised::Q8 };
    let mut acc = [[_mm256_setzero_ps(); HALVES]; ROWS];
    for group in 0..x.groups {
        let (scales, codes) = place_of_group(kind, group, x.groups);
        // SAFETY: the group is one of the rows and of every tile, whose vectors and scales are inside of the slices; the
        // loads need no alignment.
        unsafe {
            let at = x.words.as_ptr().add(group * ROWS * GROUP_WORDS).cast::<i32>();
            if ROWS == 1 {
                fetch_groups_ahead(w[0].0, group, kind, scales);
            }
            // Neither here nor below closures: they would not be compiled into loops with these features.
            let mut halves = [std::ptr::null(); HALVES];
            for (half, (w, second)) in halves.iter_mut().zip(w) {
                *half = w.as_ptr().add(codes + second * GROUP_VECTOR_BYTES / 2);
            }
            let codes = halves;
            let dots =
                if Q4 { dots_of_4::<ROWS, HALVES>(at, codes) } else { dots_of_8(at.add(2 * ROWS), codes) };
            for (half, (w, second)) in w.into_iter().enumerate() {
                let scales = w.as_ptr().add(scales + second * HALF * 2);
                let scales = _mm256_cvtph_ps(_mm_loadu_si128(scales.cast()));
                for row in 0..ROWS {
                    let scale = _mm256_broadcast_ss(&*at.add(ROWS + row).cast::<f32>());
                    let factor = _mm256_mul_ps(scales, scale);
                    acc[row][half] =
                        _mm256_fmadd_ps(factor, _mm256_cvtepi32_ps(dots[row][half]), acc[row][half]);
                }
            }
        }
    }
    for (sums, acc) in sums.iter_mut().zip(acc) {
        for (sums, acc) in sums[first..].as_chunks_mut::<HALF>().0.iter_mut().zip(acc) {
            // SAFETY: the chunk is eight floats; the store needs no alignment.
            unsafe { _mm256_storeu_ps(sums.as_mut_ptr(), acc) };
        }
    }
}

/// The sums of a group, of weights of 8 bits.
///
/// # Safety
/// Eight times `ROWS` words are readable at `fours`, and the first half of eight vectors at each of `codes`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_of_8<const ROWS: usize, const HALVES: usize>(
    fours: *const i32,
    codes: [*const u8; HALVES],
) -> [[__m256i; HALVES]; ROWS] {
    let (bias, ones) = (_mm256_set1_epi8(i8::MIN), _mm256_set1_epi16(1));
    let mut dots = [[_mm256_setzero_si256(); HALVES]; ROWS];
    for vector in 0..8 {
        for (half, codes) in codes.iter().enumerate() {
            // SAFETY: the caller's promise; the load needs no alignment.
            let unsigned = unsafe { _mm256_loadu_si256(codes.add(vector * GROUP_VECTOR_BYTES).cast()) };
            let signed = _mm256_xor_si256(unsigned, bias);
            let magnitude = _mm256_abs_epi8(signed);
            for (row, dots) in dots.iter_mut().enumerate() {
                // SAFETY: row < ROWS.
                let four = _mm256_set1_epi32(unsafe { *fours.add(vector * ROWS + row) });
                let pairs = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(four, signed));
                dots[half] = _mm256_add_epi32(dots[half], _mm256_madd_epi16(pairs, ones));
            }
        }
    }
    dots
}

/// The sums of a group, of weights of 4 bits.
///
/// # Safety
/// A group of `ROWS` rows is readable at `x`, and the first half of four vectors at each of `codes`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn dots_of_4<const ROWS: usize, const HALVES: usize>(
    x: *const i32,
    codes: [*const u8; HALVES],
) -> [[__m256i; HALVES]; ROWS] {
    let (nibble, ones) = (_mm256_set1_epi8(15), _mm256_set1_epi16(1));
    let mut pairs = [[_mm256_setzero_si256(); HALVES]; ROWS];
    let mut dots = pairs;
    // SAFETY: the caller's promise; the loads need no alignment.
    unsafe {
        let fours = x.add(2 * ROWS);
        for vector in 0..4 {
            for (half, codes) in codes.iter().enumerate() {
                let two = _mm256_loadu_si256(codes.add(vector * GROUP_VECTOR_BYTES).cast());
                let low = _mm256_and_si256(two, nibble);
                let high = _mm256_and_si256(_mm256_srli_epi16::<4>(two), nibble);
                for (row, pairs) in pairs.iter_mut().enumerate() {
                    // At most 8 * 2 * 15 * 127.
                    let of_low =
                        _mm256_maddubs_epi16(low, _mm256_set1_epi32(*fours.add(vector * ROWS + row)));
                    let of_high =
                        _mm256_maddubs_epi16(high, _mm256_set1_epi32(*fours.add((vector + 4) * ROWS + row)));
                    pairs[half] = _mm256_add_epi16(pairs[half], _mm256_add_epi16(of_low, of_high));
                }
            }
        }
        for (row, (dots, pairs)) in dots.iter_mut().zip(pairs).enumerate() {
            let bias = _mm256_set1_epi32(*x.add(row));
            for (dot, pairs) in dots.iter_mut().zip(pairs) {
                *dot = _mm256_add_epi32(bias, _mm256_madd_epi16(pairs, ones));
            }
        }
    }
    dots
}
