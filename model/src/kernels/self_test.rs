//! The start-up self-test: golden hashes of every kernel, equal on all instruction sets.

use super::golden::{Attended, Chosen, Columns, Combined, Golden, NOBODY, Operators, Routed, golden};
use super::pool::is_ieee;
use super::sample::Params;
use super::*;
use crate::arch::Score;
use crate::forward::{route_by_tiers, route_one};
use std::convert::Infallible;
use std::sync::atomic::{AtomicU8, Ordering};
use thiserror::Error;

/// This machine does not compute the contract's bits; the runtime has to refuse to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum SelfTestError {
    /// The machine lacks the instruction set.
    #[error("this machine lacks the instruction set {0:?}; choose another one")]
    Unavailable(Isa),
    /// The thread flushes subnormals or rounds in another way.
    #[error(
        "this thread flushes subnormals or does not round to nearest even (MXCSR, FPCR); start the runtime from a thread \
         with the default control register"
    )]
    ControlRegister,
    /// A kernel gave other bits than the contract.
    #[error(
        "the kernel {kernel} gives other bits than the contract on {isa:?}: expected {expected:016x}, got {found:016x}; \
         choose another instruction set, and suspect this processor"
    )]
    Bits {
        /// The kernel.
        kernel: &'static str,
        /// The instruction set it ran on.
        isa: Isa,
        /// Hash of the contract's bits.
        expected: u64,
        /// Hash of the bits found.
        found: u64,
    },
}

/// Instruction sets whose kernels were found right by this process, a bit each.
static FOUND_RIGHT: AtomicU8 = AtomicU8::new(0);

/// Compares every kernel on `isa` with the contract, on the calling thread ([`Pool::self_test`] takes every thread of
/// a pool).
///
/// The control register is looked at each time, as every thread has its own; the kernels are the same for all threads, and are
/// compared once in a process.
///
/// # Errors
/// What is missing or wrong.
pub fn self_test(isa: Isa) -> Result<(), SelfTestError> {
    if !isa.available() {
        return Err(SelfTestError::Unavailable(isa));
    }
    if !is_ieee() {
        return Err(SelfTestError::ControlRegister);
    }
    let bit = 1 << isa as u8;
    if FOUND_RIGHT.load(Ordering::Relaxed) & bit == 0 {
        golden().iter().try_for_each(|golden| check(golden, isa))?;
        FOUND_RIGHT.fetch_or(bit, Ordering::Relaxed);
    }
    Ok(())
}

pub(super) fn check(golden: &Golden<OfCpu>, isa: Isa) -> Result<(), SelfTestError> {
    let Ok(found) = golden.found(&mut OfCpu(isa));
    if found == golden.hash {
        return Ok(());
    }
    Err(SelfTestError::Bits { kernel: golden.kernel, isa, expected: golden.hash, found })
}

/// The operators on an instruction set of this machine.
pub(super) struct OfCpu(pub(super) Isa);

type Values = Result<Vec<f32>, Infallible>;

impl Operators for OfCpu {
    type Error = Infallible;

    fn linear(&mut self, x: &[f32], rows: usize, weights: &PackedView<'_>, bias: Option<&[f32]>) -> Values {
        let mut out = vec![0.0; rows * weights.outputs()];
        linear(&Pool::new(1), self.0, x, rows, weights, bias, &mut out);
        Ok(out)
    }

    fn attention(&mut self, attended: &Attended<'_>) -> Values {
        let Attended { shape, keys, values, q, positions, params } = *attended;
        let mut storage =
            vec![(vec![0; shape.key_page_bytes()], vec![0; shape.value_page_bytes()]); attended.pages()];
        let of_keys = shape.kv_heads * shape.key_dim;
        let of_values = if shape.values_in_keys { 0 } else { shape.kv_heads * shape.value_dim };
        for position in 0..attended.len() {
            let page = &mut storage[position / PAGE_POSITIONS];
            shape.write_keys(position as u32, &keys[position * of_keys..][..of_keys], &mut page.0);
            shape.write_values(position as u32, &values[position * of_values..][..of_values], &mut page.1);
        }
        let pages: Vec<KvPage<'_>> = storage.iter().map(|(keys, values)| KvPage { keys, values }).collect();
        let kv = PagedKv::new(shape, &pages).expect("the pages have the shape's size");
        let mut out = vec![0.0; positions.len() * params.heads * shape.value_dim];
        attention(&Pool::new(1), self.0, q, positions, &kv, &params, &mut out);
        Ok(out)
    }

    fn rms_norm(&mut self, x: &[f32], stride: usize, weight: &[f32], eps: f32) -> Values {
        let mut out = x.to_vec();
        for row in out.chunks_exact_mut(stride) {
            rms_norm_in_place(self.0, &mut row[..weight.len()], weight, eps);
        }
        Ok(out)
    }

    fn layer_norm(&mut self, x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32) -> Values {
        let mut out = vec![0.0; x.len()];
        layer_norm(self.0, x, weight, bias, eps, &mut out);
        Ok(out)
    }

    fn rope(&mut self, table: &RopeTable, position: u32, head: &[f32], neighbours: bool) -> Values {
        let mut head = head.to_vec();
        if neighbours {
            table.apply_to_neighbours(&mut head, position);
        } else {
            table.apply(&mut head, position);
        }
        Ok(head)
    }

    fn exp(&mut self, values: &[f32]) -> Values {
        let mut values = values.to_vec();
        math::exp_in_place(self.0, &mut values);
        Ok(values)
    }

    fn sigmoid(&mut self, values: &[f32]) -> Values {
        let mut values = values.to_vec();
        math::sigmoid_in_place(self.0, &mut values);
        Ok(values)
    }

    fn swiglu(&mut self, gate: &[f32], up: &[f32]) -> Values {
        let mut out = vec![0.0; gate.len()];
        swiglu(self.0, gate, up, &mut out);
        Ok(out)
    }

    fn clamped_swiglu(&mut self, gate: &[f32], up: &[f32], alpha: f32, limit: f32) -> Values {
        let mut out = vec![0.0; gate.len()];
        clamped_swiglu(self.0, gate, up, alpha, limit, &mut out);
        Ok(out)
    }

    fn combine(&mut self, combined: &Combined<'_>) -> Values {
        let Combined { x, hidden, results, users, weights, shared, gates, multiplier } = *combined;
        let places = users.len() * hidden / x.len();
        let mut out = x.to_vec();
        for (row, out) in out.chunks_exact_mut(hidden).enumerate() {
            let mut sum = vec![0.0; hidden];
            let used = users[row * places..][..places].iter().zip(&weights[row * places..]);
            for (&user, &weight) in used.take_while(|(user, _)| **user != NOBODY) {
                axpy(self.0, weight, &results[user as usize * hidden..][..hidden], &mut sum);
            }
            axpy(self.0, math::sigmoid(gates[row]), &shared[row * hidden..][..hidden], &mut sum);
            out.iter_mut().zip(sum).for_each(|(out, sum)| *out += sum * multiplier);
        }
        Ok(out)
    }

    fn add(&mut self, x: &[f32], y: &[f32], multiplier: f32) -> Values {
        Ok(x.iter().zip(y).map(|(x, y)| x + y * multiplier).collect())
    }

    fn clip(&mut self, values: &[f32], limit: f32) -> Values {
        Ok(values.iter().map(|value| value.clamp(-limit, limit)).collect())
    }

    fn divide(&mut self, values: &[f32], by: f32) -> Values {
        Ok(values.iter().map(|value| value / by).collect())
    }

    fn arrange(&mut self, x: &[f32], picked: &[u32], columns: &Columns) -> Values {
        let Columns { n, from: [stride, from], to: [width, to] } = *columns;
        let mut out = vec![0.0; picked.len() * width];
        for (&row, out) in picked.iter().zip(out.chunks_exact_mut(width)) {
            out[to..to + n].copy_from_slice(&x[row as usize * stride + from..][..n]);
        }
        Ok(out)
    }

    fn narrow(&mut self, dtype: DType, values: &[f32]) -> Result<Vec<u8>, Infallible> {
        let mut bytes = vec![0; values.len() * dtype.bytes()];
        convert::narrow(dtype, values, &mut bytes);
        Ok(bytes)
    }

    fn embed(
        &mut self,
        storage: Storage,
        table: &[u8],
        tokens: &[u32],
        hidden: usize,
        multiplier: f32,
    ) -> Values {
        let mut out = vec![0.0; tokens.len() * hidden];
        for (&token, out) in tokens.iter().zip(out.chunks_exact_mut(hidden)) {
            if let Storage::Grouped(kind) = storage {
                let bytes = kind.row_bytes(hidden);
                quantise::dequantise_row(kind, &table[token as usize * bytes..][..bytes], out);
            } else {
                let bytes = hidden * storage.dtype().bytes();
                convert::widen(self.0, storage.dtype(), &table[token as usize * bytes..][..bytes], out);
            }
            out.iter_mut().for_each(|value| *value *= multiplier);
        }
        Ok(out)
    }

    fn route(&mut self, routed: &Routed<'_>) -> Result<Vec<Chosen>, Infallible> {
        let Routed { moe, eligible, tiers, correction, .. } = *routed;
        let correction = (moe.score == Score::Sigmoid).then_some(correction);
        let routes = routed.each().map(|(logits, ties)| {
            let mut scores = logits.to_vec();
            let mut route = match &moe.tiered {
                Some(tiered) => route_by_tiers(self.0, tiered, ties, tiers, moe.normalise, &mut scores),
                None => route_one(self.0, moe, ties, eligible, correction, &mut scores),
            };
            route.weights.iter_mut().for_each(|weight| *weight *= moe.scaling);
            (route.experts, route.weights)
        });
        Ok(routes.collect())
    }

    fn penalise(&mut self, logits: &[f32], tokens: &[u32], penalty: f32) -> Values {
        let mut logits = logits.to_vec();
        penalise(&mut logits, tokens, penalty);
        Ok(logits)
    }

    fn argmax(&mut self, logits: &[f32]) -> Result<u32, Infallible> {
        Ok(argmax(logits).expect("the logits are finite"))
    }

    fn sample(&mut self, logits: &[f32], ways: &[(Params, u64)]) -> Result<Vec<u32>, Infallible> {
        let sampled = ways.iter().map(|(params, draw)| sample::sample(self.0, logits, params, *draw));
        Ok(sampled.map(|token| token.expect("the logits are finite")).collect())
    }
}
