//! The `lite-llm` command: arguments in, exit code out.
//!
//! Each subcommand is a file of [`commands`]. A panic is caught here and reported as the bug that it is.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod beats;
mod bench;
mod cause;
mod commands;
mod control;
mod debugger;
mod device;
mod divergence;
mod exit;
mod generations;
mod history;
mod passes;
mod prompt;
mod quantity;
mod recompute;
mod request;
mod results;
mod serve;
mod settings;
mod state;
mod stream;
mod tensors;
mod terminal;
mod whole_file;

use exit::Exit;
use std::process::ExitCode;

fn main() -> ExitCode {
    let cli = match commands::Cli::of(std::env::args_os()) {
        Ok(cli) => cli,
        Err(error) => {
            // A closed pipe is the only way this fails; then nobody reads the message.
            let _ = error.print();
            return if error.use_stderr() { Exit::Usage } else { Exit::Ok }.into();
        }
    };
    exit::guard(|| cli.command.run()).into()
}
