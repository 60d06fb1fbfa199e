//! What an operator wishes of a replica. Each wish is done once, however often it is asked for: its name is kept with what
//! came of it, in the journal like everything else, so that a leader that takes over knows it too.
//!
//! A command without a name (`Input::Switch`, `Input::Cancel`, `Input::SnapshotWanted`) is for whoever cannot lose the
//! answer: a handle in the engine's own process.

use crate::engine::Context;
use crate::ids::{Seq, WishId};
use crate::input::Wish;
use crate::lifecycle::Lifecycle;
use crate::output::{Granted, Output, Refusal};
use crate::plant::{self, Bug};
use crate::state::State;
use alloc::collections::{BTreeMap, VecDeque};
use alloc::string::String;
use serde::{Deserialize, Serialize};

/// What came of a wish.
type Outcome = Result<Granted, (Refusal, String)>;

/// Wishes that may wait, and answers that are kept. Who asks again does so while he waits, so that the newest do.
const WISHES_MAX: usize = 64;

/// The wishes that wait, and what came of the last ones.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Wishes {
    /// By the switch that each waits for, which is named by its input.
    switches: BTreeMap<Seq, WishId>,
    /// By the input that asked for a snapshot.
    snapshots: BTreeMap<Seq, WishId>,
    /// Oldest first.
    answered: VecDeque<(WishId, Outcome)>,
}

impl Wishes {
    fn is_waiting(&self, id: WishId) -> bool {
        self.switches.values().chain(self.snapshots.values()).any(|&waiting| waiting == id)
    }

    fn outcome(&self, id: WishId) -> Option<&Outcome> {
        self.answered.iter().find(|(answered, _)| *answered == id).map(|(_, outcome)| outcome)
    }

    /// Whether a snapshot is still owed.
    pub(crate) fn want_snapshot(&self) -> bool {
        !self.snapshots.is_empty()
    }

    /// # Panics
    /// If an invariant does not hold. `waiting` says whether a switch of that input waits.
    pub(crate) fn check(&self, waiting: impl Fn(Seq) -> bool) {
        assert!(self.switches.keys().all(|&asked| waiting(asked)), "a wish waits for a switch that waits");
        assert!(self.switches.len() + self.snapshots.len() <= WISHES_MAX, "wishes are bounded");
        assert!(self.answered.len() <= WISHES_MAX, "answers are bounded");
        assert!(!self.answered.iter().any(|(id, _)| self.is_waiting(*id)), "a wish is answered once");
    }
}

impl State {
    /// Takes a wish, or says again what came of it.
    pub(crate) fn wish(&mut self, cx: &mut Context<'_>, id: WishId, wish: Wish) {
        if let Some(outcome) = self.wishes.outcome(id) {
            let outcome = outcome.clone();
            return cx.say(Output::Answered { id, outcome, after: cx.seq });
        }
        if self.wishes.is_waiting(id) {
            return;
        }
        if !self.serving() {
            // Whoever asks again is heard then, so that nothing is kept of it.
            let reason = "not ready: ask again once the engine serves".into();
            return cx.say(Output::Answered {
                id,
                outcome: Err((Refusal::NotServing, reason)),
                after: cx.seq,
            });
        }
        if self.wishes.switches.len() + self.wishes.snapshots.len() >= WISHES_MAX {
            let reason = "too many wishes wait; wish again when one is answered".into();
            return self.grant(cx, id, Err((Refusal::Busy, reason)));
        }
        match wish {
            Wish::Switch { target, at } => match self.ask_switch(cx, target, at) {
                Ok(()) => drop(self.wishes.switches.insert(cx.seq, id)),
                Err(reason) => self.grant(cx, id, Err((Refusal::Invalid, reason))),
            },
            Wish::Cancel { id: request } => {
                let outcome = self.cancel_by_id(cx, &request).map(|()| Granted::Cancelled);
                self.grant(cx, id, outcome);
            }
            Wish::Snapshot if self.lifecycle == Lifecycle::Draining => {
                self.grant(cx, id, Err(draining()));
            }
            Wish::Snapshot => {
                self.wishes.snapshots.insert(cx.seq, id);
                self.snapshots.wanted = true;
            }
        }
    }

    /// Says what came of a wish, and keeps it.
    fn grant(&mut self, cx: &mut Context<'_>, id: WishId, outcome: Outcome) {
        if self.wishes.answered.len() >= WISHES_MAX {
            self.wishes.answered.pop_front();
        }
        if !plant::is(Bug::WishForgotten) {
            self.wishes.answered.push_back((id, outcome.clone()));
        }
        cx.say(Output::Answered { id, outcome, after: cx.seq });
    }

    /// A switch is over: whoever wished it hears so.
    pub(crate) fn switch_granted(&mut self, cx: &mut Context<'_>, asked: Seq, outcome: Outcome) {
        if let Some(id) = self.wishes.switches.remove(&asked) {
            self.grant(cx, id, outcome);
        }
    }

    /// A snapshot that holds everything before `next` is durable on every rank: whoever wished it before hears so.
    pub(crate) fn snapshot_granted(&mut self, cx: &mut Context<'_>, next: Seq) {
        let later = self.wishes.snapshots.split_off(&next);
        for id in core::mem::replace(&mut self.wishes.snapshots, later).into_values() {
            self.grant(cx, id, Ok(Granted::Snapshot(next)));
        }
    }

    /// No snapshot is begun while draining: whoever waits for one that was not is told so.
    pub(crate) fn refuse_snapshots(&mut self, cx: &mut Context<'_>) {
        let next = if self.snapshots.writing { self.snapshots.last.0 + 1 } else { 0 };
        for id in self.wishes.snapshots.split_off(&Seq(next)).into_values() {
            self.grant(cx, id, Err(draining()));
        }
    }
}

fn draining() -> (Refusal, String) {
    (Refusal::Invalid, "draining: no snapshot is taken; the journal is kept as it is".into())
}
