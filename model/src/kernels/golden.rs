//! Golden hashes: every operator on fixed operands, and the hash of its results in this version of the contract. Whatever computes
//! a model is held to the same ones: an instruction set of this machine (the self-test, `self_test.rs`), another device.

mod cases;

use super::sample::Params;
use super::*;
use crate::arch::Moe;
pub use cases::Rows;
#[cfg(test)]
pub(super) use cases::operands;
use cases::*;
use lite_llm_core::routing::Ties;

/// The operators of the contract, as something computes them.
pub trait Operators {
    /// Why there are no results.
    type Error;

    /// Products of rows with a matrix (rules 2 and 8).
    fn linear(
        &mut self,
        x: &[f32],
        rows: usize,
        weights: &PackedView<'_>,
        bias: Option<&[f32]>,
    ) -> Result<Vec<f32>, Self::Error>;
    /// Attention over a cache that keys and values are written to first (rules 7 and 9).
    fn attention(&mut self, attended: &Attended<'_>) -> Result<Vec<f32>, Self::Error>;
    /// The norm of the first values of rows that begin so many apart (rule 3).
    fn rms_norm(
        &mut self,
        x: &[f32],
        stride: usize,
        weight: &[f32],
        eps: f32,
    ) -> Result<Vec<f32>, Self::Error>;
    /// The norm of one row (rule 3).
    fn layer_norm(
        &mut self,
        x: &[f32],
        weight: &[f32],
        bias: Option<&[f32]>,
        eps: f32,
    ) -> Result<Vec<f32>, Self::Error>;
    /// Rotates a head whose pairs are neighbours or half a rotation apart (rule 4).
    fn rope(
        &mut self,
        table: &RopeTable,
        position: u32,
        head: &[f32],
        neighbours: bool,
    ) -> Result<Vec<f32>, Self::Error>;
    /// The exponential of each value (rule 4).
    fn exp(&mut self, values: &[f32]) -> Result<Vec<f32>, Self::Error>;
    /// The sigmoid of each value (rule 4).
    fn sigmoid(&mut self, values: &[f32]) -> Result<Vec<f32>, Self::Error>;
    /// `silu(gate) * up` (rule 4).
    fn swiglu(&mut self, gate: &[f32], up: &[f32]) -> Result<Vec<f32>, Self::Error>;
    /// `(up + 1) * (gate * sigmoid(alpha * gate))` within the limit (rule 4).
    fn clamped_swiglu(
        &mut self,
        gate: &[f32],
        up: &[f32],
        alpha: f32,
        limit: f32,
    ) -> Result<Vec<f32>, Self::Error>;
    /// What the experts of positions give to the residual stream (rule 6).
    fn combine(&mut self, combined: &Combined<'_>) -> Result<Vec<f32>, Self::Error>;
    /// `x + y * multiplier`: what a block gives to the residual stream.
    fn add(&mut self, x: &[f32], y: &[f32], multiplier: f32) -> Result<Vec<f32>, Self::Error>;
    /// Each value within `-limit..limit`.
    fn clip(&mut self, values: &[f32], limit: f32) -> Result<Vec<f32>, Self::Error>;
    /// Each value divided.
    fn divide(&mut self, values: &[f32], by: f32) -> Result<Vec<f32>, Self::Error>;
    /// Columns of rows at other places: `n` of those from column `from` on, from column `to` of as many rows as are picked.
    fn arrange(&mut self, x: &[f32], picked: &[u32], columns: &Columns) -> Result<Vec<f32>, Self::Error>;
    /// Values rounded as the cache stores them (rule 9).
    fn narrow(&mut self, dtype: DType, values: &[f32]) -> Result<Vec<u8>, Self::Error>;
    /// Rows of a table, widened and multiplied (rules 8 and 9).
    fn embed(
        &mut self,
        storage: Storage,
        table: &[u8],
        tokens: &[u32],
        hidden: usize,
        multiplier: f32,
    ) -> Result<Vec<f32>, Self::Error>;
    /// The experts and weights of each position (rule 6).
    fn route(&mut self, routed: &Routed<'_>) -> Result<Vec<Chosen>, Self::Error>;
    /// Logits, those of tokens that are there once penalised (rule 10).
    fn penalise(&mut self, logits: &[f32], tokens: &[u32], penalty: f32) -> Result<Vec<f32>, Self::Error>;
    /// The token with the largest of finite logits (rule 10).
    fn argmax(&mut self, logits: &[f32]) -> Result<u32, Self::Error>;
    /// A token for each way and draw, from the same finite logits (rule 10).
    fn sample(&mut self, logits: &[f32], ways: &[(Params, u64)]) -> Result<Vec<u32>, Self::Error>;
}

/// What attends to what: keys and values of as many positions as there are, of one sequence; queries of some of them.
#[derive(Clone, Copy, Debug)]
pub struct Attended<'a> {
    /// The cache's shape.
    pub shape: KvShape,
    /// Keys, position by position.
    pub keys: &'a [f32],
    /// Values; none where they are in the keys.
    pub values: &'a [f32],
    /// Queries, position by position, and theirs.
    pub q: &'a [f32],
    /// The positions of the queries.
    pub positions: &'a [u32],
    /// How.
    pub params: AttentionParams<'a>,
}

impl Attended<'_> {
    /// Positions of the cache.
    pub fn len(&self) -> usize {
        self.keys.len() / (self.shape.kv_heads * self.shape.key_dim)
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.keys.is_empty()
    }

    /// Pages of the cache.
    pub fn pages(&self) -> usize {
        self.len().div_ceil(PAGE_POSITIONS)
    }
}

/// Results of experts, and who uses them.
#[derive(Clone, Copy, Debug)]
pub struct Combined<'a> {
    /// The residual stream.
    pub x: &'a [f32],
    /// Values of a position.
    pub hidden: usize,
    /// The results of all users.
    pub results: &'a [f32],
    /// Those of each position, as many places for each; [`NOBODY`] from where there are no more.
    pub users: &'a [u32],
    /// Their weights.
    pub weights: &'a [f32],
    /// The results of a shared expert, and the outputs of its gate.
    pub shared: &'a [f32],
    /// One for each position.
    pub gates: &'a [f32],
    /// Of what comes to the residual stream.
    pub multiplier: f32,
}

/// Stands where a position uses no further expert.
pub const NOBODY: u32 = 0x7fff_ffff;

/// Which columns go where.
#[derive(Clone, Copy, Debug)]
pub struct Columns {
    /// How many.
    pub n: usize,
    /// Values of a row, and the first that is taken.
    pub from: [usize; 2],
    /// Values of a row that is made, and the first that is written; the others are 0.
    pub to: [usize; 2],
}

/// The experts of a position, by number ascending, and their weights.
pub type Chosen = (Vec<u32>, Vec<f32>);

/// Positions to be routed.
#[derive(Clone, Copy, Debug)]
pub struct Routed<'a> {
    /// The router.
    pub moe: &'a Moe,
    /// Its outputs, position by position.
    pub logits: &'a [f32],
    /// The positions.
    pub positions: &'a [u32],
    /// Which experts may be selected; of a tiered router which tiers.
    pub eligible: &'a [bool],
    /// Of a tiered router the tiers that may be selected.
    pub tiers: &'a [u32],
    /// Of a router of sigmoids a value for each expert.
    pub correction: &'a [f32],
    /// What ties are drawn by.
    pub seed: u64,
    /// The layer.
    pub layer: u32,
}

impl Routed<'_> {
    /// The outputs and the ties of each position.
    pub fn each(&self) -> impl Iterator<Item = (&[f32], Ties)> {
        let rows = self.logits.chunks_exact(self.moe.router_rows()).zip(self.positions);
        rows.map(|(logits, &position)| (logits, Ties { seed: self.seed, layer: self.layer, position }))
    }
}

/// An operator on fixed operands, and the hash of its results.
pub struct Golden<O: Operators> {
    /// The operator.
    pub kernel: &'static str,
    pub(super) run: fn(&mut O, &mut Bits) -> Result<(), O::Error>,
    /// The hash.
    pub hash: u64,
}

impl<O: Operators> Golden<O> {
    /// The hash of what comes of it here.
    ///
    /// # Errors
    /// If nothing does.
    pub fn found(&self, on: &mut O) -> Result<u64, O::Error> {
        let mut bits = Bits::default();
        (self.run)(on, &mut bits)?;
        Ok(bits.0)
    }

    /// The product that it is, which may be computed in several forms, and its rows. `None` if it is none.
    pub fn product(&self) -> Option<(&'static str, Rows)> {
        let product = self.kernel.strip_suffix(" of many rows").map(|product| (product, Rows::Many));
        product.or_else(|| self.kernel.starts_with("linear").then_some((self.kernel, Rows::Few)))
    }
}

macro_rules! golden {
    ($($kernel:literal: $run:expr => $hash:literal,)*) => {
        /// All of them.
        pub fn golden<O: Operators>() -> Vec<Golden<O>> {
            vec![$(Golden { kernel: $kernel, run: $run, hash: $hash }),*]
        }
    };
}

golden! {
    "linear f32": |on, bits| linears(on, DType::F32, Rows::Few, bits) => 0xccd1_cb34_c0a6_01bb,
    "linear bf16": |on, bits| linears(on, DType::Bf16, Rows::Few, bits) => 0x897c_4582_5313_ce29,
    "linear f16": |on, bits| linears(on, DType::F16, Rows::Few, bits) => 0x4c9c_f310_f526_5a0f,
    "linear mxfp4": |on, bits| linears_of_mxfp4(on, Rows::Few, bits) => 0x8187_fa46_3599_1243,
    "linear e4m3": |on, bits| linears_of_e4m3(on, Rows::Few, bits) => 0xa535_d886_2f3b_68d6,
    "linear q8": |on, bits| linears_of_groups(on, Quantised::Q8, Rows::Few, bits) => 0x787e_44af_a750_2558,
    "linear q4": |on, bits| linears_of_groups(on, Quantised::Q4, Rows::Few, bits) => 0x9dd5_1d98_19ec_756a,
    "linear f32 of many rows": |on, bits| linears(on, DType::F32, Rows::Many, bits) => 0xee38_4a9f_1a84_6e3a,
    "linear bf16 of many rows": |on, bits| linears(on, DType::Bf16, Rows::Many, bits) => 0x4a35_0dc0_fd00_8c4f,
    "linear f16 of many rows": |on, bits| linears(on, DType::F16, Rows::Many, bits) => 0x7ce4_6091_5231_57c2,
    "linear mxfp4 of many rows": |on, bits| linears_of_mxfp4(on, Rows::Many, bits) => 0x1453_5589_00b8_ca99,
    "linear e4m3 of many rows": |on, bits| linears_of_e4m3(on, Rows::Many, bits) => 0xc9ff_ef7f_ef73_86d2,
    "linear q8 of many rows": |on, bits| linears_of_groups(on, Quantised::Q8, Rows::Many, bits) => 0xec05_5fa8_73a1_8cc4,
    "linear q4 of many rows": |on, bits| linears_of_groups(on, Quantised::Q4, Rows::Many, bits) => 0xb7b9_3279_4495_1baa,
    "attention f32": |on, bits| attentions(on, SHAPE, bits) => 0x9614_3b2f_ac69_635f,
    "attention bf16": |on, bits| attentions(on, KvShape { dtype: DType::Bf16, ..SHAPE }, bits) => 0xc27e_5ecc_616e_bb66,
    "attention f16": |on, bits| attentions(on, KvShape { dtype: DType::F16, ..SHAPE }, bits) => 0x2f0e_0653_e9a8_0991,
    "attention over latents": |on, bits| attentions(on, LATENT, bits) => 0x6d36_d0cc_158d_74f6,
    "rms_norm": rms_norms => 0x3e14_9db9_a08a_ddf1,
    "rms_norm of latents": rms_norms_of_latents => 0x648f_3827_167f_6077,
    "layer_norm": layer_norms => 0x7376_f199_aae0_7679,
    "rope": ropes => 0x2c0a_34e0_c258_f295,
    "rope of neighbours": ropes_of_neighbours => 0xf561_f0b3_58b3_305b,
    "exp": exps => 0x4963_8842_8b7d_ce00,
    "sigmoid": sigmoids => 0xac53_894f_c471_2696,
    "silu": silus => 0xbf83_0f5f_c30f_71c9,
    "gate": gates => 0xc528_e2a2_c1c8_234d,
    "clamped gate": clamped_gates => 0xd920_0c93_027d_2e3a,
    "clamped gate of every size": clamped_gates_of_every_size => 0x93bf_fe2b_1bc3_543f,
    "combine": combines => 0xfb07_6a1e_cd46_69bd,
    "add": adds => 0x43ac_5d62_655b_ae8c,
    "clip": clips => 0x4eac_71fd_0c88_29a1,
    "divide": divisions => 0xbf1f_f846_d8fe_fa04,
    "arrange": arrangements => 0x3fd7_90df_f538_068a,
    "convert": conversions => 0x0bb0_b5fd_f89d_46e9,
    "embed f32": |on, bits| embeddings(on, DType::F32, bits) => 0x7a49_ad91_50fe_9163,
    "embed bf16": |on, bits| embeddings(on, DType::Bf16, bits) => 0xd6f4_ea19_b347_f420,
    "embed f16": |on, bits| embeddings(on, DType::F16, bits) => 0x945a_21f8_b927_a6d1,
    "embed q8": |on, bits| embeddings_of_groups(on, Quantised::Q8, bits) => 0x5671_0c18_7af0_7499,
    "embed q4": |on, bits| embeddings_of_groups(on, Quantised::Q4, bits) => 0x5d06_ee4f_a0e8_b6e3,
    "route": routes => 0x4185_0bfc_a5ce_2dd9,
    "route by tiers": routes_by_tiers => 0x406c_8f75_5a1c_5090,
    "route sparsely": routes_sparsely => 0x52b6_0af5_bbc9_5087,
    "penalise": penalties => 0x9618_c9e8_f983_177b,
    "argmax": largest => 0x78f1_eb43_417b_8ea0,
    "sample": samples => 0x6d1f_61f1_2752_8e35,
}

/// FNV-1a over 32-bit words.
#[derive(Debug)]
pub struct Bits(pub u64);

impl Default for Bits {
    fn default() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }
}

impl Bits {
    /// Takes a word.
    pub fn word(&mut self, word: u32) {
        self.0 = (self.0 ^ u64::from(word)).wrapping_mul(0x0100_0000_01b3);
    }

    pub(super) fn values(&mut self, values: &[f32]) {
        values.iter().for_each(|value| self.word(value.to_bits()));
    }

    pub(super) fn bytes(&mut self, bytes: &[u8]) {
        bytes.iter().for_each(|byte| self.word(u32::from(*byte)));
    }
}

/// Inputs of the exponential whose results have a hash together: neighbours, as bits.
pub const EXP_CHUNK: u32 = 1 << 12;

/// The exponential of very many inputs, in chunks that may be computed apart.
#[derive(Clone, Copy, Debug)]
pub struct GoldenExp {
    /// Chunks from one to the next.
    pub every: u32,
    /// The hash of the hashes of the chunks, in their order.
    pub hash: u64,
}

/// Of 2^24 inputs, and of all that there are.
pub const GOLDEN_EXP: [GoldenExp; 2] = [
    GoldenExp { every: 256, hash: 0x0663_f7f9_2c1e_0860 },
    GoldenExp { every: 1, hash: 0xaf0a_d080_0992_68a0 },
];

impl GoldenExp {
    /// How many chunks there are.
    pub const fn chunks(&self) -> u32 {
        (1 << 20) / self.every
    }

    /// The bits of the first input of a chunk.
    pub const fn first(&self, chunk: u32) -> u32 {
        chunk * self.every * EXP_CHUNK
    }

    /// The hash of the hashes of chunks.
    pub fn of_chunks(hashes: impl IntoIterator<Item = u64>) -> u64 {
        let mut bits = Bits::default();
        for hash in hashes {
            bits.word(hash as u32);
            bits.word((hash >> 32) as u32);
        }
        bits.0
    }
}
