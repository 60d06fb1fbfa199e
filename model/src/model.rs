//! A model on this machine: its base parameters packed for the kernels, its routers, and how experts are loaded.

use crate::arch::Arch;
use crate::checkpoint::{Checkpoint, CheckpointError, Gated, Tensor, Tier, projections, qk_norm_sizes};
use crate::forward::ROWS_TOGETHER;
use crate::kernels::{
    CONTRACT_VERSION, DType, Isa, KvShape, PAGE_POSITIONS, PackedView, Pool, RopeTable, SelfTestError,
    convert, pack, packed_len,
};
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::ExpertKey;
use lite_llm_core::plan::{Identity, ModelPlan, TierPlan};
use memmap2::{Advice, MmapMut};
use std::sync::Arc;
use thiserror::Error;

/// Bytes of code, stacks, journal buffers and the like.
const PROCESS_BYTES: u64 = 32 << 20;
/// A large page of the system.
const LARGE_PAGE_BYTES: u64 = 2 << 20;

/// Why a model cannot be opened or loaded.
#[derive(Debug, Error)]
pub enum ModelError {
    /// The checkpoint is at fault.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// This machine computes other bits.
    #[error(transparent)]
    SelfTest(#[from] SelfTestError),
    /// A size does not fit this machine.
    #[error("{what} of {bytes} bytes cannot be had on this machine")]
    Memory {
        /// What for.
        what: &'static str,
        /// How much.
        bytes: u64,
    },
    /// An expert that the checkpoint does not have, or a slot of the wrong size.
    #[error("expert {0:?} does not fit this checkpoint")]
    Expert(ExpertKey),
    /// An expert whose matrices are stored in other types than those of the first.
    #[error("expert {0:?} has other storage types than the first expert; all experts must have the same")]
    MixedTypes(ExpertKey),
}

/// How a model is computed. None of it changes a bit of a result but `kv_dtype` and `routing_seed`.
#[derive(Clone, Debug)]
pub struct ModelOptions {
    /// Compute threads.
    pub threads: usize,
    /// Instruction set.
    pub isa: Isa,
    /// Storage type of cached keys and values; the type of the weights if `None`.
    pub kv_dtype: Option<DType>,
    /// Seed of ties between experts.
    pub routing_seed: u64,
}

/// A matrix in the packed layout.
#[derive(Debug)]
pub(crate) struct Matrix {
    dtype: DType,
    outputs: usize,
    inputs: usize,
    size: usize,
    bytes: MmapMut,
}

impl Matrix {
    fn load(checkpoint: &Checkpoint, tensor: &Tensor) -> Result<Self, ModelError> {
        let [outputs, inputs] = tensor.shape[..] else { unreachable!("matrices are asked for by shape") };
        let size = packed_bytes(tensor.dtype, outputs, inputs)?;
        let refused = |_| ModelError::Memory { what: "a matrix", bytes: size as u64 };
        let mut bytes = MmapMut::map_anon(size.max(1)).map_err(refused)?;
        // Decode reads all of it once a token: with small pages it would wait for page walks. A kernel without large
        // pages refuses, and nothing is lost but time.
        let _ = bytes.advise(Advice::HugePage);
        pack(tensor.dtype, outputs, inputs, checkpoint.bytes(tensor), &mut bytes[..size]);
        checkpoint.forget(tensor);
        Ok(Self { dtype: tensor.dtype, outputs, inputs, size, bytes })
    }

    pub(crate) fn view(&self) -> PackedView<'_> {
        PackedView::new(self.dtype, self.outputs, self.inputs, &self.bytes[..self.size])
            .expect("packed for this shape")
    }
}

fn packed_bytes(dtype: DType, outputs: usize, inputs: usize) -> Result<usize, ModelError> {
    packed_len(dtype, outputs, inputs).ok_or(ModelError::Memory { what: "a matrix", bytes: u64::MAX })
}

/// Gate, up and down of a block that every position uses.
#[derive(Debug)]
pub(crate) struct GatedBlock {
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
    pub(crate) down: Matrix,
}

impl GatedBlock {
    fn load(checkpoint: &Checkpoint, gated: &Gated) -> Result<Self, ModelError> {
        Ok(Self {
            gate: Matrix::load(checkpoint, &gated.gate)?,
            up: Matrix::load(checkpoint, &gated.up)?,
            down: Matrix::load(checkpoint, &gated.down)?,
        })
    }
}

/// The base parameters of a decoder layer.
#[derive(Debug)]
pub(crate) struct LayerWeights {
    pub(crate) attention_norm: Vec<f32>,
    pub(crate) block_norm: Vec<f32>,
    /// Query, key, value, output.
    pub(crate) projections: [(Matrix, Option<Vec<f32>>); 4],
    pub(crate) qk_norm: Option<(Vec<f32>, Vec<f32>)>,
    pub(crate) dense: Option<GatedBlock>,
    pub(crate) shared: Option<(GatedBlock, Option<Matrix>)>,
}

/// The base parameters.
#[derive(Debug)]
pub(crate) struct Base {
    pub(crate) embedding: Tensor,
    pub(crate) norm: Vec<f32>,
    pub(crate) head: Matrix,
    pub(crate) layers: Vec<LayerWeights>,
}

/// Where the three matrices of an expert lie in its slot, and how they are typed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ExpertLayout {
    pub(crate) dtypes: [DType; 3],
    pub(crate) hidden: usize,
    pub(crate) width: usize,
    pub(crate) ends: [usize; 3],
}

impl ExpertLayout {
    fn new(dtypes: [DType; 3], width: usize, hidden: usize) -> Result<Self, ModelError> {
        let gate = packed_bytes(dtypes[0], width, hidden)?;
        let up = packed_bytes(dtypes[1], width, hidden)?;
        let down = packed_bytes(dtypes[2], hidden, width)?;
        Ok(Self { dtypes, hidden, width, ends: [gate, gate + up, gate + up + down] })
    }

    /// Gate, up and down in a slot.
    pub(crate) fn views<'a>(&self, slot: &'a [u8]) -> [PackedView<'a>; 3] {
        let view = |i: usize, outputs, inputs| {
            let start = if i == 0 { 0 } else { self.ends[i - 1] };
            PackedView::new(self.dtypes[i], outputs, inputs, &slot[start..self.ends[i]])
                .expect("a slot of this layout")
        };
        [view(0, self.width, self.hidden), view(1, self.width, self.hidden), view(2, self.hidden, self.width)]
    }
}

/// A model.
pub struct Model {
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) pool: Pool,
    pub(crate) isa: Isa,
    pub(crate) kv: KvShape,
    pub(crate) rope: RopeTable,
    pub(crate) routing_seed: u64,
    pub(crate) base: Option<Base>,
    pub(crate) routers: Vec<Option<Matrix>>,
    pub(crate) expert: Option<ExpertLayout>,
    threads: usize,
}

impl Model {
    /// Opens a model: self-test, tables, no weights yet.
    ///
    /// # Errors
    /// If this machine does not compute the contract's bits, or the checkpoint does not fit it.
    pub fn open(checkpoint: Arc<Checkpoint>, options: ModelOptions) -> Result<Self, ModelError> {
        let threads = options.threads.max(1);
        let pool = Pool::new(threads);
        pool.self_test(options.isa)?;
        let arch = checkpoint.arch();
        let weights = checkpoint.tensor("model.embed_tokens.weight", &[arch.vocab, arch.hidden])?;
        let kv = KvShape {
            kv_heads: arch.kv_heads,
            key_dim: arch.head_dim,
            value_dim: arch.head_dim,
            dtype: options.kv_dtype.unwrap_or(weights.dtype),
        };
        let expert = expert_layout(&checkpoint)?;
        // Filled with the base parameters, once the engine has found that the budget allows for them.
        let rope = RopeTable::new(&[], 1.0, 0);
        let routers = arch.layers.iter().map(|_| None).collect();
        Ok(Self {
            pool,
            isa: options.isa,
            kv,
            rope,
            routing_seed: options.routing_seed,
            base: None,
            routers,
            expert,
            threads,
            checkpoint,
        })
    }

    /// The architecture.
    pub fn arch(&self) -> &Arch {
        self.checkpoint.arch()
    }

    /// The checkpoint.
    pub fn checkpoint(&self) -> &Arc<Checkpoint> {
        &self.checkpoint
    }

    /// Sets the seed of ties between experts, once the engine has decided it.
    pub fn set_routing_seed(&mut self, seed: u64) {
        self.routing_seed = seed;
    }

    /// What the engine must know of this checkpoint. Reads all weights for their digest.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub fn plan(
        &self,
        step_positions_max: u32,
        rows_max: u32,
        tokenizer: Digest,
    ) -> Result<ModelPlan, ModelError> {
        let arch = self.arch();
        let identity = Identity {
            contract: CONTRACT_VERSION,
            weights: self.checkpoint.weights_digest(self.threads)?,
            architecture: self.checkpoint.architecture_digest(self.kv.dtype),
            tokenizer,
        };
        let moe = arch.moe.as_ref();
        Ok(ModelPlan {
            format: ModelPlan::FORMAT,
            identity,
            tiers: self.checkpoint.tiers().iter().map(tier_plan).collect(),
            moe_layers: arch.moe_layers(),
            top_k: moe.map_or(0, |moe| moe.top_k as u32),
            slot_bytes: self.slot_bytes() as u64,
            base_shards: vec![self.base_bytes()?],
            router_bytes: self.router_bytes()?,
            overhead_bytes: self.overhead_bytes(u64::from(step_positions_max), u64::from(rows_max)),
            page_positions: PAGE_POSITIONS as u32,
            page_bytes: self.page_bytes() as u64,
            context: arch.context,
            vocab: arch.vocab as u32,
            eos: self.checkpoint.eos().to_vec(),
        })
    }

    /// Bytes of a slot: an expert, padded to whole 4 KiB blocks.
    pub fn slot_bytes(&self) -> usize {
        self.expert.map_or(0, |layout| layout.ends[2].next_multiple_of(4096))
    }

    /// Bytes of a page of KV cache: keys and values of 64 positions in every layer.
    pub fn page_bytes(&self) -> usize {
        self.arch().layers.len() * (self.kv.key_page_bytes() + self.kv.value_page_bytes())
    }

    fn base_bytes(&self) -> Result<u64, ModelError> {
        let list = self.checkpoint.inventory()?;
        let base =
            list.iter().filter(|item| !item.name.contains(".experts.") && !item.name.ends_with(".router"));
        let head = if self.arch().tied { 2 } else { 1 };
        Ok(base.map(|item| item.bytes * if item.name.contains("embed") { head } else { 1 }).sum())
    }

    fn router_bytes(&self) -> Result<u64, ModelError> {
        let list = self.checkpoint.inventory()?;
        Ok(list.iter().filter(|item| item.name.ends_with(".router")).map(|item| item.bytes).sum())
    }

    /// Buffers of the largest step, the rotation tables, and the process itself.
    fn overhead_bytes(&self, positions: u64, rows: u64) -> u64 {
        let arch = self.arch();
        let width = arch.layers.iter().filter_map(|layer| layer.dense).max().unwrap_or(0);
        let (k, expert) = arch.moe.as_ref().map_or((0, 0), |moe| {
            let shared = moe.shared.as_ref().map_or(0, |shared| shared.intermediate);
            (moe.top_k, moe.router_rows() + 3 * (moe.intermediate + shared))
        });
        let position =
            6 * arch.hidden + 2 * arch.q_dim() + 2 * arch.kv_dim() + 3 * width + k * arch.hidden + expert;
        let rope = u64::from(arch.context) * arch.rope.dims as u64 * 4;
        // Each product copies its input once in the order of the packed weights.
        let copies = 2;
        let together = arch.moe.as_ref().map_or(0, |moe| {
            positions.saturating_mul(k as u64).min(ROWS_TOGETHER as u64)
                * (2 * arch.hidden + 3 * moe.intermediate) as u64
        });
        // A loader has an expert's published bytes mapped while it packs them; large pages round maps up.
        let loading = self.threads as u64 * self.slot_bytes() as u64 + LARGE_PAGE_BYTES;
        PROCESS_BYTES
            + loading
            + rope
            + 4 * together * copies
            + 4 * (positions * position as u64 * copies + rows * arch.vocab as u64 * 2)
    }

    /// Loads and verifies base parameters, routers included. All are one shard on one machine.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub fn load_base(&mut self, shard: u32) -> Result<(), ModelError> {
        assert_eq!(shard, 0, "the plan has one shard");
        let checkpoint = &self.checkpoint;
        checkpoint.verify_base()?;
        self.rope =
            RopeTable::new(&checkpoint.arch().rope.inverse_frequencies(), 1.0, checkpoint.arch().context);
        let arch = checkpoint.arch();
        let embedding = checkpoint.tensor("model.embed_tokens.weight", &[arch.vocab, arch.hidden])?;
        let head = if arch.tied {
            embedding.clone()
        } else {
            checkpoint.tensor("lm_head.weight", &[arch.vocab, arch.hidden])?
        };
        let layers =
            (0..arch.layers.len()).map(|layer| load_layer(checkpoint, layer)).collect::<Result<_, _>>()?;
        self.base = Some(Base {
            norm: load_vector(checkpoint, "model.norm.weight", arch.hidden)?,
            head: Matrix::load(checkpoint, &head)?,
            embedding,
            layers,
        });
        Ok(())
    }

    /// Loads the routers.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub fn load_routers(&mut self) -> Result<(), ModelError> {
        for layer in self.arch().moe_layers() {
            let tensor = self.checkpoint.router(layer as usize)?;
            self.routers[layer as usize] = Some(Matrix::load(&self.checkpoint, &tensor)?);
        }
        Ok(())
    }

    /// What loads experts into slots, on any thread.
    pub fn expert_loader(&self) -> ExpertLoader {
        ExpertLoader { checkpoint: Arc::clone(&self.checkpoint), layout: self.expert }
    }
}

/// Loads experts into slots.
#[derive(Clone, Debug)]
pub struct ExpertLoader {
    checkpoint: Arc<Checkpoint>,
    layout: Option<ExpertLayout>,
}

impl ExpertLoader {
    /// Puts an expert into a slot: read as it is and verified, or packed from its tensors.
    ///
    /// # Errors
    /// If the checkpoint has no such expert, its bytes are not what they should be, or the slot is too small.
    pub fn load(&self, key: ExpertKey, slot: &mut [u8]) -> Result<(), ModelError> {
        let layout =
            self.layout.filter(|layout| slot.len() >= layout.ends[2]).ok_or(ModelError::Expert(key))?;
        let ordinal = self.checkpoint.ordinal(key).ok_or(ModelError::Expert(key))?;
        if let Some(native) = self.checkpoint.native() {
            return Ok(native.read(key.layer, ordinal, &mut slot[..layout.ends[2]])?);
        }
        let gated = self.checkpoint.expert(key.layer as usize, ordinal as usize)?;
        pack_expert(&self.checkpoint, &gated, &layout, slot);
        Ok(())
    }
}

/// Packs gate, up and down one after the other.
pub(crate) fn pack_expert(checkpoint: &Checkpoint, gated: &Gated, layout: &ExpertLayout, slot: &mut [u8]) {
    let mut start = 0;
    for (tensor, end) in [&gated.gate, &gated.up, &gated.down].into_iter().zip(layout.ends) {
        pack(tensor.dtype, tensor.shape[0], tensor.shape[1], checkpoint.bytes(tensor), &mut slot[start..end]);
        checkpoint.forget(tensor);
        start = end;
    }
}

/// The one layout that all experts of a checkpoint have.
pub(crate) fn expert_layout(checkpoint: &Checkpoint) -> Result<Option<ExpertLayout>, ModelError> {
    let arch = checkpoint.arch();
    let Some(moe) = &arch.moe else { return Ok(None) };
    if let Some(native) = checkpoint.native() {
        return ExpertLayout::new(native.expert_dtypes(), moe.intermediate, arch.hidden).map(Some);
    }
    let mut first: Option<ExpertLayout> = None;
    for layer in arch.moe_layers() {
        for ordinal in 0..moe.experts {
            let gated = checkpoint.expert(layer as usize, ordinal)?;
            let dtypes = [gated.gate.dtype, gated.up.dtype, gated.down.dtype];
            if first.is_none() {
                first = Some(ExpertLayout::new(dtypes, moe.intermediate, arch.hidden)?);
            } else if first.is_some_and(|first| first.dtypes != dtypes) {
                let key = checkpoint.key(layer, ordinal as u32);
                return Err(ModelError::MixedTypes(key));
            }
        }
    }
    Ok(first)
}

fn tier_plan(tier: &Tier) -> TierPlan {
    let experts = tier.group_experts();
    TierPlan { name: tier.name.clone(), groups: tier.groups, experts, placement: tier.placement }
}

fn load_layer(checkpoint: &Checkpoint, layer: usize) -> Result<LayerWeights, ModelError> {
    let arch = checkpoint.arch();
    let prefix = format!("model.layers.{layer}");
    let vector = |name: &str, size: usize| load_vector(checkpoint, &format!("{prefix}.{name}"), size);
    let mut loaded = Vec::new();
    for (name, outputs, inputs, bias) in projections(arch) {
        let tensor = checkpoint.tensor(&format!("{prefix}.self_attn.{name}.weight"), &[outputs, inputs])?;
        let bias = bias.then(|| vector(&format!("self_attn.{name}.bias"), outputs)).transpose()?;
        loaded.push((Matrix::load(checkpoint, &tensor)?, bias));
    }
    let qk_norm = match qk_norm_sizes(arch) {
        Some((q, k)) => Some((vector("self_attn.q_norm.weight", q)?, vector("self_attn.k_norm.weight", k)?)),
        None => None,
    };
    let dense = match arch.layers[layer].dense {
        Some(width) => {
            Some(GatedBlock::load(checkpoint, &checkpoint.gated(&format!("{prefix}.mlp"), width)?)?)
        }
        None => None,
    };
    let mut shared = None;
    if let Some(block) = arch.moe.as_ref().and_then(|moe| moe.shared.as_ref()).filter(|_| dense.is_none()) {
        let gated = checkpoint.gated(&format!("{prefix}.mlp.shared_expert"), block.intermediate)?;
        let gate = if block.gated {
            let name = format!("{prefix}.mlp.shared_expert_gate.weight");
            Some(Matrix::load(checkpoint, &checkpoint.tensor(&name, &[1, arch.hidden])?)?)
        } else {
            None
        };
        shared = Some((GatedBlock::load(checkpoint, &gated)?, gate));
    }
    Ok(LayerWeights {
        attention_norm: vector("input_layernorm.weight", arch.hidden)?,
        block_norm: vector("post_attention_layernorm.weight", arch.hidden)?,
        projections: loaded.try_into().expect("four projections"),
        qk_norm,
        dense,
        shared,
    })
}

fn load_vector(checkpoint: &Checkpoint, name: &str, size: usize) -> Result<Vec<f32>, ModelError> {
    let tensor = checkpoint.tensor(name, &[size])?;
    let mut values = vec![0.0; size];
    convert::widen(Isa::Scalar, tensor.dtype, checkpoint.bytes(&tensor), &mut values);
    Ok(values)
}
