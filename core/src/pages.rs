//! Pages of KV cache: who may have the next one. The lowest free page goes first, so that little memory is touched.

use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// The free pages.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Pages {
    free: BTreeSet<u32>,
}

impl Pages {
    pub(crate) fn new(count: u32) -> Self {
        Self { free: (0..count).collect() }
    }

    pub(crate) fn free(&self) -> impl Iterator<Item = u32> + '_ {
        self.free.iter().copied()
    }

    pub(crate) fn free_len(&self) -> usize {
        self.free.len()
    }

    pub(crate) fn take(&mut self) -> Option<u32> {
        self.free.pop_first()
    }

    pub(crate) fn give_back(&mut self, pages: &mut Vec<u32>) {
        for page in pages.drain(..) {
            assert!(self.free.insert(page), "page {page} was free already");
        }
    }
}
