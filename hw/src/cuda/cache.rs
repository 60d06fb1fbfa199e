//! Compiled kernels on disk, so that a start does not compile them again.
//!
//! An entry is a file named by its key ([`kernels::key`]): a checksum of 32 bytes, then its modules in postcard. The checksum is
//! keyed by the key, so that a file with a wrong name is as damaged as one with wrong bytes. What does not verify is compiled again
//! and replaced, never used. Entries are written aside and renamed: whoever reads sees a whole one or none, and of several that
//! write the same at once the last one wins, with the same.
//!
//! A cache only saves time. Where it cannot be had or written, kernels are compiled, and [`Built`] says why they were not kept.

use super::CudaError;
use super::kernels::{self, Compiler, Module, Target};
use rustix::process::getpid;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime};

/// Entries that are kept: the newest. One is of a program, a compiler and a kind of device.
pub const ENTRIES_MAX: usize = 8;
/// Bytes of the largest file that is taken for an entry.
const ENTRY_BYTES_MAX: u64 = 64 << 20;
/// A file aside that is older was left by a process that ended.
const ASIDE_MAX: Duration = Duration::from_secs(3600);
const ENTRY: &str = "kernels";
const ASIDE: &str = "aside";

/// Why kernels were not kept.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// It is not known where.
    #[error("neither XDG_CACHE_HOME nor HOME is set to an absolute path; set one to have kernels kept")]
    NoPlace,
    /// The system does not let them be kept there.
    #[error("cannot keep kernels in {}: {source}; give it room and a permission to write, or set XDG_CACHE_HOME", .dir.display())]
    Write {
        /// The folder.
        dir: PathBuf,
        /// What the system says.
        source: io::Error,
    },
}

/// A folder of compiled kernels, or none.
#[derive(Clone, Debug)]
pub struct Cache {
    dir: Option<PathBuf>,
}

/// Every kernel, ready to be loaded.
#[derive(Debug)]
pub struct Built {
    /// What they were compiled to.
    pub target: Target,
    /// A module for each source.
    pub modules: Vec<Module>,
    /// Where they come from.
    pub origin: Origin,
    /// How long that took.
    pub took: Duration,
}

/// Where compiled kernels come from.
#[derive(Debug)]
pub enum Origin {
    /// From this file.
    Cache(PathBuf),
    /// They were compiled.
    Compiled {
        /// An entry was there and did not verify.
        damaged: bool,
        /// Where they are now, or why nowhere.
        kept: Result<PathBuf, CacheError>,
    },
}

impl Cache {
    /// The user's: `lite-llm/cuda` of `$XDG_CACHE_HOME`, or of where that is by default. A relative one is to be ignored, says the
    /// specification.
    pub fn of_user() -> Self {
        let absolute = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let home = absolute("XDG_CACHE_HOME").or_else(|| absolute("HOME").map(|home| home.join(".cache")));
        Self { dir: home.map(|home| home.join("lite-llm/cuda")) }
    }

    /// The one in this folder, which is made with the first entry.
    pub fn of(dir: &Path) -> Self {
        Self { dir: Some(dir.to_path_buf()) }
    }

    /// The kernels as the compiler makes them: from here, or made and kept.
    ///
    /// # Errors
    /// If they are not here and do not compile. That they cannot be kept is none.
    pub fn kernels(&self, compiler: &dyn Compiler, target: Target) -> Result<Built, CudaError> {
        let start = Instant::now();
        let key = kernels::key(compiler, target);
        let path = self.dir.as_ref().map(|dir| {
            let name = blake3::Hash::from(key).to_hex();
            dir.join(name.as_str()).with_extension(ENTRY)
        });
        let found = path.as_deref().map_or(Found::Nothing, |path| read(path, &key));
        let (modules, origin) = match (found, path) {
            (Found::Modules(modules), Some(path)) => (modules, Origin::Cache(path)),
            (found, path) => {
                let modules = kernels::compile(compiler, target)?;
                let kept = match path {
                    None => Err(CacheError::NoPlace),
                    Some(path) => keep(path, &key, &modules),
                };
                (modules, Origin::Compiled { damaged: matches!(found, Found::Damage), kept })
            }
        };
        Ok(Built { target, modules, origin, took: start.elapsed() })
    }
}

enum Found {
    Modules(Vec<Module>),
    Damage,
    Nothing,
}

fn read(path: &Path, key: &[u8; 32]) -> Found {
    let Ok(file) = File::open(path) else { return Found::Nothing };
    let mut bytes = Vec::new();
    // One byte more than it may have, so that what is too long does not verify.
    if file.take(ENTRY_BYTES_MAX + 1).read_to_end(&mut bytes).is_err() {
        return Found::Damage;
    }
    let Some((sum, rest)) = bytes.split_first_chunk::<32>() else { return Found::Damage };
    if bytes.len() as u64 > ENTRY_BYTES_MAX || blake3::keyed_hash(key, rest) != *sum {
        return Found::Damage;
    }
    // The sum says that this program wrote it; another form of modules is damage all the same.
    postcard::from_bytes(rest).map_or(Found::Damage, Found::Modules)
}

fn keep(path: PathBuf, key: &[u8; 32], modules: &[Module]) -> Result<PathBuf, CacheError> {
    let dir = path.parent().unwrap_or(Path::new(".")).to_path_buf();
    match write(&dir, &path, key, modules) {
        Ok(()) => {
            prune(&dir, &path);
            Ok(path)
        }
        Err(source) => Err(CacheError::Write { dir, source }),
    }
}

fn write(dir: &Path, path: &Path, key: &[u8; 32], modules: &[Module]) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let rest = postcard::to_allocvec(modules).map_err(io::Error::other)?;
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let aside = path.with_extension(format!("{}-{number}.{ASIDE}", getpid().as_raw_nonzero()));
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let written = || -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        file.write_all(blake3::keyed_hash(key, &rest).as_bytes())?;
        file.write_all(&rest)?;
        // The name is not synced: without it there is nothing, which is compiled again.
        file.sync_all()?;
        fs::rename(&aside, path)
    };
    written().inspect_err(|_| drop(fs::remove_file(&aside)))
}

/// Removes what is more than a cache keeps. Another process may do so at the same time; what fails is tried again by the next.
fn prune(dir: &Path, newest: &Path) {
    let Ok(files) = fs::read_dir(dir) else { return };
    let now = SystemTime::now();
    let mut entries = Vec::new();
    for path in files.filter_map(|file| Some(file.ok()?.path())).filter(|path| path != newest) {
        let Ok(written) = path.metadata().and_then(|data| data.modified()) else { continue };
        let extension = path.extension().and_then(|extension| extension.to_str());
        match extension {
            Some(ENTRY) => entries.push((written, path)),
            Some(ASIDE) if now.duration_since(written).is_ok_and(|age| age > ASIDE_MAX) => {
                let _ = fs::remove_file(path);
            }
            _ => {}
        }
    }
    entries.sort_unstable();
    // The one that was just written is kept, whatever the clock says.
    let many = (entries.len() + 1).saturating_sub(ENTRIES_MAX);
    for (_, path) in entries.drain(..many) {
        let _ = fs::remove_file(path);
    }
}
