//! A supervisor that hears anything in any order: what its network, its processes and its operator may say, true or not.

use lite_llm_core::cluster::membership::{Epoch, Member, NodeId};
use lite_llm_core::cluster::orders::{Activity, Beat, Facts, LogEnd};
use lite_llm_core::cluster::shards::{ShardStanding, Stamp};
use lite_llm_core::cluster::supervisor::{
    ClusterConfig, Ending, Supervisor, SupervisorInput, SupervisorOutput, Training,
};
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{Incarnation, Seq};
use lite_llm_core::replay::{decode_input, encode_input};
use lite_llm_core::time::Time;
use lite_llm_core::topology::Topology;
use lite_llm_sim::random::Choice;
use std::collections::BTreeMap;

/// Feeds as many inputs as are chosen; the supervisor's own invariants are asserted after each.
///
/// # Panics
/// At the first that breaks one, or when its journal would not fold.
pub fn anything_said(mut choice: Choice, inputs: usize) {
    let data = 1 + choice.below(2) as u32;
    let topology = Topology { data, tensor: 1 + choice.below(2) as u32, ..Topology::SINGLE };
    let nodes = data * topology.tensor + choice.below(3) as u32;
    let config = ClusterConfig {
        topology,
        nodes,
        training: choice.chance(700).then_some(Training { store_every: 2, until: u64::MAX }),
        ..ClusterConfig::default()
    };
    let (mut supervisor, mut lives, mut now) = (Supervisor::new(), 0, Time(1));
    let mut rounds = BTreeMap::new();
    for _ in 0..=inputs {
        let input = if lives == 0 || choice.chance(20) {
            lives += 1;
            SupervisorInput::Started { incarnation: Incarnation(lives), config: config.clone() }
        } else {
            said(&mut choice, &supervisor, nodes, &rounds)
        };
        // What is journalled is what was said.
        let input = decode_input(&encode_input(&input)).expect("an input is read again");
        now = now.after_ns([1, 1_000, 50_000_000, 700_000_000, 61_000_000_000][choice.index(5)]);
        let ticked = matches!(input, SupervisorInput::Tick);
        supervisor.handle(now, input);
        loop {
            match supervisor.poll() {
                SupervisorOutput::Wait { until } => {
                    assert!(
                        !ticked || until.is_none_or(|until| until > now),
                        "an alarm that rang rings for ever"
                    );
                    break;
                }
                SupervisorOutput::Orders { orders, .. } => {
                    rounds.extend(orders.shards.map(|shards| (orders.to.node, shards.round)));
                }
                _ => {}
            }
        }
    }
    let restored = Supervisor::restore(&supervisor.snapshot()).expect("its own snapshot");
    assert_eq!(restored.state_digest(), supervisor.state_digest());
}

fn said(
    choice: &mut Choice,
    supervisor: &Supervisor,
    nodes: u32,
    rounds: &BTreeMap<NodeId, u64>,
) -> SupervisorInput {
    // A node too many, and a life too early or late, now and then.
    let node = NodeId(choice.below(u64::from(nodes) + 1) as u32);
    let newest = supervisor.view().nodes().nth(node.0 as usize).map_or(1, |(member, _)| member.incarnation.0);
    let incarnation = if choice.chance(100) { choice.below(5) } else { newest };
    let member = Member { node, incarnation: Incarnation(incarnation) };
    match choice.below(16) {
        0 => SupervisorInput::Ended { member, ending: ending(choice) },
        1 => SupervisorInput::Captured { member, tail: Ok(Some(Seq(choice.below(9)))) },
        2 => SupervisorInput::Captured { member, tail: Err("gone".into()) },
        3 => SupervisorInput::Restart { node },
        4 if choice.chance(100) => {
            SupervisorInput::Drain { bound_ns: choice.chance(500).then(|| choice.below(1 << 36)) }
        }
        4..=6 => SupervisorInput::Tick,
        _ => SupervisorInput::Beat(Box::new(beat(choice, supervisor, member, rounds))),
    }
}

fn ending(choice: &mut Choice) -> Ending {
    match choice.below(5) {
        0 => Ending::Clean,
        1 => Ending::Code(1),
        2 => Ending::Signal(9),
        3 => Ending::Panic { record: Seq(choice.below(3)) },
        _ => Ending::Unknown,
    }
}

fn beat(
    choice: &mut Choice,
    supervisor: &Supervisor,
    member: Member,
    rounds: &BTreeMap<NodeId, u64>,
) -> Beat {
    let epoch = Epoch(supervisor.view().epoch().0.saturating_sub(choice.below(2)));
    let facts = Facts { contract: u32::from(choice.chance(20)), ..Facts::default() };
    let activities =
        [Activity::Idle, Activity::Loading, Activity::Joining, Activity::Serving, Activity::Draining];
    Beat {
        member,
        sent: Time(supervisor.now().0.saturating_add(choice.below(3))),
        facts,
        log: LogEnd { last: Seq(choice.below(9)), digest: Digest::default() },
        torn: false,
        began: Incarnation(1),
        committed: Seq(choice.below(9)),
        epoch,
        synced: choice.chance(500),
        activity: activities[choice.index(activities.len())],
        progress: choice.below(3),
        diverged: if choice.chance(50) { choice.below(8) } else { 0 },
        drained: choice.chance(50),
        shards: choice.chance(700).then(|| Box::new(standing(choice, member, rounds))),
    }
}

/// Any shards in any versions, those too that no rank has, and now and then of other bytes.
fn standing(choice: &mut Choice, member: Member, rounds: &BTreeMap<NodeId, u64>) -> ShardStanding {
    let mut stamps = || -> Vec<Stamp> {
        let stamp = |choice: &mut Choice| {
            let version = if choice.chance(20) { u64::MAX } else { choice.below(4) };
            let digest = Digest::of(&[u8::from(choice.chance(50))]);
            Stamp { shard: u32::try_from(choice.below(4)).expect("few"), version, digest }
        };
        (0..choice.below(6)).map(|_| stamp(choice)).collect()
    };
    let (held, stored) = (stamps(), stamps());
    let accused = held.first().map(|stamp| (member, *stamp));
    ShardStanding {
        round: rounds.get(&member.node).copied().filter(|_| choice.chance(900)).unwrap_or_default(),
        held,
        stored: choice.chance(900).then_some(stored),
        accused: accused.filter(|_| choice.chance(50)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_that_is_said_breaks_it() {
        for seed in 0..400 {
            anything_said(Choice::new(seed), 300);
        }
    }
}
