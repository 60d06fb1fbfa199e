//! Full replay: every step that the journal says was computed is computed again, and its digests compared.

use crate::divergence::{Divergence, difference};
use crate::exit::corrupt;
use crate::history::{History, Moment};
use anyhow::{Context, bail};
use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::ids::{ExpertKey, Generation, RequestId, Slot, StepId};
use lite_llm_core::input::{Input, RowResult};
use lite_llm_core::output::{Carving, Forward, Output, Row};
use lite_llm_core::pages::PageRun;
use lite_llm_core::plan::ModelPlan;
use lite_llm_core::replay::decode_input;
use lite_llm_core::time::Time;
use lite_llm_core::view::{RequestView, Segment, View};
use lite_llm_hw::blobs::Blobs;
use lite_llm_model::kernels::{DType, Isa, PAGE_POSITIONS};
use lite_llm_model::tokenizer::Tokenizer;
use lite_llm_model::{
    Capture, Checkpoint, ExpertLoader, ExpertSource, KvCache, Model, ModelOptions, Provided, StepError,
    Stopped, Workspace,
};
use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::Arc;

/// Positions that one step of a recomputed prefix takes.
const PREFIX_CHUNK: usize = 256;

/// A model that follows a journal.
pub(crate) struct Recompute {
    model: Model,
    experts: Experts,
    cache: Option<KvCache>,
    workspace: Workspace,
    /// The step that the engine asked for last.
    pending: Option<Forward>,
    /// Positions of each request that were in the cache of a snapshot, and are in this one.
    prefix: BTreeMap<u64, u32>,
    /// Steps compared.
    pub(crate) steps: u64,
    /// Rows compared.
    pub(crate) rows: u64,
    /// Steps that began before the snapshot, so that nothing tells what they were to compute.
    pub(crate) unknown: u64,
}

impl Recompute {
    /// Opens the model that a journal names.
    ///
    /// # Errors
    /// If the directory holds another model.
    pub(crate) fn of(
        engine: &Engine,
        dir: &Path,
        state: &Path,
        isa: Isa,
        threads: usize,
    ) -> anyhow::Result<Self> {
        let view = engine.view();
        let (Some(plan), Some(routing_seed)) = (view.plan(), view.routing_seed()) else {
            bail!("the journal ends before its model was read");
        };
        let limits = &view.config().limits;
        let checkpoint = Arc::new(Checkpoint::open(dir)?);
        let tokenizer = Tokenizer::of(&checkpoint)?.map(|tokenizer| tokenizer.digest()).unwrap_or_default();
        // The KV type is part of the architecture's digest and of nothing else that the journal says.
        let kv_dtype = [DType::F32, DType::Bf16, DType::F16]
            .into_iter()
            .find(|&dtype| checkpoint.architecture_digest(dtype) == plan.identity.architecture);
        let Some(kv_dtype) = kv_dtype else {
            bail!("{} has another architecture or tiers than the journal's model", dir.display());
        };
        let options =
            ModelOptions { threads, isa, kv_dtype: Some(kv_dtype), routing_seed, ..ModelOptions::default() };
        let mut model = Model::open(checkpoint, options)?;
        let here = model.plan(limits.step_positions_max, limits.rows_max, tokenizer)?;
        if here.identity != plan.identity {
            bail!(
                "the journal is of weights {}, contract {}, tokenizer {}; {} has {}, {}, {}",
                plan.identity.weights,
                plan.identity.contract,
                plan.identity.tokenizer,
                dir.display(),
                here.identity.weights,
                here.identity.contract,
                here.identity.tokenizer
            );
        }
        for shard in 0..here.base_shards.len() as u32 {
            model.load_base(shard)?;
        }
        model.load_routers()?;
        let experts = Experts::new(model.expert_loader(), Blobs::of(state), model.slot_bytes());
        Ok(Self {
            model,
            experts,
            cache: None,
            workspace: Workspace::default(),
            pending: None,
            prefix: BTreeMap::new(),
            steps: 0,
            rows: 0,
            unknown: 0,
        })
    }

    /// Computes the prefixes that were in the cache when a snapshot was taken.
    pub(crate) fn begin(&mut self, engine: &Engine) -> anyhow::Result<()> {
        let view = engine.view();
        self.carve(view.carving())?;
        for request in view.requests() {
            self.fill(engine, &request)?;
        }
        Ok(())
    }

    /// Follows one record.
    ///
    /// # Errors
    /// If a step computed other bits then.
    pub(crate) fn follow(&mut self, moment: &Moment<'_>) -> anyhow::Result<()> {
        match moment.input {
            Input::Restarted { .. } => {
                self.cache = None;
                self.pending = None;
                self.prefix.clear();
            }
            Input::Finished { step, attempt, rows, .. } => {
                let pending = self.pending.take();
                match pending.filter(|forward| (forward.step, forward.attempt) == (*step, *attempt)) {
                    Some(forward) => {
                        self.compare(moment.record.seq, &forward, rows)?;
                    }
                    None => self.catch_up(moment.engine)?,
                }
            }
            _ => {}
        }
        for output in moment.outputs {
            match output {
                Output::Carve(carving) => self.carve(*carving)?,
                Output::Forward(forward) => {
                    self.experts.modified = moment.engine.view().modified(forward.generation);
                    self.pending = Some(forward.clone());
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn compare(&mut self, seq: u64, forward: &Forward, expected: &[RowResult]) -> anyhow::Result<()> {
        let found = self.compute(forward, None)?;
        self.steps += 1;
        for ((row, expected), of_row) in forward.rows.iter().zip(expected).zip(&found) {
            self.rows += 1;
            if expected.digest != of_row.digest || expected.token != of_row.token {
                let what = format!(
                    "step {} computes other bits here for request {}, positions {}..{}",
                    forward.step,
                    row.request,
                    row.start,
                    row.start as usize + row.tokens.len()
                );
                let (expected, of_row) = (say(expected), say(of_row));
                return Err(OtherBits { record: seq, what, expected, found: of_row, rows: found }.into());
            }
        }
        Ok(())
    }

    /// After a step that nobody has seen begin: computes what it left in the cache.
    fn catch_up(&mut self, engine: &Engine) -> anyhow::Result<()> {
        self.unknown += 1;
        for request in engine.view().requests() {
            if request.computed > 0 {
                self.fill(engine, &request)?;
            }
        }
        Ok(())
    }

    /// Computes a request's positions under the generations that the engine says.
    fn fill(&mut self, engine: &Engine, request: &RequestView<'_>) -> anyhow::Result<()> {
        let view = engine.view();
        let plan = view.plan().context("a request without a plan")?;
        let all: Vec<u32> = request.body.prompt.iter().chain(request.tokens).copied().collect();
        // Where layers see a window only, pages were given back: all is computed again.
        let again = plan.kv_groups.iter().any(Option::is_some);
        let before = self.prefix.get(&request.number).copied().filter(|_| !again);
        let stretch = Stretch {
            request: request.number,
            start: before.unwrap_or(0),
            tokens: &all[..request.computed as usize],
            segments: request.segments,
        };
        let pages = |start, until| runs(plan, view.carving().pages, request.pages, start, until);
        self.stretch(view, &stretch, pages, None)?;
        self.prefix.insert(request.number, request.computed);
        Ok(())
    }

    /// Computes a stream that has ended once more, for a capture, as request 0 and in a cache of its own.
    ///
    /// # Errors
    /// If the engine does not keep it.
    pub(crate) fn ended(
        &mut self,
        engine: &Engine,
        id: &RequestId,
        prompt: &[u32],
        capture: &mut dyn Capture,
    ) -> anyhow::Result<()> {
        let view = engine.view();
        let plan = view.plan().context("a request without a plan")?;
        let stream = view.stream(id).context("a stream that is not kept any more")?;
        let mut tokens: Vec<u32> = prompt.iter().chain(stream.tokens).copied().collect();
        // The last token was chosen, and never computed.
        tokens.truncate(tokens.len().saturating_sub(1).max(prompt.len()));
        let count = (tokens.len() as u32).div_ceil(plan.page_positions);
        let groups = plan.kv_groups.len() as u32;
        let all: Vec<PageRun> = (0..groups)
            .map(|group| PageRun { first: 0, pages: (group * count..(group + 1) * count).collect() })
            .collect();
        self.cache = Some(KvCache::new(&self.model, groups * count)?);
        self.experts.bound(view.carving().slots);
        let stretch = Stretch { request: 0, start: 0, tokens: &tokens, segments: stream.segments };
        self.stretch(view, &stretch, |_, _| all.clone(), Some(capture))
    }

    /// Computes a stretch of a request, with the pages that hold each part of it.
    fn stretch(
        &mut self,
        view: View<'_>,
        stretch: &Stretch<'_>,
        pages: impl Fn(u32, u32) -> Vec<PageRun>,
        mut capture: Option<&mut dyn Capture>,
    ) -> anyhow::Result<()> {
        let plan = view.plan().context("a request without a plan")?;
        let end = stretch.tokens.len() as u32;
        let mut start = stretch.start.min(end);
        for segment in stretch.segments {
            self.experts.modified = view.modified(segment.generation);
            let names = view.generations().into_iter().find(|(g, _)| *g == segment.generation);
            let names = names.context("a segment of an unknown generation")?.1;
            let tiers = plan.tier_set(&names).map_err(anyhow::Error::msg)?;
            while start < segment.until.min(end) {
                let until = segment.until.min(end).min(start + PREFIX_CHUNK as u32);
                let row = Row {
                    request: stretch.request,
                    start,
                    tokens: stretch.tokens[start as usize..until as usize].to_vec(),
                    pages: pages(start, until),
                    sample: None,
                };
                let capture = capture.as_mut().map(|capture| &mut **capture as &mut dyn Capture);
                self.compute(&step(segment.generation, tiers.clone(), row), capture)?;
                start = until;
            }
        }
        Ok(())
    }

    /// Takes as much memory as the journal's process had, and in the cache the pages that [`runs`] puts beside.
    fn carve(&mut self, carving: Carving) -> anyhow::Result<()> {
        let beside = self.model.kv_groups().iter().flatten();
        let pages = beside.map(|&window| beside_pages(window)).fold(carving.pages, u32::saturating_add);
        self.cache = Some(KvCache::new(&self.model, pages)?);
        self.experts.bound(carving.slots);
        Ok(())
    }

    fn compute(
        &mut self,
        forward: &Forward,
        capture: Option<&mut dyn Capture>,
    ) -> anyhow::Result<Vec<RowResult>> {
        let cache = self.cache.as_mut().context("a step before the memory was carved")?;
        let mut forward = forward.clone();
        forward.resident = None;
        match self.model.forward(&forward, cache, &mut self.workspace, &mut self.experts, capture) {
            Ok(rows) => Ok(rows),
            Err(StepError::Stopped(_)) => match self.experts.failed.take() {
                Some(error) => Err(error),
                None => bail!("step {} was given up", forward.step),
            },
            Err(error) => Err(corrupt(format!(
                "step {} was computed when the journal was written, and cannot be now: {error}",
                forward.step
            ))),
        }
    }
}

/// Some positions of a request.
struct Stretch<'a> {
    request: u64,
    /// The first of them.
    start: u32,
    /// All tokens up to their end.
    tokens: &'a [u32],
    segments: &'a [Segment],
}

/// A step that computed other bits when the journal was written.
#[derive(Debug)]
pub(crate) struct OtherBits {
    record: u64,
    what: String,
    expected: String,
    found: String,
    /// What is computed here.
    rows: Vec<RowResult>,
}

impl OtherBits {
    /// With what the other bits would have made of the state.
    pub(crate) fn in_the_state(self, history: &History) -> anyhow::Result<Divergence> {
        let Self { record, what, expected, found, rows } = self;
        let engine = history.before(record)?;
        let of_journal = history.scanned.records.iter().find(|of_journal| of_journal.seq == record);
        let of_journal = of_journal.context("a record that was compared")?;
        let after = |rows: Option<Vec<RowResult>>| {
            let mut engine = engine.clone();
            let mut input = decode_input(&of_journal.payload)?;
            if let (Some(rows), Input::Finished { rows: of_input, .. }) = (rows, &mut input) {
                *of_input = rows;
            }
            engine.handle(Time(of_journal.time_ns), input);
            anyhow::Ok(engine)
        };
        let difference = difference(&after(None)?, &after(Some(rows))?);
        let between = "after the journal's results (-) and after those found here (+)";
        Ok(Divergence { record, what, expected, found, outputs: Vec::new(), between, difference })
    }
}

impl std::fmt::Display for OtherBits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "record {}: {}", self.record, self.what)
    }
}

impl std::error::Error for OtherBits {}

fn say(row: &RowResult) -> String {
    let token = row.token.map_or_else(|| "none".into(), |token| token.to_string());
    format!("token {token}, digest {}", row.digest)
}

/// Pages for the stretch of a prefix: those that the request holds, and for positions whose pages it gave back, as no later
/// one sees them, others beside those that the engine knows.
fn runs(plan: &ModelPlan, pages: u32, held: &[PageRun], start: u32, until: u32) -> Vec<PageRun> {
    let mut beside = pages;
    let run = |(held, window): (&PageRun, &Option<u32>)| {
        let count = window.map_or(0, beside_pages);
        let first = plan.first_place(*window, start);
        let page = |place: u32| held.page(place).unwrap_or_else(|| beside + place % count);
        let run = PageRun { first, pages: (first..until.div_ceil(plan.page_positions)).map(page).collect() };
        beside += count;
        run
    };
    held.iter().zip(&plan.kv_groups).map(run).collect()
}

/// Pages that a window and the stretch after it touch at most.
const fn beside_pages(window: u32) -> u32 {
    (window + PREFIX_CHUNK as u32) / PAGE_POSITIONS as u32 + 2
}

fn step(generation: Generation, tiers: Vec<u32>, row: Row) -> Forward {
    Forward {
        step: StepId(0),
        attempt: 0,
        generation,
        tiers,
        rows: vec![row],
        resident: None,
        foresee: false,
    }
}

/// Experts on demand, one wave each; the least recently used make room.
struct Experts {
    loader: ExpertLoader,
    slots: Vec<Vec<u8>>,
    slot_bytes: usize,
    slots_max: usize,
    at: BTreeMap<(ExpertKey, Option<Digest>), (usize, u64)>,
    blobs: Blobs,
    /// Experts that are not the checkpoint's under the generation at hand.
    modified: BTreeMap<ExpertKey, Digest>,
    asked: VecDeque<ExpertKey>,
    wave: u32,
    clock: u64,
    failed: Option<anyhow::Error>,
}

impl Experts {
    /// Bytes of experts that are kept.
    const BYTES_MAX: usize = 1 << 30;

    fn new(loader: ExpertLoader, blobs: Blobs, slot_bytes: usize) -> Self {
        Self {
            loader,
            slots: Vec::new(),
            slot_bytes,
            slots_max: (Self::BYTES_MAX / slot_bytes.max(1)).max(1),
            at: BTreeMap::new(),
            blobs,
            modified: BTreeMap::new(),
            asked: VecDeque::new(),
            wave: 0,
            clock: 0,
            failed: None,
        }
    }

    /// Keeps no more experts than this.
    fn bound(&mut self, slots: u32) {
        self.slots_max = (Self::BYTES_MAX / self.slot_bytes.max(1)).min(slots as usize).max(1);
        if self.slots.len() > self.slots_max {
            self.slots = Vec::new();
            self.at.clear();
        }
    }

    fn place(&mut self, key: ExpertKey) -> anyhow::Result<usize> {
        self.clock += 1;
        let held = (key, self.modified.get(&key).copied());
        if let Some((slot, used)) = self.at.get_mut(&held) {
            *used = self.clock;
            return Ok(*slot);
        }
        let slot = if self.slots.len() < self.slots_max {
            self.slots.push(vec![0; self.slot_bytes]);
            self.slots.len() - 1
        } else {
            let (&old, &(slot, _)) =
                self.at.iter().min_by_key(|(_, (_, used))| *used).expect("every slot is taken");
            self.at.remove(&old);
            slot
        };
        match held.1 {
            None => self.loader.load(key, &mut self.slots[slot])?,
            Some(blob) => self.blobs.read(blob, &mut self.slots[slot]).map_err(|fault| {
                anyhow::anyhow!("{fault}; blobs that no stream refers to are removed, and their steps cannot be recomputed")
            })?,
        }
        self.at.insert(held, (slot, self.clock));
        Ok(slot)
    }
}

impl ExpertSource for Experts {
    fn need(&mut self, _layer: u32, experts: &[ExpertKey], _foreseen: &[ExpertKey]) -> Result<(), Stopped> {
        self.asked = experts.iter().copied().collect();
        self.wave = 0;
        Ok(())
    }

    fn provided(&mut self) -> Result<Provided, Stopped> {
        let expert = self.asked.pop_front().expect("as many are provided as were asked for");
        let slot = self.place(expert).map_err(|error| {
            self.failed = Some(error);
            Stopped
        })?;
        self.wave += 1;
        Ok(Provided { wave: self.wave - 1, wave_len: 1, expert, slot: Slot(slot as u32) })
    }

    fn slot(&self, slot: Slot) -> &[u8] {
        &self.slots[slot.0 as usize]
    }

    fn released(&mut self, _layer: u32, _wave: u32) -> Result<(), Stopped> {
        Ok(())
    }
}
