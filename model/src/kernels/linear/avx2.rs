//! The AVX2 form of a chunk: 16 outputs in two registers, several rows or lanes in flight to hide the latency of fma.

use super::{BLOCK_ROWS, DType, LANES, TILE_OUTPUTS, entry_bytes};
use std::arch::x86_64::*;

/// Which output stands where in the two registers that binary16 entries widen to.
const F16_ORDER: [usize; TILE_OUTPUTS] = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15];

pub(super) fn chunk_sums(
    dtype: DType,
    x: &[f32],
    rows: usize,
    w: &[u8],
    sums: &mut [[f32; TILE_OUTPUTS]; BLOCK_ROWS],
) {
    assert!(crate::kernels::Isa::Avx2.available(), "this machine lacks AVX2, FMA or F16C");
    // Both slices hold whole lanes: the pointer arithmetic below relies on these two equations.
    let entries = w.len() / entry_bytes(dtype);
    assert_eq!(w.len() % (entry_bytes(dtype) * LANES), 0);
    assert_eq!(x.len(), entries * rows);
    // SAFETY: the features were just checked, and the slices hold `16 * steps` entries each.
    unsafe {
        match dtype {
            DType::F32 => by_rows::<0>(x, rows, w, entries / LANES, sums),
            DType::Bf16 => by_rows::<1>(x, rows, w, entries / LANES, sums),
            DType::F16 => {
                by_rows::<2>(x, rows, w, entries / LANES, sums);
                for sums in &mut sums[..rows] {
                    let stored = *sums;
                    for (value, output) in stored.iter().zip(F16_ORDER) {
                        sums[output] = *value;
                    }
                }
            }
        }
    }
}

/// # Safety
/// `w` holds `16 * steps` entries of the type and `x` as many groups of `rows` values.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn by_rows<const TYPE: u8>(
    x: &[f32],
    rows: usize,
    w: &[u8],
    steps: usize,
    sums: &mut [[f32; TILE_OUTPUTS]; BLOCK_ROWS],
) {
    // SAFETY: the caller's promise is passed on with `rows` as the constant.
    unsafe {
        match rows {
            1 => tile::<TYPE, 1, 4>(x, w, steps, sums),
            2 => tile::<TYPE, 2, 2>(x, w, steps, sums),
            3 => tile::<TYPE, 3, 2>(x, w, steps, sums),
            4 => tile::<TYPE, 4, 1>(x, w, steps, sums),
            5 => tile::<TYPE, 5, 1>(x, w, steps, sums),
            6 => tile::<TYPE, 6, 1>(x, w, steps, sums),
            _ => unreachable!("a block has 1 to 6 rows"),
        }
    }
}

/// `ROWS` rows by 16 outputs, `FLIGHT` lanes at a time; the lanes' sums are added in ascending order.
///
/// # Safety
/// `w` holds `16 * steps` entries of the type and `x` as many groups of `ROWS` values.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn tile<const TYPE: u8, const ROWS: usize, const FLIGHT: usize>(
    x: &[f32],
    w: &[u8],
    steps: usize,
    sums: &mut [[f32; TILE_OUTPUTS]; BLOCK_ROWS],
) {
    let entry = if TYPE == 0 { 64 } else { 32 };
    for group in 0..LANES / FLIGHT {
        let mut acc = [[[_mm256_setzero_ps(); 2]; ROWS]; FLIGHT];
        let first = group * FLIGHT * steps;
        // SAFETY: for lane < FLIGHT and step < steps the entry index is below 16 * steps, which both slices hold.
        unsafe {
            let x_first = x.as_ptr().add(first * ROWS);
            let w_first = w.as_ptr().add(first * entry);
            for step in 0..steps {
                for (lane, acc) in acc.iter_mut().enumerate() {
                    let index = lane * steps + step;
                    let at = w_first.add(index * entry);
                    if ROWS <= 2 {
                        // The weights are read once: what the next lanes need is asked for now. Each lane is a run too
                        // short for the hardware to see ahead.
                        _mm_prefetch::<_MM_HINT_T0>(at.wrapping_add(FLIGHT * steps * entry).cast());
                    }
                    let [low, high] = load_entry::<TYPE>(at);
                    for (row, acc) in acc.iter_mut().enumerate() {
                        let x = _mm256_broadcast_ss(&*x_first.add(index * ROWS + row));
                        acc[0] = _mm256_fmadd_ps(x, low, acc[0]);
                        acc[1] = _mm256_fmadd_ps(x, high, acc[1]);
                    }
                }
            }
        }
        for (lane, acc) in acc.iter().enumerate() {
            for (sums, acc) in sums.iter_mut().zip(acc) {
                let (low, high) = sums.split_at_mut(8);
                // SAFETY: each half of `sums` is eight floats, what an unaligned load or store takes.
                unsafe {
                    let [mut first, mut second] = *acc;
                    if group + lane > 0 {
                        first = _mm256_add_ps(_mm256_loadu_ps(low.as_ptr()), first);
                        second = _mm256_add_ps(_mm256_loadu_ps(high.as_ptr()), second);
                    }
                    _mm256_storeu_ps(low.as_mut_ptr(), first);
                    _mm256_storeu_ps(high.as_mut_ptr(), second);
                }
            }
        }
    }
}

/// # Safety
/// An entry of the type is readable at `at`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn load_entry<const TYPE: u8>(at: *const u8) -> [__m256; 2] {
    // SAFETY: the caller promises 64 bytes for type 0 and 32 for the others; the loads need no alignment.
    unsafe {
        match TYPE {
            0 => [_mm256_loadu_ps(at.cast()), _mm256_loadu_ps(at.add(32).cast())],
            1 => {
                let pairs = _mm256_loadu_si256(at.cast());
                let low = _mm256_slli_epi32::<16>(pairs);
                let high = _mm256_and_si256(pairs, _mm256_set1_epi32(0xffff_0000_u32 as i32));
                [_mm256_castsi256_ps(low), _mm256_castsi256_ps(high)]
            }
            _ => [
                _mm256_cvtph_ps(_mm_loadu_si128(at.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(at.add(16).cast())),
            ],
        }
    }
}
