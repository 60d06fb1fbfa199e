//! The tensors of each family, named as on the hub, in the order of the layers.

use super::{SynthFamily, SynthSpec};

/// How the values of a tensor are drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Draw {
    /// About normal, with this many inputs summed by each output: scaled so that outputs keep their spread.
    Matrix {
        /// Values summed.
        inputs: u32,
    },
    /// About normal with deviation 1: each token is a direction of its own, but for what all have in common.
    Embedding {
        /// Values of a token.
        width: u32,
        /// Percent of its length, squared, that all tokens have in common.
        skew: u32,
    },
    /// About normal and small; not zero, so that leaving one out shows.
    Bias,
    /// Uniform in 0.5 to 1.5.
    Norm,
}

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Tensor {
    pub(super) name: String,
    pub(super) shape: Vec<u32>,
    pub(super) draw: Draw,
}

impl Tensor {
    /// Number of values; saturates, which [`total_bytes`] refuses.
    pub(super) fn len(&self) -> u64 {
        self.shape.iter().fold(1, |len: u64, &n| len.saturating_mul(u64::from(n)))
    }

    fn matrix(name: String, outputs: u32, inputs: u32) -> Self {
        Self { name, shape: vec![outputs, inputs], draw: Draw::Matrix { inputs } }
    }
}

/// Every tensor of the checkpoint. Lazy: names of a large model are many.
pub(super) fn tensors(spec: &SynthSpec) -> impl Iterator<Item = Tensor> + '_ {
    let embedding = Tensor {
        name: "model.embed_tokens.weight".into(),
        shape: vec![spec.vocab, spec.hidden],
        draw: Draw::Embedding { width: spec.hidden, skew: spec.skew },
    };
    let norm = Tensor { name: "model.norm.weight".into(), shape: vec![spec.hidden], draw: Draw::Norm };
    let head = Tensor::matrix("lm_head.weight".into(), spec.vocab, spec.hidden);
    std::iter::once(embedding)
        .chain((0..spec.layers).flat_map(move |layer| {
            attention(spec, layer).into_iter().chain(block(spec, layer)).chain(experts(spec, layer))
        }))
        .chain([norm, head])
}

/// Bytes of all tensors; `None` if they pass what a file offset can say.
pub(super) fn total_bytes(spec: &SynthSpec) -> Option<u64> {
    // Every layer is alike: one stands for all, so that the check costs nothing.
    let one = SynthSpec { layers: 1, experts: 1, ..spec.clone() };
    let whole = values(tensors(&one).filter(|t| !t.name.starts_with("model.layers.")))?;
    let router = u64::from(spec.experts.saturating_sub(1)) * u64::from(spec.hidden);
    let expert = values(experts(&one, 0))?.checked_mul(u64::from(spec.experts))?;
    let layer = values(attention(spec, 0).into_iter().chain(block(&one, 0)))?
        .checked_add(expert)?
        .checked_add(if spec.family.is_mixture() { router } else { 0 })?;
    let all = layer.checked_mul(u64::from(spec.layers))?.checked_add(whole)?;
    all.checked_mul(spec.dtype.bytes() as u64).filter(|&bytes| bytes < i64::MAX as u64)
}

fn values(mut list: impl Iterator<Item = Tensor>) -> Option<u64> {
    list.try_fold(0u64, |sum, tensor| sum.checked_add(tensor.len()))
}

fn attention(spec: &SynthSpec, layer: u32) -> Vec<Tensor> {
    let (hidden, query, key) = (spec.hidden, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
    let name = |part: &str| format!("model.layers.{layer}.{part}");
    let vector = |part: &str, len, draw| Tensor { name: name(part), shape: vec![len], draw };
    let mut list = vec![
        vector("input_layernorm.weight", hidden, Draw::Norm),
        Tensor::matrix(name("self_attn.q_proj.weight"), query, hidden),
        Tensor::matrix(name("self_attn.k_proj.weight"), key, hidden),
        Tensor::matrix(name("self_attn.v_proj.weight"), key, hidden),
        Tensor::matrix(name("self_attn.o_proj.weight"), hidden, query),
    ];
    match spec.family {
        SynthFamily::Llama | SynthFamily::Mixtral | SynthFamily::TieredMoe => {}
        SynthFamily::Olmoe => {
            list.push(vector("self_attn.q_norm.weight", query, Draw::Norm));
            list.push(vector("self_attn.k_norm.weight", key, Draw::Norm));
        }
        SynthFamily::Qwen2Moe => {
            list.push(vector("self_attn.q_proj.bias", query, Draw::Bias));
            list.push(vector("self_attn.k_proj.bias", key, Draw::Bias));
            list.push(vector("self_attn.v_proj.bias", key, Draw::Bias));
        }
        SynthFamily::Qwen3Moe => {
            list.push(vector("self_attn.q_norm.weight", spec.head_dim, Draw::Norm));
            list.push(vector("self_attn.k_norm.weight", spec.head_dim, Draw::Norm));
        }
    }
    list.push(vector("post_attention_layernorm.weight", hidden, Draw::Norm));
    list
}

/// What a layer's block has beside its experts.
fn block(spec: &SynthSpec, layer: u32) -> Vec<Tensor> {
    let name = |part: &str| format!("model.layers.{layer}.{part}");
    match spec.family {
        SynthFamily::Llama => gated(spec, &name("mlp"), PROJECTIONS, spec.intermediate).into(),
        SynthFamily::Mixtral => {
            vec![Tensor::matrix(name("block_sparse_moe.gate.weight"), spec.experts, spec.hidden)]
        }
        SynthFamily::TieredMoe => {
            let levels = spec
                .tiers
                .iter()
                .fold(0, |rows: u32, tier| rows.saturating_add(1).saturating_add(tier.groups));
            let rows = levels.saturating_add(spec.experts);
            vec![Tensor::matrix(name("mlp.gate.weight"), rows, spec.hidden)]
        }
        SynthFamily::Olmoe | SynthFamily::Qwen3Moe => {
            vec![Tensor::matrix(name("mlp.gate.weight"), spec.experts, spec.hidden)]
        }
        SynthFamily::Qwen2Moe => {
            let mut list = vec![
                Tensor::matrix(name("mlp.gate.weight"), spec.experts, spec.hidden),
                Tensor::matrix(name("mlp.shared_expert_gate.weight"), 1, spec.hidden),
            ];
            list.extend(gated(spec, &name("mlp.shared_expert"), PROJECTIONS, spec.shared_intermediate));
            list
        }
    }
}

fn experts(spec: &SynthSpec, layer: u32) -> impl Iterator<Item = Tensor> + '_ {
    let (block, names) = match spec.family {
        SynthFamily::Mixtral => ("block_sparse_moe", ["w1", "w3", "w2"]),
        SynthFamily::Llama
        | SynthFamily::Olmoe
        | SynthFamily::Qwen2Moe
        | SynthFamily::Qwen3Moe
        | SynthFamily::TieredMoe => ("mlp", PROJECTIONS),
    };
    let count = if spec.family.is_mixture() { spec.experts } else { 0 };
    (0..count).flat_map(move |expert| {
        gated(spec, &format!("model.layers.{layer}.{block}.experts.{expert}"), names, spec.intermediate)
    })
}

/// Names of gate, up and down.
const PROJECTIONS: [&str; 3] = ["gate_proj", "up_proj", "down_proj"];

fn gated(spec: &SynthSpec, prefix: &str, [gate, up, down]: [&str; 3], width: u32) -> [Tensor; 3] {
    [
        Tensor::matrix(format!("{prefix}.{gate}.weight"), width, spec.hidden),
        Tensor::matrix(format!("{prefix}.{up}.weight"), width, spec.hidden),
        Tensor::matrix(format!("{prefix}.{down}.weight"), spec.hidden, width),
    ]
}
