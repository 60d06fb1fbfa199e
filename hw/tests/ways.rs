//! A node reads its experts in each way, and says which: the tokens are the oracle's.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use lite_llm_core::config::Config;
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::Body;
use lite_llm_core::output::FinishReason;
use lite_llm_hw::cold::{ColdError, Io};
use lite_llm_hw::node::{Node, NodeError, NodeOptions, StreamEvent};
use lite_llm_hw::telemetry;
use lite_llm_model::checkpoint::import::import;
use lite_llm_model::kernels::DType;

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/olmoe")
}

/// What the oracle makes of a prompt: the prompt, and what follows.
fn oracle(prompt: usize) -> (Vec<u32>, Vec<u32>) {
    let text = std::fs::read_to_string(fixture().join("oracle.json")).unwrap();
    let oracle: serde_json::Value = serde_json::from_str(&text).unwrap();
    let tokens = |value: &serde_json::Value| -> Vec<u32> { serde_json::from_value(value.clone()).unwrap() };
    (tokens(&oracle["prompts"][prompt]), tokens(&oracle["greedy"][prompt]["tokens"]))
}

fn options(model: &Path, state: &Path, io: Option<Io>) -> NodeOptions {
    let config = Config { memory_bytes: 512 << 20, ..Config::default() };
    NodeOptions { threads: 2, kv_dtype: Some(DType::F32), io, ..NodeOptions::new(model, state, config) }
}

fn generate(node: &Node, prompt: usize) -> Vec<u32> {
    let (prompt, greedy) = oracle(prompt);
    let body = Body { prompt, max_tokens: greedy.len() as u32, ..Body::default() };
    let token = |event| if let StreamEvent::Token { token, .. } = event { Some(token) } else { None };
    node.submit(RequestId::new("r").unwrap(), body, 0).into_iter().filter_map(token).collect()
}

#[test]
fn every_way_gives_the_tokens_of_the_oracle() {
    let dir = tempfile::tempdir().unwrap();
    let native = dir.path().join("native");
    import(&fixture(), &native, None, 2, |_, _| {}).unwrap();
    let state = || tempfile::tempdir().unwrap();
    let (_, greedy) = oracle(2);

    // As little memory as will do, and three warm slots: experts come and go, are demoted and promoted.
    let small = |io, slot_bytes: u64| {
        let state = tempfile::tempdir().unwrap();
        let options = |memory_bytes, warm_bytes| {
            let mut options = options(&native, state.path(), io);
            (options.config.memory_bytes, options.config.warm_bytes) = (memory_bytes, warm_bytes);
            Node::start(options)
        };
        let Err(NodeError::Boot(words)) = options(1, 0) else { panic!("one byte is not enough") };
        let (_, needed) = words.split_once("needs at least ").unwrap();
        let least: u64 = needed.split(':').next().unwrap().parse().unwrap();
        let node = options(least + 3 * slot_bytes, 3 * slot_bytes).unwrap();
        (state, node)
    };
    let ways: [(Option<Io>, &[&str]); 4] = [
        (Some(Io::Uring), &["io_uring"]),
        (Some(Io::Pread), &["with pread"]),
        (Some(Io::Mmap), &["with mmap"]),
        (None, &["io_uring", "with pread"]),
    ];
    for (io, names) in ways {
        let state = state();
        let node = match Node::start(options(&native, state.path(), io)) {
            // A sandbox may forbid it, a file system have no direct reads.
            Err(NodeError::Cold(ColdError::Refused { io: Io::Uring, .. })) => continue,
            node => node.unwrap(),
        };
        assert!(names.iter().any(|name| node.reading().contains(name)), "{io:?}: {}", node.reading());
        assert_eq!(generate(&node, 2), greedy, "{io:?}");
        let slot_bytes = node.status().unwrap().carving.slot_bytes;
        drop(node);
        let (state, node) = small(io, slot_bytes);
        let carving = node.status().unwrap().carving;
        assert_eq!((carving.slots, carving.warm_slots), (2, 3), "{io:?}");
        assert_eq!(generate(&node, 2), greedy, "{io:?}, with little memory");
        node.drain(None).unwrap();
        node.wait().unwrap();
        let timings = std::fs::read_to_string(state.path().join(telemetry::TIMINGS_NAME)).unwrap();
        for what in ["{\"Load\":", "{\"Promote\":"] {
            assert!(timings.contains(what), "{io:?}: {what}");
        }
    }
}

#[test]
fn a_way_that_cannot_be_had_is_refused_before_anything_is_loaded() {
    for io in [Io::Uring, Io::Pread] {
        let state = tempfile::tempdir().unwrap();
        let refused = Node::start(options(&fixture(), state.path(), Some(io)));
        let Err(NodeError::Cold(error)) = refused else { panic!("{io} is not refused") };
        let words = error.to_string();
        for part in [&format!("with {io}"), "packed from mapped tensors", "import", "--io"] {
            assert!(words.contains(part), "{words}");
        }
    }
    // That is what is done anyway.
    let state = tempfile::tempdir().unwrap();
    let node = Node::start(options(&fixture(), state.path(), Some(Io::Mmap))).unwrap();
    assert_eq!(node.reading(), "experts are packed from mapped tensors");
}

#[test]
fn a_checkpoint_cut_short_while_it_is_served_ends_requests_and_not_the_node() {
    for io in [None, Some(Io::Pread), Some(Io::Mmap)] {
        let dir = tempfile::tempdir().unwrap();
        let (native, state) = (dir.path().join("native"), dir.path().join("state"));
        import(&fixture(), &native, None, 2, |_, _| {}).unwrap();
        let start = |memory_bytes| {
            let mut options = options(&native, &state, io);
            options.config.memory_bytes = memory_bytes;
            Node::start(options)
        };
        let Err(NodeError::Boot(words)) = start(1) else { panic!("one byte is not enough") };
        let (_, needed) = words.split_once("needs at least ").unwrap();
        let node = start(needed.split(':').next().unwrap().parse().unwrap()).unwrap();
        assert_eq!(generate(&node, 2), oracle(2).1, "{io:?}");

        for entry in std::fs::read_dir(&native).unwrap() {
            let path = entry.unwrap().path();
            if path.file_name().unwrap().to_string_lossy().starts_with("experts-") {
                std::fs::File::options().write(true).open(&path).unwrap().set_len(4096).unwrap();
            }
        }
        let body = Body { prompt: oracle(1).0, max_tokens: 4, ..Body::default() };
        let last = node.submit(RequestId::new("cut").unwrap(), body, 0).into_iter().last();
        let Some(StreamEvent::Finish { reason: FinishReason::Fault(words), .. }) = last else {
            panic!("{io:?}: {last:?}")
        };
        assert!(words.contains("experts-") && words.contains("cannot be loaded"), "{io:?}: {words}");
        assert_eq!(node.status().unwrap().requests.len(), 0, "{io:?}: it serves on");
        node.drain(None).unwrap();
        node.wait().unwrap();
    }
}
