//! Weights that stay quantised against the same weights decoded first, bit for bit.

use super::super::golden::operands;
use super::bits::bits;
use super::isas;
use crate::kernels::convert::{e2m1_value, e4m3_value};
use crate::kernels::{DType, PackedView, Pool, Storage, linear, pack, pack_e4m3, pack_mxfp4, packed_len};
use proptest::prelude::*;

/// What a published exponent stands for.
fn power(exponent: u8) -> f32 {
    if exponent == u8::MAX { f32::NAN } else { 2f64.powi(i32::from(exponent) - 127) as f32 }
}

/// A number from a seed and a place.
pub(super) fn draw(seed: u64, a: usize, b: usize) -> u64 {
    let mut z = seed ^ (a as u64) << 32 ^ b as u64;
    z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// The products of rows with a matrix, packed as it is and decoded.
fn compare(
    storage: Storage,
    (outputs, inputs, rows): (usize, usize, usize),
    packed: &[u8],
    weight: impl Fn(usize, usize) -> f32,
    x: &[f32],
) -> Result<(), TestCaseError> {
    let decoded: Vec<u8> = (0..outputs)
        .flat_map(|output| (0..inputs).map(move |input| (output, input)))
        .flat_map(|(output, input)| weight(output, input).to_le_bytes())
        .collect();
    let mut plain = vec![0; packed_len(DType::F32, outputs, inputs).unwrap()];
    pack(DType::F32, outputs, inputs, &decoded, &mut plain);
    let plain = PackedView::new(DType::F32, outputs, inputs, &plain).unwrap();
    let quantised = PackedView::new(storage, outputs, inputs, packed).unwrap();
    for isa in isas() {
        for threads in [1, 2] {
            let pool = Pool::new(threads);
            let (mut expected, mut found) = (vec![f32::NAN; rows * outputs], vec![f32::NAN; rows * outputs]);
            linear(&pool, isa, x, rows, &plain, None, &mut expected);
            linear(&pool, isa, x, rows, &quantised, None, &mut found);
            prop_assert_eq!(bits(&found), bits(&expected), "{:?}, {:?}, {} threads", storage, isa, threads);
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn four_bits_are_what_they_decode_to(
        inputs in prop::sample::select(vec![32usize, 64, 480, 1024, 1056, 2080]),
        outputs in prop::sample::select(vec![1usize, 8, 16, 17, 64, 100]),
        rows in prop::sample::select(vec![1usize, 2, 5, 7, 70]),
        exponents in prop::sample::select(vec![(0u8, 4u8), (100, 60), (127, 1), (200, 20)]),
        seed in any::<u64>(),
    ) {
        let code = |output, input| draw(seed, output, input) as u8;
        let exponent = |output, block| exponents.0 + draw(!seed, output, block) as u8 % exponents.1;
        let mut packed = vec![0xff; packed_len(Storage::Mxfp4, outputs, inputs).unwrap()];
        pack_mxfp4(outputs, inputs, code, exponent, &mut packed);
        let weight = |output, input| e2m1_value(code(output, input)) * power(exponent(output, input / 32));
        let x = operands(rows * inputs, seed);
        compare(Storage::Mxfp4, (outputs, inputs, rows), &packed, weight, &x)?;
    }

    #[test]
    fn bytes_are_what_they_decode_to(
        inputs in prop::sample::select(vec![1usize, 16, 127, 129, 1000, 1024, 1300, 2050]),
        outputs in prop::sample::select(vec![1usize, 16, 17, 130, 300]),
        rows in prop::sample::select(vec![1usize, 2, 5, 7, 70]),
        seed in any::<u64>(),
    ) {
        let code = |output, input| match draw(seed, output, input) as u8 {
            0x7f => 0x7e,
            0xff => 0x80,
            code => code,
        };
        let factors = operands(9 * 32, seed ^ 9);
        let factor = |down: usize, across: usize| factors[down * 32 + across];
        let mut packed = vec![0xff; packed_len(Storage::E4m3, outputs, inputs).unwrap()];
        pack_e4m3(outputs, inputs, code, factor, &mut packed);
        let weight = |output, input| e4m3_value(code(output, input)) * factor(output / 128, input / 128);
        let x = operands(rows * inputs, seed);
        compare(Storage::E4m3, (outputs, inputs, rows), &packed, weight, &x)?;
    }
}

/// What is no number stays none: of a scale, of a code.
#[test]
fn what_is_no_number_stays_none() {
    let pool = Pool::new(1);
    for isa in isas() {
        let mut packed = vec![0; packed_len(Storage::Mxfp4, 16, 32).unwrap()];
        pack_mxfp4(16, 32, |_, _| 2, |output, _| if output == 3 { 255 } else { 127 }, &mut packed);
        let mut out = [0.0; 16];
        let view = PackedView::new(Storage::Mxfp4, 16, 32, &packed).unwrap();
        linear(&pool, isa, &[1.0; 32], 1, &view, None, &mut out);
        assert!(out[3].is_nan() && out[2] == 32.0, "{out:?}");

        let mut packed = vec![0; packed_len(Storage::E4m3, 16, 32).unwrap()];
        pack_e4m3(
            16,
            32,
            |output, input| if output + input == 40 { 0xff } else { 0x38 },
            |_, _| 1.0,
            &mut packed,
        );
        let view = PackedView::new(Storage::E4m3, 16, 32, &packed).unwrap();
        linear(&pool, isa, &[1.0; 32], 1, &view, None, &mut out);
        assert!(out[15].is_nan(), "{out:?}");
    }
}

#[test]
fn sizes_are_those_of_codes_and_factors() {
    assert_eq!(packed_len(Storage::Mxfp4, 16, 32), Some(32 + 8 * 32));
    assert_eq!(packed_len(Storage::E4m3, 17, 129), Some(2 * (8 + 16 * 144)));
    assert_eq!(packed_len(Storage::Mxfp4, 16, 2048), Some(16 * 2048 * 9 / 16), "4.5 bits a weight");
    assert_eq!(packed_len(Storage::E4m3, usize::MAX, 2), None);
}
