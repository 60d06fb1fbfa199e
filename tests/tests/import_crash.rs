//! The import's real code on a simulated disk: a crash at every operation with every ending, a fault at every operation,
//! rot in what an earlier attempt finished. Begun again, it makes the very files of an undisturbed import.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::disk::Disk;
use lite_llm_model::ModelError;
use lite_llm_model::checkpoint::import::{Imported, Wanted, import_onto};
use lite_llm_model::checkpoint::tiers::parse_tiers;
use lite_llm_model::kernels::{DType, Quantised};
use lite_llm_model::synth::{SynthFamily, SynthSpec, synth};
use lite_llm_sim::disk::{Ending, Fault, SimDisk};
use lite_llm_sim::random::Choice;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// A source of some kilobytes, with several layers and companions.
fn source() -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("source");
    let spec = SynthSpec {
        layers: 2,
        hidden: 16,
        heads: 2,
        kv_heads: 2,
        head_dim: 8,
        experts: 3,
        top_k: 1,
        intermediate: 8,
        vocab: 20,
        dtype: DType::Bf16,
        ..SynthSpec::of(SynthFamily::Olmoe)
    };
    synth(&path, &spec).unwrap();
    (dir, path)
}

/// As published, and as integers, whose hashes are found when they are written.
const FORMS: [Option<Quantised>; 2] = [None, Some(Quantised::Q8)];

fn import(source: &Path, disk: &mut SimDisk, quantise: Option<Quantised>) -> Result<Imported, ModelError> {
    let tiers = parse_tiers("small:1,large:2:cold").unwrap();
    import_onto(source, disk, Path::new("partial"), Wanted { division: Some(&tiers), quantise, with: None })
}

/// Every file; the notes of the way there apart.
fn files(disk: &mut SimDisk) -> BTreeMap<String, Vec<u8>> {
    let names = disk.list().unwrap().into_iter().filter(|name| name != "progress.jsonl");
    let read = |name: String| {
        let mut bytes = vec![0; usize::try_from(disk.len(&name).unwrap()).unwrap()];
        assert_eq!(disk.read_at(&name, 0, &mut bytes).unwrap(), bytes.len());
        (name, bytes)
    };
    names.map(read).collect()
}

fn undisturbed(source: &Path, quantise: Option<Quantised>) -> (BTreeMap<String, Vec<u8>>, u64) {
    let mut disk = SimDisk::new();
    import(source, &mut disk, quantise).unwrap();
    let operations = disk.operations();
    // All of it is durable when it is done.
    disk.crash(&mut Ending::Old);
    (files(&mut disk), operations)
}

fn endings(seed: u64) -> Vec<Ending> {
    let any = (0..4).map(|i| Ending::Any(Box::new(Choice::new(seed * 4 + i))));
    [Ending::Old, Ending::New, Ending::Zero, Ending::Garbage, Ending::Torn].into_iter().chain(any).collect()
}

#[test]
fn a_crash_at_every_operation_is_gone_on_from() {
    let (_dir, source) = source();
    for quantise in FORMS {
        let (reference, operations) = undisturbed(&source, quantise);
        assert!(
            reference.len() >= 5 && operations > 40,
            "{operations} operations for {:?}",
            reference.keys()
        );
        let mut kept = 0;
        for at in 0..operations {
            for mut ending in endings(at) {
                let mut disk = SimDisk::new();
                disk.fail_at(at, Fault::Crash);
                import(&source, &mut disk, quantise).unwrap_err();
                disk.crash(&mut ending);
                // The manifest is what makes it a checkpoint: where it is, everything is.
                let left = files(&mut disk);
                if left.contains_key("manifest.json") {
                    assert_eq!(left, reference, "crash at {at}, {ending:?}");
                }
                let again = import(&source, &mut disk, quantise)
                    .unwrap_or_else(|e| panic!("crash at {at}, {ending:?}: {e}"));
                disk.crash(&mut Ending::Old);
                assert_eq!(files(&mut disk), reference, "crash at {at}, {ending:?}");
                kept += again.kept;
            }
        }
        assert!(kept > 100, "what was finished is kept: {kept}");
    }
}

#[test]
fn a_fault_at_every_operation_is_said_and_gone_on_from() {
    let (_dir, source) = source();
    for quantise in FORMS {
        let (reference, operations) = undisturbed(&source, quantise);
        for at in 0..operations {
            for fault in [Fault::Io, Fault::NoSpace] {
                let mut disk = SimDisk::new();
                disk.fail_at(at, fault);
                let error = import(&source, &mut disk, quantise).unwrap_err().to_string();
                assert!(error.contains("partial: cannot") && error.contains("goes on"), "{error}");
                disk.heal();
                import(&source, &mut disk, quantise).unwrap_or_else(|e| panic!("{fault:?} at {at}: {e}"));
                disk.crash(&mut Ending::Old);
                assert_eq!(files(&mut disk), reference, "{fault:?} at {at}");
            }
        }
    }
}

#[test]
fn what_rotted_since_it_was_noted_is_written_again() {
    let (_dir, source) = source();
    for quantise in FORMS {
        let (reference, operations) = undisturbed(&source, quantise);
        for name in ["base.bin", "experts-00000.bin", "experts-00001.bin", "progress.jsonl"] {
            for part in 0..8 {
                let mut disk = SimDisk::new();
                disk.fail_at(operations - 1, Fault::Crash);
                import(&source, &mut disk, quantise).unwrap_err();
                disk.crash(&mut Ending::New);
                let len = usize::try_from(disk.len(name).unwrap()).unwrap();
                // A byte of the padding of an aligned blob belongs to nothing; the first ones are data.
                let at = if name == "progress.jsonl" {
                    len * part / 8
                } else {
                    len / 4096 * part / 8 * 4096 + part
                };
                disk.rot(name, at, 0x10);
                import(&source, &mut disk, quantise).unwrap();
                assert_eq!(files(&mut disk), reference, "{name} at {at}");
            }
        }
    }
}
