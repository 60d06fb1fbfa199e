//! Requests: acceptance, attachment, tokens, ends. The id is the client's idempotency key.

use crate::digest::Digest;
use crate::engine::Context;
use crate::ids::{Generation, RequestId, index, len32};
use crate::input::{Body, Priority, RowResult, Sampling};
use crate::lifecycle::Lifecycle;
use crate::output::{FinishReason, Output};
use crate::pages::PageRun;
use crate::plan::ModelPlan;
use crate::state::State;
use crate::step::StepRow;
use crate::time::Time;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::{format, string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// Stop texts of one request, and bytes of each.
const STOPS_MAX: usize = 16;
const STOP_BYTES_MAX: usize = 256;

/// An unfinished request.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) number: u64,
    pub(crate) id: RequestId,
    pub(crate) body: Body,
    pub(crate) deadline: Option<Time>,
    /// Generated so far.
    pub(crate) tokens: Vec<u32>,
    /// Positions whose keys and values are in the pages.
    pub(crate) computed: u32,
    /// For each group of layers, or nothing.
    pub(crate) pages: Vec<PageRun>,
    /// Under which generation each position was computed first, and is for ever.
    pub(crate) segments: Vec<Segment>,
    /// Some step with it failed: it runs alone until a step succeeds.
    pub(crate) alone: bool,
    /// Ends with the step that is running.
    ending: Option<FinishReason>,
}

/// A stretch of positions, from the end of the one before it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Segment {
    /// The first position that is not in it.
    pub until: u32,
    /// Under which they were computed.
    pub generation: Generation,
}

/// A finished request, kept for a while.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Finished {
    pub(crate) id: RequestId,
    body: Digest,
    pub(crate) tokens: Vec<u32>,
    pub(crate) reason: FinishReason,
    pub(crate) segments: Vec<Segment>,
    at: Time,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
enum Entry {
    Live(u64),
    Finished(u64),
    Expired,
}

/// The place of a request among those that want to run: smaller goes first.
type Rank = (Priority, Time, u64);

/// Every request that is known.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Requests {
    live: BTreeMap<u64, Request>,
    finished: BTreeMap<u64, Finished>,
    tombstones: VecDeque<RequestId>,
    by_id: BTreeMap<RequestId, Entry>,
    ranks: BTreeSet<Rank>,
    deadlines: BTreeSet<(Time, u64)>,
    next: u64,
}

impl Request {
    /// Positions that must be computed before the next token is known.
    pub(crate) fn target(&self) -> u32 {
        len32(self.body.prompt.len() + self.tokens.len())
    }

    /// The token at a position.
    pub(crate) fn token_at(&self, position: u32) -> u32 {
        let prompt = &self.body.prompt;
        let position = index(position);
        prompt.get(position).copied().unwrap_or_else(|| self.tokens[position - prompt.len()])
    }

    /// Positions that are computed by the time it ends.
    fn positions_max(&self, plan: &ModelPlan) -> u32 {
        positions_max(&self.body, plan)
    }

    /// Pages with which it can be finished, if it has to position by position.
    pub(crate) fn pages_alone(&self, plan: &ModelPlan) -> u32 {
        plan.pages_for(self.positions_max(plan), 1)
    }

    /// Whether it keeps a page from others.
    pub(crate) fn holds_pages(&self) -> bool {
        self.pages.iter().any(|run| !run.pages.is_empty())
    }

    /// Whether no model of this plan can have accepted it.
    pub(crate) fn beyond(&self, plan: &ModelPlan) -> bool {
        self.target() > plan.context || self.body.prompt.iter().any(|&token| token >= plan.vocab)
    }

    /// The generation of a position that was computed before.
    pub(crate) fn generation_at(&self, position: u32) -> Option<Segment> {
        self.segments.iter().find(|segment| position < segment.until).copied()
    }

    fn rank(&self) -> Rank {
        (self.body.priority, self.deadline.unwrap_or(Time(u64::MAX)), self.number)
    }

    fn computed_to(&mut self, until: u32, generation: Generation) {
        self.computed = until;
        match self.segments.last_mut() {
            Some(last) if last.until >= until => {}
            Some(last) if last.generation == generation => last.until = until,
            _ => self.segments.push(Segment { until, generation }),
        }
    }
}

/// The last token is never computed: nothing follows it.
fn positions_max(body: &Body, plan: &ModelPlan) -> u32 {
    let positions = len32(body.prompt.len()).saturating_add(body.max_tokens).saturating_sub(1);
    positions.min(plan.context)
}

impl Requests {
    /// Unfinished requests, in order of acceptance.
    pub(crate) fn live(&self) -> impl Iterator<Item = &Request> {
        self.live.values()
    }

    pub(crate) fn by_number(&self, number: u64) -> Option<&Request> {
        self.live.get(&number)
    }

    pub(crate) fn live_mut(&mut self, number: u64) -> &mut Request {
        self.live.get_mut(&number).expect("the request is unfinished")
    }

    pub(crate) fn live_by_id(&self, id: &RequestId) -> Option<&Request> {
        match self.by_id.get(id) {
            Some(Entry::Live(number)) => self.live.get(number),
            _ => None,
        }
    }

    pub(crate) fn finished_by_id(&self, id: &RequestId) -> Option<&Finished> {
        match self.by_id.get(id) {
            Some(Entry::Finished(number)) => self.finished.get(number),
            _ => None,
        }
    }

    /// Numbers of the unfinished, who goes first first.
    pub(crate) fn in_order(&self) -> impl DoubleEndedIterator<Item = u64> {
        self.ranks.iter().map(|&(_, _, number)| number)
    }

    /// The unfinished request that was accepted first.
    pub(crate) fn oldest(&self) -> Option<u64> {
        self.live.first_key_value().map(|(&number, _)| number)
    }

    pub(crate) fn idle(&self) -> bool {
        self.live.is_empty()
    }

    pub(crate) fn next_deadline(&self) -> Option<Time> {
        self.deadlines.first().map(|&(time, _)| time)
    }

    pub(crate) fn forget_pages(&mut self) {
        for request in self.live.values_mut() {
            request.computed = 0;
            request.pages.clear();
        }
    }

    pub(crate) fn run_alone(&mut self, number: u64) {
        if let Some(request) = self.live.get_mut(&number) {
            request.alone = true;
        }
    }

    pub(crate) fn is_alone(&self, number: u64) -> bool {
        self.live.get(&number).is_some_and(|request| request.alone)
    }

    /// Generations that some stream, unfinished or kept, was computed under.
    pub(crate) fn generations(&self) -> BTreeSet<Generation> {
        let live = self.live.values().flat_map(|r| &r.segments);
        live.chain(self.finished.values().flat_map(|f| &f.segments)).map(|s| s.generation).collect()
    }

    fn accept(&mut self, now: Time, id: RequestId, body: Body) {
        let number = self.next;
        self.next += 1;
        let request = Request {
            number,
            id: id.clone(),
            deadline: body.deadline_ns.map(|ns| now.after_ns(ns)),
            body,
            tokens: Vec::new(),
            computed: 0,
            pages: Vec::new(),
            segments: Vec::new(),
            alone: false,
            ending: None,
        };
        self.ranks.insert(request.rank());
        self.deadlines.extend(request.deadline.map(|deadline| (deadline, number)));
        self.by_id.insert(id, Entry::Live(number));
        self.live.insert(number, request);
    }

    fn retire(&mut self, now: Time, number: u64, reason: FinishReason) -> Request {
        let request = self.live.remove(&number).expect("only what is unfinished ends");
        self.ranks.remove(&request.rank());
        if let Some(deadline) = request.deadline {
            self.deadlines.remove(&(deadline, number));
        }
        self.by_id.insert(request.id.clone(), Entry::Finished(number));
        let finished = Finished {
            id: request.id.clone(),
            body: Digest::of_value(&request.body),
            tokens: request.tokens.clone(),
            reason,
            segments: request.segments.clone(),
            at: now,
        };
        self.finished.insert(number, finished);
        request
    }

    /// Turns finished streams above the configured count or age into tombstones, and forgets the oldest of those.
    fn bury(&mut self, now: Time, count_max: usize, age_ns: u64, tombstones_max: usize) {
        while let Some((&number, oldest)) = self.finished.first_key_value() {
            if self.finished.len() <= count_max && now <= oldest.at.after_ns(age_ns) {
                break;
            }
            let finished = self.finished.remove(&number).expect("it was there");
            self.by_id.insert(finished.id.clone(), Entry::Expired);
            self.tombstones.push_back(finished.id);
        }
        while self.tombstones.len() > tombstones_max {
            if let Some(id) = self.tombstones.pop_front() {
                self.by_id.remove(&id);
            }
        }
    }
}

impl State {
    pub(crate) fn submit(&mut self, cx: &mut Context<'_>, id: RequestId, body: Body, from: u32) {
        match self.requests.by_id.get(&id) {
            Some(Entry::Expired) => {
                self.refuse(
                    cx,
                    id,
                    "expired: the stream was finished and is no longer kept; use a new id".into(),
                );
            }
            Some(Entry::Live(number)) => {
                let request = &self.requests.live[number];
                let same = request.body == body;
                let tokens = request.tokens.clone();
                self.attach(cx, id, same, from, &tokens, None);
            }
            Some(Entry::Finished(number)) => {
                let finished = &self.requests.finished[number];
                let same = finished.body == Digest::of_value(&body);
                let (tokens, reason) = (finished.tokens.clone(), finished.reason.clone());
                self.attach(cx, id, same, from, &tokens, Some(reason));
            }
            None => match self.admit(&body, from) {
                Ok(()) => {
                    self.requests.accept(cx.now, id.clone(), body);
                    cx.say(Output::Accepted { id, generated: 0, after: cx.seq });
                }
                Err(reason) => self.refuse(cx, id, reason),
            },
        }
    }

    fn refuse(&self, cx: &mut Context<'_>, id: RequestId, reason: String) {
        cx.say(Output::Refuse { id: Some(id), reason, after: cx.seq });
    }

    /// Sends a stream that exists again, from an offset on.
    fn attach(
        &self,
        cx: &mut Context<'_>,
        id: RequestId,
        same: bool,
        from: u32,
        tokens: &[u32],
        reason: Option<FinishReason>,
    ) {
        let generated = len32(tokens.len());
        if !same {
            let reason = "this id belongs to a request with another body; use a new id for a new request";
            return self.refuse(cx, id, reason.into());
        }
        if from > generated {
            return self.refuse(
                cx,
                id,
                format!("offset {from} is beyond the {generated} tokens of the stream"),
            );
        }
        cx.say(Output::Accepted { id: id.clone(), generated, after: cx.seq });
        for (offset, &token) in (0..).zip(tokens).skip(index(from)) {
            cx.say(Output::Token { id: id.clone(), offset, token, after: cx.seq });
        }
        if let Some(reason) = reason {
            cx.say(Output::Finish { id, reason, generated, after: cx.seq });
        }
    }

    /// Whether a new request can be served to its end.
    fn admit(&self, body: &Body, from: u32) -> Result<(), String> {
        match self.lifecycle {
            Lifecycle::Active | Lifecycle::Reconfiguring => {}
            Lifecycle::Draining | Lifecycle::Stopped => return Err("draining: no new requests".into()),
            Lifecycle::Boot | Lifecycle::Loading | Lifecycle::Warm | Lifecycle::Recovering => {
                return Err("not ready: submit again once the engine is".into());
            }
        }
        let limits = &self.config.limits;
        if self.requests.live.len() >= index(limits.requests_max) {
            return Err(format!(
                "busy: {} requests are unfinished (limits.requests_max); submit again later",
                limits.requests_max
            ));
        }
        if from > 0 {
            return Err(format!("offset {from} of a stream that does not exist; submit with offset 0"));
        }
        let plan = self.plan();
        check_body(body, plan)?;
        let pages = plan.pages_for(positions_max(body, plan), 1);
        if pages > self.carving.pages {
            return Err(format!(
                "needs {pages} pages of KV cache, there are {}: ask for fewer tokens, or give at least {} bytes more memory",
                self.carving.pages,
                u64::from(pages - self.carving.pages).saturating_mul(plan.page_bytes)
            ));
        }
        Ok(())
    }

    pub(crate) fn cancel(&mut self, cx: &mut Context<'_>, id: RequestId) {
        match self.requests.by_id.get(&id).copied() {
            Some(Entry::Live(number)) => self.end(cx, number, FinishReason::Cancelled),
            Some(Entry::Finished(_) | Entry::Expired) => {}
            None => self.refuse(cx, id, "there is no such request to cancel".into()),
        }
    }

    /// Ends the requests whose time is over, and lets go of old streams.
    pub(crate) fn expire(&mut self, cx: &mut Context<'_>) {
        if !self.serving() {
            return;
        }
        while let Some(&(time, number)) = self.requests.deadlines.first() {
            if cx.now < time {
                break;
            }
            self.requests.deadlines.remove(&(time, number));
            self.end(cx, number, FinishReason::Deadline);
        }
        let limits = &self.config.limits;
        let (count, tombstones) = (index(limits.finished_max), index(limits.tombstones_max));
        self.requests.bury(cx.now, count, limits.finished_age_ns, tombstones);
    }

    /// Ends a request now, or with the step that holds it.
    fn end(&mut self, cx: &mut Context<'_>, number: u64, reason: FinishReason) {
        let stepping =
            self.steps.current.as_ref().is_some_and(|s| s.rows.iter().any(|r| r.request == number));
        if stepping {
            self.requests.live_mut(number).ending.get_or_insert(reason);
        } else {
            self.finish(cx, number, reason);
        }
    }

    /// Ends those that waited for a step which is no more.
    pub(crate) fn end_waiting(&mut self, cx: &mut Context<'_>) {
        let waiting: Vec<(u64, FinishReason)> =
            self.requests.live().filter_map(|r| r.ending.clone().map(|reason| (r.number, reason))).collect();
        for (number, reason) in waiting {
            self.finish(cx, number, reason);
        }
    }

    pub(crate) fn finish(&mut self, cx: &mut Context<'_>, number: u64, reason: FinishReason) {
        let mut request = self.requests.retire(cx.now, number, reason.clone());
        self.pages.give_back(&mut request.pages);
        let generated = len32(request.tokens.len());
        cx.say(Output::Finish { id: request.id, reason, generated, after: cx.seq });
    }

    /// Takes the result of a request's row.
    pub(crate) fn row_done(
        &mut self,
        cx: &mut Context<'_>,
        row: &StepRow,
        generation: Generation,
        result: &RowResult,
    ) {
        let plan = self.plan.as_ref().expect("a step had a plan");
        let request = self.requests.live_mut(row.request);
        request.computed_to(row.start + row.len, generation);
        for (window, run) in plan.kv_groups.iter().zip(&mut request.pages) {
            self.pages.recycle(run, plan.first_place(*window, request.computed));
        }
        request.alone = false;
        if let Some(reason) = request.ending.take() {
            return self.finish(cx, row.request, reason);
        }
        if !row.sample {
            return;
        }
        let token = result.token.expect("a row that samples has a token");
        assert!(token < plan.vocab, "token {token} is not of the vocabulary");
        let offset = len32(request.tokens.len());
        request.tokens.push(token);
        cx.say(Output::Token { id: request.id.clone(), offset, token, after: cx.seq });
        let reason = if result.stop {
            FinishReason::Stop
        } else if !request.body.ignore_eos && plan.eos.contains(&token) {
            FinishReason::Eos
        } else if offset + 1 >= request.body.max_tokens || request.target() > plan.context {
            FinishReason::Length
        } else {
            return;
        };
        self.finish(cx, row.request, reason);
    }
}

fn check_body(body: &Body, plan: &ModelPlan) -> Result<(), String> {
    if body.prompt.is_empty() {
        return Err("the prompt has no tokens; give at least one".into());
    }
    if let Some(token) = body.prompt.iter().find(|&&token| token >= plan.vocab) {
        return Err(format!("token {token} of the prompt is not below the vocabulary of {}", plan.vocab));
    }
    if body.prompt.len() > index(plan.context) {
        return Err(format!(
            "the prompt has {} tokens, the model's context {}: shorten it",
            body.prompt.len(),
            plan.context
        ));
    }
    if body.max_tokens == 0 {
        return Err("max_tokens is 0; ask for at least one token".into());
    }
    if body.stop.len() > STOPS_MAX || body.stop.iter().any(|s| s.is_empty() || s.len() > STOP_BYTES_MAX) {
        return Err(format!("stop takes up to {STOPS_MAX} texts of 1 to {STOP_BYTES_MAX} bytes"));
    }
    check_sampling(&body.sampling)
}

fn check_sampling(sampling: &Sampling) -> Result<(), String> {
    let Sampling { temperature, top_k: _, top_p, min_p, repetition_penalty, seed: _ } = *sampling;
    for (name, value, good, range) in [
        ("temperature", temperature, (0.0..=100.0).contains(&temperature), "0 to 100"),
        ("top_p", top_p, top_p > 0.0 && top_p <= 1.0, "above 0, up to 1"),
        ("min_p", min_p, (0.0..=1.0).contains(&min_p), "0 to 1"),
        (
            "repetition_penalty",
            repetition_penalty,
            (0.01..=100.0).contains(&repetition_penalty),
            "0.01 to 100",
        ),
    ] {
        if !good {
            return Err(format!("{name} is {value}; it must be {range}"));
        }
    }
    Ok(())
}
