//! The directory of a run: the one that was given, or a private one that goes when all is well.

use crate::terminal::tell;
use anyhow::Context;
use lite_llm_core::ids::RequestId;
use std::fs::DirBuilder;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

/// What the settings of nodes are called in the state of a cluster, which has them from before it has a journal.
pub(crate) const SETTINGS_NAME: &str = "nodes.json";

/// Where a run keeps its journal.
#[derive(Debug)]
pub(crate) struct StateDir {
    path: PathBuf,
    private: bool,
}

impl StateDir {
    /// The given directory, or a new private one under `$XDG_STATE_HOME/lite-llm`, for a run of one process.
    pub(crate) fn choose(given: Option<&Path>) -> anyhow::Result<Self> {
        let this = Self::choose_any(given)?;
        anyhow::ensure!(
            !this.path.join(SETTINGS_NAME).exists(),
            "{} is the state of a cluster: go on with `supervise --nodes`, or give another directory with --state",
            this.path.display()
        );
        Ok(this)
    }

    /// The same for a cluster.
    pub(crate) fn choose_for_cluster(given: Option<&Path>) -> anyhow::Result<Self> {
        let this = Self::choose_any(given)?;
        anyhow::ensure!(
            !this.has_journal() || this.path.join(SETTINGS_NAME).exists(),
            "{} is the state of a run of one process: go on without --nodes, or give another directory with --state",
            this.path.display()
        );
        Ok(this)
    }

    fn choose_any(given: Option<&Path>) -> anyhow::Result<Self> {
        if let Some(path) = given {
            check_given(path)?;
            return Ok(Self { path: path.to_path_buf(), private: false });
        }
        let base = home()?.join("lite-llm");
        let cannot =
            || format!("cannot make a state directory under {}; give one with --state", base.display());
        DirBuilder::new().recursive(true).mode(0o700).create(&base).with_context(cannot)?;
        let path = base.join(unique("run"));
        DirBuilder::new().mode(0o700).create(&path).with_context(cannot)?;
        Ok(Self { path, private: true })
    }

    /// Makes the directory if it is not there, for its user alone.
    pub(crate) fn make(&self) -> std::io::Result<()> {
        DirBuilder::new().recursive(true).mode(0o700).create(&self.path)
    }

    /// The directory.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Whether nobody but this run knows of it.
    pub(crate) fn is_private(&self) -> bool {
        self.private
    }

    /// Whether a run has begun a journal there.
    pub(crate) fn has_journal(&self) -> bool {
        let Ok(mut entries) = std::fs::read_dir(&self.path) else { return false };
        entries.any(|entry| {
            entry.is_ok_and(|entry| entry.file_name().as_encoded_bytes().starts_with(b"segment-"))
        })
    }

    /// What an error begins with that leaves something to do.
    pub(crate) fn goes_on(&self, id: Option<&RequestId>) -> String {
        let id = id.map_or_else(String::new, |id| format!(" --request-id {id}"));
        format!("broken off; the same command with --state {}{id} goes on", self.path.display())
    }

    /// Ends the run: a private directory goes if all is done, and is named otherwise.
    pub(crate) fn end(mut self, done: bool) {
        if done {
            self.discard();
        } else if self.private && self.has_journal() {
            tell!("the journal is kept in {}", self.path.display());
        }
    }

    /// Removes a private directory, with whatever is in it.
    pub(crate) fn discard(&mut self) {
        if std::mem::take(&mut self.private)
            && let Err(error) = std::fs::remove_dir_all(&self.path)
        {
            tell!("warning: cannot remove the private state directory {}: {error}", self.path.display());
        }
    }
}

/// However a run ends: a private directory in which no journal was begun goes.
impl Drop for StateDir {
    fn drop(&mut self) {
        if !self.has_journal() {
            self.discard();
        }
    }
}

/// Refuses a directory that has something in it and is no state directory: a checkpoint, or somebody's home. So is one of a
/// node: what another process adds to its log the cluster never committed.
fn check_given(path: &Path) -> anyhow::Result<()> {
    let Ok(entries) = std::fs::read_dir(path) else { return Ok(()) };
    let names: Vec<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    anyhow::ensure!(
        !is_of_node(path),
        "{} is the directory of one node, whose journal is its cluster's: give the one around it to `supervise --nodes`, or another \
         with --state",
        path.display()
    );
    let of_state = |name: &String| {
        name == "lock" || ["segment-", "snapshot-", "crash-"].iter().any(|start| name.starts_with(start))
    };
    anyhow::ensure!(
        names.is_empty() || names.iter().any(of_state),
        "{} is no state directory: there is no journal in it, but {}; give an empty directory or a new name with --state",
        path.display(),
        names[0]
    );
    Ok(())
}

/// Whether a directory is that of a node of a cluster, which lives or has lived there.
pub(crate) fn is_of_node(path: &Path) -> bool {
    path.join("alive").exists()
}

/// `$XDG_STATE_HOME`, or where it is by default. A relative one is to be ignored, says the specification.
fn home() -> anyhow::Result<PathBuf> {
    let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_STATE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".local/state")))
        .context("neither XDG_STATE_HOME nor HOME is set; give a state directory with --state")
}

/// A name that no other process and no earlier call uses.
pub(crate) fn unique(prefix: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos());
    format!("{prefix}-{now:x}-{:x}", std::process::id())
}
