//! An architecture as data: what a family's file states, and all that the forward pass asks.

use crate::kernels::{DType, KvShape};
use lite_llm_core::config::Placement;
use lite_llm_core::routing::{GroupLimit, Hierarchy};
use std::ops::Range;

/// The architecture of a checkpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct Arch {
    /// `model_type` of the configuration.
    pub family: &'static str,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Tokens.
    pub vocab: usize,
    /// Longest sequence.
    pub context: u32,
    /// Norm of every block's input, and of the last output.
    pub norm: Norm,
    /// Epsilon of every norm of the residual stream.
    pub norm_eps: f32,
    /// Self-attention.
    pub attention: Attention,
    /// Rotary embedding.
    pub rope: Rope,
    /// Factors of the residual stream.
    pub multipliers: Multipliers,
    /// Whether the output projection is the embedding.
    pub tied: bool,
    /// Whether the output projection has a bias.
    pub head_bias: bool,
    /// The decoder layers.
    pub layers: Vec<Layer>,
    /// Mixture of experts, if any layer has one.
    pub moe: Option<Moe>,
    /// End-of-stream tokens of the configuration.
    pub eos: Vec<u32>,
}

/// A norm of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Norm {
    /// By the root of the mean square.
    Rms,
    /// By mean and variance, with a bias.
    Layer,
}

/// Constant factors of the residual stream; 1 where a family has none.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Multipliers {
    /// Of the embedding.
    pub embedding: f32,
    /// Of what a block adds.
    pub residual: f32,
    /// The logits are divided by this.
    pub logits: f32,
}

/// Self-attention.
#[derive(Clone, Debug, PartialEq)]
pub struct Attention {
    /// Query heads.
    pub heads: usize,
    /// Heads of keys and values, before any compression.
    pub kv_heads: usize,
    /// Values in a query and a key of a head.
    pub head_dim: usize,
    /// Values in a value vector of a head.
    pub value_dim: usize,
    /// Multiplies each score.
    pub scale: f32,
    /// Norm of queries and keys before the rotation.
    pub qk_norm: QkNorm,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the output has a bias.
    pub o_bias: bool,
    /// Queries, keys and values are clamped to this magnitude.
    pub clip_qkv: Option<f32>,
    /// Whether each head has a logit that takes part in the softmax without a value.
    pub sinks: bool,
    /// Keys and values come from one short vector of each position, and that is what is cached.
    pub latent: Option<Latent>,
}

/// Multi-head latent attention: a head's key is `[from the latent, rotated]`, and the rotated part is shared by all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Latent {
    /// Width of the vector that queries are made of; they are made of the input if `None`.
    pub query_rank: Option<usize>,
    /// Width of the vector that keys and values are made of.
    pub rank: usize,
    /// Values of a key that are not rotated.
    pub plain: usize,
}

/// A decoder layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Layer {
    /// Positions that a position sees, its own included; all if `None`.
    pub window: Option<u32>,
    /// Width of the dense block; `None` for a mixture of experts.
    pub dense: Option<usize>,
}

/// Rotary embedding.
#[derive(Clone, Debug, PartialEq)]
pub struct Rope {
    /// Base of the frequencies.
    pub theta: f64,
    /// Dimensions of a head that are rotated.
    pub dims: usize,
    /// Which dimensions are a pair.
    pub pairs: Pairs,
    /// What is done to the frequencies.
    pub scaling: RopeScaling,
    /// Multiplies sines and cosines.
    pub factor: f64,
}

/// Which two dimensions of a head are rotated together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pairs {
    /// One of the first half with one of the second.
    Halves,
    /// Neighbours.
    Neighbours,
}

/// What is done to the rotary frequencies for longer contexts.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Nothing.
    None,
    /// All are divided.
    Linear {
        /// By this.
        factor: f64,
    },
    /// Low frequencies are divided, high ones stay, those in between are interpolated (Llama 3).
    Llama3 {
        /// Divides low frequencies.
        factor: f64,
        /// Wavelengths above `original / low` are low.
        low: f64,
        /// Wavelengths below `original / high` are high.
        high: f64,
        /// The context it was trained for.
        original: f64,
    },
    /// The same by the number of turns within the original context, with a linear ramp (YaRN).
    Yarn {
        /// Divides low frequencies.
        factor: f64,
        /// Dimensions that turn more often stay.
        fast: f64,
        /// Dimensions that turn less often are divided.
        slow: f64,
        /// The context it was trained for.
        original: f64,
        /// Whether the ends of the ramp are whole dimensions.
        truncate: bool,
    },
    /// Each frequency is divided by a number of its own (LongRoPE).
    Each {
        /// By these.
        factors: Vec<f64>,
    },
}

/// Norm of queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum QkNorm {
    /// None.
    None,
    /// Each head by itself.
    PerHead,
    /// The whole projection, before it is split into heads.
    Whole,
}

/// A mixture of experts.
#[derive(Clone, Debug, PartialEq)]
pub struct Moe {
    /// Experts of a layer.
    pub experts: usize,
    /// Experts that a position selects.
    pub top_k: usize,
    /// Width of an expert.
    pub intermediate: usize,
    /// How the router's outputs select and weigh.
    pub score: Score,
    /// Whether the weights of the selected are divided by their sum.
    pub normalise: bool,
    /// Multiplies the weights of the selected at last.
    pub scaling: f32,
    /// Only experts of the best groups are selected.
    pub group_limit: Option<GroupLimit>,
    /// Tier, then group, then expert are selected, instead of experts at once.
    pub tiered: Option<TieredRouter>,
    /// Whether the router's outputs have a bias.
    pub router_bias: bool,
    /// What an expert computes between its matrices.
    pub activation: Activation,
    /// Whether each of an expert's matrices has a bias.
    pub expert_bias: bool,
    /// An expert that every position uses.
    pub shared: Option<Shared>,
    /// What a router is called after `model.layers.N.`: the first that is there.
    pub routers: &'static [&'static str],
    /// How experts are published: the first that is there.
    pub forms: &'static [ExpertForm],
}

/// How a router's outputs select experts and weigh them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Score {
    /// A softmax over all experts selects and weighs.
    Softmax,
    /// The outputs select, and a softmax over the selected weighs.
    SoftmaxOfSelected,
    /// A sigmoid of each weighs; with a bias of each expert added it selects.
    Sigmoid,
    /// Two experts, each weighed by a softmax over those whose output is near its own.
    Sparsemixer {
        /// Half of the relative distance that is near.
        jitter: f32,
    },
}

/// What a gated block computes between its matrices.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Activation {
    /// `silu(gate) * up`.
    SwiGlu,
    /// `(up + 1) * gate * sigmoid(alpha * gate)`, the gate at most `limit`, up within it.
    Clamped {
        /// Steepness of the sigmoid.
        alpha: f32,
        /// Largest magnitude.
        limit: f32,
    },
}

/// How the experts of a layer are published; names follow `model.layers.N.`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExpertForm {
    /// Matrices of their own: `BLOCK.E.NAME.weight`.
    Apart {
        /// The block.
        block: &'static str,
        /// Gate, up and down.
        names: [&'static str; 3],
    },
    /// All experts in two tensors: `[experts, gate rows then up rows, hidden]`, `[experts, hidden, width]`.
    Fused {
        /// Gates and ups.
        gate_up: &'static str,
        /// Downs.
        down: &'static str,
    },
    /// The same transposed, gate and up column by column, with biases `NAME_bias`; or as MXFP4 blocks of rows,
    /// `NAME_blocks` and `NAME_scales`.
    Columns {
        /// Gates and ups: `[experts, hidden, 2 width]`.
        gate_up: &'static str,
        /// Downs: `[experts, width, hidden]`.
        down: &'static str,
    },
}

/// A router that selects tiers, in each of them groups, in each of those experts.
///
/// Its matrix has one row for each tier, then one for each group, tier by tier, then one for each expert by original
/// number: tier by tier, group by group.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TieredRouter {
    /// The tiers, in order of their experts' original numbers.
    pub tiers: Vec<TierOfGroups>,
    /// How many are selected at each level; all where there are fewer.
    pub select: Hierarchy,
}

/// A tier of equal groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TierOfGroups {
    /// Its name, as TierSets use it.
    pub name: String,
    /// Groups.
    pub groups: usize,
    /// Experts of a group.
    pub experts: usize,
    /// Where its experts belong.
    pub placement: Placement,
}

impl TieredRouter {
    /// Experts of all tiers.
    pub fn experts(&self) -> usize {
        self.tiers.iter().fold(0, |sum, tier| sum.saturating_add(tier.groups.saturating_mul(tier.experts)))
    }

    /// The row of the first group.
    const fn first_group(&self) -> usize {
        self.tiers.len()
    }

    /// The row of the first expert.
    pub fn first_expert(&self) -> usize {
        self.first_group() + self.tiers.iter().map(|tier| tier.groups).sum::<usize>()
    }

    /// Rows of the matrix.
    pub fn rows(&self) -> usize {
        self.first_expert() + self.experts()
    }

    /// The rows of a tier's groups.
    pub fn groups_of(&self, tier: usize) -> Range<usize> {
        let first = self.first_group() + self.tiers[..tier].iter().map(|tier| tier.groups).sum::<usize>();
        first..first + self.tiers[tier].groups
    }

    /// The rows of the experts of a group, which is given by its own row.
    pub fn experts_of(&self, group: usize) -> Range<usize> {
        let mut first = self.first_expert();
        let mut before = group - self.first_group();
        for tier in &self.tiers {
            if before < tier.groups {
                first += before * tier.experts;
                return first..first + tier.experts;
            }
            before -= tier.groups;
            first += tier.groups * tier.experts;
        }
        unreachable!("row {group} is no group")
    }
}

/// An expert that every position uses.
#[derive(Clone, Debug, PartialEq)]
pub struct Shared {
    /// What it is called after `model.layers.N.`.
    pub name: &'static str,
    /// Its width.
    pub intermediate: usize,
    /// Whether a sigmoid gate multiplies its output.
    pub gated: bool,
}

impl Moe {
    /// What a router has beside its matrix: a value for each expert by these names.
    pub fn router_vectors(&self) -> Vec<&'static str> {
        let bias = self.router_bias.then_some("bias");
        let correction = (self.score == Score::Sigmoid).then_some("e_score_correction_bias");
        bias.into_iter().chain(correction).collect()
    }

    /// Rows of a router's matrix.
    pub fn router_rows(&self) -> usize {
        self.tiered.as_ref().map_or(self.experts, TieredRouter::rows)
    }
}

impl Arch {
    /// The layers that have experts, ascending.
    pub fn moe_layers(&self) -> Vec<u32> {
        (0..).zip(&self.layers).filter(|(_, layer)| layer.dense.is_none()).map(|(i, _)| i).collect()
    }
}

impl Attention {
    /// Values in the queries of one position.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Values in the keys of one position, before any compression.
    pub fn k_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// Values in the values of one position, before any compression.
    pub fn v_dim(&self) -> usize {
        self.kv_heads * self.value_dim
    }

    /// Values in the mixed values of all query heads.
    pub fn mixed_dim(&self) -> usize {
        self.heads * self.value_dim
    }

    /// What is cached of one position. A latent is its own value: it is cached once.
    pub fn kv_shape(&self, dtype: DType) -> KvShape {
        match self.latent {
            None => KvShape {
                kv_heads: self.kv_heads,
                key_dim: self.head_dim,
                value_dim: self.value_dim,
                values_in_keys: false,
                dtype,
            },
            Some(latent) => KvShape {
                kv_heads: 1,
                key_dim: latent.rank + self.head_dim - latent.plain,
                value_dim: latent.rank,
                values_in_keys: true,
                dtype,
            },
        }
    }
}

impl Rope {
    /// The frequencies of the pairs of dimensions, as transformers rounds them.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let plain = crate::kernels::rope::inverse_frequencies(self.theta, self.dims);
        match &self.scaling {
            RopeScaling::None => plain,
            RopeScaling::Linear { factor } => plain.into_iter().map(|f| f / *factor as f32).collect(),
            &RopeScaling::Llama3 { factor, low, high, original } => plain
                .into_iter()
                .map(|frequency| {
                    let wavelength = 2.0 * std::f32::consts::PI / frequency;
                    let (low_wavelength, high_wavelength) =
                        ((original / low) as f32, (original / high) as f32);
                    if wavelength > low_wavelength {
                        return frequency / factor as f32;
                    }
                    if wavelength < high_wavelength {
                        return frequency;
                    }
                    let smooth = (original as f32 / wavelength - low as f32) / (high - low) as f32;
                    (1.0 - smooth) * (frequency / factor as f32) + smooth * frequency
                })
                .collect(),
            &RopeScaling::Yarn { factor, fast, slow, original, truncate } => {
                let dims = self.dims as f64;
                // The dimension that turns so often within the original context.
                let turning = |turns: f64| {
                    dims * libm::log(original / (turns * 2.0 * std::f64::consts::PI))
                        / (2.0 * libm::log(self.theta))
                };
                let (mut low, mut high) = (turning(fast), turning(slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let (low, mut high) = (low.max(0.0), high.min(dims - 1.0));
                if low.total_cmp(&high).is_eq() {
                    high += 0.001;
                }
                let powers = crate::kernels::rope::powers(self.theta, self.dims);
                (0u16..)
                    .zip(powers)
                    .map(|(i, power)| {
                        let ramp = (f32::from(i) - low as f32) / (high - low) as f32;
                        let stays = 1.0 - ramp.clamp(0.0, 1.0);
                        let divided = 1.0 / (factor as f32 * power);
                        divided * (1.0 - stays) + 1.0 / power * stays
                    })
                    .collect()
            }
            RopeScaling::Each { factors } => {
                let powers = crate::kernels::rope::powers(self.theta, self.dims);
                powers.zip(factors).map(|(power, factor)| 1.0 / (*factor as f32 * power)).collect()
            }
        }
    }
}
