//! The start-up self-test: golden hashes of every kernel, equal on all instruction sets.

use super::pool::is_ieee;
use super::sample::Params;
use super::*;
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
        GOLDEN.iter().try_for_each(|golden| golden.check(isa))?;
        FOUND_RIGHT.fetch_or(bit, Ordering::Relaxed);
    }
    Ok(())
}

/// A kernel on fixed operands, and the hash of its results in version 1 of the contract.
pub(super) struct Golden {
    pub(super) kernel: &'static str,
    pub(super) run: fn(Isa, &mut Bits),
    pub(super) hash: u64,
}

impl Golden {
    pub(super) fn found(&self, isa: Isa) -> u64 {
        let mut bits = Bits::default();
        (self.run)(isa, &mut bits);
        bits.0
    }

    pub(super) fn check(&self, isa: Isa) -> Result<(), SelfTestError> {
        let found = self.found(isa);
        if found == self.hash {
            return Ok(());
        }
        Err(SelfTestError::Bits { kernel: self.kernel, isa, expected: self.hash, found })
    }
}

pub(super) const GOLDEN: [Golden; 21] = [
    Golden {
        kernel: "linear f32",
        run: |isa, bits| linears(isa, DType::F32, bits),
        hash: 0xccd1_cb34_c0a6_01bb,
    },
    Golden {
        kernel: "linear bf16",
        run: |isa, bits| linears(isa, DType::Bf16, bits),
        hash: 0x897c_4582_5313_ce29,
    },
    Golden {
        kernel: "linear f16",
        run: |isa, bits| linears(isa, DType::F16, bits),
        hash: 0x4c9c_f310_f526_5a0f,
    },
    Golden { kernel: "linear mxfp4", run: linears_of_mxfp4, hash: 0x9549_1aff_bf2e_9655 },
    Golden { kernel: "linear e4m3", run: linears_of_e4m3, hash: 0x2559_d1c0_44bf_97b3 },
    Golden {
        kernel: "linear q8",
        run: |isa, bits| linears_of_groups(isa, Quantised::Q8, bits),
        hash: 0x81ed_853f_05b1_0573,
    },
    Golden {
        kernel: "linear q4",
        run: |isa, bits| linears_of_groups(isa, Quantised::Q4, bits),
        hash: 0x950b_e5c0_4b8d_1072,
    },
    Golden {
        kernel: "attention f32",
        run: |isa, bits| attentions(isa, KvShape { dtype: DType::F32, ..SHAPE }, bits),
        hash: 0x9614_3b2f_ac69_635f,
    },
    Golden {
        kernel: "attention bf16",
        run: |isa, bits| attentions(isa, KvShape { dtype: DType::Bf16, ..SHAPE }, bits),
        hash: 0xc27e_5ecc_616e_bb66,
    },
    Golden {
        kernel: "attention f16",
        run: |isa, bits| attentions(isa, KvShape { dtype: DType::F16, ..SHAPE }, bits),
        hash: 0x2f0e_0653_e9a8_0991,
    },
    Golden {
        kernel: "attention over latents",
        run: |isa, bits| {
            attentions(isa, KvShape { kv_heads: 1, value_dim: 51, values_in_keys: true, ..SHAPE }, bits)
        },
        hash: 0x6d36_d0cc_158d_74f6,
    },
    Golden { kernel: "rms_norm", run: rms_norms, hash: 0x3e14_9db9_a08a_ddf1 },
    Golden { kernel: "layer_norm", run: layer_norms, hash: 0x7376_f199_aae0_7679 },
    Golden { kernel: "rope", run: ropes, hash: 0x2c0a_34e0_c258_f295 },
    Golden { kernel: "rope of neighbours", run: ropes_of_neighbours, hash: 0xf561_f0b3_58b3_305b },
    Golden { kernel: "exp", run: exps, hash: 0x4963_8842_8b7d_ce00 },
    Golden { kernel: "silu", run: silus, hash: 0x1cd9_30c8_2e96_0159 },
    Golden { kernel: "combine", run: combines, hash: 0xf7bb_1ce0_c8c8_65d5 },
    Golden { kernel: "clamped gate", run: clamped_gates, hash: 0xd920_0c93_027d_2e3a },
    Golden { kernel: "convert", run: conversions, hash: 0x0bb0_b5fd_f89d_46e9 },
    Golden { kernel: "sample", run: samples, hash: 0x01be_cfa9_9814_0060 },
];

/// FNV-1a over 32-bit words.
pub(super) struct Bits(pub(super) u64);

impl Default for Bits {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Bits {
    pub(super) fn word(&mut self, word: u32) {
        self.0 = (self.0 ^ u64::from(word)).wrapping_mul(0x0100_0000_01b3);
    }

    pub(super) fn values(&mut self, values: &[f32]) {
        values.iter().for_each(|value| self.word(value.to_bits()));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.word(u32::from(*byte)));
    }
}

/// Numbers in (-2, 2), among them zeros of both signs, subnormals, and some whose products underflow.
pub(super) fn operands(len: usize, seed: u64) -> Vec<f32> {
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

/// Two chunks, the second padded; a padded tile; every number of rows in a block, and more than one block.
fn linears(isa: Isa, dtype: DType, bits: &mut Bits) {
    let (outputs, inputs) = (33, 1061);
    let mut row_major = vec![0; outputs * inputs * dtype.bytes()];
    convert::narrow(dtype, &operands(outputs * inputs, 1), &mut row_major);
    let mut packed = vec![0; packed_len(dtype, outputs, inputs).expect("the shape is small")];
    pack(dtype, outputs, inputs, &row_major, &mut packed);
    let view = PackedView::new(dtype, outputs, inputs, &packed).expect("the length is the shape's");
    let bias = operands(outputs, 2);
    let pool = Pool::new(1);
    for rows in [1, 2, 3, 4, 5, 6, 13] {
        let x = operands(rows * inputs, 3 + rows as u64);
        let mut out = vec![0.0; rows * outputs];
        linear(&pool, isa, &x, rows, &view, (rows != 1).then_some(&bias), &mut out);
        bits.values(&out);
    }
}

/// Whole and cut chunks, one row and several; every code, factors of all sizes.
fn linears_of_mxfp4(isa: Isa, bits: &mut Bits) {
    let (outputs, inputs) = (65, 1056);
    let mut packed = vec![0; packed_len(Storage::Mxfp4, outputs, inputs).expect("the shape is small")];
    let code = |output, input| (output * 5 + input * 11) as u8;
    let exponent = |output, block| (100 + output % 40 + block % 7) as u8;
    pack_mxfp4(outputs, inputs, code, exponent, &mut packed);
    quantised(isa, Storage::Mxfp4, (outputs, inputs), &packed, bits);
}

fn linears_of_e4m3(isa: Isa, bits: &mut Bits) {
    let (outputs, inputs) = (145, 1061);
    let mut packed = vec![0; packed_len(Storage::E4m3, outputs, inputs).expect("the shape is small")];
    let code = |output, input| (output * 7 + input * 13) as u8 & 0xbf;
    let factors = operands(2 * 9, 21);
    pack_e4m3(outputs, inputs, code, |down, across| factors[down * 9 + across], &mut packed);
    quantised(isa, Storage::E4m3, (outputs, inputs), &packed, bits);
}

/// A group without a partner, a padded one, a padded tile; every number of rows in a block. Rows are quantised too.
fn linears_of_groups(isa: Isa, kind: Quantised, bits: &mut Bits) {
    let (outputs, inputs) = (65, 1061);
    let mut rows = vec![0; outputs * kind.row_bytes(inputs)];
    let weights = operands(outputs * inputs, 31);
    for (weights, row) in weights.chunks(inputs).zip(rows.chunks_mut(kind.row_bytes(inputs))) {
        quantise::quantise_row(kind, weights, row).expect("the operands are finite and small");
    }
    bits.bytes(&rows);
    let mut packed = vec![0; packed_len(kind, outputs, inputs).expect("the shape is small")];
    pack_groups(kind, outputs, inputs, &rows, &mut packed);
    let view = PackedView::new(kind, outputs, inputs, &packed).expect("the length is the shape's");
    let pool = Pool::new(1);
    for rows in [1, 2, 3, 4, 5, 6, 13] {
        let mut out = vec![0.0; rows * outputs];
        linear(&pool, isa, &operands(rows * inputs, 32 + rows as u64), rows, &view, None, &mut out);
        bits.values(&out);
    }
}

fn quantised(isa: Isa, storage: Storage, (outputs, inputs): (usize, usize), packed: &[u8], bits: &mut Bits) {
    let view = PackedView::new(storage, outputs, inputs, packed).expect("the length is the shape's");
    let pool = Pool::new(1);
    for rows in [1, 3, 13] {
        let x = operands(rows * inputs, 5 + rows as u64);
        let mut out = vec![0.0; rows * outputs];
        linear(&pool, isa, &x, rows, &view, None, &mut out);
        bits.values(&out);
    }
}

/// Dimensions that fill no whole register, grouped heads.
const SHAPE: KvShape =
    KvShape { kv_heads: 2, key_dim: 72, value_dim: 83, values_in_keys: false, dtype: DType::F32 };

/// Three pages; windows and sinks.
fn attentions(isa: Isa, shape: KvShape, bits: &mut Bits) {
    let KvShape { kv_heads, key_dim, value_dim, values_in_keys, .. } = shape;
    let (heads, len) = (6, 150);
    let mut storage = vec![(vec![0; shape.key_page_bytes()], vec![0; shape.value_page_bytes()]); 3];
    for position in 0..len {
        let (keys, values) = &mut storage[position / PAGE_POSITIONS];
        shape.write_keys(position as u32, &operands(kv_heads * key_dim, position as u64), keys);
        let of_values = if values_in_keys { 0 } else { kv_heads * value_dim };
        shape.write_values(position as u32, &operands(of_values, 1 << 32 | position as u64), values);
    }
    let pages: Vec<KvPage<'_>> = storage.iter().map(|(keys, values)| KvPage { keys, values }).collect();
    let kv = PagedKv::new(shape, &pages).expect("the pages have the shape's size");
    let positions = [0, 63, 64, 149];
    let q = operands(positions.len() * heads * key_dim, 7);
    let sinks = operands(heads, 8);
    for (window, sinks) in [(None, None), (Some(70), Some(&sinks[..]))] {
        let params = AttentionParams { heads, scale: 0.117_851_13, window, sinks };
        let mut out = vec![0.0; positions.len() * heads * value_dim];
        attention(&Pool::new(1), isa, &q, &positions, &kv, &params, &mut out);
        bits.values(&out);
    }
}

fn rms_norms(isa: Isa, bits: &mut Bits) {
    let mut out = vec![0.0; 1061];
    rms_norm(isa, &operands(1061, 1), &operands(1061, 2), 1e-5, &mut out);
    bits.values(&out);
}

fn layer_norms(isa: Isa, bits: &mut Bits) {
    let mut out = vec![0.0; 1061];
    let (x, weight, bias) = (operands(1061, 1), operands(1061, 2), operands(1061, 3));
    layer_norm(isa, &x, &weight, Some(&bias), 1e-5, &mut out);
    bits.values(&out);
    layer_norm(isa, &x, &weight, None, 1e-5, &mut out);
    bits.values(&out);
}

/// The tables come from the pinned `libm`; no instruction set is chosen.
fn ropes(_: Isa, bits: &mut Bits) {
    let frequencies = rope::inverse_frequencies(10_000.0, 64);
    bits.values(&frequencies);
    let table = RopeTable::new(&frequencies, 1.25, 300);
    for position in [0, 1, 7, 255, 299] {
        let (cos, sin) = table.row(position);
        bits.values(cos);
        bits.values(sin);
        let mut head = operands(80, u64::from(position));
        table.apply(&mut head, position);
        bits.values(&head);
    }
}

fn ropes_of_neighbours(_: Isa, bits: &mut Bits) {
    let table = RopeTable::new(&rope::inverse_frequencies(10_000.0, 64), 1.25, 300);
    for position in [0, 1, 7, 255, 299] {
        let mut head = operands(80, u64::from(position));
        table.apply_to_neighbours(&mut head, position);
        bits.values(&head);
    }
}

/// Every 2^16-th pattern or so, NaNs and infinities included, and the range that matters more densely.
fn exp_operands() -> Vec<f32> {
    let patterns = (0..=u32::MAX).step_by(65_521).map(f32::from_bits);
    patterns.chain((0..20_000).map(|i| i as f32 * -0.0053)).collect()
}

fn exps(isa: Isa, bits: &mut Bits) {
    let mut values = exp_operands();
    math::exp_in_place(isa, &mut values);
    bits.values(&values);
}

/// Sigmoid and silu; NaN operands are left out, since the quotient passes their payload on.
fn silus(isa: Isa, bits: &mut Bits) {
    let operands: Vec<f32> = exp_operands().into_iter().filter(|x| x.is_finite()).collect();
    for apply in [math::sigmoid_in_place, math::silu_in_place] {
        let mut values = operands.clone();
        apply(isa, &mut values);
        bits.values(&values);
    }
}

fn combines(isa: Isa, bits: &mut Bits) {
    let (gate, up) = (operands(1061, 1), operands(1061, 2));
    let mut out = vec![0.0; 1061];
    swiglu(isa, &gate, &up, &mut out);
    bits.values(&out);
    for weight in operands(8, 3) {
        axpy(isa, weight, &gate, &mut out);
    }
    bits.values(&out);
}

fn clamped_gates(isa: Isa, bits: &mut Bits) {
    let mut out = vec![0.0; 1061];
    clamped_swiglu(isa, &operands(1061, 1), &operands(1061, 2), 1.702, 1.5, &mut out);
    bits.values(&out);
}

fn conversions(isa: Isa, bits: &mut Bits) {
    let values: Vec<f32> =
        (0..=u32::MAX).step_by(65_521).map(f32::from_bits).filter(|x| !x.is_nan()).collect();
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let mut stored = vec![0; values.len() * dtype.bytes()];
        convert::narrow(dtype, &values, &mut stored);
        bits.bytes(&stored);
        let mut back = vec![0.0; values.len()];
        convert::widen(isa, dtype, &stored, &mut back);
        bits.values(&back);
    }
}

fn samples(isa: Isa, bits: &mut Bits) {
    let logits: Vec<f32> = operands(2_000, 1).iter().map(|x| x * 6.0).collect();
    bits.word(argmax(&logits).expect("the logits are finite"));
    let narrowed = [(0, 1.0, 0.0), (40, 1.0, 0.0), (0, 0.9, 0.0), (0, 1.0, 0.05), (100, 0.8, 0.01)];
    for (top_k, top_p, min_p) in narrowed {
        let params = Params { temperature: 0.8, top_k, top_p, min_p };
        for draw in 0..32 {
            let draw = (draw * 2 + 1) << 58;
            bits.word(sample::sample(isa, &logits, &params, draw).expect("the logits are finite"));
        }
    }
}
