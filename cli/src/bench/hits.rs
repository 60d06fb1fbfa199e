//! How often experts were there when they were needed, over all lives of a journal, and how often they could have been.

use super::optimum;
use crate::history::Moment;
use lite_llm_core::event::Event;
use lite_llm_core::ids::ExpertKey;
use lite_llm_core::input::Input;
use lite_llm_core::output::Output;
use lite_llm_core::view::View;
use serde_json::{Value, json};
use std::collections::BTreeMap;

/// A life's memory, and what was needed in it.
#[derive(Debug, Default)]
struct Life {
    /// Slots of each rank.
    slots: usize,
    /// Once any expert was needed.
    shelves: Option<BTreeMap<u32, Shelf>>,
}

/// The experts of some ranks, which have slots of their own.
#[derive(Debug, Default)]
struct Shelf {
    experts: usize,
    /// Those that were there when the first was needed.
    inside: Vec<ExpertKey>,
    needed: Vec<ExpertKey>,
}

impl Shelf {
    /// All of them before anything is needed.
    fn all(view: &View<'_>) -> BTreeMap<u32, Self> {
        let mut shelves: BTreeMap<u32, Self> = BTreeMap::new();
        let Some(plan) = view.plan() else { return shelves };
        let tiers: Vec<u32> = (0..).zip(&plan.tiers).map(|(tier, _)| tier).collect();
        for key in plan.experts(&tiers) {
            shelves.entry(view.shelf(key)).or_default().experts += 1;
        }
        for expert in view.slots().filter(|slot| slot.ready).filter_map(|slot| slot.expert) {
            shelves.entry(view.shelf(expert)).or_default().inside.push(expert);
        }
        shelves
    }
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
                Output::Forward(forward) if forward.resident.is_none() && self.life.shelves.is_none() => {
                    self.life.shelves = Some(Shelf::all(&moment.engine.view()));
                }
                // A step that began before the journal does cannot be counted: what it had needed is not known.
                Output::Event { event: Event::StepDone { hits, misses, ahead, foreseen, .. }, .. }
                    if self.life.shelves.is_some() =>
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
            && let Life { slots, shelves: Some(shelves) } = &mut self.life
        {
            let view = moment.engine.view();
            for &expert in experts {
                let shelf = shelves.entry(view.shelf(expert)).or_default();
                shelf.needed.push(expert);
                self.asked += 1;
                self.alike += (*slots as f64 / shelf.experts.max(1) as f64).min(1.0);
            }
        }
    }

    fn end_life(&mut self) {
        let Life { slots, shelves } = std::mem::take(&mut self.life);
        for Shelf { inside, needed, .. } in shelves.unwrap_or_default().into_values() {
            self.best += optimum::hits(&needed, &inside, slots);
            self.recency += optimum::hits_of_recency(&needed, &inside, slots);
        }
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
