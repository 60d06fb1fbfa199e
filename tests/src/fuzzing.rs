//! What the fuzz targets feed bytes to. Each returns whatever the bytes are, or panics: that is a finding.

use lite_llm_core::disk::Disk;
use lite_llm_core::engine::Engine;
use lite_llm_core::input::Input;
use lite_llm_core::journal::frame::{segment_name, snapshot_name};
use lite_llm_core::journal::scan;
use lite_llm_core::replay::{decode_input, encode_input};
use lite_llm_model::Checkpoint;
use lite_llm_model::checkpoint::config::Config;
use lite_llm_model::families;
use lite_llm_sim::decision::LogFile;
use lite_llm_sim::disk::SimDisk;
use lite_llm_sim::machine::{Scenario, run_with};
use lite_llm_sim::random::Choice;
use std::path::Path;

use crate::heard::anything_heard;
use crate::kept::anything_kept;
use crate::received::anything_received;
use crate::supervised::anything_said;

/// A target: its name, which is that of its corpus, and what it does.
pub type Target = (&'static str, fn(&[u8]));

/// Every target.
pub const TARGETS: &[Target] = &[
    ("config", config),
    ("manifest", manifest),
    ("safetensors", safetensors),
    ("gguf", gguf),
    ("journal", journal),
    ("snapshot", snapshot),
    ("input", input),
    ("engine", engine),
    ("decisions", decisions),
    ("supervisor", supervisor),
    ("messages", messages),
    ("frames", frames),
];

/// `config.json` of a checkpoint.
pub fn config(bytes: &[u8]) {
    if let Ok(config) = Config::parse(Path::new("config.json"), bytes) {
        let _ = families::read(&config);
    }
}

/// `manifest.json` of a native checkpoint, beside the right configuration and no shards.
pub fn manifest(bytes: &[u8]) {
    open_beside("manifest.json", bytes);
}

/// `model.safetensors` beside the right configuration.
pub fn safetensors(bytes: &[u8]) {
    open_beside("model.safetensors", bytes);
}

/// A GGUF file beside the right configuration.
pub fn gguf(bytes: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("model.gguf");
    std::fs::write(&file, bytes).unwrap();
    let _ = Checkpoint::open_source(&file, Some(&crate::harness::folder("olmoe")));
}

fn open_beside(name: &str, bytes: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    std::fs::copy(crate::harness::folder("olmoe").join("config.json"), dir.path().join("config.json"))
        .unwrap();
    std::fs::write(dir.path().join(name), bytes).unwrap();
    let _ = Checkpoint::open(dir.path());
}

/// A segment of a journal.
pub fn journal(bytes: &[u8]) {
    if let Ok(scanned) = scan(&mut disk_with(&segment_name(1, 1), bytes)) {
        for (record, seq) in scanned.records.iter().zip(1..) {
            assert_eq!(record.seq, seq, "records are dense");
        }
    }
}

/// A snapshot, with its header and without.
pub fn snapshot(bytes: &[u8]) {
    let _ = scan(&mut disk_with(&snapshot_name(5), bytes));
    if let Ok(engine) = Engine::restore(bytes) {
        let again = Engine::restore(&engine.snapshot()).unwrap();
        assert_eq!(again.state_digest(), engine.state_digest());
    }
}

fn disk_with(name: &str, bytes: &[u8]) -> SimDisk {
    let mut disk = SimDisk::new();
    disk.create_new(name).unwrap();
    disk.append(name, bytes).unwrap();
    disk.sync(name).unwrap();
    disk
}

/// The payload of a record.
pub fn input(bytes: &[u8]) {
    if let Ok(input) = decode_input::<Input>(bytes) {
        let encoded = encode_input(&input);
        assert_eq!(encode_input(&decode_input::<Input>(&encoded).unwrap()), encoded);
    }
}

/// Choices of clients, faults, crashes and completions against the reference model.
pub fn engine(bytes: &[u8]) {
    let length = bytes.len() as u64;
    let scenario = Scenario { choices: length, warm_slots: length / 2 % 3, ..Scenario::of(0) };
    let _ = run_with(&Scenario { crash_per_mille: 8, fault_per_mille: 15, ..scenario }, Choice::given(bytes));
}

/// Choices of what a supervisor of a cluster hears.
pub fn supervisor(bytes: &[u8]) {
    anything_said(Choice::given(bytes), bytes.len() / 4);
}

/// What ranks of a replica tell each other.
pub fn messages(bytes: &[u8]) {
    anything_heard(bytes);
    anything_kept(bytes);
}

/// What comes over a connection of a cluster's network: a handshake, frames, and what is in them.
pub fn frames(bytes: &[u8]) {
    anything_received(bytes);
}

/// A decision log of a simulated run.
pub fn decisions(bytes: &[u8]) {
    if let Ok(file) = LogFile::parse(&String::from_utf8_lossy(bytes)) {
        assert_eq!(LogFile::parse(&file.to_text()), Ok(file));
    }
}
