//! Logits and the choice of a token.

use crate::ready;
use lite_llm_model::kernels::math::exp;
use lite_llm_model::kernels::sample::{Params, sample};
use lite_llm_model::kernels::*;
use lite_llm_tests::cuda::{Launch, Operands, Shim, assert_bits};

#[test]
fn logits_are_divided_and_penalised() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(31);
    let logits = operands.values(333);
    let launch = Launch::new("divide", [2, 1, 1], 32).values(&logits).value(13.0).word(333);
    let expected: Vec<f32> = logits.iter().map(|logit| logit / 13.0).collect();
    assert_bits("divide", &shim.check(&launch).values(0), &expected);
    let tokens = [5, 0, 332, 17, 18, 100];
    let launch =
        Launch::new("penalise", [1, 1, 1], 32).values(&logits).words(&tokens).value(1.3).word(tokens.len());
    let mut expected = logits.clone();
    penalise(&mut expected, &tokens, 1.3);
    assert_bits("penalise", &shim.check(&launch).values(0), &expected);
    // Places that have no token, in a list of several blocks.
    let places: Vec<u32> = tokens.into_iter().chain(std::iter::repeat_n(u32::MAX, 90)).collect();
    let launch =
        Launch::new("penalise", [2, 1, 1], 32).values(&logits).words(&places).value(1.3).word(places.len());
    assert_bits("penalise of places", &shim.check(&launch).values(0), &expected);
}

#[test]
fn the_largest_logit_is_found() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(32);
    for n in [1, 31, 700, 5003] {
        for kind in 0..5 {
            let mut rows: Vec<f32> = operands.values(2 * n);
            match kind {
                // Many that are equal; zeros of both signs; only what is negative.
                1 => rows.iter_mut().for_each(|logit| *logit = (*logit * 2.0).round()),
                2 => rows.iter_mut().for_each(|logit| *logit = -logit.abs() * 0.0),
                3 => rows.iter_mut().for_each(|logit| *logit = -logit.abs() - 1.0),
                4 => rows[n / 2] = f32::NAN,
                _ => {}
            }
            if kind == 4 && n > 500 {
                rows[n - 1] = f32::INFINITY;
                rows[n + 400] = f32::NEG_INFINITY;
            }
            for threads in [32, 256] {
                let launch = Launch::new("argmax", [2, 1, 1], threads).values(&rows).room(2).room(2).word(n);
                let found = shim.check(&launch);
                for (row, logits) in rows.chunks(n).enumerate() {
                    match argmax(logits) {
                        Ok(token) => {
                            assert_eq!((found.words(1)[row], found.words(2)[row]), (token, u32::MAX))
                        }
                        Err(fault) => assert_eq!(found.words(2)[row], fault.token),
                    }
                }
            }
        }
    }
    shim.finish("sample.cu");
}

/// A share as the kernel takes it; what keeps all is none.
fn share(value: f32) -> u64 {
    (f64::from(value) * 4_294_967_296.0).round_ties_even() as u64
}

/// Samples one row in several ways, each with a draw of its own: top-k, top-p, min-p and the draw.
fn check(shim: &mut Shim, row: &[f32], temperature: f32, threads: u32, ways: &[(u32, f32, f32, u64)]) {
    let (mut top_k, mut top_p, mut min_p, mut draws) = (vec![], vec![], vec![], vec![]);
    for &(k, p, least, draw) in ways {
        top_k.push(k);
        top_p.push(if p < 1.0 { share(p) } else { u64::MAX });
        min_p.push(share(least));
        draws.push(draw);
    }
    let (rows, n) = (ways.len(), row.len());
    let launch = Launch::new("sample", [rows as u32, 1, 1], threads).values(&row.repeat(rows));
    let best = argmax(row).unwrap();
    let launch = launch.words(&vec![u32::MAX; rows]).values(&vec![temperature; rows]).words(&top_k);
    let launch = launch.longs(&top_p).longs(&min_p).longs(&draws).room(rows * n * 2);
    let found = shim.check(&launch.words(&vec![best; rows]).word(n)).words(8);
    for (&(top_k, top_p, min_p, draw), found) in ways.iter().zip(found) {
        let params = Params { temperature, top_k, top_p, min_p };
        assert_eq!(found, sample(Isa::Scalar, row, &params, draw).unwrap(), "{params:?} of {n}, {draw:x}");
    }
}

/// Rows that take the largest logit, and rows with a logit that is not finite, whose largest may be nowhere.
#[test]
fn rows_without_a_draw_are_left_alone() {
    let Some(mut shim) = ready() else { return };
    let logits = [1.0, 3.0, 2.0, f32::NAN, f32::NAN, f32::NAN, 0.5, 0.25, 0.125];
    let launch = Launch::new("sample", [3, 1, 1], 32).values(&logits).words(&[u32::MAX, 0, u32::MAX]);
    let launch = launch.values(&[0.0, 1.0, 1.0]).words(&[0; 3]).longs(&[u64::MAX; 3]).longs(&[0; 3]);
    let launch = launch.longs(&[u64::MAX; 3]).room(18).words(&[1, u32::MAX, 0]).word(3);
    assert_eq!(shim.check(&launch).words(8), [1, u32::MAX, 2]);
}

#[test]
fn tokens_are_sampled_by_one_draw() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(33);
    let kept = [
        (0, 1.0, 0.0),
        (1, 1.0, 0.0),
        (7, 0.7, 0.0),
        (0, 0.9, 0.0),
        (0, 1.0, 0.05),
        (40, 0.8, 0.3),
        (0, 0.0, 1.0),
    ];
    for n in [1, 45, 600] {
        for kind in 0..3 {
            let mut row: Vec<f32> = operands.values(n).iter().map(|logit| logit * 6.0).collect();
            if kind == 1 {
                row.iter_mut().for_each(|logit| *logit = (*logit * 0.3).round());
            }
            let ways =
                kept.map(|(k, p, least)| (k, p, least, u64::from(operands.word()) << 32 | 0x5555_5555));
            check(&mut shim, &row, [0.8, 2.5, 0.05][kind], [32, 128][kind % 2], &ways);
        }
    }
    shim.finish("sample.cu");
}

/// Equal logits, zeros of both signs, in the order of their ids; shares that a run reaches exactly, and by less than one.
#[test]
fn exact_shares_are_reached() {
    let Some(mut shim) = ready() else { return };
    let mut ways = vec![];
    for part in 0..8 {
        let draw = part << 61 | 1 << 60;
        ways.extend([
            (0, 1.0, 0.0, draw),
            (3, 1.0, 0.0, draw),
            (0, 0.5, 0.0, draw),
            (0, 0.25, 1.0, draw),
            (0, 0.75, 0.5, draw),
        ]);
    }
    check(&mut shim, &[-0.0, 0.0, -0.0, 0.0], 1.0, 32, &ways);
    let mut operands = Operands::new(34);
    let mut found = 0;
    while found < 4 {
        // Two candidates. The share that the first one reaches is the least of those that f32 holds.
        let logit = -(operands.word() as f32 / 4e9);
        let total = (1u64 << 32) + (f64::from(exp(logit)) * 4_294_967_296.0).round_ties_even() as u64;
        let least = (1u128 << 64).div_ceil(u128::from(total)).next_multiple_of(256);
        // Beyond what it reaches by less than one: rounded down, the first would do.
        let beyond = least * u128::from(total) - (1 << 64);
        if beyond > 0 && beyond < 1 << 32 {
            let top_p = (least as f64 / 4_294_967_296.0) as f32;
            check(&mut shim, &[0.0, logit], 1.0, 32, &[(0, top_p, 0.0, u64::MAX), (0, top_p, 0.0, 0)]);
            found += 1;
        }
    }
}
