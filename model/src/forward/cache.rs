//! The paged KV cache: one anonymous map, touched page by page.

use crate::kernels::{KvPage, KvShape};
use crate::model::{Model, ModelError};
use memmap2::MmapMut;

/// Pages of 64 positions; in a page, for each layer its keys, then its values.
#[derive(Debug)]
pub struct KvCache {
    map: MmapMut,
    page_bytes: usize,
    layer_bytes: usize,
    shape: KvShape,
}

impl KvCache {
    /// A cache of some pages, all zero and not yet backed by memory.
    ///
    /// # Errors
    /// If the address space cannot be had.
    pub fn new(model: &Model, pages: u32) -> Result<Self, ModelError> {
        let page_bytes = model.page_bytes();
        let bytes = page_bytes.checked_mul(pages as usize).filter(|&bytes| isize::try_from(bytes).is_ok());
        let map = bytes.and_then(|bytes| MmapMut::map_anon(bytes.max(1)).ok());
        let map = map.ok_or(ModelError::Memory {
            what: "a KV cache",
            bytes: (page_bytes as u64).saturating_mul(u64::from(pages)),
        })?;
        let layer_bytes = model.kv.key_page_bytes() + model.kv.value_page_bytes();
        Ok(Self { map, page_bytes, layer_bytes, shape: model.kv })
    }

    fn start(&self, layer: usize, page: u32) -> usize {
        page as usize * self.page_bytes + layer * self.layer_bytes
    }

    /// Rounds the keys and values of a position to storage.
    pub(super) fn write(&mut self, layer: usize, page: u32, position: u32, keys: &[f32], values: &[f32]) {
        let start = self.start(layer, page);
        let (key_bytes, shape) = (self.shape.key_page_bytes(), self.shape);
        let (key_page, value_page) = self.map[start..start + self.layer_bytes].split_at_mut(key_bytes);
        shape.write_keys(position, keys, key_page);
        shape.write_values(position, values, value_page);
    }

    /// A layer's part of a page.
    pub(super) fn page(&self, layer: usize, page: u32) -> KvPage<'_> {
        let start = self.start(layer, page);
        let (keys, values) = self.map[start..start + self.layer_bytes].split_at(self.shape.key_page_bytes());
        KvPage { keys, values }
    }
}
