//! Tests across the crates: oracles, real processes, crashes.
