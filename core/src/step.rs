//! The step that is running: its experts wave by wave, its end, its failures.

use crate::engine::Context;
use crate::event::Event;
use crate::foresight::{Comparison, Verdict};
use crate::ids::{ExpertKey, Generation, Slot, StepId, index, len32};
use crate::input::{Fault, RowResult};
use crate::output::{FinishReason, Output};
use crate::residency::Held;
use crate::state::State;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::{format, string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// Steps between two halvings of the counts of use: few, so that what a text is about now outweighs what it was about.
/// docs/performance.md has what other numbers gave.
const AGE_EVERY: u64 = 16;

/// Past and present of the compute backend.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Steps {
    pub(crate) current: Option<Step>,
    pub(crate) next: StepId,
    /// Measured nanoseconds of one decode step under a TierSet: a moving average with weight 1/8.
    pub(crate) cost_ns: BTreeMap<Vec<u32>, u64>,
    /// Whether foresight pays.
    pub(crate) comparison: Comparison,
}

/// A running step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Step {
    pub(crate) id: StepId,
    pub(crate) attempt: u32,
    pub(crate) generation: Generation,
    pub(crate) rows: Vec<StepRow>,
    need: Option<Need>,
    /// Given up, and why.
    aborted: Option<Abort>,
    hits: u32,
    misses: u32,
    /// Loads that foresight began, and those of them that were needed.
    ahead: u32,
    foreseen: u32,
}

/// A row of a running step.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct StepRow {
    pub(crate) request: u64,
    pub(crate) start: u32,
    pub(crate) len: u32,
    pub(crate) sample: bool,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
enum Abort {
    /// An expert cannot be had.
    Fault(String),
    /// The drain's bound is over.
    Drain,
}

/// The experts that a layer waits for.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Need {
    layer: u32,
    wave: u32,
    /// Those not yet released.
    remaining: BTreeSet<ExpertKey>,
    /// Those of this wave, pinned.
    members: BTreeMap<ExpertKey, Slot>,
    /// How many are in the arena, or on their way, by foresight alone.
    foreseen: u32,
}

impl Step {
    pub(crate) const fn new(id: StepId, generation: Generation, rows: Vec<StepRow>) -> Self {
        let (need, aborted) = (None, None);
        Self { id, attempt: 0, generation, rows, need, aborted, hits: 0, misses: 0, ahead: 0, foreseen: 0 }
    }

    /// Whether each row is one position: a step whose time can be compared with others'.
    pub(crate) fn decodes(&self) -> bool {
        self.rows.iter().all(|row| row.len == 1)
    }
}

impl State {
    /// The running step, if a message is of it; anything else is late and means nothing.
    fn step_of(&mut self, step: StepId, attempt: u32) -> Option<&mut Step> {
        self.steps.current.as_mut().filter(|s| s.id == step && s.attempt == attempt)
    }

    pub(crate) fn need(
        &mut self,
        cx: &mut Context<'_>,
        step: StepId,
        attempt: u32,
        layer: u32,
        experts: Vec<ExpertKey>,
        foreseen: Vec<ExpertKey>,
    ) {
        let Some(current) = self.step_of(step, attempt) else { return };
        assert!(current.need.is_none(), "a layer is released before the next one needs");
        let generation = current.generation;
        let tiers = self.generations.tiers(generation);
        for key in &experts {
            assert!(self.plan().has(*key) && key.layer == layer, "no such expert: {key:?}");
            assert!(tiers.contains(&key.tier), "a masked tier is never selected: {key:?}");
        }
        let plausible = |key: &ExpertKey| self.plan().has(*key) && tiers.contains(&key.tier);
        assert!(foreseen.iter().all(plausible), "what is foreseen can be selected: {foreseen:?}");
        let foreseen = foreseen.into_iter().map(|key| self.held(key, generation)).collect();
        let (ahead, used) = self.residency.foresee(foreseen, |held| experts.contains(&held.0));
        let current = self.steps.current.as_mut().expect("it was there");
        current.ahead += ahead;
        current.foreseen += used;
        let remaining: BTreeSet<ExpertKey> = experts.into_iter().collect();
        if !remaining.is_empty() {
            current.need = Some(Need { layer, wave: 0, remaining, members: BTreeMap::new(), foreseen: used });
            self.begin_wave(cx);
        }
    }

    /// Chooses and pins the experts of the next wave, if a layer waits and any slot can be had.
    pub(crate) fn begin_wave(&mut self, cx: &mut Context<'_>) {
        let Some(step) = self.steps.current.as_ref().filter(|s| s.aborted.is_none()) else { return };
        let Some(need) = step.need.as_ref().filter(|need| need.members.is_empty()) else { return };
        let (first, remaining) = (need.wave == 0, need.remaining.clone());
        let generation = step.generation;
        let mut members = BTreeMap::new();
        for key in &remaining {
            if let Some((slot, _)) = self.residency.hot.slot_of(self.held(*key, generation)) {
                self.residency.hot.pin(slot);
                members.insert(*key, slot);
            }
        }
        // A load that foresight began may have failed meanwhile.
        let hits = len32(members.len()).saturating_sub(need.foreseen);
        // A bit for each shelf whose slots are all in use.
        let mut full = 0u64;
        for key in &remaining {
            let shelf = 1u64 << self.shelf(*key);
            if full & shelf != 0 || members.contains_key(key) {
                continue;
            }
            match self.demand(self.held(*key, generation)) {
                Some(slot) => {
                    self.residency.hot.pin(slot);
                    members.insert(*key, slot);
                }
                None => full |= shelf,
            }
        }
        let step = self.steps.current.as_mut().expect("it was there");
        if first && !members.is_empty() {
            step.hits += hits;
            step.misses += len32(remaining.len()) - hits;
        }
        let need = step.need.as_mut().expect("it was there");
        need.members = members;
        let ready: Vec<ExpertKey> = need.members.keys().copied().collect();
        for key in ready {
            self.provide(cx, self.held(key, generation));
        }
    }

    /// The layer and wave that the running step waits for, and a bit for each shelf that has experts of it.
    pub(crate) fn wave(&self) -> Option<(u32, u32, u64)> {
        let need = self.steps.current.as_ref()?.need.as_ref()?;
        let shelves = need.members.keys().fold(0, |bits, &key| bits | 1 << self.shelf(key));
        Some((need.layer, need.wave, shelves))
    }

    /// Whether the running step wants nothing more of the layer that it is in.
    pub(crate) fn has_what_it_needs(&self) -> bool {
        self.steps.current.as_ref().is_some_and(|step| {
            let all = |need: &Need| need.members.len() == need.remaining.len();
            step.aborted.is_none() && step.need.as_ref().is_none_or(all)
        })
    }

    /// Hands an expert to the step if it is there and of the wave.
    pub(crate) fn provide(&self, cx: &mut Context<'_>, held: Held) {
        let Some(step) = self.steps.current.as_ref().filter(|s| s.aborted.is_none()) else { return };
        let Some(need) = &step.need else { return };
        let (expert, _) = held;
        let Some(&slot) = need.members.get(&expert) else { return };
        if self.residency.hot.slot_of(held) == Some((slot, true)) {
            let shelf = self.shelf(expert);
            let wave_len = match self.shelves() {
                1 => need.members.len(),
                _ => need.members.keys().filter(|&&key| self.shelf(key) == shelf).count(),
            };
            cx.say(Output::Provide {
                step: step.id,
                attempt: step.attempt,
                layer: need.layer,
                wave: need.wave,
                wave_len: len32(wave_len),
                expert,
                slot,
            });
        }
    }

    pub(crate) fn released(
        &mut self,
        cx: &mut Context<'_>,
        step: StepId,
        attempt: u32,
        layer: u32,
        wave: u32,
    ) {
        let Some(current) = self.step_of(step, attempt) else { return };
        let Some(mut need) = current.need.take() else { return };
        assert!(need.layer == layer && need.wave == wave, "only the wave under way is released");
        for (key, slot) in core::mem::take(&mut need.members) {
            need.remaining.remove(&key);
            self.residency.hot.unpin(slot);
        }
        if !need.remaining.is_empty() {
            need.wave += 1;
            self.steps.current.as_mut().expect("it was there").need = Some(need);
            self.begin_wave(cx);
        }
    }

    /// An expert cannot be had: a step that needs it is given up.
    pub(crate) fn lost(&mut self, cx: &mut Context<'_>, key: ExpertKey, reason: &str) {
        let Some(step) = self.steps.current.as_mut() else { return };
        if step.need.as_ref().is_some_and(|need| need.members.contains_key(&key)) {
            if let Some(need) = &mut step.need {
                need.members.remove(&key);
            }
            if step.aborted.is_none() {
                step.aborted = Some(Abort::Fault(reason.into()));
                cx.say(Output::Abort { step: step.id, attempt: step.attempt });
            }
        }
    }

    /// Gives the running step up because the process is about to stop.
    pub(crate) fn abort_for_drain(&mut self, cx: &mut Context<'_>) {
        if let Some(step) = self.steps.current.as_mut()
            && step.aborted.is_none()
        {
            step.aborted = Some(Abort::Drain);
            cx.say(Output::Abort { step: step.id, attempt: step.attempt });
        }
    }

    pub(crate) fn finished(
        &mut self,
        cx: &mut Context<'_>,
        step: StepId,
        attempt: u32,
        results: &[RowResult],
        duration_ns: u64,
    ) {
        if self.step_of(step, attempt).is_none() {
            return;
        }
        let step = self.steps.current.take().expect("it was there");
        assert!(step.need.is_none(), "a step has released what it needed before it finishes");
        assert_eq!(results.len(), step.rows.len(), "a result for each row");
        self.measure(cx, &step, duration_ns);
        if (step.id.0 + 1).is_multiple_of(AGE_EVERY) {
            self.residency.age();
        }
        let positions = step.rows.iter().map(|row| row.len).sum();
        let Step { id, hits, misses, ahead, foreseen, .. } = step;
        cx.event(Event::StepDone { step: id, positions, hits, misses, ahead, foreseen });
        for (row, result) in step.rows.iter().zip(results) {
            self.row_done(cx, row, step.generation, result);
        }
    }

    /// Takes the measured cost of a pure decode step into the average of its TierSet, and into the comparison of such steps.
    fn measure(&mut self, cx: &mut Context<'_>, step: &Step, duration_ns: u64) {
        if !step.decodes() {
            return;
        }
        let tiers = self.generations.tiers(step.generation).to_vec();
        let cost = self.steps.cost_ns.entry(tiers).or_insert(duration_ns);
        *cost = *cost - *cost / 8 + duration_ns / 8;
        // Where all is there, there is nothing to foresee.
        let needs = step.hits + step.misses > 0;
        if needs && let Some(verdict) = self.steps.comparison.took(len32(step.rows.len()), duration_ns) {
            let Verdict { pays, with_ns, without_ns } = verdict;
            cx.event(Event::Compared { pays, with_ns, without_ns });
        }
    }

    pub(crate) fn failed(&mut self, cx: &mut Context<'_>, step: StepId, attempt: u32, fault: Fault) {
        let retries_max = self.config.limits.retries_max;
        let Some(current) = self.step_of(step, attempt) else { return };
        current.need = None;
        let aborted = current.aborted.take();
        self.residency.release_all();
        match (aborted, fault) {
            (Some(Abort::Drain), _) => self.steps.current = None,
            (Some(Abort::Fault(reason)), _) => self.isolate(cx, &reason),
            (None, Fault::NonFinite { row, layer, position }) => {
                let step = self.steps.current.take().expect("it was there");
                let number = step.rows[index(row)].request;
                let reason = format!("NaN or infinity in layer {layer} at position {position}");
                self.finish(cx, number, FinishReason::Fault(reason));
            }
            (None, _) if attempt < retries_max => {
                let current = self.steps.current.as_mut().expect("it was there");
                current.attempt += 1;
                cx.event(Event::StepRetried { step, attempt: attempt + 1 });
                self.forward(cx);
            }
            (None, fault) => self.isolate(cx, &format!("{fault}")),
        }
    }

    /// Ends the step. One request is at fault, but which? Alone, the guilty one fails again and is ended.
    fn isolate(&mut self, cx: &mut Context<'_>, reason: &str) {
        let step = self.steps.current.take().expect("a step is running");
        if let [row] = step.rows.as_slice() {
            self.finish(cx, row.request, FinishReason::Fault(reason.into()));
        } else {
            for row in &step.rows {
                self.requests.run_alone(row.request);
            }
        }
    }
}
