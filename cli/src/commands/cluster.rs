//! `lite-llm supervise --nodes N`: a model spread over processes, supervised, with the run's requests as its clients.

use crate::cause;
use crate::commands::batch;
use crate::commands::rank::NodeSettings;
use crate::commands::run::{Opened, RunArgs};
use crate::control::ControlSocket;
use crate::exit::{Exit, fault, usage};
use crate::request::request_id;
use crate::serve::Serving;
use crate::settings::Settings;
use crate::state::{SETTINGS_NAME, StateDir, unique};
use crate::stream::{Format, Printer, finish_name, is_complete};
use crate::terminal::tell;
use anyhow::{Context, anyhow};
use clap::Args;
use lite_llm_core::carving::carve;
use lite_llm_core::cluster::membership::Member;
use lite_llm_core::cluster::supervisor::{
    Cause, ClusterConfig, Failure, Patience, Restarts, SupervisorEvent,
};
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::Body;
use lite_llm_core::output::FinishReason;
use lite_llm_core::topology::Topology;
use lite_llm_hw::cluster::head::HeadHandle;
use lite_llm_hw::cluster::{Head, HeadOptions, end_all, rank};
use lite_llm_hw::cold::{Cold, Io};
use lite_llm_hw::cuda::{self, Gpu};
use lite_llm_hw::disk::FileDisk;
use lite_llm_hw::net::Key;
use lite_llm_hw::node::{Computer, StreamEvent};
use lite_llm_model::kernels::Isa;
use lite_llm_model::tokenizer::Detokenizer;
use lite_llm_model::{Checkpoint, Model, ModelOptions, Share};
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::mpsc::Receiver;
use std::time::Duration;

/// What the key is called in the state directory.
const KEY_NAME: &str = "key";

#[derive(Debug, Args)]
#[command(next_help_heading = "Cluster")]
pub(crate) struct ClusterArgs {
    /// Spread the model over so many processes of this machine; those beyond the ranks of the topology stand by
    #[arg(long, value_name = "N")]
    pub(crate) nodes: Option<u32>,
    /// Further nodes on other machines, each to be added there with lite-llm node
    #[arg(long, value_name = "N", default_value_t = 0, requires = "nodes")]
    elsewhere: u32,
    /// Ranks of each kind, as in dp=2,tp=1,pp=2,ep=2: replicas, and how the rows, layers and experts of each are shared
    #[arg(long, value_name = "RANKS", requires = "nodes")]
    topology: Option<Topology>,
    /// Where the supervisor listens; nodes take ports of their own on the same host [default: 127.0.0.1:0]
    #[arg(long, value_name = "ADDR", requires = "nodes")]
    listen: Option<SocketAddr>,
    /// The key that all processes of the cluster share; made in the state directory if left out
    #[arg(long, value_name = "FILE", requires = "nodes")]
    key_file: Option<PathBuf>,
}

impl ClusterArgs {
    pub(crate) fn run(&self, run: RunArgs, max_restarts: usize) -> anyhow::Result<Exit> {
        for (given, flag) in [
            (run.logits.is_some(), "--logits"),
            (run.routes.is_some(), "--routes"),
            (run.generations.is_some(), "--generations"),
            (run.runtime.journal_max.is_some(), "--journal-max"),
            (run.runtime.sync_every.is_some(), "--sync-every"),
        ] {
            if given {
                return Err(usage(format!("{flag} is for one process: leave it out, or leave out --nodes")));
            }
        }
        run.check()?;
        let mut opened = run.open()?;
        let state = StateDir::choose_for_cluster(run.state.as_deref())?;
        let cluster = self.settle(&run, &mut opened, &state, max_restarts)?;
        state
            .make()
            .with_context(|| format!("cannot make the state directory {}", state.path().display()))?;
        let ended = match &run.batch.batch {
            Some(_) => batch::run_on(&run, &opened, &state, || self.start(&run, &opened, &state, cluster)),
            None => self.run_one(&run, &opened, &state, cluster),
        };
        state.end(matches!(ended, Ok(Exit::Ok)));
        ended
    }

    /// How the cluster is run. Each process has its part of what is there.
    fn settle(
        &self,
        run: &RunArgs,
        opened: &mut Opened,
        state: &StateDir,
        max_restarts: usize,
    ) -> anyhow::Result<ClusterConfig> {
        let here = self.nodes.context("a number of nodes")?;
        let nodes = here.saturating_add(self.elsewhere);
        let topology = self.topology.unwrap_or(Topology { pipeline: nodes.clamp(1, 64), ..Topology::SINGLE });
        let checkpoint = Arc::new(Checkpoint::open(&run.model)?);
        Share::check(&topology, checkpoint.arch()).map_err(usage)?;
        let Settings { config, threads, isa, kv_dtype, io, computer, .. } = &mut opened.settings;
        config.topology = topology;
        if *computer == Computer::Cpu && run.runtime.memory.is_none() {
            // What is available is another number each time; as many nodes of a former life have the one they were given.
            let former = NodeSettings::read(&state.path().join(SETTINGS_NAME)).ok();
            let former = former.filter(|former| former.gpu_patience.is_none() && former.here == here);
            let own = config.memory_bytes / u64::from(here.max(1));
            config.memory_bytes = former.map_or(own, |former| former.config.memory_bytes);
        }
        if run.runtime.threads.is_none() {
            *threads = (*threads / here.max(1) as usize).max(1);
        }
        let share = Share::new(topology, 0);
        let options = ModelOptions {
            threads: 1,
            isa: *isa,
            kv_dtype: Some(*kv_dtype),
            share,
            ..ModelOptions::default()
        };
        let model = Model::open(checkpoint, options)?;
        if let Computer::Cuda { number, .. } = *computer {
            // Here it is refused in words, and kernels are compiled once.
            let own = cuda::ready(&model, &config.limits, here, number)?;
            if config.memory_bytes == u64::MAX {
                let own = own.ok_or_else(|| usage("there is no node here to have a GPU: give --memory"))?;
                config.memory_bytes = own.saturating_add(config.warm_bytes);
            }
        }
        config.check().map_err(usage)?;
        // Here it is refused in words; a node's process could only end. A node of another machine may read in another way.
        let loader = model.expert_loader();
        match *computer {
            Computer::Cpu => {
                let limits = &config.limits;
                let plan = model.plan(limits.step_positions_max, limits.rows_max, Digest::default())?;
                carve(config, &plan, plan.pages_for(1, 1)).map_err(|why| anyhow!("of each node: {why}"))?;
                let cold = Cold::open(*io, &loader, config.memory_bytes)?;
                if !cold.report().is_empty() {
                    tell!("{}", cold.report());
                }
            }
            // Nodes with GPUs say each how they read. What only a GPU can tell is tried on the first one, which is let go of again.
            Computer::Cuda { number, patience } => {
                let is_tried = *io == Some(Io::Direct) && here > 0;
                let gpu = is_tried.then(|| Gpu::open_untried(number.unwrap_or(0), patience)).transpose()?;
                Cold::check_for_gpus(gpu.as_ref(), *io, &loader, model.slot_bytes() as u64)?;
            }
        }
        let facts = rank::facts(&model, config, opened.tokenizer.as_ref())?;
        let defaults = Patience::default();
        let cluster = ClusterConfig {
            facts,
            topology,
            nodes,
            // A node reads all weights before it is heard.
            patience: Patience { starting_ns: defaults.loading_ns, ..defaults },
            restarts: Restarts {
                most: u32::try_from(max_restarts).unwrap_or(u32::MAX),
                ..Restarts::default()
            },
            ..ClusterConfig::default()
        };
        cluster.check().map_err(usage)?;
        Ok(cluster)
    }

    fn start(
        &self,
        run: &RunArgs,
        opened: &Opened,
        state: &StateDir,
        cluster: ClusterConfig,
    ) -> anyhow::Result<Cluster> {
        let Settings { config, threads, isa, kv_dtype, io, drain_bound, computer, .. } = &opened.settings;
        let model = run.model.canonicalize().context("cannot find the checkpoint again")?;
        let (gpu_patience, gpu_number) = match *computer {
            Computer::Cpu => (None, None),
            Computer::Cuda { number, patience } => (Some(patience), number),
        };
        let settings = NodeSettings {
            model,
            config: config.clone(),
            threads: *threads,
            scalar: *isa == Isa::Scalar,
            kv_type: (*kv_dtype).into(),
            io: *io,
            drift_per_mille: cluster.drift_per_mille,
            here: cluster.nodes - self.elsewhere,
            gpu_patience,
            gpu_number,
        };
        if settings.model.to_str().is_none() {
            return Err(usage(format!(
                "nodes are told where the checkpoint is in UTF-8, which {} is not: rename it, or move it",
                settings.model.display()
            )));
        }
        let listen = self.listen.unwrap_or(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 0));
        if self.elsewhere > 0 && (listen.ip().is_loopback() || listen.ip().is_unspecified()) {
            return Err(usage(format!(
                "--elsewhere needs an address that other machines reach, not {}: give it with --listen IP:PORT",
                listen.ip()
            )));
        }
        // The lock first: whoever has it has nodes here that are not ours to end, and their settings not ours to change.
        let disk = FileDisk::open(state.path())?;
        let key_path = self.key_file.clone().unwrap_or_else(|| state.path().join(KEY_NAME));
        let key = Key::of_file(&key_path)?;
        let settings_path = state.path().join(SETTINGS_NAME);
        let cannot = || format!("cannot write {}", settings_path.display());
        let text = serde_json::to_string_pretty(&settings)?;
        if std::fs::read_to_string(&settings_path).is_ok_and(|former| former != text) {
            // Processes that a former supervisor left behind have other settings: they begin again with these.
            end_all(state.path()).with_context(|| "cannot end the nodes that are still there")?;
        }
        std::fs::write(&settings_path, &text).with_context(cannot)?;
        let program = std::env::current_exe().context("cannot find this program")?;
        let (settings_file, ip) = (settings_path.clone(), listen.ip());
        let command = move |member: Member, at: SocketAddr, dir: &Path| {
            rank_command(&program, member, at, ip, (dir, &settings_file, &key_path))
        };
        tell!(
            "{} nodes as {}, memory of each at most {}; model {}, state {}",
            cluster.nodes,
            cluster.topology,
            crate::quantity::Size(config.memory_bytes),
            run.model.display(),
            state.path().display()
        );
        let head = Head::start(HeadOptions {
            disk,
            cluster,
            elsewhere: self.elsewhere,
            settings: text,
            // A private directory has no one who knows where to connect. An agent of another machine has a node begin again.
            attended: !state.is_private() || self.elsewhere > 0,
            listen,
            key,
            command: Box::new(command),
            on_event: Some(Box::new(told)),
        })?;
        drain_on_signals(head.handle(), *drain_bound)?;
        let socket =
            if state.is_private() { None } else { Some(ControlSocket::open(state.path(), head.handle())?) };
        Ok(Cluster { head, socket })
    }

    fn run_one(
        &self,
        run: &RunArgs,
        opened: &Opened,
        state: &StateDir,
        cluster: ClusterConfig,
    ) -> anyhow::Result<Exit> {
        let prompt = run.prompt.read()?.tokens(opened.tokenizer.as_ref(), &run.model)?;
        let body = run.request.body(prompt);
        body.check_prompt(opened.vocab, opened.context).map_err(anyhow::Error::msg)?;
        let id = match &run.request_id {
            Some(id) => id.clone(),
            None => request_id(&unique("request")).map_err(anyhow::Error::msg)?,
        };
        let topology = cluster.topology;
        let cluster = self.start(run, opened, state, cluster)?;
        let events = cluster.head.handle().submit(id.clone(), body, run.from_offset);
        let mut printer =
            Printer::new(Format { stream: run.stream, json: run.json }, opened.tokenizer.as_ref());
        let mut tokens = Vec::new();
        loop {
            match events.recv() {
                Ok(StreamEvent::Accepted { .. }) => {}
                Ok(StreamEvent::Token { offset, token }) => {
                    tokens.push(token);
                    printer.token(offset, token)?;
                }
                Ok(StreamEvent::Finish { reason, generated, .. }) => {
                    let mut text = Detokenizer::new(opened.tokenizer.as_ref());
                    let mut whole: String = tokens.iter().map(|&token| text.push(token)).collect();
                    whole.push_str(&text.end());
                    let result = json!({
                        "request_id": id.as_str(),
                        "tokens": tokens,
                        "offset": run.from_offset,
                        "generated": generated,
                        "text": opened.tokenizer.as_ref().map(|_| whole),
                        "finish_reason": finish_name(&reason),
                        "topology": topology.to_string(),
                    });
                    printer.end(&result)?;
                    cluster.end()?;
                    return match reason {
                        FinishReason::Fault(reason) => {
                            Err(fault(format!("request {id} could not be computed: {reason}")))
                        }
                        reason if is_complete(&reason) => Ok(Exit::Ok),
                        reason => Err(anyhow!("request {id} ended early: {}", finish_name(&reason))),
                    };
                }
                Ok(StreamEvent::Refused { reason, .. }) => {
                    cluster.end()?;
                    return Err(anyhow!("request {id} is refused: {reason}"));
                }
                Err(_) => return Err(cluster.broken_off().context(state.goes_on(Some(&id)))),
            }
        }
    }
}

/// The command of a life of a node: where the supervisor listens, the node's own address, and its directory, settings and key.
pub(crate) fn rank_command(
    program: &Path,
    member: Member,
    supervisor: SocketAddr,
    own: IpAddr,
    (dir, settings, key): (&Path, &Path, &Path),
) -> Command {
    let mut command = Command::new(program);
    command.arg("rank");
    command.args(["--node", &member.node.0.to_string()]);
    command.args(["--incarnation", &member.incarnation.to_string()]);
    command.args(["--join", &supervisor.to_string(), "--listen", &SocketAddr::new(own, 0).to_string()]);
    command.arg("--state").arg(dir).arg("--settings").arg(settings).arg("--key-file").arg(key);
    // A terminal's interrupt comes from the supervisor alone.
    command.stdin(Stdio::null()).stdout(Stdio::null()).process_group(0);
    command
}

/// A cluster that serves.
struct Cluster {
    head: Head,
    socket: Option<ControlSocket>,
}

impl Cluster {
    /// Waits for its end, and is not asked anything any more.
    fn wait(self) -> anyhow::Result<()> {
        let ended = self.head.wait();
        drop(self.socket);
        Ok(ended?)
    }
}

impl Serving for Cluster {
    fn submit(&self, id: RequestId, body: Body) -> Receiver<StreamEvent> {
        self.head.handle().submit(id, body, 0)
    }

    fn end(self) -> anyhow::Result<()> {
        self.head.handle().drain(None);
        self.wait()
    }

    fn broken_off(self) -> anyhow::Error {
        match self.wait() {
            Ok(()) => anyhow!("drained with unfinished requests"),
            Err(error) => error,
        }
    }
}

/// SIGTERM and SIGINT drain within the bound, the second at once.
fn drain_on_signals(head: HeadHandle, bound: Duration) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot listen for signals")?;
    let listen = move || {
        for (nth, _) in signals.forever().enumerate() {
            let bound = if nth == 0 { bound } else { Duration::ZERO };
            tell!("draining: unfinished requests have {} s; a second signal stops at once", bound.as_secs());
            head.drain(Some(bound));
        }
    };
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(listen)
        .context("cannot start the thread that waits for signals")?;
    Ok(())
}

/// Says what happens to nodes.
fn told(event: &SupervisorEvent) {
    match event {
        SupervisorEvent::Failed(Failure { cause: Cause::Drained, .. }) => {}
        SupervisorEvent::Failed(Failure { member, cause, log, .. }) => {
            let how = cause::in_words(cause);
            tell!("{member} {how}; its log was durable up to record {}", log.last);
        }
        SupervisorEvent::Activated(epoch) => tell!("{epoch} is active"),
        SupervisorEvent::Waiting { nodes, .. } => {
            let nodes: Vec<String> = nodes.iter().map(|node| node.0.to_string()).collect();
            tell!("waiting for the disk of one of nodes {}", nodes.join(", "));
        }
        SupervisorEvent::GaveUp { node, reason } => tell!("{node} is given up: {reason}"),
        SupervisorEvent::Captured { .. }
        | SupervisorEvent::Adopted(_)
        // This program computes with models and trains none.
        | SupervisorEvent::Trained { .. }
        | SupervisorEvent::Sealed { .. }
        | SupervisorEvent::Restored { .. }
        | SupervisorEvent::ShardsMissed { .. }
        | SupervisorEvent::ShardsDiffer { .. }
        | SupervisorEvent::Drained { .. }
        | SupervisorEvent::State { .. } => {}
    }
}
