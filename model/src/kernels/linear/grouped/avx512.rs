//! The AVX-512 forms: a vector is four inputs, or eight halves, of the 16 outputs of a tile. Weights are unsigned, as they
//! are packed; the sum of the other side times the bias, which is subtracted first, makes up for it.

use super::{
    GROUP_VECTOR_BYTES, GROUP_WORDS, Quantised, Rows, Sums, TILE_OUTPUTS, fetch_groups_ahead, place_of_group,
};
use crate::kernels::Isa;
use std::arch::x86_64::*;

/// So many rows of a block, at most, go through weights faster than memory brings them.
const ROWS_THAT_WAIT: usize = 4;

pub(super) fn block_sums(kind: Quantised, x: Rows<'_>, w: &[&[u8]], sums: &mut [Sums]) {
    assert!(Isa::Avx512.available(), "this machine lacks AVX-512 with VNNI");
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
    // SAFETY: the caller's promise is passed on with the rows and tiles as constants.
    unsafe {
        match (x.rows, w) {
            (2, &[a, b]) => of_rows::<Q4, 2, 2>(x, [a, b], sums),
            (3, &[a, b]) => of_rows::<Q4, 3, 2>(x, [a, b], sums),
            (4, &[a, b]) => of_rows::<Q4, 4, 2>(x, [a, b], sums),
            (5, &[a, b]) => of_rows::<Q4, 5, 2>(x, [a, b], sums),
            (6, &[a, b]) => of_rows::<Q4, 6, 2>(x, [a, b], sums),
            (1, &[a]) => of_rows::<Q4, 1, 1>(x, [a], sums),
            (2, &[a]) => of_rows::<Q4, 2, 1>(x, [a], sums),
            (3, &[a]) => of_rows::<Q4, 3, 1>(x, [a], sums),
            (4, &[a]) => of_rows::<Q4, 4, 1>(x, [a], sums),
            (5, &[a]) => of_rows::<Q4, 5, 1>(x, [a], sums),
            (6, &[a]) => of_rows::<Q4, 6, 1>(x, [a], sums),
            _ => unreachable!("a block has 1 to 6 rows, and 1 tile or, of several rows, 2"),
        }
    }
}

/// # Safety
/// As of [`of_kind`], with `ROWS` rows.
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
unsafe fn of_rows<const Q4: bool, const ROWS: usize, const TILES: usize>(
    x: Rows<'_>,
    w: [&[u8]; TILES],
    sums: &mut [Sums],
) {
    let kind = if Q4 { Quantised::Q4 } else { Quantised::Q8 };
    let nibble = _mm512_set1_epi8(15);
    let mut acc = [[_mm512_setzero_ps(); TILES]; ROWS];
    for group in 0..x.groups {
        let (scales, codes) = place_of_group(kind, group, x.groups);
        // SAFETY: the group is one of the rows and of every tile, whose vectors and scales are inside of the slices; the
        // loads need no alignment.
        unsafe {
            let at = x.words.as_ptr().add(group * ROWS * GROUP_WORDS).cast::<i32>();
            let mut dots = [[_mm512_setzero_si512(); TILES]; ROWS];
            for (row, dots) in dots.iter_mut().enumerate() {
                *dots = [_mm512_set1_epi32(*at.add(row)); TILES];
            }
            let fours = at.add(2 * ROWS);
            if ROWS <= ROWS_THAT_WAIT {
                for w in w {
                    fetch_groups_ahead(w, group, kind, scales);
                }
            }
            for vector in 0..kind.code_bytes() / 4 {
                let weights = load_vectors(w, codes + vector * GROUP_VECTOR_BYTES);
                if !Q4 {
                    multiply(fours.add(vector * ROWS), weights, &mut dots);
                    continue;
                }
                let (mut low, mut high) = (weights, weights);
                for (low, high) in low.iter_mut().zip(&mut high) {
                    *high = _mm512_and_si512(_mm512_srli_epi16::<4>(*low), nibble);
                    *low = _mm512_and_si512(*low, nibble);
                }
                multiply(fours.add(vector * ROWS), low, &mut dots);
                multiply(fours.add((vector + 4) * ROWS), high, &mut dots);
            }
            for (tile, w) in w.iter().enumerate() {
                let scales = _mm512_cvtph_ps(_mm256_loadu_si256(w.as_ptr().add(scales).cast()));
                for row in 0..ROWS {
                    let factor = _mm512_mul_ps(scales, _mm512_set1_ps(*at.add(ROWS + row).cast::<f32>()));
                    let dot = _mm512_cvtepi32_ps(dots[row][tile]);
                    acc[row][tile] = _mm512_fmadd_ps(factor, dot, acc[row][tile]);
                }
            }
        }
    }
    for (sums, acc) in sums.iter_mut().zip(acc) {
        for (sums, acc) in sums.as_chunks_mut::<TILE_OUTPUTS>().0.iter_mut().zip(acc) {
            // SAFETY: the chunk is sixteen floats; the store needs no alignment.
            unsafe { _mm512_storeu_ps(sums.as_mut_ptr(), acc) };
        }
    }
}

/// A vector of each tile. No closure: one would not be compiled into a loop with these features.
///
/// # Safety
/// It is readable at `at` in every tile.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
unsafe fn load_vectors<const TILES: usize>(w: [&[u8]; TILES], at: usize) -> [__m512i; TILES] {
    let mut vectors = [_mm512_setzero_si512(); TILES];
    for (vector, w) in vectors.iter_mut().zip(w) {
        // SAFETY: the caller's promise; the load needs no alignment.
        *vector = unsafe { _mm512_loadu_si512(w.as_ptr().add(at).cast()) };
    }
    vectors
}

/// Adds the products of four inputs of each row with those of the outputs of each tile.
///
/// # Safety
/// `ROWS` words are readable at `fours`.
#[inline]
#[target_feature(enable = "avx512f,avx512bw,avx512vnni,avx2,fma,f16c")]
unsafe fn multiply<const ROWS: usize, const TILES: usize>(
    fours: *const i32,
    weights: [__m512i; TILES],
    dots: &mut [[__m512i; TILES]; ROWS],
) {
    for (row, dots) in dots.iter_mut().enumerate() {
        // SAFETY: row < ROWS.
        let four = _mm512_set1_epi32(unsafe { *fours.add(row) });
        for (dot, weights) in dots.iter_mut().zip(weights) {
            *dot = _mm512_dpbusd_epi32(*dot, weights, four);
        }
    }
}
