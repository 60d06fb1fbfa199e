//! Why an expert did not come, in the words of the fault that the engine hears.

use std::io;
use std::path::Path;

use lite_llm_core::ids::ExpertKey;
use lite_llm_core::input::Fault;
use lite_llm_model::CheckpointError;

/// A read that failed twice.
#[derive(Debug)]
pub(super) enum ReadFault {
    /// The disk said so.
    Failed { at: u64, error: io::Error },
    /// There was less than there should be.
    Short { at: u64 },
}

impl ReadFault {
    pub(super) fn of(self, expert: ExpertKey, path: &Path) -> Fault {
        let (expert, path) = (Named(expert), path.display());
        Fault::Io(match self {
            Self::Failed { at, error } => {
                format!(
                    "{expert}: cannot read {path} at byte {at}, twice: {error}; see to the disk, or restore the file"
                )
            }
            Self::Short { at } => {
                format!("{expert}: {path} comes short at byte {at}, twice: restore the file")
            }
        })
    }
}

/// Bytes that were read twice, and have another checksum.
pub(super) fn corrupt(expert: ExpertKey, error: &CheckpointError) -> Fault {
    Fault::Corrupt(format!("{}: {error}", Named(expert)))
}

/// An expert by its name.
pub(crate) struct Named(pub(crate) ExpertKey);

impl std::fmt::Display for Named {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ExpertKey { layer, tier, group, expert } = self.0;
        write!(f, "expert {expert} of layer {layer}, tier {tier}, group {group}")
    }
}
