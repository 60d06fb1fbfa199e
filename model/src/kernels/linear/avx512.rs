//! The AVX-512 forms of a chunk for several rows: the 16 outputs of a tile are one register.
//!
//! Two blocks of rows take turns with each register of weights, so that enough chains are under way to hide the latency of
//! fma. One row waits for memory, and has the AVX2 forms.

use super::{CHUNK, DType, LANES, Storage, TILE_OUTPUTS, avx2, blocks};
use std::arch::x86_64::*;

/// Rows from which on a lane of 16-bit weights is widened once instead of for every two blocks.
const WIDEN_FROM_ROWS: usize = 64;

pub(super) fn chunk_sums(storage: Storage, x: &[f32], w: &[u8], sums: &mut [[f32; TILE_OUTPUTS]]) {
    let few = if matches!(storage, Storage::Plain(_)) { 1 } else { super::BLOCK_ROWS };
    if sums.len() <= few {
        return avx2::chunk_sums(storage, x, w, sums);
    }
    assert!(crate::kernels::Isa::Avx512.available(), "this machine lacks AVX-512");
    // Both slices hold whole lanes: the pointer arithmetic below relies on these equations.
    let rows = sums.len();
    let entries = x.len() / rows;
    assert!(x.len() == entries * rows && entries.is_multiple_of(LANES) && entries <= CHUNK);
    assert_eq!(w.len(), storage.chunk_bytes(entries));
    let steps = entries / LANES;
    // SAFETY: the features were just checked, and the slices hold `16 * steps` entries each, of the type that the
    // constant stands for.
    unsafe {
        match storage {
            Storage::Plain(DType::F32) => lanes::<0>(x, w, steps, sums),
            Storage::Plain(DType::Bf16) if rows < WIDEN_FROM_ROWS => lanes::<1>(x, w, steps, sums),
            Storage::Plain(DType::F16) if rows < WIDEN_FROM_ROWS => {
                lanes::<2>(x, w, steps, sums);
                sums.iter_mut().for_each(avx2::reorder_f16);
            }
            _ => widened(storage, x, w, steps, sums),
        }
    }
}

/// # Safety
/// `w` holds `16 * steps` entries of the type and `x` as many groups of one value for each row.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
unsafe fn lanes<const TYPE: u8>(x: &[f32], w: &[u8], steps: usize, sums: &mut [[f32; TILE_OUTPUTS]]) {
    for lane in 0..LANES {
        let w = &w[lane * (w.len() / LANES)..][..w.len() / LANES];
        let x = &x[lane * (x.len() / LANES)..][..x.len() / LANES];
        // SAFETY: a sixteenth of what the caller promises.
        unsafe { lane_of_rows::<TYPE>(x, w, steps, lane == 0, sums) };
    }
}

/// As [`lanes`], with every lane widened before its use.
///
/// # Safety
/// `w` is a chunk of `16 * steps` entries and `x` has as many groups of one value for each row.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
unsafe fn widened(storage: Storage, x: &[f32], w: &[u8], steps: usize, sums: &mut [[f32; TILE_OUTPUTS]]) {
    let mut widened = [0.0f32; CHUNK / LANES * TILE_OUTPUTS];
    let widened = &mut widened[..steps * TILE_OUTPUTS];
    for lane in 0..LANES {
        let x = &x[lane * (x.len() / LANES)..][..x.len() / LANES];
        // SAFETY: the caller's promise, with room for the entries of one lane; then a sixteenth of it, as f32.
        unsafe {
            avx2::widen(storage, lane, w, widened);
            lane_of_rows::<0>(x, bytemuck::cast_slice(widened), steps, lane == 0, sums);
        }
    }
}

/// One lane for all blocks of rows, two of them together where they have as many rows.
///
/// # Safety
/// `w` holds `steps` entries of the type and `x` as many groups of one value for each row.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
unsafe fn lane_of_rows<const TYPE: u8>(
    x: &[f32],
    w: &[u8],
    steps: usize,
    first: bool,
    sums: &mut [[f32; TILE_OUTPUTS]],
) {
    let mut blocks = blocks(sums.len()).peekable();
    while let Some(block) = blocks.next() {
        let two = blocks.next_if(|next| next.len() == block.len());
        let (start, rows) = (block.start, block.len());
        let end = two.as_ref().map_or(block.end, |two| two.end);
        let x = &x[start * steps..end * steps];
        let sums = &mut sums[start..end];
        // SAFETY: the caller's promise is passed on with the rows and blocks as constants.
        unsafe {
            match (rows, two.is_some()) {
                (1, false) => lane_of_blocks::<TYPE, 1, 1>(x, w, steps, first, sums),
                (2, false) => lane_of_blocks::<TYPE, 2, 1>(x, w, steps, first, sums),
                (3, false) => lane_of_blocks::<TYPE, 3, 1>(x, w, steps, first, sums),
                (4, false) => lane_of_blocks::<TYPE, 4, 1>(x, w, steps, first, sums),
                (5, false) => lane_of_blocks::<TYPE, 5, 1>(x, w, steps, first, sums),
                (6, false) => lane_of_blocks::<TYPE, 6, 1>(x, w, steps, first, sums),
                (3, true) => lane_of_blocks::<TYPE, 3, 2>(x, w, steps, first, sums),
                (4, true) => lane_of_blocks::<TYPE, 4, 2>(x, w, steps, first, sums),
                (5, true) => lane_of_blocks::<TYPE, 5, 2>(x, w, steps, first, sums),
                (6, true) => lane_of_blocks::<TYPE, 6, 2>(x, w, steps, first, sums),
                _ => unreachable!("a block has 1 to 6 rows, and one of many 3 at least"),
            }
        }
    }
}

/// # Safety
/// `w` holds `steps` entries of the type; `x` has `BLOCKS` times as many groups of `ROWS` values, block by block, and
/// `sums` as many rows.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
unsafe fn lane_of_blocks<const TYPE: u8, const ROWS: usize, const BLOCKS: usize>(
    x: &[f32],
    w: &[u8],
    steps: usize,
    first: bool,
    sums: &mut [[f32; TILE_OUTPUTS]],
) {
    let entry = if TYPE == 0 { 64 } else { 32 };
    let mut acc = [[_mm512_setzero_ps(); ROWS]; BLOCKS];
    for step in 0..steps {
        // SAFETY: step < steps, block < BLOCKS and row < ROWS, so that the entry and the values are inside the slices.
        unsafe {
            let weights = load_entry::<TYPE>(w.as_ptr().add(step * entry));
            for (block, acc) in acc.iter_mut().enumerate() {
                let x = x.as_ptr().add((block * steps + step) * ROWS);
                for (row, acc) in acc.iter_mut().enumerate() {
                    *acc = _mm512_fmadd_ps(_mm512_set1_ps(*x.add(row)), weights, *acc);
                }
            }
        }
    }
    for (sums, acc) in sums.iter_mut().zip(acc.as_flattened()) {
        let at = sums.as_mut_ptr();
        // SAFETY: `sums` is sixteen floats, one register; the accesses need no alignment.
        unsafe {
            let sum = if first { *acc } else { _mm512_add_ps(_mm512_loadu_ps(at), *acc) };
            _mm512_storeu_ps(at, sum);
        }
    }
}

/// # Safety
/// An entry of the type is readable at `at`.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
unsafe fn load_entry<const TYPE: u8>(at: *const u8) -> __m512 {
    // SAFETY: the caller promises 64 bytes for type 0 and 32 for the others; the loads need no alignment.
    unsafe {
        match TYPE {
            0 => _mm512_loadu_ps(at.cast()),
            1 => {
                // The first eight outputs are the lower halves of the words, the others the upper ones.
                let twice = _mm512_broadcast_i64x4(_mm256_loadu_si256(at.cast()));
                let counts =
                    _mm512_set_epi64(0, 0, 0, 0, 16 << 32 | 16, 16 << 32 | 16, 16 << 32 | 16, 16 << 32 | 16);
                let upper = _mm512_set1_epi32(0xffff_0000_u32 as i32);
                _mm512_castsi512_ps(_mm512_and_si512(_mm512_sllv_epi32(twice, counts), upper))
            }
            _ => _mm512_cvtph_ps(_mm256_loadu_si256(at.cast())),
        }
    }
}
