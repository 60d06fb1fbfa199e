//! An expert at a time, read and verified by the thread that wants it: the ways of `pread` and `mmap`.

use std::io;
use std::path::Path;
use std::sync::Arc;

use lite_llm_core::ids::ExpertKey;
use lite_llm_core::input::Fault;
use lite_llm_model::checkpoint::native::ExpertBlob;

use super::blocks::Blocks;
use super::fault::{ReadFault, corrupt};
use super::shards::Shard;
use super::{BLOCK, INTERRUPTED_MAX};

/// Reads experts into slots, on any thread.
#[derive(Clone, Debug)]
pub struct Fetch {
    pub(super) blocks: Arc<dyn Blocks>,
    pub(super) shards: Arc<[Shard]>,
}

impl Fetch {
    /// Reads an expert into a slot and verifies it; bytes of the slot after it may be written too.
    ///
    /// # Errors
    /// If it cannot be read, or does not have its checksum, both twice.
    ///
    /// # Panics
    /// If the slot is too small.
    pub fn read(&self, expert: ExpertKey, blob: &ExpertBlob, slot: &mut [u8]) -> Result<(), Fault> {
        let shard = &self.shards[blob.shard];
        let bytes = padded(blob, shard.bytes, slot.len());
        let mut again = true;
        loop {
            read_all(&*self.blocks, blob.shard, blob.offset, &mut slot[..bytes], blob.bytes)
                .map_err(|fault| fault.of(expert, &shard.path))?;
            match blob.verify(&shard.path, &slot[..blob.bytes]) {
                Ok(()) => return Ok(()),
                Err(_) if std::mem::take(&mut again) => {}
                Err(error) => return Err(corrupt(expert, &error)),
            }
        }
    }

    /// Where a shard is.
    pub(super) fn path(&self, shard: usize) -> &Path {
        &self.shards[shard].path
    }
}

/// Bytes of a blob with those up to the next boundary, where slot and file have them: then it is read past the cache to its end.
pub(super) fn padded(blob: &ExpertBlob, shard_bytes: u64, slot_bytes: usize) -> usize {
    let padded = blob.bytes.next_multiple_of(BLOCK);
    let fits = padded <= slot_bytes && blob.offset.saturating_add(padded as u64) <= shard_bytes;
    if fits { padded } else { blob.bytes }
}

/// Reads until `need` bytes are there; all else is welcome.
pub(super) fn read_all(
    blocks: &dyn Blocks,
    shard: usize,
    offset: u64,
    into: &mut [u8],
    need: usize,
) -> Result<(), ReadFault> {
    let (mut got, mut interrupted) = (0, 0);
    // A read that ends at the last whole block is as it should be: the tail is another read.
    let mut again = true;
    while got < need {
        let at = offset + got as u64;
        let wanted = into.len() - got;
        match blocks.read_at(shard, at, &mut into[got..]) {
            Ok(0) if std::mem::take(&mut again) => {}
            Ok(0) => return Err(ReadFault::Short { at }),
            Ok(bytes) => {
                got += bytes;
                let whole = bytes >= wanted / BLOCK * BLOCK;
                if !whole && got < need && !std::mem::take(&mut again) {
                    return Err(ReadFault::Short { at: offset + got as u64 });
                }
                if got < need && !whole {
                    // Direct reads begin at a boundary.
                    got = got / BLOCK * BLOCK;
                }
            }
            Err(error) if passes(&error) && interrupted < INTERRUPTED_MAX => {
                interrupted += 1;
                if error.kind() == io::ErrorKind::WouldBlock {
                    std::thread::yield_now();
                }
            }
            Err(_) if std::mem::take(&mut again) => {}
            Err(error) => return Err(ReadFault::Failed { at, error }),
        }
    }
    Ok(())
}

/// Whether an error says no more than that the read is to be asked for again.
pub(super) fn passes(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock)
}
