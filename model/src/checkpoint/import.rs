//! From a Hugging Face directory to a native checkpoint.
//!
//! Everything is written into `NAME.partial` beside the target: each file aside, synced, renamed, then noted in
//! `progress.jsonl`. The manifest comes last, then the directory takes its name. Begun again after a crash, the import
//! keeps every noted file whose source is the same and whose checksums hold, and writes the rest.
//!
//! Where matrices are quantised, tensors pass in pieces, and an expert at a time is in memory; that of a checkpoint without
//! files is made when it is written.

use super::native::{
    ALIGN, BaseShard, BaseTensor, Blob, ExpertShard, FORMAT, MANIFEST, Manifest, storage_name,
};
use super::tiers::{Divided, Division};
use super::{Checkpoint, CheckpointError, Item, Tier, expert_parts, quantised};
use crate::disk::{FileDisk, LOCK_NAME};
use crate::kernels::{CONTRACT_VERSION, Quantised, Storage, pack_groups};
use crate::model::ModelError;
use crate::weights::{ExpertLayout, expert_layout, pack_biases, pack_expert};
use lite_llm_core::disk::{Disk, DiskError, DiskErrorKind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
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
        #[serde(default, skip_serializing_if = "Option::is_none")]
        quantise: Option<String>,
    },
    /// The base shard is there.
    Base(BaseShard),
    /// A layer's experts are there.
    Experts(ExpertShard),
}

/// What is to become of the weights.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted<'a> {
    /// The tiers of experts; as the source has them if `None`.
    pub division: Option<&'a Division>,
    /// The integers that matrices are quantised to; as published if `None`.
    pub quantise: Option<Quantised>,
    /// The directory of configuration and tokenizer of a source that is a GGUF file; its own if `None`.
    pub with: Option<&'a Path>,
}

impl<'a> From<Option<&'a Division>> for Wanted<'a> {
    fn from(division: Option<&'a Division>) -> Self {
        Self { division, ..Self::default() }
    }
}

/// Imports `source` into `target`, telling `progress` the bytes written so far and in all.
///
/// # Errors
/// If the source cannot be used, the tiers do not fit it, or the target exists or cannot be written.
pub fn import<'a>(
    source: &Path,
    target: &Path,
    wanted: impl Into<Wanted<'a>>,
    threads: usize,
    progress: impl FnMut(u64, u64),
) -> Result<Imported, ModelError> {
    refuse_existing(target)?;
    let wanted = wanted.into();
    import_opened(Checkpoint::open_source(source, wanted.with)?, target, wanted, threads, progress)
}

fn refuse_existing(target: &Path) -> Result<(), CheckpointError> {
    if target.exists() {
        let what = "it exists already; give a path that does not, or remove it first";
        return Err(CheckpointError::invalid(target, what));
    }
    Ok(())
}

/// [`import`] of a checkpoint that is open, or has no files.
pub(crate) fn import_opened(
    source: Checkpoint,
    target: &Path,
    wanted: Wanted<'_>,
    threads: usize,
    progress: impl FnMut(u64, u64),
) -> Result<Imported, ModelError> {
    refuse_existing(target)?;
    let job = Job::prepare(source, wanted, threads)?;
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
pub fn import_onto<'a, D: Disk>(
    source: &Path,
    disk: &mut D,
    at: &Path,
    wanted: impl Into<Wanted<'a>>,
) -> Result<Imported, ModelError> {
    let wanted = wanted.into();
    Job::prepare(Checkpoint::open_source(source, wanted.with)?, wanted, 1)?.write(disk, at, |_, _| {})
}

/// A source that can be imported, and how.
struct Job {
    checkpoint: Checkpoint,
    divided: Divided,
    /// By canonical name. Those that are quantised, or made, are hashed when they are written.
    items: BTreeMap<String, Item>,
    /// Of the source.
    weights: String,
    quantise: Option<Quantised>,
    threads: usize,
}

impl Job {
    fn prepare(checkpoint: Checkpoint, wanted: Wanted<'_>, threads: usize) -> Result<Self, ModelError> {
        let Wanted { division, quantise, .. } = wanted;
        if checkpoint.native().is_some() {
            let what = "it is a native checkpoint already; give the Hugging Face directory";
            return Err(CheckpointError::invalid(checkpoint.dir(), what).into());
        }
        if let Some(kind) = quantise {
            quantised::check(&checkpoint, kind)?;
        }
        let items: Vec<Item> = match quantise {
            Some(_) => checkpoint.inventory()?,
            None => {
                let hashed = checkpoint.hashed(threads)?.into_iter();
                hashed.map(|(item, hash)| Item { hash: Some(hash), ..item }).collect()
            }
        };
        items.iter().try_for_each(|item| quantised::check_scales(&checkpoint, item))?;
        let weights = match checkpoint.files.identity_of_made() {
            Some(identity) => identity,
            None => checkpoint.weights_digest(threads)?.to_string(),
        };
        let divided = match division {
            None => Divided { tiers: checkpoint.tiers().to_vec(), layers: BTreeMap::new() },
            Some(division) => division
                .of(checkpoint.arch(), &weights)
                .map_err(|what| CheckpointError::invalid(checkpoint.dir(), &what))?,
        };
        let items = items.into_iter().map(|item| (item.name.clone(), item)).collect();
        Ok(Self { checkpoint, divided, items, weights, quantise, threads })
    }

    /// How the parts of an expert are to lie in a blob.
    fn layout(&self) -> Result<ExpertLayout, ModelError> {
        let published = expert_layout(&self.checkpoint)?.expect("a mixture layer has experts");
        let Some(kind) = self.quantise else { return Ok(published) };
        let mut storages = published.storages;
        storages[..3].fill(Storage::Grouped(kind));
        let too_large = ModelError::Memory { what: "an expert", bytes: u64::MAX };
        ExpertLayout::new(&storages, self.checkpoint.arch()).ok_or(too_large)
    }

    /// Some experts, each made on a thread of its own.
    fn experts(&self, layer: u32, ordinals: Range<usize>, layout: &ExpertLayout) -> Vec<Made> {
        if ordinals.len() == 1 {
            return vec![self.expert(layer, ordinals.start, layout)];
        }
        std::thread::scope(|scope| {
            let made = ordinals.map(|ordinal| scope.spawn(move || self.expert(layer, ordinal, layout)));
            let made: Vec<_> = made.collect();
            made.into_iter().map(|made| made.join().expect("no thread panicked")).collect()
        })
    }

    /// An expert as a blob, and the BLAKE3 of each of its parts.
    fn expert(&self, layer: u32, ordinal: usize, layout: &ExpertLayout) -> Made {
        let mut blob = vec![0; layout.bytes()];
        let moe = self.checkpoint.arch().moe.as_ref().expect("it has experts");
        let names = expert_parts(moe, layout.hidden).into_iter().map(|part| part.name);
        let items: Vec<&Item> = names
            .map(|part| &self.items[&format!("model.layers.{layer}.experts.{ordinal}.{part}")])
            .collect();
        let gated = self.checkpoint.expert(layer as usize, ordinal)?;
        if self.quantise.is_none() {
            pack_expert(&self.checkpoint, &gated, layout, &mut blob);
            let hash = |item: &&Item| item.hash.expect("what is not quantised was hashed before");
            return Ok((blob, items.iter().map(|item| hex(&hash(item))).collect()));
        }
        let mut hashes = Vec::new();
        let mut rest = &mut blob[..];
        for (i, item) in items.iter().enumerate() {
            let mut stored = Vec::new();
            quantised::put_stored(&self.checkpoint, item, self.quantise, &mut |piece| {
                stored.extend_from_slice(piece);
                Ok(())
            })?;
            hashes.push(blake3::hash(&stored).to_hex().to_string());
            if let (Storage::Grouped(kind), &[outputs, inputs]) = (layout.storages[i], &item.shape[..]) {
                let into = rest.split_off_mut(..layout.matrix_bytes(i)).expect("room for every part");
                pack_groups(kind, outputs, inputs, &stored, into);
            }
        }
        pack_biases(&self.checkpoint, &gated, rest);
        Ok((blob, hashes))
    }

    fn write<D: Disk>(
        self,
        disk: &mut D,
        at: &Path,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Imported, ModelError> {
        let total = self.items.values().map(|item| quantised::stored_bytes(item, self.quantise)).sum();
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

/// An expert as a blob and the BLAKE3 of each of its parts, in hexadecimal.
type Made = Result<(Vec<u8>, Vec<String>), CheckpointError>;

fn hex(hash: &[u8; 32]) -> String {
    blake3::Hash::from_bytes(*hash).to_hex().to_string()
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
        let quantise = job.quantise.map(|kind| kind.name().into());
        let source = Note::Source { weights: job.weights.clone(), tiers, layers, quantise };
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

    /// The notes of an earlier attempt, up to the first line that is torn or damaged.
    fn read_notes(&mut self) -> Vec<Note> {
        let bytes = self.disk.len(PROGRESS).ok().and_then(|len| self.read(PROGRESS, 0, len));
        let text = String::from_utf8_lossy(&bytes.unwrap_or_default()).into_owned();
        text.lines().map_while(note_of).collect()
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
        let job = self.job;
        let mut shard = self.base_shard();
        if let Some(noted) = noted.filter(|noted| self.base_holds(&shard, noted)) {
            self.kept += 1;
            self.bytes += noted.bytes;
            return Ok(noted);
        }
        let mut aside = self.aside(&shard.file)?;
        for tensor in &mut shard.tensors {
            let mut hasher = blake3::Hasher::new();
            quantised::put_stored(
                &job.checkpoint,
                &job.items[&tensor.canonical],
                job.quantise,
                &mut |piece| {
                    hasher.update(piece);
                    aside.put(piece)
                },
            )?;
            aside.pad(hasher.count())?;
            tensor.blake3 = hasher.finalize().to_hex().to_string();
        }
        aside.finish()?;
        self.done(shard.bytes, Note::Base(shard.clone()))?;
        Ok(shard)
    }

    /// What the base shard is to be, a function of the source, but for hashes that nobody knows yet.
    fn base_shard(&self) -> BaseShard {
        let mut tensors = Vec::new();
        let mut offset = 0;
        for (canonical, item) in &self.job.items {
            let Some(name) = item.published.clone() else { continue };
            tensors.push(BaseTensor {
                name,
                canonical: canonical.clone(),
                dtype: storage_name(quantised::storage(item, self.job.quantise)).into(),
                shape: item.shape.clone(),
                offset,
                blake3: item.hash.map(|hash| hex(&hash)).unwrap_or_default(),
            });
            offset += quantised::stored_bytes(item, self.job.quantise).next_multiple_of(ALIGN);
        }
        BaseShard { file: "base.bin".into(), bytes: offset, tensors }
    }

    /// Whether a noted base shard is the one that is to be, and there.
    fn base_holds(&mut self, shard: &BaseShard, noted: &BaseShard) -> bool {
        let job = self.job;
        let same = |a: &BaseTensor, b: &BaseTensor| {
            (&a.canonical, &a.dtype, &a.shape, a.offset) == (&b.canonical, &b.dtype, &b.shape, b.offset)
                && (a.blake3.is_empty() || a.blake3 == b.blake3)
        };
        shard.tensors.len() == noted.tensors.len()
            && shard.bytes == noted.bytes
            && self.disk.len(&shard.file).is_ok_and(|len| len == shard.bytes)
            && shard.tensors.iter().zip(&noted.tensors).all(|(tensor, noted)| {
                let len = quantised::stored_bytes(&job.items[&tensor.canonical], job.quantise);
                let bytes = self.read(&shard.file, tensor.offset, len);
                same(tensor, noted)
                    && bytes.is_some_and(|bytes| blake3::hash(&bytes).to_hex().as_str() == noted.blake3)
            })
    }

    fn experts(&mut self, layer: u32) -> Result<ExpertShard, ModelError> {
        let noted = self.notes.iter().find_map(|note| match note {
            Note::Experts(shard) if shard.layer == layer => Some(shard.clone()),
            Note::Source { .. } | Note::Base(_) | Note::Experts(_) => None,
        });
        let job = self.job;
        let layout = job.layout()?;
        let blob_bytes = layout.bytes();
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
        let mut aside = self.aside(&shard.file)?;
        for first in (0..count).step_by(job.threads.max(1)) {
            for made in job.experts(layer, first..count.min(first + job.threads.max(1)), &layout) {
                let (blob, blake3) = made?;
                aside.padded(&blob)?;
                shard.blobs.push(Blob { offset: shard.bytes, crc32: crc32fast::hash(&blob), blake3 });
                shard.bytes += (blob.len() as u64).next_multiple_of(ALIGN);
            }
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

/// A note as a line of the progress file: its checksum, then itself. Hashes that it holds may be known to nobody else.
fn line(note: &Note) -> String {
    let json = serde_json::to_string(note).expect("a note is plain data");
    format!("{} {json}\n", blake3::hash(json.as_bytes()).to_hex())
}

/// The note of a line, if the line is whole.
fn note_of(line: &str) -> Option<Note> {
    let (checksum, json) = line.split_once(' ')?;
    (blake3::hash(json.as_bytes()).to_hex().as_str() == checksum)
        .then(|| serde_json::from_str(json).ok())
        .flatten()
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
        self.put(bytes)?;
        self.pad(bytes.len() as u64)
    }

    /// Pads after so many bytes.
    fn pad(&mut self, bytes: u64) -> Result<(), CheckpointError> {
        const ZEROS: [u8; ALIGN as usize] = [0; ALIGN as usize];
        let rest = bytes.next_multiple_of(ALIGN) - bytes;
        self.put(&ZEROS[..rest as usize])
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
