//! A node with everything that a process around it needs: progress, the memory plan, signals, the control socket.

use crate::control::ControlSocket;
use crate::exit::Exit;
use crate::quantity::Size;
use crate::settings::Settings;
use crate::state::StateDir;
use crate::terminal::tell;
use anyhow::{Context, anyhow};
use indicatif::{ProgressBar, ProgressStyle};
use lite_llm_core::event::{Event, Phase};
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::Body;
use lite_llm_hw::node::{ExitReport, Node, NodeError, NodeHandle, NodeOptions, Status, StreamEvent};
use lite_llm_model::Capture;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Whoever takes requests: a node in this process, or a cluster.
pub(crate) trait Serving: Sized {
    /// Asks for a stream from its beginning.
    fn submit(&self, id: RequestId, body: Body) -> Receiver<StreamEvent>;

    /// Ends it: what is unfinished stays in the journals.
    fn end(self) -> anyhow::Result<()>;

    /// What became of it when streams broke off.
    fn broken_off(self) -> anyhow::Error;
}

impl Serving for Service {
    fn submit(&self, id: RequestId, body: Body) -> Receiver<StreamEvent> {
        self.node.submit(id, body, 0)
    }

    fn end(self) -> anyhow::Result<()> {
        self.stop().map(|_| ())
    }

    fn broken_off(self) -> anyhow::Error {
        self.unfinished()
    }
}

/// A node that serves.
#[derive(Debug)]
pub(crate) struct Service {
    node: Node,
    socket: Option<ControlSocket>,
    /// From start to `Ready`.
    pub(crate) load_time: Duration,
    /// Of ties between experts.
    pub(crate) routing_seed: Option<u64>,
}

impl Service {
    /// Starts a node and waits until it serves.
    pub(crate) fn start(
        model: &Path,
        state: &StateDir,
        settings: &Settings,
        capture: Option<Box<dyn Capture + Send>>,
    ) -> anyhow::Result<Self> {
        let begun = Instant::now();
        let progress = progress();
        let shown = progress.clone();
        let mut options = NodeOptions::new(model, state.path(), settings.config.clone());
        options.threads = settings.threads;
        options.isa = settings.isa;
        options.kv_dtype = Some(settings.kv_dtype);
        options.io = settings.io;
        options.computer = settings.computer;
        options.journal_bytes = settings.journal_bytes;
        if let Some(time) = settings.sync_every {
            options.sync_every = time;
        }
        options.capture = capture;
        let (carved, carving) = channel();
        options.on_event = Some(Box::new(move |_, event| {
            if let Event::PhaseDone { phase, bytes } = event {
                shown.set_message(phase_done(*phase, *bytes));
                if *phase == Phase::Manifest {
                    // Whoever does not wait for it knows already that the node has ended.
                    let _ = carved.send(());
                }
            }
        }));
        let launched = Self::launch(options, state, settings.drain_bound);
        let ready = launched.and_then(|(mut node, socket)| {
            // Told before the weights are loaded, which may take long. A node that ends first says why itself.
            let status = carving.recv().ok().and_then(|()| node.status().ok());
            if let Some(status) = &status {
                progress.suspend(|| {
                    tell!("{}", memory_plan(status));
                    for how in [node.reading(), node.launching().into()] {
                        if !how.is_empty() {
                            tell!("{how}");
                        }
                    }
                    tell!("model {}, state {}", model.display(), state.path().display());
                });
            }
            node.ready().map_err(|error| in_state(error, state))?;
            Ok((node, socket, status.and_then(|status| status.routing_seed)))
        });
        progress.finish_and_clear();
        let (node, socket, routing_seed) = ready?;
        Ok(Self { node, socket, load_time: begun.elapsed(), routing_seed })
    }

    fn launch(
        options: NodeOptions,
        state: &StateDir,
        drain_bound: Duration,
    ) -> anyhow::Result<(Node, Option<ControlSocket>)> {
        let drainer = Drainer::listen(drain_bound)?;
        let node = Node::launch(options).map_err(|error| in_state(error, state))?;
        drainer.attach(node.handle());
        // A private directory has no one who knows where to connect.
        let socket =
            if state.is_private() { None } else { Some(ControlSocket::open(state.path(), node.handle())?) };
        Ok((node, socket))
    }

    /// The running node.
    pub(crate) fn node(&self) -> &Node {
        &self.node
    }

    /// Ends the node: what is unfinished stays in the journal.
    pub(crate) fn stop(self) -> anyhow::Result<ExitReport> {
        // It may be draining already, or have failed: then `wait` says so.
        let _ = self.node.drain(Some(Duration::ZERO));
        self.wait()
    }

    /// What became of a node whose streams broke off.
    pub(crate) fn unfinished(self) -> anyhow::Error {
        match self.wait() {
            Ok(ExitReport { unfinished: 1, .. }) => anyhow!("drained with 1 unfinished request"),
            Ok(ExitReport { unfinished, .. }) => anyhow!("drained with {unfinished} unfinished requests"),
            Err(error) => error,
        }
    }

    /// Waits for the end of a node that drains or failed.
    pub(crate) fn wait(self) -> anyhow::Result<ExitReport> {
        let report = self.node.wait();
        drop(self.socket);
        Ok(report?)
    }
}

/// An error of the journal names its files; this is where they are.
fn in_state(error: NodeError, state: &StateDir) -> anyhow::Error {
    let of_journal =
        matches!(error, NodeError::Journal(_) | NodeError::Replay(_) | NodeError::Snapshot { .. });
    let error = anyhow::Error::from(error);
    if of_journal { error.context(format!("in {}", state.path().display())) } else { error }
}

fn memory_plan(status: &Status) -> String {
    let carving = &status.carving;
    let experts = u64::from(carving.slots).saturating_mul(carving.slot_bytes);
    let cache = u64::from(carving.pages).saturating_mul(carving.page_bytes);
    let warm = match carving.warm_slots {
        0 => String::new(),
        slots => {
            let bytes = u64::from(slots).saturating_mul(carving.slot_bytes);
            format!("{} in {slots} warm ones, ", Size(bytes))
        }
    };
    format!(
        "memory at most {}: {} in {} expert slots, {warm}up to {} in {} pages of KV cache, the rest for base \
         parameters and buffers",
        Size(status.memory_bytes),
        Size(experts),
        carving.slots,
        Size(cache),
        carving.pages
    )
}

/// A line that says what loads; nothing where standard error is no terminal.
fn progress() -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {elapsed} {msg}") {
        bar.set_style(style);
    }
    bar.set_message("opening the checkpoint and the journal");
    if !bar.is_hidden() {
        bar.enable_steady_tick(Duration::from_millis(100));
    }
    bar
}

fn phase_done(phase: Phase, bytes: u64) -> String {
    let next = match phase {
        Phase::Config => "reserving memory",
        Phase::Resources | Phase::Seed | Phase::Log => "reading the manifest, verifying the weights",
        Phase::Manifest => "loading base parameters",
        Phase::Base => "loading experts",
        Phase::Experts => "loading routers",
        Phase::Router | Phase::Optimizer => "almost there",
    };
    if bytes == 0 { next.into() } else { format!("{next} ({phase:?}: {})", Size(bytes)) }
}

/// Turns signals into drains: the first within the bound, the second at once.
#[derive(Clone, Debug)]
struct Drainer {
    shared: Arc<Mutex<Drains>>,
}

#[derive(Debug)]
struct Drains {
    /// There once model and journal are open.
    node: Option<NodeHandle>,
    signals: u32,
    bound: Duration,
}

impl Drainer {
    /// Listens from here on, also while model and journal are being opened.
    fn listen(bound: Duration) -> anyhow::Result<Self> {
        let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot listen for signals")?;
        let shared = Arc::new(Mutex::new(Drains { node: None, signals: 0, bound }));
        let drainer = Self { shared };
        let listener = drainer.clone();
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(move || signals.forever().for_each(|_| listener.drains().signal()))
            .context("cannot start the thread that waits for signals")?;
        Ok(drainer)
    }

    /// Has a node to drain; at once, if a signal came before it.
    fn attach(&self, node: NodeHandle) {
        let mut drains = self.drains();
        drains.node = Some(node);
        if drains.signals > 0 {
            drains.drain();
        }
    }

    fn drains(&self) -> MutexGuard<'_, Drains> {
        self.shared.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drains {
    fn signal(&mut self) {
        self.signals += 1;
        if self.node.is_some() {
            self.drain();
        } else if self.signals == 1 {
            tell!("stopping once the model is open; a second signal stops at once");
        } else {
            // Nothing is accepted yet, and the journal bears any end.
            std::process::exit(Exit::Failed as i32);
        }
    }

    fn drain(&self) {
        let bound = if self.signals > 1 { Duration::ZERO } else { self.bound };
        tell!("draining: unfinished requests have {} s; a second signal stops at once", bound.as_secs());
        if let Some(node) = &self.node {
            // A node that has ended has nothing to drain.
            let _ = node.drain(Some(bound));
        }
    }
}
