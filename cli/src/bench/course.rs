//! The course of a run, step by step: read back from its journal, its measured times and the routes that were seen.

use crate::bench::roof::Roof;
use crate::history::{History, Moment};
use anyhow::Context;
use lite_llm_core::event::{Event, Phase};
use lite_llm_core::ids::ExpertKey;
use lite_llm_core::input::Input;
use lite_llm_core::output::{Carving, Forward, Output};
use lite_llm_hw::telemetry::TIMINGS_NAME;
use lite_llm_model::Capture;
use serde::Deserialize;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A step that has ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct Step {
    /// Positions that it computed.
    pub(crate) positions: u32,
    /// Rows, one for each request that had a part in it.
    pub(crate) rows: u32,
    /// Whether it did nothing but generate: no row had a position of its prompt.
    pub(crate) decodes: bool,
    /// Positions before and within it, over all rows: what attention reads.
    pub(crate) seen: u64,
    /// Nanoseconds from the end of the step before, or from its own beginning if there was none, to its end, without readings of the roof.
    pub(crate) wall_ns: u64,
    /// Nanoseconds of the backend, without those too.
    pub(crate) took_ns: u64,
    /// Of these, for want of experts.
    pub(crate) waited_ns: u64,
    /// Experts that were there when a layer needed them.
    pub(crate) hits: u32,
    /// Those that were not.
    pub(crate) misses: u32,
    /// Loads that foresight began.
    pub(crate) ahead: u32,
    /// Those of the misses whose load it had begun.
    pub(crate) foreseen: u32,
    /// What its layers needed, in order; nothing if all was resident.
    pub(crate) needed: Vec<ExpertKey>,
    /// Different experts that it used, over all layers.
    pub(crate) experts: u64,
}

/// All of them, and the memory that they ran in.
#[derive(Clone, Debug, Default)]
pub(crate) struct Course {
    /// In order.
    pub(crate) steps: Vec<Step>,
    /// How memory was divided.
    pub(crate) carving: Carving,
    /// The experts in the hot arena when the first step that decodes began.
    pub(crate) inside: Vec<ExpertKey>,
    /// Experts that could be selected, over all layers.
    pub(crate) experts: u64,
    /// Bytes of experts that the boot loaded.
    pub(crate) boot_bytes: u64,
    /// Nanoseconds that it took for them.
    pub(crate) boot_ns: u64,
}

/// A line of the measured times, as far as it is wanted.
#[derive(Debug, Deserialize)]
struct Line {
    what: What,
    duration_ns: u64,
}

#[derive(Debug, Deserialize)]
enum What {
    Phase(Phase),
    Step(serde::de::IgnoredAny, serde::de::IgnoredAny),
    Wait(u64),
    Load(serde::de::IgnoredAny),
    Promote(serde::de::IgnoredAny),
    Persist(serde::de::IgnoredAny),
    Flush,
}

/// A step that has begun.
struct Begun {
    forward: Forward,
    at_ns: u64,
    needed: Vec<ExpertKey>,
}

impl Course {
    /// Reads what a node left in its state directory. Prompts had `prompt` tokens each.
    pub(crate) fn read(state: &Path, prompt: u32, watch: &Watch) -> anyhow::Result<Self> {
        let mut course = Self::default();
        let waits = course.read_timings(state)?;
        let routes = watch.seen();
        let mut history = History::open(state)?;
        let (mut begun, mut last_ns): (Option<Begun>, Option<u64>) = (None, None);
        history.walk(None, |moment| {
            if let Input::Need { experts, .. } = moment.input
                && let Some(begun) = &mut begun
            {
                begun.needed.extend(experts);
            }
            if let Input::Finished { step, duration_ns, .. } = moment.input
                && let Some(begun) = begun.take()
            {
                let ended = moment.record.time_ns;
                let done = done(moment);
                let rows = &begun.forward.rows;
                let taken_ns = taken_ns(&begun.forward, &watch.roof);
                course.steps.push(Step {
                    positions: rows.iter().map(|row| row.tokens.len() as u32).sum(),
                    rows: rows.len() as u32,
                    decodes: rows.iter().all(|row| row.start >= prompt),
                    seen: rows.iter().map(|row| u64::from(row.start) + row.tokens.len() as u64).sum(),
                    wall_ns: (ended - last_ns.unwrap_or(begun.at_ns)).saturating_sub(taken_ns),
                    took_ns: duration_ns.saturating_sub(taken_ns),
                    waited_ns: waits.get(&step.0).copied().unwrap_or(0),
                    hits: done.hits,
                    misses: done.misses,
                    ahead: done.ahead,
                    foreseen: done.foreseen,
                    experts: different(&begun, &routes),
                    needed: begun.needed,
                });
                last_ns = Some(ended);
            }
            for output in moment.outputs {
                match output {
                    Output::Forward(forward) => {
                        let at_ns = moment.record.time_ns;
                        let plan = moment.engine.view().plan();
                        course.experts = plan.map_or(0, |plan| plan.experts(&forward.tiers).count() as u64);
                        begun = Some(Begun { forward: forward.clone(), at_ns, needed: Vec::new() });
                        course.carving = moment.engine.view().carving();
                        if course.inside.is_empty() && forward.rows.iter().all(|row| row.start >= prompt) {
                            let ready = moment.engine.view().slots().filter(|slot| slot.ready);
                            course.inside = ready.filter_map(|slot| slot.expert).collect();
                        }
                    }
                    Output::Event { event: Event::PhaseDone { phase: Phase::Experts, bytes }, .. } => {
                        course.boot_bytes = *bytes;
                    }
                    _ => {}
                }
            }
            Ok(())
        })?;
        Ok(course)
    }

    /// Reads the measured times; returns how long each step waited.
    fn read_timings(&mut self, state: &Path) -> anyhow::Result<BTreeMap<u64, u64>> {
        let path = state.join(TIMINGS_NAME);
        let text =
            std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let mut waits = BTreeMap::new();
        for line in text.lines() {
            let line: Line = serde_json::from_str(line).context("a line of measured times")?;
            match line.what {
                What::Phase(Phase::Experts) => self.boot_ns = line.duration_ns,
                What::Wait(step) => *waits.entry(step).or_insert(0) += line.duration_ns,
                _ => {}
            }
        }
        Ok(waits)
    }

    /// The steps that do nothing but generate, with as many rows as any of them has: before and after, there are fewer.
    pub(crate) fn decode(&self) -> impl Iterator<Item = &Step> {
        let rows = self.steps.iter().filter(|step| step.decodes).map(|step| step.rows).max().unwrap_or(0);
        self.steps.iter().filter(move |step| step.decodes && step.rows == rows)
    }

    /// The steps before the first of these.
    pub(crate) fn prefill(&self) -> impl Iterator<Item = &Step> {
        self.steps.iter().take_while(|step| !step.decodes)
    }
}

/// What the end of a step says of experts.
#[derive(Default)]
struct Done {
    hits: u32,
    misses: u32,
    ahead: u32,
    foreseen: u32,
}

fn done(moment: &Moment<'_>) -> Done {
    let done = moment.outputs.iter().find_map(|output| match *output {
        Output::Event { event: Event::StepDone { hits, misses, ahead, foreseen, .. }, .. } => {
            Some(Done { hits, misses, ahead, foreseen })
        }
        _ => None,
    });
    done.unwrap_or_default()
}

/// Nanoseconds that readings took from a step.
fn taken_ns(forward: &Forward, roof: &Roof) -> u64 {
    forward.rows.iter().map(|row| roof.taken_ns(row.request, row.start)).sum()
}

/// Different experts that a step used.
fn different(begun: &Begun, routes: &Seen) -> u64 {
    if !begun.needed.is_empty() {
        return begun.needed.len() as u64;
    }
    let mut used: BTreeSet<(u32, u32)> = BTreeSet::new();
    for row in &begun.forward.rows {
        for position in row.start..row.start + row.tokens.len() as u32 {
            used.extend(routes.get(&(row.request, position)).into_iter().flatten());
        }
    }
    used.len() as u64
}

/// Layer and expert, by request and position.
type Seen = BTreeMap<(u64, u32), Vec<(u32, u32)>>;

/// Looks on while a run computes: the routes that it takes, and what memory delivers meanwhile.
#[derive(Clone, Debug)]
pub(crate) struct Watch {
    routes: Arc<Mutex<Seen>>,
    pub(crate) roof: Roof,
}

impl Watch {
    pub(crate) fn new(roof: Roof) -> Self {
        Self { routes: Arc::default(), roof }
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.routes.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Capture for Watch {
    fn wants_logits(&self, _request: u64) -> bool {
        false
    }

    fn logits(&mut self, _request: u64, _position: u32, _logits: &[f32]) {}

    fn routes(&mut self, request: u64, layer: u32, position: u32, experts: &[u32], _weights: &[f32]) {
        self.seen()
            .entry((request, position))
            .or_default()
            .extend(experts.iter().map(|&expert| (layer, expert)));
        self.roof.routed(request, position);
    }
}
