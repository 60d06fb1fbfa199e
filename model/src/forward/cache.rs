//! The paged KV cache: one anonymous map, touched page by page.

use crate::arch::Arch;
use crate::kernels::{KvPage, KvShape};
use crate::model::{Model, ModelError};
use memmap2::{Advice, MmapMut};
use std::collections::BTreeMap;
use std::ops::Range;

/// Which layers share pages. All groups have equally many layers, so that all pages have one size and one budget; the
/// layers of a group see one window, so that its pages are of use to all of them, or to none. A stage has the same groups, and of
/// each the layers that it has.
#[derive(Clone, Debug)]
pub(crate) struct KvGroups {
    /// The window of each group.
    pub(crate) windows: Vec<Option<u32>>,
    /// Layers of a group, at most.
    pub(crate) layers: usize,
    /// The group of each layer, and its place there among those of the stage.
    places: Vec<(usize, usize)>,
}

impl KvGroups {
    pub(crate) fn of(arch: &Arch, own: Range<usize>) -> Self {
        let mut alike: BTreeMap<Option<u32>, Vec<usize>> = BTreeMap::new();
        for (i, layer) in arch.layers.iter().enumerate() {
            // A window that no sequence outgrows is none.
            alike.entry(layer.window.filter(|&window| window < arch.context)).or_default().push(i);
        }
        let layers = alike.values().map(Vec::len).reduce(greatest_common_divisor).unwrap_or(1);
        let (mut windows, mut places, mut most) = (Vec::new(), vec![(0, 0); arch.layers.len()], 0);
        for (window, of_window) in alike {
            for group in of_window.chunks_exact(layers) {
                for (place, &layer) in group.iter().filter(|layer| own.contains(layer)).enumerate() {
                    places[layer] = (windows.len(), place);
                    most = most.max(place + 1);
                }
                windows.push(window);
            }
        }
        Self { windows, layers: most, places }
    }

    /// The group of a layer, and at which byte of a page of that group its keys begin.
    pub(crate) fn place_of(&self, layer: usize, kv: KvShape) -> (usize, usize) {
        let (group, place) = self.places[layer];
        (group, place * (kv.key_page_bytes() + kv.value_page_bytes()))
    }

    /// The group of a layer.
    pub(crate) fn of_layer(&self, layer: usize) -> usize {
        self.places[layer].0
    }
}

const fn greatest_common_divisor(a: usize, b: usize) -> usize {
    if b == 0 { a } else { greatest_common_divisor(b, a % b) }
}

/// Pages of 64 positions; in a page, for each layer of its group the keys, then the values.
#[derive(Debug)]
pub struct KvCache {
    map: MmapMut,
    page_bytes: usize,
    layer_bytes: usize,
    shape: KvShape,
    groups: KvGroups,
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
        // Attention reads all that is there: as with weights, it would wait for page walks.
        let _ = map.advise(Advice::HugePage);
        let layer_bytes = model.kv.key_page_bytes() + model.kv.value_page_bytes();
        Ok(Self { map, page_bytes, layer_bytes, shape: model.kv, groups: model.kv_groups.clone() })
    }

    fn start(&self, layer: usize, page: u32) -> usize {
        page as usize * self.page_bytes + self.groups.places[layer].1 * self.layer_bytes
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::checkpoint::config::Config;
    use std::path::Path;

    fn groups(windows: &[Option<u32>]) -> KvGroups {
        let text = r#"{"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 1,
            "vocab_size": 64, "max_position_embeddings": 100, "intermediate_size": 64}"#;
        let config = Config::parse(Path::new("config.json"), text.as_bytes()).unwrap();
        let mut arch = crate::families::read(&config).unwrap();
        let layer = arch.layers[0].clone();
        arch.layers = windows.iter().map(|&window| crate::arch::Layer { window, ..layer.clone() }).collect();
        let all = 0..arch.layers.len();
        KvGroups::of(&arch, all)
    }

    #[test]
    fn layers_of_one_window_share_pages_of_one_size() {
        let alike = groups(&[None; 3]);
        assert_eq!((&alike.windows[..], alike.layers), (&[None][..], 3));
        let every_other = groups(&[Some(8), None, Some(8), None]);
        assert_eq!((&every_other.windows[..], every_other.layers), (&[None, Some(8)][..], 2));
        assert_eq!(every_other.places, [(1, 0), (0, 0), (1, 1), (0, 1)]);
        let uneven = groups(&[None, None, None, None, Some(8), Some(8)]);
        assert_eq!((&uneven.windows[..], uneven.layers), (&[None, None, Some(8)][..], 2));
        assert_eq!(uneven.places, [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]);
        assert_eq!(
            groups(&[Some(100), None]).windows,
            [None],
            "a window as long as the context hides nothing"
        );
    }
}
