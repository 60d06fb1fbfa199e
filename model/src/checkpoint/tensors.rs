//! The tensors of a Hugging Face directory: one `model.safetensors`, or shards with an index. Headers are checked
//! before anything is believed; the bytes are mapped, never copied here.

use super::CheckpointError;
use crate::kernels::DType;
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::path::{Path, PathBuf};

const ONE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes that are hashed before their memory is given back.
const HASH_BYTES: usize = 4 << 20;
const PAGE_BYTES: usize = 4096;

/// Where a tensor's bytes are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    file: usize,
    start: usize,
    end: usize,
    /// Storage type.
    pub dtype: DType,
    /// Sizes, slowest first.
    pub shape: Vec<usize>,
}

impl Tensor {
    /// A stretch of equal parts along the first dimension, with another shape.
    pub(super) fn part(&self, index: usize, of: usize, shape: Vec<usize>) -> Self {
        let size = (self.end - self.start) / of;
        let start = self.start + index * size;
        Self { start, end: start + size, shape, ..self.clone() }
    }

    /// Its size.
    pub fn bytes_len(&self) -> usize {
        self.end - self.start
    }
}

/// The mapped files.
#[derive(Debug)]
pub struct TensorFiles {
    files: Vec<(PathBuf, Mmap)>,
    tensors: BTreeMap<String, Tensor>,
}

impl TensorFiles {
    /// Opens whichever form the directory has.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let index = dir.join(INDEX);
        let names: BTreeSet<String> =
            if index.exists() { shards(&index)? } else { BTreeSet::from([ONE.to_owned()]) };
        let mut this = Self { files: Vec::new(), tensors: BTreeMap::new() };
        for name in names {
            this.add(&dir.join(name))?;
        }
        Ok(this)
    }

    /// No files yet.
    pub(super) fn empty() -> Self {
        Self { files: Vec::new(), tensors: BTreeMap::new() }
    }

    /// Maps a file whose tensors are listed elsewhere: name, type, shape, offset. Each is checked against the file.
    pub(super) fn map(
        &mut self,
        path: &Path,
        listed: impl IntoIterator<Item = (String, DType, Vec<usize>, u64)>,
    ) -> Result<(), CheckpointError> {
        let map = map_file(path)?;
        let file = self.files.len();
        for (name, dtype, shape, offset) in listed {
            let values = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
            let bytes = values.and_then(|values| values.checked_mul(dtype.bytes()));
            let start = usize::try_from(offset).ok();
            let end = start.zip(bytes).and_then(|(start, bytes)| start.checked_add(bytes));
            let (Some(start), Some(end)) = (start, end.filter(|&end| end <= map.len())) else {
                let what =
                    format!("tensor {name} is beyond the end of the file: the file is cut, import it again");
                return Err(CheckpointError::invalid(path, &what));
            };
            self.tensors.insert(name, Tensor { file, start, end, dtype, shape });
        }
        self.files.push((path.to_owned(), map));
        Ok(())
    }

    fn add(&mut self, path: &Path) -> Result<(), CheckpointError> {
        let map = map_file(path)?;
        let (header, metadata) = SafeTensors::read_metadata(&map).map_err(|e| {
            CheckpointError::invalid(path, &format!("its header is no safetensors header ({e})"))
        })?;
        let begin = 8 + header;
        let index = self.files.len();
        for (name, tensor) in tensors_of(path, &metadata, index, begin, map.len())? {
            if self.tensors.insert(name.clone(), tensor).is_some() {
                return Err(CheckpointError::invalid(path, &format!("tensor {name} is in two files")));
            }
        }
        self.files.push((path.to_owned(), map));
        Ok(())
    }

    /// A tensor by its name.
    pub fn find(&self, name: &str) -> Option<&Tensor> {
        self.tensors.get(name)
    }

    /// The bytes of a tensor.
    pub fn bytes(&self, tensor: &Tensor) -> &[u8] {
        &self.files[tensor.file].1[tensor.start..tensor.end]
    }

    /// The BLAKE3 of a tensor's bytes, which take no more memory than a few megabytes while they are read.
    pub fn hash(&self, tensor: &Tensor) -> [u8; 32] {
        let map = &self.files[tensor.file].1;
        let mut hasher = blake3::Hasher::new();
        for start in (tensor.start..tensor.end).step_by(HASH_BYTES) {
            let end = tensor.end.min(start + HASH_BYTES);
            hasher.update(&map[start..end]);
            forget(map, start, end);
        }
        *hasher.finalize().as_bytes()
    }

    /// Gives back the memory that reading a tensor took: it would count against the process until others want it.
    pub fn forget(&self, tensor: &Tensor) {
        forget(&self.files[tensor.file].1, tensor.start, tensor.end);
    }

    /// The first file, to name in an error about a tensor that is in none.
    pub fn path(&self) -> &Path {
        &self.files[0].0
    }
}

/// Drops the pages that lie wholly within a range.
fn forget(map: &Mmap, start: usize, end: usize) {
    let (start, end) = (start.next_multiple_of(PAGE_BYTES), end / PAGE_BYTES * PAGE_BYTES);
    if start < end {
        // SAFETY: the map is of a file, is only read and was never written: a page that is dropped is read from the
        // file again when it is next looked at, with the same bytes.
        let advised = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        // A system that keeps the pages wastes memory, and computes the same.
        let _ = advised;
    }
}

fn map_file(path: &Path) -> Result<Mmap, CheckpointError> {
    let file = File::open(path).map_err(|e| CheckpointError::io(path, e))?;
    // SAFETY: the map is only read. Whoever changes a checkpoint's file under a running engine breaks the documented
    // rule that checkpoints are immutable; the digest at start then no longer covers what is read.
    unsafe { Mmap::map(&file) }.map_err(|e| CheckpointError::io(path, e))
}

fn tensors_of(
    path: &Path,
    metadata: &Metadata,
    file: usize,
    begin: usize,
    len: usize,
) -> Result<Vec<(String, Tensor)>, CheckpointError> {
    let mut tensors = Vec::new();
    for (name, info) in metadata.tensors() {
        let dtype = match info.dtype {
            Dtype::F32 => DType::F32,
            Dtype::BF16 => DType::Bf16,
            Dtype::F16 => DType::F16,
            // Other types may belong to tensors that nobody asks for; who asks is told that it is missing.
            _ => continue,
        };
        let (start, end) = (begin + info.data_offsets.0, begin + info.data_offsets.1);
        let values = info.shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
        let bytes = values.and_then(|values| values.checked_mul(dtype.bytes()));
        if end > len || start > end || bytes != Some(end - start) {
            let what =
                format!("tensor {name} does not fit its shape or the file: the file is cut or damaged");
            return Err(CheckpointError::invalid(path, &what));
        }
        tensors.push((name, Tensor { file, start, end, dtype, shape: info.shape.clone() }));
    }
    Ok(tensors)
}

/// The files that an index names, all of them beside it.
fn shards(index: &Path) -> Result<BTreeSet<String>, CheckpointError> {
    let text = std::fs::read(index).map_err(|e| CheckpointError::io(index, e))?;
    let json: serde_json::Value = serde_json::from_slice(&text)
        .map_err(|e| CheckpointError::invalid(index, &format!("it is not JSON: {e}")))?;
    let map = json.get("weight_map").and_then(serde_json::Value::as_object);
    let map = map.ok_or_else(|| CheckpointError::invalid(index, "weight_map is missing"))?;
    let mut names = BTreeSet::new();
    for name in map.values() {
        let name = name.as_str().filter(|name| !name.contains(['/', '\\']) && !name.is_empty());
        let name = name.ok_or_else(|| CheckpointError::invalid(index, "weight_map names no plain file"))?;
        names.insert(name.to_owned());
    }
    if names.is_empty() {
        return Err(CheckpointError::invalid(index, "weight_map is empty"));
    }
    Ok(names)
}
