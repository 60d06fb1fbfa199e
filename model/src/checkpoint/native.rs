//! The native checkpoint: `manifest.json` beside shards.
//!
//! `base.bin` holds every tensor that is no expert, row-major, each at a multiple of 4 KiB. `experts-LAYER.bin` holds the
//! experts of a layer by original number, each one contiguous blob in the packed layout of the kernels (gate, up, down,
//! then biases as f32) at a multiple of 4 KiB: one expert is one aligned read. The configuration and tokenizer files lie beside them as
//! published. The manifest lists everything with sizes and checksums, and nothing in it is trusted: each number is
//! checked against the architecture and the files before anything is allocated.

use super::tensors::TensorFiles;
use super::tiers::Order;
use super::{CheckpointError, ExpertPart, Item, Tier, expert_parts};
use crate::arch::Arch;
use crate::files;
use crate::kernels::{CONTRACT_VERSION, DType, Quantised, Storage};
use crate::weights::ExpertLayout;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The file that makes a directory a native checkpoint.
pub const MANIFEST: &str = "manifest.json";
/// The version of the manifest that is written and read.
pub const FORMAT: u32 = 3;
/// Everything in a shard begins at a multiple of this.
pub const ALIGN: u64 = 4096;
/// The manifest's own checksum.
const CHECKSUM: &str = "checksum";

/// What a checkpoint holds.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Version of this form.
    pub format: u32,
    /// Version of the numeric contract whose packed layout the blobs have.
    pub contract: u32,
    /// The files that lie beside the shards as published, with the BLAKE3 of each.
    pub companions: BTreeMap<String, String>,
    /// The tiers: how many experts of each layer they have. Which, the shards say.
    pub tiers: Vec<Tier>,
    /// The shard of base parameters.
    pub base: BaseShard,
    /// The shards of experts, in order of layers.
    pub experts: Vec<ExpertShard>,
}

impl Manifest {
    /// The manifest as a file: with the BLAKE3 of all else as its last key.
    pub(super) fn to_json(&self) -> String {
        let mut json = serde_json::to_value(self).expect("a manifest is plain data");
        let checksum = checksum(&json);
        json[CHECKSUM] = checksum.into();
        format!("{json:#}\n")
    }
}

/// BLAKE3 of a manifest without its checksum, in compact form.
fn checksum(json: &serde_json::Value) -> String {
    blake3::hash(json.to_string().as_bytes()).to_hex().to_string()
}

/// The shard of base parameters.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseShard {
    /// File name.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// Its tensors.
    pub tensors: Vec<BaseTensor>,
}

/// A tensor of the base shard.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BaseTensor {
    /// Name as published.
    pub name: String,
    /// Canonical name, by which the weights digest lists it.
    pub canonical: String,
    /// Storage type.
    pub dtype: String,
    /// Sizes, slowest first.
    pub shape: Vec<usize>,
    /// Where it begins.
    pub offset: u64,
    /// BLAKE3 of its bytes, in hexadecimal.
    pub blake3: String,
}

/// The experts of a layer.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExpertShard {
    /// File name.
    pub file: String,
    /// Its size.
    pub bytes: u64,
    /// Decoder layer.
    pub layer: u32,
    /// Version of the blobs: 0 as imported.
    pub version: u32,
    /// Storage types of gate, up and down, then of their biases if they have any.
    pub dtypes: Vec<String>,
    /// The experts of each tier by original number, ascending; if empty, the tiers have them one after another.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tiers: Vec<Vec<u32>>,
    /// The blobs, by original number.
    pub blobs: Vec<Blob>,
}

/// One expert.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Blob {
    /// Where it begins.
    pub offset: u64,
    /// CRC-32 of the packed bytes, checked at every load.
    pub crc32: u32,
    /// BLAKE3 of each part as published, in hexadecimal: what the weights digest lists.
    pub blake3: Vec<String>,
}

/// Where an expert lies as one blob, in the very layout of a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExpertBlob {
    /// Which shard, in order of layers.
    pub shard: usize,
    /// Decoder layer.
    pub layer: u32,
    /// Original number in the layer.
    pub ordinal: u32,
    /// Where it begins: a multiple of [`ALIGN`].
    pub offset: u64,
    /// Its length, which need not be one.
    pub bytes: usize,
    /// CRC-32 of it.
    pub crc32: u32,
}

impl ExpertBlob {
    /// Holds bytes that were read of it, from the shard at `path`, against its checksum.
    ///
    /// # Errors
    /// If they have another.
    pub fn verify(&self, path: &Path, bytes: &[u8]) -> Result<(), CheckpointError> {
        let found = crc32fast::hash(bytes);
        if found == self.crc32 {
            return Ok(());
        }
        let Self { layer, ordinal, offset, crc32, .. } = self;
        let what = format!(
            "expert {ordinal} of layer {layer} at byte {offset} has checksum {found:08x} instead of {crc32:08x}: the file \
             is damaged, import the checkpoint again"
        );
        Err(CheckpointError::corrupt(path, &what))
    }
}

/// An opened native checkpoint.
#[derive(Debug)]
pub(crate) struct Native {
    manifest: Manifest,
    storages: Vec<Storage>,
    blob_bytes: usize,
    parts: Vec<ExpertPart>,
    files: BTreeMap<u32, (PathBuf, File)>,
    orders: BTreeMap<u32, Order>,
    hashes: BTreeMap<String, [u8; 32]>,
}

/// Whether a directory is a native checkpoint.
pub(super) fn is_native(dir: &Path) -> bool {
    dir.join(MANIFEST).exists()
}

/// The name of a storage type.
pub(super) const fn dtype_name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::Bf16 => "bf16",
        DType::F16 => "f16",
    }
}

fn dtype_of(path: &Path, name: &str) -> Result<DType, CheckpointError> {
    [DType::F32, DType::Bf16, DType::F16].into_iter().find(|&dtype| dtype_name(dtype) == name).ok_or_else(
        || {
            CheckpointError::invalid(
                path,
                &format!("storage type {name:?} is none of f32, bf16, f16, mxfp4, e4m3, q8 and q4"),
            )
        },
    )
}

/// The name of the way in which an expert's weights are stored.
pub(super) const fn storage_name(storage: Storage) -> &'static str {
    match storage {
        Storage::Plain(dtype) => dtype_name(dtype),
        Storage::Mxfp4 => "mxfp4",
        Storage::E4m3 => "e4m3",
        Storage::Grouped(kind) => kind.name(),
    }
}

fn storage_of(path: &Path, name: &str) -> Result<Storage, CheckpointError> {
    let kinds = [Quantised::Q8, Quantised::Q4].map(Storage::Grouped);
    let quantised = [Storage::Mxfp4, Storage::E4m3]
        .into_iter()
        .chain(kinds)
        .find(|&storage| storage_name(storage) == name);
    quantised.map_or_else(|| dtype_of(path, name).map(Storage::Plain), Ok)
}

fn hash_of(path: &Path, hex: &str) -> Result<[u8; 32], CheckpointError> {
    let hash = blake3::Hash::from_hex(hex);
    hash.map(|hash| *hash.as_bytes())
        .map_err(|_| CheckpointError::invalid(path, &format!("{hex:?} is no BLAKE3")))
}

/// Opens the shards that the manifest lists.
pub(super) fn open(
    dir: &Path,
    manifest: Manifest,
    arch: &Arch,
) -> Result<(TensorFiles, Native), CheckpointError> {
    let path = dir.join(MANIFEST);
    check(&path, &manifest, arch)?;
    let mut files = TensorFiles::empty();
    let mut hashes = BTreeMap::new();
    let mut listed = Vec::new();
    for tensor in &manifest.base.tensors {
        hashes.insert(tensor.canonical.clone(), hash_of(&path, &tensor.blake3)?);
        let storage = storage_of(&path, &tensor.dtype)?;
        if matches!(storage, Storage::Mxfp4 | Storage::E4m3) {
            let what = format!("tensor {} is {}: only experts are", tensor.name, tensor.dtype);
            return Err(CheckpointError::invalid(&path, &what));
        }
        listed.push((tensor.name.clone(), storage, tensor.shape.clone(), tensor.offset));
    }
    files.map(&shard(dir, &manifest.base.file)?, listed)?;

    let mut native = Native {
        storages: Vec::new(),
        blob_bytes: 0,
        parts: arch.moe.as_ref().map_or_else(Vec::new, |moe| expert_parts(moe, arch.hidden)),
        files: BTreeMap::new(),
        orders: orders(&path, &manifest)?,
        hashes,
        manifest: manifest.clone(),
    };
    for (i, experts) in manifest.experts.iter().enumerate() {
        let storages = experts.dtypes.iter().map(|name| storage_of(&path, name));
        let storages: Vec<Storage> = storages.collect::<Result<_, _>>()?;
        if i > 0 && storages != native.storages {
            return Err(CheckpointError::invalid(&path, "the layers' experts have different storage types"));
        }
        let parts = native.parts.len();
        if storages.len() != parts || experts.blobs.iter().any(|blob| blob.blake3.len() != parts) {
            let what = format!("an expert of this model has {parts} parts, the manifest lists others");
            return Err(CheckpointError::invalid(&path, &what));
        }
        native.storages = storages;
        let layout = ExpertLayout::new(&native.storages, arch);
        native.blob_bytes =
            layout.ok_or_else(|| CheckpointError::invalid(&path, "an expert is too large"))?.bytes();
        native.open_shard(dir, &path, experts)?;
    }
    Ok((files, native))
}

/// Reads the manifest of a directory, and verifies the files that lie beside the shards as published.
pub(super) fn read_manifest(dir: &Path) -> Result<Manifest, CheckpointError> {
    let path = dir.join(MANIFEST);
    let manifest = parse_manifest(&path)?;
    for (name, hash) in &manifest.companions {
        let path = shard(dir, name)?;
        let bytes = files::read(&path).map_err(|e| CheckpointError::io(&path, e))?;
        if *blake3::hash(&bytes).as_bytes() != hash_of(&path, hash)? {
            let what = "it is not what was imported: restore it, or import the checkpoint again";
            return Err(CheckpointError::corrupt(&path, what));
        }
    }
    Ok(manifest)
}

fn parse_manifest(path: &Path) -> Result<Manifest, CheckpointError> {
    let text = files::read(path).map_err(|e| CheckpointError::io(path, e))?;
    // The version is read first: a later form may have other keys.
    let mut json: serde_json::Value = serde_json::from_slice(&text).map_err(|e| {
        CheckpointError::invalid(path, &format!("it is not JSON: {e}; import the checkpoint again"))
    })?;
    if json["format"] != FORMAT {
        let what = format!("manifest format {}", json["format"]);
        let remedy = format!("this program reads format {FORMAT}; import the checkpoint again");
        return Err(CheckpointError::Unsupported { path: path.into(), what, remedy });
    }
    let noted = json.as_object_mut().and_then(|map| map.remove(CHECKSUM));
    if noted.as_ref().and_then(serde_json::Value::as_str) != Some(&checksum(&json)) {
        return Err(CheckpointError::corrupt(
            path,
            "it does not have its checksum: import the checkpoint again",
        ));
    }
    serde_json::from_value(json).map_err(|e| CheckpointError::invalid(path, &e.to_string()))
}

/// The manifest against the architecture.
fn check(path: &Path, manifest: &Manifest, arch: &Arch) -> Result<(), CheckpointError> {
    if manifest.contract != CONTRACT_VERSION {
        let what = format!("packed layout of contract {}", manifest.contract);
        let remedy = format!("this program has contract {CONTRACT_VERSION}; import the checkpoint again");
        return Err(CheckpointError::Unsupported { path: path.into(), what, remedy });
    }
    let experts = arch.moe.as_ref().map_or(0, |moe| moe.experts as u64);
    let of_tiers: u64 = manifest.tiers.iter().map(|tier| u64::from(tier.experts)).sum();
    if of_tiers != experts || manifest.tiers.iter().any(|tier| tier.experts == 0 || tier.name.is_empty()) {
        let what = format!("the tiers have {of_tiers} experts, the configuration {experts}");
        return Err(CheckpointError::invalid(path, &what));
    }
    if let Some(what) = arch.moe.as_ref().and_then(|moe| super::contradiction(&manifest.tiers, moe)) {
        return Err(CheckpointError::invalid(path, &what));
    }
    let layers: Vec<u32> = manifest.experts.iter().map(|shard| shard.layer).collect();
    if layers != arch.moe_layers() {
        return Err(CheckpointError::invalid(path, &format!("experts are listed for layers {layers:?}")));
    }
    if let Some(shard) = manifest.experts.iter().find(|shard| shard.blobs.len() as u64 != experts) {
        let what = format!("layer {} has {} experts of {experts}", shard.layer, shard.blobs.len());
        return Err(CheckpointError::invalid(path, &what));
    }
    let tiered = arch.moe.as_ref().is_some_and(|moe| moe.tiered.is_some());
    if tiered && manifest.experts.iter().any(|shard| !shard.tiers.is_empty()) {
        let what =
            "the router of this model says which experts its tiers have, and the manifest lists others";
        return Err(CheckpointError::invalid(path, what));
    }
    Ok(())
}

/// Where the experts of each layer stand that are not in their original order.
fn orders(path: &Path, manifest: &Manifest) -> Result<BTreeMap<u32, Order>, CheckpointError> {
    let listed = manifest.experts.iter().filter(|shard| !shard.tiers.is_empty());
    let order = |shard: &ExpertShard| match Order::new(&manifest.tiers, &shard.tiers) {
        Ok(order) => Ok((shard.layer, order)),
        Err(what) => Err(CheckpointError::invalid(path, &format!("tiers of layer {}: {what}", shard.layer))),
    };
    listed.map(order).collect()
}

/// A shard's path, beside the manifest.
fn shard(dir: &Path, name: &str) -> Result<PathBuf, CheckpointError> {
    if name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.') {
        return Err(CheckpointError::invalid(
            &dir.join(MANIFEST),
            &format!("{name:?} is no plain file name"),
        ));
    }
    Ok(dir.join(name))
}

impl Native {
    fn open_shard(
        &mut self,
        dir: &Path,
        manifest: &Path,
        experts: &ExpertShard,
    ) -> Result<(), CheckpointError> {
        let path = shard(dir, &experts.file)?;
        let file = files::open(&path).map_err(|e| CheckpointError::io(&path, e))?;
        let len = file.metadata().map_err(|e| CheckpointError::io(&path, e))?.len();
        for (ordinal, blob) in (0u32..).zip(&experts.blobs) {
            let end = blob.offset.checked_add(self.blob_bytes as u64);
            if !blob.offset.is_multiple_of(ALIGN) || end.is_none_or(|end| end > len) {
                let what = format!(
                    "expert {ordinal} is beyond the end of the file, or not aligned: import it again"
                );
                return Err(CheckpointError::invalid(&path, &what));
            }
            for (part, hash) in self.parts.iter().zip(&blob.blake3) {
                let name = format!("model.layers.{}.experts.{ordinal}.{}", experts.layer, part.name);
                self.hashes.insert(name, hash_of(manifest, hash)?);
            }
        }
        self.files.insert(experts.layer, (path, file));
        Ok(())
    }

    pub(super) fn tiers(&self) -> &[Tier] {
        &self.manifest.tiers
    }

    pub(super) fn orders(&self) -> &BTreeMap<u32, Order> {
        &self.orders
    }

    pub(super) fn hash(&self, canonical: &str) -> Option<[u8; 32]> {
        self.hashes.get(canonical).copied()
    }

    pub(crate) fn expert_storages(&self) -> &[Storage] {
        &self.storages
    }

    /// The parts of an expert, as the weights digest lists them.
    pub(super) fn expert_items(&self, name: &str) -> Vec<Item> {
        let parts = self.parts.iter().zip(&self.storages);
        parts
            .map(|(part, storage)| {
                let (dtype, grouped) = (storage.dtype(), storage.grouped());
                let name = format!("{name}.{}", part.name);
                let hash = self.hash(&name);
                let bytes = match (grouped, &part.shape[..]) {
                    (Some(kind), &[rows, columns]) => rows * kind.row_bytes(columns),
                    _ => part.shape.iter().product::<usize>() * dtype.bytes(),
                } as u64;
                let shape = part.shape.clone();
                Item { name, published: None, dtype, grouped, shape, bytes, tensor: None, hash }
            })
            .collect()
    }

    /// The shards of experts, in order of layers.
    pub(crate) fn shards(&self) -> impl Iterator<Item = &Path> {
        self.files.values().map(|(path, _)| path.as_path())
    }

    /// Where an expert lies.
    pub(crate) fn blob(&self, layer: u32, ordinal: u32) -> ExpertBlob {
        let at = self.manifest.experts.binary_search_by_key(&layer, |shard| shard.layer);
        let shard = at.expect("every layer has a shard");
        let Blob { offset, crc32, .. } = self.manifest.experts[shard].blobs[ordinal as usize];
        ExpertBlob { shard, layer, ordinal, offset, bytes: self.blob_bytes, crc32 }
    }

    /// Reads an expert's blob and verifies its checksum.
    pub(crate) fn read(&self, layer: u32, ordinal: u32, into: &mut [u8]) -> Result<(), CheckpointError> {
        let (path, file) = &self.files[&layer];
        let blob = self.blob(layer, ordinal);
        file.read_exact_at(into, blob.offset).map_err(|e| CheckpointError::io(path, e))?;
        blob.verify(path, into)
    }
}
