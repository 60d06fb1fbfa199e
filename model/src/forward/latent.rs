//! Multi-head latent attention: what is cached of a position is one latent and one rotated key, shared by all heads.
//!
//! A head's key is a product with the latent, so its score is a dot product of the latent with the query taken through
//! that product's transpose; and its mix of values is a product with the mix of latents. Keys and values are never made,
//! neither for a prefill nor for decode: the bits of a position may not depend on which of the two computed it.

use super::{Batch, KvCache, Layer};
use crate::kernels::{Buffer, KvPage, Product, Products};
use crate::model::Model;
use crate::weights::{LatentWeights, Matrix};

/// Epsilon of the norms within: a constant of these models, whatever their configuration says of the others.
const NORM_EPS: f32 = 1e-6;

/// What latent attention works in.
#[derive(Debug, Default)]
pub(super) struct Room {
    first: Buffer,
    queries: Buffer,
    cached: Buffer,
    q: Buffer,
    mixed: Buffer,
    /// Head by head, before and after a product with each head's matrix.
    apart: Buffer,
    through: Buffer,
    out: Buffer,
}

impl Room {
    pub(super) fn bytes(&self) -> usize {
        let Self { first, queries, cached, q, mixed, apart, through, out } = self;
        [first, queries, cached, q, mixed, apart, through, out].map(Buffer::bytes).iter().sum()
    }
}

impl Model {
    /// The mixed values of every position: positions x heads x value dimension.
    pub(super) fn attend_latents<'a>(
        &self,
        layer: Layer<'_>,
        weights: &LatentWeights,
        cache: &mut KvCache,
        batch: &Batch<'_>,
        (room, pages): (&'a mut Room, &mut Vec<KvPage<'static>>),
        products: &mut Products,
    ) -> &'a [f32] {
        let attention = &self.attention;
        let (rows, heads) = (batch.at.len(), attention.heads);
        let (width, rank) = (self.kv.key_dim, self.kv.value_dim);
        let values = attention.value_dim;
        let cached = room.cached.values(rows * width);
        let first = room.first.values(rows * weights.query.matrix.view().outputs());
        self.project([&weights.query, &weights.latent], batch.normed, [&mut *first, &mut *cached], products);
        let queries = match &weights.query_norm {
            None => first,
            Some((norm, second)) => {
                self.pool.each_row(first, norm.len(), 1, &|_, row| self.norm_parts(row, norm, NORM_EPS));
                let queries = room.queries.values(rows * attention.q_dim());
                self.project([second], first, [&mut *queries], products);
                queries
            }
        };
        self.pool.each_row(cached, width, 1, &|i, key| {
            let (of_latent, of_rotated) = key.split_at_mut(rank);
            self.norm_parts(of_latent, &weights.latent_norm, NORM_EPS);
            self.rotate(of_rotated, batch.positions[i]);
        });
        // By head, as each has matrices of its own: the plain part through the transposed keys, then the rotated part.
        let plain = attention.head_dim - (width - rank);
        let apart = room.apart.values(heads * rows * plain);
        self.pool.each_row(apart, plain, 1, &|i, apart| {
            let (head, row) = (i / rows, i % rows);
            apart.copy_from_slice(&queries[(row * heads + head) * attention.head_dim..][..plain]);
        });
        let through = room.through.values(heads * rows * rank);
        self.by_head(weights, apart, rows, |(query, _)| query, through, products);
        let q = room.q.values(rows * heads * width);
        self.pool.each_row(q, width, 1, &|i, q| {
            let (row, head) = (i / heads, i % heads);
            let (of_latent, of_rotated) = q.split_at_mut(rank);
            of_latent.copy_from_slice(&through[(head * rows + row) * rank..][..rank]);
            of_rotated.copy_from_slice(&queries[i * attention.head_dim + plain..][..of_rotated.len()]);
            self.rotate(of_rotated, batch.positions[row]);
        });
        let mixed = room.mixed.values(rows * heads * rank);
        self.attend_over_pages(layer, cache, batch, [q, cached, &[]], mixed, pages);
        let apart = room.apart.values(heads * rows * rank);
        self.pool.each_row(apart, rank, 1, &|i, apart| {
            let (head, row) = (i / rows, i % rows);
            apart.copy_from_slice(&mixed[(row * heads + head) * rank..][..rank]);
        });
        let through = room.through.values(heads * rows * values);
        self.by_head(weights, apart, rows, |(_, value)| value, through, products);
        let out = room.out.values(rows * heads * values);
        self.pool.each_row(out, values, 1, &|i, out| {
            let (row, head) = (i / heads, i % heads);
            out.copy_from_slice(&through[(head * rows + row) * values..][..values]);
        });
        out
    }

    /// A product with a matrix of each head: heads x rows x inputs into heads x rows x outputs.
    fn by_head(
        &self,
        weights: &LatentWeights,
        x: &[f32],
        rows: usize,
        matrix: impl Fn(&(Matrix, Matrix)) -> &Matrix,
        mut out: &mut [f32],
        products: &mut Products,
    ) {
        let mut x = x;
        let list = weights.heads.iter().map(|head| {
            let w = matrix(head).view();
            let x = x.split_off(..rows * w.inputs()).expect("rows of every head");
            let out = out.split_off_mut(..rows * w.outputs()).expect("rows of every head");
            Product::new(x, w, None, out)
        });
        products.compute(&self.pool, self.isa, list);
    }
}
