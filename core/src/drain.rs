//! Graceful shutdown (spec 002): quiesce, finish what is there or what the bound allows, flush, release, stop.

use crate::engine::Context;
use crate::lifecycle::Lifecycle;
use crate::output::{Carving, Output};
use crate::pages::Pages;
use crate::residency::Residency;
use crate::state::State;
use crate::time::Time;
use serde::{Deserialize, Serialize};

/// A shutdown under way.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Drain {
    /// When what is unfinished stays in the journal for the next life.
    pub(crate) until: Option<Time>,
    phase: Phase,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Phase {
    Requests,
    Telemetry,
    Resources,
}

impl Drain {
    pub(crate) fn over(&self, now: Time) -> bool {
        self.phase != Phase::Requests || self.until.is_some_and(|until| now >= until)
    }

    /// When it is to be looked at again, if time alone can move it.
    pub(crate) fn bound(&self, now: Time) -> Option<Time> {
        self.until.filter(|_| !self.over(now))
    }
}

impl State {
    pub(crate) fn drain(&mut self, cx: &mut Context<'_>, bound_ns: Option<u64>) {
        let until = bound_ns.map(|ns| cx.now.after_ns(ns));
        match &mut self.drain {
            // A second, more urgent wish.
            Some(drain) => drain.until = drain.until.into_iter().chain(until).min(),
            None if self.lifecycle == Lifecycle::Stopped => {}
            None => {
                self.drain = Some(Drain { until, phase: Phase::Requests });
                if self.serving() {
                    self.begin_drain(cx);
                }
            }
        }
    }

    /// Stops accepting. During boot this waits for `Ready`.
    pub(crate) fn begin_drain(&mut self, cx: &mut Context<'_>) {
        self.abort_switches(cx);
        self.refuse_snapshots(cx);
        self.move_to(cx, Lifecycle::Draining);
    }

    /// Goes on once nothing is unfinished, or the bound is over.
    pub(crate) fn advance_drain(&mut self, cx: &mut Context<'_>) {
        let Some(drain) = self.drain.as_mut().filter(|d| d.phase == Phase::Requests) else { return };
        if self.lifecycle != Lifecycle::Draining {
            return;
        }
        if drain.over(cx.now) {
            self.abort_for_drain(cx);
        } else if !self.requests.idle() {
            return;
        }
        self.residency.stop_ahead();
        let idle = self.steps.current.is_none() && !self.residency.in_flight();
        if idle && !self.snapshots.writing && !self.modifications.pending() {
            self.drain.as_mut().expect("it was there").phase = Phase::Telemetry;
            cx.say(Output::FlushTelemetry);
        }
    }

    pub(crate) fn telemetry_flushed(&mut self, cx: &mut Context<'_>) {
        let drain = self.drain.as_mut().expect("TelemetryFlushed answers FlushTelemetry");
        assert_eq!(drain.phase, Phase::Telemetry, "TelemetryFlushed answers FlushTelemetry");
        drain.phase = Phase::Resources;
        cx.say(Output::Release);
    }

    pub(crate) fn resources_released(&mut self, cx: &mut Context<'_>) {
        let drain = self.drain.take().expect("ResourcesReleased answers Release");
        assert_eq!(drain.phase, Phase::Resources, "ResourcesReleased answers Release");
        assert!(!self.residency.in_use(), "nothing is in use");
        self.residency = Residency::new(0, 0, 0, self.residency.next_load());
        self.requests.forget_pages();
        self.carving = Carving::default();
        self.pages = Pages::default();
        self.move_to(cx, Lifecycle::Stopped);
        cx.say(Output::Exit { error: None, after: cx.seq });
    }
}
