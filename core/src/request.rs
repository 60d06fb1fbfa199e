//! Requests: acceptance, attachment, tokens, ends. The id is the client's idempotency key.

use crate::digest::Digest;
use crate::engine::Context;
use crate::ids::{Generation, RequestId, index, len32};
use crate::input::{Body, Priority, RowResult};
use crate::lifecycle::Lifecycle;
use crate::output::{FinishReason, Output, Refusal};
use crate::pages::PageRun;
use crate::plan::ModelPlan;
use crate::plant::{self, Bug};
use crate::state::State;
use crate::step::StepRow;
use crate::time::Time;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::{format, string::String, vec::Vec};
use serde::{Deserialize, Serialize};

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
    /// Its number.
    Live(u64),
    /// How many had ended before it.
    Finished(u64),
    Expired,
}

/// The place of a request among those that want to run: smaller goes first.
type Rank = (Priority, Time, u64);

/// Every request that is known.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Requests {
    live: BTreeMap<u64, Request>,
    /// In the order in which they ended: the first goes first.
    finished: BTreeMap<u64, Finished>,
    tombstones: VecDeque<RequestId>,
    by_id: BTreeMap<RequestId, Entry>,
    ranks: BTreeSet<Rank>,
    deadlines: BTreeSet<(Time, u64)>,
    next: u64,
    /// How many have ended.
    ended: u64,
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
            Some(Entry::Finished(at)) => self.finished.get(at),
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
        self.by_id.insert(request.id.clone(), Entry::Finished(self.ended));
        let finished = Finished {
            id: request.id.clone(),
            body: Digest::of_value(&request.body),
            tokens: request.tokens.clone(),
            reason,
            segments: request.segments.clone(),
            at: now,
        };
        self.finished.insert(self.ended, finished);
        self.ended += 1;
        request
    }

    /// Turns finished streams above the configured count or age into tombstones, and forgets the oldest of those.
    fn bury(&mut self, now: Time, count_max: usize, age_ns: u64, tombstones_max: usize) {
        while let Some((&first, oldest)) = self.finished.first_key_value() {
            if self.finished.len() <= count_max && now <= oldest.at.after_ns(age_ns) {
                break;
            }
            let finished = self.finished.remove(&first).expect("it was there");
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
                let reason = "expired: the stream was finished and is no longer kept; use a new id".into();
                self.refuse(cx, id, (Refusal::Expired, reason));
            }
            Some(Entry::Live(number)) => {
                let request = &self.requests.live[number];
                let same = request.body == body;
                let tokens = request.tokens.clone();
                self.attach(cx, id, same, from, &tokens, None);
            }
            Some(Entry::Finished(at)) => {
                let finished = &self.requests.finished[at];
                let same = finished.body == Digest::of_value(&body);
                let (tokens, reason) = (finished.tokens.clone(), finished.reason.clone());
                self.attach(cx, id, same, from, &tokens, Some(reason));
            }
            None => match self.admit(&body, from) {
                Ok(()) => {
                    self.requests.accept(cx.now, id.clone(), body);
                    cx.say(Output::Accepted { id, generated: 0, after: cx.seq });
                }
                Err(refusal) => self.refuse(cx, id, refusal),
            },
        }
    }

    fn refuse(&self, cx: &mut Context<'_>, id: RequestId, (refusal, reason): (Refusal, String)) {
        cx.say(Output::Refuse { id, refusal, reason, after: cx.seq });
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
            return self.refuse(cx, id, (Refusal::Invalid, reason.into()));
        }
        if from > generated {
            let reason = format!("offset {from} is beyond the {generated} tokens of the stream");
            return self.refuse(cx, id, (Refusal::Invalid, reason));
        }
        cx.say(Output::Accepted { id: id.clone(), generated, after: cx.seq });
        let skipped = usize::from(plant::is(Bug::OffsetSkipped) && from > 0);
        for (offset, &token) in (0..).zip(tokens).skip(index(from) + skipped) {
            cx.say(Output::Token { id: id.clone(), offset, token, after: cx.seq });
        }
        if let Some(reason) = reason {
            cx.say(Output::Finish { id, reason, generated, after: cx.seq });
        }
    }

    /// Whether a new request can be served to its end.
    fn admit(&self, body: &Body, from: u32) -> Result<(), (Refusal, String)> {
        let not_serving = |reason: &str| Err((Refusal::NotServing, reason.into()));
        match self.lifecycle {
            Lifecycle::Active | Lifecycle::Reconfiguring => {}
            Lifecycle::Draining | Lifecycle::Stopped => return not_serving("draining: no new requests"),
            Lifecycle::Boot | Lifecycle::Loading | Lifecycle::Warm | Lifecycle::Recovering => {
                return not_serving("not ready: submit again once the engine is");
            }
        }
        let limits = &self.config.limits;
        if self.requests.live.len() >= index(limits.requests_max) {
            let reason = format!(
                "busy: {} requests are unfinished (limits.requests_max); submit again later",
                limits.requests_max
            );
            return Err((Refusal::Busy, reason));
        }
        self.check(body, from).map_err(|reason| (Refusal::Invalid, reason))
    }

    fn check(&self, body: &Body, from: u32) -> Result<(), String> {
        if from > 0 {
            return Err(format!("offset {from} of a stream that does not exist; submit with offset 0"));
        }
        let plan = self.plan();
        body.check(plan.vocab, plan.context)?;
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
        if let Err(refusal) = self.cancel_by_id(cx, &id) {
            self.refuse(cx, id, refusal);
        }
    }

    /// Ends a request, if it has not ended.
    pub(crate) fn cancel_by_id(
        &mut self,
        cx: &mut Context<'_>,
        id: &RequestId,
    ) -> Result<(), (Refusal, String)> {
        match self.requests.by_id.get(id).copied() {
            Some(Entry::Live(number)) => self.end(cx, number, FinishReason::Cancelled),
            Some(Entry::Finished(_) | Entry::Expired) => {}
            None => return Err((Refusal::Invalid, "there is no such request to cancel".into())),
        }
        Ok(())
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
