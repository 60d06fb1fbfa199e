//! Every kernel against the plain definition, bit for bit, over random shapes and operands that trouble arithmetic.

use super::super::golden::operands;
use super::*;
use proptest::prelude::*;

/// The value and a few that trouble arithmetic: zeros of both signs, subnormals, products that underflow.
fn number() -> impl Strategy<Value = f32> {
    prop_oneof![
        6 => -2.0f32..2.0,
        1 => Just(0.0f32),
        1 => Just(-0.0f32),
        1 => any::<u32>().prop_map(|bits| f32::from_bits(bits & 0x807f_ffff)),
        1 => -1e-23f32..1e-23,
    ]
}

pub(super) fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// Rule 2 as the document says it, from first principles.
fn definition(x: &[f32], w: &[f32]) -> f32 {
    let padded = x.len().next_multiple_of(16);
    let at = |s: &[f32], k: usize| s.get(k).copied().unwrap_or(0.0);
    let mut total = None;
    for start in (0..padded).step_by(1024) {
        let mut chunk = None;
        for lane in 0..16 {
            let mut acc = 0.0f32;
            for k in (start + lane..padded.min(start + 1024)).step_by(16) {
                acc = at(x, k).mul_add(at(w, k), acc);
            }
            chunk = Some(chunk.map_or(acc, |sum: f32| sum + acc));
        }
        total = Some(total.map_or(chunk.unwrap(), |sum: f32| sum + chunk.unwrap()));
    }
    total.unwrap_or(0.0)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn linear_is_the_definition_for_every_shape_thread_and_isa(
        inputs in prop::sample::select(vec![0usize, 1, 15, 16, 17, 64, 1023, 1024, 1025, 2048, 2077]),
        outputs in prop::sample::select(vec![1usize, 8, 15, 16, 17, 33, 100]),
        // From 64 rows on weights are widened once.
        rows in prop_oneof![4 => 1usize..15, 1 => 15usize..90],
        dtype in prop::sample::select(vec![DType::F32, DType::Bf16, DType::F16]),
        with_bias in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let x = operands(rows * inputs, seed);
        let mut row_major = vec![0u8; outputs * inputs * dtype.bytes()];
        convert::narrow(dtype, &operands(outputs * inputs, seed ^ 1), &mut row_major);
        let mut weights = vec![0.0; outputs * inputs];
        convert::widen(Isa::Scalar, dtype, &row_major, &mut weights);
        let bias = with_bias.then(|| operands(outputs, seed ^ 2));
        let mut packed = vec![0u8; packed_len(dtype, outputs, inputs).unwrap()];
        pack(dtype, outputs, inputs, &row_major, &mut packed);
        let view = PackedView::new(dtype, outputs, inputs, &packed).unwrap();
        let mut expected = Vec::new();
        for row in 0..rows {
            for output in 0..outputs {
                let (x, w) = (&x[row * inputs..][..inputs], &weights[output * inputs..][..inputs]);
                let value = definition(x, w);
                prop_assert_eq!(value.to_bits(), dot(x, w).to_bits());
                expected.push(bias.as_ref().map_or(value, |bias| value + bias[output]));
            }
        }
        for isa in isas() {
            for threads in [1, 2, 3] {
                let mut out = vec![f32::NAN; rows * outputs];
                linear(&Pool::new(threads), isa, &x, rows, &view, bias.as_deref(), &mut out);
                prop_assert_eq!(bits(&out), bits(&expected), "{:?} {} threads", isa, threads);
            }
            // A row alone gives what it gives in the batch.
            let row = rows - 1;
            let mut out = vec![f32::NAN; outputs];
            linear(&Pool::new(1), isa, &x[row * inputs..], 1, &view, bias.as_deref(), &mut out);
            prop_assert_eq!(bits(&out), bits(&expected[row * outputs..]));
        }
    }

    #[test]
    fn attention_is_the_definition(
        kv_heads in 1usize..3,
        group in 1usize..4,
        key_dim in prop::sample::select(vec![1usize, 15, 16, 24, 64, 80]),
        value_dim in prop::sample::select(vec![1usize, 15, 16, 64, 80, 129]),
        dtype in prop::sample::select(vec![DType::F32, DType::Bf16, DType::F16]),
        len in 1usize..200,
        window in prop::option::of(1u32..150),
        with_sinks in any::<bool>(),
        inside in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let values_in_keys = inside && value_dim <= key_dim;
        let shape = KvShape { kv_heads, key_dim, value_dim, values_in_keys, dtype };
        let heads = kv_heads * group;
        let mut keys = operands(len * kv_heads * key_dim, seed);
        let mut values = if values_in_keys {
            keys.chunks_exact(key_dim).flat_map(|key| &key[..value_dim]).copied().collect()
        } else {
            operands(len * kv_heads * value_dim, seed ^ 1)
        };
        let storage: Vec<(Vec<u8>, Vec<u8>)> = (0..len.div_ceil(64)).map(|page| {
            let mut k = vec![0; shape.key_page_bytes()];
            let mut v = vec![0; shape.value_page_bytes()];
            for position in page * 64..len.min(page * 64 + 64) {
                shape.write_keys(position as u32, &keys[position * kv_heads * key_dim..][..kv_heads * key_dim], &mut k);
                let of_position = &values[position * kv_heads * value_dim..][..kv_heads * value_dim];
                shape.write_values(position as u32, if values_in_keys { &[] } else { of_position }, &mut v);
            }
            (k, v)
        }).collect();
        let pages: Vec<KvPage<'_>> = storage.iter().map(|(keys, values)| KvPage { keys, values }).collect();
        let kv = PagedKv::new(shape, &pages).unwrap();
        for stored in [&mut keys, &mut values] {
            let mut bytes = vec![0; stored.len() * dtype.bytes()];
            convert::narrow(dtype, stored, &mut bytes);
            convert::widen(Isa::Scalar, dtype, &bytes, stored);
        }
        let positions: Vec<u32> = [0, len / 2, len - 1].iter().map(|p| *p as u32).collect();
        let q = operands(positions.len() * heads * key_dim, seed ^ 2);
        let sinks = with_sinks.then(|| operands(heads, seed ^ 3));
        let params = AttentionParams { heads, scale: 0.25, window, sinks: sinks.as_deref() };
        let mut expected = vec![0.0f32; positions.len() * heads * value_dim];
        for (row, position) in positions.iter().enumerate() {
            for head in 0..heads {
                let kv_head = head / group;
                let first = window.map_or(0, |window| (position + 1).saturating_sub(window)) as usize;
                let visible = first..*position as usize + 1;
                let scores: Vec<f32> = visible.clone().map(|p| definition(
                    &q[(row * heads + head) * key_dim..][..key_dim],
                    &keys[(p * kv_heads + kv_head) * key_dim..][..key_dim],
                ) * 0.25).collect();
                let max = scores.iter().copied().chain(sinks.as_ref().map(|s| s[head])).fold(f32::NEG_INFINITY, f32::max);
                let blocks: Vec<Vec<usize>> = (0..len.div_ceil(64))
                    .map(|b| visible.clone().filter(|p| p / 64 == b).collect::<Vec<_>>())
                    .filter(|block| !block.is_empty())
                    .collect();
                let total = |term: &dyn Fn(usize) -> f32| blocks.iter().map(|block| block.iter().fold(0.0f32, |acc, p| {
                    math::exp(scores[p - first] - max).mul_add(term(*p), acc)
                })).reduce(|a, b| a + b).unwrap();
                let mut denominator = total(&|_| 1.0);
                if let Some(sinks) = &sinks {
                    denominator += math::exp(sinks[head] - max);
                }
                for d in 0..value_dim {
                    let numerator = total(&|p| values[(p * kv_heads + kv_head) * value_dim + d]);
                    expected[(row * heads + head) * value_dim + d] = numerator / denominator;
                }
            }
        }
        for isa in isas() {
            for threads in [1, 2, 3] {
                let mut out = vec![f32::NAN; expected.len()];
                attention(&Pool::new(threads), isa, &q, &positions, &kv, &params, &mut out);
                prop_assert_eq!(bits(&out), bits(&expected), "{:?} {} threads", isa, threads);
            }
        }
    }

    #[test]
    fn rows_are_equal_on_every_isa(
        len in prop::sample::select(vec![1usize, 7, 16, 17, 1023, 1025]),
        seed in any::<u64>(),
        weight in number(),
    ) {
        let (x, w, b) = (operands(len, seed), operands(len, seed ^ 1), operands(len, seed ^ 2));
        let run = |isa| {
            let mut all = Vec::new();
            let mut out = vec![0.0; len];
            rms_norm(isa, &x, &w, 1e-6, &mut out);
            all.extend(bits(&out));
            layer_norm(isa, &x, &w, Some(&b), 1e-5, &mut out);
            all.extend(bits(&out));
            swiglu(isa, &x, &w, &mut out);
            all.extend(bits(&out));
            clamped_swiglu(isa, &x, &w, 1.702, 0.75, &mut out);
            all.extend(bits(&out));
            axpy(isa, weight, &x, &mut out);
            all.extend(bits(&out));
            for apply in [math::exp_in_place, math::sigmoid_in_place, math::silu_in_place] {
                let mut values: Vec<f32> = x.iter().map(|x| x * 60.0).collect();
                apply(isa, &mut values);
                all.extend(bits(&values));
            }
            all
        };
        let reference = run(Isa::Scalar);
        for isa in isas() {
            prop_assert_eq!(run(isa), reference.clone());
        }
    }

    #[test]
    fn norms_are_the_definition(
        len in prop::sample::select(vec![1usize, 15, 16, 17, 100, 1024, 1041]),
        seed in any::<u64>(),
    ) {
        let (x, weight, bias) = (operands(len, seed), operands(len, seed ^ 1), operands(len, seed ^ 2));
        let n = len as f32;
        let scale = 1.0 / (definition(&x, &x) / n + 1e-6).sqrt();
        let expected: Vec<f32> = x.iter().zip(&weight).map(|(x, weight)| x * scale * weight).collect();
        let mean = definition(&x, &vec![1.0; len]) / n;
        let d: Vec<f32> = x.iter().map(|x| x - mean).collect();
        let scale = 1.0 / (definition(&d, &d) / n + 1e-5).sqrt();
        let centred: Vec<f32> =
            d.iter().zip(&weight).zip(&bias).map(|((d, weight), bias)| d * scale * weight + bias).collect();
        for isa in isas() {
            let mut out = vec![0.0; len];
            rms_norm(isa, &x, &weight, 1e-6, &mut out);
            prop_assert_eq!(bits(&out), bits(&expected));
            layer_norm(isa, &x, &weight, Some(&bias), 1e-5, &mut out);
            prop_assert_eq!(bits(&out), bits(&centred));
        }
    }

    #[test]
    fn exp_is_equal_on_every_isa(patterns in prop::collection::vec(any::<u32>(), 1..64)) {
        let values: Vec<f32> = patterns.iter().map(|bits| f32::from_bits(*bits)).collect();
        let reference: Vec<f32> = values.iter().map(|value| math::exp(*value)).collect();
        for isa in isas() {
            let mut values = values.clone();
            math::exp_in_place(isa, &mut values);
            prop_assert_eq!(bits(&values), bits(&reference));
        }
    }

    #[test]
    fn overflow_is_equal_on_every_isa(
        inputs in 1usize..70,
        rows in 1usize..8,
        seed in any::<u64>(),
        exponents in prop::collection::vec(60i32..127, 1..9),
    ) {
        let huge = |len, seed| -> Vec<f32> {
            let values = operands(len, seed);
            values.iter().zip(exponents.iter().cycle()).map(|(value, e)| value * 2.0f32.powi(*e)).collect()
        };
        let (x, w) = (huge(rows * inputs, seed), huge(17 * inputs, seed ^ 1));
        let bytes: &[u8] = bytemuck::cast_slice(&w);
        let mut packed = vec![0; packed_len(DType::F32, 17, inputs).unwrap()];
        pack(DType::F32, 17, inputs, bytes, &mut packed);
        let view = PackedView::new(DType::F32, 17, inputs, &packed).unwrap();
        let mut out = vec![0.0; rows * 17];
        for isa in isas() {
            linear(&Pool::new(1), isa, &x, rows, &view, None, &mut out);
            for (index, found) in out.iter().enumerate() {
                let expected = definition(&x[index / 17 * inputs..][..inputs], &w[index % 17 * inputs..][..inputs]);
                // Infinities are exact; which NaN it is, is not part of the contract.
                prop_assert!(found.to_bits() == expected.to_bits() || found.is_nan() && expected.is_nan());
            }
        }
    }

    #[test]
    fn a_sample_is_the_definition(
        logits in prop::collection::vec(-8i8..8, 1..40),
        draw in any::<u64>(),
        temperature in prop::sample::select(vec![0.25f32, 0.7, 1.0, 3.0]),
        top_k in 0u32..20,
        top_p in prop::sample::select(vec![0.0f32, 0.1, 0.5, 0.95, 1.0, 1.2]),
        min_p in prop::sample::select(vec![0.0f32, 0.01, 0.3, 1.0]),
    ) {
        let logits: Vec<f32> = logits.iter().map(|l| f32::from(*l) / 2.0).collect();
        let params = sample::Params { temperature, top_k, top_p, min_p };
        for isa in isas() {
            let token = sample::sample(isa, &logits, &params, draw).unwrap();
            prop_assert_eq!(token, sampled(&logits, &params, draw));
            // The least draw takes the first candidate, which is the argmax.
            prop_assert_eq!(sample::sample(isa, &logits, &params, 0).unwrap(), argmax(&logits).unwrap());
        }
    }

    /// Far more candidates than there are buckets, and differences that are large or nothing beside the temperature.
    #[test]
    fn a_sample_of_many_is_the_definition(
        count in 1usize..6000,
        seed in any::<u64>(),
        (spread, offset) in (prop::sample::select(vec![0.0f32, 1e-30, 0.01, 1.0, 30.0, 1e36]), -3i8..3),
        draw in prop::sample::select(vec![0u64, 1, u64::MAX, u64::MAX / 2, u64::MAX / 3]),
        any_draw in any::<u64>(),
        temperature in prop::sample::select(vec![f32::MIN_POSITIVE, 1e-3, 0.7, 1.0, 40.0, 1e30, f32::INFINITY]),
        top_k in prop::sample::select(vec![0u32, 1, 50, 2999, u32::MAX]),
        (top_p, min_p) in prop::sample::select(vec![(1.0f32, 0.0f32), (0.9, 0.0), (1.0, 0.02), (0.99, 0.2)]),
    ) {
        let logits: Vec<f32> =
            operands(count, seed).into_iter().map(|value| value * spread + f32::from(offset)).collect();
        prop_assume!(logits.iter().all(|logit| logit.is_finite()));
        let params = sample::Params { temperature, top_k, top_p, min_p };
        for (isa, draw) in isas().into_iter().flat_map(|isa| [(isa, draw), (isa, any_draw)]) {
            prop_assert_eq!(sample::sample(isa, &logits, &params, draw), Ok(sampled(&logits, &params, draw)));
        }
    }
}

/// Rule 10 as the document says it, by a full stable sort and sums over the whole vocabulary.
fn sampled(logits: &[f32], params: &sample::Params, draw: u64) -> u32 {
    let scale = |share: f32| (f64::from(share) * 4_294_967_296.0).round_ties_even() as u128;
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| scale(math::exp((logit - max) / params.temperature));
    let mut order: Vec<usize> = (0..logits.len()).collect();
    order.sort_by(|a, b| logits[*b].partial_cmp(&logits[*a]).unwrap());
    if params.top_k > 0 {
        order.truncate(params.top_k as usize);
    }
    let total: u128 = order.iter().map(|id| weight(logits[*id])).sum();
    let mut before = 0;
    if params.top_p < 1.0 {
        order.retain(|id| {
            let kept = before == 0 || before << 32 < total * scale(params.top_p);
            before += weight(logits[*id]);
            kept
        });
    }
    let first = weight(logits[order[0]]);
    order.retain(|id| weight(logits[*id]) << 32 >= first * scale(params.min_p));
    let total: u128 = order.iter().map(|id| weight(logits[*id])).sum();
    let target = (u128::from(draw) * total) >> 64;
    let mut sum = 0;
    *order
        .iter()
        .find(|id| {
            sum += weight(logits[**id]);
            sum > target
        })
        .unwrap() as u32
}
