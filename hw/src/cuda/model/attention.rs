//! Self-attention on the device: projections over the whole batch, then rows over their pages.

use super::super::CudaError;
use super::super::stream::Arg::{self, At, Long, Value, Word};
use super::Failed;
use super::ranks::Among;
use super::run::{Run, Several};
use super::tables::{Batch, Pages};
use super::weights::{Inputs, Latent, Layer, Matrix};
use lite_llm_model::arch::QkNorm;
use lite_llm_model::forward::exchange;
use std::ops::Range;

/// Epsilon of the norms within latent attention: a constant of these models.
const LATENT_EPS: f32 = 1e-6;
const PAGE: u32 = 64;
/// Threads of a block that scores a page, and the most of one that mixes it.
const SCORE_THREADS: u32 = 128;
const MIX_THREADS: u32 = 256;
const WARP: u32 = 32;

impl Run<'_> {
    /// Attends, and adds the output to the residual stream.
    pub(super) fn attend(&self, index: usize, layer: &Layer, among: &mut Among<'_>) -> Result<(), Failed> {
        let (room, rows) = (self.room, self.positions());
        let mixed = match &layer.inputs {
            Inputs::Plain { projections, qk_norm } => {
                self.plain((index, layer), projections, *qk_norm, among)?;
                room.mixed
            }
            Inputs::Latent(latent) => self.latent(index, layer, latent)?,
        };
        let (output, whole) = (&layer.output, &self.model.arch().attention);
        let of_heads = |tensor| times(&self.model.share().heads_of(tensor, whole), whole.value_dim);
        self.gather((mixed, mixed), rows as usize, &of_heads, exchange::of_mixed(index), among)?;
        self.pack(mixed, 0, rows, output.inputs, &[output.storage], room.packed)?;
        self.product(room.packed, output, (self.tables.all, rows), room.added)?;
        self.gather_rows((room.added, room.added), rows, self.hidden(), exchange::of_output(index), among)?;
        Ok(self.add(room.added)?)
    }

    /// Normalises whole queries and keys, of which each tensor rank has some heads.
    fn norms_of_all(
        &self,
        index: usize,
        [of_queries, of_keys]: [(u64, u32); 2],
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        let (share, whole) = (self.model.share(), &self.model.arch().attention);
        let queries = |tensor| times(&share.heads_of(tensor, whole), whole.head_dim);
        let keys = |tensor| times(&share.kv_heads_of(tensor, whole), whole.head_dim);
        self.norm_of_all(self.room.q, of_queries, &queries, exchange::of_queries(index), among)?;
        self.norm_of_all(self.room.k, of_keys, &keys, exchange::of_keys(index), among)
    }

    fn plain(
        &self,
        (index, layer): (usize, &Layer),
        [q, k, v]: &[Matrix; 3],
        qk_norm: Option<[(u64, u32); 2]>,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        let (room, rows, all) = (self.room, self.positions(), (self.tables.all, self.positions()));
        let attention = self.model.attention_part();
        self.pack(room.normed, 0, rows, q.inputs, &[q.storage, k.storage, v.storage], room.packed)?;
        for (matrix, out) in [(q, room.q), (k, room.k), (v, room.v)] {
            self.product(room.packed, matrix, all, out)?;
        }
        let apart = self.is_tensor() && attention.qk_norm == QkNorm::Whole;
        if let Some(norms) = qk_norm.filter(|_| apart) {
            self.norms_of_all(index, norms, among)?;
        }
        if let Some(norms) = qk_norm.filter(|_| !apart) {
            for ((weight, width), (values, matrix)) in norms.into_iter().zip([(room.q, q), (room.k, k)]) {
                let parts = rows * (matrix.outputs / width);
                self.rms_norm(values, weight, values, parts, [width; 2], self.model.arch().norm_eps)?;
            }
        }
        if let Some(limit) = attention.clip_qkv {
            for (values, matrix) in [(room.q, q), (room.k, k), (room.v, v)] {
                self.clip(values, limit, rows * matrix.outputs)?;
            }
        }
        let width = attention.head_dim as u32;
        self.rope(room.q, attention.heads as u32, width)?;
        self.rope(room.k, attention.kv_heads as u32, width)?;
        Ok(self.over_pages(index, layer)?)
    }

    /// Latent attention; where its mixed values stand.
    fn latent(&self, index: usize, layer: &Layer, latent: &Latent) -> Result<u64, CudaError> {
        let (room, rows, all) = (self.room, self.positions(), (self.tables.all, self.positions()));
        let (attention, kv) = (self.model.attention_part(), self.model.kv_shape());
        let (heads, head_dim) = (attention.heads as u32, attention.head_dim as u32);
        let (width, rank) = (kv.key_dim as u32, kv.value_dim as u32);
        let (cached, values) = (room.k, attention.value_dim as u32);
        let storages = [latent.query.storage, latent.latent.storage];
        self.pack(room.normed, 0, rows, latent.query.inputs, &storages, room.packed)?;
        self.product(room.packed, &latent.query, all, room.first)?;
        self.product(room.packed, &latent.latent, all, cached)?;
        let mut queries = room.first;
        if let Some((norm, second)) = &latent.query_norm {
            let wide = [second.inputs; 2];
            self.rms_norm(room.first, *norm, room.first, rows, wide, LATENT_EPS)?;
            self.pack(room.first, 0, rows, second.inputs, &[second.storage], room.packed)?;
            self.product(room.packed, second, all, room.queries)?;
            queries = room.queries;
        }
        self.rms_norm(cached, latent.latent_norm, cached, rows, [rank, width], LATENT_EPS)?;
        self.rope(Self::value(cached, rank as usize), 1, width)?;
        // By head, as each has matrices of its own: the plain part through the transposed keys, then the rotated part.
        let (rotated, every) = (width - rank, rows * heads);
        let plain = head_dim - rotated;
        let [to_query, to_value] = &latent.through;
        let tables = self.tables;
        self.arrange((queries, head_dim, 0), tables.to_heads, (room.apart, plain, 0), plain, every)?;
        self.by_head(to_query)?;
        self.arrange((room.through, rank, 0), tables.from_heads, (room.q, width, 0), rank, every)?;
        self.arrange((queries, head_dim, plain), 0, (room.q, width, rank), rotated, every)?;
        self.rope(Self::value(room.q, rank as usize), heads, width)?;
        self.over_pages(index, layer)?;
        self.arrange((room.mixed, rank, 0), tables.to_heads, (room.apart, rank, 0), rank, every)?;
        self.by_head(to_value)?;
        self.arrange((room.through, values, 0), tables.from_heads, (room.v, values, 0), values, every)?;
        Ok(room.v)
    }

    /// A product with a matrix of each head: heads x rows x inputs into heads x rows x outputs.
    fn by_head(&self, (first, begins): &(Matrix, u64)) -> Result<(), CudaError> {
        let (rows, heads) = (self.positions(), self.model.attention_part().heads as u32);
        let every = rows * heads;
        self.pack(self.room.apart, 0, every, first.inputs, &[first.storage], self.room.packed)?;
        let several = Several {
            count: heads,
            weights_at: *begins,
            biases_at: 0,
            first_row: self.tables.by_head,
            rows_max: rows,
            rows_usual: rows,
        };
        self.products(self.room.packed, first, several, self.room.through)
    }

    /// Writes keys and values of every position into the cache, and mixes the values that each position sees.
    fn over_pages(&self, index: usize, layer: &Layer) -> Result<(), CudaError> {
        let (kv, (cache, page_bytes)) = (self.model.kv_shape(), self.cache);
        let (group, keys_at) = self.model.kv_place(index);
        let values_at = if kv.values_in_keys { keys_at } else { keys_at + kv.key_page_bytes() };
        let pages = &self.tables.pages[group];
        let write = self.functions.of_cache(kv.dtype).write;
        let mut sides = vec![(self.room.k, keys_at, kv.key_dim)];
        if !kv.values_in_keys {
            sides.push((self.room.v, values_at, kv.value_dim));
        }
        for (values, at, dim) in sides {
            let arguments = [
                At(values),
                At(self.tables.positions),
                At(pages.of_position),
                At(cache),
                Long(page_bytes),
                Long(at as u64),
                Word(kv.kv_heads as u32),
                Word(dim as u32),
            ];
            self.launch(write, [self.positions(), 1, 1], 128, &arguments)?;
        }
        for batch in &pages.batches {
            self.batch(layer, pages, batch, [keys_at as u64, values_at as u64])?;
        }
        Ok(())
    }

    fn batch(
        &self,
        layer: &Layer,
        pages: &Pages,
        batch: &Batch,
        [keys_at, values_at]: [u64; 2],
    ) -> Result<(), CudaError> {
        let (kv, attention) = (self.model.kv_shape(), self.model.attention_part());
        let (heads, kv_heads) = (attention.heads as u32, kv.kv_heads as u32);
        let (key_dim, value_dim) = (kv.key_dim as u32, kv.value_dim as u32);
        let (first, span) = (batch.first, batch.span);
        let rows: [Arg; 10] = [
            At(Self::value(self.tables.positions, first)),
            At(batch.first_row),
            At(batch.first_page),
            At(pages.table),
            At(self.cache.0),
            Long(self.cache.1),
            Word(heads),
            Word(kv_heads),
            Word(pages.window),
            Word(span),
        ];
        let with = |more: &[Arg]| [&rows[..], more].concat();
        let of_query = batch.count * attention.heads * span as usize;
        let scores = self.room.attention;
        let maxima = Self::value(scores, of_query * PAGE as usize);
        let denominators = Self::value(maxima, of_query);
        let numerators = Self::value(denominators, of_query);
        let q = Self::value(self.room.q, first * attention.heads * kv.key_dim);
        let out = Self::value(self.room.mixed, first * attention.heads * kv.value_dim);
        let of_cache = self.functions.of_cache(kv.dtype);

        let blocks = [span, kv_heads, batch.pieces];
        let more = [At(q), At(scores), At(maxima), Long(keys_at), Word(key_dim), Value(attention.scale)];
        self.launch(of_cache.scores, blocks, SCORE_THREADS, &with(&more))?;

        let stride = if kv.values_in_keys { key_dim } else { value_dim };
        let more = [
            At(scores),
            At(maxima),
            At(layer.sinks),
            At(numerators),
            At(denominators),
            Long(values_at),
            Word(stride),
            Word(value_dim),
        ];
        // A thread has eight dimensions, for every so-manieth four queries.
        let threads = (4 * value_dim.div_ceil(8)).next_multiple_of(WARP).min(MIX_THREADS);
        self.launch(of_cache.mix, blocks, threads, &with(&more))?;

        let more = [At(maxima), At(layer.sinks), At(numerators), At(denominators), At(out), Word(value_dim)];
        let threads = value_dim.next_multiple_of(WARP).min(MIX_THREADS);
        self.launch(self.functions.attention_sum, [heads, batch.pieces, 1], threads, &with(&more))
    }
}

/// The values of some heads.
const fn times(heads: &Range<usize>, width: usize) -> Range<usize> {
    heads.start * width..heads.end * width
}
