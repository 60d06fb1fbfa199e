//! A model on this machine: its base parameters packed for the kernels, its routers, and how experts are loaded.

use crate::arch::{Arch, Attention};
use crate::checkpoint::native::ExpertBlob;
use crate::checkpoint::{Checkpoint, CheckpointError, Tier};
use crate::forward::{KvGroups, planned_bytes};
use crate::kernels::{CONTRACT_VERSION, DType, Isa, KvShape, PAGE_POSITIONS, Pool, RopeTable, SelfTestError};
use crate::share::Share;
use crate::weights::{Base, ExpertLayout, Router, expert_layout, load_base, pack_expert};
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::ExpertKey;
use lite_llm_core::plan::{Identity, ModelPlan, TierPlan};
use std::path::{Path, PathBuf};
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
    /// The model cannot be shared out like that.
    #[error("{0}")]
    Share(String),
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
    /// Which part of the model is computed here.
    pub share: Share,
}

impl Default for ModelOptions {
    fn default() -> Self {
        Self { threads: 1, isa: Isa::detect(), kv_dtype: None, routing_seed: 0, share: Share::WHOLE }
    }
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
    pub(crate) share: Share,
    /// Attention over the heads of this rank.
    pub(crate) attention: Attention,
    /// A whole expert, and what of it this rank has.
    expert_whole: Option<ExpertLayout>,
    pub(crate) expert: Option<ExpertLayout>,
    threads: usize,
}

impl std::fmt::Debug for Model {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Model").field("share", &self.share).finish_non_exhaustive()
    }
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
        let share = options.share;
        Share::check(share.topology(), arch).map_err(ModelError::Share)?;
        let weights = checkpoint.embedding()?;
        let attention = share.attention(arch);
        let kv = attention.kv_shape(options.kv_dtype.unwrap_or(weights.dtype));
        let expert_whole = expert_layout(&checkpoint)?;
        let expert = expert_whole.as_ref().map(|whole| whole.of_rank(&share, share.seat().tensor));
        // Filled with the base parameters, once the engine has found that the budget allows for them.
        let rope = RopeTable::new(&[], 1.0, 0);
        let routers = arch.layers.iter().map(|_| None).collect();
        Ok(Self {
            pool,
            isa: options.isa,
            kv,
            kv_groups: KvGroups::of(arch, share.layers(arch)),
            rope,
            routing_seed: options.routing_seed,
            base: None,
            routers,
            share,
            attention,
            expert_whole,
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

    /// What of the model is computed here.
    pub const fn share(&self) -> &Share {
        &self.share
    }

    /// Whether an expert, or rows of it, are this rank's.
    pub fn holds(&self, key: ExpertKey) -> bool {
        self.share.layers(self.arch()).contains(&(key.layer as usize))
            && self.holder(key) == Some(self.share.seat().expert)
    }

    /// The expert rank that has an expert; none if there is no such expert.
    pub fn holder(&self, key: ExpertKey) -> Option<u32> {
        self.checkpoint.place(key).map(|place| self.share.holder(self.arch(), place))
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
        let identity = Identity {
            contract: CONTRACT_VERSION,
            weights: self.checkpoint.weights_digest(self.threads)?,
            architecture: self.checkpoint.architecture_digest(self.kv.dtype),
            tokenizer,
        };
        Ok(ModelPlan { identity, ..self.shape(step_positions_max, rows_max)? })
    }

    /// The same without its identity: no weights are read.
    ///
    /// # Errors
    /// If the checkpoint lacks a tensor.
    pub fn shape(&self, step_positions_max: u32, rows_max: u32) -> Result<ModelPlan, ModelError> {
        let arch = self.arch();
        let moe = arch.moe.as_ref();
        Ok(ModelPlan {
            format: ModelPlan::FORMAT,
            identity: Identity::default(),
            tiers: self.checkpoint.tiers().iter().map(tier_plan).collect(),
            layers: arch.layers.len() as u32,
            moe_layers: arch.moe_layers(),
            top_k: moe.map_or(0, |moe| moe.top_k as u32),
            slot_bytes: self.slot_bytes() as u64,
            base_shards: vec![self.most(Self::base_bytes)?],
            router_bytes: self.most(Self::router_bytes)?,
            overhead_bytes: self.overhead_bytes(u64::from(step_positions_max), u64::from(rows_max)),
            page_positions: PAGE_POSITIONS as u32,
            page_bytes: self.most(|_, share| Ok(self.page_bytes_of(share)))?,
            kv_groups: self.kv_groups().to_vec(),
            context: arch.context,
            vocab: arch.vocab as u32,
            eos: self.checkpoint.eos().to_vec(),
        })
    }

    /// Bytes of a slot: an expert, or what the rank with most of it has, padded to whole 4 KiB blocks.
    pub fn slot_bytes(&self) -> usize {
        let Some(whole) = &self.expert_whole else { return 0 };
        let ranks = 0..self.share.topology().tensor;
        let bytes = ranks.map(|tensor| whole.of_rank(&self.share, tensor).bytes()).max();
        bytes.unwrap_or(0).next_multiple_of(4096)
    }

    /// The groups of layers that have pages of KV cache of their own: how many last positions a position sees in them.
    pub fn kv_groups(&self) -> &[Option<u32>] {
        &self.kv_groups.windows
    }

    /// Bytes of a page of KV cache: keys and values of 64 positions in every layer of a group.
    pub fn page_bytes(&self) -> usize {
        self.kv_groups.layers * (self.kv.key_page_bytes() + self.kv.value_page_bytes())
    }

    fn page_bytes_of(&self, share: &Share) -> u64 {
        let kv = share.attention(self.arch()).kv_shape(self.kv.dtype);
        let layers = KvGroups::of(self.arch(), share.layers(self.arch())).layers;
        (layers * (kv.key_page_bytes() + kv.value_page_bytes())) as u64
    }

    /// What the rank that needs most of something needs: all have the same plan.
    fn most(&self, of: impl Fn(&Self, &Share) -> Result<u64, ModelError>) -> Result<u64, ModelError> {
        let topology = self.share.topology();
        let shares = (0..topology.ranks()).map(|rank| Share::new(*topology, rank));
        let mut most = shares.map(|share| of(self, &share));
        most.try_fold(0, |most, bytes| Ok(most.max(bytes?)))
    }

    fn base_bytes(&self, share: &Share) -> Result<u64, ModelError> {
        let arch = self.arch();
        let own = share.layers(arch);
        let list = self.checkpoint.inventory()?;
        let base =
            list.iter().filter(|item| !item.name.contains(".experts.") && !item.name.ends_with(".router"));
        let bytes = base.map(|item| {
            let rows = item.shape[0];
            let held = |rows_held: usize| item.bytes / rows as u64 * rows_held as u64;
            match layer_of(&item.name) {
                Some(layer) if own.contains(&layer) => held(share.rows_held(arch, &item.name, rows)),
                Some(_) => 0,
                None if item.name.contains("embed") => {
                    let head =
                        if arch.tied && share.is_last_stage() { held(share.rows(rows).len()) } else { 0 };
                    head + if share.is_first_stage() { item.bytes } else { 0 }
                }
                None if share.is_last_stage() => held(share.rows_held(arch, &item.name, rows)),
                None => 0,
            }
        });
        Ok(bytes.sum())
    }

    fn router_bytes(&self, share: &Share) -> Result<u64, ModelError> {
        let own = share.layers(self.arch());
        let list = self.checkpoint.inventory()?;
        let routers = list.iter().filter(|item| {
            item.name.ends_with(".router") && layer_of(&item.name).is_some_and(|layer| own.contains(&layer))
        });
        Ok(routers.map(|item| item.bytes).sum())
    }

    /// Buffers of the largest step, the rotation tables, and the process itself.
    fn overhead_bytes(&self, positions: u64, rows: u64) -> u64 {
        let arch = self.arch();
        let rope = u64::from(arch.context) * arch.rope.dims as u64 * 4;
        // A loader has an expert's published bytes mapped while it packs them; large pages round maps up.
        let loading = self.threads as u64 * self.slot_bytes() as u64 + LARGE_PAGE_BYTES;
        // Sampling has the candidates beside the logits, which may be shown too.
        let sampling = rows * arch.vocab as u64 * 5 * 4;
        let steps = planned_bytes(arch, self.kv, &self.share, self.threads as u64, positions, rows);
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
        self.base = Some(load_base(checkpoint, &self.share)?);
        Ok(())
    }

    /// Loads the routers.
    ///
    /// # Errors
    /// If a tensor cannot be read.
    pub fn load_routers(&mut self) -> Result<(), ModelError> {
        let own = self.share.layers(self.arch());
        for layer in self.arch().moe_layers().into_iter().filter(|&layer| own.contains(&(layer as usize))) {
            self.routers[layer as usize] = Some(Router::load(&self.checkpoint, layer as usize)?);
        }
        Ok(())
    }

    /// What loads experts into slots, on any thread.
    pub fn expert_loader(&self) -> ExpertLoader {
        let own = self.expert.clone().filter(|_| self.share.is_tensor());
        ExpertLoader { checkpoint: Arc::clone(&self.checkpoint), whole: self.expert_whole.clone(), own }
    }
}

/// Loads experts into slots.
#[derive(Clone, Debug)]
pub struct ExpertLoader {
    checkpoint: Arc<Checkpoint>,
    whole: Option<ExpertLayout>,
    /// What a rank has of it, if not all.
    own: Option<ExpertLayout>,
}

impl ExpertLoader {
    /// Puts an expert into a slot: read as it is and verified, or packed from its tensors.
    ///
    /// # Errors
    /// If the checkpoint has no such expert, its bytes are not what they should be, or the slot is too small.
    pub fn load(&self, key: ExpertKey, slot: &mut [u8]) -> Result<(), ModelError> {
        let whole = self.whole.as_ref().ok_or(ModelError::Expert(key))?;
        let Some(own) = &self.own else { return self.load_whole(key, whole, slot) };
        // Its checksum is that of all of it, so all of it is read.
        let mut expert = vec![0; whole.bytes()];
        self.load_whole(key, whole, &mut expert)?;
        if slot.len() < own.bytes() {
            return Err(ModelError::Expert(key));
        }
        own.cut(whole, &expert, slot);
        Ok(())
    }

    /// Where an expert lies that goes into a slot as it is; `None` if it is packed from tensors, cut, or not there.
    pub fn blob(&self, key: ExpertKey) -> Option<ExpertBlob> {
        let native = self.checkpoint.native().filter(|_| self.own.is_none())?;
        Some(native.blob(key.layer, self.checkpoint.ordinal(key)?))
    }

    /// The shards that blobs lie in; none if the checkpoint is no native one.
    pub fn shards(&self) -> Vec<PathBuf> {
        self.checkpoint.native().map_or_else(Vec::new, |native| native.shards().map(Path::to_owned).collect())
    }

    /// Whether a slot has a part of an expert only, which is cut out of the whole.
    pub const fn cuts(&self) -> bool {
        self.own.is_some()
    }

    /// Whether experts are packed from tensors.
    pub fn packs(&self) -> bool {
        self.whole.is_some() && self.checkpoint.native().is_none()
    }

    fn load_whole(&self, key: ExpertKey, layout: &ExpertLayout, slot: &mut [u8]) -> Result<(), ModelError> {
        if slot.len() < layout.bytes() {
            return Err(ModelError::Expert(key));
        }
        let ordinal = self.checkpoint.ordinal(key).ok_or(ModelError::Expert(key))?;
        if let Some(native) = self.checkpoint.native() {
            return Ok(native.read(key.layer, ordinal, &mut slot[..layout.bytes()])?);
        }
        let gated = self.checkpoint.expert(key.layer as usize, ordinal as usize)?;
        pack_expert(&self.checkpoint, &gated, layout, slot);
        Ok(())
    }
}

/// The layer that a tensor belongs to.
fn layer_of(name: &str) -> Option<usize> {
    name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()
}

fn tier_plan(tier: &Tier) -> TierPlan {
    let experts = tier.group_experts();
    TierPlan { name: tier.name.clone(), groups: tier.groups, experts, placement: tier.placement }
}
