//! Memory for weights: pieces of chunks in pages as large as the machine has.
//!
//! Decode reads all weights once a token; in small pages it would wait for page walks. A matrix of a mapping of its own has large
//! pages only where one fits between its first byte and its last.

use memmap2::{Advice, MmapMut, MmapRaw};
use std::io;
use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError, Weak};

/// Bytes of a chunk; larger pieces have one of their own. What nobody has written of it takes no memory.
const CHUNK_BYTES: usize = 64 << 20;
/// Pieces begin at cache lines.
const ALIGN: usize = 64;

/// The chunk that pieces are taken from, and how much of it is taken. It is there as long as any of its pieces.
static CURRENT: Mutex<(Weak<MmapRaw>, usize)> = Mutex::new((Weak::new(), 0));

/// A piece of memory that is written once.
#[derive(Debug)]
pub(crate) struct Piece {
    chunk: Arc<MmapRaw>,
    start: usize,
    len: usize,
}

impl Piece {
    /// A piece of so many bytes, as `write` leaves them; all are zero before.
    ///
    /// # Errors
    /// If there is no such memory.
    pub(crate) fn written(len: usize, write: impl FnOnce(&mut [u8])) -> io::Result<Self> {
        let piece = Self::take(len)?;
        // SAFETY: the range is inside of the chunk and was given to nobody else, and nobody sees this piece before it returns.
        write(unsafe { std::slice::from_raw_parts_mut(piece.chunk.as_mut_ptr().add(piece.start), len) });
        Ok(piece)
    }

    fn take(len: usize) -> io::Result<Self> {
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let (chunk, start) = match current.0.upgrade().filter(|chunk| len <= chunk.len() - current.1) {
            Some(chunk) => (chunk, current.1),
            None => {
                let map = MmapMut::map_anon(len.max(CHUNK_BYTES))?;
                // A kernel without large pages refuses, and nothing is lost but time.
                let _ = map.advise(Advice::HugePage);
                (Arc::new(MmapRaw::from(map)), 0)
            }
        };
        *current = (Arc::downgrade(&chunk), (start + len).next_multiple_of(ALIGN).min(chunk.len()));
        Ok(Self { chunk, start, len })
    }
}

impl Deref for Piece {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        // SAFETY: as in `written`; nobody writes any more.
        unsafe { std::slice::from_raw_parts(self.chunk.as_ptr().add(self.start), self.len) }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn pieces_keep_what_was_written_and_share_nothing() {
        let lens = [0, 1, 63, 64, 65, 4096, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 7];
        let pieces: Vec<Piece> = (1..)
            .zip(lens)
            .map(|(mark, len)| {
                Piece::written(len, |bytes| {
                    assert!(bytes.iter().all(|&byte| byte == 0));
                    bytes.fill(mark);
                })
                .unwrap()
            })
            .collect();
        for ((mark, len), piece) in (1..).zip(lens).zip(&pieces) {
            assert_eq!(piece.len(), len);
            assert!(piece.as_ptr().addr().is_multiple_of(ALIGN) && piece.iter().all(|&byte| byte == mark));
        }
    }
}
