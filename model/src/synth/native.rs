//! A random checkpoint that is native and quantised from the first byte on: its tensors are drawn while the import writes
//! them, so that neither memory nor a disk ever holds them as floats. What comes of it is what an import of the other form
//! would have made.

use super::tensors::{Tensor, tensors};
use super::weights::Values;
use super::{SynthError, SynthReport, SynthSpec, files};
use crate::checkpoint::import::{Wanted, import_opened};
use crate::checkpoint::{Checkpoint, Maker, TensorFiles};
use crate::model::ModelError;
use std::fs;
use std::path::Path;

/// Writes the native checkpoint that [`synth`](super::synth()) and an import of what it wrote would give, telling `progress`
/// the bytes written so far and in all. `dir` must not exist; its parent must. Begun again after a crash, it goes on.
///
/// # Errors
/// If the spec is impossible, `dir` exists, the tiers do not fit, or the file system fails or is full.
pub fn synth_native(
    dir: &Path,
    spec: &SynthSpec,
    wanted: Wanted<'_>,
    threads: usize,
    progress: impl FnMut(u64, u64),
) -> Result<SynthReport, SynthError> {
    spec.check()?;
    let name = dir.file_name().ok_or_else(|| SynthError::Occupied { dir: dir.into() })?;
    let mut aside = std::ffi::OsString::from(".");
    aside.push(name);
    aside.push(".source");
    // What goes along beside the weights: under this name it is found after a crash, and written anew.
    let aside = dir.with_file_name(aside);
    clear(&aside)?;
    let mut report = files::Aside::new(&aside, 0)?.write_companions(spec)?;
    let drawn = Drawn { tensors: tensors(spec).collect(), spec: spec.clone() };
    let listed: Vec<_> = drawn.tensors.iter().map(|tensor| drawn.listed(tensor)).collect();
    report.tensors = listed.len() as u64;
    report.parameters = drawn.tensors.iter().map(Tensor::len).sum();
    let imported = Checkpoint::open_made(&aside, TensorFiles::made(Box::new(drawn), listed))
        .map_err(ModelError::from)
        .and_then(|source| import_opened(source, dir, wanted, threads, progress));
    clear(&aside)?;
    let imported = imported.map_err(|error| SynthError::Import(Box::new(error)))?;
    Ok(SynthReport { dir: dir.into(), bytes: imported.bytes, shards: imported.written as u64, ..report })
}

fn clear(dir: &Path) -> Result<(), SynthError> {
    match fs::remove_dir_all(dir) {
        Err(source) if source.kind() != std::io::ErrorKind::NotFound => {
            Err(SynthError::Io { path: dir.into(), source })
        }
        _ => Ok(()),
    }
}

/// Tensors that are drawn when they are read.
#[derive(Debug)]
struct Drawn {
    spec: SynthSpec,
    tensors: Vec<Tensor>,
}

impl Drawn {
    fn listed(&self, tensor: &Tensor) -> (String, crate::kernels::DType, Vec<usize>) {
        let shape = tensor.shape.iter().map(|&size| size as usize).collect();
        (tensor.name.clone(), self.spec.dtype, shape)
    }
}

impl Maker for Drawn {
    fn make(&self, index: usize, put: &mut dyn FnMut(&[u8])) {
        let mut values = Values::new(self.spec.seed, &self.tensors[index], self.spec.dtype);
        while let Some(bytes) = values.next() {
            put(bytes);
        }
    }

    fn identity(&self) -> String {
        blake3::hash(format!("synth 1 {:?}", self.spec).as_bytes()).to_hex().to_string()
    }
}
