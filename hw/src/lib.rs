//! Real drivers of the Lite LLM runtime: files, CPU, clock, processes.
//!
//! [`node::Node`] runs the engine of one node: an event loop that owns it, a journal thread, a compute thread and a few
//! loaders. What the engine decides, they obey; what happens, they report. Nothing here decides anything.

pub mod arena;
pub mod bandwidth;
pub mod blobs;
pub mod cluster;
pub mod cold;
pub mod cuda;
pub mod memory;
pub mod net;
pub mod node;
pub mod supervisor;
pub mod telemetry;

pub use lite_llm_model::disk;
