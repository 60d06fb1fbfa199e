//! A layer of files that block: what `pread` and `mmap` read from, and what tests put faults under.

use std::fmt::Debug;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use memmap2::{Advice, Mmap, UncheckedAdvice};

use super::BLOCK;
use super::shards::Shard;

/// Shards, read one piece after another.
pub(super) trait Blocks: Debug + Send + Sync {
    /// Reads at a byte of a shard, at most as much as there is room for; nothing at the end of the file.
    fn read_at(&self, shard: usize, offset: u64, into: &mut [u8]) -> io::Result<usize>;
}

/// Through the system's cache.
#[derive(Debug)]
pub(super) struct Buffered(pub(super) Arc<[Shard]>);

impl Buffered {
    /// Says to the system that experts are read from end to end.
    pub(super) fn new(shards: Arc<[Shard]>) -> Self {
        #[cfg(target_os = "linux")]
        for shard in &*shards {
            // It only reads ahead less if it does not want to know.
            let _ = rustix::fs::fadvise(&shard.buffered, 0, None, rustix::fs::Advice::Sequential);
        }
        Self(shards)
    }
}

impl Blocks for Buffered {
    fn read_at(&self, shard: usize, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        self.0[shard].buffered.read_at(into, offset)
    }
}

/// Past the cache, where both ends of a read are at a boundary; the rest through it.
#[derive(Debug)]
pub(super) struct Direct {
    pub(super) shards: Arc<[Shard]>,
    pub(super) direct: Vec<File>,
}

impl Blocks for Direct {
    fn read_at(&self, shard: usize, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let whole = into.len() / BLOCK * BLOCK;
        let aligned = offset.is_multiple_of(BLOCK as u64) && into.as_ptr().addr().is_multiple_of(BLOCK);
        if whole > 0 && aligned {
            return self.direct[shard].read_at(&mut into[..whole], offset);
        }
        self.shards[shard].buffered.read_at(into, offset)
    }
}

/// Through maps of the shards.
#[derive(Debug)]
pub(super) struct Mapped(Vec<Mmap>);

impl Mapped {
    pub(super) fn new(shards: &[Shard]) -> io::Result<Self> {
        // SAFETY: the maps are only read. Whoever shortens a checkpoint's file under a running engine breaks the rule that
        // checkpoints are immutable; `read_at` still finds out before it touches a page that is gone.
        let map = |shard: &Shard| unsafe { Mmap::map(&shard.buffered) };
        Ok(Self(shards.iter().map(map).collect::<io::Result<_>>()?))
    }
}

impl Blocks for Mapped {
    fn read_at(&self, shard: usize, offset: u64, into: &mut [u8]) -> io::Result<usize> {
        let map = &self.0[shard];
        let start = usize::try_from(offset).unwrap_or(usize::MAX).min(map.len());
        let bytes = into.len().min(map.len() - start);
        if bytes == 0 {
            return Ok(0);
        }
        // Has the pages read, and says so where touching them would be a signal: a file cut short, a disk that fails.
        if let Err(error) = map.advise_range(Advice::PopulateRead, start, bytes) {
            // Kernels before 5.14 do not know it, and read when the pages are touched.
            if error.kind() != io::ErrorKind::InvalidInput {
                return Err(error);
            }
        }
        into[..bytes].copy_from_slice(&map[start..start + bytes]);
        let first = start / BLOCK * BLOCK;
        // SAFETY: the map is of a file, is only read and was never written: a page that is dropped is read from the file again
        // when it is next looked at. What is in a slot needs no second place in the budget.
        let advised =
            unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, first, start + bytes - first) };
        // A system that keeps the pages wastes memory, and reads the same.
        let _ = advised;
        Ok(bytes)
    }
}
