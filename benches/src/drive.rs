//! The smallest driver that an engine can have: every load ends at once, every step chooses the same token.

use lite_llm_core::config::{Config, Placement};
use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::ids::{ExpertKey, Incarnation, RequestId};
use lite_llm_core::input::{Body, Input, RowResult};
use lite_llm_core::journal::Record;
use lite_llm_core::output::{Forward, Output};
use lite_llm_core::plan::{Identity, ModelPlan, TierPlan};
use lite_llm_core::replay::encode_input;
use lite_llm_core::time::Time;
use std::collections::VecDeque;

const LAYERS: u32 = 16;
const EXPERTS: u32 = 64;
const TOP_K: u32 = 8;
const SLOT_BYTES: u64 = 12 << 20;
const PAGE_BYTES: u64 = 8 << 20;
const BASE_BYTES: u64 = 1 << 30;
/// Pages of 64 positions, so that eight requests of some hundred positions fit.
const PAGES: u64 = 256;

/// An engine that serves, and all that it was told.
#[derive(Debug)]
pub struct Driven {
    /// The engine.
    pub engine: Engine,
    /// What a journal of it would hold, if it was asked for.
    pub records: Vec<Record>,
    recorded: bool,
    inputs: VecDeque<Input>,
    step: Option<Step>,
}

/// A step that asks for its experts layer by layer.
#[derive(Debug)]
struct Step {
    forward: Forward,
    layer: u32,
    left: usize,
    wave_left: u32,
}

/// The plan of OLMoE's shape: 16 layers of 64 experts, 8 chosen.
fn plan() -> ModelPlan {
    ModelPlan {
        format: ModelPlan::FORMAT,
        identity: Identity::default(),
        tiers: vec![TierPlan { name: "all".into(), groups: 1, experts: EXPERTS, placement: Placement::Hot }],
        layers: LAYERS,
        moe_layers: (0..LAYERS).collect(),
        top_k: TOP_K,
        slot_bytes: SLOT_BYTES,
        base_shards: vec![BASE_BYTES],
        router_bytes: 0,
        overhead_bytes: 0,
        page_positions: 64,
        page_bytes: PAGE_BYTES,
        kv_groups: vec![None],
        context: 4096,
        vocab: 50304,
        eos: vec![],
    }
}

impl Driven {
    /// Boots an engine with room for this many experts.
    #[must_use]
    pub fn boot(slots: u64, recorded: bool) -> Self {
        let memory_bytes = BASE_BYTES + slots * SLOT_BYTES + PAGES * PAGE_BYTES;
        let config = Config { memory_bytes, ..Config::default() };
        let boot = Input::Boot { incarnation: Incarnation(1), config: config.into(), entropy: 7 };
        let (engine, inputs) = (Engine::new(), VecDeque::from([boot]));
        let mut driven = Self { engine, records: Vec::new(), recorded, inputs, step: None };
        driven.run();
        driven
    }

    /// Serves this many requests at once to their end, each of 16 tokens and `tokens` more. Returns the inputs handled.
    pub fn serve(&mut self, requests: u32, tokens: u32) -> u64 {
        let before = self.engine.next_seq().0;
        for number in 0..requests {
            let id = RequestId::new(format!("{before}-{number}")).expect("a good id");
            let body = Body { prompt: (3..19).collect(), max_tokens: tokens, ..Body::default() };
            self.inputs.push_back(Input::Submit { id, body: body.into(), from: 0 });
        }
        self.run();
        self.engine.next_seq().0 - before
    }

    fn run(&mut self) {
        while let Some(input) = self.inputs.pop_front() {
            let now = Time(self.engine.now().0 + 1000);
            if self.recorded {
                self.records.push(Record {
                    seq: self.engine.next_seq().0,
                    time_ns: now.0,
                    digest: self.engine.digest().0,
                    payload: encode_input(&input),
                });
            }
            self.engine.handle(now, input);
            loop {
                match self.engine.poll() {
                    Output::Wait { .. } => break,
                    output => self.obey(output),
                }
            }
        }
    }

    fn obey(&mut self, output: Output) {
        let answer = match output {
            Output::Reserve { .. } => Input::Reserved,
            Output::ReadManifest => Input::ManifestRead { plan: plan().into() },
            Output::LoadBase { shard } => Input::BaseLoaded { shard },
            Output::LoadRouters => Input::RoutersLoaded,
            Output::Load { load, .. } | Output::Stage { load, .. } => Input::Loaded { load, fault: None },
            Output::Forward(forward) if forward.resident.is_some() => finished(&forward),
            Output::Forward(forward) => {
                let step = self.step.insert(Step { forward, layer: 0, left: 0, wave_left: 0 });
                step.need()
            }
            Output::Provide { wave, wave_len, .. } => {
                let step = self.step.as_mut().expect("a step is running");
                match step.provided(wave, wave_len) {
                    Some(inputs) => {
                        self.inputs.extend(inputs);
                        return;
                    }
                    None => return,
                }
            }
            Output::Exit { error, .. } => panic!("the engine ends: {error:?}"),
            _ => return,
        };
        self.inputs.push_back(answer);
    }
}

impl Step {
    /// Eight experts of the layer, others for each step.
    fn need(&mut self) -> Input {
        let turn = u32::try_from(self.forward.step.0 % 1024).expect("below 1024");
        let first = (turn * 5 + self.layer * 3) % (EXPERTS - TOP_K);
        let key = |expert| ExpertKey { layer: self.layer, tier: 0, group: 0, expert };
        let experts: Vec<ExpertKey> = (first..first + TOP_K).map(key).collect();
        self.left = experts.len();
        let Forward { step, attempt, .. } = self.forward;
        Input::Need { step, attempt, layer: self.layer, experts, foreseen: Vec::new() }
    }

    /// What the backend says once the wave is over.
    fn provided(&mut self, wave: u32, wave_len: u32) -> Option<Vec<Input>> {
        if self.wave_left == 0 {
            self.wave_left = wave_len;
        }
        self.wave_left -= 1;
        self.left -= 1;
        if self.wave_left > 0 {
            return None;
        }
        let Forward { step, attempt, .. } = self.forward;
        let mut inputs = vec![Input::Released { step, attempt, layer: self.layer, wave }];
        if self.left == 0 {
            self.layer += 1;
            inputs.push(if self.layer < LAYERS { self.need() } else { finished(&self.forward) });
        }
        Some(inputs)
    }
}

fn finished(forward: &Forward) -> Input {
    let row = |sample: bool| RowResult { token: sample.then_some(9), stop: false, digest: Digest::default() };
    let rows = forward.rows.iter().map(|r| row(r.sample.is_some())).collect();
    Input::Finished { step: forward.step, attempt: forward.attempt, rows, duration_ns: 1_000_000 }
}
