//! Models for the benches.
#![allow(clippy::missing_panics_doc, reason = "a bench that cannot run has nothing to report")]

pub mod drive;
mod experts;

pub use experts::Experts;

use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{ExpertKey, Generation, Slot, StepId};
use lite_llm_core::input::Sampling;
use lite_llm_core::output::{Forward, Row, SampleSpec};
use lite_llm_core::pages::PageRun;
use lite_llm_model::checkpoint::import::{Wanted, import};
use lite_llm_model::kernels::{DType, Isa, PAGE_POSITIONS, Quantised};
use lite_llm_model::synth::{SynthFamily, SynthSpec, synth, synth_native};
use lite_llm_model::{Checkpoint, ExpertSource, KvCache, Model, ModelOptions, Provided, Stopped, Workspace};
use memmap2::{Advice, MmapMut};
use std::path::PathBuf;
use std::sync::Arc;

/// The synthetic OLMoE shape of the figures: hidden 2048, 16 heads of 128, 64 experts of 1024, top 8, 4 layers, bf16. It
/// is made once and kept in the target directory.
#[must_use]
pub fn olmoe_shape() -> PathBuf {
    let dir = of_models("olmoe");
    if !dir.exists() {
        synth(&dir, &spec()).expect("room for 4 GB in the target directory");
    }
    dir
}

/// The same weights as integers, a native checkpoint.
#[must_use]
pub fn olmoe_of_integers(kind: Quantised) -> PathBuf {
    let dir = of_models(&format!("olmoe-{}", kind.name()));
    if !dir.exists() {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let wanted = Wanted { quantise: Some(kind), ..Wanted::default() };
        synth_native(&dir, &spec(), wanted, threads, |_, _| {})
            .expect("room for 2 GB in the target directory");
    }
    dir
}

fn of_models(name: &str) -> PathBuf {
    let models = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../target/bench-models");
    std::fs::create_dir_all(&models).expect("the target directory");
    models.join(name)
}

fn spec() -> SynthSpec {
    SynthSpec {
        layers: 4,
        hidden: 2048,
        heads: 16,
        kv_heads: 16,
        head_dim: 128,
        experts: 64,
        top_k: 8,
        intermediate: 1024,
        vocab: 50304,
        context: 4096,
        dtype: DType::Bf16,
        ..SynthSpec::of(SynthFamily::Olmoe)
    }
}

/// The same, imported: one aligned blob for each expert.
#[must_use]
pub fn olmoe_native() -> PathBuf {
    let source = olmoe_shape();
    let dir = source.with_file_name("olmoe-native");
    if !dir.exists() {
        let threads = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        import(&source, &dir, None, threads, |_, _| {}).expect("room for 4 GB more in the target directory");
    }
    dir
}

/// A model whose experts are all in memory.
pub struct Resident {
    model: Model,
    cache: KvCache,
    workspace: Workspace,
    slots: Slots,
    table: Vec<(ExpertKey, Slot)>,
    /// What every step reads, whichever experts it needs.
    every_step_bytes: u64,
}

struct Slots {
    map: MmapMut,
    slot_bytes: usize,
}

impl ExpertSource for Slots {
    fn need(&mut self, _: u32, _: &[ExpertKey], _: &[ExpertKey]) -> Result<(), Stopped> {
        Err(Stopped)
    }
    fn provided(&mut self) -> Result<Provided, Stopped> {
        Err(Stopped)
    }
    fn slot(&self, slot: Slot) -> &[u8] {
        &self.map[slot.0 as usize * self.slot_bytes..][..self.slot_bytes]
    }
    fn released(&mut self, _: u32, _: u32) -> Result<(), Stopped> {
        Err(Stopped)
    }
}

impl Resident {
    /// Loads everything.
    #[must_use]
    pub fn load(dir: &std::path::Path, threads: usize) -> Self {
        let checkpoint = Arc::new(Checkpoint::open(dir).expect("a checkpoint"));
        let every_step_bytes = checkpoint.step_bytes().expect("a size");
        let options = ModelOptions { threads, isa: Isa::detect(), kv_dtype: None, ..ModelOptions::default() };
        let mut model = Model::open(checkpoint, options).expect("a model");
        model.load_base(0).expect("base parameters");
        model.load_routers().expect("routers");
        let plan = model.plan(256, 1, Digest::default()).expect("a plan");
        let loader = model.expert_loader();
        let slot_bytes = model.slot_bytes();
        let mut table = Vec::new();
        let experts: Vec<ExpertKey> = plan.experts(&[0]).collect();
        // As the node's arena maps its slots.
        let mut map = MmapMut::map_anon(experts.len() * slot_bytes).expect("address space");
        let _ = map.advise(Advice::HugePage);
        for (key, slot) in experts.into_iter().zip(map.chunks_exact_mut(slot_bytes)) {
            loader.load(key, slot).expect("an expert");
            table.push((key, Slot(u32::try_from(table.len()).expect("few experts"))));
        }
        let slots = Slots { map, slot_bytes };
        let groups = u32::try_from(model.kv_groups().len()).expect("few groups");
        let cache = KvCache::new(&model, 16 * groups).expect("a cache");
        Self { model, cache, workspace: Workspace::default(), slots, table, every_step_bytes }
    }

    /// Bytes of weights, keys and values that a step of one position reads.
    #[must_use]
    pub fn step_bytes(&self, position: u32) -> u64 {
        let arch = self.model.arch();
        let experts = arch.layers.len() * arch.moe.as_ref().map_or(0, |moe| moe.top_k);
        let seen = u64::from(position + 1) * self.model.page_bytes() as u64 / PAGE_POSITIONS as u64;
        self.every_step_bytes + (experts * self.slots.slot_bytes) as u64 + seen
    }

    /// Computes positions `start..start + tokens` of one sequence and returns the next token.
    pub fn step(&mut self, start: u32, tokens: &[u32]) -> u32 {
        let sampling = Sampling::default();
        let run = |group: u32| PageRun { first: 0, pages: (16 * group..16 * (group + 1)).collect() };
        let pages = (0..).zip(self.model.kv_groups()).map(|(group, _)| run(group)).collect();
        let row = Row {
            request: 0,
            start,
            tokens: tokens.to_vec(),
            pages,
            sample: Some(SampleSpec { sampling, draw: 0, history: vec![] }),
        };
        let forward = Forward {
            step: StepId(0),
            attempt: 0,
            generation: Generation(0),
            tiers: vec![0],
            rows: vec![row],
            resident: Some(self.table.clone()),
            foresee: false,
        };
        let results = self
            .model
            .forward(&forward, &mut self.cache, &mut self.workspace, &mut self.slots, None)
            .expect("finite values");
        results[0].token.expect("the row samples")
    }
}
