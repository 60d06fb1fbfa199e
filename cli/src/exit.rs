//! Exit codes, and which error has which.

use crate::divergence::Divergence;
use crate::terminal::tell;
use lite_llm_core::chain::RestoreError;
use lite_llm_core::input::Fault;
use lite_llm_core::journal::JournalError;
use lite_llm_core::replay::ReplayError;
use lite_llm_hw::cluster::ClusterError;
use lite_llm_hw::node::NodeError;
use lite_llm_model::{CheckpointError, ModelError};
use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;

/// How the process ends. The numbers are documented: `lite-llm --help`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Exit {
    /// Done.
    Ok = 0,
    /// Refused or failed.
    Failed = 1,
    /// The command line is wrong.
    Usage = 2,
    /// Bytes fail their verification, or a replay diverges.
    Corrupt = 3,
    /// A bug of this program.
    Bug = 4,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit as u8)
    }
}

/// An error that knows its exit code.
#[derive(Debug)]
pub(crate) struct Coded {
    exit: Exit,
    text: String,
}

impl fmt::Display for Coded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl std::error::Error for Coded {}

/// A wrong command line that clap cannot see.
pub(crate) fn usage(text: impl Into<String>) -> anyhow::Error {
    Coded { exit: Exit::Usage, text: text.into() }.into()
}

/// A fault that the engine has put in words.
pub(crate) fn fault(text: impl Into<String>) -> anyhow::Error {
    let text = text.into();
    Coded { exit: of_words(&text), text }.into()
}

/// Something that does not verify.
pub(crate) fn corrupt(text: impl Into<String>) -> anyhow::Error {
    Coded { exit: Exit::Corrupt, text: text.into() }.into()
}

/// Runs a command; reports its error, or its panic, on standard error.
pub(crate) fn guard(command: impl FnOnce() -> anyhow::Result<Exit>) -> Exit {
    match catch_unwind(AssertUnwindSafe(command)) {
        Ok(Ok(exit)) => exit,
        Ok(Err(error)) => {
            if broken_pipe(&error) {
                return Exit::Failed;
            }
            tell!("error: {}", in_words(&error));
            of(&error)
        }
        Err(_) => {
            tell!(
                "error: this is a bug of lite-llm, not of what you did. If there is a state directory, keep it: its \
                 journal is the bug report"
            );
            Exit::Bug
        }
    }
}

/// An error with its causes, each said once: some errors have their cause in their own words.
fn in_words(error: &anyhow::Error) -> String {
    let mut words = String::new();
    for cause in error.chain().map(ToString::to_string) {
        if words.is_empty() {
            words = cause;
        } else if !words.contains(&cause) {
            words = format!("{words}: {cause}");
        }
    }
    words
}

/// The reader of our output went away: there is nobody to tell.
fn broken_pipe(error: &anyhow::Error) -> bool {
    let io = error.chain().find_map(|cause| cause.downcast_ref::<std::io::Error>());
    io.is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
}

fn of(error: &anyhow::Error) -> Exit {
    error.chain().find_map(code).unwrap_or(Exit::Failed)
}

fn code(cause: &(dyn std::error::Error + 'static)) -> Option<Exit> {
    if let Some(coded) = cause.downcast_ref::<Coded>() {
        return Some(coded.exit);
    }
    if let Some(journal) = cause.downcast_ref::<JournalError>() {
        return Some(of_journal(journal));
    }
    if let Some(node) = cause.downcast_ref::<NodeError>() {
        return Some(of_node(node));
    }
    // It speaks for what it holds, and so is what the chain shows.
    match cause.downcast_ref::<ClusterError>() {
        Some(ClusterError::Node(node)) => return Some(of_node(node)),
        Some(ClusterError::Diverged { .. }) => return Some(Exit::Corrupt),
        _ => {}
    }
    if let Some(ModelError::Checkpoint(checkpoint)) = cause.downcast_ref::<ModelError>() {
        return Some(of_checkpoint(checkpoint));
    }
    if let Some(checkpoint) = cause.downcast_ref::<CheckpointError>() {
        return Some(of_checkpoint(checkpoint));
    }
    let verification = cause.is::<Divergence>() || cause.is::<ReplayError>() || cause.is::<RestoreError>();
    verification.then_some(Exit::Corrupt)
}

fn of_checkpoint(error: &CheckpointError) -> Exit {
    if matches!(error, CheckpointError::Corrupt { .. }) { Exit::Corrupt } else { Exit::Failed }
}

/// The code of a fault that the engine has put in words.
fn of_words(words: &str) -> Exit {
    // The words for a fault with nothing more to say: those that every fault of its kind has.
    let corrupt = Fault::Corrupt(String::new()).to_string();
    if words.contains(&corrupt) { Exit::Corrupt } else { Exit::Failed }
}

fn of_journal(error: &JournalError) -> Exit {
    match error {
        JournalError::Damage { .. } | JournalError::Missing { .. } => Exit::Corrupt,
        _ => Exit::Failed,
    }
}

fn of_node(error: &NodeError) -> Exit {
    match error {
        NodeError::Journal(journal) => of_journal(journal),
        NodeError::Replay(_) | NodeError::Snapshot { .. } => Exit::Corrupt,
        NodeError::Checkpoint(error) | NodeError::Model(ModelError::Checkpoint(error)) => {
            of_checkpoint(error)
        }
        NodeError::Boot(words) => of_words(words),
        NodeError::Panic { .. } => Exit::Bug,
        _ => Exit::Failed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use anyhow::Context;

    #[test]
    fn a_node_of_a_cluster_ends_as_one_alone_does() {
        let bug =
            || NodeError::Panic { seq: lite_llm_core::ids::Seq(7), thread: "node", message: "no".into() };
        assert_eq!(of(&anyhow::Error::from(bug())), Exit::Bug);
        assert_eq!(of(&anyhow::Error::from(ClusterError::Node(bug()))), Exit::Bug);
        assert_eq!(of(&anyhow::Error::from(ClusterError::Refused("no".into()))), Exit::Failed);
    }

    #[test]
    fn each_cause_is_said_once() {
        let full = || std::io::Error::from(std::io::ErrorKind::StorageFull);
        let own = std::io::Error::other(format!("cannot write x: {}", full()));
        let error = Err::<(), _>(own).context("no result").expect_err("it is one");
        assert_eq!(in_words(&error), format!("no result: cannot write x: {}", full()));
        let said = Err::<(), _>(full()).with_context(|| format!("x: {}", full())).expect_err("it is one");
        assert_eq!(in_words(&said), format!("x: {}", full()));
    }
}
