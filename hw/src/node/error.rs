//! Why a node does not start, or does not go on.

use std::any::Any;

use lite_llm_core::ids::Seq;
use lite_llm_core::journal::JournalError;
use lite_llm_core::replay::ReplayError;
use lite_llm_model::{CheckpointError, ModelError};

use crate::cold::ColdError;
use crate::cuda::CudaError;
use crate::disk::OpenError;

/// Why a node does not start, or does not go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// The checkpoint cannot be used.
    #[error(transparent)]
    Checkpoint(#[from] CheckpointError),
    /// The model cannot be computed here.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// The tokenizer cannot be used.
    #[error(transparent)]
    Tokenizer(#[from] lite_llm_model::tokenizer::TokenizerError),
    /// The state directory cannot be opened.
    #[error(transparent)]
    State(#[from] OpenError),
    /// The journal is of something else, damaged, or cannot be written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The journal does not fold.
    #[error(transparent)]
    Replay(#[from] ReplayError),
    /// The snapshot does not hold what it says.
    #[error("the snapshot before record {next} cannot be used: {what}")]
    Snapshot {
        /// The first record after it.
        next: u64,
        /// What is wrong, and what to do.
        what: String,
    },
    /// The system refuses something that a node cannot do without.
    #[error("{what}: {source}")]
    System {
        /// What was asked of it.
        what: &'static str,
        /// Why not.
        source: std::io::Error,
    },
    /// Experts cannot be read as they should.
    #[error(transparent)]
    Cold(#[from] ColdError),
    /// The device that experts are read from answers no more.
    #[error("{0}; see to the disk of the checkpoint, and start again: the journal goes on where it was")]
    Lost(String),
    /// What computes answers no more, or wrongly.
    #[error(
        "the GPU is lost: {0}; see what nvidia-smi and the system's log say of it, and start again, on it or with --device cpu: \
         the journal goes on where it was, with the same bits"
    )]
    Device(String),
    /// The GPU cannot be used.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// The boot sequence was given up.
    #[error("{0}")]
    Boot(String),
    /// What was asked for is refused.
    #[error("{0}")]
    Refused(String),
    /// The node has ended, so it cannot be asked.
    #[error("the node has ended; start it again")]
    Ended,
    /// A bug. The journal up to here is the report.
    #[error(
        "internal error at record {seq} ({thread} thread): {message}. This is a bug; the journal in the state \
         directory reproduces it"
    )]
    Panic {
        /// The input that was being handled, or the last one before.
        seq: Seq,
        /// Which thread.
        thread: &'static str,
        /// What was said.
        message: String,
    },
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("(no message)").to_owned()
}
