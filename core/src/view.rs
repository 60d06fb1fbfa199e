//! A read-only look at an engine, for drivers, checkers, status pages and the debugger.

use crate::config::Config;
use crate::digest::Digest;
use crate::ids::{ExpertKey, Generation, Incarnation, RequestId, Slot, StepId};
use crate::input::Body;
use crate::lifecycle::Lifecycle;
use crate::output::{Carving, FinishReason};
use crate::pages::PageRun;
use crate::plan::ModelPlan;
use crate::request::Request;
pub use crate::request::Segment;
use crate::residency::{Content, SlotState};
use crate::state::State;
use crate::switch;
use alloc::collections::BTreeMap;
use alloc::{string::String, vec::Vec};

/// What may be looked at.
#[derive(Clone, Copy, Debug)]
pub struct View<'a>(&'a State);

/// An unfinished request.
#[derive(Clone, Copy, Debug)]
pub struct RequestView<'a> {
    /// In order of acceptance.
    pub number: u64,
    /// Idempotency key.
    pub id: &'a RequestId,
    /// What is asked for.
    pub body: &'a Body,
    /// Tokens generated so far.
    pub tokens: &'a [u32],
    /// Positions whose keys and values are in pages.
    pub computed: u32,
    /// Pages held, a run for each group of layers; none where nothing is computed.
    pub pages: &'a [PageRun],
    /// Which generation computed which positions.
    pub segments: &'a [Segment],
}

/// A stream, unfinished or kept.
#[derive(Clone, Copy, Debug)]
pub struct Stream<'a> {
    /// Tokens generated so far.
    pub tokens: &'a [u32],
    /// Why it ended, if it did.
    pub finish: Option<&'a FinishReason>,
    /// Which generation computed which positions.
    pub segments: &'a [Segment],
}

/// A slot of an arena.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotView {
    /// Which.
    pub slot: Slot,
    /// The expert that is there or coming.
    pub expert: Option<ExpertKey>,
    /// Whether it is there.
    pub ready: bool,
    /// Waves, or loads into the other arena, that may read it.
    pub pins: u32,
}

impl SlotView {
    const fn of((slot, state): (Slot, &SlotState)) -> Self {
        let (expert, ready) = match state.content {
            Content::Empty => (None, false),
            Content::Coming((key, _)) => (Some(key), false),
            Content::Ready((key, _)) => (Some(key), true),
        };
        Self { slot, expert, ready, pins: state.pins }
    }
}

impl<'a> RequestView<'a> {
    fn of(request: &'a Request) -> Self {
        Self {
            number: request.number,
            id: &request.id,
            body: &request.body,
            tokens: &request.tokens,
            computed: request.computed,
            pages: &request.pages,
            segments: &request.segments,
        }
    }
}

impl<'a> View<'a> {
    pub(crate) const fn new(state: &'a State) -> Self {
        Self(state)
    }

    /// Where the engine is in its life.
    #[must_use]
    pub const fn lifecycle(&self) -> Lifecycle {
        self.0.lifecycle
    }

    /// The process's life.
    #[must_use]
    pub const fn incarnation(&self) -> Incarnation {
        self.0.incarnation
    }

    /// The configuration of this life.
    #[must_use]
    pub const fn config(&self) -> &'a Config {
        &self.0.config
    }

    /// The routing seed, once it is decided.
    #[must_use]
    pub const fn routing_seed(&self) -> Option<u64> {
        self.0.routing_seed
    }

    /// The checkpoint, once its manifest is read.
    #[must_use]
    pub const fn plan(&self) -> Option<&'a ModelPlan> {
        self.0.plan.as_ref()
    }

    /// The carved memory.
    #[must_use]
    pub const fn carving(&self) -> Carving {
        self.0.carving
    }

    /// Every generation that some stream or the present refers to, with its tiers' names.
    #[must_use]
    pub fn generations(&self) -> Vec<(Generation, Vec<String>)> {
        let plan = self.0.plan.as_ref();
        let named = |tiers: &[u32]| plan.map_or_else(Vec::new, |plan| switch::names(plan, tiers));
        self.0.generations.known().map(|(generation, tiers)| (generation, named(tiers))).collect()
    }

    /// The experts that a known generation has modified, with the digest of each one's bytes.
    #[must_use]
    pub fn modified(&self, generation: Generation) -> BTreeMap<ExpertKey, Digest> {
        self.0.modifications.of(self.0.generations.revision(generation))
    }

    /// The generation of new positions, once the manifest is read.
    #[must_use]
    pub fn generation(&self) -> Option<Generation> {
        self.0.plan.as_ref().map(|_| self.0.generations.current())
    }

    /// Unfinished requests, in order of acceptance.
    pub fn requests(&self) -> impl Iterator<Item = RequestView<'a>> + use<'a> {
        self.0.requests.live().map(RequestView::of)
    }

    /// An unfinished request by its number.
    #[must_use]
    pub fn request(&self, number: u64) -> Option<RequestView<'a>> {
        self.0.requests.by_number(number).map(RequestView::of)
    }

    /// A stream by its request's id, unfinished or kept.
    #[must_use]
    pub fn stream(&self, id: &RequestId) -> Option<Stream<'a>> {
        let requests = &self.0.requests;
        let live = requests.live_by_id(id).map(|r| Stream {
            tokens: &r.tokens,
            finish: None,
            segments: &r.segments,
        });
        live.or_else(|| {
            requests.finished_by_id(id).map(|f| Stream {
                tokens: &f.tokens,
                finish: Some(&f.reason),
                segments: &f.segments,
            })
        })
    }

    /// The slots of the hot arena.
    pub fn slots(&self) -> impl Iterator<Item = SlotView> + use<'a> {
        self.0.residency.hot.slots().map(SlotView::of)
    }

    /// The slots of the warm arena.
    pub fn warm_slots(&self) -> impl Iterator<Item = SlotView> + use<'a> {
        self.0.residency.warm.slots().map(SlotView::of)
    }

    /// The running step.
    #[must_use]
    pub fn step(&self) -> Option<StepId> {
        self.0.steps.current.as_ref().map(|step| step.id)
    }

    /// The layer and wave that the running step waits for, and a bit for each shelf (stage x expert ranks + expert rank)
    /// that has experts of it.
    #[must_use]
    pub fn wave(&self) -> Option<(u32, u32, u64)> {
        self.0.wave()
    }

    /// The shelf of an expert: stage x expert ranks + expert rank.
    ///
    /// # Panics
    /// Before the manifest is read.
    #[must_use]
    pub fn shelf(&self, key: ExpertKey) -> u32 {
        self.0.shelf(key)
    }

    /// Free pages of KV cache.
    #[must_use]
    pub fn pages_free(&self) -> usize {
        self.0.pages.free_len()
    }
}
