//! Integers with a scale for each group of 32: how they are made, how they are packed, and their products on every
//! instruction set against the definition, bit for bit.

use super::super::golden::operands;
use super::super::quantise::{GROUP, QuantiseError, dequantise_row, quantise_row};
use super::bits::bits;
use super::isas;
use super::quantised::draw;
use crate::kernels::convert::{f16_bits, f16_value};
use crate::kernels::{PackedView, Pool, Products, Quantised, linear, pack_groups, packed_len};
use crate::kernels::{Product, Storage};
use proptest::prelude::*;

const KINDS: [Quantised; 2] = [Quantised::Q8, Quantised::Q4];

/// The scale and the integers of a group of a row of activations, as the document says it.
fn definition_of_group(x: &[f32]) -> (f32, Vec<i32>) {
    let largest = x.iter().fold(0.0f32, |largest, x| largest.max(x.abs()));
    let scale = largest / 127.0;
    let integer = |x: &f32| (x / scale).round_ties_even().clamp(-127.0, 127.0) as i32;
    (scale, x.iter().map(|x| if scale == 0.0 { 0 } else { integer(x) }).collect())
}

/// Rule 8 as the document says it, from the rows of a matrix as they are stored.
fn definition(kind: Quantised, x: &[f32], row: &[u8], bias: Option<f32>) -> f32 {
    let mut acc = 0.0f32;
    for (x, block) in x.chunks(GROUP).zip(row.chunks(kind.group_bytes())) {
        let (scale, integers) = definition_of_group(x);
        let weight = |k: usize| match kind {
            Quantised::Q8 => i32::from(block[2 + k] as i8),
            Quantised::Q4 if k < 16 => i32::from(block[2 + k] & 15) - 8,
            Quantised::Q4 => i32::from(block[2 + k - 16] >> 4) - 8,
        };
        let sum: i32 = (0..).zip(integers).map(|(k, x)| weight(k) * x).sum();
        let stored = f16_value(u16::from_le_bytes([block[0], block[1]]));
        acc = (stored * scale).mul_add(sum as f32, acc);
    }
    bias.map_or(acc, |bias| acc + bias)
}

/// Rows of groups with any integers and any scale that is finite, subnormal ones and zeros of both signs among them.
fn any_rows(kind: Quantised, outputs: usize, inputs: usize, seed: u64) -> Vec<u8> {
    let mut rows: Vec<u8> = (0..outputs * kind.row_bytes(inputs)).map(|i| draw(seed, i, 0) as u8).collect();
    for (i, block) in rows.chunks_exact_mut(kind.group_bytes()).enumerate() {
        let scale = draw(seed, i, 1) as u16;
        let scale = if scale & 0x7c00 == 0x7c00 { scale & 0x8000 } else { scale };
        block[..2].copy_from_slice(&scale.to_le_bytes());
    }
    rows
}

fn quantised_rows(kind: Quantised, weights: &[f32], inputs: usize) -> Vec<u8> {
    let mut rows = Vec::new();
    for weights in weights.chunks(inputs) {
        let mut row = vec![0xff; kind.row_bytes(inputs)];
        quantise_row(kind, weights, &mut row).unwrap();
        rows.extend(row);
    }
    rows
}

fn packed(kind: Quantised, outputs: usize, inputs: usize, rows: &[u8]) -> Vec<u8> {
    let mut packed = vec![0xff; packed_len(kind, outputs, inputs).unwrap()];
    pack_groups(kind, outputs, inputs, rows, &mut packed);
    packed
}

/// Every form against the definition: all instruction sets and threads, and the first row alone.
fn compare(
    kind: Quantised,
    (outputs, inputs, rows): (usize, usize, usize),
    stored: &[u8],
    x: &[f32],
    bias: Option<&[f32]>,
) -> Result<(), TestCaseError> {
    let packed = packed(kind, outputs, inputs, stored);
    let view = PackedView::new(kind, outputs, inputs, &packed).unwrap();
    let of_output = |x: &[f32], output: usize| {
        let row = &stored[output * kind.row_bytes(inputs)..][..kind.row_bytes(inputs)];
        definition(kind, x, row, bias.map(|bias| bias[output]))
    };
    let x_rows = (0..rows).map(|row| &x[row * inputs..][..inputs]);
    let expected: Vec<f32> = x_rows
        .flat_map(|x| (0..outputs).map(move |output| (x, output)))
        .map(|(x, output)| of_output(x, output))
        .collect();
    for isa in isas() {
        for threads in [1, 2, 3] {
            let pool = Pool::new(threads);
            let mut found = vec![f32::NAN; rows * outputs];
            linear(&pool, isa, x, rows, &view, bias, &mut found);
            prop_assert_eq!(bits(&found), bits(&expected), "{:?}, {:?}, {} threads", kind, isa, threads);
            let mut alone = vec![f32::NAN; outputs];
            linear(&pool, isa, &x[..inputs], 1, &view, bias, &mut alone);
            prop_assert_eq!(bits(&alone), bits(&expected[..outputs]), "{:?}, {:?}, alone", kind, isa);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn products_of_integers_are_the_definition(
        inputs in prop::sample::select(vec![1usize, 31, 32, 33, 64, 95, 100, 480, 1024, 1061, 2080]),
        outputs in prop::sample::select(vec![1usize, 8, 15, 16, 17, 33, 64, 100, 130]),
        rows in 1usize..15,
        kind in prop::sample::select(KINDS.to_vec()),
        any_integers in any::<bool>(),
        with_bias in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let stored = if any_integers {
            any_rows(kind, outputs, inputs, seed)
        } else {
            quantised_rows(kind, &operands(outputs * inputs, seed ^ 1), inputs)
        };
        let mut x = operands(rows * inputs, seed);
        // Groups of zeros, and such as are subnormal as a whole.
        for (at, group) in x.chunks_mut(GROUP).enumerate() {
            let by = [1.0, 1.0, 0.0, -0.0, f32::from_bits(0x0080_0000), 1e-41, 1.0, 1e30][draw(seed, at, 2) as usize % 8];
            group.iter_mut().for_each(|x| *x *= by);
        }
        let bias = with_bias.then(|| operands(outputs, seed ^ 2));
        compare(kind, (outputs, inputs, rows), &stored, &x, bias.as_deref())?;
    }

    /// What a weight becomes is within half a step of it, or within a step at the end that is clamped.
    #[test]
    fn a_weight_is_near_what_it_was(
        columns in prop::sample::select(vec![1usize, 31, 32, 70]),
        kind in prop::sample::select(KINDS.to_vec()),
        power in -12i32..12,
        seed in any::<u64>(),
    ) {
        let values: Vec<f32> = operands(columns, seed).iter().map(|x| x * 2f32.powi(power)).collect();
        let row = quantised_rows(kind, &values, columns);
        let mut back = vec![f32::NAN; columns];
        dequantise_row(kind, &row, &mut back);
        for ((values, back), block) in values.chunks(GROUP).zip(back.chunks(GROUP)).zip(row.chunks(kind.group_bytes())) {
            let step = f64::from(f16_value(u16::from_le_bytes([block[0], block[1]]))).abs();
            for (value, back) in values.iter().zip(back) {
                let error = (f64::from(*value) - f64::from(*back)).abs();
                // The scale itself is rounded to 11 bits, or to a subnormal.
                let end = if kind == Quantised::Q8 { step * 0.57 } else { step * 1.01 };
                prop_assert!(error <= end + 127.0 / 2f64.powi(25), "{value} became {back} in steps of {step}");
            }
        }
    }
}

/// Nothing saturates: the largest integers of every pair of signs, and weights of -128 that no quantisation makes.
#[test]
fn the_largest_products_are_exact() {
    let (outputs, inputs, rows) = (17, 64, 4);
    let x: Vec<f32> = (0..rows * inputs).map(|i| if draw(7, i, 3) & 1 == 0 { 1.5 } else { -1.5 }).collect();
    for (kind, ends) in [(Quantised::Q8, [0x7f, 0x81, 0x80]), (Quantised::Q4, [0x00, 0xff, 0x0f])] {
        for mixed in [false, true] {
            let mut stored: Vec<u8> = (0..outputs * kind.row_bytes(inputs))
                .map(|i| {
                    ends[if mixed { draw(9, i, 4) as usize % 3 } else { i / kind.row_bytes(inputs) % 3 }]
                })
                .collect();
            for block in stored.chunks_exact_mut(kind.group_bytes()) {
                block[..2].copy_from_slice(&f16_bits(0.01).to_le_bytes());
            }
            compare(kind, (outputs, inputs, rows), &stored, &x, None).unwrap();
            compare(kind, (outputs, inputs, rows), &stored, &vec![1.5; rows * inputs], None).unwrap();
        }
    }
}

#[test]
fn integers_are_what_the_document_says() {
    // A scale of exactly 1: ties to even, clamped at the end, zeros of both signs.
    let values = [127.0, -127.0, 0.5, 1.5, 2.5, -0.5, -1.5, 126.5, -0.0, 0.49];
    let row = quantised_rows(Quantised::Q8, &values, values.len());
    assert_eq!(row[..2], f16_bits(1.0).to_le_bytes());
    let integers: Vec<i8> = row[2..].iter().map(|&byte| byte as i8).collect();
    assert_eq!(integers[..10], [127, -127, 0, 2, 2, 0, -2, 126, 0, 0]);
    assert!(integers[10..].iter().all(|&integer| integer == 0), "what pads is zero");
    // Four bits: the first of the largest magnitude becomes -8, so that the scale may be negative.
    for (first, scale) in [(-8.0, 1.0), (8.0, -1.0)] {
        let mut values = [0.0; 32];
        (values[0], values[1], values[16], values[31]) = (first, -first, first / 2.0, first / 16.0);
        let row = quantised_rows(Quantised::Q4, &values, 32);
        assert_eq!(row[..2], f16_bits(scale).to_le_bytes());
        assert_eq!((row[2], row[3], row[17]), (0x40, 0x8f, 0x88), "-8 and -4, 7 and 0, 0 and -0.5 to even");
    }
    // A scale that is rounded up leaves the integer below 127; one that is rounded down clamps it.
    let of = |value: f32| quantised_rows(Quantised::Q8, &[value], 1)[2] as i8;
    assert_eq!((of(1.0), of(f16_value(1) * 126.0), of(f16_value(1) * 150.0)), (127, 126, 127));
    for zeros in [[0.0; 40], [-0.0; 40], [1e-8; 40]] {
        for kind in KINDS {
            let row = quantised_rows(kind, &zeros, 40);
            let mut back = [f32::NAN; 40];
            dequantise_row(kind, &row, &mut back);
            assert_eq!(bits(&back), [0; 40], "{kind:?}");
            assert_eq!(row[..2], [0, 0]);
        }
    }
}

#[test]
fn weights_that_no_scale_stands_for_are_refused() {
    for kind in KINDS {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e9, -1e9] {
            let mut values = [1.0; 70];
            values[67] = value;
            let error = quantise_row(kind, &values, &mut vec![0; kind.row_bytes(70)]).unwrap_err();
            match error {
                QuantiseError::NotFinite { column: 67, .. } => assert!(!value.is_finite()),
                QuantiseError::TooLarge { column: 67, .. } => assert_eq!(value.abs(), 1e9),
                other => panic!("{other}"),
            }
        }
    }
}

/// An activation that is not finite makes none of its row's results a number, and touches no other row.
#[test]
fn activations_that_are_not_finite_stay_in_their_row() {
    let (outputs, inputs) = (20, 96);
    for kind in KINDS {
        let stored = quantised_rows(kind, &operands(outputs * inputs, 5), inputs);
        let packed = packed(kind, outputs, inputs, &stored);
        let view = PackedView::new(kind, outputs, inputs, &packed).unwrap();
        for value in [f32::NAN, f32::INFINITY] {
            let mut x = operands(3 * inputs, 6);
            x[inputs + 40] = value;
            for isa in isas() {
                let mut out = vec![0.0; 3 * outputs];
                linear(&Pool::new(1), isa, &x, 3, &view, None, &mut out);
                let (first, rest) = out.split_at(outputs);
                let (second, third) = rest.split_at(outputs);
                assert!(second.iter().all(|y| y.is_nan()), "{isa:?}");
                assert!(first.iter().chain(third).all(|y| y.is_finite()), "{isa:?}");
            }
        }
    }
}

/// One input goes to floats, to integers of 8 and of 4 bits, and to floats again: each product has its own form of it.
#[test]
fn products_of_one_input_keep_their_forms() {
    let (outputs, inputs, rows) = (33, 96, 3);
    let weights = operands(outputs * inputs, 8);
    let x = operands(rows * inputs, 9);
    let bytes: Vec<u8> = weights.iter().flat_map(|weight| weight.to_le_bytes()).collect();
    let mut plain = vec![0; packed_len(super::DType::F32, outputs, inputs).unwrap()];
    super::pack(super::DType::F32, outputs, inputs, &bytes, &mut plain);
    let plain = PackedView::new(super::DType::F32, outputs, inputs, &plain).unwrap();
    let of_kinds = KINDS.map(|kind| packed(kind, outputs, inputs, &quantised_rows(kind, &weights, inputs)));
    let [q8, q4] = [0, 1].map(|i| PackedView::new(KINDS[i], outputs, inputs, &of_kinds[i]).unwrap());
    let views = [plain, q8, q8, q4, plain];
    for isa in isas() {
        for threads in [1, 2] {
            let pool = Pool::new(threads);
            let mut together = vec![vec![0.0; rows * outputs]; views.len()];
            let list =
                views.into_iter().zip(&mut together).map(|(view, out)| Product::new(&x, view, None, out));
            Products::default().compute(&pool, isa, list);
            for (view, together) in views.into_iter().zip(&together) {
                let mut alone = vec![0.0; rows * outputs];
                linear(&pool, isa, &x, rows, &view, None, &mut alone);
                assert_eq!(bits(together), bits(&alone), "{:?} on {isa:?}", view.storage());
            }
        }
    }
}

#[test]
fn groups_are_packed_as_documented() {
    let (outputs, inputs) = (18, 95);
    for kind in KINDS {
        let stored = any_rows(kind, outputs, inputs, 3);
        let packed = packed(kind, outputs, inputs, &stored);
        let (block, codes) = (kind.group_bytes(), 16 * (kind.group_bytes() - 2));
        let tile = 3 * 32 + 3 * codes;
        assert_eq!(packed.len(), 2 * tile);
        let from = |output: usize, group: usize| &stored[(output * 3 + group) * block..][..block];
        // The second pair is a group alone.
        for (group, scales, first) in [(0, 0, 64), (1, 32, 64 + codes), (2, 64 + 2 * codes, 96 + 2 * codes)] {
            for output in [0, 1, 15, 16, 17] {
                let (tile, within) = (&packed[output / 16 * tile..], output % 16);
                let block = from(output, group);
                assert_eq!(tile[scales + 2 * within..][..2], block[..2]);
                for k in [0usize, 3, 4, 15] {
                    let found = tile[first + k / 4 * 64 + 4 * within + k % 4];
                    let flipped = if kind == Quantised::Q8 { 0x80 } else { 0 };
                    assert_eq!(found, block[2 + k] ^ flipped, "{kind:?} {output} {group} {k}");
                }
            }
        }
        assert!(packed[tile + 4..tile + 32].iter().all(|&byte| byte == 0), "no output, no scale");
    }
}

#[test]
fn sizes_are_those_of_integers_and_scales() {
    assert_eq!(packed_len(Quantised::Q8, 16, 2048), Some(16 * 2048 * 17 / 16), "8.5 bits a weight");
    assert_eq!(packed_len(Quantised::Q4, 16, 2048), Some(16 * 2048 * 9 / 16), "4.5 bits a weight");
    assert_eq!(packed_len(Quantised::Q8, 17, 33), Some(2 * 2 * 16 * 34));
    assert_eq!(packed_len(Quantised::Q4, 3, 0), Some(0));
    assert_eq!(packed_len(Storage::from(Quantised::Q8), usize::MAX, 2), None);
    assert_eq!(packed_len(Quantised::Q8, 2, usize::MAX), None);
}
