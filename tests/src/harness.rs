//! A model without an engine: what the tests across the crates compute with.
#![allow(
    clippy::unwrap_used,
    clippy::missing_panics_doc,
    reason = "this is test code; a panic is a failed test"
)]

use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{ExpertKey, Generation, Slot, StepId};
use lite_llm_core::input::{RowResult, Sampling};
use lite_llm_core::output::{Forward, Row, SampleSpec};
use lite_llm_core::pages::PageRun;
use lite_llm_model::kernels::{DType, Isa};
use lite_llm_model::{
    Capture, Checkpoint, ExpertSource, KvCache, Model, ModelOptions, Provided, Stopped, Workspace,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The golden checkpoints: each is a directory with the outputs of transformers beside it.
pub const GOLDEN: [&str; 14] = [
    "deepseek_v2",
    "deepseek_v3",
    "glm4_moe",
    "gpt_oss",
    "granitemoe",
    "llama",
    "mixtral",
    "mixtral_bf16",
    "mixtral_sharded",
    "olmoe",
    "phimoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe_bf16",
];

/// Small checkpoints of quantised experts, in `tests/oracles`.
pub const QUANTISED: [&str; 2] = ["fp8", "mxfp4"];

/// The directory of a small oracle.
pub fn oracle(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("oracles").join(name)
}

/// The golden checkpoints, and those of quantised experts, with their directories.
pub fn every_form() -> impl Iterator<Item = (&'static str, PathBuf)> {
    let quantised = QUANTISED.into_iter().map(|name| (name, oracle(name)));
    GOLDEN.into_iter().map(|name| (name, folder(name))).chain(quantised)
}

/// The directory of a golden checkpoint.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// How a run is cut and computed. None of it may change a bit.
#[derive(Clone, Copy, Debug)]
pub struct How {
    /// See [`PLAIN`].
    pub chunk: usize,
    /// See [`PLAIN`].
    pub threads: usize,
    /// See [`PLAIN`].
    pub isa: Isa,
    /// See [`PLAIN`].
    pub resident: bool,
    /// See [`PLAIN`].
    pub batch: usize,
}

/// In one chunk, alone, with one thread of portable code, every expert resident.
pub const PLAIN: How = How { chunk: 64, threads: 1, isa: Isa::Scalar, resident: true, batch: 1 };

/// A model with everything loaded.
pub fn open(dir: &Path, how: How) -> Model {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let options =
        ModelOptions { threads: how.threads, isa: how.isa, kv_dtype: Some(DType::F32), routing_seed: 0 };
    let mut model = Model::open(Arc::new(checkpoint), options).unwrap();
    model.load_base(0).unwrap();
    model.load_routers().unwrap();
    model
}

/// Every expert in a slot of its own; hands them out in waves of three, last first.
pub struct Experts {
    slots: Vec<Vec<u8>>,
    table: Vec<(ExpertKey, Slot)>,
    wanted: Vec<ExpertKey>,
    wave: u32,
    wave_len: u32,
}

impl Experts {
    /// Loads every expert of every tier.
    pub fn load(model: &Model) -> Self {
        let loader = model.expert_loader();
        let plan = model.plan(64, 8, Digest::default()).unwrap();
        let mut this = Self { slots: vec![], table: vec![], wanted: vec![], wave: 0, wave_len: 0 };
        let tiers: Vec<u32> = (0..).zip(&plan.tiers).map(|(tier, _)| tier).collect();
        for key in plan.experts(&tiers) {
            let mut slot = vec![0; usize::try_from(plan.slot_bytes).unwrap()];
            loader.load(key, &mut slot).unwrap();
            this.table.push((key, Slot(u32::try_from(this.slots.len()).unwrap())));
            this.slots.push(slot);
        }
        this
    }

    /// Where every expert is, for a step that has all of them.
    pub fn resident(&self) -> Vec<(ExpertKey, Slot)> {
        self.table.clone()
    }
}

impl ExpertSource for Experts {
    fn need(&mut self, _: u32, experts: &[ExpertKey]) -> Result<(), Stopped> {
        assert!(self.wanted.is_empty() && experts.is_sorted());
        self.wanted = experts.to_vec();
        (self.wave, self.wave_len) = (0, u32::try_from(experts.len().min(3)).unwrap());
        Ok(())
    }
    fn provided(&mut self) -> Result<Provided, Stopped> {
        let expert = self.wanted.pop().unwrap();
        let at = self.table.binary_search_by_key(&expert, |&(key, _)| key).unwrap();
        Ok(Provided { wave: self.wave, wave_len: self.wave_len, expert, slot: self.table[at].1 })
    }
    fn slot(&self, slot: Slot) -> &[u8] {
        &self.slots[slot.0 as usize]
    }
    fn released(&mut self, _: u32, wave: u32) -> Result<(), Stopped> {
        assert_eq!(wave, self.wave);
        self.wave += 1;
        self.wave_len = u32::try_from(self.wanted.len().min(3)).unwrap();
        Ok(())
    }
}

/// A step of one row from position 0 that samples greedily, under the first tier, with one page for each group of layers.
pub fn first_step(model: &Model, tokens: Vec<u32>, resident: Option<Vec<(ExpertKey, Slot)>>) -> Forward {
    let pages =
        (0..).zip(model.kv_groups()).map(|(page, _)| PageRun { first: 0, pages: vec![page] }).collect();
    let sample = Some(SampleSpec { sampling: Sampling::default(), draw: 0, history: vec![] });
    Forward {
        step: StepId(0),
        attempt: 0,
        generation: Generation(0),
        tiers: vec![0],
        rows: vec![Row { request: 0, start: 0, tokens, pages, sample }],
        resident,
    }
}

/// What a run shows.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Seen {
    /// Bits of the logits after each position.
    pub logits: BTreeMap<u32, Vec<u32>>,
    /// Experts and bits of their weights, by layer and position.
    pub routes: BTreeMap<(u32, u32), (Vec<u32>, Vec<u32>)>,
    /// What was generated.
    pub tokens: Vec<u32>,
}

impl Capture for Seen {
    fn wants_logits(&self, request: u64) -> bool {
        request == 0
    }
    fn logits(&mut self, _: u64, position: u32, logits: &[f32]) {
        self.logits.insert(position, logits.iter().map(|l| l.to_bits()).collect());
    }
    fn routes(&mut self, request: u64, layer: u32, position: u32, experts: &[u32], weights: &[f32]) {
        if request == 0 {
            let bits = weights.iter().map(|w| w.to_bits()).collect();
            self.routes.insert((layer, position), (experts.to_vec(), bits));
        }
    }
}

/// Runs a prompt greedily as request 0, beside other requests with other prompts.
pub fn run(model: &Model, tiers: &[u32], prompt: &[u32], steps: usize, how: How) -> Seen {
    run_modified(model, tiers, prompt, steps, how, None)
}

/// Pages for the positions from one to another, of 8 for each group of layers. Where layers see a window only, no more
/// pages are used than that needs, so that what lies before it is overwritten.
fn runs(model: &Model, base: u32, chunk: usize, start: usize, end: usize) -> Vec<PageRun> {
    let [chunk, start, end] = [chunk, start, end].map(|n| u32::try_from(n).unwrap());
    let run = |(group, window): (u32, &Option<u32>)| {
        let first = window.map_or(0, |window| (start + 1).saturating_sub(window) / 64);
        let used = window.map_or(8, |window| 8.min((window + chunk) / 64 + 2));
        let page = |place| base + 8 * group + (place + 5) % used;
        PageRun { first, pages: (first..end.div_ceil(64)).map(page).collect() }
    };
    (0..).zip(model.kv_groups()).map(run).collect()
}

/// An expert, and the bytes of its slot.
pub type Change = (ExpertKey, Vec<u8>);

/// [`run`], with new parameters of some experts from a position on.
pub fn run_modified(
    model: &Model,
    tiers: &[u32],
    prompt: &[u32],
    steps: usize,
    how: How,
    mut modified: Option<(usize, &[Change])>,
) -> Seen {
    let groups = u32::try_from(model.kv_groups().len()).unwrap();
    let mut cache = KvCache::new(model, 8 * groups * u32::try_from(how.batch).unwrap()).unwrap();
    let mut workspace = Workspace::default();
    let mut experts = Experts::load(model);
    let table: Vec<_> = experts.table.iter().copied().filter(|(key, _)| tiers.contains(&key.tier)).collect();
    let vocab = u32::try_from(model.arch().vocab).unwrap();
    let mut sequences: Vec<Vec<u32>> = (0..how.batch)
        .map(|r| prompt.iter().map(|t| (t + 13 * u32::try_from(r).unwrap()) % vocab).collect())
        .collect();
    let mut computed = 0;
    let mut seen = Seen::default();
    while seen.tokens.len() < steps {
        let mut end = sequences[0].len().min(computed + how.chunk);
        if let Some((from, bytes)) = modified {
            if computed >= from {
                for (key, bytes) in bytes {
                    let at = experts.table.binary_search_by_key(key, |&(key, _)| key).unwrap();
                    experts.slots[at].clone_from(bytes);
                }
                modified = None;
            } else {
                end = end.min(from);
            }
        }
        let rows: Vec<Row> = (0u32..)
            .zip(&sequences)
            .map(|(r, sequence)| Row {
                request: u64::from(r),
                start: u32::try_from(computed).unwrap(),
                tokens: sequence[computed..end].to_vec(),
                pages: runs(model, 8 * groups * r, how.chunk, computed, end),
                sample: (end == sequence.len()).then(|| SampleSpec {
                    sampling: Sampling::default(),
                    draw: 0,
                    history: vec![],
                }),
            })
            .collect();
        let step = Forward {
            step: StepId(0),
            attempt: 0,
            generation: Generation(0),
            tiers: tiers.to_vec(),
            rows,
            resident: how.resident.then(|| table.clone()),
        };
        let results: Vec<RowResult> =
            model.forward(&step, &mut cache, &mut workspace, &mut experts, Some(&mut seen)).unwrap();
        computed = end;
        for (sequence, result) in sequences.iter_mut().zip(&results) {
            sequence.extend(result.token);
        }
        seen.tokens.extend(results[0].token);
    }
    seen
}
