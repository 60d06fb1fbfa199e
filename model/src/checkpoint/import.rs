//! From a Hugging Face directory to a native checkpoint.
//!
//! Everything is written into `NAME.partial` beside the target: each file aside, synced, renamed, then noted in
//! `progress.jsonl`. The manifest comes last, then the directory takes its name. Begun again after a crash, the import
//! keeps every noted file whose source is the same, and writes the rest.

use super::native::{
    ALIGN, BaseShard, BaseTensor, Blob, ExpertShard, FORMAT, MANIFEST, Manifest, dtype_name,
};
use super::{Checkpoint, CheckpointError, Item, Tier};
use crate::kernels::CONTRACT_VERSION;
use crate::model::{ModelError, expert_layout, pack_expert};
use lite_llm_core::config::Placement;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

const PROGRESS: &str = "progress.jsonl";
/// Files that go along as they are, if they are there.
const COMPANIONS: [&str; 5] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
];

/// What an import made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Imported {
    /// Files written, those kept from an earlier attempt apart.
    pub written: usize,
    /// Files kept.
    pub kept: usize,
    /// Bytes of all shards.
    pub bytes: u64,
}

/// A line of the progress file.
#[derive(Clone, Debug, Serialize, Deserialize)]
enum Note {
    /// The source: another one begins anew.
    Source { weights: String, tiers: Vec<Tier> },
    /// The base shard is there.
    Base(BaseShard),
    /// A layer's experts are there.
    Experts(ExpertShard),
}

/// Parses `NAME:COUNT[:hot|warm|cold],...`, where COUNT may be `GROUPSxEXPERTS`.
///
/// # Errors
/// What is wrong, for people.
pub fn parse_tiers(spec: &str) -> Result<Vec<Tier>, String> {
    let mut tiers: Vec<Tier> = Vec::new();
    for part in spec.split(',') {
        let mut fields = part.split(':');
        let (name, count, placement) = (fields.next().unwrap_or(""), fields.next(), fields.next());
        let (groups, count) = match count.and_then(|count| count.split_once('x')) {
            Some((groups, experts)) => (groups.parse().ok(), Some(experts)),
            None => (Some(1), count),
        };
        let groups = groups.filter(|&groups: &u32| groups > 0);
        let experts = count.and_then(|count| count.parse().ok()).filter(|&count: &u32| count > 0);
        let experts = experts.and_then(|experts| experts.checked_mul(groups?));
        let placement = match placement {
            None | Some("hot") => Some(Placement::Hot),
            Some("warm") => Some(Placement::Warm),
            Some("cold") => Some(Placement::Cold),
            Some(_) => None,
        };
        let (Some(experts), Some(groups), Some(placement), None, false) =
            (experts, groups, placement, fields.next(), name.is_empty())
        else {
            return Err(format!(
                "{part:?} is no tier; write NAME:EXPERTS or NAME:EXPERTS:hot|warm|cold, with GROUPSxEXPERTS for a tiered \
                 router"
            ));
        };
        if tiers.iter().any(|tier| tier.name == name) {
            return Err(format!("tier {name:?} is there twice"));
        }
        tiers.push(Tier { name: name.into(), experts, groups, placement });
    }
    Ok(tiers)
}

/// Imports `source` into `target`, telling `progress` the bytes written so far and in all.
///
/// # Errors
/// If the source cannot be used, the tiers do not fit it, or the target exists or cannot be written.
pub fn import(
    source: &Path,
    target: &Path,
    tiers: Option<Vec<Tier>>,
    threads: usize,
    mut progress: impl FnMut(u64, u64),
) -> Result<Imported, ModelError> {
    if target.exists() {
        let what = "it exists already; give a path that does not, or remove it first";
        return Err(CheckpointError::invalid(target, what).into());
    }
    let checkpoint = Checkpoint::open(source)?;
    if checkpoint.native().is_some() {
        let what = "it is a native checkpoint already; give the Hugging Face directory";
        return Err(CheckpointError::invalid(source, what).into());
    }
    let tiers = tiers.unwrap_or_else(|| checkpoint.tiers().to_vec());
    let experts = checkpoint.arch().moe.as_ref().map_or(0, |moe| moe.experts as u64);
    let of_tiers: u64 = tiers.iter().map(|tier| u64::from(tier.experts)).sum();
    if of_tiers != experts {
        let what = format!("the tiers have {of_tiers} experts, the checkpoint {experts} a layer");
        return Err(CheckpointError::invalid(source, &what).into());
    }
    let contradiction = checkpoint.arch().moe.as_ref().and_then(|moe| super::contradiction(&tiers, moe));
    if let Some(what) = contradiction {
        return Err(CheckpointError::invalid(source, &what).into());
    }
    let hashed = checkpoint.hashed(threads)?;
    let total = hashed.iter().map(|(item, _)| item.bytes).sum();
    let weights = checkpoint.weights_digest(threads)?.to_string();
    let mut import =
        Import::begin(&checkpoint, target, hashed, Note::Source { weights, tiers: tiers.clone() })?;

    let base = import.base()?;
    progress(import.bytes, total);
    let mut shards = Vec::new();
    for layer in checkpoint.arch().moe_layers() {
        shards.push(import.experts(layer)?);
        progress(import.bytes, total);
    }
    let companions = import.companions()?;
    let (format, contract) = (FORMAT, CONTRACT_VERSION);
    let manifest = Manifest { format, contract, companions, tiers, base, experts: shards };
    import.finish(&manifest, target)
}

struct Import<'a> {
    checkpoint: &'a Checkpoint,
    dir: PathBuf,
    hashed: BTreeMap<String, (Item, [u8; 32])>,
    notes: Vec<Note>,
    written: usize,
    kept: usize,
    bytes: u64,
}

impl<'a> Import<'a> {
    fn begin(
        checkpoint: &'a Checkpoint,
        target: &Path,
        hashed: Vec<(Item, [u8; 32])>,
        source: Note,
    ) -> Result<Self, CheckpointError> {
        let mut name = target.file_name().unwrap_or_default().to_owned();
        name.push(".partial");
        let dir = target.with_file_name(name);
        let notes = read_notes(&dir.join(PROGRESS));
        let same = notes
            .first()
            .is_some_and(|first| serde_json::to_value(first).ok() == serde_json::to_value(&source).ok());
        if dir.exists() && !same {
            fs::remove_dir_all(&dir).map_err(|e| CheckpointError::io(&dir, e))?;
        }
        fs::create_dir_all(&dir).map_err(|e| CheckpointError::io(&dir, e))?;
        let hashed = hashed.into_iter().map(|(item, hash)| (item.name.clone(), (item, hash))).collect();
        let mut this = Self { checkpoint, dir, hashed, notes: Vec::new(), written: 0, kept: 0, bytes: 0 };
        if same {
            this.notes = notes;
        } else {
            this.note(source)?;
        }
        Ok(this)
    }

    fn note(&mut self, note: Note) -> Result<(), CheckpointError> {
        let path = self.dir.join(PROGRESS);
        let line = serde_json::to_string(&note).expect("a note is plain data");
        let append = || -> io::Result<()> {
            let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
            file.write_all(format!("{line}\n").as_bytes())?;
            file.sync_data()
        };
        append().map_err(|e| CheckpointError::io(&path, e))?;
        self.notes.push(note);
        Ok(())
    }

    /// Whether a noted file is there in full.
    fn is_whole(&self, file: &str, bytes: u64) -> bool {
        fs::metadata(self.dir.join(file)).is_ok_and(|metadata| metadata.len() == bytes)
    }

    fn base(&mut self) -> Result<BaseShard, CheckpointError> {
        let noted = self.notes.iter().find_map(|note| match note {
            Note::Base(shard) => Some(shard.clone()),
            Note::Source { .. } | Note::Experts(_) => None,
        });
        if let Some(shard) = noted.filter(|shard| self.is_whole(&shard.file, shard.bytes)) {
            self.kept += 1;
            self.bytes += shard.bytes;
            return Ok(shard);
        }
        let mut tensors = Vec::new();
        let mut offset = 0;
        for (canonical, (item, hash)) in &self.hashed {
            let Some(name) = self.checkpoint.published_name(canonical) else { continue };
            tensors.push(BaseTensor {
                name,
                canonical: canonical.clone(),
                dtype: dtype_name(item.dtype).into(),
                shape: item.shape.clone(),
                offset,
                blake3: blake3::Hash::from_bytes(*hash).to_hex().to_string(),
            });
            offset += item.bytes.next_multiple_of(ALIGN);
        }
        let shard = BaseShard { file: "base.bin".into(), bytes: offset, tensors };
        let (checkpoint, hashed) = (self.checkpoint, &self.hashed);
        write_aside(&self.dir, &shard.file, |out| {
            for tensor in &shard.tensors {
                let item = &hashed[&tensor.canonical].0;
                write_padded(out, checkpoint.bytes(item.tensor.as_ref().expect("a source is mapped")))?;
            }
            Ok(())
        })?;
        self.done(shard.bytes, Note::Base(shard.clone()))?;
        Ok(shard)
    }

    fn experts(&mut self, layer: u32) -> Result<ExpertShard, ModelError> {
        let noted = self.notes.iter().find_map(|note| match note {
            Note::Experts(shard) if shard.layer == layer => Some(shard.clone()),
            Note::Source { .. } | Note::Base(_) | Note::Experts(_) => None,
        });
        if let Some(shard) = noted.filter(|shard| self.is_whole(&shard.file, shard.bytes)) {
            self.kept += 1;
            self.bytes += shard.bytes;
            return Ok(shard);
        }
        let layout = expert_layout(self.checkpoint)?.expect("a mixture layer has experts");
        let count = self.checkpoint.arch().moe.as_ref().map_or(0, |moe| moe.experts);
        let mut shard = ExpertShard {
            file: format!("experts-{layer:05}.bin"),
            bytes: 0,
            layer,
            version: 0,
            dtypes: layout.dtypes.map(|dtype| dtype_name(dtype).into()),
            blobs: Vec::new(),
        };
        let (checkpoint, hashed) = (self.checkpoint, &self.hashed);
        let mut blob = vec![0; layout.ends[2]];
        write_aside(&self.dir, &shard.file.clone(), |out| {
            for ordinal in 0..count {
                let gated = checkpoint.expert(layer as usize, ordinal).map_err(io::Error::other)?;
                pack_expert(checkpoint, &gated, &layout, &mut blob);
                write_padded(out, &blob)?;
                let hash = |part: &str| {
                    let name = format!("model.layers.{layer}.experts.{ordinal}.{part}");
                    blake3::Hash::from_bytes(hashed[&name].1).to_hex().to_string()
                };
                let blake3 = ["gate", "up", "down"].map(hash);
                shard.blobs.push(Blob { offset: shard.bytes, crc32: crc32fast::hash(&blob), blake3 });
                shard.bytes += (blob.len() as u64).next_multiple_of(ALIGN);
            }
            Ok(())
        })?;
        self.done(shard.bytes, Note::Experts(shard.clone()))?;
        Ok(shard)
    }

    fn done(&mut self, bytes: u64, note: Note) -> Result<(), CheckpointError> {
        self.written += 1;
        self.bytes += bytes;
        self.note(note)
    }

    /// Copies the files that go along, and hashes them.
    fn companions(&self) -> Result<BTreeMap<String, String>, CheckpointError> {
        let mut companions = BTreeMap::new();
        for name in COMPANIONS {
            let path = self.checkpoint.dir().join(name);
            if path.exists() {
                let bytes = fs::read(&path).map_err(|e| CheckpointError::io(&path, e))?;
                companions.insert(name.into(), blake3::hash(&bytes).to_hex().to_string());
                write_aside(&self.dir, name, |out| out.write_all(&bytes))?;
            }
        }
        Ok(companions)
    }

    fn finish(self, manifest: &Manifest, target: &Path) -> Result<Imported, ModelError> {
        write_aside(&self.dir, MANIFEST, |out| out.write_all(manifest.to_json().as_bytes()))?;
        let rename = || -> io::Result<()> {
            fs::remove_file(self.dir.join(PROGRESS))?;
            File::open(&self.dir)?.sync_all()?;
            fs::rename(&self.dir, target)?;
            let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
            File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
        };
        rename().map_err(|e| CheckpointError::io(target, e))?;
        Ok(Imported { written: self.written, kept: self.kept, bytes: self.bytes })
    }
}

/// The notes of an earlier attempt, up to the first line that is not whole.
fn read_notes(path: &Path) -> Vec<Note> {
    let text = fs::read_to_string(path).unwrap_or_default();
    text.lines().map_while(|line| serde_json::from_str(line).ok()).collect()
}

/// Writes a file so that under its name there is all of it or nothing.
fn write_aside(
    dir: &Path,
    name: &str,
    write: impl FnOnce(&mut BufWriter<File>) -> io::Result<()>,
) -> Result<(), CheckpointError> {
    let (aside, path) = (dir.join(format!("{name}.aside")), dir.join(name));
    let all = || -> io::Result<()> {
        let mut out = BufWriter::with_capacity(1 << 20, File::create(&aside)?);
        write(&mut out)?;
        out.into_inner().map_err(io::IntoInnerError::into_error)?.sync_all()?;
        fs::rename(&aside, &path)?;
        File::open(dir)?.sync_all()
    };
    all().map_err(|e| CheckpointError::io(&path, e))
}

fn write_padded(out: &mut impl Write, bytes: &[u8]) -> io::Result<()> {
    const ZEROS: [u8; ALIGN as usize] = [0; ALIGN as usize];
    out.write_all(bytes)?;
    let rest = (bytes.len() as u64).next_multiple_of(ALIGN) as usize - bytes.len();
    out.write_all(&ZEROS[..rest])
}
