//! What the memory of this machine delivers: the roof that runs are held against.

use memmap2::{Advice, MmapMut};
use std::hint::black_box;
use std::io;
use std::time::{Duration, Instant};

/// Words of the blocks that memory is read in, which several streams share out.
const BLOCK_WORDS: usize = 4 << 13;
/// Passes over the memory, half of them in one stream and half in four: the best of all counts, for neighbours only ever take
/// from it, and which way is faster is the machine's.
const PASSES: usize = 16;

/// Bytes that `threads` threads read from memory in a second: `bytes` of it, more than any cache has, in order, in one stream
/// each or in four, whichever is faster.
///
/// # Errors
/// If so much memory cannot be had.
pub fn memory_read(threads: usize, bytes: usize) -> io::Result<f64> {
    let threads = threads.max(1);
    let part = (bytes / threads / 8).next_multiple_of(BLOCK_WORDS);
    let mut map = MmapMut::map_anon(part * threads * 8)?;
    // As the arenas have it; without large pages the walks through page tables would be measured.
    let _ = map.advise(Advice::HugePage);
    map.fill(1);
    let words: &[u64] = bytemuck::cast_slice(&map);
    let mut best = Duration::MAX;
    for pass in 0..PASSES {
        let read = if pass.is_multiple_of(2) { sum_of_streams::<1> } else { sum_of_streams::<4> };
        let began = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks_exact(part) {
                scope.spawn(move || black_box(read(part)));
            }
        });
        best = best.min(began.elapsed());
    }
    Ok(map.len() as f64 / best.as_secs_f64())
}

/// Reads all of it, in some streams at a time. The sums are there so that it is read.
pub fn sum_of_streams<const STREAMS: usize>(all: &[u64]) -> [u64; 8] {
    const { assert!(BLOCK_WORDS.is_multiple_of(8 * STREAMS)) };
    let mut sums = [0u64; 8];
    for block in all.chunks_exact(BLOCK_WORDS) {
        let mut streams = block.chunks_exact(BLOCK_WORDS / STREAMS).map(|stream| stream.chunks_exact(8));
        let mut streams: [_; STREAMS] =
            std::array::from_fn(|_| streams.next().expect("as many as there are"));
        for _ in 0..BLOCK_WORDS / 8 / STREAMS {
            for stream in &mut streams {
                let line = stream.next().expect("as long as the others");
                sums.iter_mut().zip(line).for_each(|(sum, x)| *sum = sum.wrapping_add(*x));
            }
        }
    }
    sums
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_once() {
        let words: Vec<u64> = (0..3 * BLOCK_WORDS as u64).collect();
        for sums in [sum_of_streams::<1>(&words), sum_of_streams::<4>(&words)] {
            assert_eq!(sums.iter().sum::<u64>(), words.iter().sum::<u64>());
        }
        assert!(memory_read(2, 1 << 20).unwrap() > 0.0);
    }
}
