//! The AVX2 forms of a chunk: 16 outputs in two registers.
//!
//! A decode step has few rows and waits for memory, or has several lanes in flight to hide the latency of fma. A prefill
//! has many: a lane of the weights stays in the first-level cache, widened where that pays, for every block of rows.

use super::{BLOCK_ROWS, CHUNK, DType, LANES, Storage, TILE_OUTPUTS, blocks, fetch_ahead, scaled};
use std::arch::x86_64::*;

/// Which output stands where in the two registers that binary16 entries widen to.
const F16_ORDER: [usize; TILE_OUTPUTS] = [0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15];
/// Rows from which on a lane of 16-bit weights is widened once instead of for every block.
const WIDEN_FROM_ROWS: usize = 64;

pub(super) fn chunk_sums(storage: Storage, x: &[f32], w: &[u8], sums: &mut [[f32; TILE_OUTPUTS]]) {
    assert!(crate::kernels::Isa::Avx2.available(), "this machine lacks AVX2, FMA or F16C");
    // Both slices hold whole lanes: the pointer arithmetic below relies on these equations.
    let rows = sums.len();
    let entries = x.len() / rows;
    assert!(x.len() == entries * rows && entries.is_multiple_of(LANES) && entries <= CHUNK);
    assert_eq!(w.len(), storage.chunk_bytes(entries));
    let steps = entries / LANES;
    let Storage::Plain(dtype) = storage else {
        // SAFETY: the features were just checked, and the slices hold `16 * steps` entries each.
        return unsafe {
            if rows > BLOCK_ROWS {
                widened(storage, x, w, steps, sums);
            } else {
                scaled::few_rows(storage, x, w, steps, sums);
            }
        };
    };
    let widen = dtype != DType::F32 && rows >= WIDEN_FROM_ROWS;
    // SAFETY: the features were just checked, and the slices hold `16 * steps` entries each, of the type that the
    // constant stands for.
    unsafe {
        match dtype {
            _ if widen => widened(storage, x, w, steps, sums),
            DType::F32 if rows > BLOCK_ROWS => many_rows::<0>(x, w, steps, sums),
            DType::Bf16 if rows > BLOCK_ROWS => many_rows::<1>(x, w, steps, sums),
            DType::F16 if rows > BLOCK_ROWS => many_rows::<2>(x, w, steps, sums),
            DType::F32 => few_rows::<0>(x, w, steps, sums),
            DType::Bf16 => few_rows::<1>(x, w, steps, sums),
            DType::F16 => few_rows::<2>(x, w, steps, sums),
        }
    }
    if dtype == DType::F16 && !widen {
        sums.iter_mut().for_each(reorder_f16);
    }
}

pub(super) fn reorder_f16(sums: &mut [f32; TILE_OUTPUTS]) {
    let stored = *sums;
    for (value, output) in stored.iter().zip(F16_ORDER) {
        sums[output] = *value;
    }
}

/// # Safety
/// `w` holds `16 * steps` entries of the type and `x` as many groups of one value for each row.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn few_rows<const TYPE: u8>(x: &[f32], w: &[u8], steps: usize, sums: &mut [[f32; TILE_OUTPUTS]]) {
    // SAFETY: the caller's promise is passed on with the rows as the constant.
    unsafe {
        match sums.len() {
            // One row waits for memory, which gives the most in one stream: lanes one after the other.
            1 => lanes_in_flight::<TYPE, 1, 1>(x, w, steps, sums),
            2 => lanes_in_flight::<TYPE, 2, 2>(x, w, steps, sums),
            3 => lanes_in_flight::<TYPE, 3, 2>(x, w, steps, sums),
            4 => lanes_in_flight::<TYPE, 4, 1>(x, w, steps, sums),
            5 => lanes_in_flight::<TYPE, 5, 1>(x, w, steps, sums),
            6 => lanes_in_flight::<TYPE, 6, 1>(x, w, steps, sums),
            _ => unreachable!("a block has 1 to 6 rows"),
        }
    }
}

/// `ROWS` rows by 16 outputs, `FLIGHT` lanes at a time; the lanes' sums are added in ascending order.
///
/// # Safety
/// `w` holds `16 * steps` entries of the type and `x` as many groups of `ROWS` values.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn lanes_in_flight<const TYPE: u8, const ROWS: usize, const FLIGHT: usize>(
    x: &[f32],
    w: &[u8],
    steps: usize,
    sums: &mut [[f32; TILE_OUTPUTS]],
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
                    fetch_ahead(at, entry);
                    let weights = load_entry::<TYPE>(at);
                    multiply(x_first.add(index * ROWS), weights, acc);
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

/// Lanes outside, blocks of rows inside: the entries of a lane stay in the first-level cache.
///
/// # Safety
/// `w` holds `16 * steps` entries of the type and `x` as many groups of one value for each row.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn many_rows<const TYPE: u8>(x: &[f32], w: &[u8], steps: usize, sums: &mut [[f32; TILE_OUTPUTS]]) {
    for lane in 0..LANES {
        let w = &w[lane * (w.len() / LANES)..][..w.len() / LANES];
        let x = &x[lane * (x.len() / LANES)..][..x.len() / LANES];
        // SAFETY: a sixteenth of what the caller promises.
        unsafe { lane_of_rows::<TYPE>(x, w, steps, lane == 0, sums) };
    }
}

/// As [`many_rows`], with every lane widened before its use.
///
/// # Safety
/// `w` is a chunk of `16 * steps` entries, of 16 bits or quantised, and `x` has as many groups of one value for each row.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn widened(storage: Storage, x: &[f32], w: &[u8], steps: usize, sums: &mut [[f32; TILE_OUTPUTS]]) {
    let mut widened = [0.0f32; CHUNK / LANES * TILE_OUTPUTS];
    let widened = &mut widened[..steps * TILE_OUTPUTS];
    for lane in 0..LANES {
        let x = &x[lane * (x.len() / LANES)..][..x.len() / LANES];
        // SAFETY: the caller's promise, with room for the entries of one lane; then a sixteenth of it, as f32.
        unsafe {
            widen(storage, lane, w, widened);
            lane_of_rows::<0>(x, bytemuck::cast_slice(widened), steps, lane == 0, sums);
        }
    }
}

/// Widens a lane of a chunk to 16 floats for each of its entries, in the order of the outputs.
///
/// # Safety
/// `w` is a chunk of the storage, and `widened` has room for the entries of one of its lanes.
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn widen(storage: Storage, lane: usize, w: &[u8], widened: &mut [f32]) {
    match storage {
        Storage::Plain(DType::F32) => unreachable!("that is as wide as it gets"),
        Storage::Plain(dtype) => {
            widen_lane(dtype, &w[lane * (w.len() / LANES)..][..w.len() / LANES], widened)
        }
        // SAFETY: the caller's promise.
        Storage::Mxfp4 | Storage::E4m3 => unsafe { scaled::widen_lane(storage, lane, w, widened) },
        Storage::Grouped(_) => unreachable!("integers have products of their own"),
    }
}

/// Widens 16-bit entries to 16 floats each, in the order of the outputs. It asks for those that follow.
#[target_feature(enable = "avx2,fma,f16c")]
fn widen_lane(dtype: DType, w: &[u8], out: &mut [f32]) {
    let lower = _mm256_set1_epi32(0xffff);
    for (entry, out) in w.as_chunks::<32>().0.iter().zip(out.as_chunks_mut::<16>().0) {
        fetch_ahead(entry.as_ptr(), entry.len());
        // SAFETY: the entry is 32 bytes and `out` 16 floats; the accesses need no alignment.
        unsafe {
            let [low, high] = if dtype == DType::Bf16 {
                load_entry::<1>(entry.as_ptr())
            } else {
                let pairs = _mm256_loadu_si256(entry.as_ptr().cast());
                [_mm256_and_si256(pairs, lower), _mm256_srli_epi32::<16>(pairs)].map(|words| {
                    let halves = _mm256_permute4x64_epi64::<0b1000>(_mm256_packus_epi32(words, words));
                    _mm256_cvtph_ps(_mm256_castsi256_si128(halves))
                })
            };
            _mm256_storeu_ps(out.as_mut_ptr(), low);
            _mm256_storeu_ps(out.as_mut_ptr().add(8), high);
        }
    }
}

/// One lane for all blocks of rows.
///
/// # Safety
/// `w` holds `steps` entries of the type and `x` as many groups of one value for each row.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn lane_of_rows<const TYPE: u8>(
    x: &[f32],
    w: &[u8],
    steps: usize,
    first: bool,
    sums: &mut [[f32; TILE_OUTPUTS]],
) {
    for block in blocks(sums.len()) {
        let ahead = block.start == 0;
        let x = &x[block.start * steps..block.end * steps];
        let sums = &mut sums[block];
        // SAFETY: the caller's promise is passed on with the rows as the constant.
        unsafe {
            match sums.len() {
                1 => lane_of_block::<TYPE, 1>(x, w, steps, first, ahead, sums),
                2 => lane_of_block::<TYPE, 2>(x, w, steps, first, ahead, sums),
                3 => lane_of_block::<TYPE, 3>(x, w, steps, first, ahead, sums),
                4 => lane_of_block::<TYPE, 4>(x, w, steps, first, ahead, sums),
                5 => lane_of_block::<TYPE, 5>(x, w, steps, first, ahead, sums),
                6 => lane_of_block::<TYPE, 6>(x, w, steps, first, ahead, sums),
                _ => unreachable!("a block has 1 to 6 rows"),
            }
        }
    }
}

/// # Safety
/// `w` holds `steps` entries of the type, `x` as many groups of `ROWS` values, and `sums` has `ROWS` rows.
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn lane_of_block<const TYPE: u8, const ROWS: usize>(
    x: &[f32],
    w: &[u8],
    steps: usize,
    first: bool,
    ahead: bool,
    sums: &mut [[f32; TILE_OUTPUTS]],
) {
    let entry = if TYPE == 0 { 64 } else { 32 };
    let mut acc = [[_mm256_setzero_ps(); 2]; ROWS];
    for step in 0..steps {
        // SAFETY: step < steps, so that the entry and the group are inside the slices.
        unsafe {
            let at = w.as_ptr().add(step * entry);
            if ahead {
                fetch_ahead(at, entry);
            }
            let weights = load_entry::<TYPE>(at);
            multiply(x.as_ptr().add(step * ROWS), weights, &mut acc);
        }
    }
    for (sums, acc) in sums.iter_mut().zip(acc) {
        add_sums(acc, first, sums);
    }
}

/// `acc = fma(x, weights, acc)` for each row.
///
/// # Safety
/// `ROWS` values are readable at `x`.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) unsafe fn multiply<const ROWS: usize>(
    x: *const f32,
    [low, high]: [__m256; 2],
    acc: &mut [[__m256; 2]; ROWS],
) {
    for (row, acc) in acc.iter_mut().enumerate() {
        // SAFETY: row < ROWS.
        let x = unsafe { _mm256_broadcast_ss(&*x.add(row)) };
        acc[0] = _mm256_fmadd_ps(x, low, acc[0]);
        acc[1] = _mm256_fmadd_ps(x, high, acc[1]);
    }
}

/// Adds the results of a lane to the sums or, for the first lane, puts them there.
#[inline]
#[target_feature(enable = "avx2,fma,f16c")]
pub(super) fn add_sums([mut low, mut high]: [__m256; 2], first: bool, sums: &mut [f32; TILE_OUTPUTS]) {
    let at = sums.as_mut_ptr();
    // SAFETY: `sums` is sixteen floats, two registers; the accesses need no alignment.
    unsafe {
        if !first {
            low = _mm256_add_ps(_mm256_loadu_ps(at), low);
            high = _mm256_add_ps(_mm256_loadu_ps(at.add(8)), high);
        }
        _mm256_storeu_ps(at, low);
        _mm256_storeu_ps(at.add(8), high);
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
