//! The budget is the whole process's, from the first moment: measured on a model that is larger than it.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use lite_llm_core::config::Config;
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::Body;
use lite_llm_hw::memory;
use lite_llm_hw::node::{Node, NodeError, NodeOptions, StreamEvent};
use lite_llm_model::kernels::DType;
use lite_llm_model::synth::{SynthFamily, SynthSpec, synth};

// The only test of its file: another one's memory would be counted too.
#[test]
fn a_model_larger_than_the_budget_is_served_within_it() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("model");
    let spec = SynthSpec {
        hidden: 256,
        head_dim: 32,
        experts: 64,
        intermediate: 512,
        dtype: DType::Bf16,
        ..SynthSpec::of(SynthFamily::Olmoe)
    };
    synth(&model, &spec).unwrap();
    let weights = model.join("model.safetensors").metadata().unwrap().len();

    let options = |memory_bytes| {
        let config = Config { memory_bytes, ..Config::default() };
        NodeOptions { threads: 2, ..NodeOptions::new(&model, dir.path().join("state"), config) }
    };
    let Err(NodeError::Boot(refusal)) = Node::start(options(1)) else { panic!("one byte is not enough") };
    let (_, needed) = refusal.split_once("needs at least ").unwrap();
    let least: u64 = needed.split(':').next().unwrap().parse().unwrap();
    let budget = least + (16 << 20);
    assert!(budget < weights / 2, "the model is to be larger than {budget}, it has {weights}");

    memory::forget_peak();
    let node = Node::start(options(budget)).unwrap();
    let body = Body { prompt: (5..105).collect(), max_tokens: 30, ignore_eos: true, ..Body::default() };
    let events = node.submit(RequestId::new("r").unwrap(), body, 0);
    assert_eq!(events.into_iter().filter(|event| matches!(event, StreamEvent::Token { .. })).count(), 30);
    let peak = memory::peak_bytes().unwrap();
    assert!(peak <= budget, "the process had {peak} bytes, its budget is {budget}");
}
