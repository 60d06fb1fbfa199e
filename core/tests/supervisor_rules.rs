//! The supervisor by hand: who is refused, who is not started again, who may lead, and what is said of it.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod beats;

use lite_llm_core::cluster::membership::{Epoch, Member, NodeId};
use lite_llm_core::cluster::orders::{Beat, LogEnd, Orders};
use lite_llm_core::cluster::supervisor::{
    Cause, ClusterConfig, Ending, Restarts, Standing, Supervisor, SupervisorEvent, SupervisorInput,
    SupervisorOutput, Training,
};
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{Incarnation, Seq};
use lite_llm_core::time::Time;
use lite_llm_core::topology::Topology;

const SECOND: u64 = 1_000_000_000;

/// Two tensor ranks.
fn config(nodes: u32) -> ClusterConfig {
    let topology = Topology { tensor: 2, ..Topology::SINGLE };
    ClusterConfig { topology, nodes, ..ClusterConfig::default() }
}

struct Rig {
    supervisor: Supervisor,
    now: Time,
    lives: Vec<u64>,
}

impl Rig {
    fn new(config: ClusterConfig) -> Self {
        let lives = vec![1; config.nodes as usize];
        let mut rig = Self { supervisor: Supervisor::new(), now: Time(SECOND), lives };
        let started = rig.give(SupervisorInput::Started { incarnation: Incarnation(1), config });
        assert_eq!(count(&started, |o| matches!(o, SupervisorOutput::Start { .. })), rig.lives.len());
        rig
    }

    fn give(&mut self, input: SupervisorInput) -> Vec<SupervisorOutput> {
        self.now = self.now.after_ns(1);
        self.supervisor.handle(self.now, input);
        let mut said = Vec::new();
        loop {
            match self.supervisor.poll() {
                SupervisorOutput::Wait { .. } => return said,
                output => said.push(output),
            }
        }
    }

    fn member(&self, node: u32) -> Member {
        Member { node: NodeId(node), incarnation: Incarnation(self.lives[node as usize]) }
    }

    fn beat_of(&self, node: u32) -> Beat {
        beats::beat_of(&self.supervisor, self.member(node), self.now)
    }

    fn beat(&mut self, node: u32) -> Vec<SupervisorOutput> {
        let beat = self.beat_of(node);
        self.give(SupervisorInput::Beat(Box::new(beat)))
    }

    /// Both ranks are heard, join, and begin.
    fn serve(&mut self) {
        for _ in 0..2 {
            for node in 0..self.lives.len() as u32 {
                self.beat(node);
            }
        }
        assert!(self.supervisor.view().memberships().all(|(_, active)| active));
    }

    /// A node ends, is recorded, and starts again after its pause.
    fn lose(&mut self, node: u32, ending: Ending) -> Vec<SupervisorOutput> {
        let member = self.member(node);
        let mut said = self.give(SupervisorInput::Ended { member, ending });
        assert!(said.iter().any(|o| matches!(o, SupervisorOutput::Capture { .. })), "{said:?}");
        assert!(
            !said.iter().any(|o| matches!(o, SupervisorOutput::Start { .. })),
            "not before it is recorded"
        );
        said.extend(self.give(SupervisorInput::Captured { member, tail: Ok(None) }));
        self.now = self.now.after_ns(31 * SECOND);
        said.extend(self.give(SupervisorInput::Tick));
        for output in &said {
            if let SupervisorOutput::Start { member, .. } = output {
                self.lives[member.node.0 as usize] = member.incarnation.0;
            }
        }
        said
    }

    fn standing(&self, node: u32) -> Standing {
        self.supervisor.view().nodes().nth(node as usize).unwrap().1
    }
}

fn count(said: &[SupervisorOutput], what: impl Fn(&SupervisorOutput) -> bool) -> usize {
    said.iter().filter(|output| what(output)).count()
}

fn orders(said: &[SupervisorOutput]) -> Vec<&Orders> {
    let mut all = Vec::new();
    for output in said {
        if let SupervisorOutput::Orders { orders, .. } = output {
            all.push(orders.as_ref());
        }
    }
    all
}

fn events(said: &[SupervisorOutput]) -> Vec<&SupervisorEvent> {
    let mut all = Vec::new();
    for output in said {
        if let SupervisorOutput::Event { event, .. } = output {
            all.push(event);
        }
    }
    all
}

fn gave_up_for(said: &[SupervisorOutput], words: &str) -> bool {
    let gave_up = |event: &&SupervisorEvent| match event {
        SupervisorEvent::GaveUp { reason, .. } => reason.contains(words),
        _ => false,
    };
    events(said).iter().any(gave_up)
}

#[test]
fn impossible_clusters_are_refused_with_the_remedy() {
    let good = config(2);
    for (bad, words) in [
        (ClusterConfig { nodes: 1, ..good.clone() }, "the topology has 2 ranks"),
        (ClusterConfig { nodes: 0, ..good.clone() }, "nodes is 0"),
        (ClusterConfig { lease_ns: 0, ..good.clone() }, "lease_ns is 0"),
        (ClusterConfig { drift_per_mille: 500, ..good.clone() }, "drift_per_mille is 500"),
        (
            ClusterConfig { training: Some(Training { store_every: 0, until: 9 }), ..good.clone() },
            "training.store_every is 0",
        ),
        (
            ClusterConfig { topology: Topology { data: 0, ..good.topology }, ..good.clone() },
            "topology.data is 0",
        ),
    ] {
        let mut supervisor = Supervisor::new();
        supervisor.handle(Time(1), SupervisorInput::Started { incarnation: Incarnation(1), config: bad });
        let SupervisorOutput::Exit { error: Some(error), .. } = supervisor.poll() else {
            panic!("not refused")
        };
        assert!(error.contains(words), "{error}");
    }
    let mut rig = Rig::new(good.clone());
    let other = ClusterConfig { topology: Topology { pipeline: 2, ..Topology::SINGLE }, ..good };
    let said = rig.give(SupervisorInput::Started { incarnation: Incarnation(2), config: other });
    assert!(
        matches!(&said[..], [SupervisorOutput::Exit { error: Some(error), .. }] if error.contains("was begun with"))
    );
}

#[test]
fn a_node_of_another_kind_is_named_and_takes_no_part() {
    let mut rig = Rig::new(config(3));
    let mut beat = rig.beat_of(1);
    beat.facts.model = Digest([7; 32]);
    let said = rig.give(SupervisorInput::Beat(Box::new(beat)));
    let reason = orders(&said)[0].refused.clone().unwrap();
    assert!(reason.contains("node 1") && reason.contains("model 0707"), "{reason}");
    let said = rig.lose(1, Ending::Code(1));
    let gave_up = |event: &&SupervisorEvent| matches!(event, SupervisorEvent::GaveUp { node: NodeId(1), .. });
    assert!(events(&said).iter().any(gave_up), "the next life would be the same: {said:?}");
    assert_eq!(rig.standing(1), Standing::GivenUp);
    // The stand-by takes its place.
    rig.beat(0);
    rig.beat(2);
    let (membership, _) = rig.supervisor.view().memberships().next().unwrap();
    assert_eq!(membership.members.iter().map(|m| m.node.0).collect::<Vec<_>>(), [0, 2]);
    // Who is unknown, or of a former life, is told so.
    for (node, incarnation, words) in [(7, 1, "none of this cluster's"), (0, 9, "is over")] {
        let mut beat = rig.beat_of(0);
        beat.member = Member { node: NodeId(node), incarnation: Incarnation(incarnation) };
        let said = rig.give(SupervisorInput::Beat(Box::new(beat)));
        assert!(orders(&said)[0].refused.as_ref().unwrap().contains(words), "{said:?}");
    }
}

#[test]
fn a_leader_has_a_lease_and_its_followers_have_none() {
    let mut rig = Rig::new(config(2));
    rig.serve();
    let (membership, _) = rig.supervisor.view().memberships().next().unwrap();
    let leader = membership.leading().node.0;
    let sent = rig.now;
    let said = rig.beat(leader);
    assert_eq!(orders(&said)[0].lease.unwrap().sent, sent, "it begins with the beat that it answers");
    assert!(orders(&rig.beat(1 - leader))[0].lease.is_none());
    // A beat that comes late brings nothing.
    let mut late = rig.beat_of(leader);
    late.sent = Time(1);
    assert_eq!(rig.give(SupervisorInput::Beat(Box::new(late))), []);
}

#[test]
fn the_leader_goes_on_when_a_follower_is_lost_and_the_other_way_round() {
    for lost in [0, 1] {
        let mut rig = Rig::new(config(2));
        rig.serve();
        rig.lose(lost, Ending::Signal(9));
        rig.beat(0);
        rig.beat(1);
        let view = rig.supervisor.view();
        let (membership, active) = view.memberships().next().unwrap();
        assert_eq!((membership.epoch, active), (Epoch(2), false), "a new life is another member");
        assert_eq!(membership.leading().node, NodeId(0), "of equals, the first: both have everything");
        assert_eq!(membership.members[lost as usize].incarnation, Incarnation(2), "everybody keeps his seat");
    }
}

/// A leader that never heard of an epoch in between may still act under its lease.
#[test]
fn a_lease_is_waited_out_over_epochs_that_never_began() {
    let mut rig = Rig::new(config(3));
    for _ in 0..2 {
        rig.beat(0);
        rig.beat(1);
    }
    rig.beat(2);
    let member = rig.member(1);
    rig.give(SupervisorInput::Ended { member, ending: Ending::Signal(9) });
    rig.give(SupervisorInput::Captured { member, tail: Ok(None) });
    assert_eq!(rig.supervisor.view().epoch(), Epoch(2), "the leader goes on, with the stand-by");
    // It falls silent, and cannot be reached; the other holder of the log comes back.
    let later = |rig: &mut Rig, rounds: u32| {
        for _ in 0..rounds {
            rig.now = rig.now.after_ns(SECOND / 5);
            rig.beat(2);
            rig.beat(1);
            rig.give(SupervisorInput::Tick);
        }
    };
    later(&mut rig, 1);
    rig.lives[1] = 2;
    later(&mut rig, 4);
    assert_eq!(rig.standing(0), Standing::Fencing, "its end is not certain");
    assert_eq!(rig.supervisor.view().epoch(), Epoch(2), "its lease is not over");
    later(&mut rig, 6);
    assert_eq!(rig.supervisor.view().epoch(), Epoch(3));
    let (membership, _) = rig.supervisor.view().memberships().next().unwrap();
    assert_eq!(membership.leading(), rig.member(1));
}

#[test]
fn a_disk_that_lost_what_was_told_never_leads() {
    let mut rig = Rig::new(config(2));
    rig.serve();
    rig.lose(0, Ending::Signal(9));
    rig.lose(1, Ending::Signal(9));
    let empty = |rig: &Rig, node| Beat { log: LogEnd::default(), committed: Seq(0), ..rig.beat_of(node) };
    let (first, second) = (empty(&rig, 0), empty(&rig, 1));
    rig.give(SupervisorInput::Beat(Box::new(first)));
    let said = rig.give(SupervisorInput::Beat(Box::new(second)));
    let waiting = SupervisorEvent::Waiting { replica: 0, nodes: vec![NodeId(0), NodeId(1)] };
    assert!(events(&said).contains(&&waiting), "both are empty: {said:?}");
    // One of them comes back with its disk.
    rig.now = rig.now.after_ns(1);
    rig.beat(1);
    let (membership, _) = rig.supervisor.view().memberships().next().unwrap();
    assert_eq!(membership.leading().node, NodeId(1));
}

#[test]
fn a_log_whose_tail_was_torn_leads_only_once_all_logs_are_known() {
    let torn = |rig: &Rig, node, last| {
        let log = LogEnd { last: Seq(last), digest: Digest::default() };
        SupervisorInput::Beat(Box::new(Beat { torn: true, log, ..rig.beat_of(node) }))
    };
    let serve = || {
        let mut rig = Rig::new(config(3));
        rig.serve();
        rig.lose(0, Ending::Signal(9));
        rig.lose(1, Ending::Signal(9));
        let beat = torn(&rig, 2, 0);
        rig.give(beat);
        rig
    };
    let leader = |rig: &Rig| rig.supervisor.view().memberships().next().unwrap().0.leading();
    // One is torn, the other away: who is there may lack what the other has.
    let mut rig = serve();
    let epoch = rig.supervisor.view().epoch();
    let beat = torn(&rig, 0, 11);
    let said = rig.give(beat);
    assert_eq!(rig.supervisor.view().epoch(), epoch);
    assert!(events(&said).iter().any(|event| matches!(event, SupervisorEvent::Waiting { .. })), "{said:?}");
    // The other is whole, and leads although it ends earlier.
    rig.beat(1);
    assert_eq!(leader(&rig), rig.member(1));
    // Both are torn: what the longer one has is all there is.
    for (first, second, leads) in [(11, 10, 0), (10, 11, 1)] {
        let mut rig = serve();
        let beat = torn(&rig, 0, first);
        rig.give(beat);
        let beat = torn(&rig, 1, second);
        rig.give(beat);
        assert_eq!(leader(&rig), rig.member(leads));
    }
}

#[test]
fn a_log_that_ends_earlier_than_it_did_leads_only_once_all_logs_are_known() {
    let leader = |rig: &Rig| rig.supervisor.view().memberships().next().unwrap().0.leading();
    let beat = |rig: &Rig, node, last| {
        let log = LogEnd { last: Seq(last), digest: Digest::default() };
        SupervisorInput::Beat(Box::new(Beat { log, committed: Seq(0), ..rig.beat_of(node) }))
    };
    let mut rig = Rig::new(config(3));
    rig.serve();
    let told = rig.beat_of(0).log.last.0;
    // What both say to have now may have been told meanwhile: nobody has said yet that it was.
    for node in [0, 1] {
        rig.now = rig.now.after_ns(1);
        let more = beat(&rig, node, told + 3);
        rig.give(more);
    }
    rig.lose(0, Ending::Signal(9));
    rig.lose(1, Ending::Signal(9));
    rig.beat(2);
    let epoch = rig.supervisor.view().epoch();
    // One has less than it had; the other is away.
    let less = beat(&rig, 0, told);
    rig.give(less);
    assert_eq!(rig.supervisor.view().epoch(), epoch, "it may lack what was told");
    rig.now = rig.now.after_ns(1);
    let all = beat(&rig, 1, told + 3);
    rig.give(all);
    assert_eq!(leader(&rig), rig.member(1));
}

#[test]
fn a_disk_in_the_place_of_a_holders_never_leads() {
    let one = ClusterConfig { topology: Topology::SINGLE, nodes: 1, ..ClusterConfig::default() };
    let mut rig = Rig::new(one);
    // It is active with an empty log: nobody has said yet that anything was told.
    let empty = |rig: &Rig, began| {
        let (log, began) = (LogEnd::default(), Incarnation(began));
        SupervisorInput::Beat(Box::new(Beat { log, began, committed: Seq(0), ..rig.beat_of(0) }))
    };
    for _ in 0..2 {
        let beat = empty(&rig, 1);
        rig.give(beat);
    }
    let membership =
        |rig: &Rig| rig.supervisor.view().memberships().next().map(|(m, active)| (m.epoch, active));
    assert_eq!(membership(&rig), Some((Epoch(1), true)));
    rig.lose(0, Ending::Signal(9));
    // Its journal was begun by this life: what the one before told is on another disk, and in every later life too.
    for _ in 0..2 {
        let beat = empty(&rig, 2);
        let said = rig.give(beat);
        assert_eq!(membership(&rig), Some((Epoch(1), true)), "{said:?}");
        rig.lose(0, Ending::Signal(9));
    }
    // The former disk is back.
    let beat = empty(&rig, 1);
    rig.give(beat);
    assert_eq!(membership(&rig), Some((Epoch(2), false)));
}

#[test]
fn a_holder_that_comes_back_gets_a_seat_when_nobody_seated_has_the_log() {
    let mut rig = Rig::new(config(3));
    rig.serve();
    let empty = |rig: &Rig, node| Beat { log: LogEnd::default(), committed: Seq(0), ..rig.beat_of(node) };
    // One member stays away; the stand-by has its seat when the other comes back with an empty disk.
    let seated = |rig: &Rig| {
        let (membership, _) = rig.supervisor.view().memberships().next().unwrap();
        membership.members.iter().map(|member| member.node.0).collect::<Vec<_>>()
    };
    assert_eq!(seated(&rig), [0, 1]);
    let away = rig.member(1);
    rig.give(SupervisorInput::Ended { member: away, ending: Ending::Signal(9) });
    let other = empty(&rig, 2);
    rig.give(SupervisorInput::Beat(Box::new(other)));
    assert_eq!(seated(&rig), [0, 2]);
    rig.lose(0, Ending::Signal(9));
    let (first, other) = (empty(&rig, 0), empty(&rig, 2));
    let mut said = rig.give(SupervisorInput::Beat(Box::new(first)));
    said.extend(rig.give(SupervisorInput::Beat(Box::new(other))));
    assert!(events(&said).iter().any(|event| matches!(event, SupervisorEvent::Waiting { .. })), "{said:?}");
    // The last that has the log is back.
    let tail = Ok(None);
    let mut said = rig.give(SupervisorInput::Captured { member: away, tail });
    rig.now = rig.now.after_ns(31 * SECOND);
    for node in [0, 2] {
        let beat = empty(&rig, node);
        rig.give(SupervisorInput::Beat(Box::new(beat)));
    }
    said.extend(rig.give(SupervisorInput::Tick));
    rig.lives[1] += 1;
    rig.beat(1);
    let (membership, _) = rig.supervisor.view().memberships().next().unwrap();
    assert_eq!(membership.leading().node, NodeId(1), "{said:?}");
}

#[test]
fn ranks_that_diverge_are_ended_by_name() {
    let mut rig = Rig::new(config(2));
    rig.serve();
    let (membership, _) = rig.supervisor.view().memberships().next().unwrap();
    let leader = membership.leading().node.0;
    let beat = Beat { diverged: 0b10, ..rig.beat_of(leader) };
    let said = rig.give(SupervisorInput::Beat(Box::new(beat)));
    let killed: Vec<NodeId> = said
        .iter()
        .filter_map(|output| match output {
            SupervisorOutput::Kill { member, cause: Cause::Diverged, .. } => Some(member.node),
            _ => None,
        })
        .collect();
    assert_eq!(killed, [NodeId(1)], "{said:?}");
}

#[test]
fn a_panic_at_the_same_record_is_not_repeated_for_ever() {
    let mut rig = Rig::new(config(2));
    rig.serve();
    let ending = Ending::Panic { record: Seq(41) };
    rig.lose(1, ending.clone());
    rig.serve();
    let said = rig.lose(1, ending);
    assert!(gave_up_for(&said, "record 41"), "{said:?}");
}

#[test]
fn restarts_have_a_budget_that_the_operator_can_renew() {
    let restarts = Restarts { most: 2, window_ns: 3600 * SECOND, ..Restarts::default() };
    let mut rig = Rig::new(ClusterConfig { restarts, ..config(2) });
    rig.serve();
    for life in 1..=2 {
        rig.lose(1, Ending::Signal(11));
        assert_eq!(rig.member(1).incarnation, Incarnation(life + 1));
        rig.serve();
    }
    let said = rig.lose(1, Ending::Signal(11));
    assert!(gave_up_for(&said, "restarts.most"), "{said:?}");
    let said = rig.give(SupervisorInput::Restart { node: NodeId(1) });
    assert!(
        said.iter().any(|o| matches!(o, SupervisorOutput::Start { member, .. } if member.incarnation.0 == 4))
    );
}

#[test]
fn a_life_that_the_operator_wishes_is_recorded_and_costs_nothing_of_the_budget() {
    let restarts = Restarts { most: 1, window_ns: 3600 * SECOND, ..Restarts::default() };
    let mut rig = Rig::new(ClusterConfig { restarts, ..config(2) });
    rig.serve();
    // In any standing, a restart of the supervisor in between or not, the same life comes of it, at once.
    for (life, restarted) in [(2, false), (3, true), (4, false)] {
        let said = rig.give(SupervisorInput::Restart { node: NodeId(1) });
        assert_eq!(count(&said, |o| matches!(o, SupervisorOutput::Kill { cause: Cause::Operator, .. })), 1);
        let member = rig.member(1);
        if restarted {
            let config = ClusterConfig { restarts, ..config(2) };
            rig.give(SupervisorInput::Started { incarnation: Incarnation(2), config });
        }
        let said = rig.give(SupervisorInput::Ended { member, ending: Ending::Signal(9) });
        let recorded = |event: &&SupervisorEvent| match event {
            SupervisorEvent::Failed(failure) => failure.cause == Cause::Operator,
            _ => false,
        };
        assert!(events(&said).iter().any(recorded), "{said:?}");
        if life == 4 {
            // Asked again while the end is being recorded: it is the same life that comes.
            rig.give(SupervisorInput::Restart { node: NodeId(1) });
        }
        let said = rig.give(SupervisorInput::Captured { member, tail: Ok(None) });
        let next = Member { node: NodeId(1), incarnation: Incarnation(life) };
        assert_eq!(
            count(&said, |o| matches!(o, SupervisorOutput::Start { member, .. } if *member == next)),
            1
        );
        rig.lives[1] = life;
        let node = rig.supervisor.view().node(NodeId(1), rig.now).unwrap();
        assert_eq!((node.restarts, node.member, node.standing), (0, next, Standing::Starting));
        assert_eq!(node.failure.unwrap().cause, Cause::Operator);
        rig.now = rig.now.after_ns(10 * SECOND);
        rig.serve();
    }
    // The budget is whole; and what spoke against another life is mended with the wish.
    rig.lose(1, Ending::Signal(11));
    rig.serve();
    let said = rig.lose(1, Ending::Signal(11));
    assert!(gave_up_for(&said, "restarts.most"), "{said:?}");
    let node = rig.supervisor.view().node(NodeId(1), rig.now).unwrap();
    assert!(node.given_up.unwrap().contains("restarts.most"));
    rig.give(SupervisorInput::Restart { node: NodeId(1) });
    let node = rig.supervisor.view().node(NodeId(1), rig.now).unwrap();
    assert_eq!((node.restarts, node.given_up, node.standing), (0, None, Standing::Starting));
    // A node that is refused is given up, unless the operator, who gave it what it lacked, asked for another life.
    let mut beat = rig.beat_of(0);
    beat.facts.contract = 99;
    rig.give(SupervisorInput::Beat(Box::new(beat)));
    rig.give(SupervisorInput::Restart { node: NodeId(0) });
    rig.lose(0, Ending::Code(1));
    assert_eq!(rig.standing(0), Standing::Starting);
    assert!(rig.supervisor.view().node(NodeId(2), rig.now).is_none());
}

#[test]
fn a_drain_that_cannot_finish_says_so() {
    let mut rig = Rig::new(config(2));
    let mut beat = rig.beat_of(1);
    beat.facts.contract = 99;
    rig.give(SupervisorInput::Beat(Box::new(beat)));
    rig.lose(1, Ending::Code(1));
    rig.beat(0);
    let said = rig.give(SupervisorInput::Drain { bound_ns: None });
    assert!(
        said.iter().any(|o| matches!(o, SupervisorOutput::Kill { cause: Cause::Drained, .. })),
        "{said:?}"
    );
    let said = rig.give(SupervisorInput::Ended { member: rig.member(0), ending: Ending::Signal(15) });
    let error = said.iter().find_map(|output| match output {
        SupervisorOutput::Exit { error, .. } => error.clone(),
        _ => None,
    });
    assert!(error.unwrap().contains("replica 0 did not finish: too few"));
}

#[test]
fn what_was_asked_for_is_asked_for_again_in_the_next_life() {
    let mut rig = Rig::new(config(2));
    rig.serve();
    rig.give(SupervisorInput::Restart { node: NodeId(0) });
    rig.give(SupervisorInput::Ended { member: rig.member(1), ending: Ending::Unknown });
    let said = rig.give(SupervisorInput::Started { incarnation: Incarnation(2), config: config(2) });
    assert_eq!(count(&said, |o| matches!(o, SupervisorOutput::Kill { .. })), 1, "{said:?}");
    assert_eq!(count(&said, |o| matches!(o, SupervisorOutput::Capture { .. })), 1, "{said:?}");
}
