//! The AVX-512 forms of a chunk for several rows: the 16 outputs of a tile are one register.
//!
//! A block of rows goes through two tiles at once: enough chains are under way to hide the latency of fma, and each input is
//! fetched once for both. A tile that is left alone has two blocks of rows take turns with it. The first block of a lane asks ahead.
//! One row of floats waits for memory, and has the AVX2 forms.

use super::{
    BLOCK_ROWS, CHUNK, DType, LANES, Storage, TILE_OUTPUTS, TILES_OF_ROWS, avx2, blocks, fetch_ahead,
};
use std::arch::x86_64::*;

mod scaled;

pub(super) fn chunk_sums(storage: Storage, x: &[f32], w: &[&[u8]], sums: &mut [[f32; TILE_OUTPUTS]]) {
    assert!((1..=TILES_OF_ROWS).contains(&w.len()) && sums.len().is_multiple_of(w.len()));
    let rows = sums.len() / w.len();
    assert!(crate::kernels::Isa::Avx512.available(), "this machine lacks AVX-512");
    // The slices hold whole lanes: the pointer arithmetic below relies on these equations.
    let entries = x.len() / rows;
    assert!(x.len() == entries * rows && entries.is_multiple_of(LANES) && entries <= CHUNK);
    assert!(w.iter().all(|w| w.len() == storage.chunk_bytes(entries)));
    let is_plain = matches!(storage, Storage::Plain(_));
    if rows <= if is_plain { 1 } else { BLOCK_ROWS } {
        for (w, sums) in w.iter().zip(sums.chunks_exact_mut(rows)) {
            match is_plain {
                true => avx2::chunk_sums(storage, x, w, sums),
                // SAFETY: as below.
                false => unsafe { scaled::few_rows(storage, x, w, entries / LANES, sums) },
            }
        }
        return;
    }
    // SAFETY: the features were just checked, and the slices hold whole chunks of so many entries.
    unsafe {
        match *w {
            [one] => tiles(storage, x, [one], sums),
            [one, two] => tiles(storage, x, [one, two], sums),
            _ => unreachable!("one tile or two, as was just checked"),
        }
    }
}

/// # Safety
/// Each of `w` is a chunk of the storage, `x` has as many groups of one value for each row, and `sums` a row for each and tile.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
unsafe fn tiles<const TILES: usize>(
    storage: Storage,
    x: &[f32],
    w: [&[u8]; TILES],
    sums: &mut [[f32; TILE_OUTPUTS]],
) {
    let lane_values = x.len() / LANES;
    let steps = lane_values / (sums.len() / TILES);
    let mut widened = [[[0.0; TILE_OUTPUTS]; CHUNK / LANES]; TILES];
    for lane in 0..LANES {
        let x = &x[lane * lane_values..][..lane_values];
        let of_lane = w.map(|w| w[lane * (w.len() / LANES)..].as_ptr());
        // SAFETY: a sixteenth of what the caller promises: `steps` entries of the type that the constant stands for. What is widened
        // has room for as many of one tile, and is as f32 then.
        unsafe {
            match storage {
                Storage::Plain(DType::F32) => lane_of_rows::<0, TILES>(x, of_lane, steps, lane == 0, sums),
                Storage::Plain(DType::Bf16) => lane_of_rows::<1, TILES>(x, of_lane, steps, lane == 0, sums),
                Storage::Plain(DType::F16) => lane_of_rows::<2, TILES>(x, of_lane, steps, lane == 0, sums),
                _ => {
                    for (w, widened) in w.iter().zip(&mut widened) {
                        scaled::widen_lane(storage, lane, w, &mut widened[..steps]);
                    }
                    let widened = widened.each_ref().map(|widened| widened.as_ptr().cast());
                    lane_of_rows::<0, TILES>(x, widened, steps, lane == 0, sums);
                }
            }
        }
    }
    if storage == Storage::Plain(DType::F16) {
        sums.iter_mut().for_each(avx2::reorder_f16);
    }
}

/// One lane for all blocks of rows.
///
/// # Safety
/// Each of `w` points to `steps` entries of the type, `x` has as many groups of one value for each row, and `sums` a row for each
/// and tile.
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
unsafe fn lane_of_rows<const TYPE: u8, const TILES: usize>(
    x: &[f32],
    w: [*const u8; TILES],
    steps: usize,
    first: bool,
    sums: &mut [[f32; TILE_OUTPUTS]],
) {
    let rows = sums.len() / TILES;
    let mut blocks = blocks(rows).peekable();
    while let Some(block) = blocks.next() {
        let two = blocks.next_if(|next| TILES == 1 && next.len() == block.len());
        let end = two.as_ref().map_or(block.end, |two| two.end);
        let lane = Lane { x: &x[block.start * steps..end * steps], w, steps, first, rows, row: block.start };
        // SAFETY: the caller's promise is passed on with the rows and blocks as constants.
        unsafe {
            match (block.len(), two.is_some()) {
                (1, false) => lane.of_blocks::<TYPE, 1, 1>(sums),
                (2, false) => lane.of_blocks::<TYPE, 2, 1>(sums),
                (3, false) => lane.of_blocks::<TYPE, 3, 1>(sums),
                (4, false) => lane.of_blocks::<TYPE, 4, 1>(sums),
                (5, false) => lane.of_blocks::<TYPE, 5, 1>(sums),
                (6, false) => lane.of_blocks::<TYPE, 6, 1>(sums),
                (3, true) => lane.of_blocks::<TYPE, 3, 2>(sums),
                (4, true) => lane.of_blocks::<TYPE, 4, 2>(sums),
                (5, true) => lane.of_blocks::<TYPE, 5, 2>(sums),
                (6, true) => lane.of_blocks::<TYPE, 6, 2>(sums),
                _ => unreachable!("a block has 1 to 6 rows, and one of many 3 at least"),
            }
        }
    }
}

/// A lane of some tiles, and the rows that it is for.
struct Lane<'a, const TILES: usize> {
    x: &'a [f32],
    w: [*const u8; TILES],
    steps: usize,
    /// Whether it is the first one of the chunk.
    first: bool,
    /// Rows of all blocks.
    rows: usize,
    /// The first row of these.
    row: usize,
}

impl<const TILES: usize> Lane<'_, TILES> {
    /// # Safety
    /// Each of `w` points to `steps` entries of the type; `x` has `BLOCKS` times as many groups of `ROWS` values, block by block, and
    /// `sums` has `rows` rows for each tile, of which these are some.
    #[inline]
    #[target_feature(enable = "avx512f,avx2,fma,f16c")]
    unsafe fn of_blocks<const TYPE: u8, const ROWS: usize, const BLOCKS: usize>(
        &self,
        sums: &mut [[f32; TILE_OUTPUTS]],
    ) {
        let entry = if TYPE == 0 { 64 } else { 32 };
        let mut acc = [[[_mm512_setzero_ps(); ROWS]; BLOCKS]; TILES];
        for step in 0..self.steps {
            // SAFETY: step < steps, block < BLOCKS and row < ROWS, so that the entries and the values are inside the slices.
            unsafe {
                let mut weights = [_mm512_setzero_ps(); TILES];
                for (weights, w) in weights.iter_mut().zip(self.w) {
                    let at = w.add(step * entry);
                    if self.row == 0 {
                        fetch_ahead(at, entry);
                    }
                    *weights = load_entry::<TYPE>(at);
                }
                for block in 0..BLOCKS {
                    let x = self.x.as_ptr().add((block * self.steps + step) * ROWS);
                    for row in 0..ROWS {
                        let x = _mm512_set1_ps(*x.add(row));
                        for (acc, weights) in acc.iter_mut().zip(weights) {
                            acc[block][row] = _mm512_fmadd_ps(x, weights, acc[block][row]);
                        }
                    }
                }
            }
        }
        for (tile, acc) in acc.iter().enumerate() {
            let sums = &mut sums[tile * self.rows + self.row..][..BLOCKS * ROWS];
            for (sums, acc) in sums.iter_mut().zip(acc.as_flattened()) {
                add_sums(*acc, self.first, sums);
            }
        }
    }
}

/// Adds the results of a lane to the sums or, for the first lane, puts them there.
#[inline]
#[target_feature(enable = "avx512f,avx2,fma,f16c")]
fn add_sums(acc: __m512, first: bool, sums: &mut [f32; TILE_OUTPUTS]) {
    let at = sums.as_mut_ptr();
    // SAFETY: `sums` is sixteen floats, one register; the accesses need no alignment.
    unsafe {
        let sum = if first { acc } else { _mm512_add_ps(_mm512_loadu_ps(at), acc) };
        _mm512_storeu_ps(at, sum);
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
