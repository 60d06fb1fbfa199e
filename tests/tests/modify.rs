//! Experts get new parameters in mid-request, on a real node with real files: each position is computed under the
//! revision that the journal says, in every life, and the blobs live as long as anything refers to them.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::config::Config;
use lite_llm_core::ids::{ExpertKey, Generation, RequestId};
use lite_llm_core::input::Body;
use lite_llm_hw::node::{Node, NodeOptions, StreamEvent};
use lite_llm_model::kernels::DType;
use lite_llm_tests::harness::{PLAIN, folder, open, run_modified};
use std::path::Path;
use std::sync::mpsc::Receiver;

const TOKENS: u32 = 480;
const PROMPT: [u32; 9] = [265, 338, 449, 471, 56, 294, 193, 318, 99];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kill {
    Never,
    /// As soon as the modification was asked for.
    Asked,
    /// When it is committed.
    Committed,
    /// Some tokens later.
    Later,
}

fn start(state: &Path) -> Node {
    let config = Config { memory_bytes: 1 << 30, ..Config::default() };
    let options =
        NodeOptions { kv_dtype: Some(DType::F32), ..NodeOptions::new(folder("olmoe"), state, config) };
    Node::start(options).unwrap()
}

fn id() -> RequestId {
    RequestId::new("r").unwrap()
}

fn body() -> Body {
    Body { prompt: PROMPT.to_vec(), max_tokens: TOKENS, ignore_eos: true, ..Body::default() }
}

fn submit(node: &Node) -> Receiver<StreamEvent> {
    node.submit(id(), body(), 0)
}

/// Keeps the node busy, so that a stream is still under way when new bytes have become durable.
fn submit_company(node: &Node) {
    for number in 0..15 {
        drop(node.submit(RequestId::new(format!("company-{number}")).unwrap(), body(), 0));
    }
}

/// In every layer expert 1 takes the parameters of expert 2.
fn changes() -> Vec<(ExpertKey, Vec<u8>)> {
    let model = open(&folder("olmoe"), PLAIN);
    let key = |layer, expert| ExpertKey { layer, tier: 0, group: 0, expert };
    let bytes = |layer| {
        let mut slot = vec![0; model.slot_bytes()];
        model.expert_loader().load(key(layer, 2), &mut slot).unwrap();
        slot
    };
    (0..3).map(|layer| (key(layer, 1), bytes(layer))).collect()
}

fn tokens(events: &Receiver<StreamEvent>, count: usize) -> Vec<u32> {
    let tokens = events.iter().filter_map(|event| match event {
        StreamEvent::Token { token, .. } => Some(token),
        StreamEvent::Refused { reason, .. } => panic!("refused: {reason}"),
        StreamEvent::Accepted { .. } | StreamEvent::Finish { .. } => None,
    });
    tokens.take(count).collect()
}

fn modified_in_mid_request(kill: Kill) {
    let state = tempfile::tempdir().unwrap();
    let changes = changes();
    let mut node = start(state.path());
    let mut events = submit(&node);
    submit_company(&node);
    let outcome = node.modify(changes.clone());
    if kill != Kill::Asked {
        assert_eq!(outcome.recv().unwrap(), Ok(Generation(1)));
    }
    if kill == Kill::Later {
        tokens(&events, 20);
    }
    if kill != Kill::Never {
        drop(node);
        node = start(state.path());
    }
    events = submit(&node);
    let stream = tokens(&events, TOKENS as usize);
    let spans = node.handle().generations(&id()).unwrap().unwrap();
    assert!(
        kill == Kill::Asked || spans.len() == 2,
        "{kill:?}: the request was computed under both: {spans:?}"
    );
    let from = (spans.len() == 2).then(|| (spans[0].until as usize, &changes[..]));
    let reference = run_modified(&open(&folder("olmoe"), PLAIN), &[0], &PROMPT, TOKENS as usize, PLAIN, from);
    assert_eq!(stream, reference.tokens, "{kill:?}");
    if spans.len() == 2 {
        let plain = run_modified(&open(&folder("olmoe"), PLAIN), &[0], &PROMPT, TOKENS as usize, PLAIN, None);
        assert_ne!(stream, plain.tokens, "the modification changes the stream");
        assert_eq!(std::fs::read_dir(state.path().join("experts")).unwrap().count(), 3);
    }
}

#[test]
fn positions_keep_their_revision_in_every_life() {
    for kill in [Kill::Never, Kill::Asked, Kill::Committed, Kill::Later] {
        modified_in_mid_request(kill);
    }
}

#[test]
fn replaced_blobs_go_and_bad_modifications_are_refused() {
    let state = tempfile::tempdir().unwrap();
    let node = start(state.path());
    let modify = |experts| node.modify(experts).recv().unwrap();
    assert!(modify(vec![]).unwrap_err().contains("experts must be given"));
    let mut short = changes();
    short[0].1.pop();
    assert!(modify(short).unwrap_err().contains("a slot has"));
    let mut unknown = changes();
    unknown[2].0.layer = 9;
    assert!(modify(unknown).unwrap_err().contains("no expert"));
    assert_eq!(modify(changes()), Ok(Generation(1)));
    let mut other = changes();
    other[0].1[0] ^= 1;
    other.truncate(1);
    assert_eq!(modify(other), Ok(Generation(2)));
    drop(node);
    let node = start(state.path());
    let blobs = std::fs::read_dir(state.path().join("experts")).unwrap().count();
    assert_eq!(blobs, 3, "the replaced blob of layer 0 is gone, its successor is there");
    drop(node);
}
