//! Pages of KV cache: who may have the next one. The lowest free page goes first, so that little memory is touched.
//!
//! A page holds some positions of one sequence in the layers of one group. Where the layers of a group see a window only,
//! what no later position sees is given back.

use crate::ids::{index, len32};
use alloc::collections::BTreeSet;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// The pages of one sequence in one group of layers: of its positions up to some last one, from the first that is still
/// seen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageRun {
    /// How many pages of the sequence's beginning are no longer there.
    pub first: u32,
    /// Those that are.
    pub pages: Vec<u32>,
}

impl PageRun {
    /// The first place, counted in pages from the beginning of the sequence, that has no page yet.
    #[must_use]
    pub fn end(&self) -> u32 {
        self.first + len32(self.pages.len())
    }

    /// The page at a place, counted in pages from the beginning of the sequence; `None` if it is gone or not there yet.
    #[must_use]
    pub fn page(&self, place: u32) -> Option<u32> {
        place.checked_sub(self.first).and_then(|at| self.pages.get(index(at))).copied()
    }

    /// The same without what lies at `end` and beyond.
    pub(crate) fn until(&self, end: u32) -> Self {
        Self { first: self.first, pages: self.pages[..index(end - self.first)].to_vec() }
    }
}

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

    /// Takes back all pages of a request.
    pub(crate) fn give_back(&mut self, runs: &mut Vec<PageRun>) {
        for mut run in runs.drain(..) {
            let end = run.end();
            self.recycle(&mut run, end);
        }
    }

    /// Takes back the pages of a run that lie before a place.
    pub(crate) fn recycle(&mut self, run: &mut PageRun, first: u32) {
        for page in run.pages.drain(..index(first - run.first)) {
            assert!(self.free.insert(page), "page {page} was free already");
        }
        run.first = first;
    }
}
