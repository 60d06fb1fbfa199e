//! The supervisor against nodes that die, hang, fall silent and keep bad time, and against its own deaths.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::cluster::membership::{Epoch, Member, Membership, NodeId};
use lite_llm_core::cluster::orders::{Activity, Beat, Facts, LogEnd, Orders};
use lite_llm_core::cluster::supervisor::{
    Cause, ClusterConfig, Ending, Patience, Restarts, Standing, Supervisor, SupervisorEvent, SupervisorInput,
    SupervisorOutput,
};
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{Incarnation, Seq};
use lite_llm_core::time::Time;
use lite_llm_core::topology::Topology;
use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Time between two beats.
const BEAT_NS: u64 = 100;
const DRIFT_PER_MILLE: u32 = 20;

struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }

    fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }
}

/// A clock that is off by anything, and runs at its own pace.
struct Clock {
    offset: u64,
    /// In a hundred-thousandth.
    rate: u64,
}

impl Clock {
    fn read(&self, now: u64) -> Time {
        Time(self.offset + (u128::from(now) * u128::from(self.rate) / 100_000) as u64)
    }
}

/// A process.
struct Process {
    incarnation: Incarnation,
    membership: Option<Membership>,
    active: bool,
    lease_until: Time,
    synced: bool,
    progress: u64,
    drained: bool,
    hangs: bool,
    silent_until: u64,
    next_beat: u64,
}

/// A machine: what is on its disk, and its process.
struct Machine {
    clock: Clock,
    log: Seq,
    committed: Seq,
    process: Option<Process>,
    used: BTreeSet<Incarnation>,
    facts: Facts,
}

struct Rig {
    dice: Dice,
    now: u64,
    clock: Clock,
    config: ClusterConfig,
    supervisor: Supervisor,
    incarnation: Incarnation,
    records: Vec<(Time, SupervisorInput)>,
    durable: usize,
    held: VecDeque<(Seq, SupervisorOutput)>,
    until: Option<Time>,
    machines: Vec<Machine>,
    inbox: Vec<SupervisorInput>,
    outbox: Vec<Orders>,
    /// When, whom, and whether it was suspected only.
    kills: Vec<(u64, Member, bool)>,
    /// The last record told of each replica.
    told: BTreeMap<u32, Seq>,
    captured: BTreeSet<Member>,
    events: Vec<SupervisorEvent>,
    exited: Option<Option<String>>,
    faulty: bool,
    deaths: u64,
    false_alarms: u64,
}

fn config(topology: Topology, nodes: u32) -> ClusterConfig {
    ClusterConfig {
        topology,
        nodes,
        lease_ns: 1_000,
        drift_per_mille: DRIFT_PER_MILLE,
        patience: Patience {
            silence_min_ns: 300,
            silence_max_ns: 4_000,
            starting_ns: 3_000,
            loading_ns: 20_000,
            joining_ns: 5_000,
            serving_ns: 2_000,
        },
        restarts: Restarts {
            most: 1000,
            window_ns: 10_000,
            pause_min_ns: 50,
            pause_max_ns: 1_000,
            stable_ns: 3_000,
        },
        ..ClusterConfig::default()
    }
}

impl Rig {
    fn new(config: ClusterConfig, seed: u64) -> Self {
        let mut dice = Dice(seed * 2 + 0x9e37_79b9_7f4a_7c15);
        let mut clock = || {
            // Two clocks drift apart by the stated bound at most.
            let half = u64::from(DRIFT_PER_MILLE) * 100 / 2;
            Clock { offset: dice.below(1 << 40), rate: 100_000 - half / 2 + dice.below(half) }
        };
        let machines = (0..config.nodes).map(|_| Machine {
            clock: clock(),
            log: Seq(0),
            committed: Seq(0),
            process: None,
            used: BTreeSet::new(),
            facts: Facts::default(),
        });
        let machines = machines.collect();
        let clock = clock();
        let mut rig = Self {
            dice,
            now: 1,
            clock,
            config,
            supervisor: Supervisor::new(),
            incarnation: Incarnation(0),
            records: Vec::new(),
            durable: 0,
            held: VecDeque::new(),
            until: None,
            machines,
            inbox: Vec::new(),
            outbox: Vec::new(),
            kills: Vec::new(),
            told: BTreeMap::new(),
            captured: BTreeSet::new(),
            events: Vec::new(),
            exited: None,
            faulty: true,
            deaths: 0,
            false_alarms: 0,
        };
        rig.begin();
        rig
    }

    fn begin(&mut self) {
        self.incarnation.0 += 1;
        let (incarnation, config) = (self.incarnation, self.config.clone());
        self.handle(SupervisorInput::Started { incarnation, config });
    }

    fn handle(&mut self, input: SupervisorInput) {
        let now = self.clock.read(self.now).max(self.supervisor.now());
        let ticked = matches!(input, SupervisorInput::Tick);
        self.records.push((now, input.clone()));
        self.supervisor.handle(now, input);
        loop {
            let output = self.supervisor.poll();
            if let Some(after) = output.after() {
                self.held.push_back((after, output));
            } else if let SupervisorOutput::Wait { until } = output {
                let rings = ticked && until.is_some_and(|until| until <= now);
                assert!(!rings, "an alarm that rang would ring for ever");
                self.until = until;
                return;
            }
        }
    }

    /// Obeys what is durable, whatever came before it.
    fn release(&mut self) {
        let mut waiting = VecDeque::new();
        while let Some((after, output)) = self.held.pop_front() {
            if after.0 <= self.durable as u64 {
                self.obey(output)
            } else {
                waiting.push_back((after, output))
            }
        }
        self.held = waiting;
    }

    fn obey(&mut self, output: SupervisorOutput) {
        match output {
            SupervisorOutput::Orders { orders, .. } => self.outbox.push(*orders),
            SupervisorOutput::Start { member, .. } => {
                let before = Member { incarnation: Incarnation(member.incarnation.0 - 1), ..member };
                let machine = &mut self.machines[member.node.0 as usize];
                if machine.process.as_ref().is_some_and(|process| process.incarnation == member.incarnation) {
                    return;
                }
                assert!(machine.process.is_none(), "{member} is started beside its former life");
                assert!(
                    before.incarnation.0 == 0 || self.captured.contains(&before),
                    "{before} is not recorded"
                );
                if !machine.used.insert(member.incarnation) {
                    // It was started already, and has died unseen.
                    return self.inbox.push(SupervisorInput::Ended { member, ending: Ending::Unknown });
                }
                let slow = if self.faulty && self.dice.chance(100) { 4_000 } else { self.dice.below(200) };
                machine.process = Some(Process {
                    incarnation: member.incarnation,
                    membership: None,
                    active: false,
                    lease_until: Time(0),
                    synced: false,
                    progress: 0,
                    drained: false,
                    hangs: false,
                    silent_until: 0,
                    next_beat: self.now + slow,
                });
            }
            SupervisorOutput::Kill { member, cause, .. } => {
                // A machine that cannot be reached goes on for a while.
                let far = if self.faulty && self.dice.chance(300) { self.dice.below(3_000) } else { 0 };
                let alarm = matches!(cause, Cause::Suspected(_));
                self.kills.push((self.now + far, member, alarm));
            }
            SupervisorOutput::Capture { failure, .. } => {
                let member = failure.member;
                let gone = self.machines[member.node.0 as usize].process.is_none();
                assert!(gone, "{member} is recorded as over while it runs");
                self.captured.insert(member);
                let tail = Ok(Some(self.machines[member.node.0 as usize].log));
                self.inbox.push(SupervisorInput::Captured { member, tail });
            }
            SupervisorOutput::Event { event, .. } => self.events.push(event),
            SupervisorOutput::Exit { error, .. } => self.exited = Some(error),
            SupervisorOutput::Wait { .. } => unreachable!("taken by the caller"),
        }
    }

    /// What nodes do with orders.
    fn hear(&mut self, orders: Orders) {
        let machine = &mut self.machines[orders.to.node.0 as usize];
        let Some(process) = machine.process.as_mut().filter(|p| p.incarnation == orders.to.incarnation)
        else {
            return;
        };
        if orders.refused.is_some() {
            machine.process = None;
            let ending = Ending::Code(1);
            return self.inbox.push(SupervisorInput::Ended { member: orders.to, ending });
        }
        let Some(membership) = orders.membership else { return };
        if process.membership.as_ref().is_none_or(|mine| membership.epoch > mine.epoch) {
            process.membership = Some(membership.clone());
            process.active = false;
            process.synced = false;
            process.lease_until = Time(0);
        }
        if process.membership.as_ref() != Some(&membership) {
            return;
        }
        process.active |= orders.active && (process.synced || membership.leading() != orders.to);
        if let Some(lease) = orders.lease {
            let kept = lease.length_ns * (1000 - u64::from(DRIFT_PER_MILLE)) / 1000;
            process.lease_until = process.lease_until.max(lease.sent.after_ns(kept));
        }
        if orders.drain.is_some() && process.active && membership.leading() == orders.to && !process.drained {
            for member in membership.members {
                if let Some(process) = &mut self.machines[member.node.0 as usize].process
                    && process.incarnation == member.incarnation
                {
                    process.drained = true;
                }
            }
        }
    }

    fn epoch_of(&self, member: Member) -> Epoch {
        let process = self.machines[member.node.0 as usize].process.as_ref();
        let process = process.filter(|process| process.incarnation == member.incarnation && !process.hangs);
        process.and_then(|process| Some(process.membership.as_ref()?.epoch)).unwrap_or_default()
    }

    /// What processes do by themselves.
    fn work(&mut self, at: usize) {
        let id = NodeId(at as u32);
        let Some(process) = &self.machines[at].process else { return };
        if process.hangs {
            return self.maybe_beat(at);
        }
        let me = Member { node: id, incarnation: process.incarnation };
        let Some(membership) = process.membership.clone() else { return self.maybe_beat(at) };
        let together = membership.members.iter().all(|&member| self.epoch_of(member) == membership.epoch);
        let (log, committed) = (self.machines[at].log, self.machines[at].committed);
        let clock = self.machines[at].clock.read(self.now);
        if membership.leading() == me && together {
            let process = self.machines[at].process.as_mut().unwrap();
            process.progress += 1;
            if !process.synced {
                process.synced = true;
                for member in &membership.members {
                    let machine = &mut self.machines[member.node.0 as usize];
                    assert!(
                        machine.committed <= log,
                        "{} leads, and lacks what {member} knows",
                        membership.epoch
                    );
                    machine.log = log;
                }
            } else if process.active {
                let leased = clock < process.lease_until;
                // Everybody has a record more.
                for member in &membership.members {
                    let machine = &mut self.machines[member.node.0 as usize];
                    machine.log.0 = log.0 + 1;
                    machine.committed = log;
                    machine.process.as_mut().unwrap().progress += 1;
                }
                if leased {
                    let told = self.told.entry(membership.replica).or_default();
                    assert!(committed >= *told || log >= *told, "what was told is in the leader's log");
                    *told = log.max(*told);
                }
            }
        }
        let process = self.machines[at].process.as_mut().unwrap();
        if process.drained && self.dice.chance(50) {
            self.machines[at].process = None;
            return self.inbox.push(SupervisorInput::Ended { member: me, ending: Ending::Clean });
        }
        self.maybe_beat(at);
    }

    fn maybe_beat(&mut self, at: usize) {
        let machine = &mut self.machines[at];
        let process = machine.process.as_mut().unwrap();
        if process.next_beat > self.now {
            return;
        }
        process.next_beat = self.now + BEAT_NS + self.dice.below(BEAT_NS / 4);
        if process.silent_until > self.now {
            return;
        }
        let activity = match &process.membership {
            None => Activity::Idle,
            Some(_) if !process.active => Activity::Joining,
            Some(_) => Activity::Serving,
        };
        let beat = Beat {
            member: Member { node: NodeId(at as u32), incarnation: process.incarnation },
            sent: machine.clock.read(self.now),
            facts: machine.facts.clone(),
            log: LogEnd { last: machine.log, digest: Digest::default() },
            torn: false,
            began: Incarnation(1),
            committed: machine.committed,
            epoch: process.membership.as_ref().map(|membership| membership.epoch).unwrap_or_default(),
            synced: process.synced,
            activity,
            progress: process.progress,
            diverged: 0,
            drained: process.drained,
            shards: None,
        };
        self.inbox.push(SupervisorInput::Beat(Box::new(beat)));
    }

    fn kill(&mut self) {
        for (at, member, alarm) in core::mem::take(&mut self.kills) {
            if at > self.now {
                self.kills.push((at, member, alarm));
                continue;
            }
            let machine = &mut self.machines[member.node.0 as usize];
            let process = machine.process.take_if(|process| process.incarnation == member.incarnation);
            let well = process.is_some_and(|process| !process.hangs && process.silent_until <= self.now);
            self.false_alarms += u64::from(well && alarm);
            self.inbox.push(SupervisorInput::Ended { member, ending: Ending::Signal(9) });
        }
    }

    fn misfortune(&mut self) {
        let at = self.dice.below(self.machines.len() as u64) as usize;
        let silence = self.now + self.dice.below(3_000);
        let machine = &mut self.machines[at];
        let Some(process) = &mut machine.process else { return };
        match self.dice.below(3) {
            0 => {
                let member = Member { node: NodeId(at as u32), incarnation: process.incarnation };
                machine.process = None;
                self.deaths += 1;
                if self.dice.chance(700) {
                    self.inbox.push(SupervisorInput::Ended { member, ending: Ending::Signal(11) });
                }
            }
            1 => process.hangs = true,
            _ => process.silent_until = silence,
        }
    }

    /// The supervisor dies: what was not durable is gone, and so is everything that it was about to say.
    fn supervisor_dies(&mut self) {
        let written = self.records.len();
        self.durable += self.dice.below((written - self.durable + 1) as u64) as usize;
        self.records.truncate(self.durable);
        self.held.clear();
        self.inbox.clear();
        let mut folded = Supervisor::new();
        for (time, input) in &self.records {
            folded.handle(*time, input.clone());
            while !matches!(folded.poll(), SupervisorOutput::Wait { .. }) {}
        }
        if self.durable == written {
            assert_eq!(folded.digest(), self.supervisor.digest(), "the fold is the state");
            let restored = Supervisor::restore(&folded.snapshot()).unwrap();
            assert_eq!(restored.state_digest(), self.supervisor.state_digest());
        }
        self.supervisor = folded;
        self.begin();
    }

    /// No two processes of a replica believe to hold a lease.
    fn check_leases(&self) {
        let mut leading: BTreeMap<u32, Member> = BTreeMap::new();
        for (node, machine) in (0..).map(NodeId).zip(&self.machines) {
            let Some(process) = &machine.process else { continue };
            let Some(membership) = &process.membership else { continue };
            if process.active && machine.clock.read(self.now) < process.lease_until {
                let member = Member { node, incarnation: process.incarnation };
                let other = leading.insert(membership.replica, member);
                assert_eq!(other, None, "{member} has a lease, too");
            }
        }
    }

    fn turn(&mut self) {
        self.now += 1 + self.dice.below(12);
        if self.faulty && self.dice.chance(8) {
            self.misfortune();
        }
        if self.faulty && self.dice.chance(3) {
            self.supervisor_dies();
        }
        for at in 0..self.machines.len() {
            self.work(at);
        }
        // Messages come in any order, and some never.
        while !self.inbox.is_empty() && self.dice.chance(800) {
            let at = self.dice.below(self.inbox.len() as u64) as usize;
            let input = self.inbox.swap_remove(at);
            let lost = self.faulty && matches!(input, SupervisorInput::Beat(_)) && self.dice.chance(50);
            if !lost {
                self.handle(input);
            }
        }
        while !self.outbox.is_empty() && self.dice.chance(800) {
            let at = self.dice.below(self.outbox.len() as u64) as usize;
            let orders = self.outbox.swap_remove(at);
            if !self.faulty || !self.dice.chance(50) {
                self.hear(orders);
            }
        }
        if self.until.is_some_and(|until| until <= self.clock.read(self.now)) && self.inbox.is_empty() {
            self.handle(SupervisorInput::Tick);
        }
        if self.dice.chance(600) {
            self.durable = self.records.len();
        }
        self.release();
        self.kill();
        self.check_leases();
    }

    /// Whether every replica has told something since.
    fn tells_more_than(&self, told: &BTreeMap<u32, Seq>) -> bool {
        (0..self.config.topology.data).all(|replica| self.told.get(&replica) > told.get(&replica))
    }

    fn is_serving(&self) -> bool {
        let view = self.supervisor.view();
        let active = view.memberships().filter(|(_, active)| *active).count();
        active == self.config.topology.data as usize
            && view.memberships().all(|(membership, _)| {
                membership
                    .members
                    .iter()
                    .all(|&member| view.nodes().any(|node| node == (member, Standing::Up)))
            })
    }
}

const LAYOUTS: [(Topology, u32); 4] = [
    (Topology::SINGLE, 1),
    (Topology { data: 1, tensor: 2, pipeline: 1, expert: 1 }, 3),
    (Topology { data: 2, tensor: 1, pipeline: 1, expert: 2 }, 4),
    (Topology { data: 2, tensor: 2, pipeline: 1, expert: 1 }, 6),
];

fn seeds() -> u64 {
    std::env::var("SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(60)
}

#[test]
fn whatever_dies_the_cluster_serves_again_and_nothing_told_is_lost() {
    let (mut deaths, mut false_alarms, mut lives) = (0, 0, 0);
    for seed in 0..seeds() {
        for (topology, nodes) in LAYOUTS {
            let mut rig = Rig::new(config(topology, nodes), seed);
            for _ in 0..2_000 {
                rig.turn();
            }
            rig.faulty = false;
            let calm = rig.now;
            // What hangs is found only by and by.
            let told = rig.told.clone();
            while !rig.is_serving() || !rig.tells_more_than(&told) {
                rig.turn();
                assert!(
                    rig.now < calm + 40_000,
                    "seed {seed}: it never serves again: {:?}",
                    rig.supervisor.state()
                );
            }
            rig.handle(SupervisorInput::Drain { bound_ns: None });
            let asked = rig.now;
            while rig.exited.is_none() {
                rig.turn();
                assert!(
                    rig.now < asked + 40_000,
                    "seed {seed}: it never drains: {:?}",
                    rig.supervisor.state()
                );
            }
            assert_eq!(rig.exited, Some(None), "seed {seed}");
            assert!(
                rig.machines.iter().all(|machine| machine.process.is_none()),
                "seed {seed}: nobody is left"
            );
            deaths += rig.deaths;
            false_alarms += rig.false_alarms;
            lives += rig.incarnation.0;
        }
    }
    println!("{deaths} deaths, {false_alarms} false alarms, {lives} lives of supervisors");
    assert!(deaths > 0 && false_alarms > 0 && lives > 0, "{deaths} {false_alarms} {lives}");
}

#[test]
fn the_same_seed_gives_the_same_decisions() {
    let digest = |seed| {
        let mut rig = Rig::new(config(LAYOUTS[3].0, LAYOUTS[3].1), seed);
        for _ in 0..2_000 {
            rig.turn();
        }
        rig.supervisor.digest()
    };
    assert_eq!(digest(5), digest(5));
    assert_ne!(digest(5), digest(6));
}
