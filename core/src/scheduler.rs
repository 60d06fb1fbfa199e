//! Who runs in the next step: continuous batching with chunked prefill, one generation a step.
//!
//! Requests go by (priority, deadline, arrival). Under pressure for pages the last in this order is preempted and
//! recomputed later, to the same bits; the oldest is never preempted, and every request fits alone, so something always
//! progresses.

use crate::engine::Context;
use crate::event::Event;
use crate::ids::{ExpertKey, Generation, Slot, index};
use crate::output::{Forward, Output, Row, SampleSpec};
use crate::pages::PageRun;
use crate::plant::{self, Bug};
use crate::random::{Purpose, draw};
use crate::request::Request;
use crate::state::State;
use crate::step::{Step, StepRow};
use alloc::vec::Vec;

impl State {
    /// Begins a step if none is running and somebody wants one.
    pub(crate) fn schedule(&mut self, cx: &mut Context<'_>) {
        if self.steps.current.is_some() || !self.serving() {
            return;
        }
        self.end_waiting(cx);
        if self.drain.as_ref().is_some_and(|drain| drain.over(cx.now)) {
            return;
        }
        let Some((generation, rows)) = self.choose(cx) else { return };
        let id = self.steps.next;
        self.steps.next.0 += 1;
        self.steps.current = Some(Step::new(id, generation, rows));
        self.forward(cx);
    }

    /// The rows of the next step. The first candidate that can run decides its generation.
    fn choose(&mut self, cx: &mut Context<'_>) -> Option<(Generation, Vec<StepRow>)> {
        // After a failure that might be anyone's, requests run alone until a step of theirs succeeds.
        let alone = self.requests.in_order().find(|&number| self.requests.is_alone(number));
        if let Some(number) = alone
            && let Some((generation, row)) =
                self.candidate(cx, number, self.config.limits.step_positions_max, &[])
        {
            return Some((generation, alloc::vec![row]));
        }
        let rows_max = index(self.config.limits.rows_max);
        let mut positions = self.config.limits.step_positions_max;
        let mut generation = None;
        let mut rows: Vec<StepRow> = Vec::new();
        let candidates: Vec<u64> =
            self.requests.in_order().filter(|&number| !self.requests.is_alone(number)).collect();
        for number in candidates {
            if rows.len() == rows_max || positions == 0 {
                break;
            }
            let wants = self.stretch(number, positions).map(|(wants, _)| wants);
            if wants.is_none() || generation.is_some_and(|generation| Some(generation) != wants) {
                continue;
            }
            let Some((wants, row)) = self.candidate(cx, number, positions, &rows) else { continue };
            positions -= row.len;
            generation = Some(wants);
            rows.push(row);
        }
        generation.map(|generation| (generation, rows))
    }

    fn candidate(
        &mut self,
        cx: &mut Context<'_>,
        number: u64,
        positions: u32,
        chosen: &[StepRow],
    ) -> Option<(Generation, StepRow)> {
        let (generation, end) = self.stretch(number, positions)?;
        Some((generation, self.row(cx, number, end, chosen)?))
    }

    /// The generation of a request's next positions and the end of what one step may compute of them; `None` while a
    /// pinned switch holds it.
    fn stretch(&self, number: u64, positions: u32) -> Option<(Generation, u32)> {
        let request = self.requests.by_number(number).expect("a candidate is unfinished");
        let end =
            request.target().min(request.computed.saturating_add(self.config.prefill_chunk.min(positions)));
        match request.generation_at(request.computed) {
            Some(segment) => {
                let forgotten = plant::is(Bug::GenerationForgotten);
                let generation = if forgotten { self.generations.current() } else { segment.generation };
                Some((generation, end.min(segment.until)))
            }
            None => {
                let end = end.min(self.generations.cut(&request.id).unwrap_or(u32::MAX));
                (end > request.computed).then(|| (self.generations.current(), end))
            }
        }
    }

    /// A request's row up to `end`, or as far as pages can be had.
    fn row(&mut self, cx: &mut Context<'_>, number: u64, end: u32, chosen: &[StepRow]) -> Option<StepRow> {
        let page_positions = self.plan().page_positions;
        let groups = self.plan().kv_groups.len();
        self.requests.live_mut(number).pages.resize_with(groups, PageRun::default);
        // Place by place in all groups, so that what there is serves whole positions.
        let end = loop {
            let runs = &self.requests.by_number(number).expect("a candidate is unfinished").pages;
            let shortest = runs.iter().enumerate().min_by_key(|(_, run)| run.end());
            let (group, place) = shortest.map(|(i, run)| (i, run.end())).expect("a plan has groups");
            let reached = place.saturating_mul(page_positions);
            if reached >= end || (self.pages.free_len() == 0 && !self.preempt_for(cx, number, chosen)) {
                break end.min(reached);
            }
            let page = self.pages.take().expect("one is free");
            self.requests.live_mut(number).pages[group].pages.push(page);
        };
        let request = self.requests.by_number(number).expect("a candidate is unfinished");
        let (start, target) = (request.computed, request.target());
        (end > start).then_some(StepRow { request: number, start, len: end - start, sample: end == target })
    }

    /// Takes the pages of the last request in order that may be preempted for this one.
    fn preempt_for(&mut self, cx: &mut Context<'_>, number: u64, chosen: &[StepRow]) -> bool {
        let oldest = self.requests.oldest();
        let victim = self
            .requests
            .in_order()
            .rev()
            // Whoever comes before may not be preempted, except by the oldest.
            .take_while(|&other| other != number || oldest == Some(number))
            .find(|&other| {
                other != number
                    && Some(other) != oldest
                    && chosen.iter().all(|row| row.request != other)
                    && self.requests.by_number(other).is_some_and(Request::holds_pages)
            });
        let Some(victim) = victim else { return false };
        let request = self.requests.live_mut(victim);
        request.computed = 0;
        cx.event(Event::Preempted { id: request.id.clone() });
        if plant::is(Bug::PagesLost) {
            request.pages.clear();
        }
        self.pages.give_back(&mut request.pages);
        true
    }

    /// Sends the running step, or its next attempt, to the backend.
    pub(crate) fn forward(&self, cx: &mut Context<'_>) {
        let step = self.steps.current.as_ref().expect("a step is running");
        let all = plant::is(Bug::MaskIgnored).then(|| self.plan().tier_set(&[]).ok()).flatten();
        let tiers = all.unwrap_or_else(|| self.generations.tiers(step.generation).to_vec());
        let resident = self.resident(&tiers, step.generation);
        let foresees = step.decodes() && self.steps.comparison.foresees(self.config.foresight);
        cx.say(Output::Forward(Forward {
            step: step.id,
            attempt: step.attempt,
            generation: step.generation,
            rows: step.rows.iter().map(|row| self.output_row(row)).collect(),
            foresee: resident.is_none() && foresees,
            resident,
            tiers,
        }));
    }

    fn output_row(&self, row: &StepRow) -> Row {
        let request = self.requests.by_number(row.request).expect("a row's request outlives the step");
        let end = row.start + row.len;
        let sample = row.sample.then(|| {
            let sampling = request.body.sampling.clone();
            let history: Vec<u32> = if sampling.repetition_penalty.to_bits() == 1.0f32.to_bits() {
                Vec::new()
            } else {
                (0..row.start).map(|position| request.token_at(position)).collect()
            };
            // The draw is named by the position that the new token will have.
            SampleSpec { draw: draw(sampling.seed, Purpose::Sample, 0, u64::from(end)), sampling, history }
        });
        let places = end.div_ceil(self.plan().page_positions);
        Row {
            request: row.request,
            start: row.start,
            tokens: (row.start..end).map(|position| request.token_at(position)).collect(),
            pages: request.pages.iter().map(|run| run.until(places)).collect(),
            sample,
        }
    }

    /// Every expert of the tiers with its slot, if all are there. They stay: nothing is evicted without a need.
    fn resident(&self, tiers: &[u32], generation: Generation) -> Option<Vec<(ExpertKey, Slot)>> {
        self.plan()
            .experts(tiers)
            .map(|key| match self.residency.hot.slot_of(self.held(key, generation)) {
                Some((slot, true)) => Some((key, slot)),
                _ => None,
            })
            .collect()
    }
}
