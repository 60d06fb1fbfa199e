//! The cases: operands that tiles, lanes, pages and registers do not divide, and that are subnormal, zero and equal here and there.

use super::*;
use crate::arch::{Activation, Score, TierOfGroups, TieredRouter};
use lite_llm_core::config::Placement;
use lite_llm_core::routing::{GroupLimit, GroupScore, Hierarchy};

/// Numbers in (-2, 2), among them zeros of both signs, subnormals, and some whose products underflow.
pub(in crate::kernels) fn operands(len: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let bits = (state >> 32) as u32;
            match state >> 28 & 15 {
                0 => 0.0,
                1 => -0.0,
                2 => f32::from_bits(bits & 0x807f_ffff),
                3 => f32::from_bits(bits & 0x80ff_ffff | 0x1a00_0000),
                _ => bits as i32 as f32 / 1_073_741_824.0,
            }
        })
        .collect()
}

fn stored(dtype: DType, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.bytes()];
    convert::narrow(dtype, values, &mut bytes);
    bytes
}

/// How many rows a product has: every number of rows that a CPU's block has, and more than one block; or as many as a prefill, of
/// which a device's tiles have more than one whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// As steps of decoding.
    Few,
    /// As a prefill.
    Many,
}

impl Rows {
    fn counts(self) -> &'static [usize] {
        match self {
            Self::Few => &[1, 2, 3, 4, 5, 6, 13],
            Self::Many => &[97],
        }
    }
}

/// Two chunks, the second padded; a padded tile.
pub(super) fn linears<O: Operators>(
    on: &mut O,
    dtype: DType,
    rows: Rows,
    bits: &mut Bits,
) -> Result<(), O::Error> {
    let (outputs, inputs) = (33, 1061);
    let mut packed = vec![0; packed_len(dtype, outputs, inputs).expect("the shape is small")];
    pack(dtype, outputs, inputs, &stored(dtype, &operands(outputs * inputs, 1)), &mut packed);
    let bias = operands(outputs, 2);
    products(on, dtype.into(), (outputs, inputs), &packed, (rows, Some(&bias)), bits)
}

/// Whole and cut chunks; every code, factors of all sizes.
pub(super) fn linears_of_mxfp4<O: Operators>(
    on: &mut O,
    rows: Rows,
    bits: &mut Bits,
) -> Result<(), O::Error> {
    let (outputs, inputs) = (65, 1056);
    let mut packed = vec![0; packed_len(Storage::Mxfp4, outputs, inputs).expect("the shape is small")];
    let code = |output, input| (output * 5 + input * 11) as u8;
    let exponent = |output, block| (100 + output % 40 + block % 7) as u8;
    pack_mxfp4(outputs, inputs, code, exponent, &mut packed);
    products(on, Storage::Mxfp4, (outputs, inputs), &packed, (rows, None), bits)
}

pub(super) fn linears_of_e4m3<O: Operators>(on: &mut O, rows: Rows, bits: &mut Bits) -> Result<(), O::Error> {
    let (outputs, inputs) = (145, 1061);
    let mut packed = vec![0; packed_len(Storage::E4m3, outputs, inputs).expect("the shape is small")];
    let code = |output, input| (output * 7 + input * 13) as u8 & 0xbf;
    let factors = operands(2 * 9, 21);
    pack_e4m3(outputs, inputs, code, |down, across| factors[down * 9 + across], &mut packed);
    products(on, Storage::E4m3, (outputs, inputs), &packed, (rows, None), bits)
}

fn quantised_rows(kind: Quantised, count: usize, columns: usize, seed: u64) -> Vec<u8> {
    let mut rows = vec![0; count * kind.row_bytes(columns)];
    let values = operands(count * columns, seed);
    for (values, row) in values.chunks(columns).zip(rows.chunks_mut(kind.row_bytes(columns))) {
        quantise::quantise_row(kind, values, row).expect("the operands are finite and small");
    }
    rows
}

/// A group without a partner, a padded one, a padded tile. Rows are quantised too.
pub(super) fn linears_of_groups<O: Operators>(
    on: &mut O,
    kind: Quantised,
    rows: Rows,
    bits: &mut Bits,
) -> Result<(), O::Error> {
    let (outputs, inputs) = (65, 1061);
    let quantised = quantised_rows(kind, outputs, inputs, 31);
    bits.bytes(&quantised);
    let mut packed = vec![0; packed_len(kind, outputs, inputs).expect("the shape is small")];
    pack_groups(kind, outputs, inputs, &quantised, &mut packed);
    products(on, kind.into(), (outputs, inputs), &packed, (rows, None), bits)
}

/// Products with one matrix; a bias, if there is one, is left out where there is one row.
fn products<O: Operators>(
    on: &mut O,
    storage: Storage,
    (outputs, inputs): (usize, usize),
    packed: &[u8],
    (rows, bias): (Rows, Option<&[f32]>),
    bits: &mut Bits,
) -> Result<(), O::Error> {
    let view = PackedView::new(storage, outputs, inputs, packed).expect("the length is the shape's");
    for &rows in rows.counts() {
        let x = operands(rows * inputs, 3 + rows as u64);
        bits.values(&on.linear(&x, rows, &view, bias.filter(|_| rows > 1))?);
    }
    Ok(())
}

/// Dimensions that fill no whole register, grouped heads.
pub(super) const SHAPE: KvShape =
    KvShape { kv_heads: 2, key_dim: 72, value_dim: 83, values_in_keys: false, dtype: DType::F32 };
pub(super) const LATENT: KvShape = KvShape { kv_heads: 1, value_dim: 51, values_in_keys: true, ..SHAPE };

/// Three pages; windows and sinks.
pub(super) fn attentions<O: Operators>(on: &mut O, shape: KvShape, bits: &mut Bits) -> Result<(), O::Error> {
    let KvShape { kv_heads, key_dim, value_dim, values_in_keys, .. } = shape;
    let (heads, len) = (6, 150u64);
    let keys: Vec<f32> = (0..len).flat_map(|position| operands(kv_heads * key_dim, position)).collect();
    let of_values = if values_in_keys { 0 } else { kv_heads * value_dim };
    let values: Vec<f32> = (0..len).flat_map(|position| operands(of_values, 1 << 32 | position)).collect();
    let positions = [0, 63, 64, 149];
    let q = operands(positions.len() * heads * key_dim, 7);
    let sinks = operands(heads, 8);
    for (window, sinks) in [(None, None), (Some(70), Some(&sinks[..]))] {
        let params = AttentionParams { heads, scale: 0.117_851_13, window, sinks };
        let attended = Attended { shape, keys: &keys, values: &values, q: &q, positions: &positions, params };
        bits.values(&on.attention(&attended)?);
    }
    Ok(())
}

pub(super) fn rms_norms<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    bits.values(&on.rms_norm(&operands(1061, 1), 1061, &operands(1061, 2), 1e-5)?);
    Ok(())
}

/// Rows whose last values stay as they are.
pub(super) fn rms_norms_of_latents<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    bits.values(&on.rms_norm(&operands(3 * 83, 1), 83, &operands(70, 2), 1e-6)?);
    Ok(())
}

pub(super) fn layer_norms<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    let (x, weight, bias) = (operands(1061, 1), operands(1061, 2), operands(1061, 3));
    bits.values(&on.layer_norm(&x, &weight, Some(&bias), 1e-5)?);
    bits.values(&on.layer_norm(&x, &weight, None, 1e-5)?);
    Ok(())
}

/// The tables come from the pinned `libm`.
pub(super) fn ropes<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    let frequencies = rope::inverse_frequencies(10_000.0, 64);
    bits.values(&frequencies);
    let table = RopeTable::new(&frequencies, 1.25, 300);
    for position in [0, 1, 7, 255, 299] {
        let (cos, sin) = table.row(position);
        bits.values(cos);
        bits.values(sin);
        bits.values(&on.rope(&table, position, &operands(80, u64::from(position)), false)?);
    }
    Ok(())
}

pub(super) fn ropes_of_neighbours<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    let table = RopeTable::new(&rope::inverse_frequencies(10_000.0, 64), 1.25, 300);
    for position in [0, 1, 7, 255, 299] {
        bits.values(&on.rope(&table, position, &operands(80, u64::from(position)), true)?);
    }
    Ok(())
}

/// Every 2^16-th pattern or so, NaNs and infinities included, and the range that matters more densely.
fn exp_operands() -> Vec<f32> {
    let patterns = (0..=u32::MAX).step_by(65_521).map(f32::from_bits);
    patterns.chain((0..20_000).map(|i| i as f32 * -0.0053)).collect()
}

/// Without what is not finite: NaN operands pass their payload on, in ways of their own on every machine.
fn finite_operands() -> Vec<f32> {
    exp_operands().into_iter().filter(|x| x.is_finite()).collect()
}

pub(super) fn exps<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    bits.values(&on.exp(&exp_operands())?);
    Ok(())
}

pub(super) fn sigmoids<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    let values: Vec<f32> = finite_operands().into_iter().step_by(8).collect();
    bits.values(&on.sigmoid(&values)?);
    Ok(())
}

pub(super) fn silus<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    let values = finite_operands();
    bits.values(&on.swiglu(&values, &vec![1.0; values.len()])?);
    Ok(())
}

pub(super) fn gates<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    bits.values(&on.swiglu(&operands(1061, 1), &operands(1061, 2))?);
    Ok(())
}

pub(super) fn clamped_gates<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    bits.values(&on.clamped_swiglu(&operands(1061, 1), &operands(1061, 2), 1.702, 1.5)?);
    Ok(())
}

pub(super) fn clamped_gates_of_every_size<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    let gates = finite_operands();
    let ups: Vec<f32> = operands(gates.len(), 3).iter().map(|up| up * 9.0).collect();
    bits.values(&on.clamped_swiglu(&gates, &ups, 1.702, 7.0)?);
    Ok(())
}

/// Positions with four experts, fewer, and the shared one alone.
pub(super) fn combines<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    let users = [8, 0, 3, 1, 2, 7, NOBODY, NOBODY, NOBODY, NOBODY, NOBODY, NOBODY];
    for hidden in [36, 131] {
        let combined = Combined {
            x: &operands(3 * hidden, 1),
            hidden,
            results: &operands(9 * hidden, 2),
            users: &users,
            weights: &operands(users.len(), 3),
            shared: &operands(3 * hidden, 4),
            gates: &operands(3, 5),
            multiplier: 0.22,
        };
        bits.values(&on.combine(&combined)?);
    }
    Ok(())
}

pub(super) fn adds<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    bits.values(&on.add(&operands(1061, 1), &operands(1061, 2), 0.22)?);
    Ok(())
}

pub(super) fn clips<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    bits.values(&on.clip(&operands(1061, 1), 0.75)?);
    Ok(())
}

/// Quotients of all sizes; some are subnormal, where a division that is not exact shows.
pub(super) fn divisions<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    for by in [13.0, 1e-3, 7e37] {
        bits.values(&on.divide(&operands(1061, 1), by)?);
    }
    Ok(())
}

/// Columns at multiples of sixteen bytes, and not.
pub(super) fn arrangements<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    for columns in
        [Columns { n: 64, from: [96, 32], to: [80, 16] }, Columns { n: 131, from: [133, 1], to: [135, 3] }]
    {
        bits.values(&on.arrange(&operands(6 * columns.from[0], 1), &[5, 0, 3, 3], &columns)?);
    }
    Ok(())
}

pub(super) fn conversions<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    let values: Vec<f32> =
        (0..=u32::MAX).step_by(65_521).map(f32::from_bits).filter(|x| !x.is_nan()).collect();
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let stored = on.narrow(dtype, &values)?;
        bits.bytes(&stored);
        bits.values(&on.embed(dtype.into(), &stored, &[0], values.len(), 1.0)?);
    }
    Ok(())
}

pub(super) fn embeddings<O: Operators>(on: &mut O, dtype: DType, bits: &mut Bits) -> Result<(), O::Error> {
    for hidden in [136, 77] {
        let table = stored(dtype, &operands(9 * hidden, 1));
        bits.values(&on.embed(dtype.into(), &table, &[3, 0, 8, 3], hidden, 1.7)?);
    }
    Ok(())
}

pub(super) fn embeddings_of_groups<O: Operators>(
    on: &mut O,
    kind: Quantised,
    bits: &mut Bits,
) -> Result<(), O::Error> {
    for hidden in [64, 77] {
        let table = quantised_rows(kind, 9, hidden, 1);
        bits.values(&on.embed(kind.into(), &table, &[3, 0, 8, 3], hidden, 1.7)?);
    }
    Ok(())
}

const POSITIONS: [u32; 4] = [0, 1, 977, 40_000];

/// A router of so many experts.
const fn router(experts: usize, top_k: usize, score: Score) -> Moe {
    Moe {
        experts,
        top_k,
        intermediate: 0,
        score,
        normalise: true,
        scaling: 2.5,
        group_limit: None,
        tiered: None,
        router_bias: false,
        activation: Activation::SwiGlu,
        expert_bias: false,
        shared: None,
        routers: &[],
        forms: &[],
    }
}

/// Routes positions twice: by scores of all sizes, and by few scores, so that there are ties of both zeros and of others.
fn route_twice<O: Operators>(on: &mut O, moe: &Moe, tiers: &[u32], bits: &mut Bits) -> Result<(), O::Error> {
    let width = moe.router_rows();
    let eligible: Vec<bool> = (0..width).map(|expert| expert % 7 != 3).collect();
    for (by, correction) in [(8.0, operands(width, 2)), (1.0, vec![0.25; width])] {
        let mut logits = operands(POSITIONS.len() * width, 1);
        logits.iter_mut().for_each(|logit| *logit *= by);
        if by == 1.0 {
            logits.iter_mut().for_each(|logit| *logit = logit.round());
        }
        let routed = Routed {
            moe,
            logits: &logits,
            positions: &POSITIONS,
            eligible: &eligible,
            tiers,
            correction: &correction,
            seed: 0x0123_4567_89ab_cdef,
            layer: 5,
        };
        for (experts, weights) in on.route(&routed)? {
            experts.iter().for_each(|&expert| bits.word(expert));
            bits.values(&weights);
        }
    }
    Ok(())
}

pub(super) fn routes<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    for score in [Score::Softmax, Score::SoftmaxOfSelected, Score::Sigmoid] {
        for limit in [None, Some((2, GroupScore::Max)), Some((3, GroupScore::SumOfTop2))] {
            let mut moe = router(60, 6, score);
            moe.normalise = score != Score::SoftmaxOfSelected;
            moe.group_limit = limit.map(|(keep, score)| GroupLimit { groups: 4, keep, score });
            route_twice(on, &moe, &[], bits)?;
        }
    }
    Ok(())
}

pub(super) fn routes_by_tiers<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    let tier = |groups, experts| {
        let (name, placement) = (String::new(), Placement::default());
        TierOfGroups { name, groups, experts, placement }
    };
    let mut moe = router(28, 0, Score::Softmax);
    let tiers = vec![tier(2, 3), tier(3, 4), tier(2, 5)];
    moe.tiered = Some(TieredRouter { tiers, select: Hierarchy { tiers: 2, groups: 2, experts: 3 } });
    route_twice(on, &moe, &[0, 2], bits)
}

pub(super) fn routes_sparsely<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    let mut moe = router(70, 2, Score::Sparsemixer { jitter: 0.13 });
    moe.normalise = false;
    route_twice(on, &moe, &[], bits)
}

pub(super) fn penalties<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    bits.values(&on.penalise(&operands(333, 1), &[5, 0, 332, 17, 18, 100], 1.3)?);
    Ok(())
}

/// Logits that differ, many that are equal, zeros of both signs.
pub(super) fn largest<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    let logits = operands(5_003, 1);
    let rounded: Vec<f32> = logits.iter().map(|logit| logit.round()).collect();
    let zeros: Vec<f32> = logits.iter().map(|logit| -logit.abs() * 0.0).collect();
    for logits in [logits, rounded, zeros] {
        bits.word(on.argmax(&logits)?);
    }
    Ok(())
}

pub(super) fn samples<O: Operators>(on: &mut O, bits: &mut Bits) -> Result<(), O::Error> {
    let logits: Vec<f32> = operands(2_000, 1).iter().map(|x| x * 6.0).collect();
    bits.word(on.argmax(&logits)?);
    let narrowed = [(0, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (100, 0.8, 0.01)];
    let ways = narrowed.into_iter().flat_map(|(top_k, top_p, min_p)| {
        let params = Params { temperature: 0.8, top_k, top_p, min_p };
        (0..8).map(move |draw| (params, (draw * 2 + 1) << 60))
    });
    on.sample(&logits, &ways.collect::<Vec<_>>())?.into_iter().for_each(|token| bits.word(token));
    Ok(())
}
