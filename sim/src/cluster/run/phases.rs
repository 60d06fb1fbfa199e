//! The phases of a run: safety, while faults strike; liveness, once they have ended; the final checks.

use super::cast::Cast;
use super::{ClusterSetup, Report, panics};
use crate::atlas::Atlas;
use crate::cluster::check;
use crate::cluster::clients::ClientsActor;
use crate::cluster::node::{Common, NodeActor};
use crate::cluster::operator::OperatorActor;
use crate::cluster::supervisor::SupervisorActor;
use crate::cluster::watch::{Violation, Watch};
use crate::decision::Decisions;
use crate::disk::SimDisk;
use crate::mark::Mark;
use crate::model::{self, Setting};
use crate::real::RealModel;
use crate::world::{Setup, World};
use lite_llm_core::LOGIC_VERSION;
use lite_llm_core::cluster::membership::NodeId;
use lite_llm_core::cluster::orders::Facts;
use lite_llm_core::cluster::supervisor::{
    ClusterConfig, Patience, ReplicaStanding, Restarts, Standing, Supervisor, SupervisorInput, Training,
};
use lite_llm_core::config::{Config, Foresight, Limits};
use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::journal::{JournalError, Scanned};
use lite_llm_core::lifecycle::Lifecycle;
use lite_llm_core::output::FinishReason;
use lite_llm_core::plan::ModelPlan;
use std::cell::Cell;
use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::rc::Rc;

const SECOND_NS: u64 = 1_000_000_000;
/// Virtual nanoseconds in which everything accepted has to end once faults have, and in which all has to stop.
const LIVENESS_NS: u64 = 240 * SECOND_NS;
/// How far clocks of the world may drift apart, in thousandths, and what the cluster allows for.
const DRIFT_PER_MILLE: u32 = 10;
const DRIFT_ALLOWED_PER_MILLE: u32 = 25;
/// No run has more events than these, and one for so many virtual nanoseconds of its faults: whoever makes more gets
/// nowhere.
const EVENTS_MAX: u64 = 2_000_000;
const NS_PER_EVENT: u64 = 10_000;
/// Rules about what was told: no log can keep them once it is gone from every disk.
const OF_TOLD: [&str; 4] = ["committed-once", "streams", "generations-fixed", "wishes-once"];
/// Bytes of a sector of a node's disk.
const SECTOR_BYTES: usize = 4096;

/// A cluster that runs.
pub(super) struct Cluster {
    pub(super) setup: ClusterSetup,
    pub(super) world: World<Cast>,
    pub(super) common: Rc<Common>,
    decisions: Decisions,
    excuse: Option<String>,
}

/// Runs a cluster to its end, or to the first thing that is wrong.
#[must_use]
pub fn run(setup: &ClusterSetup) -> Report {
    lived(setup).report()
}

/// The same, and what is on the disk of each node then, or why it cannot be read.
#[must_use]
pub fn run_and_look(setup: &ClusterSetup) -> (Report, Vec<Result<Scanned, JournalError>>) {
    let mut cluster = lived(setup);
    let nodes = cluster.world.actors().iter().filter_map(|actor| match actor {
        Cast::Node(node) => Some(node.look()),
        Cast::Supervisor(_) | Cast::Clients(_) | Cast::Operator(_) => None,
    });
    let journals = nodes.collect();
    (cluster.report(), journals)
}

/// A cluster at its end.
fn lived(setup: &ClusterSetup) -> Cluster {
    let mut cluster = Cluster::new(setup.clone());
    if let Err(panic) = panics::caught(|| cluster.live()) {
        cluster.common.watch.violated(cluster.world.now_ns(), "panic", panic);
    }
    if setup.unrestricted {
        cluster.forgive();
    }
    cluster
}

/// What an engine is configured with: of every size that its model can do with.
fn config(setup: &ClusterSetup, plan: &ModelPlan, decisions: &Decisions) -> Config {
    let draw = |nth: u64, n: u64| decisions.ordinary(20, 0, nth) % n;
    let all = plan.experts(&[0, 1]).count() as u64;
    let least = u64::from(plan.top_k);
    let slots = if draw(0, 5) < 2 { least } else { least + draw(1, all) };
    let warm = draw(2, 2) * (1 + draw(3, 4));
    let pages = u64::from(plan.pages_for(plan.context, 1)) + draw(4, 35);
    Config {
        memory_bytes: plan.base_shards.iter().sum::<u64>()
            + plan.router_bytes
            + plan.overhead_bytes
            + plan.page_bytes * pages
            + plan.slot_bytes * (slots + warm),
        warm_bytes: plan.slot_bytes * warm,
        routing_seed: None,
        tier_set: if draw(5, 2) == 0 { vec![] } else { vec!["small".into()] },
        modes: [("fast", vec!["small"]), ("max", vec!["small", "large"])]
            .map(|(mode, tiers)| (mode.into(), tiers.into_iter().map(Into::into).collect()))
            .into(),
        foresight: [Foresight::Off, Foresight::Paired, Foresight::On, Foresight::On]
            [usize::try_from(draw(9, 4)).unwrap_or(0)],
        prefill_chunk: 1 + u32::try_from(draw(6, 8)).unwrap_or(0),
        snapshot_every: [0, 60, 200, 1000][usize::try_from(draw(7, 4)).unwrap_or(0)],
        topology: setup.topology,
        limits: Limits { retries_max: if draw(8, 4) == 0 { 0 } else { 6 }, ..Limits::default() },
        ..Config::default()
    }
}

impl Cluster {
    fn new(setup: ClusterSetup) -> Self {
        let decisions = match &setup.decisions {
            Some(log) => Decisions::of_log(setup.seed, log),
            None => Decisions::of_seed(setup.seed, &setup.hazards),
        };
        let topology = setup.topology;
        let home = |replica| {
            (0..setup.nodes).filter(move |&n| topology.home(NodeId(n)).is_some_and(|h| h.0 == replica))
        };
        let mut groups: Vec<BTreeSet<u32>> =
            (0..topology.data).map(|replica| home(replica).collect()).collect();
        let supervisor = setup.nodes;
        groups.push(BTreeSet::from([supervisor]));
        let atlas = Atlas::new(groups, setup.unrestricted);
        let mut checkers = check::all(&topology);
        // Any checkpoint of an optimizer may be damaged: the versions before it are as good.
        let vaults = Atlas::new(vec![(0..setup.nodes).collect()], true);
        checkers.push(Box::new(check::ShardsOne::new(&topology, vaults.clone())));
        checkers.extend(setup.checkers.iter().flat_map(|more| more()));
        let watch = Watch::new(checkers);
        let plan = if setup.real { RealModel::get().plan(topology) } else { model::plan() };
        let facts = Facts { contract: 1, logic: LOGIC_VERSION, ..Facts::default() };
        let common = Rc::new(Common {
            config: config(&setup, &plan, &decisions),
            plan,
            real: setup.real,
            facts: facts.clone(),
            drift_per_mille: DRIFT_ALLOWED_PER_MILLE,
            supervisor,
            operator: supervisor + 2,
            installed: (0..setup.nodes).map(|_| Cell::new(LOGIC_VERSION)).collect(),
            watch: watch.clone(),
            atlas: atlas.clone(),
            trains: setup.trains,
        });
        let disk = |node| SimDisk::of_node(node, SECTOR_BYTES, decisions.clone(), atlas.clone());
        let vault =
            |node: u32| SimDisk::of_node(node, SECTOR_BYTES, decisions.clone(), vaults.clone()).second();
        let training = Training { store_every: 1 + decisions.ordinary(21, 0, 2) % 5, until: u64::MAX };
        let cluster = ClusterConfig {
            facts,
            topology,
            nodes: setup.nodes,
            lease_ns: [SECOND_NS / 2, 4 * SECOND_NS]
                [usize::try_from(decisions.ordinary(21, 0, 1) % 2).unwrap_or(0)],
            drift_per_mille: DRIFT_ALLOWED_PER_MILLE,
            patience: Patience {
                silence_min_ns: SECOND_NS / 2,
                silence_max_ns: 3 * SECOND_NS,
                starting_ns: 5 * SECOND_NS,
                loading_ns: 10 * SECOND_NS,
                joining_ns: 5 * SECOND_NS,
                serving_ns: 4 * SECOND_NS,
            },
            restarts: Restarts {
                most: if decisions.ordinary(21, 0, 0).is_multiple_of(4) { 3 } else { 30 },
                pause_max_ns: 2 * SECOND_NS,
                ..Restarts::default()
            },
            training: setup.trains.then_some(training),
        };
        let mut actors: Vec<Cast> = (0..setup.nodes)
            .map(|node| Cast::Node(Box::new(NodeActor::new(node, common.clone(), disk(node), vault(node)))))
            .collect();
        let mut watcher = SupervisorActor::new(cluster, disk(supervisor), watch.clone());
        watcher.set_reopens(true);
        actors.push(Cast::Supervisor(Box::new(watcher)));
        let draw = |purpose, number| decisions.ordinary(30 + purpose, 0, number);
        let clients = ClientsActor::new(&setup.workload, draw, topology.data, setup.nodes, watch);
        actors.push(Cast::Clients(Box::new(clients)));
        actors.push(Cast::Operator(Box::new(OperatorActor::new(common.clone(), setup.nodes))));
        let names = (0..setup.nodes).map(|node| format!("node {node}"));
        let names = names.chain(["supervisor", "clients", "operator"].map(Into::into)).collect();
        let world_setup = Setup { drift_per_mille: DRIFT_PER_MILLE, chronicle: setup.chronicle, names };
        let mut world = World::new(decisions.clone(), world_setup, actors);
        for actor in [supervisor, supervisor + 1, supervisor + 2] {
            world.start(actor, 1);
        }
        Self { setup, world, common, decisions, excuse: None }
    }

    /// All phases.
    fn live(&mut self) {
        self.run_until(self.setup.duration_ns);
        if self.is_violated() {
            return;
        }
        self.mend();
        let (begin, end) = (self.world.now_ns(), self.world.now_ns() + LIVENESS_NS);
        while !self.clients().is_over() || !self.operator().is_answered() {
            if self.is_violated()
                || self.is_late(end, "not every accepted stream has ended, or wish is answered")
            {
                return;
            }
            self.restart_given_up();
            self.run_until(self.world.now_ns() + SECOND_NS / 4);
        }
        // Whatever was on its way when the last stream ended.
        self.run_until(self.world.now_ns().max(begin + 2 * SECOND_NS));
        let (trained, _) = self.shards();
        let trains = |run: &Self| run.setup.trains && run.shards().0 < trained + 2;
        // Who trains may go back meanwhile, and has to serve again.
        while !self.is_whole() || trains(self) {
            let late = if trains(self) { "shards get no further" } else { "not every replica serves" };
            if self.is_violated() || self.is_late(end, late) {
                return;
            }
            self.restart_given_up();
            self.run_until(self.world.now_ns() + SECOND_NS / 4);
        }
        self.check_streams();
        self.drain();
    }

    fn run_until(&mut self, until_ns: u64) {
        while !self.common.watch.is_violated() && self.world.step(until_ns) {
            let most = EVENTS_MAX + self.setup.duration_ns / NS_PER_EVENT;
            if self.world.events() > most {
                let what = format!("{most} things have happened, and there is no end");
                self.common.watch.violated(self.world.now_ns(), "livelock", what);
            }
        }
    }

    fn is_violated(&self) -> bool {
        self.common.watch.is_violated()
    }

    /// Faults end, and the operator takes back what he did.
    fn mend(&mut self) {
        self.world.heal();
        for installed in &self.common.installed {
            installed.set(LOGIC_VERSION);
        }
    }

    /// Whether the time is over; then it is a violation, unless what is needed is really gone.
    fn is_late(&mut self, end_ns: u64, what: &str) -> bool {
        if self.world.now_ns() < end_ns {
            return false;
        }
        self.excuse = self.halted().map(|halted| format!("{halted}; {what}"));
        if self.excuse.is_none() {
            let what = format!("{what}: {}", self.standing());
            self.common.watch.violated(self.world.now_ns(), "liveness", what);
        }
        true
    }

    /// What is told in place of what damage took from all disks is excused.
    fn forgive(&mut self) {
        let violation = self.common.watch.violation();
        let is_of_told = |violation: &Violation| OF_TOLD.contains(&violation.checker.as_str());
        if let Some(violation) = violation.filter(is_of_told)
            && let Some(taken) = self.taken_from_all()
        {
            self.common.watch.forgive();
            self.excuse = Some(format!("{taken}; {violation}"));
        }
    }

    /// How everything stands, for people.
    fn standing(&self) -> String {
        let clients = self.clients().clients().iter().filter(|client| !client.is_over());
        let open: Vec<String> = clients
            .map(|client| {
                format!("{} of replica {}: {} tokens", client.id, client.replica, client.tokens.len())
            })
            .collect();
        let view = self.supervisor().supervisor().map(Supervisor::view);
        let nodes = view.map(|view| view.nodes().collect::<Vec<_>>());
        let memberships = view.map(|view| view.memberships().collect::<Vec<_>>());
        format!("{}; nodes are {nodes:?}, replicas {memberships:?}", open.join(", "))
    }

    pub(super) fn supervisor(&self) -> &SupervisorActor {
        let Cast::Supervisor(supervisor) = &self.world.actors()[self.setup.nodes as usize] else {
            unreachable!("its place")
        };
        supervisor
    }

    fn clients(&self) -> &ClientsActor {
        let Cast::Clients(clients) = &self.world.actors()[self.setup.nodes as usize + 1] else {
            unreachable!("its place")
        };
        clients
    }

    fn operator(&self) -> &OperatorActor {
        let Cast::Operator(operator) = &self.world.actors()[self.setup.nodes as usize + 2] else {
            unreachable!("its place")
        };
        operator
    }

    fn wish(&mut self, wish: SupervisorInput) {
        self.world.act(self.setup.nodes, |actor, cx| {
            if let Cast::Supervisor(supervisor) = actor {
                supervisor.wish(cx, wish);
            }
        });
    }

    /// The operator does what the supervisor asks of him.
    fn restart_given_up(&mut self) {
        for node in self.given_up() {
            self.wish(SupervisorInput::Restart { node });
        }
    }

    fn given_up(&self) -> Vec<NodeId> {
        let nodes =
            self.supervisor().supervisor().into_iter().flat_map(|supervisor| supervisor.view().nodes());
        nodes.filter(|(_, standing)| *standing == Standing::GivenUp).map(|(member, _)| member.node).collect()
    }

    /// The version of the optimizer's shards that all have, and the newest on all disks.
    fn shards(&self) -> (u64, u64) {
        self.supervisor().supervisor().map_or((0, 0), |supervisor| supervisor.view().shards())
    }

    /// The engine of a replica's leader, while it serves.
    fn leader(&self, replica: u32) -> Option<&Engine> {
        let peers = self.world.actors().iter().filter_map(|actor| match actor {
            Cast::Node(node) if node.replica() == Some(replica) => node.peer(),
            _ => None,
        });
        let leaders = peers.filter(|peer| peer.leads() && peer.is_in_active_epoch());
        // Who led before and is not fenced yet does not know it.
        let leader = leaders.max_by_key(|peer| peer.membership().map(|membership| membership.epoch));
        leader.map(lite_llm_core::cluster::peer::Peer::engine)
    }

    /// Whether every replica serves, and no member of it is missing: who has nothing to do does not miss any.
    fn is_whole(&self) -> bool {
        let Some(supervisor) = self.supervisor().supervisor() else { return false };
        let standing = supervisor.view().replicas(supervisor.now()).map(|replica| replica.standing);
        let serves = |replica| {
            self.leader(replica).is_some_and(|engine| engine.view().lifecycle() == Lifecycle::Active)
        };
        self.given_up().is_empty()
            && { standing }.all(|standing| standing == ReplicaStanding::Active)
            && (0..self.setup.topology.data).all(serves)
    }

    /// Every stream is that of its request alone, under the committed generations of its positions.
    fn check_streams(&self) {
        let watch = &self.common.watch;
        for client in self.clients().clients() {
            let Some(finish) = client.finish.as_ref().filter(|_| client.accepted) else { continue };
            let wrong = |what: String| {
                watch.violated(self.world.now_ns(), "streams", format!("{}: {what}", client.id));
            };
            let engine = self.leader(client.replica).expect("every replica serves");
            let Some(stream) = engine.view().stream(&client.id) else {
                return wrong("it was accepted, and is lost".into());
            };
            let names = engine.view().generations();
            let setting_at = |position: u32| {
                let segment = stream.segments.iter().find(|segment| position < segment.until);
                let tiers = segment.and_then(|segment| {
                    let (_, names) =
                        names.iter().find(|(generation, _)| *generation == segment.generation)?;
                    self.common.plan.tier_set(names).ok()
                });
                Setting { tiers: tiers.unwrap_or_default(), ..Setting::default() }
            };
            if stream.tokens != client.tokens {
                return wrong(format!("its client has {:?}, the log {:?}", client.tokens, stream.tokens));
            }
            let len = client.tokens.len();
            let expected = if self.setup.real {
                RealModel::get().reference(&client.body, setting_at, len)
            } else {
                model::reference(&self.common.plan, &client.body, setting_at, len)
            };
            if client.tokens != expected {
                return wrong(format!("its stream is {:?}, alone it is {expected:?}", client.tokens));
            }
            let whole = (49 - client.body.prompt.len()).min(client.body.max_tokens as usize);
            let is_whole = match finish {
                FinishReason::Length => client.tokens.len() == whole,
                FinishReason::Eos => {
                    client.tokens.last().is_some_and(|last| self.common.plan.eos.contains(last))
                }
                FinishReason::Cancelled => {
                    watch.mark(Mark::Cancelled);
                    continue;
                }
                FinishReason::Deadline => {
                    watch.mark(Mark::DeadlineOver);
                    client.body.deadline_ns.is_some()
                }
                FinishReason::Fault(_) => {
                    watch.mark(Mark::FaultEnded);
                    !self.decisions.taken().is_empty()
                }
                FinishReason::Stop => false,
            };
            if !is_whole {
                return wrong(format!("it ended by {finish:?} after {} tokens", client.tokens.len()));
            }
            watch.mark(Mark::Complete);
        }
    }

    /// Everything finishes and stops.
    fn drain(&mut self) {
        let nodes = self.setup.nodes as usize;
        if let Cast::Supervisor(supervisor) = &mut self.world.actors_mut()[nodes] {
            supervisor.set_reopens(false);
        }
        let end = self.world.now_ns() + LIVENESS_NS;
        self.wish(SupervisorInput::Drain { bound_ns: None });
        while self.supervisor().exited().is_none() {
            if self.is_violated() || self.is_late(end, "a drain does not end") {
                return;
            }
            self.run_until(self.world.now_ns() + SECOND_NS / 4);
        }
        if let Some(Some(error)) = self.supervisor().exited() {
            let error = error.clone();
            self.common.watch.violated(
                self.world.now_ns(),
                "liveness",
                format!("the cluster stopped: {error}"),
            );
        }
    }

    fn report(&mut self) -> Report {
        let clients = self.clients().clients();
        let tokens = clients.iter().map(|client| client.tokens.len() as u64).sum();
        let ended = clients.iter().filter(|client| client.finish.is_some()).count() as u64;
        let mut told = String::new();
        for client in clients {
            let _ = writeln!(told, "{:?} {:?} {}", client.tokens, client.finish, client.accepted);
        }
        for (seq, event) in self.supervisor().events() {
            let _ = writeln!(told, "{seq} {event:?}");
        }
        let (events, inputs) = (self.world.events(), self.common.watch.inputs());
        let _ = writeln!(told, "{events} {inputs}");
        Report {
            seed: self.setup.seed,
            digest: Digest::of(told.as_bytes()),
            events,
            inputs,
            virtual_ns: self.world.now_ns(),
            tokens,
            ended,
            marks: self.common.watch.marks(),
            decisions: self.decisions.taken(),
            excuse: self.excuse.take(),
            violation: self.common.watch.violation(),
            chronicle: self.world.chronicle().clone(),
        }
    }
}
