//! A model on this machine: its base parameters packed for the kernels, its routers, and how experts are loaded.

use crate::arch::Arch;
use crate::checkpoint::{Checkpoint, CheckpointError, Tier};
use crate::forward::{KvGroups, planned_bytes};
use crate::kernels::{CONTRACT_VERSION, DType, Isa, KvShape, PAGE_POSITIONS, Pool, RopeTable, SelfTestError};
use crate::weights::{Base, ExpertLayout, Router, expert_layout, load_base, pack_expert};
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::ExpertKey;
use lite_llm_core::plan::{Identity, ModelPlan, TierPlan};
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

/// A model.
pub struct Model {
    pub(crate) checkpoint: Arc<Checkpoint>,
    pub(crate) pool: Pool,
    pub(crate) isa: Isa,
    pub(crate) kv: KvShape,
    pub(crate) kv_groups: KvGroups,
    pub(crate) rope: RopeTable,
    pub(crate) routing_seed: u64,
    pub(crate) base: Option<Base>,
    pub(crate) routers: Vec<Option<Router>>,
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
        let weights = checkpoint.embedding()?;
        let kv = arch.attention.kv_shape(options.kv_dtype.unwrap_or(weights.dtype));
        let expert = expert_layout(&checkpoint)?;
        // Filled with the base parameters, once the engine has found that the budget allows for them.
        let rope = RopeTable::new(&[], 1.0, 0);
        let routers = arch.layers.iter().map(|_| None).collect();
        Ok(Self {
            pool,
            isa: options.isa,
            kv,
            kv_groups: KvGroups::of(arch),
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
            layers: arch.layers.len() as u32,
            moe_layers: arch.moe_layers(),
            top_k: moe.map_or(0, |moe| moe.top_k as u32),
            slot_bytes: self.slot_bytes() as u64,
            base_shards: vec![self.base_bytes()?],
            router_bytes: self.router_bytes()?,
            overhead_bytes: self.overhead_bytes(u64::from(step_positions_max), u64::from(rows_max)),
            page_positions: PAGE_POSITIONS as u32,
            page_bytes: self.page_bytes() as u64,
            kv_groups: self.kv_groups().to_vec(),
            context: arch.context,
            vocab: arch.vocab as u32,
            eos: self.checkpoint.eos().to_vec(),
        })
    }

    /// Bytes of a slot: an expert, padded to whole 4 KiB blocks.
    pub fn slot_bytes(&self) -> usize {
        self.expert.as_ref().map_or(0, |layout| layout.bytes().next_multiple_of(4096))
    }

    /// The groups of layers that have pages of KV cache of their own: how many last positions a position sees in them.
    pub fn kv_groups(&self) -> &[Option<u32>] {
        &self.kv_groups.windows
    }

    /// Bytes of a page of KV cache: keys and values of 64 positions in every layer of a group.
    pub fn page_bytes(&self) -> usize {
        self.kv_groups.layers * (self.kv.key_page_bytes() + self.kv.value_page_bytes())
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
        let rope = u64::from(arch.context) * arch.rope.dims as u64 * 4;
        // A loader has an expert's published bytes mapped while it packs them; large pages round maps up.
        let loading = self.threads as u64 * self.slot_bytes() as u64 + LARGE_PAGE_BYTES;
        // Sampling has the candidates beside the logits, which may be shown too.
        let sampling = rows * arch.vocab as u64 * 5 * 4;
        let steps = planned_bytes(arch, self.kv, self.threads as u64, positions, rows);
        PROCESS_BYTES + loading + rope + steps + sampling
    }

    /// Loads and verifies base parameters, routers included. All are one shard on one machine.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub fn load_base(&mut self, shard: u32) -> Result<(), ModelError> {
        assert_eq!(shard, 0, "the plan has one shard");
        let checkpoint = &self.checkpoint;
        checkpoint.verify_base()?;
        let rope = &checkpoint.arch().rope;
        self.rope =
            RopeTable::new(&rope.inverse_frequencies(), rope.factor as f32, checkpoint.arch().context);
        self.base = Some(load_base(checkpoint)?);
        Ok(())
    }

    /// Loads the routers.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub fn load_routers(&mut self) -> Result<(), ModelError> {
        for layer in self.arch().moe_layers() {
            self.routers[layer as usize] = Some(Router::load(&self.checkpoint, layer as usize)?);
        }
        Ok(())
    }

    /// What loads experts into slots, on any thread.
    pub fn expert_loader(&self) -> ExpertLoader {
        ExpertLoader { checkpoint: Arc::clone(&self.checkpoint), layout: self.expert.clone() }
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
        let layout = self.layout.as_ref().filter(|layout| slot.len() >= layout.bytes());
        let layout = layout.ok_or(ModelError::Expert(key))?;
        let ordinal = self.checkpoint.ordinal(key).ok_or(ModelError::Expert(key))?;
        if let Some(native) = self.checkpoint.native() {
            return Ok(native.read(key.layer, ordinal, &mut slot[..layout.bytes()])?);
        }
        let gated = self.checkpoint.expert(key.layer as usize, ordinal as usize)?;
        pack_expert(&self.checkpoint, &gated, layout, slot);
        Ok(())
    }
}

fn tier_plan(tier: &Tier) -> TierPlan {
    let experts = tier.group_experts();
    TierPlan { name: tier.name.clone(), groups: tier.groups, experts, placement: tier.placement }
}
