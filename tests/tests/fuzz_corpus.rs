//! The fuzz corpora as plain tests: every file as it is, and mutated by a seed. `MUTATIONS=N` asks for more than a few.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::LOGIC_VERSION;
use lite_llm_core::engine::Engine;
use lite_llm_core::journal::frame::{SNAPSHOT_HEADER_BYTES, SegmentHeader, SnapshotHeader};
use lite_llm_sim::random::Choice;
use lite_llm_tests::fuzzing::TARGETS;
use std::path::Path;

fn mutations() -> u64 {
    std::env::var("MUTATIONS").ok().and_then(|count| count.parse().ok()).unwrap_or(60)
}

/// Flips, cuts, repeats and overwrites, as a fuzzer does.
fn mutate(bytes: &mut Vec<u8>, choice: &mut Choice) {
    for _ in 0..=choice.below(4) {
        if bytes.is_empty() {
            bytes.push(u8::try_from(choice.below(256)).unwrap());
        }
        let at = choice.index(bytes.len());
        match choice.below(6) {
            0 => bytes.truncate(at),
            1 => bytes[at] ^= 1 << choice.below(8),
            2 => bytes[at] = [0, 1, 0x7f, 0x80, 0xff, b'"', b'9', b'-'][choice.index(8)],
            3 => bytes.insert(at, u8::try_from(choice.below(256)).unwrap()),
            4 => {
                let end = bytes.len().min(at + 1 + choice.index(16));
                let part = bytes[at..end].to_vec();
                bytes.splice(at..at, part);
            }
            _ => {
                let end = bytes.len().min(at + 8);
                bytes[at..end].fill(0xff);
            }
        }
    }
}

#[test]
fn every_corpus_file_and_its_mutants_are_taken() {
    for (name, target) in TARGETS {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name);
        let mut files: Vec<_> = std::fs::read_dir(&dir).unwrap().map(|entry| entry.unwrap().path()).collect();
        files.sort();
        assert!(!files.is_empty(), "{} has no files", dir.display());
        for file in files {
            let bytes = std::fs::read(&file).unwrap();
            target(&bytes);
            let mut choice = Choice::new(bytes.len() as u64);
            for _ in 0..mutations() {
                let mut mutant = bytes.clone();
                mutate(&mut mutant, &mut choice);
                target(&mutant);
            }
        }
    }
}

/// A format that has changed would be fuzzed at its door only: then the seeds are to be made again, by two small runs into
/// one state with a warm arena and `--snapshot-every 25`, so that the snapshot falls into the second.
#[test]
fn the_seeds_are_of_this_version() {
    let seed = |name: &str| {
        std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join("../fuzz/corpus").join(name)).unwrap()
    };
    let whole = seed("snapshot/file");
    let header = SnapshotHeader::decode(&whole[..SNAPSHOT_HEADER_BYTES]).unwrap();
    assert_eq!(header.header.logic_version, LOGIC_VERSION);
    assert_eq!(whole[SNAPSHOT_HEADER_BYTES..], seed("snapshot/state"));
    let engine = Engine::restore(&seed("snapshot/state")).unwrap();
    assert_eq!(engine.view().requests().count(), 1);
    let (header, _) = SegmentHeader::decode(&seed("journal/small")).unwrap();
    assert_eq!(header.header.logic_version, LOGIC_VERSION);
}
