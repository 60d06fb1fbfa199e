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
use lite_llm_core::topology::Topology;
use lite_llm_model::kernels::{DType, Isa};
use lite_llm_model::{
    Capture, Checkpoint, ExpertSource, KvCache, Model, ModelOptions, Provided, Share, Stopped, Workspace,
};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

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
    open_share(dir, how, Share::WHOLE)
}

/// A rank's share of a model with everything loaded.
pub fn open_share(dir: &Path, how: How, share: Share) -> Model {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let options = ModelOptions {
        share,
        threads: how.threads,
        isa: how.isa,
        kv_dtype: Some(DType::F32),
        routing_seed: 0,
    };
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
    /// How many of the wave are to come.
    left: u32,
    /// Other ranks, if there are any: where all find what they give each other, and which rank this is.
    mail: Option<(Arc<Mail>, u32)>,
}

impl Experts {
    /// Loads every expert of every tier that is the model's own.
    pub fn load(model: &Model) -> Self {
        let loader = model.expert_loader();
        let plan = model.plan(64, 8, Digest::default()).unwrap();
        let mut this =
            Self { slots: vec![], table: vec![], wanted: vec![], wave: 0, wave_len: 0, left: 0, mail: None };
        let tiers: Vec<u32> = (0..).zip(&plan.tiers).map(|(tier, _)| tier).collect();
        for key in plan.experts(&tiers) {
            if !model.holds(key) {
                continue;
            }
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
    fn need(&mut self, layer: u32, experts: &[ExpertKey], foreseen: &[ExpertKey]) -> Result<(), Stopped> {
        let after = foreseen.first().map_or(layer + 1, |key| key.layer);
        assert!(foreseen.iter().all(|key| key.layer == after) && after > layer, "of one layer after {layer}");
        assert!(self.wanted.is_empty() && experts.is_sorted());
        let own = |key: &&ExpertKey| self.table.binary_search_by_key(*key, |&(key, _)| key).is_ok();
        self.wanted = experts.iter().filter(own).copied().collect();
        (self.wave, self.wave_len) = (0, u32::try_from(self.wanted.len().min(3)).unwrap());
        self.left = self.wave_len;
        Ok(())
    }
    fn provided(&mut self) -> Result<Provided, Stopped> {
        // Within a wave, tensor ranks get theirs in orders of their own.
        let odd = self.mail.as_ref().is_some_and(|(_, rank)| rank % 2 == 1);
        let expert = if odd && self.left > 1 {
            self.wanted.remove(self.wanted.len() - self.left as usize)
        } else {
            self.wanted.pop().unwrap()
        };
        self.left -= 1;
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
        self.left = self.wave_len;
        Ok(())
    }
    fn gather(&self, ranks: &[u32], exchange: u32, part: &[u8]) -> Result<Vec<Vec<u8>>, Stopped> {
        let (mail, own) = self.mail.as_ref().unwrap();
        let others = || ranks.iter().copied().filter(|rank| rank != own);
        others().for_each(|rank| mail.send(*own, rank, exchange, part));
        Ok(ranks
            .iter()
            .map(|rank| if rank == own { part.to_vec() } else { mail.take(*rank, *own, exchange) })
            .collect())
    }
    fn hand_on(&self, rank: u32, exchange: u32, part: &[u8]) -> Result<(), Stopped> {
        let (mail, own) = self.mail.as_ref().unwrap();
        mail.send(*own, rank, exchange, part);
        Ok(())
    }
    fn take_over(&self, rank: u32, exchange: u32) -> Result<Vec<u8>, Stopped> {
        let (mail, own) = self.mail.as_ref().unwrap();
        Ok(mail.take(rank, *own, exchange))
    }
}

/// What ranks give each other, by sender, receiver and exchange.
#[derive(Debug, Default)]
struct Mail {
    parts: Mutex<BTreeMap<(u32, u32, u32), Vec<u8>>>,
    came: Condvar,
}

impl Mail {
    fn send(&self, from: u32, to: u32, exchange: u32, part: &[u8]) {
        let before = self.parts.lock().unwrap().insert((from, to, exchange), part.to_vec());
        assert!(before.is_none(), "an exchange has a number of its own");
        self.came.notify_all();
    }

    fn take(&self, from: u32, to: u32, exchange: u32) -> Vec<u8> {
        let key = (from, to, exchange);
        let parts = self.parts.lock().unwrap();
        let wait = Duration::from_secs(60);
        let (mut parts, late) =
            self.came.wait_timeout_while(parts, wait, |parts| !parts.contains_key(&key)).unwrap();
        assert!(!late.timed_out(), "rank {to} waits for exchange {exchange:#x} of rank {from}");
        parts.remove(&key).unwrap()
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
        foresee: false,
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
    let mut machine = Machine::of(model, Experts::load(model), how);
    let table: Vec<_> = machine.experts.resident();
    let mut seen = Seen::default();
    let from = modified.map(|(from, _)| from);
    let forward = |computed: usize, step: &Forward| {
        if let Some((_, changes)) = modified.take_if(|(from, _)| computed >= *from) {
            for (key, bytes) in changes {
                let at = machine.experts.table.binary_search_by_key(key, |&(key, _)| key).unwrap();
                machine.experts.slots[at].clone_from(bytes);
            }
        }
        machine.forward(step, &mut seen)
    };
    seen.tokens = drive(model, tiers, prompt, steps, how, from, &table, forward);
    seen
}

/// The same by all ranks of a replica, each with a share of the model and memory of its own: what the last stage shows, and the
/// digests of its rows. Ranks of a stage have to say the same.
pub fn run_shared(
    dir: &Path,
    topology: Topology,
    tiers: &[u32],
    prompt: &[u32],
    steps: usize,
    how: How,
) -> (Seen, Vec<Digest>) {
    let mail = Arc::new(Mail::default());
    let models: Vec<Model> =
        (0..topology.ranks()).map(|rank| open_share(dir, how, Share::new(topology, rank))).collect();
    let plans: Vec<_> = models.iter().map(|model| model.plan(64, 8, Digest::default()).unwrap()).collect();
    assert!(plans.iter().all(|plan| *plan == plans[0]), "all ranks have one plan");
    let mut machines: Vec<(Machine<'_>, Seen)> = (0u32..)
        .zip(&models)
        .map(|(rank, model)| {
            let experts = Experts { mail: Some((Arc::clone(&mail), rank)), ..Experts::load(model) };
            (Machine::of(model, experts, how), Seen::default())
        })
        .collect();
    let mut digests = Vec::new();
    let table: Vec<(ExpertKey, Slot)> = Experts::load(&open(dir, how)).resident();
    let forward = |_: usize, step: &Forward| {
        let results: Vec<Vec<RowResult>> = std::thread::scope(|scope| {
            let ranks: Vec<_> = machines
                .iter_mut()
                .map(|(machine, seen)| {
                    let own = machine.experts.resident();
                    let resident = step.resident.as_ref().map(|of_step| {
                        own.into_iter().filter(|(key, _)| of_step.iter().any(|(of, _)| of == key)).collect()
                    });
                    let step = Forward { resident, ..step.clone() };
                    scope.spawn(move || machine.forward(&step, seen))
                })
                .collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        assert!(mail.parts.lock().unwrap().is_empty(), "whatever is given is taken");
        let of_stage = results.chunks_exact((topology.tensor * topology.expert) as usize);
        of_stage.for_each(|stage| assert!(stage.iter().all(|rows| *rows == stage[0])));
        let last = results.into_iter().next_back().unwrap();
        digests.extend(last.iter().map(|row| row.digest));
        last
    };
    let tokens = drive(&models[0], tiers, prompt, steps, how, None, &table, forward);
    let mut whole = Seen { tokens, ..Seen::default() };
    for (_, seen) in machines {
        whole.logits.extend(seen.logits);
        whole.routes.extend(seen.routes);
    }
    (whole, digests)
}

/// A model, or a rank's share of one, and what it computes in.
struct Machine<'a> {
    model: &'a Model,
    cache: KvCache,
    workspace: Workspace,
    experts: Experts,
}

impl<'a> Machine<'a> {
    fn of(model: &'a Model, experts: Experts, how: How) -> Self {
        let groups = u32::try_from(model.kv_groups().len()).unwrap();
        let cache = KvCache::new(model, 8 * groups * u32::try_from(how.batch).unwrap()).unwrap();
        Self { model, cache, workspace: Workspace::default(), experts }
    }

    fn forward(&mut self, step: &Forward, seen: &mut Seen) -> Vec<RowResult> {
        let Self { model, cache, workspace, experts } = self;
        model.forward(step, cache, workspace, experts, Some(seen)).unwrap()
    }
}

/// Cuts sequences into steps and gives the tokens of the first. No step goes over the position `cut`.
#[allow(clippy::too_many_arguments, reason = "each says one thing of the run")]
fn drive(
    model: &Model,
    tiers: &[u32],
    prompt: &[u32],
    steps: usize,
    how: How,
    cut: Option<usize>,
    table: &[(ExpertKey, Slot)],
    mut forward: impl FnMut(usize, &Forward) -> Vec<RowResult>,
) -> Vec<u32> {
    let groups = u32::try_from(model.kv_groups().len()).unwrap();
    let table: Vec<_> = table.iter().copied().filter(|(key, _)| tiers.contains(&key.tier)).collect();
    let vocab = u32::try_from(model.arch().vocab).unwrap();
    let mut sequences: Vec<Vec<u32>> = (0..how.batch)
        .map(|r| prompt.iter().map(|t| (t + 13 * u32::try_from(r).unwrap()) % vocab).collect())
        .collect();
    let (mut computed, mut tokens) = (0, Vec::new());
    while tokens.len() < steps {
        let mut end = sequences[0].len().min(computed + how.chunk);
        if let Some(cut) = cut.filter(|&cut| computed < cut) {
            end = end.min(cut);
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
            foresee: true,
        };
        let results = forward(computed, &step);
        computed = end;
        for (sequence, result) in sequences.iter_mut().zip(&results) {
            sequence.extend(result.token);
        }
        tokens.extend(results[0].token);
    }
    tokens
}
