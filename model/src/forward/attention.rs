//! Self-attention: projections over the whole batch, then each row over its pages.

use super::exchange::{of_keys, of_mixed, of_output, of_queries};
use super::ranks::Among;
use super::{Batch, ExpertSource, KvCache, Layer, Rooms, Stopped};
use crate::arch::{Pairs, QkNorm};
use crate::kernels::buffer::emptied;
use crate::kernels::{
    AttentionParams, Buffer, KvPage, PAGE_POSITIONS, PagedKv, Product, Products, attention, rms_norm_in_place,
};
use crate::model::Model;
use crate::weights::{Inputs, Projection};
use std::ops::Range;

/// What attention works in.
#[derive(Debug, Default)]
pub(super) struct Room {
    q: Buffer,
    k: Buffer,
    v: Buffer,
    mixed: Buffer,
    /// What all tensor ranks have.
    whole: Buffer,
    outputs: Buffer,
    pages: Vec<KvPage<'static>>,
}

impl Room {
    pub(super) fn bytes(&self) -> usize {
        let buffers = [&self.q, &self.k, &self.v, &self.mixed, &self.whole, &self.outputs];
        buffers.map(Buffer::bytes).iter().sum::<usize>() + self.pages.capacity() * size_of::<KvPage<'_>>()
    }
}

impl Model {
    pub(super) fn attend(
        &self,
        layer: Layer<'_>,
        cache: &mut KvCache,
        batch: &mut Batch<'_>,
        rooms: &mut Rooms,
        source: &dyn ExpertSource,
    ) -> Result<(), Stopped> {
        let attention = &self.attention;
        let Rooms { products, attention: room, latent: room_of_latents, added, .. } = rooms;
        let mixed = match &layer.weights.inputs {
            Inputs::Latent(weights) => self.attend_latents(
                layer,
                weights,
                cache,
                batch,
                (room_of_latents, &mut room.pages),
                products,
            ),
            Inputs::Plain { projections, qk_norm } => {
                let rows = batch.at.len();
                let q = room.q.values(rows * attention.q_dim());
                let k = room.k.values(rows * attention.k_dim());
                let v = room.v.values(rows * attention.v_dim());
                let [of_q, of_k, of_v] = projections;
                self.project([of_q, of_k, of_v], batch.normed, [&mut *q, &mut *k, &mut *v], products);
                let mut norms = qk_norm.as_ref().map(|(q, k)| [&q[..], &k[..]]);
                let apart = self.share.is_tensor() && attention.qk_norm == QkNorm::Whole;
                if let Some(norms) = norms.take_if(|_| apart) {
                    self.norms_of_all(layer, norms, [&mut *q, &mut *k], rows, &mut room.whole, source)?;
                }
                self.keys_and_values(norms, batch, [&mut *q, &mut *k, &mut *v]);
                let mixed = room.mixed.values(rows * attention.mixed_dim());
                self.attend_over_pages(layer, cache, batch, [q, k, v], mixed, &mut room.pages);
                mixed
            }
        };
        let rows = batch.at.len();
        let mixed = {
            let among = Among { source, exchange: of_mixed(layer.index) };
            let heads = |tensor| self.share.heads_of(tensor, &self.arch().attention);
            let columns = |tensor| times(heads(tensor), attention.value_dim);
            self.gather(mixed, rows, columns, &mut room.whole, among)?
        };
        let output = &layer.weights.output;
        let y = added.values(batch.at.len() * output.matrix.view().outputs());
        self.project([output], mixed, [&mut *y], products);
        let among = Among { source, exchange: of_output(layer.index) };
        let columns = |tensor| self.share.rows_of(tensor, self.arch().hidden);
        let y = self.gather(y, rows, columns, &mut room.outputs, among)?;
        self.add(batch.x, y);
        Ok(())
    }

    /// Normalises, clips and rotates queries and keys of every position, and clips values.
    fn keys_and_values(&self, norms: Option<[&[f32]; 2]>, batch: &Batch<'_>, [q, k, v]: [&mut [f32]; 3]) {
        let attention = &self.attention;
        let clip = |values: &mut [f32]| {
            if let Some(limit) = attention.clip_qkv {
                values.iter_mut().for_each(|value| *value = value.clamp(-limit, limit));
            }
        };
        let finish = |row: &mut [f32], norm: Option<&[f32]>, position: u32| {
            if let Some(weight) = norm {
                self.norm_parts(row, weight, self.arch().norm_eps);
            }
            clip(row);
            row.chunks_exact_mut(attention.head_dim).for_each(|head| self.rotate(head, position));
        };
        self.pool.each_row(q, attention.q_dim(), 2, &|i, row| {
            finish(row, norms.map(|[of_q, _]| of_q), batch.positions[i]);
        });
        self.pool.each_row(k, attention.k_dim(), 2, &|i, row| {
            finish(row, norms.map(|[_, of_k]| of_k), batch.positions[i]);
        });
        clip(v);
    }

    /// Normalises whole queries and keys, of which each tensor rank has some heads.
    fn norms_of_all(
        &self,
        layer: Layer<'_>,
        norms: [&[f32]; 2],
        [q, k]: [&mut [f32]; 2],
        rows: usize,
        room: &mut Buffer,
        source: &dyn ExpertSource,
    ) -> Result<(), Stopped> {
        let (whole, share) = (&self.arch().attention, &self.share);
        let of_q = |tensor| times(share.heads_of(tensor, whole), whole.head_dim);
        let of_k = |tensor| times(share.kv_heads_of(tensor, whole), whole.head_dim);
        let [norm_of_q, norm_of_k] = norms;
        let among = |exchange| Among { source, exchange };
        self.norm_of_all((q, rows), norm_of_q, &of_q, room, among(of_queries(layer.index)))?;
        self.norm_of_all((k, rows), norm_of_k, &of_k, room, among(of_keys(layer.index)))
    }

    fn norm_of_all(
        &self,
        (own, rows): (&mut [f32], usize),
        weight: &[f32],
        columns: &dyn Fn(u32) -> Range<usize>,
        room: &mut Buffer,
        among: Among<'_>,
    ) -> Result<(), Stopped> {
        let whole = room.values(rows * weight.len());
        self.gather_into(own, rows, columns, whole, among)?;
        // Ranks that share a head of keys have it several times; in the whole it is there once.
        self.norm_parts(whole, weight, self.arch().norm_eps);
        let mine = columns(self.share.seat().tensor);
        for (own, whole) in own.chunks_exact_mut(mine.len().max(1)).zip(whole.chunks_exact(weight.len())) {
            own.copy_from_slice(&whole[mine.clone()]);
        }
        Ok(())
    }

    /// Writes keys and values of every position into the cache, and mixes the values that each position sees.
    pub(super) fn attend_over_pages(
        &self,
        Layer { index, weights, step }: Layer<'_>,
        cache: &mut KvCache,
        batch: &Batch<'_>,
        [q, k, v]: [&[f32]; 3],
        mixed: &mut [f32],
        room: &mut Vec<KvPage<'static>>,
    ) {
        let heads = self.attention.heads;
        if heads == 0 {
            return;
        }
        let (of_query, of_output) = (heads * self.kv.key_dim, heads * self.kv.value_dim);
        let of_key = self.kv.kv_heads * self.kv.key_dim;
        let of_value = if self.kv.values_in_keys { 0 } else { self.kv.kv_heads * self.kv.value_dim };
        // Rounded to storage before any use, so that every later reader sees what this step sees.
        let group = self.kv_groups.of_layer(index);
        for (i, at) in batch.at.iter().enumerate() {
            let page = step.rows[at.row as usize].pages[group].page(at.position / PAGE_POSITIONS as u32);
            let page = page.expect("a row has a page for each of its positions");
            let (keys, values) = (&k[i * of_key..][..of_key], &v[i * of_value..][..of_value]);
            cache.write(index, page, at.position, keys, values);
        }
        let params = AttentionParams {
            heads,
            scale: self.attention.scale,
            window: self.arch().layers[index].window,
            sinks: weights.sinks.as_deref(),
        };
        let (mut q, mut rest, mut positions) = (q, mixed, batch.positions);
        for row in &step.rows {
            let run = &row.pages[group];
            let mut pages: Vec<KvPage<'_>> = emptied(std::mem::take(room));
            // What lies before every window is gone.
            pages.extend(std::iter::repeat_n(KvPage { keys: &[], values: &[] }, run.first as usize));
            pages.extend(run.pages.iter().map(|&page| cache.page(index, page)));
            let kv = PagedKv::new(self.kv, &pages).expect("pages of this shape");
            let positions = positions.split_off(..row.tokens.len()).expect("positions of every row");
            let q = q.split_off(..row.tokens.len() * of_query).expect("queries of every row");
            let out = rest.split_off_mut(..row.tokens.len() * of_output).expect("room for every row");
            attention(&self.pool, self.isa, q, positions, &kv, &params, out);
            *room = emptied(pages);
        }
    }

    pub(super) fn project<const N: usize>(
        &self,
        projections: [&Projection; N],
        x: &[f32],
        outs: [&mut [f32]; N],
        products: &mut Products,
    ) {
        let list = projections.into_iter().zip(outs);
        let list = list.map(|(projection, out)| {
            Product::new(x, projection.matrix.view(), projection.bias.as_deref(), out)
        });
        products.compute(&self.pool, self.isa, list);
    }

    pub(super) fn rotate(&self, head: &mut [f32], position: u32) {
        match self.arch().rope.pairs {
            Pairs::Halves => self.rope.apply(head, position),
            Pairs::Neighbours => self.rope.apply_to_neighbours(head, position),
        }
    }

    /// Normalises parts as wide as the weight: a head, or a whole projection.
    pub(super) fn norm_parts(&self, values: &mut [f32], weight: &[f32], eps: f32) {
        for part in values.chunks_exact_mut(weight.len()) {
            rms_norm_in_place(self.isa, part, weight, eps);
        }
    }
}

/// The values of some heads.
fn times(heads: Range<usize>, width: usize) -> Range<usize> {
    heads.start * width..heads.end * width
}
