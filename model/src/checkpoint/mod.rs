//! A checkpoint directory: configuration, tensors, and the one canonical list of the tensors that are used.
//!
//! There are two forms: a Hugging Face directory as published (`tensors`), and a native checkpoint that
//! `import`(import::import) makes of one (`native`): a manifest beside shards in which each expert is one blob.
//!
//! Nothing that a file says is trusted: every size, offset and name is checked before anything is allocated for it.

pub mod config;
pub mod import;
pub mod native;
mod tensors;

use crate::arch::{Arch, QkNorm};
use crate::families;
use crate::kernels::{CONTRACT_VERSION, DType};
use config::Config;
use lite_llm_core::config::Placement;
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::ExpertKey;
use native::Native;
use std::path::{Path, PathBuf};
pub use tensors::{Tensor, TensorFiles};
use thiserror::Error;

/// Why a checkpoint cannot be used.
#[derive(Debug, Error)]
pub enum CheckpointError {
    /// A file cannot be read.
    #[error("cannot read {}: {error}; is the path a checkpoint directory, and complete?", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        error: std::io::Error,
    },
    /// A directory cannot be opened for writing.
    #[error(transparent)]
    Open(#[from] crate::disk::OpenError),
    /// A disk refuses.
    #[error("{}: {error}; what is finished is kept: once there is room and a sound disk, the same command goes on", path.display())]
    Disk {
        /// The directory.
        path: PathBuf,
        /// What it refuses, and why.
        error: lite_llm_core::disk::DiskError,
    },
    /// A file does not hold what it should.
    #[error("{}: {what}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Bytes do not have the checksum that was noted for them.
    #[error("{}: {what}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// The checkpoint is of a kind that is not computed here.
    #[error("{}: {what} is not supported: {remedy}", path.display())]
    Unsupported {
        /// The file.
        path: PathBuf,
        /// Key and value.
        what: String,
        /// What to do.
        remedy: String,
    },
}

impl CheckpointError {
    pub(crate) fn io(path: &Path, error: std::io::Error) -> Self {
        Self::Io { path: path.into(), error }
    }

    pub(crate) fn invalid(path: &Path, what: &str) -> Self {
        Self::Invalid { path: path.into(), what: what.into() }
    }

    pub(crate) fn corrupt(path: &Path, what: &str) -> Self {
        Self::Corrupt { path: path.into(), what: what.into() }
    }
}

/// An opened checkpoint: headers read and checked, no weights loaded.
#[derive(Debug)]
pub struct Checkpoint {
    dir: PathBuf,
    arch: Arch,
    files: TensorFiles,
    native: Option<Native>,
    tiers: Vec<Tier>,
    eos: Vec<u32>,
}

/// A tier: a run of the experts of every mixture layer, by original number.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Tier {
    /// Its name, as TierSets use it.
    pub name: String,
    /// Experts of a layer.
    pub experts: u32,
    /// Groups of equal size in which a tiered router selects them; one for other routers.
    #[serde(default = "one_group", skip_serializing_if = "is_one")]
    pub groups: u32,
    /// Where they belong.
    pub placement: Placement,
}

const fn one_group() -> u32 {
    1
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde passes a reference")]
const fn is_one(groups: &u32) -> bool {
    *groups == 1
}

impl Tier {
    /// Experts of a group.
    pub fn group_experts(&self) -> u32 {
        self.experts / self.groups
    }
}

/// What tiers say that the router does not.
pub(crate) fn contradiction(tiers: &[Tier], moe: &crate::arch::Moe) -> Option<String> {
    let shape = |tier: &Tier| (tier.name.clone(), tier.groups, tier.experts);
    match &moe.tiered {
        None => tiers.iter().find(|tier| tier.groups != 1).map(|tier| {
            format!(
                "tier {} has groups, and the router of this model selects none; give it experts",
                tier.name
            )
        }),
        Some(_) => {
            let own = tiers_of(moe);
            (!own.iter().map(shape).eq(tiers.iter().map(shape))).then(|| {
                let names: Vec<String> =
                    own.iter().map(|t| format!("{}:{}x{}", t.name, t.groups, t.group_experts())).collect();
                format!(
                    "the router of this model selects from the tiers {}; others cannot be given",
                    names.join(",")
                )
            })
        }
    }
}

/// The tiers of an architecture: those of its router, or one of all experts.
fn tiers_of(moe: &crate::arch::Moe) -> Vec<Tier> {
    let Some(tiered) = &moe.tiered else {
        return vec![Tier {
            name: "all".into(),
            experts: moe.experts as u32,
            groups: 1,
            placement: Placement::Hot,
        }];
    };
    let tier = |tier: &crate::arch::TierOfGroups| Tier {
        name: tier.name.clone(),
        experts: (tier.groups * tier.experts) as u32,
        groups: tier.groups as u32,
        placement: tier.placement,
    };
    tiered.tiers.iter().map(tier).collect()
}

/// A tensor that is used.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: u64,
    /// Where its row-major bytes are, if they are in a mapped file.
    tensor: Option<Tensor>,
    /// BLAKE3 of its row-major bytes, if somebody has hashed them.
    hash: Option<[u8; 32]>,
}

/// The three matrices of an expert (or of any gated block): gate, up, down.
#[derive(Clone, Debug)]
pub struct Gated {
    /// `[intermediate, hidden]`.
    pub gate: Tensor,
    /// `[intermediate, hidden]`.
    pub up: Tensor,
    /// `[hidden, intermediate]`.
    pub down: Tensor,
}

impl Checkpoint {
    /// Opens a Hugging Face directory or a native checkpoint, whichever it is.
    ///
    /// # Errors
    /// Names the file, what is wrong with it, and the remedy.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let path = dir.join("config.json");
        let text = std::fs::read(&path).map_err(|e| CheckpointError::io(&path, e))?;
        let arch = families::read(&Config::parse(&path, &text)?)?;
        let eos = generation_eos(dir)?.unwrap_or_else(|| arch.eos.clone());
        let (files, native, tiers) = if native::is_native(dir) {
            let (files, native) = native::open(dir, &arch)?;
            let tiers = native.tiers().to_vec();
            (files, Some(native), tiers)
        } else {
            (TensorFiles::open(dir)?, None, arch.moe.as_ref().map_or_else(Vec::new, tiers_of))
        };
        let this = Self { dir: dir.into(), arch, files, native, tiers, eos };
        // Every tensor is found, with its shape, before anything is loaded.
        this.inventory()?;
        Ok(this)
    }

    /// The tiers, in order of the experts' original numbers; none for a dense model.
    pub fn tiers(&self) -> &[Tier] {
        &self.tiers
    }

    /// The key of an expert by its original number.
    pub fn key(&self, layer: u32, ordinal: u32) -> ExpertKey {
        let mut expert = ordinal;
        for (tier, plan) in (0..).zip(&self.tiers) {
            if expert < plan.experts {
                let size = plan.group_experts();
                return ExpertKey { layer, tier, group: expert / size, expert: expert % size };
            }
            expert -= plan.experts;
        }
        unreachable!("expert {ordinal} is beyond every tier")
    }

    /// The original number of an expert, if the checkpoint has it.
    pub fn ordinal(&self, key: ExpertKey) -> Option<u32> {
        let tier = self
            .tiers
            .get(key.tier as usize)
            .filter(|t| key.group < t.groups && key.expert < t.group_experts())?;
        let layer = self.arch.layers.get(key.layer as usize).filter(|layer| layer.dense.is_none());
        let before: u32 = self.tiers[..key.tier as usize].iter().map(|tier| tier.experts).sum();
        layer.map(|_| before + key.group * tier.group_experts() + key.expert)
    }

    /// The native form, if it is one.
    pub(crate) fn native(&self) -> Option<&Native> {
        self.native.as_ref()
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The architecture.
    pub fn arch(&self) -> &Arch {
        &self.arch
    }

    /// Tokens that end a stream.
    pub fn eos(&self) -> &[u32] {
        &self.eos
    }

    /// The bytes of a tensor, row-major, little-endian.
    pub fn bytes(&self, tensor: &Tensor) -> &[u8] {
        self.files.bytes(tensor)
    }

    /// Gives back the memory that reading a tensor took. Its bytes can be read again.
    pub fn forget(&self, tensor: &Tensor) {
        self.files.forget(tensor);
    }

    /// A tensor that must have this shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, CheckpointError> {
        let Some(tensor) = self.files.find(name) else {
            let what = format!("tensor {name} is missing, or of a type other than F32, BF16 and F16");
            return Err(CheckpointError::invalid(self.files.path(), &what));
        };
        if tensor.shape != shape {
            let what =
                format!("tensor {name} has shape {:?}, the configuration asks for {shape:?}", tensor.shape);
            return Err(CheckpointError::invalid(self.files.path(), &what));
        }
        Ok(tensor.clone())
    }

    /// An expert of a mixture layer, from its own tensors or from fused ones.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<Gated, CheckpointError> {
        let moe = self.arch.moe.as_ref().expect("only a mixture has experts");
        let (hidden, width, names) = (self.arch.hidden, moe.intermediate, moe.names);
        let block = format!("model.layers.{layer}.{}.experts", names.block);
        let fused = format!("{block}.gate_up_proj");
        if self.files.find(&fused).is_some() {
            let gate_up = self.tensor(&fused, &[moe.experts, 2 * width, hidden])?;
            let down = self.tensor(&format!("{block}.down_proj"), &[moe.experts, hidden, width])?;
            return Ok(Gated {
                gate: gate_up.part(2 * expert, 2 * moe.experts, vec![width, hidden]),
                up: gate_up.part(2 * expert + 1, 2 * moe.experts, vec![width, hidden]),
                down: down.part(expert, moe.experts, vec![hidden, width]),
            });
        }
        let [gate, up, down] = names.expert.map(|name| format!("{block}.{expert}.{name}.weight"));
        Ok(Gated {
            gate: self.tensor(&gate, &[width, hidden])?,
            up: self.tensor(&up, &[width, hidden])?,
            down: self.tensor(&down, &[hidden, width])?,
        })
    }

    /// A gated block that is no expert.
    pub fn gated(&self, prefix: &str, width: usize) -> Result<Gated, CheckpointError> {
        let hidden = self.arch.hidden;
        Ok(Gated {
            gate: self.tensor(&format!("{prefix}.gate_proj.weight"), &[width, hidden])?,
            up: self.tensor(&format!("{prefix}.up_proj.weight"), &[width, hidden])?,
            down: self.tensor(&format!("{prefix}.down_proj.weight"), &[hidden, width])?,
        })
    }

    /// The name under which the files hold a tensor that is no expert, by its canonical one.
    pub(crate) fn published_name(&self, canonical: &str) -> Option<String> {
        if canonical.contains(".experts.") {
            return None;
        }
        if let Some(prefix) = canonical.strip_suffix(".router") {
            let names = self.arch.moe.as_ref()?.names;
            return Some(format!("{prefix}.{}.{}.weight", names.block, names.router));
        }
        let gated = [("gate", "gate_proj"), ("up", "up_proj"), ("down", "down_proj")];
        for (part, published) in gated {
            if let Some(prefix) = canonical.strip_suffix(part).filter(|prefix| prefix.ends_with('.')) {
                return Some(format!("{prefix}{published}.weight"));
            }
        }
        Some(canonical.into())
    }

    /// The router of a layer.
    pub fn router(&self, layer: usize) -> Result<Tensor, CheckpointError> {
        let moe = self.arch.moe.as_ref().expect("only a mixture has routers");
        let name = format!("model.layers.{layer}.{}.{}.weight", moe.names.block, moe.names.router);
        self.tensor(&name, &[moe.router_rows(), self.arch.hidden])
    }

    /// Every tensor that is used, by its canonical name: the same list for every layout of the same weights.
    pub(crate) fn inventory(&self) -> Result<Vec<Item>, CheckpointError> {
        let mut list = Vec::new();
        self.list_base(&mut list)?;
        self.list_experts(&mut list)?;
        list.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(list)
    }

    fn item(&self, name: String, tensor: Tensor) -> Item {
        let hash = self.native.as_ref().and_then(|native| native.hash(&name));
        let bytes = tensor.bytes_len() as u64;
        Item { name, dtype: tensor.dtype, shape: tensor.shape.clone(), bytes, tensor: Some(tensor), hash }
    }

    fn list_base(&self, list: &mut Vec<Item>) -> Result<(), CheckpointError> {
        let arch = &self.arch;
        let mut add = |name: String, shape: &[usize]| -> Result<(), CheckpointError> {
            let tensor = self.tensor(&name, shape)?;
            list.push(self.item(name, tensor));
            Ok(())
        };
        add("model.embed_tokens.weight".into(), &[arch.vocab, arch.hidden])?;
        if !arch.tied {
            add("lm_head.weight".into(), &[arch.vocab, arch.hidden])?;
        }
        add("model.norm.weight".into(), &[arch.hidden])?;
        for (i, layer) in arch.layers.iter().enumerate() {
            let prefix = format!("model.layers.{i}");
            for norm in ["input_layernorm", "post_attention_layernorm"] {
                add(format!("{prefix}.{norm}.weight"), &[arch.hidden])?;
            }
            for (name, outputs, inputs, bias) in projections(arch) {
                add(format!("{prefix}.self_attn.{name}.weight"), &[outputs, inputs])?;
                if bias {
                    add(format!("{prefix}.self_attn.{name}.bias"), &[outputs])?;
                }
            }
            if let Some((q, k)) = qk_norm_sizes(arch) {
                add(format!("{prefix}.self_attn.q_norm.weight"), &[q])?;
                add(format!("{prefix}.self_attn.k_norm.weight"), &[k])?;
            }
            if let Some(shared) =
                arch.moe.as_ref().and_then(|moe| moe.shared.as_ref()).filter(|_| layer.dense.is_none())
                && shared.gated
            {
                add(format!("{prefix}.mlp.shared_expert_gate.weight"), &[1, arch.hidden])?;
            }
        }
        for (i, layer) in arch.layers.iter().enumerate() {
            let prefix = format!("model.layers.{i}.mlp");
            let shared = arch.moe.as_ref().and_then(|moe| moe.shared.as_ref());
            match (layer.dense, shared) {
                (Some(width), _) => self.list_gated(list, &prefix, self.gated(&prefix, width)?),
                (None, Some(shared)) => {
                    let name = format!("{prefix}.shared_expert");
                    self.list_gated(list, &name, self.gated(&name, shared.intermediate)?);
                }
                (None, None) => {}
            }
            if layer.dense.is_none() {
                list.push(self.item(format!("model.layers.{i}.router"), self.router(i)?));
            }
        }
        Ok(())
    }

    fn list_gated(&self, list: &mut Vec<Item>, name: &str, gated: Gated) {
        for (part, tensor) in [("gate", gated.gate), ("up", gated.up), ("down", gated.down)] {
            list.push(self.item(format!("{name}.{part}"), tensor));
        }
    }

    fn list_experts(&self, list: &mut Vec<Item>) -> Result<(), CheckpointError> {
        let Some(moe) = &self.arch.moe else { return Ok(()) };
        for layer in self.arch.moe_layers() {
            for expert in 0..moe.experts as u32 {
                let name = format!("model.layers.{layer}.experts.{expert}");
                if let Some(native) = &self.native {
                    list.extend(native.expert_items(&name));
                } else {
                    self.list_gated(list, &name, self.expert(layer as usize, expert as usize)?);
                }
            }
        }
        Ok(())
    }

    /// Digest of the weights: canonical name, type, shape and BLAKE3 of the bytes of every tensor, in order of names.
    /// Reads whatever has not been hashed before, with this many threads.
    ///
    /// # Errors
    /// If a tensor is missing.
    pub fn weights_digest(&self, threads: usize) -> Result<Digest, CheckpointError> {
        let hashed = self.hashed(threads)?;
        let mut all = blake3::Hasher::new();
        for (item, hash) in &hashed {
            let hash = blake3::Hash::from_bytes(*hash);
            let line = format!("{} {:?} {:?} {}\n", item.name, item.dtype, item.shape, hash.to_hex());
            all.update(line.as_bytes());
        }
        Ok(Digest(*all.finalize().as_bytes()))
    }

    /// Reads the base parameters of a native checkpoint and compares them with the manifest. A Hugging Face directory has
    /// nothing to compare with; there the weights digest of the identity is taken from the bytes themselves.
    ///
    /// # Errors
    /// Names the tensor that is damaged.
    pub fn verify_base(&self) -> Result<(), CheckpointError> {
        let mut list = Vec::new();
        self.list_base(&mut list)?;
        for item in &list {
            let (Some(tensor), Some(hash)) = (&item.tensor, item.hash) else { continue };
            if self.files.hash(tensor) != hash {
                let what =
                    format!("tensor {} does not have its checksum: import the checkpoint again", item.name);
                return Err(CheckpointError::corrupt(self.files.path(), &what));
            }
        }
        Ok(())
    }

    /// The inventory with the BLAKE3 of each tensor.
    pub(crate) fn hashed(&self, threads: usize) -> Result<Vec<(Item, [u8; 32])>, CheckpointError> {
        let list = self.inventory()?;
        let next = std::sync::atomic::AtomicUsize::new(0);
        let hashes = std::sync::Mutex::new(vec![[0u8; 32]; list.len()]);
        std::thread::scope(|scope| {
            for _ in 0..threads.max(1) {
                scope.spawn(|| {
                    loop {
                        let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        let Some(item) = list.get(i) else { break };
                        let hash = item.hash.unwrap_or_else(|| {
                            let tensor =
                                item.tensor.as_ref().expect("what is not hashed is in a mapped file");
                            self.files.hash(tensor)
                        });
                        hashes.lock().expect("no thread panics with the lock")[i] = hash;
                    }
                });
            }
        });
        let hashes = hashes.into_inner().expect("no thread panicked");
        Ok(list.into_iter().zip(hashes).collect())
    }

    /// Digest of everything beside the weights that decides a bit.
    pub fn architecture_digest(&self, kv: DType) -> Digest {
        let tiers: Vec<(&str, u32)> =
            self.tiers.iter().map(|tier| (tier.name.as_str(), tier.experts)).collect();
        Digest::of(
            format!("contract {CONTRACT_VERSION} kv {kv:?} tiers {tiers:?} {:?}", self.arch).as_bytes(),
        )
    }
}

/// Attention's projections: name, outputs, inputs, whether there is a bias.
pub(crate) fn projections(arch: &Arch) -> [(&'static str, usize, usize, bool); 4] {
    let (q, kv, hidden) = (arch.q_dim(), arch.kv_dim(), arch.hidden);
    [
        ("q_proj", q, hidden, arch.qkv_bias),
        ("k_proj", kv, hidden, arch.qkv_bias),
        ("v_proj", kv, hidden, arch.qkv_bias),
        ("o_proj", hidden, q, arch.o_bias),
    ]
}

/// Sizes of the norms of queries and keys.
pub(crate) fn qk_norm_sizes(arch: &Arch) -> Option<(usize, usize)> {
    match arch.qk_norm {
        QkNorm::None => None,
        QkNorm::PerHead => Some((arch.head_dim, arch.head_dim)),
        QkNorm::Whole => Some((arch.q_dim(), arch.kv_dim())),
    }
}

/// `eos_token_id` of generation_config.json, which wins over that of config.json.
fn generation_eos(dir: &Path) -> Result<Option<Vec<u32>>, CheckpointError> {
    let path = dir.join("generation_config.json");
    match std::fs::read(&path) {
        Ok(text) => {
            let config = Config::parse(&path, &text)?;
            Ok(config.has("eos_token_id").then(|| config.tokens("eos_token_id")).transpose()?)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CheckpointError::io(&path, error)),
    }
}
