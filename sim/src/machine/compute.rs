//! The compute backend of a simulated machine: one step at a time, layer by layer, experts as they come.

use super::Machine;
use crate::model;
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{ExpertKey, Slot};
use lite_llm_core::input::{Fault, Input, RowResult};
use lite_llm_core::output::Forward;
use std::collections::{BTreeMap, BTreeSet};

/// A step that is being computed.
pub(super) struct Compute {
    pub(super) forward: Forward,
    /// Cached value of each position of each row.
    pub(super) cached: Vec<Vec<u64>>,
    /// Contents read, by expert.
    pub(super) read: BTreeMap<ExpertKey, u64>,
    pub(super) layer: usize,
    pub(super) asked: bool,
    pub(super) wanted: BTreeSet<ExpertKey>,
    pub(super) provided: Vec<(ExpertKey, Slot)>,
    pub(super) wave: u32,
    pub(super) wave_len: u32,
    pub(super) aborted: bool,
}

impl Machine {
    pub(super) fn begin(&mut self, forward: Forward) {
        assert!(self.compute.is_none(), "one step at a time");
        let (rows, tiers) = (forward.rows.iter(), &forward.tiers);
        let cached = rows.map(|row| model::row(&mut self.pages, row, tiers)).collect();
        self.compute = Some(Compute {
            forward,
            cached,
            read: BTreeMap::new(),
            layer: 0,
            asked: false,
            wanted: BTreeSet::new(),
            provided: Vec::new(),
            wave: 0,
            wave_len: 0,
            aborted: false,
        });
    }

    /// The next thing that the compute backend does.
    pub(super) fn step(&mut self) {
        let fault = self.fault("device hiccup");
        let Some(compute) = self.compute.as_mut() else { return };
        let (step, attempt) = (compute.forward.step, compute.forward.attempt);
        if compute.aborted || fault.is_some() {
            self.compute = None;
            let fault = fault.unwrap_or(Fault::Device("aborted".into()));
            return self.handle(Input::Failed { step, attempt, fault });
        }
        if let Some(resident) = compute.forward.resident.clone() {
            for (key, slot) in resident {
                let content = self.arenas.hot[slot.0 as usize].expect("a resident expert is there");
                compute.read.insert(key, content);
            }
            return self.finish();
        }
        let Some(&layer) = self.plan.moe_layers.get(compute.layer) else { return self.finish() };
        if !compute.asked {
            let states = compute.cached.iter().flatten();
            let tiers = &compute.forward.tiers;
            compute.wanted =
                states.flat_map(|&state| model::route(&self.plan, state, layer, tiers)).collect();
            compute.asked = true;
            let experts = compute.wanted.iter().copied().collect();
            let next = self.plan.moe_layers.get(compute.layer + 1).filter(|_| compute.forward.foresee);
            let states = compute.cached.iter().flatten();
            let foreseen =
                next.map(|&next| model::foresee(&self.plan, states, next, tiers)).unwrap_or_default();
            return self.handle(Input::Need { step, attempt, layer, experts, foreseen });
        }
        if compute.wave_len == 0 || compute.provided.len() < compute.wave_len as usize {
            return;
        }
        for (key, slot) in compute.provided.drain(..) {
            let content = self.arenas.hot[slot.0 as usize].expect("a provided expert is there");
            compute.read.insert(key, content);
            assert!(compute.wanted.remove(&key), "only what is needed is provided");
        }
        let wave = compute.wave;
        compute.wave_len = 0;
        if compute.wanted.is_empty() {
            compute.layer += 1;
            compute.asked = false;
            self.report.waves += u64::from(wave > 0);
        }
        self.handle(Input::Released { step, attempt, layer, wave });
    }

    pub(super) fn finish(&mut self) {
        let compute = self.compute.take().expect("a step is running");
        let Forward { step, attempt, ref tiers, .. } = compute.forward;
        let mut rows = Vec::new();
        for (row, states) in compute.forward.rows.iter().zip(&compute.cached) {
            let last = *states.last().expect("a row has positions");
            let token = row.sample.as_ref().map(|sample| {
                let layers = self.plan.moe_layers.iter();
                let experts = layers.flat_map(|&layer| model::route(&self.plan, last, layer, tiers));
                model::token(&self.plan, last, experts.map(|key| compute.read[&key]), sample.draw)
            });
            rows.push(RowResult { token, stop: false, digest: Digest::of(&last.to_le_bytes()) });
        }
        self.handle(Input::Finished { step, attempt, rows, duration_ns: 1000 });
    }
}
