//! From a Hugging Face directory to a native checkpoint.
//!
//! Everything is written into `NAME.partial` beside the target: each file aside, synced, renamed, then noted in
//! `progress.jsonl`. The manifest comes last, then the directory takes its name. Begun again after a crash, the import
//! keeps every noted file whose source is the same and whose checksums hold, and writes the rest.

use super::native::{
    ALIGN, BaseShard, BaseTensor, Blob, ExpertShard, FORMAT, MANIFEST, Manifest, dtype_name, storage_name,
};
use super::tiers::{Divided, Division};
use super::{Checkpoint, CheckpointError, Item, Tier, expert_parts};
use crate::disk::{FileDisk, LOCK_NAME};
use crate::kernels::CONTRACT_VERSION;
use crate::model::ModelError;
use crate::weights::{expert_layout, pack_expert};
use lite_llm_core::disk::{Disk, DiskError, DiskErrorKind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::path::Path;

const PROGRESS: &str = "progress.jsonl";
/// Ends the names of files that are not whole yet.
const ASIDE: &str = ".aside";
/// Bytes that are gathered before they are written.
const BUFFER_BYTES: usize = 1 << 20;
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
    Source {
        weights: String,
        tiers: Vec<Tier>,
        #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
        layers: BTreeMap<u32, Vec<Vec<u32>>>,
    },
    /// The base shard is there.
    Base(BaseShard),
    /// A layer's experts are there.
    Experts(ExpertShard),
}

/// Imports `source` into `target`, telling `progress` the bytes written so far and in all.
///
/// # Errors
/// If the source cannot be used, the tiers do not fit it, or the target exists or cannot be written.
pub fn import(
    source: &Path,
    target: &Path,
    division: Option<&Division>,
    threads: usize,
    progress: impl FnMut(u64, u64),
) -> Result<Imported, ModelError> {
    if target.exists() {
        let what = "it exists already; give a path that does not, or remove it first";
        return Err(CheckpointError::invalid(target, what).into());
    }
    let job = Job::prepare(source, division, threads)?;
    let mut name = target.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let dir = target.with_file_name(name);
    let mut disk = FileDisk::open(&dir).map_err(CheckpointError::from)?;
    let imported = job.write(&mut disk, &dir, progress)?;
    let rename = || -> io::Result<()> {
        fs::rename(&dir, target)?;
        let parent = target.parent().filter(|parent| !parent.as_os_str().is_empty());
        File::open(parent.unwrap_or(Path::new(".")))?.sync_all()
    };
    rename().map_err(|e| CheckpointError::io(target, e))?;
    // The checkpoint is whole without them, and with them.
    for name in [PROGRESS, LOCK_NAME] {
        let _ = fs::remove_file(target.join(name));
    }
    Ok(imported)
}

/// [`import`] of everything but the final name, onto any disk; `at` names it in errors.
///
/// # Errors
/// As [`import`].
pub fn import_onto<D: Disk>(
    source: &Path,
    disk: &mut D,
    at: &Path,
    division: Option<&Division>,
) -> Result<Imported, ModelError> {
    Job::prepare(source, division, 1)?.write(disk, at, |_, _| {})
}

/// A source that can be imported, and how.
struct Job {
    checkpoint: Checkpoint,
    divided: Divided,
    hashed: BTreeMap<String, (Item, [u8; 32])>,
    weights: String,
}

impl Job {
    fn prepare(source: &Path, division: Option<&Division>, threads: usize) -> Result<Self, ModelError> {
        let checkpoint = Checkpoint::open(source)?;
        if checkpoint.native().is_some() {
            let what = "it is a native checkpoint already; give the Hugging Face directory";
            return Err(CheckpointError::invalid(source, what).into());
        }
        let hashed = checkpoint.hashed(threads)?;
        let weights = checkpoint.weights_digest(threads)?.to_string();
        let divided = match division {
            None => Divided { tiers: checkpoint.tiers().to_vec(), layers: BTreeMap::new() },
            Some(division) => division
                .of(checkpoint.arch(), &weights)
                .map_err(|what| CheckpointError::invalid(source, &what))?,
        };
        let hashed = hashed.into_iter().map(|(item, hash)| (item.name.clone(), (item, hash))).collect();
        Ok(Self { checkpoint, divided, hashed, weights })
    }

    fn write<D: Disk>(
        self,
        disk: &mut D,
        at: &Path,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Imported, ModelError> {
        let total = self.hashed.values().map(|(item, _)| item.bytes).sum();
        let mut import = Import::begin(&self, disk, at)?;
        let base = import.base()?;
        progress(import.bytes, total);
        let mut shards = Vec::new();
        for layer in self.checkpoint.arch().moe_layers() {
            shards.push(import.experts(layer)?);
            progress(import.bytes, total);
        }
        let companions = import.companions()?;
        let (format, contract) = (FORMAT, CONTRACT_VERSION);
        let tiers = self.divided.tiers.clone();
        let manifest = Manifest { format, contract, companions, tiers, base, experts: shards };
        import.file(MANIFEST, manifest.to_json().as_bytes())?;
        Ok(Imported { written: import.written, kept: import.kept, bytes: import.bytes })
    }
}

struct Import<'a, D> {
    job: &'a Job,
    disk: &'a mut D,
    at: &'a Path,
    notes: Vec<Note>,
    written: usize,
    kept: usize,
    bytes: u64,
}

impl<'a, D: Disk> Import<'a, D> {
    fn begin(job: &'a Job, disk: &'a mut D, at: &'a Path) -> Result<Self, CheckpointError> {
        let mut this = Self { job, disk, at, notes: Vec::new(), written: 0, kept: 0, bytes: 0 };
        let Divided { tiers, layers } = job.divided.clone();
        let source = Note::Source { weights: job.weights.clone(), tiers, layers };
        let notes = this.read_notes();
        let same = notes
            .first()
            .is_some_and(|first| serde_json::to_value(first).ok() == serde_json::to_value(&source).ok());
        this.notes = if same { notes } else { vec![source] };
        for name in this.disk.list().map_err(|e| this.failed(e))? {
            if !same || name.ends_with(ASIDE) {
                this.disk.remove(&name).map_err(|e| this.failed(e))?;
            }
        }
        // Anew as a whole: the last line may be torn.
        let lines: String = this.notes.iter().map(line).collect();
        this.file(PROGRESS, lines.as_bytes())?;
        Ok(this)
    }

    fn failed(&self, error: DiskError) -> CheckpointError {
        CheckpointError::Disk { path: self.at.into(), error }
    }

    /// The notes of an earlier attempt, up to the first line that is not whole.
    fn read_notes(&mut self) -> Vec<Note> {
        let bytes = self.disk.len(PROGRESS).ok().and_then(|len| self.read(PROGRESS, 0, len));
        let text = String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned();
        text.lines().map_while(|line| serde_json::from_str(line).ok()).collect()
    }

    /// Exactly these bytes of a file, if they can be read.
    fn read(&mut self, file: &str, offset: u64, len: u64) -> Option<Vec<u8>> {
        // No more than the file has: what a note says is not believed.
        let end = offset.checked_add(len)?;
        self.disk.len(file).ok().filter(|&there| end <= there)?;
        let mut bytes = vec![0; usize::try_from(len).ok()?];
        let read = self.disk.read_at(file, offset, &mut bytes).ok()?;
        (read == bytes.len()).then_some(bytes)
    }

    fn note(&mut self, note: Note) -> Result<(), CheckpointError> {
        let append = self.disk.append(PROGRESS, line(&note).as_bytes());
        append.and_then(|()| self.disk.sync(PROGRESS)).map_err(|e| self.failed(e))?;
        self.notes.push(note);
        Ok(())
    }

    fn base(&mut self) -> Result<BaseShard, CheckpointError> {
        let noted = self.notes.iter().find_map(|note| match note {
            Note::Base(shard) => Some(shard.clone()),
            Note::Source { .. } | Note::Experts(_) => None,
        });
        let shard = self.base_shard();
        if noted.is_some() && self.base_holds(&shard) {
            self.kept += 1;
            self.bytes += shard.bytes;
            return Ok(shard);
        }
        let job = self.job;
        let mut aside = self.aside(&shard.file)?;
        for tensor in &shard.tensors {
            let item = &job.hashed[&tensor.canonical].0;
            let tensor = item.tensor.as_ref().expect("a source is mapped");
            aside.padded(&job.checkpoint.row_major(tensor))?;
        }
        aside.finish()?;
        self.done(shard.bytes, Note::Base(shard.clone()))?;
        Ok(shard)
    }

    /// What the base shard is to be: a function of the source.
    fn base_shard(&self) -> BaseShard {
        let mut tensors = Vec::new();
        let mut offset = 0;
        for (canonical, (item, hash)) in &self.job.hashed {
            let Some(name) = item.published.clone() else { continue };
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
        BaseShard { file: "base.bin".into(), bytes: offset, tensors }
    }

    fn base_holds(&mut self, shard: &BaseShard) -> bool {
        let job = self.job;
        self.disk.len(&shard.file).is_ok_and(|len| len == shard.bytes)
            && shard.tensors.iter().all(|tensor| {
                let (item, hash) = &job.hashed[&tensor.canonical];
                let bytes = self.read(&shard.file, tensor.offset, item.bytes);
                bytes.is_some_and(|bytes| blake3::hash(&bytes).as_bytes() == hash)
            })
    }

    fn experts(&mut self, layer: u32) -> Result<ExpertShard, ModelError> {
        let noted = self.notes.iter().find_map(|note| match note {
            Note::Experts(shard) if shard.layer == layer => Some(shard.clone()),
            Note::Source { .. } | Note::Base(_) | Note::Experts(_) => None,
        });
        let job = self.job;
        let layout = expert_layout(&job.checkpoint)?.expect("a mixture layer has experts");
        let blob_bytes = layout.bytes();
        let parts = expert_parts(job.checkpoint.arch().moe.as_ref().expect("it has experts"), layout.hidden);
        if let Some(shard) = noted.filter(|shard| self.experts_hold(shard, blob_bytes as u64)) {
            self.kept += 1;
            self.bytes += shard.bytes;
            return Ok(shard);
        }
        let count = job.checkpoint.arch().moe.as_ref().map_or(0, |moe| moe.experts);
        let mut shard = ExpertShard {
            file: format!("experts-{layer:05}.bin"),
            bytes: 0,
            layer,
            version: 0,
            dtypes: layout.storages.iter().map(|&storage| storage_name(storage).into()).collect(),
            tiers: job.divided.layers.get(&layer).cloned().unwrap_or_default(),
            blobs: Vec::new(),
        };
        let mut blob = vec![0; blob_bytes];
        let mut aside = self.aside(&shard.file)?;
        for ordinal in 0..count {
            let gated = job.checkpoint.expert(layer as usize, ordinal)?;
            pack_expert(&job.checkpoint, &gated, &layout, &mut blob);
            aside.padded(&blob)?;
            let hash = |part: &str| {
                let name = format!("model.layers.{layer}.experts.{ordinal}.{part}");
                blake3::Hash::from_bytes(job.hashed[&name].1).to_hex().to_string()
            };
            let blake3 = parts.iter().map(|part| hash(part.name)).collect();
            shard.blobs.push(Blob { offset: shard.bytes, crc32: crc32fast::hash(&blob), blake3 });
            shard.bytes += (blob.len() as u64).next_multiple_of(ALIGN);
        }
        aside.finish()?;
        self.done(shard.bytes, Note::Experts(shard.clone()))?;
        Ok(shard)
    }

    fn experts_hold(&mut self, shard: &ExpertShard, blob_bytes: u64) -> bool {
        self.disk.len(&shard.file).is_ok_and(|len| len == shard.bytes)
            && shard.blobs.iter().all(|blob| {
                let bytes = self.read(&shard.file, blob.offset, blob_bytes);
                bytes.is_some_and(|bytes| crc32fast::hash(&bytes) == blob.crc32)
            })
    }

    fn done(&mut self, bytes: u64, note: Note) -> Result<(), CheckpointError> {
        self.written += 1;
        self.bytes += bytes;
        self.note(note)
    }

    /// Copies the files that go along, and hashes them.
    fn companions(&mut self) -> Result<BTreeMap<String, String>, CheckpointError> {
        let mut companions = BTreeMap::new();
        for name in COMPANIONS {
            let path = self.job.checkpoint.dir().join(name);
            if path.exists() {
                let bytes = crate::files::read(&path).map_err(|e| CheckpointError::io(&path, e))?;
                companions.insert(name.into(), blake3::hash(&bytes).to_hex().to_string());
                self.file(name, &bytes)?;
            }
        }
        Ok(companions)
    }

    fn file(&mut self, name: &str, bytes: &[u8]) -> Result<(), CheckpointError> {
        let mut aside = self.aside(name)?;
        aside.put(bytes)?;
        aside.finish()
    }

    fn aside(&mut self, name: &str) -> Result<Aside<'_, D>, CheckpointError> {
        let aside = format!("{name}{ASIDE}");
        match self.disk.remove(&aside) {
            Err(error) if error.kind != DiskErrorKind::NotFound => return Err(self.failed(error)),
            _ => {}
        }
        self.disk.create_new(&aside).map_err(|e| self.failed(e))?;
        Ok(Aside { disk: self.disk, at: self.at, name: name.into(), buffer: Vec::new() })
    }
}

/// A note as a line of the progress file.
fn line(note: &Note) -> String {
    let mut line = serde_json::to_string(note).expect("a note is plain data");
    line.push('\n');
    line
}

/// A file that under its name is there as a whole, or not at all.
struct Aside<'d, D> {
    disk: &'d mut D,
    at: &'d Path,
    name: String,
    buffer: Vec<u8>,
}

impl<D: Disk> Aside<'_, D> {
    fn put(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        self.buffer.extend_from_slice(bytes);
        if self.buffer.len() >= BUFFER_BYTES { self.flush() } else { Ok(()) }
    }

    fn padded(&mut self, bytes: &[u8]) -> Result<(), CheckpointError> {
        const ZEROS: [u8; ALIGN as usize] = [0; ALIGN as usize];
        self.put(bytes)?;
        let rest = (bytes.len() as u64).next_multiple_of(ALIGN) as usize - bytes.len();
        self.put(&ZEROS[..rest])
    }

    fn flush(&mut self) -> Result<(), CheckpointError> {
        let append = self.disk.append(&format!("{}{ASIDE}", self.name), &self.buffer);
        self.buffer.clear();
        append.map_err(|error| CheckpointError::Disk { path: self.at.into(), error })
    }

    fn finish(mut self) -> Result<(), CheckpointError> {
        self.flush()?;
        let aside = format!("{}{ASIDE}", self.name);
        let Self { disk, at, name, .. } = self;
        let named = disk.sync(&aside).and_then(|()| disk.rename(&aside, &name));
        named.and_then(|()| disk.sync_dir()).map_err(|error| CheckpointError::Disk { path: at.into(), error })
    }
}
