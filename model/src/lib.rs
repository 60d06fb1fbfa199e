//! The numeric contract, kernels and transformer families of the Lite LLM runtime.
//!
//! [`checkpoint`] reads what a directory holds and trusts none of it; [`families`] turn a `config.json` into an
//! [`arch::Arch`], the architecture as data; [`model::Model`] loads and computes it on the CPU by the [`kernels`].
//! [`synth`] writes random checkpoints to try all this with.

pub mod arch;
pub mod checkpoint;
pub mod disk;
pub mod families;
mod files;
pub mod forward;
pub mod kernels;
pub mod likelihood;
pub mod model;
pub mod parts;
pub mod share;
pub mod speed;
pub mod synth;
pub mod tokenizer;
pub mod trace;
mod weights;

pub use checkpoint::{Checkpoint, CheckpointError};
pub use forward::{Capture, ExpertSource, KvCache, Outcome, Provided, StepError, Stopped, Workspace};
pub use model::{ExpertLoader, Model, ModelError, ModelOptions};
pub use share::Share;
