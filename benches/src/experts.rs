//! The experts of a native checkpoint as its loaders see them, and as the disk does.

use lite_llm_core::digest::Digest;
use lite_llm_core::ids::ExpertKey;
use lite_llm_model::kernels::Isa;
use lite_llm_model::{Checkpoint, ExpertLoader, Model, ModelOptions};
use rustix::fs::{Advice, Mode, OFlags, fadvise};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Bytes of one direct read.
const BLOCK: usize = 8 << 20;
/// What direct reads are aligned to.
const ALIGN: usize = 4096;

/// All experts of a native checkpoint.
#[derive(Debug)]
pub struct Experts {
    loader: ExpertLoader,
    keys: Vec<ExpertKey>,
    slot_bytes: usize,
    files: Vec<PathBuf>,
}

impl Experts {
    /// Opens a native checkpoint.
    #[must_use]
    pub fn open(dir: &Path) -> Self {
        let checkpoint = Arc::new(Checkpoint::open(dir).expect("a checkpoint"));
        let options =
            ModelOptions { threads: 1, isa: Isa::detect(), kv_dtype: None, ..ModelOptions::default() };
        let model = Model::open(checkpoint, options).expect("a model");
        let plan = model.plan(1, 1, Digest::default()).expect("a plan");
        let entries =
            std::fs::read_dir(dir).expect("a directory").map(|entry| entry.expect("readable").path());
        let is_experts = |path: &PathBuf| {
            path.file_name().and_then(|name| name.to_str()).is_some_and(|name| name.starts_with("experts-"))
        };
        let files = entries.filter(is_experts).collect();
        let keys = plan.experts(&[0]).collect();
        Self { loader: model.expert_loader(), keys, slot_bytes: model.slot_bytes(), files }
    }

    /// Bytes of all of them.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|path| path.metadata().expect("a file").len()).sum()
    }

    /// Asks the system to forget what it has cached of them.
    pub fn drop_cached(&self) {
        for path in &self.files {
            let file = File::open(path).expect("a file");
            file.sync_all().expect("a sound disk");
            fadvise(&file, 0, None, Advice::DontNeed).expect("a file that can be cached");
        }
    }

    /// Loads each into a slot, and returns how many were loaded.
    #[must_use]
    pub fn load(&self, threads: usize) -> u64 {
        let next = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut slot = vec![0; self.slot_bytes];
                    while let Some(&key) = self.keys.get(next.fetch_add(1, Ordering::Relaxed)) {
                        self.loader.load(key, &mut slot).expect("a sound checkpoint");
                    }
                });
            }
        });
        self.keys.len() as u64
    }

    /// Reads the same bytes in order past the cache, and returns how many.
    #[must_use]
    pub fn read_directly(&self, threads: usize) -> u64 {
        let open = |path| {
            let flags = OFlags::RDONLY | OFlags::DIRECT;
            File::from(rustix::fs::open(path, flags, Mode::empty()).expect("a file system with direct reads"))
        };
        let files: Vec<(File, usize)> = self
            .files
            .iter()
            .map(|path| (open(path), usize::try_from(path.metadata().expect("a file").len()).expect("fits")))
            .collect();
        let blocks: Vec<(usize, usize)> = files
            .iter()
            .enumerate()
            .flat_map(|(file, &(_, bytes))| (0..bytes).step_by(BLOCK).map(move |offset| (file, offset)))
            .collect();
        let (next, read) = (AtomicUsize::new(0), AtomicU64::new(0));
        std::thread::scope(|scope| {
            for _ in 0..threads {
                scope.spawn(|| {
                    let mut buffer = vec![0u8; BLOCK + ALIGN];
                    let start = buffer.as_ptr().align_offset(ALIGN);
                    while let Some(&(file, offset)) = blocks.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let (file, bytes) = &files[file];
                        let len = BLOCK.min(bytes - offset);
                        file.read_exact_at(&mut buffer[start..start + len], offset as u64)
                            .expect("a sound disk");
                        read.fetch_add(len as u64, Ordering::Relaxed);
                    }
                });
            }
        });
        read.into_inner()
    }
}
