//! How fast products with one row go through weights here: what decoding can be expected to do.

use crate::kernels::{Isa, PackedView, Pool, Product, Products, Storage, packed_len};
use crate::model::{Model, ModelError};
use memmap2::{Advice, MmapMut};
use std::time::{Duration, Instant};

/// Passes over the weights; the best counts, for neighbours only ever take from it.
const PASSES: usize = 4;
/// A byte that makes small finite numbers in every storage.
const FILL: u8 = 0x2c;

/// Bytes of weights a second, of products with one row by as many threads as the model has.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Speeds {
    /// Of the largest matrix of the base parameters, several together.
    pub base: f64,
    /// Of the first matrix of an expert, as many together as a position selects; that of the base if there are none.
    pub experts: f64,
}

impl Model {
    /// Measures how fast this machine computes products of the model's shapes, each over `room` bytes of weights, more than any
    /// cache has. No weights of the model are read.
    ///
    /// # Errors
    /// If the checkpoint lacks a tensor, or so much memory cannot be had.
    pub fn speeds(&self, room: usize) -> Result<Speeds, ModelError> {
        let list = self.checkpoint().inventory()?;
        let base =
            list.iter().filter(|item| !item.name.contains(".experts.") && !item.name.contains("embed"));
        let matrices =
            base.filter_map(|item| Some((item.tensor.as_ref()?.storage(), item.shape.first_chunk::<2>()?)));
        let largest = matrices.max_by_key(|(_, shape)| shape[0] * shape[1]);
        let Some((storage, &[outputs, inputs])) = largest else {
            return Ok(Speeds { base: 0.0, experts: 0.0 });
        };
        let base = self.speed(storage, outputs, inputs, 1, room)?;
        let experts = match (&self.expert, &self.arch().moe) {
            (Some(layout), Some(moe)) => {
                self.speed(layout.storages[0], layout.width, layout.hidden, moe.top_k, room)?
            }
            _ => base,
        };
        Ok(Speeds { base, experts })
    }

    fn speed(
        &self,
        storage: Storage,
        outputs: usize,
        inputs: usize,
        together: usize,
        room: usize,
    ) -> Result<f64, ModelError> {
        let one = packed_len(storage, outputs, inputs).unwrap_or(usize::MAX);
        let count = (room / one).max(1).next_multiple_of(together);
        let bytes = one.saturating_mul(count);
        let refused = |_| ModelError::Memory { what: "a trial", bytes: bytes as u64 };
        let mut map = MmapMut::map_anon(bytes).map_err(refused)?;
        // As slots have them.
        let _ = map.advise(Advice::HugePage);
        map.fill(FILL);
        let best = one_row(&self.pool, self.isa, storage, [outputs, inputs], together, &map);
        Ok(bytes as f64 / best.as_secs_f64())
    }
}

/// How long one row takes with all matrices in `bytes`, so many of them in one go.
fn one_row(
    pool: &Pool,
    isa: Isa,
    storage: Storage,
    [outputs, inputs]: [usize; 2],
    together: usize,
    bytes: &[u8],
) -> Duration {
    let one = packed_len(storage, outputs, inputs).expect("it was counted");
    let x: Vec<f32> = (0..inputs).map(|i| (i % 13) as f32 - 6.0).collect();
    let mut out = vec![0.0; outputs * together];
    let mut products = Products::default();
    let mut best = Duration::MAX;
    for _ in 0..PASSES {
        let began = Instant::now();
        for matrices in bytes.chunks(one * together) {
            let views = matrices.chunks_exact(one).zip(out.chunks_exact_mut(outputs));
            let of = |(bytes, out)| {
                let view =
                    PackedView::new(storage, outputs, inputs, bytes).expect("the length is the shape's");
                Product::new(&x, view, None, out)
            };
            products.compute(pool, isa, views.map(of));
        }
        best = best.min(began.elapsed());
    }
    best
}
