//! Answers that several ranks owe, made into one input of the engine.
//!
//! What an output asks of several ranks is done when the last of them has answered. If some could not, the fault of the lowest
//! such rank is the engine's; if they answered what should be equal and is not, they are told apart by name.

use crate::digest::Digest;
use crate::ids::{LoadId, Seq, StepId, index};
use crate::input::{Fault, Input, RowResult};
use crate::plant::{self, Bug};
use crate::topology::Topology;
use alloc::boxed::Box;
use alloc::collections::BTreeMap;
use alloc::vec::Vec;

/// What is answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Asked {
    /// The step of the boot sequence under way: one at a time.
    Boot,
    Load(LoadId),
    Need(StepId, u32, u32),
    Wave(StepId, u32, u32, u32),
    Step(StepId, u32),
    Telemetry,
    Release,
    Retire(Digest),
    Persist(Seq),
    Snapshot(Seq),
}

impl Asked {
    /// What an input answers; `None` if it answers nothing.
    pub(super) fn by(input: &Input) -> Option<Self> {
        Some(match input {
            Input::Reserved
            | Input::ManifestRead { .. }
            | Input::BaseLoaded { .. }
            | Input::RoutersLoaded
            | Input::BootFailed { .. } => Self::Boot,
            Input::Loaded { load, .. } => Self::Load(*load),
            Input::Need { step, attempt, layer, .. } => Self::Need(*step, *attempt, *layer),
            Input::Released { step, attempt, layer, wave } => Self::Wave(*step, *attempt, *layer, *wave),
            Input::Finished { step, attempt, .. } | Input::Failed { step, attempt, .. } => {
                Self::Step(*step, *attempt)
            }
            Input::TelemetryFlushed => Self::Telemetry,
            Input::ResourcesReleased => Self::Release,
            Input::Retired { blob } => Self::Retire(*blob),
            Input::Persisted { asked, .. } => Self::Persist(*asked),
            Input::SnapshotDurable { next } => Self::Snapshot(*next),
            Input::Boot { .. }
            | Input::Restarted { .. }
            | Input::Submit { .. }
            | Input::Cancel { .. }
            | Input::Switch { .. }
            | Input::Drain { .. }
            | Input::SnapshotWanted
            | Input::Tick
            | Input::Modify { .. }
            | Input::Wish { .. } => return None,
        })
    }
}

/// What became of an answer.
#[derive(Debug, PartialEq)]
pub(super) enum Gathered {
    /// Others still owe theirs.
    More,
    /// All have answered.
    Input(Box<Input>),
    /// A rank cannot go on with the step: the others are to give it up, and will answer so.
    GiveUp(StepId, u32),
    /// These ranks, a bit each, do not have what the others have.
    Diverged(u64),
}

/// The answers that are awaited.
#[derive(Clone, Debug, Default)]
pub(super) struct Gather {
    awaited: BTreeMap<Asked, Awaited>,
}

#[derive(Clone, Debug)]
struct Awaited {
    /// Ranks that owe an answer, a bit each.
    owed: u64,
    /// In the order of ranks.
    got: Vec<(u32, Input)>,
}

impl Gather {
    /// Awaits an answer of these ranks.
    pub(super) fn expect(&mut self, asked: Asked, ranks: u64) {
        let before = self.awaited.insert(asked, Awaited { owed: ranks, got: Vec::new() });
        assert!(before.is_none(), "{asked:?} is asked once at a time");
    }

    /// Awaits it if it is not already.
    pub(super) fn expect_once(&mut self, asked: Asked, ranks: u64) {
        self.awaited.entry(asked).or_insert(Awaited { owed: ranks, got: Vec::new() });
    }

    /// Takes a rank's answer. One that nobody awaits is late and means nothing.
    pub(super) fn take(&mut self, topology: &Topology, rank: u32, input: Input) -> Gathered {
        let Some(asked) = Asked::by(&input) else { return Gathered::More };
        let Some(awaited) = self.awaited.get_mut(&asked) else { return Gathered::More };
        if awaited.owed & (1 << rank) == 0 {
            return Gathered::More;
        }
        awaited.owed &= !(1 << rank);
        let failed = matches!(input, Input::Failed { .. });
        let first = failed && !awaited.got.iter().any(|(_, other)| matches!(other, Input::Failed { .. }));
        let place = awaited.got.partition_point(|&(other, _)| other < rank);
        awaited.got.insert(place, (rank, input));
        if awaited.owed == 0 || plant::is(Bug::GatherFirst) {
            let awaited = self.awaited.remove(&asked).expect("it was there");
            self.forget_parts(asked);
            return merge(topology, awaited.got);
        }
        if let (Asked::Step(step, attempt), true) = (asked, first) {
            return Gathered::GiveUp(step, attempt);
        }
        Gathered::More
    }

    /// A step that is over owes no needs and waves.
    fn forget_parts(&mut self, asked: Asked) {
        if let Asked::Step(step, attempt) = asked {
            self.awaited.retain(|other, _| {
                !matches!(*other, Asked::Need(s, a, _) | Asked::Wave(s, a, ..) if (s, a) == (step, attempt))
            });
        }
    }
}

/// One input of all ranks' answers.
fn merge(topology: &Topology, mut got: Vec<(u32, Input)>) -> Gathered {
    let inputs = || got.iter().map(|(_, input)| input);
    let fault = inputs().find(|input| fault_of(input).is_some());
    if matches!(fault, Some(Input::Failed { .. })) {
        // Those that gave up for another's sake say so; the one that could not go on says why.
        let own = inputs().find(|input| {
            fault_of(input).is_some_and(|fault| !matches!(fault, Fault::Device(what) if what == GIVEN_UP))
        });
        return Gathered::Input(Box::new(own.or(fault).expect("one is there").clone()));
    }
    if let Some(fault) = fault {
        return Gathered::Input(Box::new(fault.clone()));
    }
    if inputs().any(|input| matches!(input, Input::Finished { .. })) {
        return finish(topology, &got);
    }
    let odd = odd_ones(got.iter().map(|(rank, input)| (*rank, input)));
    let (_, last) = got.pop().expect("somebody was asked");
    if odd == 0 { Gathered::Input(Box::new(last)) } else { Gathered::Diverged(odd) }
}

/// What a rank says that gave a step up because another could not go on.
pub(super) const GIVEN_UP: &str = "given up: another rank cannot go on";

fn fault_of(input: &Input) -> Option<&Fault> {
    if let Input::Loaded { fault, .. } | Input::Persisted { fault, .. } = input {
        return fault.as_ref();
    }
    if let Input::BootFailed { fault } | Input::Failed { fault, .. } = input { Some(fault) } else { None }
}

/// The ranks of a stage have computed the same; the last stage's results, which continue those before it, are the step's.
fn finish(topology: &Topology, got: &[(u32, Input)]) -> Gathered {
    type Done<'a> = (u32, StepId, u32, &'a [RowResult], u64);
    let done = got.iter().filter_map(|(rank, input)| {
        let Input::Finished { step, attempt, rows, duration_ns } = input else { return None };
        Some((*rank, *step, *attempt, &rows[..], *duration_ns))
    });
    let done: Vec<Done<'_>> = done.collect();
    let of_stage = |stage: u32| done.iter().filter(move |done| topology.seat(done.0).pipeline == stage);
    let odd = (0..topology.pipeline).map(|stage| odd_ones(of_stage(stage).map(|done| (done.0, done.3))));
    let odd = odd.fold(0, |bits, more| bits | more);
    if odd != 0 {
        return Gathered::Diverged(odd);
    }
    let duration_ns = done.iter().map(|done| done.4).max().unwrap_or(0);
    let &(_, step, attempt, rows, _) = done.last().expect("somebody was asked");
    Gathered::Input(Box::new(Input::Finished { step, attempt, rows: rows.to_vec(), duration_ns }))
}

/// The ranks whose value is not that of more than half of them; all of them if no value is.
fn odd_ones<T: PartialEq>(values: impl Iterator<Item = (u32, T)>) -> u64 {
    let values: Vec<(u32, T)> = values.collect();
    let support = |value: &T| values.iter().filter(|(_, other)| other == value).count();
    let common = values.iter().find(|(_, value)| 2 * support(value) > values.len());
    let odd = values.iter().filter(|(_, value)| common.is_none_or(|(_, common)| value != common));
    odd.fold(0, |bits, (rank, _)| bits | 1 << rank)
}

/// Every rank of a replica, a bit each.
pub(super) fn everybody(topology: &Topology) -> u64 {
    u64::MAX >> (u64::BITS - topology.ranks())
}

/// The ranks that share a shelf, a bit each.
pub(super) fn on_shelf(topology: &Topology, shelf: u32) -> u64 {
    some(topology, |rank| {
        let seat = topology.seat(rank);
        seat.pipeline * topology.expert + seat.expert == shelf
    })
}

/// The ranks of a stage, a bit each.
pub(super) fn of_stage(topology: &Topology, stage: u32) -> u64 {
    some(topology, |rank| topology.seat(rank).pipeline == stage)
}

fn some(topology: &Topology, chosen: impl Fn(u32) -> bool) -> u64 {
    (0..topology.ranks()).filter(|&rank| chosen(rank)).fold(0, |bits, rank| bits | 1 << index(rank))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAIR: Topology = Topology { data: 1, tensor: 2, pipeline: 2, expert: 1 };

    fn finished(digests: &[u8]) -> Input {
        let rows = digests.iter().map(|&n| RowResult { token: None, stop: false, digest: Digest([n; 32]) });
        Input::Finished { step: StepId(3), attempt: 0, rows: rows.collect(), duration_ns: 7 }
    }

    fn failed(why: &str) -> Input {
        Input::Failed { step: StepId(3), attempt: 0, fault: Fault::Device(why.into()) }
    }

    fn step(answers: [Input; 4]) -> Vec<Gathered> {
        let mut gather = Gather::default();
        gather.expect(Asked::Step(StepId(3), 0), everybody(&PAIR));
        (0..).zip(answers).map(|(rank, answer)| gather.take(&PAIR, rank, answer)).collect()
    }

    #[test]
    fn the_last_stage_speaks_for_a_step_that_all_computed_alike() {
        let results = step([finished(&[1]), finished(&[1]), finished(&[2]), finished(&[2])]);
        assert_eq!(results[..3], [Gathered::More, Gathered::More, Gathered::More]);
        assert_eq!(results[3], Gathered::Input(Box::new(finished(&[2]))));
    }

    #[test]
    fn ranks_that_differ_within_a_stage_are_named() {
        let results = step([finished(&[1]), finished(&[1]), finished(&[2]), finished(&[3])]);
        assert_eq!(results[3], Gathered::Diverged(0b1100), "of two that differ nobody knows which is wrong");
        assert_eq!(odd_ones([(0, 5), (1, 5), (2, 6)].into_iter()), 0b100, "two against one");
    }

    #[test]
    fn a_rank_that_fails_makes_the_others_give_up_and_its_fault_is_the_step_s() {
        let results = step([finished(&[1]), failed("lost"), failed(GIVEN_UP), failed(GIVEN_UP)]);
        assert_eq!(results[1], Gathered::GiveUp(StepId(3), 0));
        assert_eq!(results[2], Gathered::More);
        assert_eq!(results[3], Gathered::Input(Box::new(failed("lost"))));
    }

    #[test]
    fn an_answer_counts_once_and_only_if_it_is_owed() {
        let mut gather = Gather::default();
        let loaded = |fault| Input::Loaded { load: LoadId(1), fault };
        assert_eq!(gather.take(&PAIR, 0, loaded(None)), Gathered::More, "nobody asked");
        gather.expect(Asked::Load(LoadId(1)), on_shelf(&PAIR, 1));
        assert_eq!(on_shelf(&PAIR, 1), 0b1100);
        for rank in [2, 2, 0] {
            assert_eq!(gather.take(&PAIR, rank, loaded(None)), Gathered::More);
        }
        let fault = Some(Fault::Io("EIO".into()));
        assert_eq!(gather.take(&PAIR, 3, loaded(fault.clone())), Gathered::Input(Box::new(loaded(fault))));
        assert_eq!(everybody(&PAIR), 0b1111);
        assert_eq!(of_stage(&PAIR, 0), 0b11);
    }
}
