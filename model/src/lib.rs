//! The numeric contract, kernels and transformer families of the Lite LLM runtime.

pub mod kernels;
