//! The tensors of a Hugging Face directory: one `model.safetensors`, or shards with an index. Headers are checked
//! before anything is believed; the bytes are mapped, never copied here.

use super::CheckpointError;
use super::encoded::{self, Form, MXFP4_GROUP};
use crate::kernels::packed::E4M3_BLOCK;
use crate::kernels::{DType, Storage, pack, pack_e4m3, pack_groups, pack_mxfp4, packed_len};
use memmap2::{Mmap, UncheckedAdvice};
use safetensors::tensor::{Dtype, Metadata, SafeTensors};
use std::borrow::Cow;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const ONE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
/// Bytes that are hashed before their memory is given back.
const HASH_BYTES: usize = 4 << 20;
/// What the system maps at once when a page is read, at most: a large page.
const MAPPED_AROUND_BYTES: usize = 2 << 20;

/// Some bytes of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    file: usize,
    start: usize,
    end: usize,
}

/// Where a tensor's bytes are, and how they lie there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    span: Span,
    form: Form,
    /// Storage type; of a quantised tensor that of its decoded values.
    pub dtype: DType,
    /// Sizes, slowest first.
    pub shape: Vec<usize>,
}

impl Tensor {
    /// A stretch of equal parts along the first dimension, with another shape.
    pub(super) fn part(&self, index: usize, of: usize, shape: Vec<usize>) -> Self {
        Self { span: self.span.part(index, of), shape, ..self.clone() }
    }

    /// A matrix within it, or a column of such, whose rows and columns are that many values apart.
    pub(super) fn strided(&self, first: usize, row: usize, column: usize, shape: Vec<usize>) -> Self {
        Self { form: Form::Strided { first, row, column }, shape, ..self.clone() }
    }

    /// Whether its bytes are in the file as they are used.
    pub(super) fn is_plain(&self) -> bool {
        self.form == Form::Plain
    }

    /// Whether its bytes are in the file as they are used, those of integers among them.
    pub(super) fn is_stored(&self) -> bool {
        matches!(self.form, Form::Plain | Form::Groups(_))
    }

    /// How its values are stored in a slot: quantised ones stay so.
    pub(crate) fn storage(&self) -> Storage {
        match self.form {
            Form::Mxfp4 { .. } => Storage::Mxfp4,
            Form::Fp8 { side: E4M3_BLOCK, .. } => Storage::E4m3,
            Form::Groups(kind) | Form::Reordered { kind: Some(kind), .. } => Storage::Grouped(kind),
            Form::Reordered { kind: None, .. } => Storage::Plain(self.dtype),
            Form::Plain | Form::Strided { .. } | Form::Fp8 { .. } | Form::Made(_) => {
                Storage::Plain(self.dtype)
            }
        }
    }

    /// Bytes of its values, row-major: those of integers with their scales, others decoded.
    pub fn bytes_len(&self) -> usize {
        match self.storage() {
            Storage::Grouped(kind) => self.shape[0] * kind.row_bytes(self.shape[1]),
            _ => self.shape.iter().product::<usize>() * self.dtype.bytes(),
        }
    }
}

impl Span {
    fn part(self, index: usize, of: usize) -> Self {
        let size = (self.end - self.start) / of;
        let start = self.start + index * size;
        Self { start, end: start + size, ..self }
    }
}

/// A tensor of bytes that mean numbers only with others.
#[derive(Clone, Debug)]
struct Quantised {
    span: Span,
    kind: Dtype,
    shape: Vec<usize>,
}

/// A tensor that was found in a file.
pub(super) struct Listed {
    pub(super) name: String,
    pub(super) form: Form,
    pub(super) dtype: DType,
    pub(super) shape: Vec<usize>,
    pub(super) start: usize,
    pub(super) bytes: usize,
}

/// Makes tensors that are in no file, each time they are read.
pub(crate) trait Maker: std::fmt::Debug + Send + Sync {
    /// Gives out the row-major bytes of a tensor, piece by piece.
    fn make(&self, index: usize, put: &mut dyn FnMut(&[u8]));

    /// What they are a function of: others of the same identity are the same.
    fn identity(&self) -> String;
}

/// The mapped files.
#[derive(Debug)]
pub struct TensorFiles {
    files: Vec<(PathBuf, Mmap)>,
    tensors: BTreeMap<String, Tensor>,
    quantised: BTreeMap<String, Quantised>,
    maker: Option<Box<dyn Maker>>,
}

impl TensorFiles {
    /// Opens whichever form the directory has.
    pub fn open(dir: &Path) -> Result<Self, CheckpointError> {
        let index = dir.join(INDEX);
        let names: BTreeSet<String> =
            if index.exists() { shards(&index)? } else { BTreeSet::from([ONE.to_owned()]) };
        let mut this = Self::empty();
        for name in names {
            this.add(&dir.join(name))?;
        }
        Ok(this)
    }

    /// No files yet.
    pub(super) fn empty() -> Self {
        Self { files: Vec::new(), tensors: BTreeMap::new(), quantised: BTreeMap::new(), maker: None }
    }

    /// A mapped file whose tensors were found in it. Each is checked against its length.
    pub(super) fn of_map(
        path: &Path,
        map: Mmap,
        listed: impl IntoIterator<Item = Listed>,
    ) -> Result<Self, CheckpointError> {
        let mut this = Self::empty();
        for Listed { name, form, dtype, shape, start, bytes } in listed {
            let end = start.checked_add(bytes).filter(|&end| end <= map.len());
            let tensor = end.map(|end| Tensor {
                span: Span { file: 0, start, end },
                form,
                dtype,
                shape: shape.clone(),
            });
            let Some(tensor) =
                tensor.filter(|tensor| tensor.shape.len() == 2 || tensor.storage().grouped().is_none())
            else {
                let what = format!(
                    "tensor {name} is beyond the end of the file, or no matrix: the file is cut or damaged"
                );
                return Err(CheckpointError::invalid(path, &what));
            };
            if this.tensors.insert(name.clone(), tensor).is_some() {
                return Err(CheckpointError::invalid(path, &format!("tensor {name} is there twice")));
            }
        }
        this.files.push((path.to_owned(), map));
        Ok(this)
    }

    /// Finds a scale that is none among those of a matrix of integers: its first row.
    pub(super) fn row_without_scale(&self, tensor: &Tensor) -> Option<usize> {
        let kind = tensor.storage().grouped()?;
        let rows = self.span(tensor.span).chunks_exact(kind.row_bytes(tensor.shape[1]).max(1));
        let none = |block: &[u8]| block[1] & 0x7c == 0x7c;
        rows.into_iter().position(|row| row.chunks_exact(kind.group_bytes()).any(none))
    }

    /// Tensors that are made, in the order of their numbers.
    pub(crate) fn made(
        maker: Box<dyn Maker>,
        listed: impl IntoIterator<Item = (String, DType, Vec<usize>)>,
    ) -> Self {
        let mut this = Self::empty();
        for (index, (name, dtype, shape)) in listed.into_iter().enumerate() {
            // No two have the same place.
            let span = Span { file: index, start: 0, end: 1 };
            this.tensors.insert(name, Tensor { span, form: Form::Made(index), dtype, shape });
        }
        this.maker = Some(maker);
        this
    }

    /// What made tensors are a function of.
    pub(crate) fn identity_of_made(&self) -> Option<String> {
        self.maker.as_ref().map(|maker| maker.identity())
    }

    /// Maps a file whose tensors are listed elsewhere: name, type, shape, offset. Each is checked against the file.
    pub(super) fn map(
        &mut self,
        path: &Path,
        listed: impl IntoIterator<Item = (String, Storage, Vec<usize>, u64)>,
    ) -> Result<(), CheckpointError> {
        let map = map_file(path)?;
        let file = self.files.len();
        for (name, storage, shape, offset) in listed {
            let (form, bytes) = match storage {
                Storage::Grouped(kind) => (Form::Groups(kind), bytes_of_groups(kind, &shape)),
                _ => {
                    let values = shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
                    (Form::Plain, values.and_then(|values| values.checked_mul(storage.dtype().bytes())))
                }
            };
            let start = usize::try_from(offset).ok();
            let end = start.zip(bytes).and_then(|(start, bytes)| start.checked_add(bytes));
            let (Some(start), Some(end)) = (start, end.filter(|&end| end <= map.len())) else {
                let what =
                    format!("tensor {name} is beyond the end of the file: the file is cut, import it again");
                return Err(CheckpointError::invalid(path, &what));
            };
            let span = Span { file, start, end };
            self.tensors.insert(name, Tensor { span, form, dtype: storage.dtype(), shape });
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
        for (name, stored) in tensors_of(path, &metadata, index, begin, map.len())? {
            let twice = match stored {
                Stored::Floats(tensor) => self.tensors.insert(name.clone(), tensor).is_some(),
                Stored::Bytes(bytes) => self.quantised.insert(name.clone(), bytes).is_some(),
            };
            if twice {
                return Err(CheckpointError::invalid(path, &format!("tensor {name} is in two files")));
            }
        }
        self.files.push((path.to_owned(), map));
        Ok(())
    }

    /// A tensor by its name: of floats, or of E4M3 bytes with their scales beside them.
    pub fn find(&self, name: &str) -> Option<Tensor> {
        if let Some(tensor) = self.tensors.get(name) {
            return Some(tensor.clone());
        }
        let stored = self.quantised.get(name).filter(|stored| stored.kind == Dtype::F8_E4M3)?;
        let scales = self.tensors.get(&format!("{name}_scale_inv"))?;
        let (&[rows, columns], &[down, across]) = (&stored.shape[..], &scales.shape[..]) else { return None };
        let fits = (rows.div_ceil(E4M3_BLOCK), columns.div_ceil(E4M3_BLOCK)) == (down, across);
        let form = Form::Fp8 { scales: scales.span, side: E4M3_BLOCK };
        (fits && scales.dtype == DType::F32 && scales.is_plain()).then(|| Tensor {
            span: stored.span,
            form,
            dtype: DType::F32,
            shape: stored.shape.clone(),
        })
    }

    /// An expert's matrix of MXFP4 blocks: of `NAME_blocks` and `NAME_scales`, `[experts, rows, blocks]`, the rows from
    /// `first` on that are `step` apart.
    pub(super) fn mxfp4(&self, name: &str, expert: usize, first: usize, step: usize) -> Option<Tensor> {
        let blocks = self.quantised.get(&format!("{name}_blocks"))?;
        let scales = self.quantised.get(&format!("{name}_scales"))?;
        let &[experts, rows, groups, bytes] = &blocks.shape[..] else { return None };
        let fits = bytes == MXFP4_GROUP / 2 && scales.shape == [experts, rows, groups] && expert < experts;
        (fits && blocks.kind == Dtype::U8 && scales.kind == Dtype::U8 && step > 0).then(|| Tensor {
            span: blocks.span.part(expert, experts),
            form: Form::Mxfp4 { first, row: step, scales: scales.span.part(expert, experts) },
            dtype: DType::Bf16,
            shape: vec![rows / step, groups * MXFP4_GROUP],
        })
    }

    /// The names of all that lies in no used tensor.
    pub(super) fn unused<'a>(&self, used: impl IntoIterator<Item = &'a Tensor>) -> Vec<&str> {
        let mut starts: BTreeSet<(usize, usize)> = BTreeSet::new();
        for tensor in used {
            starts.insert((tensor.span.file, tensor.span.start));
            if let Form::Mxfp4 { scales, .. } | Form::Fp8 { scales, .. } = tensor.form {
                starts.insert((scales.file, scales.start));
            }
        }
        let floats = self.tensors.iter().map(|(name, tensor)| (name, tensor.span));
        let bytes = self.quantised.iter().map(|(name, stored)| (name, stored.span));
        let unused = floats.chain(bytes).filter(|(_, span)| {
            starts.range((span.file, span.start)..(span.file, span.end.max(span.start + 1))).next().is_none()
        });
        unused.map(|(name, _)| name.as_str()).collect()
    }

    fn span(&self, span: Span) -> &[u8] {
        &self.files[span.file].1[span.start..span.end]
    }

    /// The bytes of a tensor as they are in its file.
    ///
    /// # Panics
    /// If they are in another form there.
    pub fn bytes(&self, tensor: &Tensor) -> &[u8] {
        assert!(tensor.is_stored(), "the bytes of this tensor have to be decoded");
        self.span(tensor.span)
    }

    /// The bytes of a tensor, row-major.
    pub fn row_major(&self, tensor: &Tensor) -> Cow<'_, [u8]> {
        let scales = match tensor.form {
            Form::Mxfp4 { scales, .. } | Form::Fp8 { scales, .. } => self.span(scales),
            Form::Plain | Form::Strided { .. } | Form::Groups(_) | Form::Reordered { .. } => &[],
            Form::Made(_) => {
                let mut bytes = Vec::with_capacity(tensor.bytes_len());
                self.pieces(tensor, &mut |piece| bytes.extend_from_slice(piece));
                return Cow::Owned(bytes);
            }
        };
        encoded::decode(&tensor.form, tensor.dtype, &tensor.shape, self.span(tensor.span), scales)
    }

    /// Packs a matrix, quantised values as they are.
    ///
    /// # Panics
    /// If the slice is not as long as the shape and [`Tensor::storage`] say.
    pub(crate) fn pack(&self, tensor: &Tensor, dst: &mut [u8]) {
        let &[outputs, inputs] = &tensor.shape[..] else { unreachable!("matrices are asked for by shape") };
        if let Form::Made(_) = tensor.form {
            return pack(tensor.dtype, outputs, inputs, &self.row_major(tensor), dst);
        }
        let stored = self.span(tensor.span);
        match (tensor.storage(), &tensor.form) {
            (Storage::Mxfp4, &Form::Mxfp4 { first, row, scales }) => {
                let (blocks, scales) = (inputs / MXFP4_GROUP, self.span(scales));
                let place = |r: usize, c: usize| (first + r * row) * blocks + c / MXFP4_GROUP;
                let code = |r: usize, c: usize| {
                    let pair = stored[place(r, c) * (MXFP4_GROUP / 2) + c % MXFP4_GROUP / 2];
                    if c.is_multiple_of(2) { pair & 15 } else { pair >> 4 }
                };
                let exponent = |r: usize, block: usize| scales[(first + r * row) * blocks + block];
                pack_mxfp4(outputs, inputs, code, exponent, dst);
            }
            (Storage::E4m3, &Form::Fp8 { scales, side }) => {
                let (across, scales) = (inputs.div_ceil(side), self.span(scales));
                let factor = |down: usize, at: usize| {
                    let four = scales.as_chunks::<4>().0[down * across + at];
                    f32::from_le_bytes(four)
                };
                pack_e4m3(outputs, inputs, |r, c| stored[r * inputs + c], factor, dst);
            }
            (Storage::Grouped(kind), _) => pack_groups(kind, outputs, inputs, stored, dst),
            _ => pack(tensor.dtype, outputs, inputs, &self.row_major(tensor), dst),
        }
    }

    /// The BLAKE3 of a tensor's row-major bytes, which take no more memory than a few megabytes while they are read if
    /// they are so in the file.
    pub fn hash(&self, tensor: &Tensor) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new();
        self.pieces(tensor, &mut |piece| {
            hasher.update(piece);
        });
        *hasher.finalize().as_bytes()
    }

    /// Gives out a tensor's row-major bytes, piece by piece; those that are not so in the file in one.
    pub(super) fn pieces(&self, tensor: &Tensor, put: &mut dyn FnMut(&[u8])) {
        match &tensor.form {
            Form::Made(index) => {
                self.maker.as_ref().expect("a tensor that is made has a maker").make(*index, put);
            }
            Form::Plain | Form::Groups(_) => {
                let Span { file, start, end } = tensor.span;
                let map = &self.files[file].1;
                for start in (start..end).step_by(HASH_BYTES) {
                    let end = end.min(start + HASH_BYTES);
                    put(&map[start..end]);
                    forget(map, start, end);
                }
            }
            Form::Reordered { heads, .. } => {
                put(&encoded::ordered(*heads, tensor.shape[0], self.span(tensor.span)));
                self.forget(tensor);
            }
            Form::Strided { .. } | Form::Mxfp4 { .. } | Form::Fp8 { .. } => {
                put(&self.row_major(tensor));
                self.forget(tensor);
            }
        }
    }

    /// Gives back the memory that reading a tensor took: it would count against the process until others want it.
    pub fn forget(&self, tensor: &Tensor) {
        let Span { file, start, end } = tensor.span;
        if let Some((_, map)) = self.files.get(file) {
            forget(map, start, end);
        }
    }

    /// The first file, to name in an error about a tensor that is in none.
    pub fn path(&self) -> &Path {
        self.files.first().map_or(Path::new("what is made"), |(path, _)| path)
    }
}

/// Bytes of a matrix of integers, if it is one that can be packed.
fn bytes_of_groups(kind: crate::kernels::Quantised, shape: &[usize]) -> Option<usize> {
    let &[rows, columns] = shape else { return None };
    packed_len(kind, rows, columns)?;
    rows.checked_mul(kind.row_bytes(columns))
}

/// Drops the pages of a range, and of what lies around it: the system maps the neighbours of a page that is read, which
/// nobody else would give back. A neighbour that is in use is mapped again at its next reading.
fn forget(map: &Mmap, start: usize, end: usize) {
    let start = start / MAPPED_AROUND_BYTES * MAPPED_AROUND_BYTES;
    let end = end.next_multiple_of(MAPPED_AROUND_BYTES).min(map.len());
    if start < end {
        // SAFETY: the map is of a file, is only read and was never written: a page that is dropped is read from the
        // file again when it is next looked at, with the same bytes.
        let advised = unsafe { map.unchecked_advise_range(UncheckedAdvice::DontNeed, start, end - start) };
        // A system that keeps the pages wastes memory, and computes the same.
        let _ = advised;
    }
}

pub(super) fn map_file(path: &Path) -> Result<Mmap, CheckpointError> {
    let file = crate::files::open(path).map_err(|e| CheckpointError::io(path, e))?;
    // SAFETY: the map is only read. Whoever changes a checkpoint's file under a running engine breaks the documented
    // rule that checkpoints are immutable; the digest at start then no longer covers what is read.
    unsafe { Mmap::map(&file) }.map_err(|e| CheckpointError::io(path, e))
}

/// What a header lists.
enum Stored {
    Floats(Tensor),
    Bytes(Quantised),
}

fn tensors_of(
    path: &Path,
    metadata: &Metadata,
    file: usize,
    begin: usize,
    len: usize,
) -> Result<Vec<(String, Stored)>, CheckpointError> {
    let mut tensors = Vec::new();
    for (name, info) in metadata.tensors() {
        let dtype = match info.dtype {
            Dtype::F32 => Some(DType::F32),
            Dtype::BF16 => Some(DType::Bf16),
            Dtype::F16 => Some(DType::F16),
            Dtype::U8 | Dtype::F8_E4M3 => None,
            // Other types may belong to tensors that nobody asks for; who asks is told that it is missing.
            _ => continue,
        };
        let (start, end) = (begin + info.data_offsets.0, begin + info.data_offsets.1);
        let values = info.shape.iter().try_fold(1usize, |n, &size| n.checked_mul(size));
        let bytes = values.and_then(|values| values.checked_mul(dtype.map_or(1, DType::bytes)));
        if end > len || start > end || bytes != Some(end - start) {
            let what =
                format!("tensor {name} does not fit its shape or the file: the file is cut or damaged");
            return Err(CheckpointError::invalid(path, &what));
        }
        let (span, shape) = (Span { file, start, end }, info.shape.clone());
        let stored = match dtype {
            Some(dtype) => Stored::Floats(Tensor { span, form: Form::Plain, dtype, shape }),
            None => Stored::Bytes(Quantised { span, kind: info.dtype, shape }),
        };
        tensors.push((name, stored));
    }
    Ok(tensors)
}

/// The files that an index names, all of them beside it.
fn shards(index: &Path) -> Result<BTreeSet<String>, CheckpointError> {
    let text = crate::files::read(index).map_err(|e| CheckpointError::io(index, e))?;
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
