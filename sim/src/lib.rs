//! A simulated cluster for the Lite LLM runtime: the production core, unchanged, on virtual time, from one seed.
//!
//! [`world`] has time, messages, clocks and processes; [`hazard`] names every fault, [`decision`] says which of them
//! happen, [`mod@minimise`] finds those that matter, [`chronicle`] and [`timeline`] tell people what happened. [`disk`]
//! tears what was not synced, [`atlas`] says which copies may be damaged at once; [`cluster`] has what a node is made of.
//! [`machine`] drives one engine and checks what it does; [`model`] is the simulated arithmetic and, apart from any
//! engine, the reference that streams are held against; [`real`] is the same with the arithmetic of a tiny model.
#![forbid(unsafe_code)]

pub mod atlas;
pub mod chronicle;
pub mod cluster;
pub mod decision;
pub mod disk;
pub mod hazard;
pub mod machine;
pub mod mark;
pub mod minimise;
pub mod model;
pub mod random;
pub mod real;
pub mod timeline;
pub mod world;
