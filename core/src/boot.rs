//! Boot sequence and load phases (spec 002, "Boot Sequence" and "Model Loading Phases"), first life and later ones.

use crate::carving::carve;
use crate::config::{Config, Placement};
use crate::engine::Context;
use crate::event::{Event, Phase};
use crate::ids::{Incarnation, index, len32};
use crate::input::Fault;
use crate::lifecycle::Lifecycle;
use crate::output::{Carving, Output};
use crate::pages::Pages;
use crate::plan::ModelPlan;
use crate::random::{Purpose, draw};
use crate::residency::{Held, Residency};
use crate::state::State;
use alloc::collections::VecDeque;
use alloc::{format, string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// What the boot sequence waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Boot {
    /// Nothing: not begun, or over.
    #[default]
    Idle,
    /// `Reserved`.
    Resources,
    /// `ManifestRead`.
    Manifest,
    /// `BaseLoaded` of this shard.
    Base(u32),
    /// The arenas to fill.
    Experts,
    /// `RoutersLoaded`.
    Router,
}

impl State {
    pub(crate) fn boot(
        &mut self,
        cx: &mut Context<'_>,
        incarnation: Incarnation,
        config: Config,
        entropy: u64,
    ) {
        assert!(self.lifecycle == Lifecycle::Boot && self.boot == Boot::Idle, "a journal boots once");
        self.configure(cx, incarnation, config, entropy);
    }

    /// A new life: all that was volatile is gone, all that was decided stays.
    pub(crate) fn restarted(
        &mut self,
        cx: &mut Context<'_>,
        incarnation: Incarnation,
        config: Config,
        entropy: u64,
    ) {
        assert!(
            incarnation > self.incarnation,
            "incarnation {incarnation} is not newer than {}",
            self.incarnation
        );
        self.move_to(cx, Lifecycle::Recovering);
        self.steps.current = None;
        self.residency = Residency::default();
        self.carving = Carving::default();
        self.pages = Pages::default();
        self.requests.forget_pages();
        self.generations.restart();
        self.restart_modifications(cx);
        self.drain = None;
        self.snapshots.writing = false;
        self.snapshots.wanted |= self.wishes.want_snapshot();
        cx.event(Event::Recovered { incarnation, requests: len32(self.requests.live().count()) });
        self.configure(cx, incarnation, config, entropy);
    }

    fn configure(&mut self, cx: &mut Context<'_>, incarnation: Incarnation, config: Config, entropy: u64) {
        self.incarnation = incarnation;
        if let Err(error) = config.check() {
            return self.exit_with(cx, error);
        }
        let given = config.routing_seed;
        match (self.routing_seed, given) {
            (Some(seed), Some(other)) if seed != other && self.plan.is_some() => {
                return self.exit_with(
                    cx,
                    format!(
                        "routing_seed is {other}, but this journal was begun with {seed}: give that, or another \
                         state directory"
                    ),
                );
            }
            (Some(_), _) if self.plan.is_some() => {}
            _ => self.routing_seed = Some(given.unwrap_or_else(|| draw(entropy, Purpose::RoutingSeed, 0, 0))),
        }
        let memory_bytes = config.memory_bytes;
        self.config = config;
        cx.event(Event::PhaseDone { phase: Phase::Config, bytes: 0 });
        self.boot = Boot::Resources;
        cx.say(Output::Reserve { memory_bytes });
    }

    pub(crate) fn reserved(&mut self, cx: &mut Context<'_>) {
        assert_eq!(self.boot, Boot::Resources, "Reserved answers Reserve");
        cx.event(Event::PhaseDone { phase: Phase::Resources, bytes: self.config.memory_bytes });
        cx.event(Event::PhaseDone { phase: Phase::Seed, bytes: 0 });
        cx.event(Event::PhaseDone { phase: Phase::Log, bytes: 0 });
        self.move_to(cx, Lifecycle::Loading);
        self.boot = Boot::Manifest;
        cx.say(Output::ReadManifest);
    }

    pub(crate) fn manifest_read(&mut self, cx: &mut Context<'_>, plan: ModelPlan) {
        assert_eq!(self.boot, Boot::Manifest, "ManifestRead answers ReadManifest");
        if let Err(error) = self.adopt(plan) {
            return self.exit_with(cx, error);
        }
        let carving = match carve(&self.config, self.plan(), self.pages_needed()) {
            Ok(carving) => carving,
            Err(error) => return self.exit_with(cx, error),
        };
        self.carving = carving;
        self.residency =
            Residency::new(carving.slots, carving.warm_slots, self.shelves(), self.residency.next_load());
        self.pages = Pages::new(carving.pages);
        cx.event(Event::PhaseDone { phase: Phase::Manifest, bytes: 0 });
        cx.say(Output::Carve(carving));
        self.load_base(cx, 0);
    }

    /// Checks the plan against itself, the configuration and what the journal already decided.
    fn adopt(&mut self, plan: ModelPlan) -> Result<(), String> {
        plan.check()?;
        if let Some(before) = &self.plan
            && before.identity != plan.identity
        {
            return Err(format!(
                "the journal is of model {} under contract {}, this is {} under {}: give the former model, or another \
                 state directory",
                before.identity.weights,
                before.identity.contract,
                plan.identity.weights,
                plan.identity.contract
            ));
        }
        self.config.topology.check(plan.layers, plan.experts_of_layer())?;
        let tiers = plan.tier_set(&self.config.tier_set).map_err(|e| format!("tier_set: {e}"))?;
        for (mode, names) in &self.config.modes {
            plan.tier_set(names).map_err(|e| format!("modes.{mode}: {e}"))?;
        }
        for name in self.config.placement.keys() {
            plan.tier_set(core::slice::from_ref(name)).map_err(|e| format!("placement: {e}"))?;
        }
        if let Some(broken) = self.requests.live().find(|r| r.beyond(&plan)) {
            return Err(format!("request {} of the journal does not fit this model", broken.id));
        }
        self.generations.begin_with(tiers);
        self.plan = Some(plan);
        Ok(())
    }

    /// Pages without which some accepted request could not be finished.
    fn pages_needed(&self) -> u32 {
        let plan = self.plan();
        let alone = self.requests.live().map(|request| request.pages_alone(plan));
        alone.chain([plan.pages_for(1, 1)]).max().unwrap_or(1)
    }

    fn load_base(&mut self, cx: &mut Context<'_>, shard: u32) {
        if index(shard) < self.plan().base_shards.len() {
            self.boot = Boot::Base(shard);
            cx.say(Output::LoadBase { shard });
            return;
        }
        let bytes = self.plan().base_shards.iter().sum();
        cx.event(Event::PhaseDone { phase: Phase::Base, bytes });
        self.boot = Boot::Experts;
        let wanted = self.experts_ahead();
        self.residency.want(wanted);
    }

    pub(crate) fn base_loaded(&mut self, cx: &mut Context<'_>, shard: u32) {
        assert_eq!(self.boot, Boot::Base(shard), "BaseLoaded answers LoadBase");
        self.load_base(cx, shard + 1);
    }

    /// Registers the experts of the active tiers: those placed hot go first, then the warm, the cold wait for demand.
    fn experts_ahead(&self) -> VecDeque<Held> {
        let plan = self.plan();
        let mut experts: Vec<_> = plan
            .experts(self.generations.active_tiers())
            .map(|key| (self.placement(key.tier), key))
            .filter(|(placement, _)| *placement != Placement::Cold)
            .collect();
        experts.sort_by_key(|&(placement, key)| (core::cmp::Reverse(placement), key));
        let mut room = alloc::vec![self.carving.slots + self.carving.warm_slots; index(self.shelves())];
        experts.retain(|&(_, key)| {
            let room = &mut room[index(self.shelf(key))];
            let fits = *room > 0;
            *room = room.saturating_sub(1);
            fits
        });
        experts.into_iter().map(|(_, key)| (key, self.current_blob(key))).collect()
    }

    /// The placement policy of a tier: the operator's, or else the checkpoint's hint.
    pub(crate) fn placement(&self, tier: u32) -> Placement {
        let plan = &self.plan().tiers[index(tier)];
        self.config.placement.get(&plan.name).copied().unwrap_or(plan.placement)
    }

    /// Goes on from the expert phase once the arenas are filled.
    pub(crate) fn fill_experts(&mut self, cx: &mut Context<'_>) {
        if self.boot == Boot::Experts && !self.residency.loading() {
            let bytes = u64::from(self.residency.ready()) * self.carving.slot_bytes;
            cx.event(Event::PhaseDone { phase: Phase::Experts, bytes });
            self.boot = Boot::Router;
            cx.say(Output::LoadRouters);
        }
    }

    pub(crate) fn routers_loaded(&mut self, cx: &mut Context<'_>) {
        assert_eq!(self.boot, Boot::Router, "RoutersLoaded answers LoadRouters");
        cx.event(Event::PhaseDone { phase: Phase::Router, bytes: self.plan().router_bytes });
        // For inference there is no optimizer state: the phase is passed, and `training = true` was refused.
        cx.event(Event::PhaseDone { phase: Phase::Optimizer, bytes: 0 });
        self.boot = Boot::Idle;
        self.move_to(cx, Lifecycle::Warm);
        self.move_to(cx, Lifecycle::Active);
        self.generations.activate(cx);
        cx.say(Output::Ready { after: cx.seq });
        if self.drain.is_some() {
            self.begin_drain(cx);
        }
    }

    pub(crate) fn boot_failed(&mut self, cx: &mut Context<'_>, fault: &Fault) {
        assert_ne!(self.boot, Boot::Idle, "BootFailed answers a step of the boot sequence");
        self.exit_with(cx, format!("{fault}"));
    }
}
