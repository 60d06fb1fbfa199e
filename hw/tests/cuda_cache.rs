//! The cache of compiled kernels, with a stand-in for the compiler: what is read is whole and its own, or compiled again.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use lite_llm_hw::cuda::CudaError;
use lite_llm_hw::cuda::cache::{Built, Cache, CacheError, ENTRIES_MAX, Origin};
use lite_llm_hw::cuda::kernels::{Compiler, HEADERS, KERNELS, Source, Target, key};
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Barrier;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

const TARGET: Target = Target::Cubin(90);

#[derive(Default)]
struct StandIn {
    version: usize,
    calls: AtomicUsize,
    /// Does not compile this.
    refused: Option<&'static str>,
    /// The first source waits here for another process.
    barrier: Option<Barrier>,
}

impl Compiler for StandIn {
    fn version(&self) -> String {
        format!("stand-in {}", self.version)
    }

    fn compile(&self, source: &Source, target: Target) -> Result<Vec<u8>, CudaError> {
        self.calls.fetch_add(1, Ordering::Relaxed);
        if let Some(barrier) = self.barrier.as_ref().filter(|_| source.name == KERNELS[0].name) {
            barrier.wait();
        }
        if self.refused == Some(source.name) {
            let (source_name, why, log) = (source.name.to_owned(), "no".to_owned(), "line 7".to_owned());
            return Err(CudaError::Compile { source_name, target, why, log });
        }
        Ok(format!("{} of {} for {target}", source.name, self.version()).into_bytes())
    }
}

impl StandIn {
    fn of(version: usize) -> Self {
        Self { version, ..Self::default() }
    }

    /// The kernels, and whether every one of them was compiled for that or none.
    fn build(&self, cache: &Cache) -> (Built, bool) {
        let before = self.calls.load(Ordering::Relaxed);
        let built = cache.kernels(self, TARGET).unwrap();
        let names: Vec<&str> = built.modules.iter().map(|module| module.name.as_str()).collect();
        assert_eq!(names, KERNELS.iter().map(|source| source.name).collect::<Vec<_>>());
        for (module, source) in built.modules.iter().zip(KERNELS) {
            assert_eq!(module.code, format!("{} of {} for sm_90", source.name, self.version()).into_bytes());
        }
        let calls = self.calls.load(Ordering::Relaxed) - before;
        assert!(calls == 0 || calls == KERNELS.len(), "{calls} calls");
        (built, calls > 0)
    }
}

fn files(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[test]
fn what_was_compiled_is_found_again() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, compiler) = (Cache::of(&dir.path().join("a/b")), StandIn::default());
    let (first, compiled) = compiler.build(&cache);
    let Origin::Compiled { damaged: false, kept: Ok(path) } = first.origin else { panic!("{first:?}") };
    assert!(compiled);
    let (second, compiled) = compiler.build(&cache);
    assert!(!compiled && matches!(&second.origin, Origin::Cache(from) if *from == path), "{second:?}");
    assert_eq!(files(path.parent().unwrap()), [path], "and nothing is left aside");
    // What another version makes is something else.
    assert!(StandIn::of(1).build(&cache).1);
}

#[test]
fn a_key_names_the_compiler_and_the_target() {
    let keys = [(0, 80), (0, 90), (1, 90)].map(|(version, to)| key(&StandIn::of(version), Target::Cubin(to)));
    assert_eq!(BTreeSet::from(keys).len(), 3);
    assert_ne!(key(&StandIn::of(0), Target::Ptx(90)), keys[1]);
}

#[test]
fn a_damaged_entry_is_compiled_again_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let (cache, compiler) = (Cache::of(dir.path()), StandIn::default());
    compiler.build(&cache);
    let [path] = &files(dir.path())[..] else { panic!("one entry") };
    let good = std::fs::read(path).unwrap();
    let damages = (0..good.len()).step_by(17).flat_map(|at| {
        let mut flipped = good.clone();
        flipped[at] ^= 4;
        [flipped, good[..at].to_vec()]
    });
    let longer = [good.as_slice(), &[0]].concat();
    for damage in damages.chain([longer]) {
        std::fs::write(path, &damage).unwrap();
        let (built, compiled) = compiler.build(&cache);
        assert!(compiled && matches!(built.origin, Origin::Compiled { damaged: true, kept: Ok(_) }));
        assert_eq!(std::fs::read(path).unwrap(), good);
    }
    // Whole, but of another key.
    let other = StandIn::of(1);
    other.build(&cache);
    let theirs = files(dir.path()).into_iter().find(|file| file != path).unwrap();
    std::fs::copy(path, &theirs).unwrap();
    assert!(other.build(&cache).1);
}

#[test]
fn two_at_once_disturb_neither() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::of(dir.path());
    let compiler = StandIn { barrier: Some(Barrier::new(2)), ..StandIn::default() };
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let built = cache.kernels(&compiler, TARGET).unwrap();
                assert!(
                    matches!(built.origin, Origin::Compiled { damaged: false, kept: Ok(_) }),
                    "{built:?}"
                );
            });
        }
    });
    assert_eq!(compiler.calls.load(Ordering::Relaxed), 2 * KERNELS.len(), "both found nothing");
    assert_eq!(files(dir.path()).len(), 1);
    assert!(!compiler.build(&cache).1);
}

#[test]
fn what_cannot_be_kept_is_used_all_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    let compiler = StandIn::default();
    let (built, _) = compiler.build(&Cache::of(&file.join("cache")));
    let Origin::Compiled { damaged: false, kept: Err(error @ CacheError::Write { .. }) } = built.origin
    else {
        panic!("{built:?}")
    };
    let words = error.to_string();
    assert!(words.contains("file/cache") && words.contains("XDG_CACHE_HOME"), "{words}");

    // Something else has the name of the entry: nothing is left of what was written aside.
    let cache = Cache::of(&dir.path().join("cache"));
    let (built, _) = compiler.build(&cache);
    let Origin::Compiled { kept: Ok(path), .. } = built.origin else { panic!("{built:?}") };
    std::fs::remove_file(&path).unwrap();
    std::fs::create_dir(&path).unwrap();
    let (built, _) = compiler.build(&cache);
    assert!(matches!(built.origin, Origin::Compiled { damaged: true, kept: Err(_) }), "{built:?}");
    assert_eq!(files(path.parent().unwrap()), [path]);
}

#[test]
fn a_source_that_does_not_compile_says_so_and_is_not_kept() {
    let dir = tempfile::tempdir().unwrap();
    let compiler = StandIn { refused: Some("moe.cu"), ..StandIn::default() };
    let words = Cache::of(dir.path()).kernels(&compiler, TARGET).unwrap_err().to_string();
    assert!(words.contains("moe.cu") && words.contains("sm_90") && words.contains("line 7"), "{words}");
    assert!(files(dir.path()).is_empty());
}

#[test]
fn the_cache_keeps_the_newest_entries() {
    let dir = tempfile::tempdir().unwrap();
    let cache = Cache::of(dir.path());
    let old = |path: &Path, hours: u64| {
        let file = std::fs::File::options().append(true).create(true).open(path).unwrap();
        file.set_modified(SystemTime::now() - Duration::from_secs(3600 * hours)).unwrap();
    };
    let (left, fresh, other) =
        (dir.path().join("1.aside"), dir.path().join("2.aside"), dir.path().join("notes"));
    old(&left, 2);
    old(&fresh, 0);
    old(&other, 99);
    let many = ENTRIES_MAX + 3;
    for version in 0..many {
        let (built, _) = StandIn::of(version).build(&cache);
        let Origin::Compiled { kept: Ok(path), .. } = built.origin else { panic!("{built:?}") };
        old(&path, (many - version) as u64);
    }
    let entries =
        files(dir.path()).into_iter().filter(|path| path.extension().is_some_and(|e| e == "kernels"));
    assert_eq!(entries.count(), ENTRIES_MAX);
    assert!(!left.exists() && fresh.exists() && other.exists());
    for version in 3..many {
        assert!(!StandIn::of(version).build(&cache).1, "{version} is among the newest");
    }
    assert!(StandIn::of(2).build(&cache).1);
}

#[test]
fn machine_code_comes_before_what_the_driver_translates() {
    let made = [75, 80, 90, 100];
    assert_eq!(Target::of(90, &made), Some(Target::Cubin(90)));
    assert_eq!(Target::of(86, &made), Some(Target::Ptx(80)));
    assert_eq!(Target::of(121, &made), Some(Target::Ptx(100)));
    assert_eq!(Target::of(70, &made), None);
}

#[test]
fn every_source_is_part_of_the_program() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda");
    let named = |extension: &str| -> BTreeSet<String> {
        let files =
            files(&folder).into_iter().filter(|path| path.extension().is_some_and(|e| e == extension));
        files.map(|path| path.file_name().unwrap().to_str().unwrap().to_owned()).collect()
    };
    let embedded = |sources: &[Source]| sources.iter().map(|source| source.name.to_owned()).collect();
    assert_eq!(named("cu"), embedded(KERNELS));
    assert_eq!(named("cuh"), embedded(HEADERS));
}
