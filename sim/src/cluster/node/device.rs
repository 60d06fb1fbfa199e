//! The device of a simulated node: arenas, pages, copies that end in any order, and one step at a time.

use super::job::Job;
use super::work::{Step, Work, share_of};
use crate::cluster::luck::Luck;
use crate::cluster::message::Said;
use crate::cluster::watch::Watch;
use crate::hazard::Hazard;
use crate::mark::Mark;
use crate::model;
use crate::real::{Memory, Rank, RealModel};
use crate::world::Context;
use lite_llm_core::cluster::message::Tag;
use lite_llm_core::cluster::peer::{Peer, PeerInput};
use lite_llm_core::ids::{ExpertKey, LoadId, Slot};
use lite_llm_core::input::{Fault, Input};
use lite_llm_core::output::{Carving, Forward, Origin, Output};
use lite_llm_core::plan::ModelPlan;
use lite_llm_core::plant::{self, Bug};
use lite_llm_core::topology::Topology;
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

/// Nanoseconds of a copy and of a step, at least and by how much more; how much later a late copy and a slow step are.
const COPY_NS: (u64, u64) = (80_000, 200_000);
const STEP_NS: (u64, u64) = (300_000, 400_000);
const LATE_NS: u64 = 100_000_000;
const SLOW_NS: u64 = 1_000_000_000;
/// Data for steps to come that are kept at most.
const EARLY_MAX: usize = 4096;

/// What a device needs of its node.
pub(super) struct Bench<'a, 'b> {
    pub(super) cx: &'a mut Context<'b, Said>,
    pub(super) luck: &'a mut Luck,
    pub(super) watch: &'a Watch,
    pub(super) plan: &'a ModelPlan,
    pub(super) inbox: &'a mut VecDeque<PeerInput>,
}

impl Bench<'_, '_> {
    fn befalls(&mut self, hazard: Hazard) -> Option<u64> {
        self.luck.befalls(self.cx, hazard)
    }

    fn answer(&mut self, input: Input) {
        self.inbox.push_back(PeerInput::Answer(input));
    }

    fn violated(&self, what: String) {
        self.watch.violated(self.cx.world_ns(), "memory", what);
    }

    /// A number of this actor that is no fault.
    fn ordinary(&self, purpose: u64, nth: u64) -> u64 {
        self.cx.decisions().ordinary(purpose, u64::from(self.cx.me()), nth)
    }
}

/// A copy under way.
#[derive(Clone, Copy, Debug)]
struct Copy {
    load: LoadId,
    expert: ExpertKey,
    path: Path,
}

#[derive(Clone, Copy, Debug)]
enum Path {
    Stage(Slot),
    Heat(Slot, Origin),
}

impl Copy {
    const fn hot(&self) -> Option<Slot> {
        if let Path::Heat(slot, _) = self.path { Some(slot) } else { None }
    }

    const fn warm(&self) -> Option<Slot> {
        match self.path {
            Path::Stage(slot) | Path::Heat(_, Origin::Warm { slot, .. }) => Some(slot),
            Path::Heat(_, Origin::Disk { keep }) => keep,
        }
    }
}

/// What dies with the process and its device.
pub(super) struct Device {
    topology: Topology,
    rank: u32,
    hot: Vec<Option<u64>>,
    warm: Vec<Option<u64>>,
    pages: Vec<[u64; 4]>,
    copies: BTreeMap<u64, Copy>,
    copied: u64,
    work: Option<Job>,
    /// The model, if the arithmetic is real, and what it computes in.
    real: Option<Arc<Rank>>,
    memory: Option<Memory>,
    steps: u64,
    /// The wake that lets the step begin has come.
    running: bool,
    early: VecDeque<(u32, Tag, Vec<u8>)>,
}

/// What a wake of the device is for.
#[derive(Clone, Copy, Debug)]
pub(super) enum Rung {
    /// A copy has ended.
    Copied(u64),
    /// A step begins to have results.
    Begun(u64),
}

impl std::fmt::Debug for Device {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Device").field("rank", &self.rank).field("work", &self.work).finish_non_exhaustive()
    }
}

impl Device {
    pub(super) fn new(topology: Topology, rank: u32, real: bool) -> Self {
        Self {
            real: real.then(|| RealModel::get().rank(topology, rank)),
            memory: None,
            topology,
            rank,
            hot: Vec::new(),
            warm: Vec::new(),
            pages: Vec::new(),
            copies: BTreeMap::new(),
            copied: 0,
            work: None,
            steps: 0,
            running: false,
            early: VecDeque::new(),
        }
    }

    /// A new epoch: all that was volatile is gone, and nothing that was under way comes back.
    pub(super) fn forget(&mut self, rank: u32) {
        let (copied, steps) = (self.copied, self.steps);
        *self = Self { copied, steps, ..Self::new(self.topology, rank, self.real.is_some()) };
    }

    /// What it holds.
    pub(super) fn held(&self) -> usize {
        self.hot.len()
            + self.warm.len()
            + self.pages.len()
            + self.copies.len()
            + usize::from(self.work.is_some())
    }

    /// What waits here.
    pub(super) fn queued(&self) -> usize {
        self.copies.len() + self.early.len()
    }

    /// Obeys an output; whether the device is lost.
    pub(super) fn obey(&mut self, bench: &mut Bench<'_, '_>, output: Output) {
        match output {
            Output::Reserve { .. } => {
                let fault = Fault::Resource("memory for the arenas cannot be had".into());
                let fails = bench.befalls(Hazard::AllocationFails).is_some();
                self.boot(bench, fails.then_some(fault), Input::Reserved);
            }
            Output::ReadManifest => {
                let damaged = bench.befalls(Hazard::DamagedManifest).is_some();
                let other = bench.befalls(Hazard::OtherManifest).is_some();
                let plan = ModelPlan { format: ModelPlan::FORMAT + u32::from(other), ..bench.plan.clone() };
                let fault = damaged.then(|| Fault::Checkpoint("the manifest cannot be read".into()));
                self.boot(bench, fault, Input::ManifestRead { plan: plan.into() });
            }
            Output::Carve(carving) => self.carve(bench, carving),
            Output::LoadBase { shard } => {
                let fault = shard_fault(bench);
                self.boot(bench, fault, Input::BaseLoaded { shard });
            }
            Output::LoadRouters => {
                let fault = shard_fault(bench);
                self.boot(bench, fault, Input::RoutersLoaded);
            }
            Output::Load { load, expert, slot, origin, .. } => {
                self.copy(bench, Copy { load, expert, path: Path::Heat(slot, origin) });
            }
            Output::Stage { load, expert, slot, .. } => {
                self.copy(bench, Copy { load, expert, path: Path::Stage(slot) });
            }
            Output::Forward(forward) => self.begin(bench, forward),
            Output::Provide { step, attempt, wave, wave_len, expert, slot, .. } => {
                let Some(work) = self.work.as_mut().filter(|work| work.id() == (step, attempt)) else {
                    return;
                };
                if wave > 0 {
                    bench.watch.mark(Mark::Waves);
                }
                if !work.forward().tiers.contains(&expert.tier) {
                    bench.violated(format!("{expert:?} of a masked tier is provided to step {step}"));
                }
                work.provide(wave, wave_len, expert, slot);
                self.check_there(bench, expert, slot);
                self.go_on(bench);
            }
            Output::Abort { step, attempt } => {
                if self.work.take_if(|work| work.id() == (step, attempt)).is_some() {
                    bench.watch.mark(Mark::StepAborted);
                    bench.answer(Peer::given_up(step, attempt));
                }
            }
            Output::FlushTelemetry => bench.answer(Input::TelemetryFlushed),
            Output::Release => {
                if !self.copies.is_empty() || self.work.is_some() {
                    bench.violated("arenas are released while in use".into());
                }
                self.forget(self.rank);
                bench.answer(Input::ResourcesReleased);
            }
            Output::Persist { asked, .. } => bench.answer(Input::Persisted { asked, fault: None }),
            Output::Retire { blob, .. } => bench.answer(Input::Retired { blob }),
            Output::Event { .. } | Output::Trim { .. } | Output::Exit { .. } => {}
            Output::Ready { .. }
            | Output::Accepted { .. }
            | Output::Token { .. }
            | Output::Finish { .. }
            | Output::Refuse { .. }
            | Output::Switched { .. }
            | Output::Answered { .. }
            | Output::Modified { .. }
            | Output::Snapshot
            | Output::Wait { .. } => unreachable!("clients are told, and the rest is taken by the rank"),
        }
    }

    fn boot(&self, bench: &mut Bench<'_, '_>, fault: Option<Fault>, done: Input) {
        if fault.is_some() {
            bench.watch.mark(Mark::BootFailed);
        }
        bench.answer(fault.map_or(done, |fault| Input::BootFailed { fault }));
    }

    fn carve(&mut self, bench: &Bench<'_, '_>, carving: Carving) {
        if !self.hot.is_empty() {
            bench.violated("arenas are laid out twice".into());
        }
        self.hot = vec![None; carving.slots as usize];
        self.warm = vec![None; carving.warm_slots as usize];
        self.pages = vec![[0; 4]; carving.pages as usize];
        self.memory = self.real.as_ref().map(|rank| rank.memory(carving.pages));
    }

    /// What a slot holds once an expert of this rank is in it.
    fn content(&self, key: ExpertKey) -> u64 {
        share_of(&self.topology, self.rank, model::content(key, None))
    }

    fn copy(&mut self, bench: &mut Bench<'_, '_>, copy: Copy) {
        let in_use = |slot: Slot| {
            let work = self.work.iter();
            let resident = work.clone().flat_map(|work| work.forward().resident.iter().flatten());
            let mut slots = resident.chain(work.flat_map(Job::provided)).map(|&(_, slot)| slot);
            slots.any(|used| used == slot) || self.copies.values().any(|other| other.hot() == Some(slot))
        };
        if copy.hot().is_some_and(in_use) {
            bench.violated(format!("{copy:?} overwrites a slot that is in use"));
        }
        if copy.warm().is_some_and(|slot| self.copies.values().any(|other| other.warm() == Some(slot))) {
            bench.violated(format!("{copy:?} and another use one warm slot"));
        }
        let late = bench.befalls(Hazard::LateCopy).map_or(0, |value| value % LATE_NS);
        let ns = COPY_NS.0 + bench.ordinary(1, self.copied) % COPY_NS.1 + late;
        bench.cx.wake_in(ns, super::token(Rung::Copied(self.copied)));
        self.copies.insert(self.copied, copy);
        self.copied += 1;
    }

    pub(super) fn rung(&mut self, bench: &mut Bench<'_, '_>, rung: Rung) {
        match rung {
            Rung::Copied(number) => {
                if let Some(copy) = self.copies.remove(&number) {
                    self.copied(bench, copy);
                }
            }
            Rung::Begun(number) if number == self.steps && self.work.is_some() => {
                self.running = true;
                self.go_on(bench);
            }
            Rung::Begun(_) => {}
        }
    }

    /// A copy has ended: its bytes are verified, and if they are wrong or missing there may be anything in its slots.
    fn copied(&mut self, bench: &mut Bench<'_, '_>, copy: Copy) {
        let Copy { load, expert, path } = copy;
        let expected = self.content(expert);
        let from_disk = matches!(path, Path::Stage(_) | Path::Heat(_, Origin::Disk { .. }));
        let mut fault = bench.befalls(Hazard::FailedCopy).map(|_| Fault::Io("the copy failed".into()));
        if from_disk && fault.is_none() {
            fault = shard_fault(bench);
        }
        let wrong = bench.befalls(Hazard::WrongCopy);
        let found = match (&fault, wrong) {
            (Some(_), _) => None,
            (None, Some(bit)) => Some(expected ^ 1 << (bit % 64)),
            (None, None) => Some(expected),
        };
        if found.is_some_and(|found| found != expected) && !plant::is(Bug::CopyUnverified) {
            bench.watch.mark(Mark::WrongBytes);
            fault = Some(Fault::Corrupt("the copy has not its checksum".into()));
        }
        match path {
            Path::Stage(slot) => {
                bench.watch.mark(Mark::Staged);
                self.warm[slot.0 as usize] = found;
            }
            Path::Heat(slot, origin) => {
                let old = core::mem::replace(&mut self.hot[slot.0 as usize], found);
                let keep = match origin {
                    Origin::Disk { keep } => keep,
                    Origin::Warm { slot, exchange } => {
                        bench.watch.mark(Mark::Promoted);
                        if self.warm[slot.0 as usize].take() != Some(expected) {
                            bench.violated(format!("{expert:?} is not where it is promoted from"));
                        }
                        exchange.then_some(slot)
                    }
                };
                if let Some(slot) = keep {
                    bench.watch.mark(Mark::Demoted);
                    if old.is_none() {
                        bench.violated(format!("what is demoted for {expert:?} is not there"));
                    }
                    self.warm[slot.0 as usize] = old.filter(|_| fault.is_none());
                }
            }
        }
        if fault.is_some() {
            bench.watch.mark(Mark::LoadRetried);
        }
        bench.answer(Input::Loaded { load, fault });
    }

    fn begin(&mut self, bench: &mut Bench<'_, '_>, forward: Forward) {
        if self.work.is_some() {
            bench.violated(format!("step {} begins while another runs", forward.step));
        }
        if forward.attempt > 0 {
            bench.watch.mark(Mark::StepRetried);
        }
        for &(key, slot) in forward.resident.iter().flatten() {
            self.check_there(bench, key, slot);
        }
        let slow = bench.befalls(Hazard::SlowDevice).map_or(0, |value| value % SLOW_NS);
        self.steps += 1;
        let ns = STEP_NS.0 + bench.ordinary(2, self.steps) % STEP_NS.1 + slow;
        self.work = Some(match (&self.real, &self.memory) {
            (Some(rank), Some(memory)) => Job::real(rank, memory, forward),
            _ => {
                let (rows, tiers) = (forward.rows.iter(), &forward.tiers);
                let states = rows.map(|row| model::row(&mut self.pages, row, tiers)).collect();
                Job::Digest(Work::new(self.topology, bench.plan, self.rank, forward, states))
            }
        });
        self.running = false;
        if bench.befalls(Hazard::DeviceHang).is_none() {
            bench.cx.wake_in(ns, super::token(Rung::Begun(self.steps)));
        }
    }

    fn check_there(&self, bench: &Bench<'_, '_>, key: ExpertKey, slot: Slot) {
        if self.hot[slot.0 as usize] != Some(self.content(key)) {
            bench.violated(format!("{key:?} is not in slot {}", slot.0));
        }
    }

    /// Data of another rank.
    pub(super) fn hear(&mut self, bench: &mut Bench<'_, '_>, from: u32, tag: Tag, bytes: Vec<u8>) {
        self.early.push_back((from, tag, bytes));
        if self.early.len() > EARLY_MAX {
            self.early.pop_front();
        }
        self.go_on(bench);
    }

    /// Lets the arithmetic go on as far as it can.
    fn go_on(&mut self, bench: &mut Bench<'_, '_>) {
        while self.running {
            let Some(work) = &mut self.work else { return };
            let (step, attempt) = work.id();
            // What an exchange waits for may have come before this rank was there.
            self.early.retain(|(from, tag, bytes)| {
                let mine = (tag.step, tag.attempt) == (step, attempt);
                let over = (tag.step, tag.attempt) < (step, attempt);
                !(over || mine && work.hear(*from, *tag, bytes))
            });
            let (hot, topology, rank) = (&self.hot, self.topology, self.rank);
            let read = |_, slot: Slot| hot[slot.0 as usize].unwrap_or(0);
            let holds = |key: ExpertKey| holds(&topology, bench.plan, rank, key);
            match work.go_on(bench.plan, read, holds) {
                Step::Wait => return,
                Step::Need(layer, experts, foreseen) => {
                    bench.answer(Input::Need { step, attempt, layer, experts, foreseen });
                }
                Step::Released(layer, wave) => bench.answer(Input::Released { step, attempt, layer, wave }),
                Step::Send(sends) => {
                    for (to, tag, bytes) in sends {
                        bench.inbox.push_back(PeerInput::Data { to, tag, bytes });
                    }
                }
                Step::Finished(rows) => {
                    self.work = None;
                    let fault = bench.befalls(Hazard::DeviceError);
                    bench.answer(match fault {
                        None => {
                            let duration_ns = 500 + bench.ordinary(3, self.steps) % 1000;
                            Input::Finished { step, attempt, rows, duration_ns }
                        }
                        Some(_) => {
                            let fault = Fault::Device("an uncorrectable error".into());
                            Input::Failed { step, attempt, fault }
                        }
                    });
                }
            }
        }
    }
}

/// Whether an expert, or a share of it, is a rank's: the definition, not the core's word.
fn holds(topology: &Topology, plan: &ModelPlan, rank: u32, key: ExpertKey) -> bool {
    let seat = topology.seat(rank);
    topology.layers(plan.layers, seat.pipeline).contains(&key.layer)
        && topology.experts(plan.experts_of_layer(), seat.expert).contains(&plan.ordinal(key))
}

/// What is wrong with a shard, if anything.
fn shard_fault(bench: &mut Bench<'_, '_>) -> Option<Fault> {
    let faults = [
        (Hazard::CorruptShard, Fault::Corrupt("a shard has not its checksum".into())),
        (Hazard::TruncatedShard, Fault::Checkpoint("a shard is too short".into())),
        (Hazard::StaleShard, Fault::Checkpoint("a shard is of another version".into())),
        (Hazard::MissingShard, Fault::Io("a shard is not there".into())),
    ];
    faults.into_iter().find_map(|(hazard, fault)| bench.befalls(hazard).map(|_| fault))
}
