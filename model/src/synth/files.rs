//! The directory: written aside under another name, locked, synced, renamed; what a killed attempt left is cleared away.
//! Tensors are packed into safetensors files in order, a new file where the next tensor would pass the limit.

use super::tensors::{Tensor, tensors};
use super::weights::Values;
use super::{SynthError, SynthReport, SynthSpec, config, tokenizer};
use crate::disk::{FileDisk, LOCK_NAME};
use crate::kernels::DType;
use lite_llm_core::disk::Disk;
use serde_json::{Map, Value, json};
use std::fs::{self, File};
use std::io::{BufWriter, ErrorKind, Write};
use std::path::{Path, PathBuf};

/// A directory under construction; what is there is removed unless it was finished.
pub(super) struct Aside {
    dir: PathBuf,
    aside: PathBuf,
    bytes: u64,
    finished: bool,
    /// Held until the directory has its name, so that no other attempt takes it for a killed one.
    _lock: FileDisk,
}

impl Drop for Aside {
    fn drop(&mut self) {
        if !self.finished {
            // The error that led here says more than one of the removal.
            let _ = fs::remove_dir_all(&self.aside);
        }
    }
}

impl Aside {
    pub(super) fn new(dir: &Path, bytes: u64) -> Result<Self, SynthError> {
        let occupied = match fs::read_dir(dir) {
            Ok(mut entries) => entries.next().is_some(),
            Err(error) => error.kind() != ErrorKind::NotFound,
        };
        let occupied_error = || SynthError::Occupied { dir: dir.into() };
        let name = dir.file_name().filter(|_| !occupied).ok_or_else(occupied_error)?;
        let mut aside = std::ffi::OsString::from(".");
        aside.push(name);
        aside.push(".partial");
        let aside = dir.with_file_name(aside);
        match fs::create_dir(&aside) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => {
                return Err(failed(&aside, bytes, error));
            }
            _ => {}
        }
        let mut lock = FileDisk::open(&aside)?;
        let former = lock.list().and_then(|names| names.iter().try_for_each(|name| lock.remove(name)));
        former.map_err(|error| SynthError::Former { dir: aside.clone(), error })?;
        Ok(Self { dir: dir.into(), aside, bytes, finished: false, _lock: lock })
    }

    pub(super) fn write(mut self, spec: &SynthSpec) -> Result<SynthReport, SynthError> {
        let shards = shards(spec);
        let mut report = SynthReport { shards: shards.len() as u64, ..SynthReport::of(&self.dir, spec) };
        let mut weight_map = Map::new();
        for (index, shard) in shards.iter().enumerate() {
            let name = shard_name(index, shards.len());
            self.write_tensors(&name, shard, spec)?;
            for tensor in shard {
                report.tensors += 1;
                report.parameters += tensor.len();
                report.bytes += tensor.len() * spec.dtype.bytes() as u64;
                weight_map.insert(tensor.name.clone(), json!(name));
            }
        }
        assert_eq!(report.bytes, self.bytes, "the size was stated before");
        if shards.len() > 1 {
            weight_map.sort_keys();
            let index = json!({ "metadata": { "total_size": report.bytes }, "weight_map": weight_map });
            self.write_json("model.safetensors.index.json", &index)?;
        }
        self.write_configuration(spec)?;
        self.finish()?;
        Ok(report)
    }

    /// Everything but the weights.
    pub(super) fn write_companions(mut self, spec: &SynthSpec) -> Result<SynthReport, SynthError> {
        self.write_configuration(spec)?;
        self.finish()?;
        Ok(SynthReport::of(&self.dir, spec))
    }

    fn write_configuration(&self, spec: &SynthSpec) -> Result<(), SynthError> {
        self.write_json("config.json", &config::model(spec))?;
        self.write_json("generation_config.json", &config::generation(spec))?;
        if spec.has_text() {
            self.write_json("tokenizer.json", &tokenizer::tokenizer(spec))?;
            self.write_json("tokenizer_config.json", &tokenizer::tokenizer_config(spec))?;
        }
        Ok(())
    }

    fn write_tensors(&self, name: &str, shard: &[Tensor], spec: &SynthSpec) -> Result<(), SynthError> {
        self.write_file(name, |file| {
            let header = header(shard, spec.dtype);
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(header.as_bytes())?;
            for tensor in shard {
                let mut values = Values::new(spec.seed, tensor, spec.dtype);
                while let Some(bytes) = values.next() {
                    file.write_all(bytes)?;
                }
            }
            Ok(())
        })
    }

    fn write_json(&self, name: &str, value: &Value) -> Result<(), SynthError> {
        self.write_file(name, |file| {
            serde_json::to_writer_pretty(&mut *file, value)?;
            file.write_all(b"\n")
        })
    }

    fn write_file(
        &self,
        name: &str,
        fill: impl FnOnce(&mut BufWriter<File>) -> std::io::Result<()>,
    ) -> Result<(), SynthError> {
        let path = self.aside.join(name);
        let write = || {
            let mut file = BufWriter::with_capacity(1 << 20, File::create_new(&path)?);
            fill(&mut file)?;
            file.into_inner().map_err(std::io::IntoInnerError::into_error)?.sync_all()
        };
        write().map_err(|error| self.error(&path, error))
    }

    fn finish(&mut self) -> Result<(), SynthError> {
        let sync = |path: &Path| File::open(path)?.sync_all();
        let lock = self.aside.join(LOCK_NAME);
        fs::remove_file(&lock).map_err(|error| self.error(&lock, error))?;
        sync(&self.aside).map_err(|error| self.error(&self.aside, error))?;
        fs::rename(&self.aside, &self.dir).map_err(|error| match error.kind() {
            ErrorKind::DirectoryNotEmpty | ErrorKind::NotADirectory | ErrorKind::AlreadyExists => {
                SynthError::Occupied { dir: self.dir.clone() }
            }
            _ => self.error(&self.dir, error),
        })?;
        self.finished = true;
        let parent = match self.dir.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        sync(parent).map_err(|error| self.error(parent, error))
    }

    fn error(&self, path: &Path, source: std::io::Error) -> SynthError {
        failed(path, self.bytes, source)
    }
}

fn failed(path: &Path, bytes: u64, source: std::io::Error) -> SynthError {
    match source.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => SynthError::Full { path: path.into(), bytes },
        _ => SynthError::Io { path: path.into(), source },
    }
}

/// The tensors of each file, in order.
fn shards(spec: &SynthSpec) -> Vec<Vec<Tensor>> {
    let mut shards = vec![Vec::new()];
    let mut held = 0;
    for tensor in tensors(spec) {
        let bytes = tensor.len() * spec.dtype.bytes() as u64;
        if held > 0 && held + bytes > spec.shard_bytes {
            shards.push(Vec::new());
            held = 0;
        }
        held += bytes;
        shards.last_mut().expect("there is one").push(tensor);
    }
    shards
}

fn shard_name(index: usize, count: usize) -> String {
    if count == 1 {
        "model.safetensors".into()
    } else {
        format!("model-{:05}-of-{count:05}.safetensors", index + 1)
    }
}

/// The safetensors header, padded so that the data begins at a multiple of 8.
fn header(shard: &[Tensor], dtype: DType) -> String {
    let kind = match dtype {
        DType::F32 => "F32",
        DType::Bf16 => "BF16",
        DType::F16 => "F16",
    };
    let mut entries = Map::new();
    entries.insert("__metadata__".into(), json!({ "format": "pt" }));
    let mut at = 0;
    for tensor in shard {
        let end = at + tensor.len() * dtype.bytes() as u64;
        let entry = json!({ "dtype": kind, "shape": tensor.shape, "data_offsets": [at, end] });
        entries.insert(tensor.name.clone(), entry);
        at = end;
    }
    let mut text = Value::Object(entries).to_string();
    text.extend(std::iter::repeat_n(' ', text.len().next_multiple_of(8) - text.len()));
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_file_system_is_named_with_what_is_needed() {
        for kind in [ErrorKind::StorageFull, ErrorKind::QuotaExceeded] {
            let error = failed(Path::new("/d/model.safetensors"), 4096, kind.into());
            assert!(matches!(error, SynthError::Full { bytes: 4096, .. }), "{error:?}");
            assert!(error.to_string().contains("takes 4096 bytes; free some"), "{error}");
        }
    }

    #[test]
    fn a_failed_write_leaves_nothing() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let aside = Aside::new(&dir.path().join("made"), 1).expect("nothing is there");
        let error = aside.write_file("x", |_| Err(ErrorKind::StorageFull.into())).expect_err("it is full");
        assert!(matches!(error, SynthError::Full { .. }), "{error:?}");
        drop(aside);
        assert_eq!(fs::read_dir(dir.path()).expect("it is there").count(), 0);
    }
}
