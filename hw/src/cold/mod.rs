//! The cold tier: experts of a native checkpoint, read from its shards into slots, each verified before anybody hears of it.
//!
//! An expert is one blob at a multiple of 4 KiB, in the very layout of a slot, and slots are whole pages at page boundaries: the
//! device can write it where steps read it. Four ways lead there ([`Io`]). With io_uring one thread (`reader.rs`) has up to
//! 64 MiB in flight, while another (`verify.rs`) holds what has come against its CRC-32. With `pread` and `mmap` a pool of
//! threads each reads and verifies one expert after another (`fetch.rs`).
//!
//! Slots that are memory of a GPU are read by way of rooms of the host (`staging.rs`): whatever reads, verifies before it is copied.
//! Or, where the machine can, they are read into past the host (`direct.rs`), and verified after a copy back.
//!
//! What a disk does wrong is met alike on each: an interrupted read is repeated, one that fails or comes short is tried once
//! more, bytes that do not have their checksum are read once more; then it is a fault that names shard, byte and expert.
//!
//! Deliberately absent: packing, cutting and modified experts. Whatever is not a whole blob of a shard is work for the loaders.

mod blocks;
mod choice;
mod depth;
mod direct;
mod fault;
#[cfg(test)]
mod faulty;
mod fetch;
mod reader;
mod reading;
mod registered;
#[cfg(target_os = "linux")]
mod ring;
mod shards;
mod staging;
#[cfg(test)]
mod tests;
pub mod trial;
mod verify;

pub use choice::{Cold, ColdError, Io, direct_report};
pub(crate) use direct::Direct;
pub(crate) use fault::Named;
pub use fetch::Fetch;
pub use reader::{Answer, Load, Reader, Told};
pub(crate) use reading::Reading;
pub(crate) use staging::{Outlet, Staged, Staging};

/// Whatever is read past the cache begins at a multiple of this, in file and memory.
const BLOCK: usize = 4096;
/// How often a read may say that it was interrupted, or that nothing can be had just now.
const INTERRUPTED_MAX: u32 = 1000;
