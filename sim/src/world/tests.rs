//! A toy: a teller counts up by messages to a listener, sending each again until it is confirmed. With its bug the
//! listener believes that messages come once and in order.

use super::*;
use crate::decision::{Decision, link};
use crate::minimise::minimise;

const TELLER: ActorId = 0;
const LISTENER: ActorId = 1;
const SECOND_NS: u64 = 1_000_000_000;

#[derive(Clone, Debug, PartialEq)]
struct Number(u64);

impl Wire for Number {
    fn encode(&self) -> Vec<u8> {
        let bytes = self.0.to_le_bytes();
        bytes.into_iter().chain(crc32fast::hash(&bytes).to_le_bytes()).collect()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, sum) = bytes.split_first_chunk::<8>()?;
        (crc32fast::hash(body).to_le_bytes() == *sum).then_some(Self(u64::from_le_bytes(*body)))
    }

    fn label(&self) -> String {
        self.0.to_string()
    }
}

#[derive(Debug, Default)]
struct Toy {
    trusting: bool,
    /// Confirmed, or heard. The disk, so to say: a death leaves it.
    count: u64,
    lives: u64,
    tampered: u64,
    wrong: bool,
    handled: u64,
    digest: u64,
}

impl Actor for Toy {
    type Message = Number;

    fn handle(&mut self, cx: &mut Context<'_, Number>, happening: Happening<Number>) {
        let nth = self.handled;
        self.handled += 1;
        self.digest = crate::decision::mix(self.digest, cx.clock().0);
        if cx.fault(Hazard::Crash, nth).is_some() {
            return cx.exit();
        }
        match happening {
            Happening::Started { argument } => {
                self.lives = argument;
                cx.wake_in(1_000_000, argument);
            }
            Happening::Woken { token } => {
                assert_eq!(token, self.lives, "no timer of a former life");
                if cx.me == TELLER {
                    cx.send(LISTENER, Number(self.count + 1));
                }
                cx.wake_at(cx.clock().after_ns(1_000_000), token);
            }
            Happening::Tampered { .. } => self.tampered += 1,
            Happening::Message { message: Number(number), .. } if cx.me == TELLER => {
                self.count = self.count.max(number);
            }
            Happening::Message { message: Number(number), .. } => {
                let next = number == self.count + 1;
                self.wrong |= self.trusting && !next;
                self.count += u64::from(next);
                cx.send(TELLER, Number(self.count));
            }
            Happening::Ended { .. } => unreachable!("a toy starts nobody"),
        }
    }

    fn died(&mut self, cx: &mut Context<'_, Number>) {
        let me = cx.me;
        cx.start(me, self.lives + 1, 5_000_000);
    }
}

fn world(decisions: Decisions, trusting: bool) -> World<Toy> {
    let actors = (0..2).map(|_| Toy { trusting, ..Toy::default() }).collect();
    let names = vec!["teller".into(), "listener".into()];
    let setup = Setup { drift_per_mille: 10, chronicle: true, names };
    let mut world = World::new(decisions, setup, actors);
    world.start(TELLER, 1);
    world.start(LISTENER, 1);
    world
}

fn outcome(world: &World<Toy>) -> (u64, Vec<(u64, u64, u64)>) {
    (world.events(), world.actors().iter().map(|toy| (toy.count, toy.lives, toy.digest)).collect())
}

#[test]
fn it_counts_through_everything_and_a_seed_is_a_run() {
    let (mut died, mut tampered) = (0, 0);
    for seed in 0..20 {
        let run = || {
            let mut world = world(Decisions::of_seed(seed, Hazard::ALL), false);
            world.run_until(20 * SECOND_NS);
            world.heal();
            let reached = world.actors()[0].count;
            world.run_until(25 * SECOND_NS);
            assert!(world.actors()[0].count > reached + 1000, "it goes on when all is calm");
            assert!(!world.actors()[1].wrong);
            world
        };
        let world = run();
        assert_eq!(outcome(&world), outcome(&run()), "seed {seed}");
        assert_ne!(world.chronicle().entries(), []);
        died += world.actors()[0].lives - 1;
        tampered += world.actors()[1].tampered;
    }
    assert!(died > 0 && tampered > 0);
}

#[test]
fn a_log_replays_and_shrinks_to_what_matters() {
    let wrong = |log: &[Decision]| {
        let mut world = world(Decisions::of_log(3, log), true);
        while world.step(5 * SECOND_NS) && !world.actors()[1].wrong {}
        world.actors()[1].wrong
    };
    let seeded = Decisions::always(3, Hazard::ALL);
    let mut first = world(seeded.clone(), true);
    first.run_until(5 * SECOND_NS);
    assert!(first.actors()[1].wrong);
    let taken = seeded.taken();
    let mut second = world(Decisions::of_log(3, &taken), true);
    second.run_until(5 * SECOND_NS);
    assert_eq!(outcome(&first), outcome(&second), "the log is the run");

    let least = minimise(&taken, 1000, wrong);
    assert!(!least.bounded && least.left.len() == 1, "one fault is enough: {:?}", least.left);
    assert!(wrong(&least.left) && taken.len() > 100);
}

#[test]
fn a_dead_machine_hears_nothing_and_a_paused_one_later() {
    let mut world = world(Decisions::of_log(1, &[]), false);
    world.run_until(SECOND_NS);
    world.inner.processes[1].paused_until = 2 * SECOND_NS;
    let before = world.actors()[1].count;
    world.run_until(2 * SECOND_NS - 1);
    assert_eq!(world.actors()[1].count, before);
    world.run_until(3 * SECOND_NS);
    assert!(world.actors()[1].count > before);
    assert!(world.act(TELLER, |_, cx| cx.kill(LISTENER)));
    assert!(!world.is_up(LISTENER));
    world.run_until(4 * SECOND_NS);
    assert_eq!(world.actors()[1].lives, 2, "its death started it again");
}

#[test]
fn a_reset_loses_what_is_under_way() {
    let calm = Decisions::of_log(1, &[]);
    let mut world = world(calm.clone(), false);
    world.act(TELLER, |_, cx| cx.send(LISTENER, Number(1)));
    world.inner.network.reset(1 << 12);
    world.run_until(500_000);
    assert_eq!(world.actors()[1].count, 0);
    assert_eq!(link(0, 1), 1);
}
