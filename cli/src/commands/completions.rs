//! `lite-llm completions`: what a shell needs to complete the command.

use crate::commands::Cli;
use crate::exit::Exit;
use crate::terminal;
use clap::{Args, CommandFactory};
use clap_complete::Shell;
use std::io::Write;

#[derive(Debug, Args)]
pub(crate) struct CompletionsArgs {
    /// Which shell
    shell: Shell,
}

impl CompletionsArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "lite-llm", &mut script);
        terminal::stdout().write_all(&script)?;
        Ok(Exit::Ok)
    }
}
