//! Logits and the choice of a token.

use crate::ready;
use lite_llm_model::kernels::*;
use lite_llm_tests::cuda::{Launch, Operands, assert_bits};

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
    let mut expected = logits;
    penalise(&mut expected, &tokens, 1.3);
    assert_bits("penalise", &shim.check(&launch).values(0), &expected);
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
