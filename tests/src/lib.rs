//! What the tests across the crates share.

pub mod command;
pub mod cuda;
#[allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a panic is a finding")]
pub mod fuzzing;
#[allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a panic is a finding")]
pub mod gpu_machine;
pub mod gpu_place;
pub mod gpu_ranks;
pub mod harness;
pub mod heard;
pub mod kept;
pub mod received;
pub mod supervised;
