//! The supervisor over nodes that only beat, join and die: every life is recorded and followed by another.

use super::*;
use crate::atlas::Atlas;
use crate::decision::Decisions;
use crate::hazard::Area;
use crate::world::{Actor, Setup, World};
use lite_llm_core::cluster::membership::Membership;
use lite_llm_core::cluster::orders::{Activity, Beat, Facts, LogEnd};
use lite_llm_core::cluster::supervisor::Standing;
use lite_llm_core::topology::Topology;
use std::collections::BTreeSet;

const NODES: u32 = 3;
const SECOND_NS: u64 = 1_000_000_000;

/// A node that has nothing but its word.
#[derive(Debug, Default)]
struct Toy {
    incarnation: u64,
    membership: Option<Membership>,
    nth: u64,
    deaths: Vec<u64>,
}

#[derive(Debug)]
enum Cast {
    Node(Toy),
    Supervisor(Box<SupervisorActor>),
}

impl Toy {
    fn handle(&mut self, cx: &mut Context<'_, Said>, happening: Happening<Said>) {
        self.nth += 1;
        if cx.fault(Hazard::Crash, self.nth).is_some() {
            return cx.exit();
        }
        let member = Member { node: NodeId(cx.me()), incarnation: Incarnation(self.incarnation) };
        match happening {
            Happening::Started { argument } => {
                self.incarnation = argument;
                cx.wake_in(1, 0);
            }
            Happening::Message { message: Said::Orders(orders), .. } if orders.to == member => {
                if orders.refused.is_some() {
                    return cx.exit_with(1);
                }
                if orders.membership.is_some() {
                    self.membership = orders.membership;
                }
                if orders.drain.is_some() && orders.active {
                    cx.exit_with(0);
                }
            }
            Happening::Woken { .. } => {
                cx.wake_in(100_000_000, 0);
                let membership = self.membership.as_ref();
                let beat = Beat {
                    member,
                    sent: cx.clock(),
                    facts: Facts::default(),
                    log: LogEnd { last: Seq(1), ..LogEnd::default() },
                    torn: false,
                    began: Incarnation(1),
                    committed: Seq(1),
                    epoch: membership.map(|membership| membership.epoch).unwrap_or_default(),
                    synced: membership.is_some_and(|membership| membership.leading() == member),
                    activity: Activity::Idle,
                    progress: self.nth,
                    diverged: 0,
                    drained: false,
                    shards: None,
                };
                cx.send(NODES, Said::Beat(Box::new(beat)));
            }
            _ => {}
        }
    }
}

impl Actor for Cast {
    type Message = Said;

    fn handle(&mut self, cx: &mut Context<'_, Said>, happening: Happening<Said>) {
        match self {
            Self::Node(node) => node.handle(cx, happening),
            Self::Supervisor(supervisor) => supervisor.handle(cx, happening),
        }
    }

    fn died(&mut self, cx: &mut Context<'_, Said>) {
        match self {
            Self::Node(node) => {
                node.deaths.push(node.incarnation);
                node.membership = None;
            }
            Self::Supervisor(supervisor) => supervisor.died(cx, NODES),
        }
    }
}

fn world(seed: u64) -> World<Cast> {
    let hazards: Vec<Hazard> = Hazard::ALL
        .iter()
        .copied()
        .filter(|hazard| {
            matches!(hazard.about().area, Area::Network | Area::Process | Area::Clock | Area::Disk)
        })
        .collect();
    let decisions = Decisions::of_seed(seed, &hazards);
    let topology = Topology { tensor: 2, ..Topology::SINGLE };
    let config = ClusterConfig { topology, nodes: NODES, drift_per_mille: 25, ..ClusterConfig::default() };
    let atlas = Atlas::new(vec![BTreeSet::from([NODES])], false);
    let disk = SimDisk::of_node(NODES, 4096, decisions.clone(), atlas);
    let mut actors: Vec<Cast> = (0..NODES).map(|_| Cast::Node(Toy::default())).collect();
    actors.push(Cast::Supervisor(Box::new(SupervisorActor::new(config, disk, Watch::new(vec![])))));
    let names = (0..=NODES).map(|actor| actor.to_string()).collect();
    let mut world = World::new(decisions, Setup { drift_per_mille: 10, chronicle: false, names }, actors);
    world.start(NODES, 1);
    world
}

fn supervisor(world: &World<Cast>) -> &SupervisorActor {
    let Cast::Supervisor(supervisor) = &world.actors()[NODES as usize] else { panic!("its place") };
    supervisor
}

#[test]
fn every_death_is_recorded_and_followed_by_another_life() {
    let (mut deaths, mut lives) = (0, 0);
    for seed in 0..40 {
        let mut world = world(seed);
        world.run_until(60 * SECOND_NS);
        world.heal();
        world.run_until(180 * SECOND_NS);
        let serving = |world: &World<Cast>| {
            let view = supervisor(world).supervisor().expect("it runs").view();
            let (membership, active) = view.memberships().next().expect("a replica has members");
            let up = |member| view.nodes().any(|node| node == (member, Standing::Up));
            active && membership.members.iter().all(|&member| up(member))
        };
        assert!(serving(&world), "seed {seed}");
        let recorded: BTreeSet<(u32, u64)> = supervisor(&world)
            .failures()
            .iter()
            .map(|failure| (failure.member.node.0, failure.member.incarnation.0))
            .collect();
        for (node, actor) in (0..).zip(world.actors()) {
            let Cast::Node(toy) = actor else { continue };
            deaths += toy.deaths.len();
            for &incarnation in &toy.deaths {
                assert!(recorded.contains(&(node, incarnation)), "seed {seed}: {node} in {incarnation}");
            }
        }
        lives += supervisor(&world).process.as_ref().map_or(0, |process| process.incarnation);
        world.act(NODES, |actor, cx| {
            let Cast::Supervisor(supervisor) = actor else { panic!("its place") };
            supervisor.wish(cx, SupervisorInput::Drain { bound_ns: None });
        });
        world.run_until(300 * SECOND_NS);
        assert_eq!(supervisor(&world).exited(), Some(&None), "seed {seed}: a drain ends");
    }
    assert!(deaths > 40 && lives > 60, "{deaths} deaths, {lives} lives of the supervisor");
}

#[test]
fn the_same_seed_gives_the_same_decisions() {
    let digest = |seed| {
        let mut world = world(seed);
        world.run_until(20 * SECOND_NS);
        (world.events(), supervisor(&world).failures().to_vec())
    };
    assert_eq!(digest(3), digest(3));
    assert_ne!(digest(3), digest(4));
}
