//! Shards of an optimizer over a supervisor and the keepers of its nodes: who lost one gets it from whoever has it; if nobody
//! has it all go back to the newest checkpoint of which everything is there; and never further while a disk is not read.

mod beats;

use lite_llm_core::cluster::membership::{Member, NodeId};
use lite_llm_core::cluster::shards::{
    Keeper, KeeperInput, KeeperOutput, ShardMessage, ShardOrders, ShardWord, Stamp, Want,
};
use lite_llm_core::cluster::supervisor::{
    Cause, ClusterConfig, Ending, Restarts, Supervisor, SupervisorEvent, SupervisorInput, SupervisorOutput,
    Training,
};
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::Incarnation;
use lite_llm_core::time::Time;
use lite_llm_core::topology::Topology;
use proptest::prelude::*;
use std::collections::{BTreeMap, VecDeque};

const SECOND: u64 = 1_000_000_000;
/// Bytes of a shard that one message carries; a shard has twice as many and one.
const PART: usize = 3;

type Copies = BTreeMap<Stamp, Vec<u8>>;

/// A node: what it has on disk outlives it.
#[derive(Default)]
struct Node {
    life: u64,
    keeper: Option<Keeper>,
    memory: Copies,
    staging: Vec<u8>,
    disk: Copies,
    /// What it computes is not what others do.
    strange: bool,
    /// It gives others bytes that are not those it has.
    lies: bool,
    /// It says what it has, but not that it has obeyed anything.
    behind: bool,
    /// Its process is not started again.
    gone: bool,
}

/// Two replicas of two ranks, and a stand-by.
struct Cluster {
    supervisor: Supervisor,
    now: Time,
    nodes: Vec<Node>,
    wires: VecDeque<ShardMessage>,
    events: Vec<SupervisorEvent>,
}

fn config() -> ClusterConfig {
    ClusterConfig {
        topology: Topology { data: 2, tensor: 2, ..Topology::SINGLE },
        nodes: 5,
        restarts: Restarts { most: 1000, pause_max_ns: SECOND, ..Restarts::default() },
        training: Some(Training { store_every: 4, until: u64::MAX }),
        ..ClusterConfig::default()
    }
}

/// The bytes of a shard in a version, by the rule that every rank computes by.
fn bytes_of(shard: u32, version: u64) -> Vec<u8> {
    let first = [shard.to_le_bytes().as_slice(), b"abc"].concat();
    (0..version).fold(first, |bytes, _| next(&bytes))
}

fn next(bytes: &[u8]) -> Vec<u8> {
    bytes.iter().map(|byte| byte.wrapping_mul(5).wrapping_add(1)).collect()
}

fn stamp_of(shard: u32, version: u64) -> Stamp {
    Stamp { shard, version, digest: Digest::of(&bytes_of(shard, version)) }
}

impl Node {
    const fn member(&self, node: u32) -> Member {
        Member { node: NodeId(node), incarnation: Incarnation(self.life) }
    }

    fn die(&mut self) {
        self.keeper = None;
        self.memory.clear();
        self.staging.clear();
    }

    fn make(&mut self, shard: u32, version: u64, bytes: Vec<u8>) -> KeeperInput {
        let stamp = Stamp { shard, version, digest: Digest::of(&bytes) };
        self.memory.insert(stamp, bytes);
        KeeperInput::Made(stamp)
    }
}

impl Cluster {
    fn new(config: ClusterConfig) -> Self {
        let nodes = (0..config.nodes).map(|_| Node::default()).collect();
        let (wires, events) = (VecDeque::new(), Vec::new());
        let mut cluster = Self { supervisor: Supervisor::new(), now: Time(SECOND), nodes, wires, events };
        cluster.give(SupervisorInput::Started { incarnation: Incarnation(1), config });
        cluster
    }

    fn give(&mut self, input: SupervisorInput) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            self.now = self.now.after_ns(1);
            self.supervisor.handle(self.now, input);
            loop {
                match self.supervisor.poll() {
                    SupervisorOutput::Wait { .. } => break,
                    SupervisorOutput::Start { member, .. } => self.start(member),
                    SupervisorOutput::Kill { member, .. } => {
                        self.nodes[member.node.0 as usize].die();
                        inputs.push_back(SupervisorInput::Ended { member, ending: Ending::Signal(9) });
                    }
                    SupervisorOutput::Capture { failure, .. } => {
                        inputs.push_back(SupervisorInput::Captured { member: failure.member, tail: Ok(None) })
                    }
                    SupervisorOutput::Orders { orders, .. } => {
                        if let Some(shards) = orders.shards {
                            self.keep(orders.to.node.0, KeeperInput::Orders(*shards));
                        }
                    }
                    SupervisorOutput::Event { event, .. } => self.events.push(event),
                    SupervisorOutput::Exit { error, .. } => panic!("{error:?}"),
                }
            }
        }
    }

    fn start(&mut self, member: Member) {
        let node = &mut self.nodes[member.node.0 as usize];
        node.life = member.incarnation.0;
        if node.gone {
            return;
        }
        node.keeper = Some(Keeper::new(member, SECOND / 50));
        let whole =
            |(stamp, bytes): (&Stamp, &Vec<u8>)| (Digest::of(bytes) == stamp.digest).then_some(*stamp);
        let found = node.disk.iter().filter_map(whole).collect();
        self.keep(member.node.0, KeeperInput::Found(found));
    }

    fn keep(&mut self, at: u32, input: KeeperInput) {
        let mut inputs = VecDeque::from([input]);
        while let Some(input) = inputs.pop_front() {
            let node = &mut self.nodes[at as usize];
            let Some(keeper) = &mut node.keeper else { return };
            keeper.handle(self.now, input);
            loop {
                let node = &mut self.nodes[at as usize];
                let output = node.keeper.as_mut().expect("it lives").poll();
                match output {
                    KeeperOutput::Wait { .. } => break,
                    KeeperOutput::Begin { shard } => {
                        inputs.push_back(node.make(shard, 0, bytes_of(shard, 0)))
                    }
                    KeeperOutput::Compute(stamp) => {
                        let mut bytes = next(&node.memory[&stamp]);
                        bytes[0] ^= u8::from(node.strange);
                        inputs.push_back(node.make(stamp.shard, stamp.version + 1, bytes));
                    }
                    KeeperOutput::Load(stamp) => {
                        let bytes = node.disk.get(&stamp).filter(|bytes| Digest::of(bytes) == stamp.digest);
                        inputs.push_back(match bytes.cloned() {
                            Some(bytes) => node.make(stamp.shard, stamp.version, bytes),
                            None => KeeperInput::Damaged(stamp),
                        });
                    }
                    KeeperOutput::Put { offset, bytes } => {
                        node.staging.truncate(usize::try_from(offset).expect("short"));
                        assert_eq!(node.staging.len() as u64, offset);
                        node.staging.extend(bytes);
                    }
                    KeeperOutput::Check(stamp) => {
                        let bytes = std::mem::take(&mut node.staging);
                        inputs.push_back(if Digest::of(&bytes) == stamp.digest {
                            node.make(stamp.shard, stamp.version, bytes)
                        } else {
                            KeeperInput::Wrong(stamp)
                        });
                    }
                    KeeperOutput::Serve { to, stamp, offset } => {
                        let all = &node.memory[&stamp];
                        let mut bytes: Vec<u8> = all
                            .iter()
                            .skip(usize::try_from(offset).expect("short"))
                            .take(PART)
                            .copied()
                            .collect();
                        bytes.iter_mut().for_each(|byte| *byte ^= u8::from(node.lies));
                        let what = ShardWord::Part { stamp, offset, total: all.len() as u64, bytes };
                        self.wires.push_back(ShardMessage { from: node.member(at), to, what });
                    }
                    KeeperOutput::Send(message) => self.wires.push_back(message),
                    KeeperOutput::Store(stamp) => {
                        node.disk.insert(stamp, node.memory[&stamp].clone());
                        inputs.push_back(KeeperInput::Stored(stamp));
                    }
                    KeeperOutput::Drop(stamp) => drop(node.memory.remove(&stamp)),
                    KeeperOutput::Remove(stamp) => drop(node.disk.remove(&stamp)),
                }
            }
        }
    }

    /// A tenth of a second: everybody beats, messages arrive or, if `lossy` says so, do not.
    fn go_on(&mut self, mut lossy: impl FnMut() -> bool) {
        self.now = self.now.after_ns(SECOND / 10);
        for at in 0..self.nodes.len() as u32 {
            let node = &self.nodes[at as usize];
            let Some(keeper) = &node.keeper else { continue };
            let mut beat = beats::beat_of(&self.supervisor, node.member(at), self.now);
            let mut standing = keeper.standing();
            if node.behind {
                standing.round -= 1;
            }
            beat.shards = Some(Box::new(standing));
            self.give(SupervisorInput::Beat(Box::new(beat)));
        }
        while let Some(message) = self.wires.pop_front() {
            let to = &self.nodes[message.to.node.0 as usize];
            if !lossy() && to.member(message.to.node.0) == message.to {
                self.keep(message.to.node.0, KeeperInput::Message(message));
            }
        }
        for at in 0..self.nodes.len() as u32 {
            self.keep(at, KeeperInput::Tick);
        }
        self.give(SupervisorInput::Tick);
    }

    /// So many tenths of a second without any loss.
    fn tenths(&mut self, tenths: u32) {
        (0..tenths).for_each(|_| self.go_on(|| false));
    }

    /// Goes on until all have this version.
    fn until_trained(&mut self, version: u64) {
        for _ in 0..1000 {
            if self.supervisor.view().shards().0 >= version {
                return;
            }
            self.tenths(1);
        }
        panic!("{version} is never reached: {:?}", self.events);
    }

    fn kill(&mut self, node: u32) {
        let member = self.nodes[node as usize].member(node);
        self.nodes[node as usize].die();
        self.give(SupervisorInput::Ended { member, ending: Ending::Signal(9) });
    }

    /// Every rank has the bytes of the present version, and nothing else but what comes next.
    fn check(&self) {
        let (version, _) = self.supervisor.view().shards();
        for (membership, _) in self.supervisor.view().memberships() {
            for (member, shard) in membership.members.iter().zip(0..) {
                let memory = &self.nodes[member.node.0 as usize].memory;
                assert_eq!(memory.get(&stamp_of(shard, version)), Some(&bytes_of(shard, version)));
                assert!(memory.len() <= 2, "{memory:?}");
                let disk = &self.nodes[member.node.0 as usize].disk;
                assert!(disk.keys().filter(|stamp| stamp.shard == shard).count() <= 3, "{disk:?}");
            }
        }
    }

    fn restored(&self) -> Vec<(u64, u64, u64)> {
        let of = |event: &SupervisorEvent| match event {
            SupervisorEvent::Restored { version, from, sealed } => Some((*version, *from, *sealed)),
            _ => None,
        };
        self.events.iter().filter_map(of).collect()
    }
}

#[test]
fn what_a_rank_lost_comes_from_another_replica() {
    let mut cluster = Cluster::new(config());
    cluster.until_trained(6);
    for node in 0..4 {
        let (before, _) = cluster.supervisor.view().shards();
        cluster.kill(node);
        cluster.until_trained(before + 3);
        cluster.check();
    }
    assert_eq!(cluster.restored(), [], "nothing was computed twice");
}

#[test]
fn when_nobody_has_it_all_go_back_to_the_newest_checkpoint() {
    let mut cluster = Cluster::new(config());
    cluster.until_trained(6);
    for node in 0..5 {
        cluster.kill(node);
    }
    cluster.until_trained(9);
    cluster.check();
    assert!(matches!(cluster.restored()[..], [(4, 6 | 7, 4)]), "{:?}", cluster.events);
    // One copy of a shard is enough, on whichever disk; without any of it the one before has to do.
    for (lost, back_to) in [(vec![0], 8), (vec![0, 2], 4)] {
        let mut cluster = Cluster::new(config());
        cluster.until_trained(9);
        for node in 0..5 {
            cluster.kill(node);
        }
        for node in lost {
            cluster.nodes[node].disk.remove(&stamp_of(0, 8));
        }
        cluster.until_trained(10);
        assert_eq!(
            cluster.restored().last().map(|restored| restored.0),
            Some(back_to),
            "{:?}",
            cluster.events
        );
        cluster.check();
    }
}

#[test]
fn nobody_goes_back_further_than_what_was_stored_while_a_disk_is_not_read() {
    let mut cluster = Cluster::new(config());
    cluster.until_trained(6);
    // The second rank of both replicas: the stand-by takes one seat, and has nothing.
    let seats = cluster.supervisor.view().memberships().map(|(m, _)| m.members[1].node.0);
    let seats: Vec<u32> = seats.collect();
    let (first, second) = (seats[0], seats[1]);
    cluster.nodes[first as usize].gone = true;
    cluster.kill(first);
    // The disk that is there has lost its copy.
    cluster.nodes[second as usize].disk.remove(&stamp_of(1, 4));
    cluster.kill(second);
    cluster.tenths(300);
    let missed = |event: &SupervisorEvent| matches!(event, SupervisorEvent::ShardsMissed { nodes } if *nodes == [NodeId(first)]);
    assert!(cluster.events.iter().any(missed), "{:?}", cluster.events);
    assert_eq!(cluster.restored(), []);
    let (version, _) = cluster.supervisor.view().shards();
    // It comes back.
    cluster.nodes[first as usize].gone = false;
    cluster.until_trained(version + 2);
    assert!(matches!(cluster.restored()[..], [(4, _, 4)]), "{:?}", cluster.events);
    cluster.check();
}

#[test]
fn a_copy_of_the_checkpoint_that_nobody_with_a_seat_has_is_waited_for_too() {
    let training = Some(Training { store_every: 4, until: 6 });
    let mut cluster = Cluster::new(ClusterConfig { training, ..config() });
    cluster.until_trained(6);
    let seats = cluster.supervisor.view().memberships().map(|(m, _)| m.members[1].node.0);
    let seats: Vec<u32> = seats.collect();
    let taken = |node: &u32| {
        cluster.supervisor.view().memberships().any(|(m, _)| m.members.iter().any(|m| m.node.0 == *node))
    };
    let spare = (0..5).find(|node| !taken(node)).expect("one stands by");
    // It had a seat once, and has said that it has this still; then it goes away.
    let stamp = stamp_of(1, 4);
    cluster.nodes[spare as usize].disk.insert(stamp, bytes_of(1, 4));
    cluster.kill(spare);
    cluster.tenths(30);
    cluster.nodes[spare as usize].gone = true;
    cluster.kill(spare);
    for &node in &seats {
        cluster.nodes[node as usize].disk.remove(&stamp);
    }
    for node in seats {
        cluster.kill(node);
    }
    cluster.tenths(300);
    let missed = |event: &SupervisorEvent| matches!(event, SupervisorEvent::ShardsMissed { nodes } if *nodes == [NodeId(spare)]);
    assert!(cluster.events.iter().any(missed), "{:?}", cluster.events);
    assert_eq!(cluster.restored(), []);
}

#[test]
fn a_rank_that_gives_other_bytes_is_ended_by_name() {
    let mut cluster = Cluster::new(config());
    cluster.until_trained(6);
    let (membership, _) = cluster.supervisor.view().memberships().next().expect("a replica");
    let (lost, liar) = (membership.members[0].node.0, 2);
    cluster.nodes[liar].lies = true;
    cluster.kill(lost);
    cluster.tenths(60);
    let diverged = |event: &SupervisorEvent| {
        matches!(event, SupervisorEvent::Failed(failure)
            if failure.cause == Cause::Diverged && failure.member.node == NodeId(liar as u32))
    };
    assert!(cluster.events.iter().any(diverged), "{:?}", cluster.events);
}

#[test]
fn what_comes_out_differently_does_not_count() {
    let mut cluster = Cluster::new(config());
    cluster.until_trained(5);
    cluster.nodes[1].strange = true;
    cluster.tenths(100);
    let (version, _) = cluster.supervisor.view().shards();
    let differ = cluster.events.iter().filter(|event| matches!(event, SupervisorEvent::ShardsDiffer { .. }));
    assert_eq!(differ.count(), 3, "it was tried again, and not for ever");
    cluster.check();
    // A new life of the supervisor tries again.
    cluster.nodes[1].strange = false;
    cluster.give(SupervisorInput::Started { incarnation: Incarnation(2), config: config() });
    cluster.until_trained(version + 2);
    cluster.check();
}

#[test]
fn what_a_rank_has_counts_once_it_has_obeyed_the_newest_orders() {
    let mut cluster = Cluster::new(config());
    // 3 is to be computed into 4, and 4 is to be stored.
    for version in [3, 4] {
        cluster.until_trained(version);
        cluster.nodes[1].behind = true;
        cluster.tenths(30);
        let (now, sealed) = cluster.supervisor.view().shards();
        assert_eq!((now, sealed), (version, 0), "it may be letting go of it");
        assert!(cluster.nodes[1].disk.contains_key(&stamp_of(1, 4)) == (version == 4));
        assert_eq!(cluster.nodes[1].memory.len(), if version == 4 { 1 } else { 2 }, "it has what it should");
        cluster.nodes[1].behind = false;
    }
    cluster.tenths(1);
    assert_eq!(cluster.supervisor.view().shards(), (4, 4));
}

#[test]
fn a_supervisor_that_knows_nothing_overwrites_nothing() {
    let mut old = Cluster::new(config());
    old.until_trained(9);
    let mut new = Cluster::new(config());
    new.nodes.iter_mut().for_each(Node::die);
    for (node, was) in new.nodes.iter_mut().zip(old.nodes) {
        node.disk = was.disk;
    }
    for node in 0..5 {
        new.kill(node);
    }
    new.until_trained(10);
    assert_eq!(new.restored(), [(8, 0, 0)]);
    new.check();
}

#[test]
fn what_is_on_disk_does_not_wait_for_what_others_have() {
    let (me, other) = (Node::default().member(0), Node::default().member(1));
    let mut keeper = Keeper::new(me, SECOND);
    let want = |shard, from| {
        let Stamp { version, digest, .. } = stamp_of(shard, 4);
        Want { shard, version, digest: Some(digest), from }
    };
    let mut give = |input| {
        keeper.handle(Time(SECOND), input);
        let outputs = std::iter::from_fn(|| match keeper.poll() {
            KeeperOutput::Wait { .. } => None,
            output => Some(output),
        });
        outputs.collect::<Vec<_>>()
    };
    assert_eq!(give(KeeperInput::Found(vec![stamp_of(1, 4)])), []);
    let orders = |round, hold| ShardOrders { round, hold, keep: vec![4], ..ShardOrders::default() };
    let asks = |outputs: &[KeeperOutput]| {
        let [KeeperOutput::Send(ShardMessage { to, what, .. })] = outputs else { return false };
        *to == other && matches!(what, ShardWord::Ask { .. })
    };
    assert!(asks(&give(KeeperInput::Orders(orders(1, vec![want(0, Some(other))])))));
    // The other may be waiting for just this, and gives nothing before.
    let both = vec![want(0, Some(other)), want(1, None)];
    assert_eq!(give(KeeperInput::Orders(orders(2, both))), [KeeperOutput::Load(stamp_of(1, 4))]);
    assert!(asks(&give(KeeperInput::Made(stamp_of(1, 4)))));
    // What nobody wants any more is not asked for again.
    assert_eq!(give(KeeperInput::Orders(orders(3, vec![]))), [KeeperOutput::Drop(stamp_of(1, 4))]);
    assert_eq!(keeper.poll(), KeeperOutput::Wait { until: None });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Any nodes die at any time, with a lossy network between them: versions go on, and every rank has the right bytes.
    #[test]
    fn whatever_dies_every_rank_has_the_bytes_of_its_version(
        deaths in prop::collection::vec((0u32..5, 1u32..15), 0..12),
        losses in any::<u64>(),
        train in any::<bool>(),
    ) {
        let mut cluster = Cluster::new(config());
        let mut dice = losses | 1;
        let mut lossy = move || {
            dice = dice.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            dice >> 62 == 0
        };
        if train {
            cluster.until_trained(5);
        }
        for (node, tenths) in deaths {
            if cluster.nodes[node as usize].keeper.is_some() {
                cluster.kill(node);
            }
            (0..tenths).for_each(|_| cluster.go_on(&mut lossy));
        }
        let (version, sealed) = cluster.supervisor.view().shards();
        cluster.until_trained(version + 3);
        cluster.check();
        prop_assert!(cluster.restored().iter().all(|(version, _, sealed)| version >= sealed));
        prop_assert!(cluster.supervisor.view().shards().1 >= sealed);
    }
}
