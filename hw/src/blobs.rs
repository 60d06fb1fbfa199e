//! Modified experts on disk: each an immutable file named by its digest, in the state directory.

use lite_llm_core::digest::Digest;
use lite_llm_core::input::Fault;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// The folder in a state directory.
const FOLDER: &str = "experts";

/// The blobs of a state directory.
#[derive(Clone, Debug)]
pub struct Blobs {
    dir: PathBuf,
}

impl Blobs {
    /// The blobs of this state directory; their folder is made with the first.
    #[must_use]
    pub fn of(state_dir: &Path) -> Self {
        Self { dir: state_dir.join(FOLDER) }
    }

    fn path(&self, blob: Digest) -> PathBuf {
        self.dir.join(blob.to_string())
    }

    /// Writes a blob aside, syncs it, gives it its name, and syncs that.
    ///
    /// # Errors
    /// If any of that fails; the blob is then not relied on.
    pub fn write(&self, blob: Digest, bytes: &[u8]) -> Result<(), Fault> {
        let path = self.path(blob);
        let aside = path.with_extension("aside");
        let write = || -> io::Result<()> {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&self.dir)?;
            let mut options = OpenOptions::new();
            let mut file = options.write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&aside, &path)?;
            File::open(&self.dir)?.sync_all()?;
            File::open(self.dir.parent().unwrap_or(Path::new(".")))?.sync_all()
        };
        write().map_err(|error| Fault::Io(format!("cannot write {}: {error}", path.display())))
    }

    /// Reads a blob into a slot and verifies it.
    ///
    /// # Errors
    /// If it is missing, of another size, or damaged.
    pub fn read(&self, blob: Digest, slot: &mut [u8]) -> Result<(), Fault> {
        let path = self.path(blob);
        let mut read = || -> io::Result<bool> {
            let mut file = File::open(&path)?;
            file.read_exact(slot)?;
            Ok(file.read(&mut [0])? == 0)
        };
        let whole = read().map_err(|error| Fault::Io(format!("cannot read {}: {error}", path.display())))?;
        if whole && Digest::of(slot) == blob {
            return Ok(());
        }
        Err(Fault::Corrupt(format!(
            "{} does not have its digest: the modified expert is damaged; restore the state directory from a copy",
            path.display()
        )))
    }

    /// Removes a blob that nothing refers to any more. What cannot be removed only takes room.
    pub fn remove(&self, blob: Digest) {
        let path = self.path(blob);
        let _ = fs::remove_file(path.with_extension("aside"));
        let _ = fs::remove_file(path);
    }
}
