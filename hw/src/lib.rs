//! Real drivers of the Lite LLM runtime: files, CPU, clock, processes.

pub mod disk;
