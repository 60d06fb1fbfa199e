//! What the memory and the disk of this machine deliver: the roof that runs are held against.

use memmap2::{Advice, MmapMut};
use rustix::fs::{Mode, OFlags};
use std::fs::File;
use std::hint::black_box;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Words of the blocks that memory is read in, a quarter of each as a stream of its own.
const BLOCK_WORDS: usize = 4 << 13;
/// Passes over the memory: the best of them counts, for neighbours only ever take from it.
const PASSES: usize = 8;
/// Bytes of one direct read.
const READ_BYTES: usize = 4 << 20;
/// What direct reads are aligned to.
const ALIGN: usize = 4096;

/// Bytes that `threads` threads read from memory in a second: `bytes` of it, more than any cache has, in order and in
/// four streams each, as the product of a matrix with one row does.
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
    for _ in 0..PASSES {
        let began = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks_exact(part) {
                scope.spawn(|| black_box(sum_of_streams(part)));
            }
        });
        best = best.min(began.elapsed());
    }
    Ok(map.len() as f64 / best.as_secs_f64())
}

/// Four streams at once, as a product has them: one alone waits for memory.
fn sum_of_streams(all: &[u64]) -> [u64; 8] {
    let mut sums = [0u64; 8];
    for block in all.chunks_exact(BLOCK_WORDS) {
        let mut streams = block.chunks_exact(BLOCK_WORDS / 4).map(|stream| stream.chunks_exact(8));
        let mut streams: [_; 4] = std::array::from_fn(|_| streams.next().expect("four quarters"));
        for _ in 0..BLOCK_WORDS / 32 {
            for stream in &mut streams {
                let line = stream.next().expect("as long as the others");
                sums.iter_mut().zip(line).for_each(|(sum, x)| *sum = sum.wrapping_add(*x));
            }
        }
    }
    sums
}

/// Bytes that the disk delivers in a second past the cache, and whether they came past it: a file system without
/// O_DIRECT is read as it can be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct DiskRead {
    /// Bytes a second.
    pub bytes_per_s: f64,
    /// Whether the reads went past the cache.
    pub direct: bool,
}

/// Reads files in large pieces from beginning to end, by `threads` threads and for `time` at most.
///
/// # Errors
/// If a file cannot be opened or read.
pub fn disk_read(paths: &[PathBuf], threads: usize, time: Duration) -> io::Result<DiskRead> {
    let mut files = Vec::new();
    let mut direct = true;
    for path in paths {
        let (file, is_direct) = open(path)?;
        direct &= is_direct;
        let bytes = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
        files.push((file, bytes));
    }
    let pieces: Vec<(usize, usize)> = files
        .iter()
        .enumerate()
        .flat_map(|(file, &(_, bytes))| (0..bytes).step_by(READ_BYTES).map(move |offset| (file, offset)))
        .collect();
    let (next, read, over) = (AtomicUsize::new(0), AtomicU64::new(0), AtomicBool::new(false));
    let failed = Mutex::new(None);
    let began = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads.max(1) {
            scope.spawn(|| {
                let mut buffer = vec![0u8; READ_BYTES + ALIGN];
                let start = buffer.as_ptr().align_offset(ALIGN);
                while let Some(&(file, offset)) = pieces.get(next.fetch_add(1, Ordering::Relaxed))
                    && began.elapsed() < time
                    && !over.load(Ordering::Relaxed)
                {
                    let (file, bytes) = &files[file];
                    // The last piece may end within a block: the kernel reads what is there.
                    let len = READ_BYTES.min(bytes - offset).next_multiple_of(ALIGN);
                    match file.read_at(&mut buffer[start..start + len], offset as u64) {
                        Ok(got) => drop(read.fetch_add(got as u64, Ordering::Relaxed)),
                        Err(error) => {
                            over.store(true, Ordering::Relaxed);
                            *failed.lock().expect("nobody panics with it") = Some(error);
                        }
                    }
                }
            });
        }
    });
    if let Some(error) = failed.into_inner().expect("nobody panics with it") {
        return Err(error);
    }
    Ok(DiskRead { bytes_per_s: read.into_inner() as f64 / began.elapsed().as_secs_f64(), direct })
}

/// The file past the cache, or as it can be had.
fn open(path: &Path) -> io::Result<(File, bool)> {
    let open = |flags| rustix::fs::open(path, OFlags::RDONLY | flags, Mode::empty());
    match open(OFlags::DIRECT) {
        Ok(file) => Ok((file.into(), true)),
        Err(_) => Ok((open(OFlags::empty())?.into(), false)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn every_word_is_read_once() {
        let words: Vec<u64> = (0..3 * BLOCK_WORDS as u64).collect();
        let total: u64 = sum_of_streams(&words).iter().sum();
        assert_eq!(total, words.iter().sum::<u64>());
        assert!(memory_read(2, 1 << 20).unwrap() > 0.0);
    }

    #[test]
    fn files_that_end_within_a_block_are_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, vec![7; READ_BYTES + 5]).unwrap();
        let read = disk_read(std::slice::from_ref(&path), 2, Duration::from_secs(5)).unwrap();
        assert!(read.bytes_per_s > 0.0);
        assert!(disk_read(&[path.join("none")], 1, Duration::ZERO).is_err());
    }
}
