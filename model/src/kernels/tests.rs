//! The forms of each kernel against each other and against the plain definition, bit for bit.

use super::*;
use proptest::prelude::*;

#[test]
fn exp_is_close_and_exact_at_the_ends() {
    assert_eq!(math::exp(0.0).to_bits(), 1.0f32.to_bits());
    assert_eq!(math::exp(-0.0).to_bits(), 1.0f32.to_bits());
    assert_eq!(math::exp(f32::NEG_INFINITY).to_bits(), 0);
    assert_eq!(math::exp(f32::INFINITY), f32::INFINITY);
    assert_eq!(math::exp(89.0), f32::INFINITY);
    assert!(math::exp(-f32::NAN).to_bits() == 0x7fc0_0000);
    let mut worst = 0i64;
    for bits in (0..u32::MAX).step_by(9973) {
        let x = f32::from_bits(bits);
        if x.is_finite() {
            let exact = libm::exp(f64::from(x)) as f32;
            worst = worst.max((i64::from(exact.to_bits()) - i64::from(math::exp(x).to_bits())).abs());
        }
    }
    assert!(worst <= 1, "{worst} units in the last place");
}

#[test]
fn the_packed_layout_is_the_documented_one() {
    let (outputs, inputs) = (17, 1041);
    let src: Vec<u8> =
        (0..outputs * inputs).flat_map(|i| ((i % 60_000) as u16).wrapping_add(1).to_le_bytes()).collect();
    let mut dst = vec![0xff; packed_len(DType::Bf16, outputs, inputs).unwrap()];
    assert_eq!(dst.len(), 2 * 1056 * 32);
    pack(DType::Bf16, outputs, inputs, &src, &mut dst);
    let value = |output: usize, k: usize| ((output * inputs + k) % 60_000 + 1) as u16;
    let at = |tile: usize, entry: usize, half: usize| {
        let at = (tile * 1056 + entry) * 32 + half * 2;
        u16::from_le_bytes([dst[at], dst[at + 1]])
    };
    assert_eq!(at(0, 0, 0), value(0, 0));
    assert_eq!(at(0, 0, 1), value(8, 0));
    assert_eq!(at(0, 1, 2), value(1, 16));
    assert_eq!(at(0, 64, 0), value(0, 1));
    assert_eq!(at(0, 1024, 3), value(9, 1024));
    assert_eq!(at(0, 1025, 0), value(0, 1040));
    assert_eq!(at(0, 1026, 0), value(0, 1025));
    assert_eq!(at(0, 1027, 0), 0);
    assert_eq!(at(1, 0, 0), value(16, 0));
    assert_eq!(at(1, 0, 1), 0);
    let mut back = vec![0; src.len()];
    unpack(DType::Bf16, outputs, inputs, &dst, &mut back);
    assert_eq!(back, src);
}

#[test]
fn lengths_are_checked() {
    assert_eq!(packed_len(DType::F32, usize::MAX, 2), None);
    assert_eq!(packed_len(DType::F32, 2, usize::MAX), None);
    assert!(PackedView::new(DType::F32, 1, 1, &[0; 4]).is_err());
    assert!(PackedView::new(DType::F32, 1, 1, &[0; 1024]).is_ok());
}

#[test]
fn the_pool_runs_each_task_once_and_survives_panics() {
    use std::sync::atomic::{AtomicU32, Ordering};
    for threads in 1..4 {
        let pool = Pool::new(threads);
        for round in 0..200 {
            let counts: Vec<AtomicU32> = (0..round % 17).map(|_| AtomicU32::new(0)).collect();
            pool.run(counts.len(), &|task| {
                counts[task].fetch_add(1, Ordering::Relaxed);
                pool.run(3, &|_| {});
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(8, &|task| assert!(task != 5));
        }));
        assert!(panicked.is_err());
        pool.run(8, &|_| {});
    }
}

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

fn numbers(len: usize, seed: u64) -> Vec<f32> {
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

fn bits(values: &[f32]) -> Vec<u32> {
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

fn isas() -> Vec<Isa> {
    [Isa::Scalar, Isa::Avx2].into_iter().filter(|isa| isa.available()).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn linear_is_the_definition_for_every_shape_thread_and_isa(
        inputs in prop::sample::select(vec![0usize, 1, 15, 16, 17, 64, 1023, 1024, 1025, 2048, 2077]),
        outputs in prop::sample::select(vec![1usize, 8, 15, 16, 17, 33, 100]),
        rows in 1usize..15,
        dtype in prop::sample::select(vec![DType::F32, DType::Bf16, DType::F16]),
        with_bias in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let x = numbers(rows * inputs, seed);
        let mut row_major = vec![0u8; outputs * inputs * dtype.bytes()];
        convert::narrow(dtype, &numbers(outputs * inputs, seed ^ 1), &mut row_major);
        let mut weights = vec![0.0; outputs * inputs];
        convert::widen(Isa::Scalar, dtype, &row_major, &mut weights);
        let bias = with_bias.then(|| numbers(outputs, seed ^ 2));
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
        seed in any::<u64>(),
    ) {
        let shape = KvShape { kv_heads, key_dim, value_dim, dtype };
        let heads = kv_heads * group;
        let mut keys = numbers(len * kv_heads * key_dim, seed);
        let mut values = numbers(len * kv_heads * value_dim, seed ^ 1);
        let storage: Vec<(Vec<u8>, Vec<u8>)> = (0..len.div_ceil(64)).map(|page| {
            let mut k = vec![0; shape.key_page_bytes()];
            let mut v = vec![0; shape.value_page_bytes()];
            for position in page * 64..len.min(page * 64 + 64) {
                shape.write_keys(position as u32, &keys[position * kv_heads * key_dim..][..kv_heads * key_dim], &mut k);
                shape.write_values(
                    position as u32,
                    &values[position * kv_heads * value_dim..][..kv_heads * value_dim],
                    &mut v,
                );
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
        let q = numbers(positions.len() * heads * key_dim, seed ^ 2);
        let sinks = with_sinks.then(|| numbers(heads, seed ^ 3));
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
            for threads in [1, 2] {
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
        let (x, w, b) = (numbers(len, seed), numbers(len, seed ^ 1), numbers(len, seed ^ 2));
        let run = |isa| {
            let mut all = Vec::new();
            let mut out = vec![0.0; len];
            rms_norm(isa, &x, &w, 1e-6, &mut out);
            all.extend(bits(&out));
            layer_norm(isa, &x, &w, Some(&b), 1e-5, &mut out);
            all.extend(bits(&out));
            swiglu(isa, &x, &w, &mut out);
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
    fn samples_do_not_depend_on_the_order_of_ids(
        logits in prop::collection::vec(-8i8..8, 1..40),
        draw in any::<u64>(),
        top_k in 0u32..20,
        top_p in 0.0f32..1.2,
        min_p in 0.0f32..0.5,
    ) {
        let logits: Vec<f32> = logits.iter().map(|l| f32::from(*l) / 2.0).collect();
        let params = sample::Params { temperature: 0.7, top_k, top_p, min_p };
        let token = sample::sample(&logits, &params, draw).unwrap();
        prop_assert!((token as usize) < logits.len());
        // The least draw takes the first candidate, which is the argmax.
        prop_assert_eq!(sample::sample(&logits, &params, 0).unwrap(), argmax(&logits).unwrap());
        if top_k == 1 {
            prop_assert_eq!(token, argmax(&logits).unwrap());
        }
    }
}

#[test]
fn logits_that_are_not_finite_are_faults() {
    assert_eq!(argmax(&[0.0, f32::NAN]), Err(NonFinite { token: 1 }));
    assert_eq!(argmax(&[f32::NEG_INFINITY]), Err(NonFinite { token: 0 }));
    assert_eq!(argmax(&[1.0, 3.0, 3.0]), Ok(1));
    assert_eq!(argmax(&[-0.0, 0.0]), Ok(0));
}

#[test]
fn penalties_touch_each_token_once() {
    let mut logits = [2.0, -2.0, 2.0];
    penalise(&mut logits, &[0, 1, 0], 2.0);
    assert_eq!(logits, [1.0, -4.0, 2.0]);
}

#[test]
fn draws_split_by_weight() {
    // Equal weights: the upper half of the draws takes the second token.
    let params = sample::Params { temperature: 1.0, ..Default::default() };
    assert_eq!(sample::sample(&[1.0, 1.0], &params, u64::MAX / 2), Ok(0));
    assert_eq!(sample::sample(&[1.0, 1.0], &params, u64::MAX / 2 + 1), Ok(1));
}

#[test]
fn rope_rotates_halves_and_leaves_the_rest() {
    let table = RopeTable::new(&rope::inverse_frequencies(10_000.0, 4), 1.0, 8);
    let mut head = [1.0, 2.0, 3.0, 4.0, 5.0];
    table.apply(&mut head, 3);
    let (sin, cos) = (libm::sin(3.0) as f32, libm::cos(3.0) as f32);
    assert_eq!(head[0], cos - 3.0 * sin);
    assert_eq!(head[2], 3.0 * cos + sin);
    assert_eq!(head[4], 5.0);
}

#[test]
fn conversions_round_to_even() {
    for bits in 0..=u16::MAX {
        let value = convert::f16_value(bits);
        if !value.is_nan() {
            assert_eq!(convert::f16_bits(value), bits);
        }
        let value = convert::bf16_value(bits);
        if !value.is_nan() {
            assert_eq!(convert::bf16_bits(value), bits);
        }
    }
    assert_eq!(convert::bf16_bits(f32::from_bits(0x3f80_8000)), 0x3f80);
    assert_eq!(convert::bf16_bits(f32::from_bits(0x3f81_8000)), 0x3f82);
    assert_eq!(convert::f16_bits(1.0 + 1.0 / 2048.0), 0x3c00);
    assert_eq!(convert::f16_bits(1.0 + 3.0 / 2048.0), 0x3c02);
}

#[test]
fn the_self_test_passes() {
    for isa in isas() {
        self_test(isa).unwrap();
    }
}
