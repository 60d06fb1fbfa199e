//! Whole replicas over a network that loses, doubles and reorders, with nodes that die: every stream is what one machine
//! would give, every rank folds the same log, and nothing that was told is taken back.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::cluster::membership::{Epoch, Member, Membership, NodeId};
use lite_llm_core::cluster::message::{Message, Tag};
use lite_llm_core::cluster::orders::{Facts, Lease, Orders};
use lite_llm_core::cluster::peer::{Log, Peer, PeerConfig, PeerInput, PeerOutput};
use lite_llm_core::config::{Config, Limits, Placement};
use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::ids::{ExpertKey, Incarnation, RequestId, Seq, Slot};
use lite_llm_core::input::{Body, Fault, Input, RowResult};
use lite_llm_core::journal::{Record, Snapshot};
use lite_llm_core::output::{Forward, Origin, Output};
use lite_llm_core::plan::{Identity, ModelPlan, TierPlan};
use lite_llm_core::replay::fold;
use lite_llm_core::time::Time;
use lite_llm_core::topology::Topology;
use std::collections::{BTreeMap, BTreeSet};

const PROMPT: [u32; 3] = [5, 6, 7];

fn plan() -> ModelPlan {
    ModelPlan {
        format: ModelPlan::FORMAT,
        identity: Identity::default(),
        tiers: vec![TierPlan { name: "all".into(), groups: 1, experts: 4, placement: Placement::Hot }],
        layers: 4,
        moe_layers: vec![0, 1, 3],
        top_k: 2,
        slot_bytes: 100,
        base_shards: vec![50],
        router_bytes: 10,
        overhead_bytes: 40,
        page_positions: 4,
        page_bytes: 20,
        kv_groups: vec![None],
        context: 64,
        vocab: 1000,
        eos: vec![1],
    }
}

/// The next token, from the last and its position: all that the simulated arithmetic knows.
fn next_token(last: u32, position: u32) -> u32 {
    2 + (last * 31 + position * 17) % 900
}

fn reference(len: u32) -> Vec<u32> {
    let mut last = PROMPT[2];
    (0..len)
        .map(|n| {
            last = next_token(last, 3 + n);
            last
        })
        .collect()
}

/// Which experts a step's rows select in a layer.
fn selected(forward: &Forward, layer: u32) -> Vec<ExpertKey> {
    let tokens = forward.rows.iter().flat_map(|row| &row.tokens);
    let experts: BTreeSet<u32> =
        tokens.flat_map(|token| [(token + layer) % 4, (token / 3 + layer) % 4]).collect();
    experts.into_iter().map(|expert| ExpertKey { layer, tier: 0, group: 0, expert }).collect()
}

struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// A step as one rank computes it.
struct Compute {
    forward: Forward,
    /// Mixture layers of the stage that are left.
    layers: Vec<u32>,
    waiting: BTreeSet<ExpertKey>,
    asked: bool,
    provided: Vec<(ExpertKey, Slot)>,
    wave: (u32, u32),
    /// Ranks of the stage before that have handed their results on.
    heard: BTreeSet<u32>,
}

struct Node {
    peer: Peer,
    incarnation: u64,
    records: Vec<Record>,
    durable: usize,
    slots: Vec<Option<ExpertKey>>,
    warm: Vec<Option<ExpertKey>>,
    answers: Vec<Input>,
    compute: Option<Compute>,
    /// Data for a step that this rank has not begun.
    early: Vec<(u32, Tag)>,
}

struct Rig {
    topology: Topology,
    config: Config,
    nodes: Vec<Node>,
    air: Vec<Message>,
    membership: Membership,
    active: bool,
    now: Time,
    dice: Dice,
    told: BTreeMap<u32, u32>,
    finished: bool,
    accepted: bool,
    epochs: u64,
    rewinds: u64,
}

fn settings(topology: Topology, config: &Config, member: Member) -> PeerConfig {
    assert_eq!(config.topology, topology);
    PeerConfig {
        member,
        facts: Facts::default(),
        config: config.clone(),
        torn: true,
        began: Incarnation(1),
        entropy: 1,
        retry_ns: 300,
        unconfirmed_max: 1000,
        drift_per_mille: 10,
    }
}

impl Rig {
    fn new(topology: Topology, seed: u64) -> Self {
        // Every other rig has a warm arena.
        let warm_bytes = seed % 2 * 200;
        let memory_bytes = 100 + 20 * 30 + 100 * 2 + warm_bytes;
        let config = Config {
            memory_bytes,
            warm_bytes,
            topology,
            prefill_chunk: 2,
            snapshot_every: 40,
            // Faults here are many, and none is to end the stream.
            limits: Limits { retries_max: 100, ..Limits::default() },
            ..Config::default()
        };
        let member = |node| Member { node: NodeId(node), incarnation: Incarnation(1) };
        let nodes = (0..topology.ranks()).map(|node| Node {
            peer: Peer::new(settings(topology, &config, member(node)), Log::new(Engine::new(), &[])),
            incarnation: 1,
            records: Vec::new(),
            durable: 0,
            slots: Vec::new(),
            warm: Vec::new(),
            answers: Vec::new(),
            compute: None,
            early: Vec::new(),
        });
        let members = (0..topology.ranks()).map(member).collect();
        Self {
            topology,
            nodes: nodes.collect(),
            config,
            air: Vec::new(),
            membership: Membership { replica: 0, epoch: Epoch(1), members, leader: 0 },
            active: false,
            now: Time(1),
            dice: Dice(seed * 2 + 0x9e37_79b9_7f4a_7c15),
            told: BTreeMap::new(),
            finished: false,
            accepted: false,
            epochs: 1,
            rewinds: 0,
        }
    }

    fn handle(&mut self, node: usize, input: PeerInput) {
        self.nodes[node].peer.handle(self.now, input);
        loop {
            let output = self.nodes[node].peer.poll();
            if matches!(output, PeerOutput::Wait { .. }) {
                return;
            }
            self.obey(node, output);
        }
    }

    fn obey(&mut self, at: usize, output: PeerOutput) {
        let node = &mut self.nodes[at];
        match output {
            PeerOutput::Append(record) => {
                assert_eq!(record.seq, node.records.len() as u64 + 1, "the log is dense");
                node.records.push(record);
            }
            PeerOutput::Send(message) => self.air.push(*message),
            PeerOutput::Tell(output) => self.tell(output),
            PeerOutput::Obey(output) => self.work(at, output),
            PeerOutput::Snapshot(snapshot) => {
                assert!(
                    snapshot.next <= node.peer.committed().0 + 1,
                    "a snapshot holds what is committed only"
                );
                Engine::restore(&snapshot.bytes).unwrap();
                node.answers.push(Input::SnapshotDurable { next: Seq(snapshot.next) });
            }
            PeerOutput::Forget => {
                node.answers.clear();
                node.early.clear();
                node.compute = None;
                node.slots.clear();
                node.warm.clear();
            }
            PeerOutput::ReadLog { from } => {
                let records = node.records[usize::try_from(from.0).unwrap() - 1..].to_vec();
                self.handle_nested(at, PeerInput::Log { snapshot: None, records });
            }
            PeerOutput::Rewind { keep } => {
                self.rewinds += 1;
                let keep = usize::try_from(keep.0).unwrap();
                assert!(keep <= node.records.len());
                node.records.truncate(keep);
                node.durable = keep;
                let mut engine = Engine::new();
                fold(&mut engine, &node.records, |_, _| {}).unwrap();
                let log = node.records.clone();
                self.handle_nested(at, PeerInput::Rewound(Box::new(Log::new(engine, &log))));
            }
            PeerOutput::Install(Snapshot { .. }) => unreachable!("nothing is trimmed here"),
            PeerOutput::Whole => assert!(node.peer.is_in_active_epoch() && !node.peer.beat(Time(0)).torn),
            PeerOutput::Diverged { seq, .. } => panic!("record {seq} diverges"),
            PeerOutput::Data { from, tag, bytes } => {
                assert_eq!(bytes, [7]);
                node.early.push((from, tag));
            }
            PeerOutput::Refused { .. } | PeerOutput::Wait { .. } => {}
        }
    }

    /// Answers of the driver itself come once the outputs are drained.
    fn handle_nested(&mut self, node: usize, input: PeerInput) {
        loop {
            let output = self.nodes[node].peer.poll();
            if matches!(output, PeerOutput::Wait { .. }) {
                break;
            }
            self.obey(node, output);
        }
        self.handle(node, input);
    }

    fn tell(&mut self, output: Output) {
        match output {
            Output::Accepted { .. } => self.accepted = true,
            Output::Token { offset, token, .. } => {
                let known = *self.told.entry(offset).or_insert(token);
                assert_eq!(known, token, "a token never changes");
                assert_eq!(
                    self.told.len() as u32 - 1,
                    *self.told.last_key_value().unwrap().0,
                    "offsets are dense"
                );
            }
            Output::Finish { generated, .. } => {
                assert_eq!(generated as usize, self.told.len(), "the end comes after every token");
                self.finished = true;
            }
            _ => {}
        }
    }

    fn work(&mut self, at: usize, output: Output) {
        let rank = self.nodes[at].peer.rank();
        let node = &mut self.nodes[at];
        match output {
            Output::Reserve { .. } => node.answers.push(Input::Reserved),
            Output::ReadManifest => node.answers.push(Input::ManifestRead { plan: plan().into() }),
            Output::Carve(carving) => {
                node.slots = vec![None; carving.slots as usize];
                node.warm = vec![None; carving.warm_slots as usize];
            }
            Output::LoadBase { shard } => node.answers.push(Input::BaseLoaded { shard }),
            Output::LoadRouters => node.answers.push(Input::RoutersLoaded),
            Output::Load { load, expert, slot, origin, .. } => {
                assert!(node.peer.has_expert(expert), "only its own experts come to a rank");
                let old = node.slots[slot.0 as usize].replace(expert);
                match origin {
                    Origin::Disk { keep: None } => {}
                    Origin::Disk { keep: Some(keep) } => {
                        assert!(old.is_some(), "what is demoted is there");
                        node.warm[keep.0 as usize] = old;
                    }
                    Origin::Warm { slot, exchange } => {
                        assert!(old.is_some() || !exchange, "what is demoted is there");
                        let staged =
                            core::mem::replace(&mut node.warm[slot.0 as usize], old.filter(|_| exchange));
                        assert_eq!(staged, Some(expert), "an expert is where it is promoted from");
                    }
                }
                let fault = (self.dice.below(30) == 0).then(|| Fault::Io("EIO".into()));
                node.answers.push(Input::Loaded { load, fault });
            }
            Output::Stage { load, expert, slot, .. } => {
                assert!(node.peer.has_expert(expert), "only its own experts come to a rank");
                node.warm[slot.0 as usize] = Some(expert);
                let fault = (self.dice.below(30) == 0).then(|| Fault::Io("EIO".into()));
                node.answers.push(Input::Loaded { load, fault });
            }
            Output::Forward(forward) => {
                let layers = self.topology.layers(4, self.topology.seat(rank).pipeline);
                let layers =
                    plan().moe_layers.into_iter().filter(|layer| layers.contains(layer)).rev().collect();
                let resident = forward.resident.iter().flatten();
                for (key, slot) in resident {
                    assert_eq!(node.slots[slot.0 as usize], Some(*key), "a resident expert is there");
                }
                let (waiting, provided) = (BTreeSet::new(), Vec::new());
                node.compute = Some(Compute {
                    forward,
                    layers,
                    waiting,
                    asked: false,
                    provided,
                    wave: (0, 0),
                    heard: BTreeSet::new(),
                });
            }
            Output::Provide { wave, wave_len, expert, slot, step, attempt, .. } => {
                if let Some(compute) = &mut node.compute
                    && (compute.forward.step, compute.forward.attempt) == (step, attempt)
                {
                    assert_eq!(node.slots[slot.0 as usize], Some(expert), "what is provided is there");
                    compute.provided.push((expert, slot));
                    compute.wave = (wave, wave_len);
                }
            }
            Output::Abort { step, attempt }
                if node
                    .compute
                    .take_if(|c| (c.forward.step, c.forward.attempt) == (step, attempt))
                    .is_some() =>
            {
                node.answers.push(Peer::given_up(step, attempt));
            }
            Output::FlushTelemetry => node.answers.push(Input::TelemetryFlushed),
            Output::Release => node.answers.push(Input::ResourcesReleased),
            _ => {}
        }
    }

    /// Goes on with a rank's step.
    fn compute(&mut self, at: usize) {
        let faulty = self.dice.below(60) == 0;
        let node = &mut self.nodes[at];
        let Some(compute) = &mut node.compute else { return };
        let (step, attempt) = (compute.forward.step, compute.forward.attempt);
        if faulty {
            node.compute = None;
            return node.answers.push(Input::Failed { step, attempt, fault: Fault::Device("hiccup".into()) });
        }
        let mine = |tag: &Tag| (tag.step, tag.attempt) == (step, attempt);
        compute.heard.extend(node.early.iter().filter(|(_, tag)| mine(tag)).map(|&(from, _)| from));
        let stage = self.topology.seat(node.peer.rank()).pipeline;
        let topology = self.topology;
        let of =
            |stage: u32| (0..topology.ranks()).filter(move |&rank| topology.seat(rank).pipeline == stage);
        if stage > 0 && of(stage - 1).any(|rank| !compute.heard.contains(&rank)) {
            return;
        }
        if let Some(&layer) = compute.layers.last().filter(|_| compute.forward.resident.is_none()) {
            if !compute.asked {
                compute.asked = true;
                let experts = selected(&compute.forward, layer);
                compute.waiting = experts.iter().copied().filter(|key| node.peer.has_expert(*key)).collect();
                return node.answers.push(Input::Need { step, attempt, layer, experts, foreseen: vec![] });
            }
            let (wave, wave_len) = compute.wave;
            if wave_len > 0 && compute.provided.len() == wave_len as usize {
                for (key, _) in compute.provided.drain(..) {
                    assert!(compute.waiting.remove(&key), "only what is needed is provided");
                }
                compute.wave = (0, 0);
                node.answers.push(Input::Released { step, attempt, layer, wave });
            }
            if compute.waiting.is_empty() {
                compute.layers.pop();
                compute.asked = false;
            }
            return;
        }
        let rows = compute.forward.rows.iter().map(|row| {
            let last = *row.tokens.last().unwrap();
            let end = row.start + row.tokens.len() as u32;
            let token = row.sample.as_ref().map(|_| next_token(last, end));
            RowResult { token, stop: false, digest: Digest::of(&last.to_le_bytes()) }
        });
        let input = Input::Finished { step, attempt, rows: rows.collect(), duration_ns: 5 };
        let next: Vec<u32> = of(stage + 1).collect();
        node.compute = None;
        node.answers.push(input);
        for to in next {
            let tag = Tag { step, attempt, exchange: 0 };
            self.handle(at, PeerInput::Data { to, tag, bytes: vec![7] });
        }
    }

    /// The supervisor says how things stand; it hears that the leader has synced.
    fn orders(&mut self, at: usize) {
        let leader = self.membership.leading().node.0 as usize;
        let beat = self.nodes[leader].peer.beat(self.now);
        self.active |= beat.synced && beat.epoch == self.membership.epoch;
        let member = Member { node: NodeId(at as u32), incarnation: Incarnation(self.nodes[at].incarnation) };
        let lease = (at == leader && self.active).then_some(Lease { sent: self.now, length_ns: 20_000 });
        self.handle(
            at,
            PeerInput::Orders(Box::new(Orders {
                to: member,
                membership: Some(self.membership.clone()),
                active: self.active,
                lease,
                drain: None,
                refused: None,
                shards: None,
            })),
        );
    }

    /// A node dies and comes back with what is durable and some of what is not; a new epoch begins, led by anyone: all
    /// were members of the last active one.
    fn crash(&mut self, at: usize) {
        let node = &mut self.nodes[at];
        let unsynced = (node.records.len() - node.durable) as u64;
        let kept = node.durable + usize::try_from(self.dice.below(unsynced + 1)).unwrap();
        node.records.truncate(kept);
        node.durable = kept;
        node.incarnation += 1;
        let mut engine = Engine::new();
        fold(&mut engine, &node.records, |_, _| {}).unwrap();
        let member = Member { node: NodeId(at as u32), incarnation: Incarnation(node.incarnation) };
        node.peer = Peer::new(settings(self.topology, &self.config, member), Log::new(engine, &node.records));
        node.answers.clear();
        node.early.clear();
        node.compute = None;
        node.slots.clear();
        node.warm.clear();
        self.membership.members[at] = member;
        self.membership.epoch.0 += 1;
        self.membership.leader = u32::try_from(self.dice.below(u64::from(self.topology.ranks()))).unwrap();
        self.active = false;
        self.epochs += 1;
    }

    fn submit(&mut self, tokens: u32) {
        let leader = self.membership.leading().node.0 as usize;
        let body = Body { prompt: PROMPT.to_vec(), max_tokens: tokens, ignore_eos: true, ..Body::default() };
        let input = Input::Submit { id: RequestId::new("r").unwrap(), body: body.into(), from: 0 };
        self.handle(leader, PeerInput::Command(input));
    }

    /// One thing that happens.
    fn act(&mut self, lossy: bool) {
        self.now.0 += 1 + self.dice.below(50);
        let at = usize::try_from(self.dice.below(self.nodes.len() as u64)).unwrap();
        match self.dice.below(10) {
            0..=3 => self.deliver(lossy),
            4 => self.orders(at),
            5 => {
                self.nodes[at].durable = self.nodes[at].records.len();
                let seq = Seq(self.nodes[at].durable as u64);
                self.handle(at, PeerInput::Durable { seq });
            }
            6 | 7 => self.compute(at),
            8 => self.handle(at, PeerInput::Tick),
            _ => {
                if !self.nodes[at].answers.is_empty() {
                    let input = self.nodes[at].answers.remove(0);
                    self.handle(at, PeerInput::Answer(input));
                }
            }
        }
    }

    /// Some messages arrive, or not, or twice.
    fn deliver(&mut self, lossy: bool) {
        for _ in 0..self.air.len().min(32) {
            let among = if lossy { self.air.len().min(20) as u64 } else { 1 };
            let index = usize::try_from(self.dice.below(among)).unwrap();
            let fate = if lossy { self.dice.below(10) } else { 9 };
            let message = if fate == 0 { self.air[index].clone() } else { self.air.remove(index) };
            if fate != 1 {
                let to = message.to.node.0 as usize;
                self.handle(to, PeerInput::Message(Box::new(message)));
            }
        }
    }

    /// What every node holds up to where anybody knows it committed is the same.
    fn check(&self) {
        let committed = self.nodes.iter().map(|node| node.peer.committed().0).max().unwrap();
        let committed = usize::try_from(committed).unwrap();
        for node in &self.nodes {
            assert!(node.records.len() >= committed, "what is committed is on every member");
            assert_eq!(node.records[..committed], self.nodes[0].records[..committed], "there is one log");
        }
    }
}

fn run(topology: Topology, seed: u64, crashes: u64) -> (u64, u64, Digest) {
    let mut rig = Rig::new(topology, seed);
    let tokens = 8;
    for turn in 0..80_000u64 {
        rig.act(turn < 4000);
        if turn % 64 == 0 {
            rig.check();
            rig.submit(tokens);
        }
        if turn < 4000 && rig.dice.below(4000) < crashes {
            let at = usize::try_from(rig.dice.below(rig.nodes.len() as u64)).unwrap();
            rig.crash(at);
        }
        if rig.finished && turn > 4000 {
            break;
        }
    }
    assert!(
        rig.accepted && rig.finished,
        "seed {seed} on {topology:?}: the stream ends, in epoch {}",
        rig.epochs
    );
    assert_eq!(
        rig.told.into_values().collect::<Vec<_>>(),
        reference(tokens),
        "seed {seed}: it is the reference"
    );
    (rig.epochs, rig.rewinds, rig.nodes[0].peer.engine().digest())
}

const TOPOLOGIES: [Topology; 7] = [
    Topology::SINGLE,
    Topology { data: 1, tensor: 2, pipeline: 1, expert: 1 },
    Topology { data: 1, tensor: 1, pipeline: 2, expert: 1 },
    Topology { data: 1, tensor: 1, pipeline: 1, expert: 2 },
    Topology { data: 1, tensor: 2, pipeline: 2, expert: 1 },
    Topology { data: 1, tensor: 1, pipeline: 2, expert: 2 },
    Topology { data: 1, tensor: 1, pipeline: 2, expert: 4 },
];

const SEEDS: u64 = 8;

#[test]
fn every_layout_gives_the_stream_of_one_machine_through_losses_and_deaths() {
    let (mut epochs, mut rewinds) = (0, 0);
    for topology in TOPOLOGIES {
        for seed in 1..=SEEDS {
            let (e, r, _) = run(topology, seed, seed % 4 * 4);
            epochs += e;
            rewinds += r;
        }
    }
    assert!(epochs > 5 * SEEDS && rewinds > 0, "epochs change ({epochs}) and logs are cut ({rewinds})");
}

#[test]
fn the_same_seed_gives_the_same_log() {
    for topology in TOPOLOGIES {
        assert_eq!(run(topology, 77, 8), run(topology, 77, 8));
    }
}

#[test]
fn what_records_bring_about_is_no_progress() {
    let topology = Topology::SINGLE;
    let config = Config { topology, ..Config::default() };
    let member = Member { node: NodeId(0), incarnation: Incarnation(1) };
    let log = Log::new(Engine::new(), &[]);
    let mut peer = Peer::new(settings(topology, &config, member), log);
    let mut progress = |input: Input| {
        peer.handle(Time(1), PeerInput::Answer(input));
        while !matches!(peer.poll(), PeerOutput::Wait { .. }) {}
        peer.beat(Time(1)).progress
    };
    assert_eq!(progress(Input::SnapshotDurable { next: Seq(60) }), 0, "clients alone make records");
    assert_eq!(progress(Input::Persisted { asked: Seq(1), fault: None }), 0);
    assert_eq!(progress(Input::BaseLoaded { shard: 0 }), 1);
}
