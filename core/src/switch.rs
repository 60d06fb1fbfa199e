//! TierSets and generations (spec 002, "TierSet Activation").
//!
//! A switch has two phases: prepare, in which the new tiers are loaded into free slots while requests are served, and a
//! commit at a step boundary, from which on new positions are computed under the new generation. Positions that exist
//! keep theirs. A switch that fails before its commit leaves the old generation as it was.

use crate::engine::Context;
use crate::event::Event;
use crate::ids::{ExpertKey, Generation, RequestId, Revision, Seq, index, len32};
use crate::input::SwitchTarget;
use crate::lifecycle::Lifecycle;
use crate::output::{Granted, Output, Refusal};
use crate::residency::Held;
use crate::state::State;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::{format, string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// The generations and the switches to come.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Generations {
    known: BTreeMap<Generation, Info>,
    current: Option<Generation>,
    waiting: VecDeque<Switch>,
}

/// What a generation is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Info {
    pub(crate) tiers: Vec<u32>,
    pub(crate) revision: Revision,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Switch {
    asked: Seq,
    tiers: Vec<u32>,
    at: Option<(RequestId, u32)>,
    begun: bool,
}

impl Generations {
    /// Takes the configured TierSet for the first generation, unless a journal already decided one.
    pub(crate) fn begin_with(&mut self, tiers: Vec<u32>) {
        if self.current.is_none() {
            self.known.insert(Generation(0), Info { tiers, revision: Revision(0) });
            self.current = Some(Generation(0));
        }
    }

    /// Tells which tiers are eligible from here on.
    pub(crate) fn activate(&self, cx: &mut Context<'_>) {
        let generation = self.current();
        cx.event(Event::TierSet { generation, tiers: self.tiers(generation).to_vec() });
    }

    pub(crate) fn current(&self) -> Generation {
        self.current.expect("the manifest phase resolves the first TierSet")
    }

    pub(crate) fn known(&self) -> impl Iterator<Item = (Generation, &[u32])> {
        self.known.iter().map(|(generation, info)| (*generation, info.tiers.as_slice()))
    }

    pub(crate) fn tiers(&self, generation: Generation) -> &[u32] {
        &self.known[&generation].tiers
    }

    pub(crate) fn revision(&self, generation: Generation) -> Revision {
        self.known[&generation].revision
    }

    /// Revisions that some position, or the present, refers to.
    pub(crate) fn revisions(&self) -> impl Iterator<Item = Revision> {
        self.known.values().map(|info| info.revision)
    }

    pub(crate) fn active_tiers(&self) -> &[u32] {
        self.tiers(self.current())
    }

    /// Whether a switch waits that this input asked for.
    pub(crate) fn waits(&self, asked: Seq) -> bool {
        self.waiting.iter().any(|switch| switch.asked == asked)
    }

    pub(crate) fn is_waiting(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// The position at which a pinned switch cuts this request.
    pub(crate) fn cut(&self, id: &RequestId) -> Option<u32> {
        self.waiting
            .iter()
            .filter_map(|s| s.at.as_ref())
            .filter(|(pinned, _)| pinned == id)
            .map(|at| at.1)
            .min()
    }

    /// What was prepared is gone; what was asked for stays.
    pub(crate) fn restart(&mut self) {
        for switch in &mut self.waiting {
            switch.begun = false;
        }
    }
}

impl State {
    pub(crate) fn switch(
        &mut self,
        cx: &mut Context<'_>,
        target: SwitchTarget,
        at: Option<(RequestId, u32)>,
    ) {
        if let Err(reason) = self.ask_switch(cx, target, at) {
            cx.say(Output::Switched { asked: cx.seq, outcome: Err(reason), after: cx.seq });
        }
    }

    /// Has a switch wait, or says why it never could.
    pub(crate) fn ask_switch(
        &mut self,
        cx: &Context<'_>,
        target: SwitchTarget,
        at: Option<(RequestId, u32)>,
    ) -> Result<(), String> {
        let tiers = self.check_switch(target, at.as_ref())?;
        self.generations.waiting.push_back(Switch { asked: cx.seq, tiers, at, begun: false });
        Ok(())
    }

    fn check_switch(&self, target: SwitchTarget, at: Option<&(RequestId, u32)>) -> Result<Vec<u32>, String> {
        if !matches!(self.lifecycle, Lifecycle::Active | Lifecycle::Reconfiguring) {
            return Err(format!("the engine is {:?}; tiers are switched while it is Active", self.lifecycle));
        }
        if self.generations.waiting.len() >= index(self.config.limits.switches_max) {
            return Err("too many switches wait (limits.switches_max); ask again later".into());
        }
        if let Some((id, position)) = at {
            if self.requests.finished_by_id(id).is_some() {
                return Err(format!("request {id} is finished; pin the switch to an unfinished one"));
            }
            let done = self.requests.live_by_id(id).map_or(0, |r| r.segments.last().map_or(0, |s| s.until));
            if *position < done || *position == 0 {
                return Err(format!(
                    "request {id} has computed {done} positions; pin the switch to a later one"
                ));
            }
        }
        match target {
            SwitchTarget::Tiers(names) => self.plan().tier_set(&names),
            SwitchTarget::Mode(mode) => self.mode(&mode),
            SwitchTarget::Budget(budget_ns) => self.within_budget(budget_ns),
        }
    }

    fn mode(&self, mode: &str) -> Result<Vec<u32>, String> {
        let Some(names) = self.config.modes.get(mode) else {
            let known: Vec<&str> = self.config.modes.keys().map(String::as_str).collect();
            return Err(format!("unknown mode {mode:?}; the configuration has [{}]", known.join(", ")));
        };
        self.plan().tier_set(names)
    }

    /// The mode with the most experts whose step is measured, or by the nearest measurement estimated, to be in time.
    fn within_budget(&self, budget_ns: u64) -> Result<Vec<u32>, String> {
        let plan = self.plan();
        let experts = |tiers: &[u32]| -> u64 {
            tiers
                .iter()
                .map(|&t| &plan.tiers[index(t)])
                .map(|t| u64::from(t.groups) * u64::from(t.experts))
                .sum()
        };
        let mut modes: Vec<Vec<u32>> = Vec::new();
        for names in self.config.modes.values() {
            modes.push(plan.tier_set(names)?);
        }
        modes.sort_by_key(|tiers| core::cmp::Reverse(experts(tiers)));
        let Some(smallest) = modes.last() else {
            return Err("the configuration has no modes to choose from".into());
        };
        let cost = |tiers: &Vec<u32>| -> Option<u64> {
            let measured = &self.steps.cost_ns;
            measured.get(tiers).copied().or_else(|| {
                let (nearest, cost) =
                    measured.iter().min_by_key(|(other, _)| experts(other).abs_diff(experts(tiers)))?;
                let scaled =
                    u128::from(*cost) * u128::from(experts(tiers)) / u128::from(experts(nearest).max(1));
                u64::try_from(scaled).ok()
            })
        };
        let fits = modes.iter().find(|tiers| cost(tiers).is_some_and(|ns| ns <= budget_ns));
        Ok(fits.unwrap_or(smallest).clone())
    }

    /// Moves a waiting switch on: begin to prepare, or commit at a step boundary.
    pub(crate) fn advance_switch(&mut self, cx: &mut Context<'_>) {
        while matches!(self.lifecycle, Lifecycle::Active | Lifecycle::Reconfiguring) {
            // The first that is due; none may wait behind one whose position is still to come, or both might for ever.
            let due = self.generations.waiting.iter().position(|switch| self.due(switch));
            if let Some(switch) = due.and_then(|at| self.generations.waiting.remove(at)) {
                self.generations.waiting.push_front(switch);
            }
            let Some(switch) = self.generations.waiting.front() else { return };
            if let Some((id, position)) = &switch.at
                && self.requests.finished_by_id(id).is_some()
            {
                let reason = format!("request {id} ended before position {position}");
                self.abort_switch(cx, reason);
                continue;
            }
            if !switch.begun {
                self.prepare(cx);
                self.issue_loads(cx);
            }
            let prepared = !self.residency.wanted() && !self.residency.in_flight();
            if due.is_none() || !prepared || self.steps.current.is_some() {
                return;
            }
            self.commit(cx);
        }
    }

    /// Whether the position that a switch is pinned to is the next one, or will never come.
    fn due(&self, switch: &Switch) -> bool {
        let Some((id, position)) = &switch.at else { return true };
        match self.requests.live_by_id(id) {
            Some(request) => request.segments.last().map_or(0, |s| s.until) >= *position,
            None => self.requests.finished_by_id(id).is_some(),
        }
    }

    /// Loads the new tiers into slots that are free, of either arena; what does not fit is loaded on demand.
    fn prepare(&mut self, cx: &mut Context<'_>) {
        let switch = self.generations.waiting.front_mut().expect("a switch waits");
        switch.begun = true;
        let tiers = switch.tiers.clone();
        let missing: VecDeque<Held> =
            self.plan().experts(&tiers).map(|key| (key, self.current_blob(key))).collect();
        let missing =
            missing.into_iter().filter(|&held| self.residency.hot.slot_of(held).is_none()).collect();
        self.residency.want(missing);
        if self.lifecycle == Lifecycle::Active {
            self.move_to(cx, Lifecycle::Reconfiguring);
        }
    }

    fn commit(&mut self, cx: &mut Context<'_>) {
        let switch = self.generations.waiting.pop_front().expect("a switch waits");
        let revision = self.generations.revision(self.generations.current());
        let generation = self.enter(cx, Info { tiers: switch.tiers.clone(), revision });
        let experts = self.residency.demote(&switch.tiers);
        cx.event(Event::Demoted { experts });
        self.generations.activate(cx);
        self.over(cx, switch.asked, Ok(generation));
    }

    /// Makes a generation the one of new positions, and forgets those that nothing refers to.
    pub(crate) fn enter(&mut self, cx: &mut Context<'_>, info: Info) -> Generation {
        let known = &mut self.generations.known;
        let current = self.generations.current.expect("the manifest phase resolves the first TierSet");
        let last = known.last_key_value().map_or(0, |(generation, _)| generation.0);
        let generation = if known[&current] == info { current } else { Generation(last + 1) };
        known.insert(generation, info);
        self.generations.current = Some(generation);
        let mut referred = self.requests.generations();
        referred.insert(generation);
        self.generations.known.retain(|generation, _| referred.contains(generation));
        self.retire_blobs(cx);
        generation
    }

    fn abort_switch(&mut self, cx: &mut Context<'_>, reason: String) {
        let switch = self.generations.waiting.pop_front().expect("a switch waits");
        self.residency.stop_ahead();
        let active = self.generations.active_tiers().to_vec();
        self.residency.demote(&active);
        cx.event(Event::SwitchAborted);
        self.over(cx, switch.asked, Err(reason));
    }

    fn over(&mut self, cx: &mut Context<'_>, asked: Seq, outcome: Result<Generation, String>) {
        let granted = outcome.clone().map(Granted::Switched).map_err(|reason| (Refusal::Invalid, reason));
        cx.say(Output::Switched { asked, outcome, after: cx.seq });
        self.switch_granted(cx, asked, granted);
        if self.lifecycle == Lifecycle::Reconfiguring {
            self.move_to(cx, Lifecycle::Active);
        }
    }

    /// An expert cannot be loaded: a switch to its tier is given up.
    pub(crate) fn switch_lost(&mut self, cx: &mut Context<'_>, key: ExpertKey, reason: String) {
        let active = self.generations.active_tiers().contains(&key.tier);
        if !active && self.generations.waiting.front().is_some_and(|s| s.begun && s.tiers.contains(&key.tier))
        {
            self.abort_switch(cx, reason);
        }
    }

    /// Gives up every waiting switch.
    pub(crate) fn abort_switches(&mut self, cx: &mut Context<'_>) {
        while self.generations.is_waiting() {
            self.abort_switch(cx, "draining: the tiers stay as they are".into());
        }
    }
}

/// Names of tiers, for people.
pub(crate) fn names(plan: &crate::plan::ModelPlan, tiers: &[u32]) -> Vec<String> {
    tiers
        .iter()
        .filter(|&&t| t < len32(plan.tiers.len()))
        .map(|&t| plan.tiers[index(t)].name.clone())
        .collect()
}
