//! Criterion benches of the Lite LLM runtime.
