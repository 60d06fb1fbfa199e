//! The `lite-llm` command.

fn main() {}
