//! What the tests across the crates share.

pub mod command;
pub mod cuda;
#[allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a panic is a finding")]
pub mod fuzzing;
pub mod gpu_place;
pub mod harness;
pub mod heard;
pub mod kept;
pub mod received;
pub mod supervised;
