//! The deterministic, sans-IO state machine of the Lite LLM runtime.
//!
//! One door in, one door out: `engine::Engine::handle` takes an [`input::Input`] with its time,
//! `engine::Engine::poll` gives [`output::Output`]s until [`output::Output::Wait`]. A panic means a bug in the core
//! or a driver that broke the protocol; a fault is an input.
#![no_std]
#![forbid(unsafe_code)]
#![warn(clippy::iter_over_hash_type, clippy::wildcard_enum_match_arm, clippy::cast_possible_truncation)]

extern crate alloc;

mod body;
mod boot;
pub mod carving;
pub mod chain;
pub mod cluster;
pub mod config;
pub mod digest;
pub mod disk;
mod drain;
pub mod engine;
pub mod event;
mod foresight;
pub mod ids;
pub mod input;
pub mod journal;
pub mod lifecycle;
mod modification;
pub mod output;
pub mod pages;
pub mod plan;
pub mod plant;
pub mod random;
pub mod replay;
mod request;
mod residency;
pub mod routing;
mod scheduler;
mod snapshots;
mod state;
mod step;
mod switch;
pub mod time;
pub mod topology;
pub mod view;
mod wishes;

/// Version of the fold: a core that would fold a journal differently has another.
pub const LOGIC_VERSION: u32 = 8;
