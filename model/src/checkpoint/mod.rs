//! A checkpoint directory: configuration, tensors, and the one canonical list of the tensors that are used.
//!
//! There are two forms: a Hugging Face directory as published (`tensors`), and a native checkpoint that
//! `import`(import::import) makes of one (`native`): a manifest beside shards in which each expert is one blob.
//!
//! Nothing that a file says is trusted: every size, offset and name is checked before anything is allocated for it.

mod bytes;
pub mod config;
mod encoded;
mod gguf;
pub mod import;
mod inventory;
pub mod native;
mod quantised;
mod tensors;
pub mod tiers;

use crate::arch::Arch;
use crate::kernels::{CONTRACT_VERSION, DType};
use crate::{families, files};
use config::Config;
pub use inventory::Gated;
pub(crate) use inventory::{ExpertPart, Item, expert_parts, latent_projections, projections, qk_norm_sizes};
use lite_llm_core::config::Placement;
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::ExpertKey;
use native::Native;
use std::borrow::Cow;
use std::path::{Path, PathBuf};
pub(crate) use tensors::Maker;
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

/// A tier: some experts of every mixture layer, as many in each.
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
fn contradiction(tiers: &[Tier], moe: &crate::arch::Moe) -> Option<String> {
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

impl Checkpoint {
    /// Opens a Hugging Face directory or a native checkpoint, whichever it is.
    ///
    /// # Errors
    /// Names the file, what is wrong with it, and the remedy.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        if gguf::is_gguf(dir) {
            let (what, remedy) =
                ("a GGUF file as it is", "import it first, with the directory of its configuration");
            return Err(CheckpointError::Unsupported {
                path: dir.into(),
                what: what.into(),
                remedy: remedy.into(),
            });
        }
        Self::open_with(dir, |_| TensorFiles::open(dir))
    }

    /// A directory that has the configuration only, of tensors that are made.
    pub(crate) fn open_made(dir: &Path, made: TensorFiles) -> Result<Self, CheckpointError> {
        Self::open_with(dir, |_| Ok(made))
    }

    /// What an import makes a native checkpoint of: a Hugging Face directory, or a GGUF file whose configuration and tokenizer
    /// are in a directory, its own if none is given.
    ///
    /// # Errors
    /// As [`Checkpoint::open`], and if a tensor does not map exactly, or file and configuration contradict each other.
    pub fn open_source(source: &Path, with: Option<&Path>) -> Result<Self, CheckpointError> {
        if gguf::is_gguf(source) {
            let own = source.parent().filter(|parent| !parent.as_os_str().is_empty());
            let dir = with.or(own).unwrap_or(Path::new("."));
            if native::is_native(dir) || !dir.join("config.json").exists() {
                let what = format!(
                    "a GGUF file does not say all of a model, and {} has no config.json as published: name the Hugging \
                     Face directory that it was made from (its weights are not needed)",
                    dir.display()
                );
                return Err(CheckpointError::invalid(source, &what));
            }
            return Self::open_with(dir, |arch| gguf::open(source, arch));
        }
        if with.is_some() {
            let what = "it is no GGUF file, and has a configuration of its own";
            return Err(CheckpointError::invalid(source, what));
        }
        Self::open(source)
    }

    fn open_with(
        dir: &Path,
        files: impl FnOnce(&Arch) -> Result<TensorFiles, CheckpointError>,
    ) -> Result<Self, CheckpointError> {
        // What an import noted of the files beside its shards is verified before they are believed.
        let manifest = if native::is_native(dir) { Some(native::read_manifest(dir)?) } else { None };
        let path = dir.join("config.json");
        let text = files::read(&path).map_err(|e| CheckpointError::io(&path, e))?;
        let arch = families::read(&Config::parse(&path, &text)?)?;
        let eos = generation_eos(dir)?.unwrap_or_else(|| arch.eos.clone());
        let (files, native, tiers) = match manifest {
            Some(manifest) => {
                let (files, native) = native::open(dir, manifest, &arch)?;
                let tiers = native.tiers().to_vec();
                (files, Some(native), tiers)
            }
            None => (files(&arch)?, None, arch.moe.as_ref().map_or_else(Vec::new, tiers_of)),
        };
        let this = Self { dir: dir.into(), arch, files, native, tiers, eos };
        // Every tensor is found, with its shape, before anything is loaded; and none is there that would be ignored.
        let list = this.inventory()?;
        this.refuse_unknown(&list)?;
        Ok(this)
    }

    /// The tiers, in the order of the experts' keys; none for a dense model.
    pub fn tiers(&self) -> &[Tier] {
        &self.tiers
    }

    /// The key of an expert by its original number.
    pub fn key(&self, layer: u32, ordinal: u32) -> ExpertKey {
        let mut expert = self.order(layer).map_or(ordinal, |order| order.rank(ordinal));
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
        let place = self.place(key)?;
        Some(self.order(key.layer).map_or(place, |order| order.ordinal(place)))
    }

    /// The place of an expert among those of its layer, tier by tier, if the checkpoint has it.
    pub(crate) fn place(&self, key: ExpertKey) -> Option<u32> {
        let tier = self
            .tiers
            .get(key.tier as usize)
            .filter(|t| key.group < t.groups && key.expert < t.group_experts())?;
        let layer = self.arch.layers.get(key.layer as usize).filter(|layer| layer.dense.is_none());
        let before: u32 = self.tiers[..key.tier as usize].iter().map(|tier| tier.experts).sum();
        layer.map(|_| before + key.group * tier.group_experts() + key.expert)
    }

    /// Whether each expert of a layer, by original number, is in one of some tiers.
    pub fn eligible<'a>(&'a self, layer: u32, tiers: &'a [u32]) -> impl Iterator<Item = bool> + 'a {
        let experts: u32 = self.tiers.iter().map(|tier| tier.experts).sum();
        (0..experts).map(move |ordinal| tiers.contains(&self.key(layer, ordinal).tier))
    }

    /// Where the experts of a layer stand, if not in their original order.
    fn order(&self, layer: u32) -> Option<&tiers::Order> {
        self.native.as_ref()?.orders().get(&layer)
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

    /// The bytes of a tensor that is in its file as it is used, row-major, little-endian.
    pub fn bytes(&self, tensor: &Tensor) -> &[u8] {
        self.files.bytes(tensor)
    }

    /// The bytes of any tensor, row-major, little-endian.
    pub fn row_major(&self, tensor: &Tensor) -> Cow<'_, [u8]> {
        self.files.row_major(tensor)
    }

    /// Packs a matrix in the layout of the kernels, quantised values as they are.
    ///
    /// # Panics
    /// If the slice is not as long as the shape and the storage say.
    pub(crate) fn pack(&self, tensor: &Tensor, dst: &mut [u8]) {
        self.files.pack(tensor, dst);
    }

    /// Gives back the memory that reading a tensor took. Its bytes can be read again.
    pub fn forget(&self, tensor: &Tensor) {
        self.files.forget(tensor);
    }

    /// A tensor that must have this shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<Tensor, CheckpointError> {
        let Some(tensor) = self.files.find(name) else {
            let what = format!(
                "tensor {name} is missing, or of a type other than F32, BF16, F16 and block-scaled E4M3"
            );
            return Err(CheckpointError::invalid(self.files.path(), &what));
        };
        if tensor.shape != shape {
            let what =
                format!("tensor {name} has shape {:?}, the configuration asks for {shape:?}", tensor.shape);
            return Err(CheckpointError::invalid(self.files.path(), &what));
        }
        Ok(tensor)
    }

    /// The embedding, whose rows are read where they are.
    pub(crate) fn embedding(&self) -> Result<Tensor, CheckpointError> {
        let name = "model.embed_tokens.weight";
        let tensor = self.tensor(name, &[self.arch.vocab, self.arch.hidden])?;
        if tensor.is_stored() {
            return Ok(tensor);
        }
        let what = format!("tensor {name} is quantised; the embedding is read as F32, BF16, F16, q8 or q4");
        Err(CheckpointError::invalid(self.files.path(), &what))
    }

    /// Digest of everything beside the weights that decides a bit.
    pub fn architecture_digest(&self, kv: DType) -> Digest {
        let tiers: Vec<(&str, u32)> =
            self.tiers.iter().map(|tier| (tier.name.as_str(), tier.experts)).collect();
        let mut text = format!("contract {CONTRACT_VERSION} kv {kv:?} tiers {tiers:?} {:?}", self.arch);
        // Which experts a tier has decides what a TierSet computes.
        for (layer, order) in self.native.iter().flat_map(|native| native.orders()) {
            text += &format!(" layer {layer} {:?}", order.ordinals());
        }
        Digest::of(text.as_bytes())
    }
}

/// `eos_token_id` of generation_config.json, which wins over that of config.json.
fn generation_eos(dir: &Path) -> Result<Option<Vec<u32>>, CheckpointError> {
    let path = dir.join("generation_config.json");
    match files::read(&path) {
        Ok(text) => {
            let config = Config::parse(&path, &text)?;
            Ok(config.has("eos_token_id").then(|| config.tokens("eos_token_id")).transpose()?)
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(CheckpointError::io(&path, error)),
    }
}
