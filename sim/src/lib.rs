//! A simulated machine for the Lite LLM runtime: the production core, unchanged, on virtual time, from one seed.
//!
//! [`disk`] tears what was not synced, [`machine`] drives an engine and checks what it does; [`model`] is the simulated
//! arithmetic and, apart from any engine, the reference that streams are held against; [`random`] is the only source
//! of choice.
#![forbid(unsafe_code)]

pub mod disk;
pub mod machine;
pub mod model;
pub mod random;
