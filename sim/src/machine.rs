//! One machine: an engine with its journal, arenas, cache, loads, compute and clients, all in the hands of a seed.
//!
//! Rules of the faults. A crash keeps every durable record and any number of those that were written but not yet known
//! to be durable; slots, pages, loads and the running step are gone. Loads end in any order, some with an error. A
//! step may fail as a whole. Nothing that has an `after` is seen before that record is durable.

mod arenas;
mod clients;
mod compute;

use crate::model::{self, Setting};
use crate::random::Choice;
use arenas::{Arenas, Load, Path};
use compute::Compute;
use lite_llm_core::config::{Config, Foresight};
use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::event::Event;
use lite_llm_core::ids::{ExpertKey, Generation, Incarnation, RequestId, Seq};
use lite_llm_core::input::{Body, Fault, Input};
use lite_llm_core::journal::Record;
use lite_llm_core::lifecycle::Lifecycle;
use lite_llm_core::output::{FinishReason, Output};
use lite_llm_core::plan::ModelPlan;
use lite_llm_core::replay::{encode_input, fold};
use lite_llm_core::time::Time;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// What a simulation does.
#[derive(Clone, Debug)]
pub struct Scenario {
    /// Everything follows from it.
    pub seed: u64,
    /// Requests that clients submit.
    pub requests: u64,
    /// Choices before the faults stop.
    pub choices: u64,
    /// Crashes in a thousand choices.
    pub crash_per_mille: u64,
    /// Faults in a thousand loads and steps.
    pub fault_per_mille: u64,
    /// Slots of the warm arena.
    pub warm_slots: u64,
}

impl Scenario {
    /// A mix of everything that fits the seed.
    #[must_use]
    pub fn of(seed: u64) -> Self {
        let mut choice = Choice::new(!seed);
        Self {
            seed,
            requests: 1 + choice.below(10),
            choices: 200 + choice.below(1500),
            crash_per_mille: choice.below(3) * 4,
            fault_per_mille: choice.below(3) * 15,
            warm_slots: choice.below(2) * (1 + choice.below(4)),
        }
    }
}

/// What came of a simulation.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Head of the digest chain at the end.
    pub digest: Digest,
    /// Inputs handled, folds apart.
    pub inputs: u64,
    /// Crashes.
    pub crashes: u64,
    /// Tokens that clients got.
    pub tokens: u64,
    /// Streams that ended as asked for.
    pub complete: u64,
    /// TierSet switches committed.
    pub switches: u64,
    /// Modifications committed.
    pub modified: u64,
    /// Blobs retired.
    pub retired: u64,
    /// Requests preempted.
    pub preempted: u64,
    /// Layers that took more than one wave.
    pub waves: u64,
    /// Loads and steps tried again.
    pub retries: u64,
    /// Loads into the warm arena.
    pub staged: u64,
    /// Experts from the warm arena into the hot one.
    pub promoted: u64,
    /// Experts from the hot arena into the warm one.
    pub demoted: u64,
    /// Snapshots restored from.
    pub restored: u64,
}

/// A client's view of a stream.
#[derive(Clone, Debug)]
struct Client {
    body: Body,
    /// Whether it hears from this incarnation.
    connected: bool,
    accepted: bool,
    tokens: Vec<u32>,
    finish: Option<FinishReason>,
}

/// The machine.
pub struct Machine {
    scenario: Scenario,
    choice: Choice,
    plan: ModelPlan,
    config: Config,
    engine: Engine,
    records: Vec<Record>,
    durable: u64,
    snapshots: Vec<(Seq, Vec<u8>)>,
    snapshot_writing: Option<(Seq, Vec<u8>)>,
    held: VecDeque<(Seq, Output)>,
    inbox: VecDeque<Input>,
    arenas: Arenas,
    /// Modified bytes on disk.
    blobs: BTreeSet<Digest>,
    /// Modified bytes on their way there.
    persisting: Option<(Seq, Vec<(ExpertKey, Digest)>)>,
    pages: Vec<[u64; 4]>,
    compute: Option<Compute>,
    clients: BTreeMap<RequestId, Client>,
    /// What the journal says of each generation, and in which record.
    settings: BTreeMap<Generation, (Seq, Setting)>,
    /// Which generation became active in which record.
    entered: Vec<(Seq, Generation)>,
    now: Time,
    faulty: bool,
    stopped: bool,
    report: Report,
}

/// Runs a scenario to its end.
///
/// # Panics
/// At the first violated invariant, with the seed.
#[must_use]
pub fn run(scenario: &Scenario) -> Report {
    run_with(scenario, Choice::new(scenario.seed))
}

/// Runs a scenario whose choices come from elsewhere.
///
/// # Panics
/// At the first violated invariant.
#[must_use]
pub fn run_with(scenario: &Scenario, choice: Choice) -> Report {
    let mut machine = Machine::new(scenario.clone(), choice);
    for _ in 0..scenario.choices {
        machine.act();
    }
    machine.settle();
    machine.report
}

impl Machine {
    fn new(scenario: Scenario, mut choice: Choice) -> Self {
        let plan = model::plan();
        let all = plan.experts(&[0, 1]).count() as u64;
        let fixed = 1900;
        // The smallest arena makes layers go in waves.
        let slots = if choice.chance(400) { 2 } else { 2 + choice.below(all) };
        let pages = u64::from(plan.pages_for(plan.context, 1)) + choice.below(35);
        let config = Config {
            memory_bytes: fixed + plan.page_bytes * pages + 1000 * (slots + scenario.warm_slots),
            warm_bytes: 1000 * scenario.warm_slots,
            routing_seed: None,
            tier_set: if choice.chance(500) { vec![] } else { vec!["small".into()] },
            modes: [("fast", vec!["small"]), ("max", vec!["small", "large"])]
                .map(|(mode, tiers)| (mode.into(), tiers.into_iter().map(Into::into).collect()))
                .into(),
            foresight: [Foresight::Off, Foresight::Paired, Foresight::On][choice.below(3) as usize],
            prefill_chunk: 1 + u32::try_from(choice.below(8)).unwrap_or(0),
            snapshot_every: choice.below(2) * 150,
            ..Config::default()
        };
        let mut machine = Self {
            scenario,
            choice,
            plan,
            config,
            engine: Engine::new(),
            records: Vec::new(),
            durable: 0,
            snapshots: Vec::new(),
            snapshot_writing: None,
            held: VecDeque::new(),
            inbox: VecDeque::new(),
            arenas: Arenas::default(),
            blobs: BTreeSet::new(),
            persisting: None,
            pages: Vec::new(),
            compute: None,
            clients: BTreeMap::new(),
            settings: BTreeMap::new(),
            entered: Vec::new(),
            now: Time(1),
            faulty: true,
            stopped: false,
            report: Report::default(),
        };
        machine.boot(Incarnation(1));
        machine
    }

    fn boot(&mut self, incarnation: Incarnation) {
        let (config, entropy) = (Box::new(self.config.clone()), self.scenario.seed);
        let first = self.engine.next_seq() == Seq(1);
        self.handle(if first {
            Input::Boot { incarnation, config, entropy }
        } else {
            Input::Restarted { incarnation, config, entropy }
        });
    }

    /// One choice of the seed.
    fn act(&mut self) {
        self.now = self.now.after_ns(1 + self.choice.below(1000));
        if self.stopped || (self.faulty && self.choice.chance(self.scenario.crash_per_mille)) {
            return self.crash();
        }
        match self.choice.below(12) {
            0..=2 => self.deliver(),
            3 | 4 => self.end_load(),
            5..=7 => self.step(),
            8 | 9 => self.sync(),
            10 => self.client(),
            _ => self.end_snapshot(),
        }
    }

    /// Everything that can happen without a client, until all streams have ended; then a clean stop.
    fn settle(&mut self) {
        self.faulty = false;
        for _ in 0..200_000 {
            let ready = self.engine.view().lifecycle() == Lifecycle::Active && self.held.is_empty();
            if ready && self.clients.values().all(|client| !client.accepted || client.finish.is_some()) {
                break;
            }
            if self.stopped {
                self.crash();
            }
            self.act_without_client();
        }
        self.attach_all();
        for _ in 0..5_000 {
            self.act_without_client();
        }
        self.check_streams();
        self.handle(Input::Drain { bound_ns: None });
        for _ in 0..5_000 {
            if self.stopped {
                break;
            }
            self.act_without_client();
        }
        let seed = self.scenario.seed;
        assert!(self.stopped, "seed {seed}: a drain ends");
        assert!(
            self.arenas.is_empty() && self.pages.is_empty(),
            "seed {seed}: a clean stop leaves nothing behind"
        );
        assert_eq!(self.engine.view().requests().count(), 0, "seed {seed}: nothing accepted is left");
        self.check_fold();
        self.report.digest = self.engine.digest();
    }

    fn act_without_client(&mut self) {
        self.now = self.now.after_ns(1 + self.choice.below(1000));
        match self.choice.below(5) {
            0 => self.deliver(),
            1 => self.end_load(),
            2 => self.step(),
            3 => self.sync(),
            _ => self.end_snapshot(),
        }
    }

    /// Journals an input, lets the engine handle it, and obeys what comes out.
    fn handle(&mut self, input: Input) {
        let seq = self.engine.next_seq();
        self.records.push(Record {
            seq: seq.0,
            time_ns: self.now.0,
            digest: self.engine.digest().0,
            payload: encode_input(&input),
        });
        self.report.inputs += 1;
        self.engine.handle(self.now, input);
        let mut snapshot = false;
        loop {
            match self.engine.poll() {
                Output::Wait { until, .. } => {
                    assert!(
                        until.is_none_or(|until| until > self.now),
                        "an alarm that has rung would ring for ever"
                    );
                    break;
                }
                Output::Snapshot => snapshot = true,
                output => self.obey(output),
            }
        }
        if snapshot {
            self.snapshot_writing = Some((self.engine.next_seq(), self.engine.snapshot()));
        }
    }

    fn obey(&mut self, output: Output) {
        match output {
            Output::Reserve { .. } => self.inbox.push_back(Input::Reserved),
            Output::ReadManifest => {
                self.inbox.push_back(Input::ManifestRead { plan: Box::new(self.plan.clone()) })
            }
            Output::Carve(carving) => {
                let slots = u64::from(carving.slots + carving.warm_slots);
                let bytes = slots * 1000 + u64::from(carving.pages) * carving.page_bytes + 1900;
                assert!(bytes <= self.config.memory_bytes, "arenas stay within the budget");
                self.arenas = Arenas::of(carving);
                self.pages = vec![[0; 4]; carving.pages as usize];
            }
            Output::LoadBase { shard } => self.inbox.push_back(Input::BaseLoaded { shard }),
            Output::LoadRouters => self.inbox.push_back(Input::RoutersLoaded),
            Output::Load { load, expert, blob, slot, origin } => {
                self.begin_load(Load { load, expert, blob, path: Path::Heat(slot, origin) });
            }
            Output::Stage { load, expert, blob, slot } => {
                self.begin_load(Load { load, expert, blob, path: Path::Stage(slot) });
            }
            Output::Persist { asked, experts } => {
                assert!(self.persisting.is_none(), "one modification at a time");
                self.persisting = Some((asked, experts));
            }
            Output::Forward(forward) => self.begin(forward),
            Output::Provide { step, attempt, wave, wave_len, expert, slot, .. } => {
                let compute = self.compute.as_mut().expect("a step is running");
                assert!(compute.forward.step == step && compute.forward.attempt == attempt, "of this step");
                let blob = self.settings[&compute.forward.generation].1.blobs.get(&expert).copied();
                let content = Some(model::content(expert, blob));
                assert_eq!(self.arenas.hot[slot.0 as usize], content, "what is provided is there");
                (compute.wave, compute.wave_len) = (wave, wave_len);
                compute.provided.push((expert, slot));
            }
            Output::Abort { .. } => self.compute.as_mut().expect("a step is running").aborted = true,
            Output::Event { seq, event } => self.count(seq, &event),
            Output::Ready { after }
            | Output::Accepted { after, .. }
            | Output::Token { after, .. }
            | Output::Finish { after, .. }
            | Output::Refuse { after, .. }
            | Output::Switched { after, .. }
            | Output::Answered { after, .. }
            | Output::Modified { after, .. }
            | Output::Retire { after, .. }
            | Output::Exit { after, .. } => self.held.push_back((after, output)),
            Output::Trim { before } => {
                assert!(self.snapshots.iter().any(|(next, _)| *next >= before), "nothing needed is trimmed");
            }
            Output::FlushTelemetry => self.inbox.push_back(Input::TelemetryFlushed),
            Output::Release => {
                assert!(self.arenas.loads.is_empty() && self.compute.is_none(), "nothing is in use any more");
                self.arenas = Arenas::default();
                self.pages.clear();
                self.inbox.push_back(Input::ResourcesReleased);
            }
            Output::Snapshot | Output::Wait { .. } => unreachable!("taken by the caller"),
        }
    }

    fn count(&mut self, seq: Seq, event: &Event) {
        match event {
            Event::TierSet { generation, tiers } => {
                let blobs = self.active().map_or_else(BTreeMap::new, |setting| setting.blobs.clone());
                self.enter(seq, *generation, Setting { tiers: tiers.clone(), blobs });
            }
            Event::Modified { generation, experts } => {
                let mut setting = self.active().expect("only what is active is modified").clone();
                setting.blobs.extend(experts.iter().copied());
                self.enter(seq, *generation, setting);
            }
            Event::Preempted { .. } => self.report.preempted += 1,
            Event::StepRetried { .. } | Event::LoadRetried { .. } => self.report.retries += 1,
            Event::PhaseDone { .. }
            | Event::Moved { .. }
            | Event::Demoted { .. }
            | Event::SwitchAborted
            | Event::Recovered { .. }
            | Event::State { .. }
            | Event::Compared { .. }
            | Event::StepDone { .. } => {}
        }
    }

    fn active(&self) -> Option<&Setting> {
        self.entered.last().map(|(_, generation)| &self.settings[generation].1)
    }

    fn enter(&mut self, seq: Seq, generation: Generation, setting: Setting) {
        let (_, known) = self.settings.entry(generation).or_insert_with(|| (seq, setting.clone()));
        assert_eq!(*known, setting, "a generation never changes");
        self.entered.push((seq, generation));
    }

    fn deliver(&mut self) {
        if let Some(input) = self.inbox.pop_front() {
            self.handle(input);
        }
        while self.held.front().is_some_and(|(after, _)| after.0 <= self.durable) {
            let (_, output) = self.held.pop_front().expect("it was there");
            self.see(output);
        }
    }

    /// What leaves the machine.
    fn see(&mut self, output: Output) {
        let to = match &output {
            Output::Accepted { id, .. } | Output::Token { id, .. } | Output::Finish { id, .. } => Some(id),
            _ => None,
        };
        if to.is_some_and(|id| !self.clients[id].connected) {
            return;
        }
        match output {
            Output::Accepted { id, .. } => self.clients.get_mut(&id).expect("its client").accepted = true,
            Output::Token { id, offset, token, .. } => {
                let client = self.clients.get_mut(&id).expect("its client");
                match client.tokens.get(offset as usize) {
                    Some(known) => assert_eq!(*known, token, "a token never changes"),
                    None => {
                        assert_eq!(offset as usize, client.tokens.len(), "offsets are dense");
                        client.tokens.push(token);
                        self.report.tokens += 1;
                    }
                }
            }
            Output::Finish { id, reason, generated, .. } => {
                let client = self.clients.get_mut(&id).expect("its client");
                assert_eq!(client.tokens.len(), generated as usize, "the end comes after every token");
                assert!(client.finish.as_ref().is_none_or(|known| *known == reason), "an end never changes");
                client.finish = Some(reason);
            }
            Output::Switched { outcome, .. } => self.report.switches += u64::from(outcome.is_ok()),
            Output::Modified { outcome, .. } => self.report.modified += u64::from(outcome.is_ok()),
            Output::Retire { blob, .. } => {
                self.report.retired += u64::from(self.blobs.remove(&blob));
                self.inbox.push_back(Input::Retired { blob });
            }
            Output::Exit { error, .. } => {
                assert!(error.is_none() || self.faulty, "no exit without a fault: {error:?}");
                self.stopped = true;
            }
            _ => {}
        }
    }

    fn fault(&mut self, what: &str) -> Option<Fault> {
        (self.faulty && self.choice.chance(self.scenario.fault_per_mille)).then(|| Fault::Io(what.into()))
    }

    fn sync(&mut self) {
        self.durable = self.records.len() as u64;
    }

    /// The disk says that modified bytes are durable, or full.
    fn end_persist(&mut self) {
        let Some((asked, experts)) = self.persisting.take() else { return };
        let fault = self.fault("disk full");
        if fault.is_none() {
            self.blobs.extend(experts.iter().map(|&(_, blob)| blob));
        }
        self.handle(Input::Persisted { asked, fault });
    }

    fn end_snapshot(&mut self) {
        self.end_persist();
        if let Some((next, bytes)) = self.snapshot_writing.take() {
            self.sync();
            self.snapshots.push((next, bytes));
            self.handle(Input::SnapshotDurable { next });
        }
    }

    /// The process dies; another takes its place.
    fn crash(&mut self) {
        self.report.crashes += 1;
        let before = (self.engine.digest(), self.engine.state_digest());
        let written = self.records.len() as u64;
        let kept = self.durable + self.choice.below(written - self.durable + 1);
        let whole = kept == written;
        self.records.truncate(usize::try_from(kept).expect("a short journal"));
        self.durable = kept;
        self.settings.retain(|_, (seq, _)| seq.0 <= kept);
        self.entered.retain(|(seq, _)| seq.0 <= kept);
        self.persisting = None;
        self.snapshot_writing = None;
        self.held.clear();
        self.inbox.clear();
        self.arenas.loads.clear();
        self.compute = None;
        self.stopped = false;
        self.engine = self.fold();
        if whole {
            let after = (self.engine.digest(), self.engine.state_digest());
            assert_eq!(before, after, "seed {}: the fold is the state", self.scenario.seed);
        }
        let incarnation = Incarnation(self.engine.view().incarnation().0 + 1);
        self.now = Time(self.now.0.max(self.engine.now().0));
        self.boot(incarnation);
        for (id, client) in &mut self.clients {
            client.connected = false;
            let known = self.engine.view().stream(id).is_some();
            assert!(known || !client.accepted, "seed {}: {id} was accepted and is lost", self.scenario.seed);
        }
        self.attach_all();
    }

    /// From the newest snapshot, if there is one; the fold of the whole journal must give the same.
    fn fold(&mut self) -> Engine {
        let mut whole = Engine::new();
        fold(&mut whole, &self.records, |_, _| {}).expect("a good journal folds");
        if let Some((next, bytes)) = self.snapshots.iter().rev().find(|(next, _)| next.0 <= self.durable + 1)
        {
            let mut engine = Engine::restore(bytes).expect("a good snapshot");
            let tail = &self.records[usize::try_from(next.0 - 1).expect("a short journal")..];
            fold(&mut engine, tail, |_, _| {}).expect("a good journal folds");
            assert_eq!(engine.digest(), whole.digest(), "a snapshot and its tail are the journal");
            assert_eq!(
                engine.state_digest(),
                whole.state_digest(),
                "a snapshot and its tail are the journal"
            );
            self.report.restored += 1;
            return engine;
        }
        whole
    }

    fn check_fold(&mut self) {
        let folded = self.fold();
        assert_eq!(folded.state_digest(), self.engine.state_digest(), "the journal is the state");
    }
}
