//! The deterministic, sans-IO state machine of the Lite LLM runtime.
#![no_std]
#![forbid(unsafe_code)]

extern crate alloc;
