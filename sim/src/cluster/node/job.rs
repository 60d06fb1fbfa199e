//! A step under way on a simulated device, of whichever arithmetic.

use super::work::{Step, Work};
use crate::real::{Ask, Memory, Rank, Running};
use lite_llm_core::cluster::message::Tag;
use lite_llm_core::ids::{ExpertKey, Slot, StepId};
use lite_llm_core::output::Forward;
use lite_llm_core::plan::ModelPlan;
use lite_llm_model::Provided;
use std::collections::VecDeque;
use std::sync::Arc;

/// A step.
#[derive(Debug)]
pub(super) enum Job {
    /// Of digests.
    Digest(Work),
    /// Of the tiny model.
    Real(RealWork),
}

/// A step of the real arithmetic, and what waits to be given to it.
#[derive(Debug)]
pub(super) struct RealWork {
    forward: Forward,
    running: Running,
    waits: Option<Waits>,
    /// Experts of the wave under way.
    provided: Vec<(ExpertKey, Slot)>,
    queue: VecDeque<Provided>,
    given: Vec<(u32, u32, Vec<u8>)>,
}

#[derive(Clone, Copy, Debug)]
enum Waits {
    Provided,
    Given,
}

impl Job {
    pub(super) fn real(rank: &Arc<Rank>, memory: &Memory, forward: Forward) -> Self {
        let running = Running::begin(Arc::clone(rank), Arc::clone(memory), forward.clone());
        let (waits, provided, queue, given) = (None, Vec::new(), VecDeque::new(), Vec::new());
        Self::Real(RealWork { forward, running, waits, provided, queue, given })
    }

    pub(super) const fn forward(&self) -> &Forward {
        match self {
            Self::Digest(work) => &work.forward,
            Self::Real(work) => &work.forward,
        }
    }

    pub(super) const fn provided(&self) -> &Vec<(ExpertKey, Slot)> {
        match self {
            Self::Digest(work) => &work.provided,
            Self::Real(work) => &work.provided,
        }
    }

    pub(super) const fn id(&self) -> (StepId, u32) {
        let forward = self.forward();
        (forward.step, forward.attempt)
    }

    /// An expert is in its slot.
    pub(super) fn provide(&mut self, wave: u32, wave_len: u32, expert: ExpertKey, slot: Slot) {
        match self {
            Self::Digest(work) => work.provide(wave, wave_len, expert, slot),
            Self::Real(work) => {
                work.provided.push((expert, slot));
                work.queue.push_back(Provided { wave, wave_len, expert, slot });
            }
        }
    }

    /// Data of another rank; whether it was for where this one is.
    pub(super) fn hear(&mut self, from: u32, tag: Tag, bytes: &[u8]) -> bool {
        match self {
            Self::Digest(work) => work.hear(from, tag, bytes),
            Self::Real(work) => {
                work.given.push((from, tag.exchange, bytes.to_vec()));
                true
            }
        }
    }

    /// Goes on as far as it can.
    pub(super) fn go_on(
        &mut self,
        plan: &ModelPlan,
        read: impl Fn(ExpertKey, Slot) -> u64,
        holds: impl Fn(ExpertKey) -> bool,
    ) -> Step {
        match self {
            Self::Digest(work) => work.go_on(plan, read, holds),
            Self::Real(work) => work.go_on(),
        }
    }
}

impl RealWork {
    fn go_on(&mut self) -> Step {
        loop {
            match self.waits {
                Some(Waits::Provided) => match self.queue.pop_front() {
                    Some(provided) => self.running.provide(provided),
                    None => return Step::Wait,
                },
                Some(Waits::Given) if self.given.is_empty() => return Step::Wait,
                Some(Waits::Given) => self.running.give(std::mem::take(&mut self.given)),
                None => {}
            }
            self.waits = None;
            match self.running.next() {
                Ask::Need(layer, experts, foreseen) => return Step::Need(layer, experts, foreseen),
                Ask::Provided => self.waits = Some(Waits::Provided),
                Ask::Given => self.waits = Some(Waits::Given),
                Ask::Give(to, exchange, bytes) => {
                    let Forward { step, attempt, .. } = self.forward;
                    return Step::Send(vec![(to, Tag { step, attempt, exchange }, bytes)]);
                }
                Ask::Released(layer, wave) => {
                    self.provided.clear();
                    return Step::Released(layer, wave);
                }
                Ask::Ended(Ok(rows)) => return Step::Finished(rows),
                Ask::Ended(Err(error)) => {
                    unreachable!("nobody stops it, and its weights are finite: {error}")
                }
            }
        }
    }
}
