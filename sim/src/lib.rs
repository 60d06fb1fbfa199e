//! A simulated machine for the Lite LLM runtime: disks that tear, crashes at any point.
