//! How often experts were there when they were needed, over all lives of a journal, and how often they could have been.

use super::optimum;
use crate::history::Moment;
use lite_llm_core::event::Event;
use lite_llm_core::ids::ExpertKey;
use lite_llm_core::input::Input;
use lite_llm_core::output::Output;
use serde_json::{Value, json};

/// A life's memory, and what was needed in it.
#[derive(Debug, Default)]
struct Life {
    slots: usize,
    /// The experts that were there when the first was needed.
    inside: Option<Vec<ExpertKey>>,
    needed: Vec<ExpertKey>,
}

/// What was counted.
#[derive(Debug, Default)]
pub(crate) struct Hits {
    life: Life,
    needed: u64,
    hits: u64,
    /// Loads begun by foresight, and those of them that were needed.
    ahead: u64,
    foreseen: u64,
    /// The same, with those of steps that were given up.
    asked: u64,
    best: u64,
    recency: u64,
    /// What any eviction would have if all experts were as likely: of every need its life's share.
    alike: f64,
}

impl Hits {
    /// Takes a record of the journal, in order.
    pub(crate) fn note(&mut self, moment: &Moment<'_>) {
        if self.life.slots == 0 {
            // The records of the boot went with a snapshot.
            self.life.slots = moment.engine.view().carving().slots as usize;
        }
        for output in moment.outputs {
            match output {
                Output::Carve(carving) => {
                    self.end_life();
                    self.life.slots = carving.slots as usize;
                }
                Output::Forward(forward) if forward.resident.is_none() && self.life.inside.is_none() => {
                    let ready = moment.engine.view().slots().filter(|slot| slot.ready);
                    self.life.inside = Some(ready.filter_map(|slot| slot.expert).collect());
                }
                // A step that began before the journal does cannot be counted: what it had needed is not known.
                Output::Event { event: Event::StepDone { hits, misses, ahead, foreseen, .. }, .. }
                    if self.life.inside.is_some() =>
                {
                    self.hits += u64::from(*hits);
                    self.needed += u64::from(hits + misses);
                    self.ahead += u64::from(*ahead);
                    self.foreseen += u64::from(*foreseen);
                }
                _ => {}
            }
        }
        if let Input::Need { experts, .. } = moment.input
            && self.life.inside.is_some()
        {
            let plan = moment.engine.view().plan();
            let all = plan.map_or(0, |plan| plan.experts_of_layer() as usize * plan.moe_layers.len());
            self.life.needed.extend(experts);
            self.asked += experts.len() as u64;
            self.alike += experts.len() as f64 * (self.life.slots as f64 / all.max(1) as f64).min(1.0);
        }
    }

    fn end_life(&mut self) {
        let Life { slots, inside, needed } = std::mem::take(&mut self.life);
        let inside = inside.unwrap_or_default();
        self.best += optimum::hits(&needed, &inside, slots);
        self.recency += optimum::hits_of_recency(&needed, &inside, slots);
    }

    /// The report; without needs every expert was always there.
    pub(crate) fn report(mut self) -> Value {
        self.end_life();
        let rate = |hits: f64, of: u64| if of == 0 { 1.0 } else { hits / of as f64 };
        json!({
            "needed": self.needed,
            "hits": self.hits,
            "hit_rate": rate(self.hits as f64, self.needed),
            "belady_hit_rate": rate(self.best as f64, self.asked),
            "lru_hit_rate": rate(self.recency as f64, self.asked),
            "loads_ahead": self.ahead,
            "foreseen": self.foreseen,
            "uniform_hit_rate": rate(self.alike, self.asked),
        })
    }
}
