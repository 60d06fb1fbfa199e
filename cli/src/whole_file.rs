//! Files that are there as a whole, or not at all.

use anyhow::Context;
use std::io::Write;
use std::path::Path;
use tempfile::NamedTempFile;

/// Whether a file can be written there: asked before the work whose result it is to hold.
///
/// # Errors
/// If its directory takes no file, or something else than a file has its name: what is written takes the place of
/// whatever is there, be it a device.
pub(crate) fn check_target(path: &Path) -> anyhow::Result<()> {
    aside(path).map(drop)
}

/// Writes aside and renames.
pub(crate) fn write_whole(path: &Path, bytes: &[u8]) -> anyhow::Result<()> {
    let mut file = aside(path)?;
    file.write_all(bytes).with_context(|| format!("cannot write {}", path.display()))?;
    put(file, path)
}

/// Renames what [`aside`] has made.
pub(crate) fn put(file: NamedTempFile, path: &Path) -> anyhow::Result<()> {
    file.persist(path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

/// A file beside the one that it is to become.
pub(crate) fn aside(path: &Path) -> anyhow::Result<NamedTempFile> {
    if let Ok(there) = path.metadata() {
        anyhow::ensure!(there.is_file(), "cannot write {}: it is there and no file", path.display());
    }
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    NamedTempFile::new_in(directory).with_context(|| format!("cannot write {}", path.display()))
}
