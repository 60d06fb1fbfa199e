//! How a node comes to life: model and journal opened, the journal folded, the threads started.
//!
//! There is no second path for recovery. The fold gives the state of the last durable record; the event loop then begins
//! with `Restarted`, or with `Boot` on an empty journal.

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{channel, sync_channel};
use std::time::Duration;

use lite_llm_core::LOGIC_VERSION;
use lite_llm_core::carving::carve;
use lite_llm_core::chain::RestoreError;
use lite_llm_core::cluster::peer::Log;
use lite_llm_core::config::Limits;
use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::ids::{Incarnation, Seq};
use lite_llm_core::input::Input;
use lite_llm_core::journal::{Header, Recovered, Store, scan};
use lite_llm_core::output::Output;
use lite_llm_core::plan::ModelPlan;
use lite_llm_core::replay::fold;
use lite_llm_model::tokenizer::Tokenizer;
use lite_llm_model::{Checkpoint, Model, ModelOptions};

use super::backend::{Backend, Cpu};
use super::compute::Compute;
use super::device::Device;
use super::error::panic_message;
use super::event_loop::{Clock, EventLoop};
use super::journal::{Contents, Journal};
use super::loaders::Loaders;
use super::reports::Reports;
use super::{Computer, Node, NodeError, NodeHandle, NodeOptions};
use crate::blobs::Blobs;
use crate::cold::{Cold, Reading};
use crate::cuda::Gpu;
use crate::cuda::model::CudaModel;
use crate::cuda::model::sizes::Sizes;
use crate::cuda::staging::pinned_bytes;
use crate::disk::FileDisk;
use crate::memory;
use crate::telemetry::Telemetry;

/// Commands and completions that may wait for the event loop.
const MESSAGES_MAX: usize = 4096;
/// Loader threads, if there are cores for them.
pub(crate) const LOADERS_MAX: usize = 4;
/// Segments that a journal of bounded size has: a snapshot lets go of whole ones only.
const SEGMENTS: u64 = 8;
/// No segment is ended before it has this many bytes.
const SEGMENT_BYTES_MIN: u64 = 1 << 16;
/// The node's number in its journal; a node of a cluster has another.
const NODE: u32 = 0;

pub(super) fn launch(options: NodeOptions) -> Result<Node, NodeError> {
    let NodeOptions { model_dir, state_dir, mut config, threads, isa, kv_dtype, io, .. } = options;
    let NodeOptions { journal_bytes, sync_every, capture, on_event, computer, .. } = options;
    let gpu = gpu_of(computer, NODE)?;
    let left_out = config.memory_bytes == u64::MAX;
    if left_out {
        config.memory_bytes = memory_of(gpu.as_deref())?;
    }
    // The lock first: nobody else may serve this state while its model is being read.
    let mut disk = FileDisk::open(&state_dir)?;

    let checkpoint = Arc::new(Checkpoint::open(&model_dir)?);
    // The checkpoint's hints hold where the operator says nothing.
    for tier in checkpoint.tiers() {
        config.placement.entry(tier.name.clone()).or_insert(tier.placement);
    }
    let tokenizer = Tokenizer::of(&checkpoint)?;
    let routing_seed = config.routing_seed.unwrap_or(0);
    let options = ModelOptions { threads, isa, kv_dtype, routing_seed, ..ModelOptions::default() };
    let model = Model::open(checkpoint, options)?;
    // Refused before all weights are read for their digest.
    let loader = model.expert_loader();
    let slot_bytes = model.slot_bytes() as u64;
    if left_out && gpu.is_some() {
        // What is warm, and what experts pass through, is the host's.
        config.memory_bytes += config.warm_bytes + pinned_bytes(slot_bytes);
    }
    let cold = match &gpu {
        None => Cold::open(io, &loader, config.memory_bytes)?,
        Some(gpu) => Cold::open_for(gpu, io, &loader, slot_bytes)?,
    };
    let reading = Arc::new(Reading::new(cold.report()));
    let tokenizer_digest = tokenizer.as_ref().map_or_else(Digest::default, Tokenizer::digest);
    let limits = &config.limits;
    let mut plan = model.plan(limits.step_positions_max, limits.rows_max, tokenizer_digest)?;
    let identity = Arc::new(plan.identity.clone());
    let (backend, launching) = backend_of(gpu.as_ref(), model, limits, &mut plan)?;
    // Refused before a journal is begun; what requests of a former life need is the engine's to say.
    carve(&config, &plan, plan.pages_for(1, 1)).map_err(NodeError::Boot)?;

    let scanned = scan(&mut disk)?;
    let former = scanned.header.map_or(0, |header| header.incarnation);
    let bytes = scanned.segments.iter().map(|segment| segment.bytes).sum();
    drop(scanned);
    let header = Header {
        logic_version: LOGIC_VERSION,
        node: NODE,
        incarnation: former + 1,
        identity: Digest::of_value(&*identity).0,
    };
    let (mut store, recovered) = Store::open(disk, &header)?;
    if let Some(journal_bytes) = journal_bytes {
        store = store.with_segment_bytes((journal_bytes / SEGMENTS).max(SEGMENT_BYTES_MIN));
    }
    let telemetry = Telemetry::open(&state_dir, header.incarnation);
    let what = "cannot open the telemetry files in the state directory";
    let mut telemetry = telemetry.map_err(|source| NodeError::System { what, source })?;
    let engine = refold(&recovered, &mut telemetry)?;
    drop(recovered);

    let incarnation = Incarnation(header.incarnation);
    let entropy = RandomState::new().build_hasher().finish();
    let loaders = threads.clamp(1, LOADERS_MAX).min(config.limits.loads_max as usize);
    let config = Box::new(config);
    let first = if engine.next_seq() == Seq(1) {
        Input::Boot { incarnation, config, entropy }
    } else {
        Input::Restarted { incarnation, config, entropy }
    };

    let blobs = Blobs::of(&state_dir);
    let (messages, receiver) = sync_channel(MESSAGES_MAX);
    let (ready_sender, ready) = channel();
    let reports = Reports::to(messages.clone());
    let loaders = Loaders::start(loaders, loader, cold, &blobs, gpu.as_ref(), &reports)?;
    let compute = Compute::start(backend, capture, reports.clone())?;
    let journal = Journal::start(store, bytes, reports)?;
    let device = Device::new(compute, loaders, plan, tokenizer, gpu, Arc::clone(&reading));
    let mut event_loop = EventLoop::new(engine, device, journal, telemetry, blobs, on_event, ready_sender);
    event_loop.bound_journal(journal_bytes);
    event_loop.sync_every(sync_every);
    let thread = std::thread::Builder::new()
        .name("node".into())
        .spawn(move || event_loop.run(receiver, first))
        .map_err(|source| NodeError::System { what: "cannot start the event loop", source })?;
    let handle = NodeHandle { messages, identity, reading, launching: launching.into() };
    Ok(Node { handle, ready, thread: Some(thread) })
}

/// What memory a node has if nobody says: seven eighths of what can be had.
fn memory_of(gpu: Option<&Gpu>) -> Result<u64, NodeError> {
    let available = match gpu {
        Some(gpu) => gpu.memory()?.0,
        None => {
            let what = "cannot tell how much memory there is, so it must be given";
            memory::measure().map_err(|source| NodeError::System { what, source })?.available
        }
    };
    Ok(available - available / 8)
}

/// The GPU of a node, if it has one.
pub(crate) fn gpu_of(computer: Computer, node: u32) -> Result<Option<Arc<Gpu>>, NodeError> {
    Ok(match computer {
        Computer::Cpu => None,
        Computer::Cuda { number: Some(number), patience } => Some(Gpu::open(number, patience)?),
        Computer::Cuda { number: None, patience } => Some(Gpu::open_for(node, patience)?),
    })
}

/// What computes a model, and what people may want to know of how steps are launched; in the plan, what these need beside weights, cache
/// and experts, which is another thing on a GPU: it also has the memory of the host that experts pass through.
pub(crate) fn backend_of(
    gpu: Option<&Arc<Gpu>>,
    model: Model,
    limits: &Limits,
    plan: &mut ModelPlan,
) -> Result<(Box<dyn Backend>, String), NodeError> {
    let Some(gpu) = gpu else { return Ok((Box::new(Cpu::new(model)), String::new())) };
    let sizes = Sizes::of(&model, limits.step_positions_max, limits.rows_max)?;
    plan.overhead_bytes = sizes.overhead_bytes(&model).saturating_add(pinned_bytes(plan.slot_bytes));
    let model = CudaModel::new(gpu, model, sizes)?;
    let launching = model.launching();
    Ok((Box::new(model), launching))
}

/// The log that a journal holds after it was cut or replaced.
pub(crate) fn fold_contents((snapshot, records): Contents) -> Result<Log, NodeError> {
    let mut engine = match &snapshot {
        None => Engine::new(),
        Some(snapshot) => {
            let broken =
                |error: RestoreError| NodeError::Snapshot { next: snapshot.next, what: error.to_string() };
            Engine::restore(&snapshot.bytes).map_err(broken)?
        }
    };
    fold(&mut engine, &records, |_, _| {})?;
    Ok(Log::new(engine, &records))
}

/// The engine that the journal yields; telemetry that the former life had not written is written now.
pub(crate) fn refold(recovered: &Recovered, telemetry: &mut Telemetry) -> Result<Engine, NodeError> {
    let mut engine = match &recovered.snapshot {
        None => Engine::new(),
        Some(snapshot) => {
            let broken = |what: String| NodeError::Snapshot { next: snapshot.next, what };
            if snapshot.logic_version != LOGIC_VERSION {
                return Err(broken(format!(
                    "it is of logic version {}, this program reads {LOGIC_VERSION}; use the version that wrote it",
                    snapshot.logic_version
                )));
            }
            let engine = Engine::restore(&snapshot.bytes).map_err(|error| broken(error.to_string()))?;
            if engine.next_seq() != Seq(snapshot.next) || engine.digest() != Digest(snapshot.digest) {
                return Err(broken(
                    "its state is of another record; restore the state directory from a copy".into(),
                ));
            }
            engine
        }
    };
    // A record that broke an invariant in the last life breaks it again: that is a report, not a second crash.
    let folded = catch_unwind(AssertUnwindSafe(|| {
        fold(&mut engine, &recovered.records, |_, output| {
            if let Output::Event { seq, event } = output {
                telemetry.regenerate(*seq, event);
            }
        })
    }));
    match folded {
        Ok(folded) => folded?,
        Err(panic) => {
            let seq = Seq(engine.next_seq().0 - 1);
            return Err(NodeError::Panic { seq, thread: "recovery", message: panic_message(&*panic) });
        }
    }
    Ok(engine)
}

impl Clock {
    /// A clock that begins now, or at `last` if the system's clock has been set back since.
    pub(crate) fn start(last: lite_llm_core::time::Time) -> Self {
        let since_1970 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        let now = u64::try_from(since_1970.unwrap_or(Duration::ZERO).as_nanos()).unwrap_or(u64::MAX);
        Self::new(lite_llm_core::time::Time(now).max(last))
    }
}
