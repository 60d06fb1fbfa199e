//! Matrices that an import makes integers of (`docs/numerics.md`, rule 8): which they are, and their rows.

use super::tensors::Tensor;
use super::{Checkpoint, CheckpointError, Item};
use crate::kernels::quantise::quantise_row;
use crate::kernels::{DType, Isa, Quantised, Storage, convert};

/// Whether a tensor is one: a matrix that activations are multiplied with, or that their rows are looked up in. Routers and
/// the gate of a shared expert are small and decide; what latent attention makes its keys with is used transposed.
pub(super) fn can_be(item: &Item) -> bool {
    let kept = [".router", "_gate.weight", ".kv_b_proj.weight"];
    item.shape.len() == 2 && !kept.iter().any(|end| item.name.ends_with(end))
}

/// What an item is stored as.
pub(super) fn storage(item: &Item, wanted: Option<Quantised>) -> Storage {
    match item.grouped.or(wanted) {
        Some(kind) if item.grouped.is_some() || can_be(item) => Storage::Grouped(kind),
        _ => Storage::Plain(item.dtype),
    }
}

/// Bytes of an item as it is stored, row-major.
pub(super) fn stored_bytes(item: &Item, wanted: Option<Quantised>) -> u64 {
    match (storage(item, wanted), &item.shape[..]) {
        (Storage::Grouped(kind), &[rows, columns]) => (rows * kind.row_bytes(columns)) as u64,
        _ => item.bytes,
    }
}

/// Refuses what is quantised already.
pub(super) fn check(checkpoint: &Checkpoint, kind: Quantised) -> Result<(), CheckpointError> {
    for item in checkpoint.inventory()? {
        let tensor = item.tensor.as_ref().expect("a source has tensors");
        if !matches!(tensor.storage(), Storage::Plain(_)) {
            let what = format!(
                "{} is quantised already, and would lose twice; import it without --quantise {}: it stays as it is",
                item.name,
                kind.name()
            );
            return Err(CheckpointError::invalid(checkpoint.dir(), &what));
        }
    }
    Ok(())
}

/// Refuses integers whose scales are none.
pub(super) fn check_scales(checkpoint: &Checkpoint, item: &Item) -> Result<(), CheckpointError> {
    let row = item.tensor.as_ref().and_then(|tensor| checkpoint.files.row_without_scale(tensor));
    row.map_or(Ok(()), |row| {
        let what = format!("row {row} of {}: a scale is NaN or infinite", item.name);
        Err(CheckpointError::invalid(checkpoint.files.path(), &what))
    })
}

/// Gives out the bytes of an item as it is stored, row-major, in pieces, so that a matrix may be larger than memory.
pub(super) fn put_stored(
    checkpoint: &Checkpoint,
    item: &Item,
    wanted: Option<Quantised>,
    put: &mut dyn FnMut(&[u8]) -> Result<(), CheckpointError>,
) -> Result<(), CheckpointError> {
    let tensor = item.tensor.as_ref().expect("a source has tensors");
    let mut rows = match storage(item, wanted) {
        Storage::Grouped(kind) if item.grouped.is_none() => Some(Rows::new(kind, tensor)),
        _ => None,
    };
    let mut result = Ok(());
    checkpoint.files.pieces(tensor, &mut |piece| {
        if result.is_ok() {
            result = match &mut rows {
                None => put(piece),
                Some(rows) => rows.add(piece, checkpoint, &item.name).and_then(&mut *put),
            };
        }
    });
    result
}

/// The rows of a matrix, quantised as they come.
struct Rows {
    kind: Quantised,
    dtype: DType,
    columns: usize,
    /// Rows that were quantised.
    done: usize,
    /// Bytes of a row that is not whole yet.
    pending: Vec<u8>,
    values: Vec<f32>,
    stored: Vec<u8>,
}

impl Rows {
    fn new(kind: Quantised, tensor: &Tensor) -> Self {
        let columns = tensor.shape[1];
        let values = vec![0.0; columns];
        Self { kind, dtype: tensor.dtype, columns, done: 0, pending: Vec::new(), values, stored: Vec::new() }
    }

    /// The rows that are whole with this piece.
    fn add(&mut self, piece: &[u8], checkpoint: &Checkpoint, name: &str) -> Result<&[u8], CheckpointError> {
        self.pending.extend_from_slice(piece);
        self.stored.clear();
        let (row_bytes, stored) = (self.columns * self.dtype.bytes(), self.kind.row_bytes(self.columns));
        let rows = self.pending.len().checked_div(row_bytes).unwrap_or(0);
        self.stored.resize(rows * stored, 0);
        let of_rows = self.pending.chunks_exact(row_bytes.max(1));
        for (bytes, stored) in of_rows.zip(self.stored.chunks_exact_mut(stored.max(1))) {
            convert::widen(Isa::detect(), self.dtype, bytes, &mut self.values);
            quantise_row(self.kind, &self.values, stored).map_err(|error| {
                let what = format!("row {} of {name}, {error}; import it without --quantise", self.done);
                CheckpointError::invalid(checkpoint.files.path(), &what)
            })?;
            self.done += 1;
        }
        self.pending.drain(..rows * row_bytes);
        Ok(&self.stored)
    }
}
