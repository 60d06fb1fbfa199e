//! An architecture as data: what a family's file states, and all that the forward pass asks.

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
    /// Query heads.
    pub heads: usize,
    /// Key/value heads.
    pub kv_heads: usize,
    /// Values in a head.
    pub head_dim: usize,
    /// Tokens.
    pub vocab: usize,
    /// Longest sequence.
    pub context: u32,
    /// Epsilon of every norm.
    pub norm_eps: f32,
    /// Rotary embedding.
    pub rope: Rope,
    /// Norm of queries and keys before the rotation.
    pub qk_norm: QkNorm,
    /// Whether queries, keys and values have biases.
    pub qkv_bias: bool,
    /// Whether the attention's output has a bias.
    pub o_bias: bool,
    /// Queries, keys and values are clamped to this magnitude.
    pub clip_qkv: Option<f32>,
    /// Whether the output projection is the embedding.
    pub tied: bool,
    /// The decoder layers.
    pub layers: Vec<Layer>,
    /// Mixture of experts, if any layer has one.
    pub moe: Option<Moe>,
    /// End-of-stream tokens of the configuration.
    pub eos: Vec<u32>,
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
    /// What is done to the frequencies.
    pub scaling: RopeScaling,
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
    /// Whether the weights of the selected are divided by their sum.
    pub normalise: bool,
    /// Only experts of the best groups are selected.
    pub group_limit: Option<GroupLimit>,
    /// Tier, then group, then expert are selected, instead of experts at once.
    pub tiered: Option<TieredRouter>,
    /// An expert that every position uses.
    pub shared: Option<Shared>,
    /// How tensors are called.
    pub names: MoeNames,
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
    /// Its width.
    pub intermediate: usize,
    /// Whether a sigmoid gate multiplies its output.
    pub gated: bool,
}

/// What the tensors of a mixture are called, after `model.layers.N.`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MoeNames {
    /// The block.
    pub block: &'static str,
    /// The router in the block.
    pub router: &'static str,
    /// Gate, up and down projection of an expert.
    pub expert: [&'static str; 3],
}

impl Moe {
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

    /// Values in the queries of one position.
    pub fn q_dim(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Values in the keys, or the values, of one position.
    pub fn kv_dim(&self) -> usize {
        self.kv_heads * self.head_dim
    }
}

impl Rope {
    /// The frequencies of the pairs of dimensions, as transformers rounds them.
    pub fn inverse_frequencies(&self) -> Vec<f32> {
        let plain = crate::kernels::rope::inverse_frequencies(self.theta, self.dims);
        match self.scaling {
            RopeScaling::None => plain,
            RopeScaling::Linear { factor } => plain.into_iter().map(|f| f / factor as f32).collect(),
            RopeScaling::Llama3 { factor, low, high, original } => plain
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
        }
    }
}
