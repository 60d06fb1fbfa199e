//! The experts of a native checkpoint in each way that they can be read, and as the disk has them.

use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{ExpertKey, LoadId, Slot};
use lite_llm_hw::arena::Arena;
use lite_llm_hw::cold::{Answer, Cold, Fetch, Io, Load, Reader, Told};
use lite_llm_model::kernels::Isa;
use lite_llm_model::{Checkpoint, ExpertLoader, Model, ModelOptions};
use rustix::fs::{Advice, Mode, OFlags, fadvise};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, channel};

/// Bytes of one direct read.
const BLOCK: usize = 8 << 20;
/// What direct reads are aligned to.
const ALIGN: usize = 4096;
/// Loads that the engine has under way at most, unless it is told otherwise.
const LOADS_MAX: usize = 8;

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

    /// Opens one of the ways to read them, with slots for as many loads as there are at a time.
    #[must_use]
    pub fn way(&self, io: Io) -> Way<'_> {
        let slots = u32::try_from(LOADS_MAX).expect("few slots");
        let bytes = LOADS_MAX as u64 * self.slot_bytes as u64;
        let arena = Arena::new(slots, self.slot_bytes as u64, bytes).expect("memory for slots");
        let cold = Cold::open(Some(io), &self.loader, bytes).expect("a way that this machine has");
        let (report, fetch) = (cold.report().to_owned(), cold.fetch().expect("a native checkpoint"));
        let (told, answers) = channel();
        let reader = cold.reader(move |what| told.send(what).is_ok()).expect("threads");
        Way { experts: self, arena, report, fetch, reader, answers }
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

/// A way to read experts into slots.
#[derive(Debug)]
pub struct Way<'a> {
    experts: &'a Experts,
    arena: Arc<Arena>,
    report: String,
    fetch: Fetch,
    reader: Option<Reader>,
    answers: Receiver<Told>,
}

impl Way<'_> {
    /// How they are read, in words.
    #[must_use]
    pub fn report(&self) -> &str {
        &self.report
    }

    /// Loads each expert into a slot, by the reader or by so many threads, and returns how many were loaded.
    #[must_use]
    pub fn load(&self, threads: usize) -> u64 {
        match &self.reader {
            Some(reader) => self.load_by(reader),
            None => self.load_with(threads),
        }
        self.experts.keys.len() as u64
    }

    /// As the engine does it: another load as soon as one has ended.
    fn load_by(&self, reader: &Reader) {
        let ask = |slot: usize, expert: ExpertKey| {
            let load = LoadId(slot as u64);
            let blob = self.experts.loader.blob(expert).expect("a whole expert");
            let slot = self.arena.write(Slot(u32::try_from(slot).expect("few slots")));
            reader.read(Load { epoch: 0, load, expert, blob, slot, keep: None });
        };
        let mut keys = self.experts.keys.iter().copied();
        keys.by_ref().take(LOADS_MAX).enumerate().for_each(|(slot, key)| ask(slot, key));
        for _ in 0..self.experts.keys.len() {
            let Ok(Told::Answer(Answer { load, result: Ok(()), .. })) = self.answers.recv() else {
                panic!("a sound disk")
            };
            if let Some(key) = keys.next() {
                ask(usize::try_from(load.0).expect("a slot"), key);
            }
        }
    }

    fn load_with(&self, threads: usize) {
        let next = AtomicUsize::new(0);
        let Self { experts, arena, fetch, .. } = self;
        std::thread::scope(|scope| {
            for thread in 0..threads {
                let next = &next;
                scope.spawn(move || {
                    let mut slot = arena.write(Slot(u32::try_from(thread).expect("few threads")));
                    while let Some(&key) = experts.keys.get(next.fetch_add(1, Ordering::Relaxed)) {
                        let blob = experts.loader.blob(key).expect("a whole expert");
                        fetch.read(key, &blob, &mut slot).expect("a sound checkpoint");
                    }
                });
            }
        });
    }
}
