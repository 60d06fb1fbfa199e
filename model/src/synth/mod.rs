//! Random checkpoints in the Hugging Face layout, of any size: to try the runtime, to test and to measure it without
//! trained weights.
//!
//! The same [`SynthSpec`] gives the same bytes on every machine: each value is an integer function of (seed, tensor
//! name, index), rounded once to the storage type. Tensors are streamed in blocks, so a checkpoint may be larger than
//! memory. The directory appears under its name only when it is complete.

mod config;
mod files;
mod native;
mod tensors;
mod tokenizer;
mod weights;

use crate::checkpoint::Tier;
use crate::kernels::DType;
use lite_llm_core::config::Placement;
use std::path::{Path, PathBuf};
use thiserror::Error;

pub use native::synth_native;

/// A family that can be synthesised, by the `model_type` of its configuration.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum SynthFamily {
    /// Dense.
    Llama,
    /// Every layer a mixture; weights of the selected experts normalised.
    Mixtral,
    /// Norms over whole query and key projections.
    Olmoe,
    /// A gated shared expert; biases on queries, keys and values.
    Qwen2Moe,
    /// Norms on each head.
    Qwen3Moe,
    /// The project's own: selects tier, then group, then expert.
    TieredMoe,
}

impl SynthFamily {
    /// Every family.
    pub const ALL: [Self; 6] =
        [Self::Llama, Self::Mixtral, Self::Olmoe, Self::Qwen2Moe, Self::Qwen3Moe, Self::TieredMoe];

    /// The `model_type` of the family.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mixtral => "mixtral",
            Self::Olmoe => "olmoe",
            Self::Qwen2Moe => "qwen2_moe",
            Self::Qwen3Moe => "qwen3_moe",
            Self::TieredMoe => "tiered_moe",
        }
    }

    /// The family of a `model_type`.
    pub fn of_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|family| family.name() == name)
    }

    /// Whether its layers are mixtures of experts.
    pub fn is_mixture(self) -> bool {
        self != Self::Llama
    }
}

/// What to write. Counts are of values, not bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SynthSpec {
    /// The family.
    pub family: SynthFamily,
    /// Decoder layers.
    pub layers: u32,
    /// Width of the residual stream.
    pub hidden: u32,
    /// Query heads.
    pub heads: u32,
    /// Key/value heads; divides `heads`.
    pub kv_heads: u32,
    /// Values in a head; even.
    pub head_dim: u32,
    /// Experts of a layer; ignored by a dense family. [`SynthFamily::TieredMoe`] has as many as its tiers.
    pub experts: u32,
    /// Experts that a position selects; ignored by a dense family. [`SynthFamily::TieredMoe`] selects two tiers, two
    /// groups of each and so many experts of each group, or all where there are fewer.
    pub top_k: u32,
    /// The tiers of [`SynthFamily::TieredMoe`]; ignored by other families.
    pub tiers: Vec<Tier>,
    /// Width of an expert, or of the dense block.
    pub intermediate: u32,
    /// Width of the shared expert; only [`SynthFamily::Qwen2Moe`] has one.
    pub shared_intermediate: u32,
    /// Tokens. From [`SynthSpec::TEXT_VOCAB_MIN`] on a tokenizer is written too.
    pub vocab: u32,
    /// Longest sequence.
    pub context: u32,
    /// Percent of each token's embedding, squared, that all tokens have in common: with any, routers prefer the same experts in
    /// every text. Below 100.
    pub skew: u32,
    /// Storage type of all weights.
    pub dtype: DType,
    /// Seed of all weights.
    pub seed: u64,
    /// A file of weights holds at most this many bytes of tensors, unless one tensor alone is larger.
    pub shard_bytes: u64,
}

impl SynthSpec {
    /// The smallest vocabulary that gets a tokenizer: three special tokens and every byte.
    pub const TEXT_VOCAB_MIN: u32 = 3 + 256;
    /// No dimension may be larger.
    const DIMENSION_MAX: u32 = 1 << 24;

    /// A small model of the family, a few megabytes, that speaks bytes.
    pub fn of(family: SynthFamily) -> Self {
        Self {
            family,
            layers: 4,
            hidden: 128,
            heads: 8,
            kv_heads: if family == SynthFamily::Olmoe { 8 } else { 2 },
            head_dim: 16,
            experts: 16,
            top_k: match family {
                SynthFamily::Mixtral => 2,
                SynthFamily::TieredMoe => 1,
                _ => 4,
            },
            tiers: if family == SynthFamily::TieredMoe {
                let tier = |name: &str, experts, placement| Tier {
                    name: name.into(),
                    experts,
                    groups: 2,
                    placement,
                };
                vec![tier("small", 4, Placement::Hot), tier("large", 12, Placement::Warm)]
            } else {
                Vec::new()
            },
            intermediate: if family == SynthFamily::Llama { 384 } else { 96 },
            shared_intermediate: 192,
            vocab: 512,
            context: 2048,
            skew: 0,
            dtype: DType::F32,
            seed: 0,
            shard_bytes: 5_000_000_000,
        }
    }

    /// Whether the vocabulary has room for a tokenizer.
    fn has_text(&self) -> bool {
        self.vocab >= Self::TEXT_VOCAB_MIN
    }

    /// Checks that the checkpoint can exist.
    ///
    /// # Errors
    /// The field that is wrong and what it must be.
    pub fn check(&self) -> Result<(), SynthError> {
        let invalid = |field, value: u32, remedy: String| {
            Err(SynthError::Invalid { field, value: u64::from(value), remedy })
        };
        let mixture = self.family.is_mixture();
        let shared = self.family == SynthFamily::Qwen2Moe;
        for (field, value, used) in [
            ("layers", self.layers, true),
            ("hidden", self.hidden, true),
            ("heads", self.heads, true),
            ("kv_heads", self.kv_heads, true),
            ("head_dim", self.head_dim, true),
            ("experts", self.experts, mixture),
            ("top_k", self.top_k, mixture),
            ("intermediate", self.intermediate, true),
            ("shared_intermediate", self.shared_intermediate, shared),
            ("vocab", self.vocab, true),
            ("context", self.context, true),
        ] {
            if used && !(1..=Self::DIMENSION_MAX).contains(&value) {
                return invalid(field, value, format!("take 1 to {}", Self::DIMENSION_MAX));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return invalid("kv_heads", self.kv_heads, format!("it must divide the {} heads", self.heads));
        }
        if !self.head_dim.is_multiple_of(2) {
            return invalid("head_dim", self.head_dim, "it must be even, to be rotated in pairs".into());
        }
        if u64::from(self.heads) * u64::from(self.head_dim) > u64::from(Self::DIMENSION_MAX) {
            let remedy = format!("heads times head_dim is at most {}", Self::DIMENSION_MAX);
            return invalid("head_dim", self.head_dim, remedy);
        }
        if self.family == SynthFamily::TieredMoe {
            let of_tiers = self.tiers.iter().try_fold(0u32, |sum, tier| sum.checked_add(tier.experts));
            if of_tiers != Some(self.experts) {
                return invalid("experts", self.experts, "the tiers must have as many".into());
            }
            let odd = |tier: &&Tier| tier.groups == 0 || !tier.experts.is_multiple_of(tier.groups);
            if let Some(tier) = self.tiers.iter().find(odd) {
                return invalid(
                    "tiers",
                    tier.groups,
                    format!("the groups of {} must be of equal size", tier.name),
                );
            }
            let least = self.tiers.iter().map(Tier::group_experts).min().unwrap_or(0);
            if self.top_k > least {
                return invalid("top_k", self.top_k, format!("the smallest group has {least} experts"));
            }
        } else if mixture && self.top_k > self.experts {
            return invalid("top_k", self.top_k, format!("at most the {} experts", self.experts));
        }
        // Their configurations have no head_dim: readers divide the width by the heads.
        let implied = matches!(self.family, SynthFamily::Olmoe | SynthFamily::Qwen2Moe);
        if implied && u64::from(self.heads) * u64::from(self.head_dim) != u64::from(self.hidden) {
            let remedy = format!("in {} heads times head_dim is the hidden width", self.family.name());
            return invalid("head_dim", self.head_dim, remedy);
        }
        if self.shard_bytes == 0 {
            return Err(SynthError::Invalid {
                field: "shard_bytes",
                value: 0,
                remedy: "take the bytes that one file may hold, for example 5000000000".into(),
            });
        }
        if self.skew >= 100 {
            return invalid("skew", self.skew, "take 0 to 99 percent: tokens have to differ".into());
        }
        tensors::total_bytes(self).map(|_| ()).ok_or_else(|| SynthError::Invalid {
            field: "layers",
            value: u64::from(self.layers),
            remedy: "the checkpoint would not fit in any file system; make it smaller".into(),
        })
    }
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SynthReport {
    /// The directory.
    pub dir: PathBuf,
    /// Tensors.
    pub tensors: u64,
    /// Values in all tensors.
    pub parameters: u64,
    /// Bytes of all tensors, headers not counted.
    pub bytes: u64,
    /// Files of weights.
    pub shards: u64,
    /// Whether the vocabulary had room for a tokenizer; without one, prompts are token ids.
    pub tokenizer: bool,
}

impl SynthReport {
    /// Of no tensors yet.
    fn of(dir: &Path, spec: &SynthSpec) -> Self {
        Self { dir: dir.into(), tensors: 0, parameters: 0, bytes: 0, shards: 0, tokenizer: spec.has_text() }
    }
}

/// Why a checkpoint was not written. What had been written is removed.
#[derive(Debug, Error)]
pub enum SynthError {
    /// No such checkpoint can exist.
    #[error("{field} {value} is not possible: {remedy}")]
    Invalid {
        /// The field of [`SynthSpec`].
        field: &'static str,
        /// Its value.
        value: u64,
        /// What it must be.
        remedy: String,
    },
    /// Something is there already; it is never overwritten.
    #[error("{} is there and not an empty directory; name another, or remove it first", dir.display())]
    Occupied {
        /// The directory.
        dir: PathBuf,
    },
    /// Another process is writing the same checkpoint, or the directory aside cannot be used.
    #[error(transparent)]
    Open(#[from] crate::disk::OpenError),
    /// What a killed attempt left cannot be removed.
    #[error("{}: {error}; it is what a killed attempt left: remove it", dir.display())]
    Former {
        /// The directory aside.
        dir: PathBuf,
        /// Why.
        error: lite_llm_core::disk::DiskError,
    },
    /// The file system is full.
    #[error(
        "no space left for {}: the checkpoint takes {bytes} bytes; free some, take fewer layers or experts, or bf16",
        path.display()
    )]
    Full {
        /// The file that did not fit.
        path: PathBuf,
        /// What all tensors take.
        bytes: u64,
    },
    /// The native form cannot be made.
    #[error(transparent)]
    Import(Box<crate::model::ModelError>),
    /// A file or directory cannot be written.
    #[error("cannot write {}: {source}; is the parent a directory that you may write to?", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

/// Writes the checkpoint. `dir` must not exist, or be empty; its parent must exist.
///
/// # Errors
/// If the spec is impossible, `dir` is occupied, or the file system fails or is full. `dir` is then as before.
pub fn synth(dir: &Path, spec: &SynthSpec) -> Result<SynthReport, SynthError> {
    spec.check()?;
    let bytes = tensors::total_bytes(spec).expect("checked");
    files::Aside::new(dir, bytes)?.write(spec)
}
