//! The whole state of an engine. What is in here is digested and snapshotted; there is nothing else.

use crate::boot::Boot;
use crate::config::Config;
use crate::drain::Drain;
use crate::engine::Context;
use crate::event::Event;
use crate::ids::Incarnation;
use crate::lifecycle::Lifecycle;
use crate::modification::Modifications;
use crate::output::{Carving, Output, WaitReason};
use crate::pages::Pages;
use crate::plan::ModelPlan;
use crate::request::Requests;
use crate::residency::Residency;
use crate::snapshots::Snapshots;
use crate::step::Steps;
use crate::switch::Generations;
use crate::time::Time;
use crate::wishes::Wishes;
use serde::{Deserialize, Serialize};

/// Everything that the engine knows.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct State {
    pub(crate) lifecycle: Lifecycle,
    pub(crate) boot: Boot,
    pub(crate) incarnation: Incarnation,
    pub(crate) config: Config,
    pub(crate) routing_seed: Option<u64>,
    pub(crate) plan: Option<ModelPlan>,
    pub(crate) carving: Carving,
    pub(crate) residency: Residency,
    pub(crate) pages: Pages,
    pub(crate) requests: Requests,
    pub(crate) steps: Steps,
    pub(crate) generations: Generations,
    pub(crate) modifications: Modifications,
    pub(crate) drain: Option<Drain>,
    pub(crate) snapshots: Snapshots,
    pub(crate) wishes: Wishes,
}

impl State {
    /// Moves the lifecycle; anything that the table does not list is a bug.
    pub(crate) fn move_to(&mut self, cx: &mut Context<'_>, to: Lifecycle) {
        let from = self.lifecycle;
        assert!(from.allows(to), "the lifecycle does not go from {from:?} to {to:?}");
        self.lifecycle = to;
        cx.event(Event::Moved { from, to });
    }

    /// The plan of a checkpoint whose manifest has been read.
    pub(crate) fn plan(&self) -> &ModelPlan {
        self.plan.as_ref().expect("the manifest phase comes before whatever asks for the plan")
    }

    /// Whether steps may run.
    pub(crate) const fn serving(&self) -> bool {
        matches!(self.lifecycle, Lifecycle::Active | Lifecycle::Reconfiguring | Lifecycle::Draining)
    }

    /// Ends the process with an error.
    pub(crate) fn exit_with(&mut self, cx: &mut Context<'_>, error: alloc::string::String) {
        self.move_to(cx, Lifecycle::Stopped);
        self.boot = Boot::Idle;
        cx.say(Output::Exit { error: Some(error), after: cx.seq });
    }

    /// Why there is nothing more to do, and until when.
    pub(crate) fn waiting(&self, now: Time) -> Output {
        let drain = self.drain.as_ref().and_then(|drain| drain.bound(now));
        let until =
            if self.serving() { self.requests.next_deadline().into_iter().chain(drain).min() } else { None };
        let reason = match self.lifecycle {
            Lifecycle::Stopped => WaitReason::Stopped,
            Lifecycle::Boot | Lifecycle::Loading | Lifecycle::Warm | Lifecycle::Recovering => {
                WaitReason::Boot
            }
            Lifecycle::Active | Lifecycle::Reconfiguring | Lifecycle::Draining => {
                if self.steps.current.is_some() {
                    WaitReason::Step
                } else if self.residency.loading() {
                    WaitReason::Loads
                } else {
                    WaitReason::Requests
                }
            }
        };
        Output::Wait { until, reason }
    }

    /// The invariants that span modules; each module's own are asserted where they are kept.
    ///
    /// # Panics
    /// If one does not hold.
    pub(crate) fn assert_invariants(&self) {
        self.residency.check();
        self.wishes.check(|asked| self.generations.waits(asked));
        let mut held: alloc::vec::Vec<u32> =
            self.requests.live().flat_map(|r| &r.pages).flat_map(|run| run.pages.iter().copied()).collect();
        held.extend(self.pages.free());
        held.sort_unstable();
        assert!(
            held.iter().copied().eq(0..self.carving.pages),
            "every page is free or of exactly one request"
        );
        for request in self.requests.live() {
            for (run, window) in request.pages.iter().zip(self.plan().kv_groups.iter()) {
                let first = self.plan().first_place(*window, request.computed);
                assert_eq!(run.first, first, "a request holds no page that nobody will read");
                let computed = request.computed.div_ceil(self.plan().page_positions);
                assert!(run.end() >= computed, "a request holds what its positions will read");
            }
        }
        if let Some(step) = &self.steps.current {
            for row in &step.rows {
                let request =
                    self.requests.by_number(row.request).expect("a row's request outlives the step");
                assert_eq!(request.computed, row.start, "nothing but the step moves a row's frontier");
            }
        }
    }
}
