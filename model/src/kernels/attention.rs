//! Causal attention over paged keys and values, one result for each (position, head).
//!
//! Scores are dot products times the scale. Their exact maximum is taken over all visible keys. In a block of 64
//! positions (at absolute offsets, a page) every output dimension is one ascending fma chain from +0, and so is the
//! denominator; blocks are added left to right, a sink joins the denominator last, and one division ends it. Keys that
//! are masked, by causality or the window, are left out, as are blocks without a visible key.

use super::convert::{narrow, widen_body};
use super::linear::dot_body;
use super::math::{exp, exp_body};
use super::pool::Pool;
use super::{DType, Isa, versioned};
use std::borrow::Cow;
use std::sync::Mutex;

/// Positions in a page, and in a block of the softmax.
pub const PAGE_POSITIONS: usize = 64;

/// Shape and storage type of cached keys and values.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KvShape {
    /// Heads that have keys and values of their own.
    pub kv_heads: usize,
    /// Values in a key (and a query).
    pub key_dim: usize,
    /// Values in a value vector (and an output).
    pub value_dim: usize,
    /// Storage type; keys and values are rounded to it before any use.
    pub dtype: DType,
}

impl KvShape {
    /// Bytes of the keys of one page.
    pub fn key_page_bytes(&self) -> usize {
        self.kv_heads * PAGE_POSITIONS * self.key_dim * self.dtype.bytes()
    }

    /// Bytes of the values of one page.
    pub fn value_page_bytes(&self) -> usize {
        self.kv_heads * PAGE_POSITIONS * self.value_dim * self.dtype.bytes()
    }

    /// Rounds the keys (`kv_heads` x `key_dim`) of one position to storage, at `position` mod 64 of its page.
    pub fn write_keys(&self, position: u32, keys: &[f32], page: &mut [u8]) {
        assert_eq!(page.len(), self.key_page_bytes(), "the page does not fit the shape");
        self.write(position, keys, self.key_dim, page);
    }

    /// Rounds the values (`kv_heads` x `value_dim`) of one position to storage, at `position` mod 64 of its page.
    pub fn write_values(&self, position: u32, values: &[f32], page: &mut [u8]) {
        assert_eq!(page.len(), self.value_page_bytes(), "the page does not fit the shape");
        self.write(position, values, self.value_dim, page);
    }

    fn write(&self, position: u32, values: &[f32], dim: usize, page: &mut [u8]) {
        assert_eq!(values.len(), self.kv_heads * dim, "the position does not fit the shape");
        let slot = position as usize % PAGE_POSITIONS;
        let size = dim * self.dtype.bytes();
        for head in 0..self.kv_heads {
            let at = (head * PAGE_POSITIONS + slot) * size;
            narrow(self.dtype, &values[head * dim..][..dim], &mut page[at..at + size]);
        }
    }
}

/// Keys and values of 64 positions, each `[kv_head][position][dim]` in little-endian storage.
#[derive(Clone, Copy, Debug)]
pub struct KvPage<'a> {
    /// The keys.
    pub keys: &'a [u8],
    /// The values.
    pub values: &'a [u8],
}

/// The pages of one sequence in the order of its positions.
#[derive(Clone, Copy, Debug)]
pub struct PagedKv<'a> {
    shape: KvShape,
    pages: &'a [KvPage<'a>],
}

impl<'a> PagedKv<'a> {
    /// A view of pages, or `None` where one has not the size that the shape gives. A page below every window that will
    /// be asked for may be empty.
    pub fn new(shape: KvShape, pages: &'a [KvPage<'a>]) -> Option<Self> {
        let (keys, values) = (shape.key_page_bytes(), shape.value_page_bytes());
        let fits = |page: &KvPage<'_>| {
            (page.keys.len() == keys && page.values.len() == values)
                || (page.keys.is_empty() && page.values.is_empty())
        };
        pages.iter().all(fits).then_some(Self { shape, pages })
    }

    /// The shape of the pages.
    pub fn shape(&self) -> KvShape {
        self.shape
    }
}

/// What of attention is not a shape.
#[derive(Clone, Copy, Debug)]
pub struct AttentionParams<'a> {
    /// Query heads: a multiple of the key/value heads.
    pub heads: usize,
    /// Multiplies each score.
    pub scale: f32,
    /// Number of last positions, the own one included, that a position sees; all where `None`.
    pub window: Option<u32>,
    /// One logit for each head that takes part in the softmax without a value.
    pub sinks: Option<&'a [f32]>,
}

/// Attention of some positions of one sequence.
///
/// `q` is positions x heads x key_dim, `out` positions x heads x value_dim; the pages hold every position that is seen,
/// the own ones included.
///
/// # Panics
/// If a slice does not fit the shape, a page is missing, or this machine lacks `isa`.
pub fn attention(
    pool: &Pool,
    isa: Isa,
    q: &[f32],
    positions: &[u32],
    kv: &PagedKv<'_>,
    params: &AttentionParams<'_>,
    out: &mut [f32],
) {
    let shape = kv.shape;
    assert!(shape.kv_heads > 0 && shape.key_dim > 0 && shape.value_dim > 0, "the shape is empty");
    assert!(
        params.heads > 0 && params.heads.is_multiple_of(shape.kv_heads),
        "heads are no multiple of kv heads"
    );
    assert_eq!(q.len(), positions.len() * params.heads * shape.key_dim, "the queries do not fit the shape");
    assert_eq!(
        out.len(),
        positions.len() * params.heads * shape.value_dim,
        "the output does not fit the shape"
    );
    assert!(params.sinks.is_none_or(|sinks| sinks.len() == params.heads), "the sinks do not fit the heads");
    assert!(params.window != Some(0), "a window of no position");
    if positions.is_empty() {
        return;
    }
    let group = params.heads / shape.kv_heads;
    let parts: Vec<Mutex<&mut [f32]>> =
        out.chunks_exact_mut(group * shape.value_dim).map(Mutex::new).collect();
    pool.run(parts.len(), &|task| {
        let mut out = parts[task].lock().expect("a part is locked once");
        let (row, kv_head) = (task / shape.kv_heads, task % shape.kv_heads);
        let q = &q[task * group * shape.key_dim..][..group * shape.key_dim];
        let sinks = params.sinks.map(|sinks| &sinks[kv_head * group..][..group]);
        let seen = Seen::new(positions[row], params.window);
        attend(isa, kv, &seen, Group { kv_head, q, sinks, scale: params.scale }, &mut out);
    });
}

/// The run of positions that one position sees.
struct Seen {
    first: usize,
    end: usize,
}

impl Seen {
    fn new(position: u32, window: Option<u32>) -> Self {
        let end = position as usize + 1;
        Self { first: window.map_or(0, |window| end.saturating_sub(window as usize)), end }
    }

    fn pages(&self) -> std::ops::Range<usize> {
        self.first / PAGE_POSITIONS..self.end.div_ceil(PAGE_POSITIONS)
    }

    /// The visible slots of a page.
    fn slots(&self, page: usize) -> std::ops::Range<usize> {
        let start = page * PAGE_POSITIONS;
        self.first.saturating_sub(start)..(self.end - start).min(PAGE_POSITIONS)
    }
}

/// The query heads of one position that share a key/value head.
struct Group<'a> {
    kv_head: usize,
    q: &'a [f32],
    sinks: Option<&'a [f32]>,
    scale: f32,
}

versioned! {
    fn attend(kv: &PagedKv<'_>, seen: &Seen, group: Group<'_>, out: &mut [f32]) = attend_body
}

#[inline(always)]
fn attend_body(kv: &PagedKv<'_>, seen: &Seen, group: Group<'_>, out: &mut [f32]) {
    let KvShape { key_dim, value_dim, dtype, .. } = kv.shape;
    let span = seen.end - seen.first;
    let heads = group.q.len() / key_dim;
    let mut scores = vec![0.0f32; heads * span];
    let mut at = 0;
    for page in seen.pages() {
        let slots = seen.slots(page);
        let keys = head_of_page(dtype, kv.pages[page].keys, group.kv_head, key_dim);
        for key in keys[slots.start * key_dim..slots.end * key_dim].chunks_exact(key_dim) {
            for (head, q) in group.q.chunks_exact(key_dim).enumerate() {
                scores[head * span + at] = dot_body(q, key) * group.scale;
            }
            at += 1;
        }
    }
    let mut denominators = vec![0.0f32; heads];
    let mut sinks = vec![0.0f32; heads];
    for (head, scores) in scores.chunks_exact_mut(span).enumerate() {
        let mut max = group.sinks.map_or(f32::NEG_INFINITY, |sinks| sinks[head]);
        for score in scores.iter() {
            max = if *score > max { *score } else { max };
        }
        for score in scores.iter_mut() {
            *score -= max;
        }
        exp_body(scores);
        sinks[head] = group.sinks.map_or(0.0, |sinks| exp(sinks[head] - max));
    }
    let mut at = 0;
    let mut block = vec![0.0f32; value_dim];
    for page in seen.pages() {
        let slots = seen.slots(page);
        let values = head_of_page(dtype, kv.pages[page].values, group.kv_head, value_dim);
        let values = &values[slots.start * value_dim..slots.end * value_dim];
        for (head, out) in out.chunks_exact_mut(value_dim).enumerate() {
            let weights = &scores[head * span + at..][..slots.len()];
            let mut denominator = 0.0f32;
            for weight in weights {
                denominator += weight;
            }
            weighted_sum(weights, values, value_dim, &mut block);
            if at == 0 {
                denominators[head] = denominator;
                out.copy_from_slice(&block);
            } else {
                denominators[head] += denominator;
                for (out, block) in out.iter_mut().zip(&block) {
                    *out += block;
                }
            }
        }
        at += slots.len();
    }
    for (head, out) in out.chunks_exact_mut(value_dim).enumerate() {
        let denominator =
            if group.sinks.is_some() { denominators[head] + sinks[head] } else { denominators[head] };
        for out in out {
            *out /= denominator;
        }
    }
}

/// The keys or values of one head of a page, as `f32`: in place where they already are.
#[inline(always)]
fn head_of_page(dtype: DType, page: &[u8], head: usize, dim: usize) -> Cow<'_, [f32]> {
    let size = PAGE_POSITIONS * dim * dtype.bytes();
    let bytes = &page[head * size..][..size];
    if cfg!(target_endian = "little")
        && dtype == DType::F32
        && let Ok(values) = bytemuck::try_cast_slice(bytes)
    {
        return Cow::Borrowed(values);
    }
    let mut values = vec![0.0f32; PAGE_POSITIONS * dim];
    widen_body(dtype, bytes, &mut values);
    Cow::Owned(values)
}

/// One ascending fma chain from +0 for each dimension, 64 or 16 dimensions at a time to keep them in registers.
#[inline(always)]
fn weighted_sum(weights: &[f32], values: &[f32], dim: usize, out: &mut [f32]) {
    let mut at = 0;
    while at + 64 <= dim {
        chains::<64>(weights, values, dim, at, out);
        at += 64;
    }
    while at + 16 <= dim {
        chains::<16>(weights, values, dim, at, out);
        at += 16;
    }
    while at < dim {
        chains::<1>(weights, values, dim, at, out);
        at += 1;
    }
}

#[inline(always)]
fn chains<const WIDTH: usize>(weights: &[f32], values: &[f32], dim: usize, at: usize, out: &mut [f32]) {
    let mut acc = [0.0f32; WIDTH];
    for (weight, values) in weights.iter().zip(values.chunks_exact(dim)) {
        let values = &values[at..at + WIDTH];
        for lane in 0..WIDTH {
            acc[lane] = weight.mul_add(values[lane], acc[lane]);
        }
    }
    out[at..at + WIDTH].copy_from_slice(&acc);
}
