//! A model on a device: the steps of [`lite_llm_model::Model`] in kernels, with the same bits.
//!
//! Weights, cache, experts and the values of a step are in memory of the device that is taken at start, within a hard budget
//! ([`sizes`]). The host makes lists ([`tables`]), launches ([`run`], [`attention`], [`mixture`]) and takes back what is digested: the
//! routes of each layer, logits, the residual stream, and the tokens that were chosen. Rows are digested by the model's own code
//! ([`lite_llm_model::forward::Outcome`]). A rank computes its share, and exchanges with others ([`ranks`]): through the
//! host, or from device to device ([`transport`]).

mod agreement;
mod attention;
mod direct;
mod ending;
mod graphs;
mod layers;
mod mirror;
mod mixture;
mod ranks;
mod routes;
mod run;
pub(crate) mod sizes;
mod standing;
mod tables;
mod transport;
mod weights;

use super::CudaError;
use super::gpu::Gpu;
use super::memory::Memory;
use super::stream::Stream;
use crate::arena::Arena;
use crate::node::backend::{Backend, Unfinished, fault_of};
use agreement::Ways;
use graphs::{Graphs, Launches};
use lite_llm_core::input::{Fault, RowResult};
use lite_llm_core::output::Forward;
use lite_llm_model::forward::Outcome;
use lite_llm_model::forward::exchange::ROWS_TOGETHER;
use lite_llm_model::{Capture, ExpertSource, Model, StepError, Stopped};
use mirror::{Mirror, Results};
use mixture::Desk;
use ranks::Among;
use routes::Users;
use run::Run;
use sizes::{Room, Sizes};
use standing::Standing;
use std::cell::RefCell;
use std::sync::Arc;
use tables::{At, Tables, positions};
use weights::{Base, Routers};

/// Why a step has no rows.
#[derive(Debug)]
enum Failed {
    Step(StepError),
    Cuda(CudaError),
}

impl From<StepError> for Failed {
    fn from(error: StepError) -> Self {
        Self::Step(error)
    }
}

impl From<Stopped> for Failed {
    fn from(stopped: Stopped) -> Self {
        Self::Step(stopped.into())
    }
}

impl From<CudaError> for Failed {
    fn from(error: CudaError) -> Self {
        match error {
            CudaError::Stopped => Self::Step(Stopped.into()),
            error => Self::Cuda(error),
        }
    }
}

/// A step, as the host sees it.
struct Step<'a, 'c> {
    forward: &'a Forward,
    outcome: Outcome<'a>,
    capture: Option<&'c mut dyn Capture>,
}

impl Step<'_, '_> {
    /// Takes the route of a position.
    fn route(&mut self, layer: u32, at: &At, experts: &[u32], weights: &[f32]) {
        self.outcome.route(at.row, experts, weights);
        if let Some(capture) = &mut self.capture {
            capture.routes(at.request, layer, at.position, experts, weights);
        }
    }
}

/// The memory of steps.
#[derive(Debug)]
struct Carved {
    // In this order: whatever uses memory goes first.
    graphs: Graphs,
    desk: Desk,
    tables: Mirror,
    standing: Standing,
    room: Room,
    _memory: Memory,
    cache: Memory,
    page_bytes: u64,
    /// The slots of experts: they outlive steps.
    arena: Arc<Arena>,
}

/// A model on a device.
#[derive(Debug)]
pub(crate) struct CudaModel {
    carved: Option<Carved>,
    base: Option<Base>,
    routers: Option<Routers>,
    stream: Stream,
    /// Why the driver makes no graphs, if it makes none.
    no_graphs: Option<CudaError>,
    sizes: Sizes,
    model: Model,
    gpu: Arc<Gpu>,
}

impl CudaModel {
    /// A model whose steps have such sizes. Nothing of it is on the device yet.
    ///
    /// # Errors
    /// If the device is lost.
    pub(crate) fn new(gpu: &Arc<Gpu>, model: Model, sizes: Sizes) -> Result<Self, CudaError> {
        let stream = Stream::new(gpu)?;
        let no_graphs = graphs::refusal(&stream, gpu.functions.add)?;
        let (carved, base, routers) = (None, None, None);
        Ok(Self { carved, base, routers, stream, no_graphs, sizes, model, gpu: Arc::clone(gpu) })
    }

    /// What people may want to know of how steps are launched; empty if there is nothing.
    pub(crate) fn launching(&self) -> String {
        let why = |error: &CudaError| format!("steps of decode are launched kernel by kernel: {error}");
        self.no_graphs.as_ref().map_or_else(String::new, why)
    }

    fn take_memory(&self, arena: &Arc<Arena>, pages: u32) -> Result<Carved, CudaError> {
        let (gpu, sizes) = (&self.gpu, &self.sizes);
        let page_bytes = self.model.page_bytes() as u64;
        let cache = Memory::new(gpu, "pages of KV cache", page_bytes.saturating_mul(u64::from(pages)))?;
        let memory = Memory::new(gpu, "the values of a step", sizes.bytes())?;
        let (room, tables) = Room::of(sizes, memory.at());
        let lists = (tables + 4 * sizes.table_words() as u64).next_multiple_of(super::memory::ALIGN);
        let desk = Desk {
            lists: Mirror::new(gpu, lists, sizes.list_words())?,
            results: Results::new(gpu, sizes.results_bytes())?,
            users: Users::default(),
            ways: Ways::new(gpu, sizes.exchanged_bytes())?,
        };
        let standing = (lists + 4 * sizes.list_words() as u64).next_multiple_of(super::memory::ALIGN);
        let standing = Standing::new(Mirror::new(gpu, standing, sizes.standing_words())?);
        let tables = Mirror::new(gpu, tables, sizes.table_words())?;
        let arena = Arc::clone(arena);
        let graphs = Graphs::new(self.no_graphs.is_some());
        Ok(Carved { graphs, desk, tables, standing, room, _memory: memory, cache, page_bytes, arena })
    }

    /// Weights are elsewhere from now on.
    fn forget_graphs(&mut self) {
        if let Some(carved) = &mut self.carved {
            carved.graphs.clear();
        }
    }

    fn step<'a>(&mut self, step: &mut Step<'a, '_>, source: &mut dyn ExpertSource) -> Result<(), Failed> {
        self.gpu.enter()?;
        let carved = self.carved.as_mut().expect("memory is carved before the first step");
        let slots = carved.arena.on_gpu().expect("experts are on the device");
        carved.desk.results.clear();
        if self.model.share().topology().ranks() > 1 {
            carved.desk.ways.agree(&self.gpu, self.model.share(), source)?;
        }
        let through = (&self.stream, &mut carved.desk.results);
        let standing = carved.standing.of(&self.model, step.forward, slots.1, through)?;
        let capture = step.capture.as_deref();
        let wants = |request| capture.is_some_and(|capture| capture.wants_logits(request));
        let at = positions(step.forward);
        let tables = Tables::of(&self.model, &self.sizes, step.forward, &at, &wants, &mut carved.tables);
        carved.tables.send(&self.stream)?;
        // Ranks exchange a row for each user that there may be. Of many the host counts those that there are.
        let has_few = at.len() * self.sizes.places <= ROWS_TOGETHER;
        let share = self.model.share();
        let finds_users =
            standing.resident.is_some() && (has_few || !(share.is_tensor() || share.is_expert()));
        let launches = if finds_users && tables.decode {
            carved.graphs.begin(standing, &tables, carved.desk.ways.is_past_host())
        } else {
            Launches::AtOnce
        };
        let kept = if finds_users { self.sizes.moe_layers } else { 0 };
        let logits = tables.wanted.first().map_or(0, |wanted| wanted.positions.len());
        let back = self.sizes.back(at.len(), kept, logits);
        let run = Run {
            model: &self.model,
            stream: &self.stream,
            functions: &self.gpu.functions,
            sizes: &self.sizes,
            room: &carved.room.with(back),
            back,
            lists: carved.desk.lists.device(),
            base: self.base.as_ref().expect("base parameters are loaded before the first step"),
            routers: self.routers.as_ref().expect("routers are loaded before the first step"),
            at: &at,
            tables: &tables,
            standing,
            cache: (carved.cache.at(), carved.page_bytes),
            slots,
            finds_users,
            launches: RefCell::new(launches),
        };
        let computed = run.layers(step, source, &mut carved.desk);
        // From here on nothing is recorded.
        carved.graphs.keep(run.launches.replace(Launches::AtOnce), computed.is_ok());
        computed?;
        let Desk { results, ways, .. } = &mut carved.desk;
        let among = &mut Among { source, transport: ways.transport() };
        if share.is_last_stage() { run.end(step, results, among) } else { run.hand_on(step, results, among) }
    }
}

/// What the engine hears of an error in the boot sequence.
fn boot_fault(gpu: &Gpu, error: &CudaError) -> Fault {
    let what = error.to_string();
    match error {
        CudaError::Budget { .. } | CudaError::Memory { .. } | CudaError::Pinned { .. } => {
            Fault::Resource(what)
        }
        _ => {
            gpu.lose();
            Fault::Device(what)
        }
    }
}

impl Backend for CudaModel {
    fn carve(&mut self, arena: &Arc<Arena>, pages: u32) -> Result<(), Fault> {
        self.carved = Some(self.take_memory(arena, pages).map_err(|error| boot_fault(&self.gpu, &error))?);
        Ok(())
    }

    fn load_base(&mut self, shard: u32) -> Result<(), Fault> {
        self.forget_graphs();
        self.model.load_base(shard).map_err(|error| fault_of(&error))?;
        self.base = Some(Base::load(&self.gpu, &self.model).map_err(|error| boot_fault(&self.gpu, &error))?);
        // The host keeps none of it.
        self.model.forget_weights();
        Ok(())
    }

    fn load_routers(&mut self, routing_seed: u64) -> Result<(), Fault> {
        self.forget_graphs();
        self.model.set_routing_seed(routing_seed);
        self.model.load_routers().map_err(|error| fault_of(&error))?;
        self.routers =
            Some(Routers::load(&self.gpu, &self.model).map_err(|error| boot_fault(&self.gpu, &error))?);
        self.model.forget_weights();
        Ok(())
    }

    fn forward(
        &mut self,
        forward: &Forward,
        source: &mut dyn ExpertSource,
        capture: Option<&mut dyn Capture>,
    ) -> Result<Vec<RowResult>, Unfinished> {
        let mut step = Step { forward, outcome: Outcome::new(forward, self.model.share()), capture };
        let finished = self.step(&mut step, source);
        let lost = |error: CudaError| {
            self.gpu.lose();
            Unfinished::Lost(error.to_string())
        };
        match finished {
            Ok(()) => Ok(step.outcome.results()),
            Err(Failed::Cuda(error)) => Err(lost(error)),
            Err(Failed::Step(error)) => {
                // Slots, pages and lists may be written again once this returns. What waits for other ranks is ended by the first wait.
                let waited = match self.stream.wait() {
                    Err(CudaError::Stopped) => self.stream.wait(),
                    waited => waited,
                };
                waited.map_err(lost)?;
                Err(error.into())
            }
        }
    }

    fn release(&mut self) {
        // Slots last: whoever waits for them finds everything else given back.
        (self.base, self.routers) = (None, None);
        self.carved = None;
    }

    fn take(&mut self, model: Model) {
        // Sizes are those of every rank.
        self.model = model;
    }

    fn rank(&self) -> u32 {
        self.model.share().rank()
    }
}
