//! Which expert is in which slot of the hot and the warm arena, what is being loaded, and what has to go.
//!
//! Steps read the hot arena. A slot is pinned while a wave of a step may read it; only an unpinned slot is ever given to
//! another expert. Eviction goes by placement, then by use (halved now and then), then by how long the layer-by-layer
//! walk of a step will not come by: cyclic access defeats plain recency. What leaves both arenas keeps its count: where a
//! step needs more than there is room for, all would have one otherwise.
//!
//! An expert that has to leave the hot arena is demoted to the warm one, in which it takes the place of the expert that
//! it is promoted for, or of one that is worth less. No expert is in both, so that the arenas together hold as many as
//! they have slots.

mod table;

use crate::config::Placement;
use crate::digest::Digest;
use crate::engine::Context;
use crate::event::Event;
use crate::ids::{ExpertKey, LoadId, Slot, index, len32};
use crate::input::Fault;
use crate::output::{Origin, Output};
use crate::state::State;
use alloc::collections::{BTreeMap, BTreeSet, VecDeque};
use alloc::{format, string::String, vec::Vec};
use core::cmp::Reverse;
use serde::{Deserialize, Serialize};
pub(crate) use table::{Content, SlotState, Table};

/// An expert with the parameters of the checkpoint, or as modified.
pub(crate) type Held = (ExpertKey, Option<Digest>);

/// What an expert is worth: placement, unless no new position can select it; uses; layers until it may be needed.
type Worth = (Option<Placement>, u32, Reverse<usize>);

/// The way of an expert into a slot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
enum Path {
    /// From the disk into this warm slot.
    Stage(Slot),
    /// Into this hot slot.
    Heat(Slot, Origin),
}

impl Path {
    /// The way of a second try: what was in the slots cannot be relied on.
    const fn again(self) -> Self {
        match self {
            Self::Stage(_) => self,
            Self::Heat(slot, _) => Self::Heat(slot, Origin::Disk { keep: None }),
        }
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Load {
    path: Path,
    failures: u32,
}

/// A hot slot that a step waits for.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
struct Demand {
    slot: Slot,
    /// What is still in its memory, with its count of use.
    old: Option<(Held, u32)>,
}

/// What the next layer of the running step will probably choose.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Foreseen {
    experts: Vec<Held>,
    /// Those of them that were looked at.
    seen: u32,
    /// Those whose loads have begun.
    begun: BTreeSet<Held>,
}

/// The arenas, and what is on its way into them.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Residency {
    pub(crate) hot: Table,
    pub(crate) warm: Table,
    loads: BTreeMap<LoadId, Load>,
    /// What a step waits for, in order.
    demanded: VecDeque<Demand>,
    /// Experts to load ahead into free slots.
    ahead: VecDeque<Held>,
    foreseen: Foreseen,
    next_load: LoadId,
    /// The counts of use, above 0, of experts that are in neither arena.
    gone: BTreeMap<Held, u32>,
}

/// What became of a load.
pub(crate) enum Outcome {
    /// The expert is in its hot slot.
    Ready(Held),
    /// It is in its warm slot.
    Staged,
    /// It is tried again.
    Retried,
    /// It could not be loaded, into the hot arena or the warm one.
    Lost { key: ExpertKey, hot: bool, fault: Fault },
}

impl Residency {
    /// Empty arenas, `shelves` each; slots are those of a shelf.
    pub(crate) fn new(hot_slots: u32, warm_slots: u32, shelves: u32, next_load: LoadId) -> Self {
        let (hot, warm) = (Table::new(hot_slots, shelves), Table::new(warm_slots, shelves));
        Self { hot, warm, next_load, ..Self::default() }
    }

    pub(crate) const fn next_load(&self) -> LoadId {
        self.next_load
    }

    /// Whether anything is coming or is to come.
    pub(crate) fn loading(&self) -> bool {
        !self.loads.is_empty() || !self.demanded.is_empty() || !self.ahead.is_empty()
    }

    /// Whether the driver is writing into any slot.
    pub(crate) fn in_flight(&self) -> bool {
        !self.loads.is_empty()
    }

    /// Whether the driver may be reading any slot.
    pub(crate) fn in_use(&self) -> bool {
        self.hot.pinned() + self.warm.pinned() > 0
    }

    /// Experts that are there.
    pub(crate) fn ready(&self) -> u32 {
        self.hot.ready() + self.warm.ready()
    }

    /// Experts to load ahead while slots are free.
    pub(crate) fn want(&mut self, experts: VecDeque<Held>) {
        self.ahead = experts;
    }

    pub(crate) fn wanted(&self) -> bool {
        !self.ahead.is_empty()
    }

    /// Empties every hot slot whose tier is not among `tiers`; returns how many. What is in a warm slot can stay: its
    /// place is taken by whatever is worth more.
    pub(crate) fn demote(&mut self, tiers: &[u32]) -> u32 {
        self.ahead.retain(|(key, _)| tiers.contains(&key.tier));
        let obsolete = self.hot.slots().filter(|(_, state)| {
            state.pins == 0 && matches!(state.content, Content::Ready((key, _)) if !tiers.contains(&key.tier))
        });
        let obsolete: Vec<Slot> = obsolete.map(|(slot, _)| slot).collect();
        for slot in &obsolete {
            self.clear_hot(*slot);
        }
        len32(obsolete.len())
    }

    /// Whether nothing reads this blob from the disk, nor will.
    pub(crate) fn forget(&mut self, key: ExpertKey, blob: Digest) -> bool {
        let forgotten = (key, Some(blob));
        self.ahead.retain(|&held| held != forgotten);
        self.foreseen = Foreseen::default();
        [&self.hot, &self.warm].iter().all(|table| table.slot_of(forgotten).is_none_or(|(_, ready)| ready))
    }

    /// Forgets loads ahead that have not begun.
    pub(crate) fn stop_ahead(&mut self) {
        self.ahead.clear();
        self.foreseen = Foreseen::default();
    }

    /// Takes what the next layer will probably choose in the place of what was foreseen of this one; returns how many loads that
    /// began, and how many of them are of experts that are needed.
    pub(crate) fn foresee(&mut self, experts: Vec<Held>, needed: impl Fn(&Held) -> bool) -> (u32, u32) {
        let before = core::mem::replace(&mut self.foreseen, Foreseen { experts, ..Foreseen::default() });
        let used = before.begun.iter().filter(|held| needed(held) && self.hot.slot_of(**held).is_some());
        (len32(before.begun.len()), len32(used.count()))
    }

    /// The next that is foreseen, if the disk would be idle otherwise. One at a time: what is foreseen wrongly is in the way of
    /// what is needed.
    fn next_foreseen(&mut self) -> Option<Held> {
        if self.loading() {
            return None;
        }
        let held = *self.foreseen.experts.get(index(self.foreseen.seen))?;
        self.foreseen.seen += 1;
        Some(held)
    }

    /// Releases what a step that is over still holds, and its loads that have not begun.
    pub(crate) fn release_all(&mut self) {
        self.hot.unpin_all();
        self.foreseen = Foreseen::default();
        while let Some(Demand { slot, .. }) = self.demanded.pop_front() {
            self.clear_hot(slot);
        }
    }

    /// Halves all counts of use.
    pub(crate) fn age(&mut self) {
        self.hot.age();
        self.warm.age();
        self.gone.retain(|_, uses| {
            *uses /= 2;
            *uses > 0
        });
    }

    /// Keeps the count of an expert that has left an arena, unless it is in the other one.
    fn remember(&mut self, (held, uses): (Held, u32)) {
        if uses > 0 && self.hot.slot_of(held).is_none() && self.warm.slot_of(held).is_none() {
            self.gone.insert(held, uses);
        }
    }

    /// The count of an expert that comes back.
    fn recall(&mut self, held: Held) -> u32 {
        self.gone.remove(&held).unwrap_or(0)
    }

    fn clear_hot(&mut self, slot: Slot) {
        self.hot.clear(slot).into_iter().for_each(|was| self.remember(was));
    }

    fn clear_warm(&mut self, slot: Slot) {
        self.warm.clear(slot).into_iter().for_each(|was| self.remember(was));
    }

    /// Gives a hot slot to an expert that is to come.
    fn give(&mut self, slot: Slot, held: Held) -> Demand {
        let known = self.recall(held);
        let uses = self.warm.slot_of(held).map_or(known, |(slot, _)| self.warm.uses(slot));
        let old = self.hot.assign(slot, held, uses);
        if let Some(old) = old {
            // Until the warm arena takes it, if it does.
            self.remember(old);
        }
        Demand { slot, old }
    }

    /// The next that a step waits for. What is on its way to a warm slot is there sooner than it could be read again.
    fn next_demand(&mut self) -> Option<Demand> {
        let staging = |demand: &Demand| {
            let held = self.hot.coming_to(demand.slot);
            self.warm.slot_of(held).is_some_and(|(_, ready)| !ready)
        };
        let next = self.demanded.iter().position(|demand| !staging(demand))?;
        self.demanded.remove(next)
    }

    /// Reads the expert that a hot slot waits for; what was there goes to the warm slot `keep`.
    fn read(&mut self, cx: &mut Context<'_>, slot: Slot, keep: Option<(Slot, (Held, u32))>) {
        let keep = keep.map(|(slot, (held, uses))| {
            self.recall(held);
            if let Some(displaced) = self.warm.assign(slot, held, uses) {
                self.remember(displaced);
            }
            slot
        });
        self.issue(cx, Path::Heat(slot, Origin::Disk { keep }), 0);
    }

    /// Promotes the expert that a hot slot waits for; `old`, if anything is to be kept, takes its place.
    fn promote(&mut self, cx: &mut Context<'_>, slot: Slot, from: Slot, old: Option<(Held, u32)>) {
        match old {
            Some((held, uses)) => {
                self.recall(held);
                self.warm.assign(from, held, uses);
            }
            None => self.warm.pin(from),
        }
        self.issue(cx, Path::Heat(slot, Origin::Warm { slot: from, exchange: old.is_some() }), 0);
    }

    /// The warm slot in which an expert is.
    fn staged(&self, held: Held) -> Option<Slot> {
        self.warm.slot_of(held).filter(|(_, ready)| *ready).map(|(slot, _)| slot)
    }

    fn issue(&mut self, cx: &mut Context<'_>, path: Path, failures: u32) {
        let load = self.next_load;
        self.next_load.0 += 1;
        self.loads.insert(load, Load { path, failures });
        cx.say(match path {
            Path::Stage(slot) => {
                let (expert, blob) = self.warm.coming_to(slot);
                Output::Stage { load, expert, blob, slot }
            }
            Path::Heat(slot, origin) => {
                let (expert, blob) = self.hot.coming_to(slot);
                Output::Load { load, expert, blob, slot, origin }
            }
        });
    }

    fn loaded(&mut self, cx: &mut Context<'_>, load: LoadId, fault: Option<Fault>, retries: u32) -> Outcome {
        let Load { path, failures } = self.loads.remove(&load).expect("Loaded answers a Load under way");
        let (key, blob) = match path {
            Path::Stage(slot) => self.warm.coming_to(slot),
            Path::Heat(slot, _) => self.hot.coming_to(slot),
        };
        if let Path::Heat(_, origin) = path {
            match origin {
                Origin::Disk { keep: Some(slot) } | Origin::Warm { slot, exchange: true }
                    if fault.is_none() =>
                {
                    self.warm.arrived(slot);
                }
                Origin::Disk { keep: Some(slot) } | Origin::Warm { slot, .. } => self.clear_warm(slot),
                Origin::Disk { keep: None } => {}
            }
        }
        match (fault, path) {
            (None, Path::Stage(slot)) => {
                self.warm.arrived(slot);
                Outcome::Staged
            }
            (None, Path::Heat(slot, _)) => {
                self.hot.arrived(slot);
                Outcome::Ready((key, blob))
            }
            (Some(_), _) if failures < retries => {
                cx.event(Event::LoadRetried { expert: key, failures: failures + 1 });
                self.issue(cx, path.again(), failures + 1);
                Outcome::Retried
            }
            (Some(fault), Path::Stage(slot)) => {
                self.clear_warm(slot);
                Outcome::Lost { key, hot: false, fault }
            }
            (Some(fault), Path::Heat(slot, _)) => {
                self.clear_hot(slot);
                Outcome::Lost { key, hot: true, fault }
            }
        }
    }

    /// # Panics
    /// If the tables contradict each other.
    pub(crate) fn check(&self) {
        self.hot.check();
        self.warm.check();
        let (mut heats, mut fills, mut frees) = (self.demanded.len(), 0, 0);
        for Load { path, .. } in self.loads.values() {
            heats += usize::from(matches!(path, Path::Heat(..)));
            match path {
                Path::Stage(_)
                | Path::Heat(_, Origin::Disk { keep: Some(_) } | Origin::Warm { exchange: true, .. }) => {
                    fills += 1
                }
                Path::Heat(_, Origin::Warm { exchange: false, .. }) => frees += 1,
                Path::Heat(_, Origin::Disk { keep: None }) => {}
            }
        }
        assert_eq!(self.hot.coming(), heats, "whatever comes to a hot slot is loaded or queued");
        assert_eq!(self.warm.coming(), fills, "whatever comes to a warm slot is staged or demoted");
        assert_eq!(self.warm.pinned(), frees, "a warm slot is in use while its expert is promoted");
        for held in self.gone.keys() {
            let inside = self.hot.slot_of(*held).or_else(|| self.warm.slot_of(*held));
            assert_eq!(inside, None, "a count is kept of what is in no arena");
        }
        for (held, _) in self.warm.held() {
            let hot = self.hot.slot_of(held);
            assert!(hot.is_none_or(|(_, ready)| !ready), "an expert is not in both arenas");
        }
    }
}

impl State {
    /// The shelf that an expert belongs to.
    pub(crate) fn shelf(&self, key: ExpertKey) -> u32 {
        let topology = &self.config.topology;
        if topology.pipeline * topology.expert == 1 {
            return 0;
        }
        let plan = self.plan();
        let stage = topology.stage(plan.layers, key.layer);
        stage * topology.expert + topology.holder(plan.experts_of_layer(), plan.ordinal(key))
    }

    /// Shelves of each arena.
    pub(crate) const fn shelves(&self) -> u32 {
        self.config.topology.pipeline * self.config.topology.expert
    }

    /// What experts are worth keeping while `layer` is computed. What no new position can select goes first: tiers that
    /// are masked, parameters that were replaced.
    fn worth(&self, layer: u32) -> impl Fn(Held, u32) -> Worth {
        let (plan, tiers) = (self.plan(), self.generations.active_tiers());
        let layers = &plan.moe_layers;
        let ordinal = |layer: u32| layers.binary_search(&layer).expect("an expert is in a mixture layer");
        let here = ordinal(layer);
        move |(key, blob), uses| {
            let current = tiers.contains(&key.tier) && self.current_blob(key) == blob;
            let steps_away = (ordinal(key.layer) + layers.len() - here - 1) % layers.len();
            (current.then(|| self.placement(key.tier)), uses, Reverse(steps_away))
        }
    }

    /// Gives a slot to an expert that a step demands, evicting if need be; `None` if every slot is in use.
    pub(crate) fn demand(&mut self, held: Held) -> Option<Slot> {
        let (shelf, hot) = (self.shelf(held.0), &self.residency.hot);
        let evict = || hot.least(shelf, self.worth(held.0.layer)).map(|(_, slot)| slot);
        let slot = hot.free(shelf).or_else(evict)?;
        let demand = self.residency.give(slot, held);
        self.residency.demanded.push_back(demand);
        Some(slot)
    }

    /// The warm slot for an expert that leaves the hot arena: a free one, or one with an expert that is worth less.
    fn refuge(&self, (old, uses): (Held, u32), layer: u32) -> Option<Slot> {
        let (shelf, warm, worth) = (self.shelf(old.0), &self.residency.warm, self.worth(layer));
        warm.free(shelf).or_else(|| {
            let (least, slot) = warm.least(shelf, &worth)?;
            (least < worth(old, uses)).then_some(slot)
        })
    }

    /// Starts loads: demanded ones first, those ahead with half of the depth once requests are served.
    pub(crate) fn issue_loads(&mut self, cx: &mut Context<'_>) {
        let depth = index(self.config.limits.loads_max);
        while self.residency.loads.len() < depth {
            let Some(demand) = self.residency.next_demand() else { break };
            self.bring(cx, demand);
        }
        let depth = if self.steps.current.is_some() { depth.div_ceil(2) } else { depth };
        while self.residency.loads.len() < depth && self.residency.demanded.is_empty() {
            let Some(held) = self.residency.ahead.pop_front() else { break };
            self.load_ahead(cx, held);
        }
        while self.has_what_it_needs()
            && let Some(held) = self.residency.next_foreseen()
        {
            self.load_foreseen(cx, held);
        }
    }

    /// Begins the load of what a hot slot was given to.
    fn bring(&mut self, cx: &mut Context<'_>, Demand { slot, old }: Demand) {
        let held = self.residency.hot.coming_to(slot);
        match self.residency.staged(held) {
            Some(from) => self.residency.promote(cx, slot, from, old),
            None => {
                let keep = old.and_then(|old| Some((self.refuge(old, held.0.layer)?, old)));
                self.residency.read(cx, slot, keep);
            }
        }
    }

    /// Loads an expert that is foreseen, in the place of the one that is the least worth and not foreseen too.
    fn load_foreseen(&mut self, cx: &mut Context<'_>, held: Held) {
        let Residency { hot, warm, foreseen, .. } = &self.residency;
        let staging = warm.slot_of(held).is_some_and(|(_, ready)| !ready);
        if staging || hot.slot_of(held).is_some() {
            return;
        }
        let (shelf, worth) = (self.shelf(held.0), self.worth(held.0.layer));
        let evict = || {
            let worth = |other, uses| (foreseen.experts.contains(&other), worth(other, uses));
            hot.least(shelf, worth).filter(|((foreseen, _), _)| !foreseen).map(|(_, slot)| slot)
        };
        let slot = hot.free(shelf).or_else(evict);
        drop(worth);
        if let Some(slot) = slot {
            self.residency.foreseen.begun.insert(held);
            let demand = self.residency.give(slot, held);
            self.bring(cx, demand);
        }
    }

    /// Loads an expert into a free slot, a hot one if there is one. What finds no room is loaded when it is demanded.
    fn load_ahead(&mut self, cx: &mut Context<'_>, held: Held) {
        let shelf = self.shelf(held.0);
        if self.residency.hot.slot_of(held).is_some() {
            return;
        }
        let known = self.residency.recall(held);
        let Residency { hot, warm, .. } = &mut self.residency;
        match (warm.slot_of(held), hot.free(shelf)) {
            (Some((from, true)), Some(slot)) => {
                hot.assign(slot, held, warm.uses(from));
                self.residency.promote(cx, slot, from, None);
            }
            (None, Some(slot)) => {
                hot.assign(slot, held, known);
                self.residency.read(cx, slot, None);
            }
            (None, None) => {
                if let Some(slot) = warm.free(shelf) {
                    warm.assign(slot, held, known);
                    self.residency.issue(cx, Path::Stage(slot), 0);
                } else {
                    self.residency.remember((held, known));
                }
            }
            (Some(_), _) => {}
        }
    }

    pub(crate) fn loaded(&mut self, cx: &mut Context<'_>, load: LoadId, fault: Option<Fault>) {
        match self.residency.loaded(cx, load, fault, self.config.limits.retries_max) {
            Outcome::Ready(held) => self.provide(cx, held),
            Outcome::Staged | Outcome::Retried => {}
            Outcome::Lost { key, hot, fault } => {
                let ExpertKey { layer, tier, group, expert } = key;
                let reason: String = format!(
                    "expert {expert} of group {group}, tier {tier}, layer {layer} cannot be loaded: {fault}"
                );
                if self.boot == crate::boot::Boot::Experts {
                    return self.exit_with(cx, reason);
                }
                if hot {
                    self.lost(cx, key, &reason);
                }
                self.switch_lost(cx, key, reason);
            }
        }
    }
}
