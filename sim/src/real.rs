//! The real arithmetic under simulation: a tiny model of `model/`, its shares, and a step of one as something that the simulation
//! goes on with.
//!
//! A step runs on a thread of its own that is only ever awake while the simulation waits for it, so nothing depends on how
//! threads are scheduled. All ranks of all runs share one model, whose weights never change.

use crate::model::Setting;
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{ExpertKey, Generation, Slot, StepId};
use lite_llm_core::input::{Body, RowResult};
use lite_llm_core::output::{Forward, Row, SampleSpec};
use lite_llm_core::pages::PageRun;
use lite_llm_core::plan::ModelPlan;
use lite_llm_core::random::{Purpose, draw};
use lite_llm_core::topology::Topology;
use lite_llm_model::kernels::{DType, Isa};
use lite_llm_model::synth::{SynthFamily, SynthSpec, synth};
use lite_llm_model::{
    Checkpoint, ExpertLoader, ExpertSource, KvCache, Model, ModelOptions, Provided, Share, StepError,
    Stopped, Workspace,
};
use std::collections::BTreeMap;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;

/// The model of every run with real arithmetic.
pub struct RealModel {
    checkpoint: Arc<Checkpoint>,
    /// Shares that were loaded.
    shares: Mutex<BTreeMap<(Ranks, u32), Arc<Rank>>>,
}

/// A topology's counts, in an order.
type Ranks = [u32; 4];

/// A share of the model, and where its experts come from.
pub struct Rank {
    model: Model,
    loader: ExpertLoader,
    slot_bytes: usize,
    experts: Mutex<BTreeMap<ExpertKey, Arc<[u8]>>>,
}

/// What a rank computes in.
pub type Memory = Arc<Mutex<(KvCache, Workspace)>>;

impl RealModel {
    /// The model: four layers of two tiers, each of two groups of two experts.
    ///
    /// # Panics
    /// If it cannot be written to the directory for temporary files.
    pub fn get() -> &'static Self {
        static MODEL: OnceLock<RealModel> = OnceLock::new();
        MODEL.get_or_init(|| {
            let dir = std::env::temp_dir().join(format!("lite-llm-sim-{}", std::process::id()));
            let mut spec = SynthSpec {
                hidden: 64,
                heads: 4,
                kv_heads: 4,
                head_dim: 8,
                experts: 8,
                intermediate: 32,
                vocab: 97,
                context: 48,
                ..SynthSpec::of(SynthFamily::TieredMoe)
            };
            spec.tiers[0].experts = 4;
            spec.tiers[1].experts = 4;
            synth(&dir, &spec).expect("a tiny model can be written for the simulation");
            let checkpoint = Arc::new(Checkpoint::open(&dir).expect("it was just written"));
            // It stays mapped for as long as somebody computes with it.
            let _ = std::fs::remove_dir_all(&dir);
            Self { checkpoint, shares: Mutex::default() }
        })
    }

    /// A rank's share, loaded.
    ///
    /// # Panics
    /// If the topology does not fit the model.
    pub fn rank(&self, topology: Topology, rank: u32) -> Arc<Rank> {
        let Topology { data: _, tensor, pipeline, expert } = topology;
        let key = ([1, tensor, pipeline, expert], rank);
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        let rank = shares.entry(key).or_insert_with(|| {
            let share = Share::new(Topology { data: 1, ..topology }, rank);
            let options = ModelOptions {
                threads: 1,
                isa: Isa::detect(),
                kv_dtype: Some(DType::F32),
                routing_seed: 0,
                share,
            };
            let mut model = Model::open(Arc::clone(&self.checkpoint), options).expect("it fits");
            model.load_base(0).expect("it is mapped");
            model.load_routers().expect("it is mapped");
            let loader = model.expert_loader();
            let slot_bytes = model.slot_bytes();
            Arc::new(Rank { model, loader, slot_bytes, experts: Mutex::default() })
        });
        Arc::clone(rank)
    }

    /// What engines know of it, shared out like this.
    ///
    /// # Panics
    /// If the topology does not fit the model.
    pub fn plan(&self, topology: Topology) -> ModelPlan {
        self.rank(topology, 0).model.plan(64, 16, Digest::default()).expect("it is mapped")
    }

    /// The stream of a request alone, on one rank and without an engine.
    ///
    /// # Panics
    /// If the request does not fit the model.
    pub fn reference(&self, body: &Body, setting_at: impl Fn(u32) -> Setting, len: usize) -> Vec<u32> {
        let rank = self.rank(Topology::SINGLE, 0);
        let groups = u32::try_from(rank.model.kv_groups().len()).expect("few");
        let memory = rank.memory(groups);
        let mut sequence = body.prompt.clone();
        let mut tokens = Vec::new();
        let mut position = 0u32;
        while tokens.len() < len {
            let Setting { tiers, .. } = setting_at(position);
            let last = position as usize + 1 == sequence.len();
            let sample = last.then(|| SampleSpec {
                sampling: body.sampling.clone(),
                draw: draw(body.sampling.seed, Purpose::Sample, 0, u64::from(position) + 1),
                // Clients of the simulation penalise nothing.
                history: Vec::new(),
            });
            let row = Row {
                request: 0,
                start: position,
                tokens: vec![sequence[position as usize]],
                pages: (0..groups).map(|page| PageRun { first: 0, pages: vec![page] }).collect(),
                sample,
            };
            let forward = Forward {
                step: StepId(0),
                attempt: 0,
                generation: Generation(0),
                tiers,
                rows: vec![row],
                resident: None,
                foresee: false,
            };
            let mut alone = Alone { rank: &rank, wanted: Vec::new(), slots: Vec::new() };
            let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
            let (cache, workspace) = &mut *memory;
            let rows =
                rank.model.forward(&forward, cache, workspace, &mut alone, None).expect("finite weights");
            position += 1;
            sequence.extend(rows[0].token);
            tokens.extend(rows[0].token);
        }
        tokens
    }
}

impl Rank {
    /// Room for so many pages.
    ///
    /// # Panics
    /// If there is no memory.
    pub fn memory(&self, pages: u32) -> Memory {
        let cache = KvCache::new(&self.model, pages).expect("a few pages");
        Arc::new(Mutex::new((cache, Workspace::default())))
    }

    fn expert(&self, key: ExpertKey) -> Arc<[u8]> {
        let mut experts = self.experts.lock().unwrap_or_else(PoisonError::into_inner);
        let expert = experts.entry(key).or_insert_with(|| {
            let mut bytes = vec![0; self.slot_bytes];
            self.loader.load(key, &mut bytes).expect("an expert of the model");
            bytes.into()
        });
        Arc::clone(expert)
    }
}

/// Every expert is there at once.
struct Alone<'a> {
    rank: &'a Rank,
    wanted: Vec<ExpertKey>,
    slots: Vec<Arc<[u8]>>,
}

impl ExpertSource for Alone<'_> {
    fn need(&mut self, _: u32, experts: &[ExpertKey], _: &[ExpertKey]) -> Result<(), Stopped> {
        self.wanted = experts.to_vec();
        self.slots.clear();
        Ok(())
    }
    fn provided(&mut self) -> Result<Provided, Stopped> {
        let at = self.slots.len();
        let expert = self.wanted[at];
        self.slots.push(self.rank.expert(expert));
        let slot = Slot(u32::try_from(at).expect("few"));
        Ok(Provided { wave: 0, wave_len: u32::try_from(self.wanted.len()).expect("few"), expert, slot })
    }
    fn slot(&self, slot: Slot) -> &[u8] {
        &self.slots[slot.0 as usize]
    }
    fn released(&mut self, _: u32, _: u32) -> Result<(), Stopped> {
        Ok(())
    }
}

/// What a step wants of the simulation.
#[derive(Debug)]
pub enum Ask {
    /// The experts of a layer.
    Need(u32, Vec<ExpertKey>, Vec<ExpertKey>),
    /// The next expert that is provided.
    Provided,
    /// What other ranks gave.
    Given,
    /// To give another rank something.
    Give(u32, u32, Vec<u8>),
    /// A wave is no longer read.
    Released(u32, u32),
    /// It is over.
    Ended(Result<Vec<RowResult>, StepError>),
}

/// What it gets.
#[derive(Debug)]
enum Answer {
    Provided(Provided),
    /// By sender and exchange.
    Given(Vec<(u32, u32, Vec<u8>)>),
}

/// A step under way.
#[derive(Debug)]
pub struct Running {
    asks: Receiver<Ask>,
    answers: Option<Sender<Answer>>,
    thread: Option<JoinHandle<()>>,
}

impl Running {
    /// Begins a step; nothing happens before [`next`](Self::next).
    ///
    /// # Panics
    /// If there is no thread to be had.
    #[must_use]
    pub fn begin(rank: Arc<Rank>, memory: Memory, forward: Forward) -> Self {
        let (ask, asks) = channel();
        let (answers, answer) = channel();
        let compute = move || {
            let slots =
                forward.resident.iter().flatten().map(|&(key, slot)| (slot, rank.expert(key))).collect();
            let own = rank.model.share().rank();
            let mut source =
                Source { rank: &rank, own, ask, answer, slots, given: Mutex::default(), wave: Vec::new() };
            let mut memory = memory.lock().unwrap_or_else(PoisonError::into_inner);
            let (cache, workspace) = &mut *memory;
            let result = rank.model.forward(&forward, cache, workspace, &mut source, None);
            let _ = source.ask.send(Ask::Ended(result));
        };
        let thread = std::thread::Builder::new().name("step".into()).spawn(compute).expect("a thread");
        Self { asks, answers: Some(answers), thread: Some(thread) }
    }

    /// What it wants next; it goes on by itself until then.
    ///
    /// # Panics
    /// If the arithmetic does.
    pub fn next(&self) -> Ask {
        self.asks.recv().expect("a step says how it ended")
    }

    /// Answers [`Ask::Provided`].
    pub fn provide(&self, provided: Provided) {
        self.answer(Answer::Provided(provided));
    }

    /// Answers [`Ask::Given`].
    pub fn give(&self, given: Vec<(u32, u32, Vec<u8>)>) {
        self.answer(Answer::Given(given));
    }

    fn answer(&self, answer: Answer) {
        // One that has ended wants nothing.
        let _ = self.answers.as_ref().map(|answers| answers.send(answer));
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.answers = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the arithmetic was seen when it was waited for.
            let _ = thread.join();
        }
    }
}

struct Source<'a> {
    rank: &'a Rank,
    own: u32,
    ask: Sender<Ask>,
    answer: Receiver<Answer>,
    slots: BTreeMap<Slot, Arc<[u8]>>,
    given: Mutex<Vec<(u32, u32, Vec<u8>)>>,
    wave: Vec<Slot>,
}

impl Source<'_> {
    fn say(&self, ask: Ask) -> Result<(), Stopped> {
        self.ask.send(ask).map_err(|_| Stopped)
    }

    /// Takes what a rank gave in an exchange, once it is there.
    fn take(&self, from: u32, exchange: u32) -> Result<Vec<u8>, Stopped> {
        loop {
            let mut given = self.given.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(at) = given.iter().position(|(of, number, _)| (*of, *number) == (from, exchange)) {
                return Ok(given.swap_remove(at).2);
            }
            self.say(Ask::Given)?;
            match self.answer.recv().map_err(|_| Stopped)? {
                Answer::Given(more) => given.extend(more),
                Answer::Provided(_) => unreachable!("only what is asked for is answered"),
            }
        }
    }
}

impl ExpertSource for Source<'_> {
    fn need(&mut self, layer: u32, experts: &[ExpertKey], foreseen: &[ExpertKey]) -> Result<(), Stopped> {
        self.say(Ask::Need(layer, experts.to_vec(), foreseen.to_vec()))
    }

    fn provided(&mut self) -> Result<Provided, Stopped> {
        self.say(Ask::Provided)?;
        match self.answer.recv().map_err(|_| Stopped)? {
            Answer::Provided(provided) => {
                self.slots.insert(provided.slot, self.rank.expert(provided.expert));
                self.wave.push(provided.slot);
                Ok(provided)
            }
            Answer::Given(_) => unreachable!("only what is asked for is answered"),
        }
    }

    fn slot(&self, slot: Slot) -> &[u8] {
        &self.slots[&slot]
    }

    fn released(&mut self, layer: u32, wave: u32) -> Result<(), Stopped> {
        for slot in self.wave.drain(..) {
            self.slots.remove(&slot);
        }
        self.say(Ask::Released(layer, wave))
    }

    fn gather(&self, ranks: &[u32], exchange: u32, part: &[u8]) -> Result<Vec<Vec<u8>>, Stopped> {
        for &rank in ranks.iter().filter(|&&rank| rank != self.own) {
            self.say(Ask::Give(rank, exchange, part.to_vec()))?;
        }
        let parts = ranks
            .iter()
            .map(|&rank| if rank == self.own { Ok(part.to_vec()) } else { self.take(rank, exchange) });
        parts.collect()
    }

    fn hand_on(&self, rank: u32, exchange: u32, part: &[u8]) -> Result<(), Stopped> {
        self.say(Ask::Give(rank, exchange, part.to_vec()))
    }

    fn take_over(&self, rank: u32, exchange: u32) -> Result<Vec<u8>, Stopped> {
        self.take(rank, exchange)
    }
}
