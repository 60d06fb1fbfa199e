//! How many bytes of a checkpoint a step reads.

use super::{Checkpoint, CheckpointError};

impl Checkpoint {
    /// Bytes of base parameters and routers that every step reads, however many rows it has: all but the table of embeddings,
    /// of which it reads a row each, and that too where it is the head as well.
    ///
    /// # Errors
    /// If the checkpoint lacks a tensor.
    pub fn step_bytes(&self) -> Result<u64, CheckpointError> {
        let tied = self.arch().tied;
        let list = self.inventory()?;
        let read =
            list.iter().filter(|i| !i.name.contains(".experts.") && (tied || !i.name.contains("embed")));
        Ok(read.map(|item| item.bytes).sum())
    }
}
