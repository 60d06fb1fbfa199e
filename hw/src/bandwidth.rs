//! What the memory of this machine delivers: the roof that runs are held against.

use memmap2::{Advice, MmapMut};
use std::hint::black_box;
use std::io;
use std::sync::Barrier;
use std::time::{Duration, Instant};

/// Words of the blocks that memory is read in, which several streams share out.
const BLOCK_WORDS: usize = 4 << 13;
/// Passes over the memory, half of them in one stream and half in four: the best of all counts, for neighbours only ever take
/// from it, and which way is faster is the machine's.
const PASSES: usize = 16;

/// Memory that is there to be read, by several threads at a time.
#[derive(Debug)]
pub struct PlainReading {
    map: MmapMut,
    threads: usize,
}

impl PlainReading {
    /// About `bytes` of memory, which should be more than any cache has, for so many threads.
    ///
    /// # Errors
    /// If so much memory cannot be had.
    pub fn new(threads: usize, bytes: usize) -> io::Result<Self> {
        let threads = threads.max(1);
        let part = (bytes / threads / 8).next_multiple_of(BLOCK_WORDS);
        let mut map = MmapMut::map_anon(part * threads * 8)?;
        // As the arenas have it; without large pages the walks through page tables would be measured.
        let _ = map.advise(Advice::HugePage);
        map.fill(1);
        Ok(Self { map, threads })
    }

    /// Bytes that a pass reads.
    pub fn bytes(&self) -> usize {
        self.map.len()
    }

    /// Reads all of it once, in order, in so many streams a thread; how long it took from when all threads were there.
    pub fn pass<const STREAMS: usize>(&self) -> Duration {
        let words: &[u64] = bytemuck::cast_slice(&self.map);
        let mut parts = words.chunks_exact(words.len() / self.threads);
        let own = parts.next().expect("there is a thread");
        let there = Barrier::new(self.threads);
        let read = |part| {
            there.wait();
            let began = Instant::now();
            black_box(sum_of_streams::<STREAMS>(part));
            (began, Instant::now())
        };
        let (began, ended) = std::thread::scope(|scope| {
            let others: Vec<_> = parts.map(|part| scope.spawn(move || read(part))).collect();
            let others = others.into_iter().map(|thread| thread.join().expect("a sum does not panic"));
            // The calling thread is one of them.
            let own = [read(own)];
            own.into_iter()
                .chain(others)
                .reduce(|a, b| (a.0.min(b.0), a.1.max(b.1)))
                .expect("there is a thread")
        });
        ended - began
    }
}

/// Bytes that `threads` threads read from memory in a second: `bytes` of it, more than any cache has, in order, in one stream
/// each or in four, whichever is faster.
///
/// # Errors
/// If so much memory cannot be had.
pub fn memory_read(threads: usize, bytes: usize) -> io::Result<f64> {
    let plain = PlainReading::new(threads, bytes)?;
    let passes = (0..PASSES).map(|pass| if pass % 2 == 0 { plain.pass::<1>() } else { plain.pass::<4>() });
    let best = passes.min().expect("there are passes");
    Ok(plain.bytes() as f64 / best.as_secs_f64())
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
