//! The simulated arithmetic of one rank: a share of every result, and the exchanges that make it whole.
//!
//! Tensor ranks hold some bits of each expert's content, expert ranks some experts, stages some layers; a row's value is what
//! [`crate::model`] says once all shares are put together, and is wrong if any of them is missing, stale or another's.

use crate::model::{self, mix};
use lite_llm_core::cluster::collective::{Exchange, Kind, Plan};
use lite_llm_core::cluster::message::Tag;
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{ExpertKey, Slot};
use lite_llm_core::input::RowResult;
use lite_llm_core::output::Forward;
use lite_llm_core::plan::ModelPlan;
use lite_llm_core::topology::Topology;
use std::collections::{BTreeMap, BTreeSet};

/// The exchange in which a stage hands its rows on.
const HAND_ON: u32 = 1 << 16;

/// Some experts' contents, or a share of them.
type Contents = Vec<(ExpertKey, u64)>;

/// What a rank's arithmetic wants next.
#[derive(Debug)]
pub(super) enum Step {
    /// Nothing until something comes.
    Wait,
    /// The experts of a layer, and what is foreseen of the next.
    Need(u32, Vec<ExpertKey>, Vec<ExpertKey>),
    /// A wave has been read.
    Released(u32, u32),
    /// Data for other ranks; then go on.
    Send(Vec<(u32, Tag, Vec<u8>)>),
    /// All is done.
    Finished(Vec<RowResult>),
}

/// Where a rank is in its step.
#[derive(Debug)]
enum At {
    /// The rows of the stage before are to come.
    Before,
    /// A layer begins.
    Layer,
    /// Its experts are to come, in waves.
    Experts,
    /// The other ranks' shares of it are to come.
    Shares(Exchange<Contents>),
    /// The rows are to be handed on.
    After,
}

/// A step as one rank computes it.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) forward: Forward,
    rank: u32,
    topology: Topology,
    /// What each position of each row left in the cache.
    states: Vec<Vec<u64>>,
    /// Mixture layers of the stage that are left, the next one last.
    layers: Vec<u32>,
    at: At,
    /// The value of each row so far.
    rows: Vec<u64>,
    read: Contents,
    wanted: BTreeSet<ExpertKey>,
    pub(super) provided: Vec<(ExpertKey, Slot)>,
    wave: Option<(u32, u32)>,
}

/// The share of a content that a tensor rank holds: some of its bits.
pub(super) fn share_of(topology: &Topology, rank: u32, content: u64) -> u64 {
    let (parts, part) = (topology.tensor, topology.seat(rank).tensor);
    let bits = |part: u32| u64::from(part) * 64 / u64::from(parts);
    let upto = |bits: u64| if bits == 64 { u64::MAX } else { (1 << bits) - 1 };
    content & upto(bits(part + 1)) & !upto(bits(part))
}

impl Work {
    /// Begins a step on rows that left these states.
    pub(super) fn new(
        topology: Topology,
        plan: &ModelPlan,
        rank: u32,
        forward: Forward,
        states: Vec<Vec<u64>>,
    ) -> Self {
        let stage = topology.seat(rank).pipeline;
        let own = topology.layers(plan.layers, stage);
        let layers = plan.moe_layers.iter().copied().filter(|layer| own.contains(layer)).rev().collect();
        let last = |states: &Vec<u64>| *states.last().expect("a row has positions");
        let draw = |row: &lite_llm_core::output::Row| row.sample.as_ref().map_or(0, |sample| sample.draw);
        let rows = states.iter().zip(&forward.rows).map(|(states, row)| mix(last(states), draw(row)));
        Self {
            rank,
            topology,
            layers,
            at: if stage == 0 { At::Layer } else { At::Before },
            rows: rows.collect(),
            states,
            forward,
            read: Vec::new(),
            wanted: BTreeSet::new(),
            provided: Vec::new(),
            wave: None,
        }
    }

    const fn tag(&self, exchange: u32) -> Tag {
        Tag { step: self.forward.step, attempt: self.forward.attempt, exchange }
    }

    /// The ranks of this one's stage.
    fn stage(&self) -> Vec<u32> {
        let stage = self.topology.seat(self.rank).pipeline;
        (0..self.topology.ranks()).filter(|&rank| self.topology.seat(rank).pipeline == stage).collect()
    }

    /// An expert is in its slot.
    pub(super) fn provide(&mut self, wave: u32, wave_len: u32, key: ExpertKey, slot: Slot) {
        self.wave = Some((wave, wave_len));
        self.provided.push((key, slot));
    }

    /// Data of another rank; whether it was for where this one is.
    pub(super) fn hear(&mut self, from: u32, tag: Tag, bytes: &[u8]) -> bool {
        match &mut self.at {
            At::Before if tag.exchange == HAND_ON => {
                self.rows = postcard::from_bytes(bytes).expect("a rank of this very version sent it");
                self.at = At::Layer;
                true
            }
            At::Shares(exchange) => {
                tag.exchange < HAND_ON
                    && exchange.take(from, tag, postcard::from_bytes(bytes).expect("of this very version"))
            }
            _ => false,
        }
    }

    /// Goes on. `read` gives what is in a slot.
    pub(super) fn go_on(
        &mut self,
        plan: &ModelPlan,
        read: impl Fn(ExpertKey, Slot) -> u64,
        holds: impl Fn(ExpertKey) -> bool,
    ) -> Step {
        match &self.at {
            At::Before => Step::Wait,
            At::Layer => {
                let Some(&layer) = self.layers.last() else {
                    self.at = At::After;
                    return self.hand_on();
                };
                self.read.clear();
                if let Some(resident) = &self.forward.resident {
                    let of_layer = resident.iter().filter(|(key, _)| key.layer == layer);
                    self.read.extend(of_layer.map(|&(key, slot)| (key, read(key, slot))));
                    return self.share(layer);
                }
                let tiers = &self.forward.tiers;
                let states = self.states.iter().flatten();
                let needs: BTreeSet<ExpertKey> =
                    states.flat_map(|&state| model::route(plan, state, layer, tiers)).collect();
                self.wanted = needs.iter().copied().filter(|key| holds(*key)).collect();
                self.at = At::Experts;
                let next = self.layers.iter().rev().nth(1).filter(|_| self.forward.foresee);
                let states = self.states.iter().flatten();
                let foreseen =
                    next.map(|&next| model::foresee(plan, states, next, tiers)).unwrap_or_default();
                Step::Need(layer, needs.into_iter().collect(), foreseen)
            }
            At::Experts => {
                let layer = *self.layers.last().expect("a layer is under way");
                match self.wave {
                    Some((wave, len)) if self.provided.len() == len as usize => {
                        for (key, slot) in core::mem::take(&mut self.provided) {
                            assert!(self.wanted.remove(&key), "only what is needed is provided");
                            self.read.push((key, read(key, slot)));
                        }
                        self.wave = None;
                        Step::Released(layer, wave)
                    }
                    None if self.wanted.is_empty() => self.share(layer),
                    _ => Step::Wait,
                }
            }
            At::Shares(exchange) => {
                let Some(shares) = exchange.parts() else { return Step::Wait };
                let layer = self.layers.pop().expect("a layer is under way");
                let mut whole: BTreeMap<ExpertKey, u64> = BTreeMap::new();
                for (key, bits) in shares.into_iter().flat_map(|(_, share)| share) {
                    *whole.entry(key).or_default() |= bits;
                }
                let tiers = &self.forward.tiers;
                for (row, states) in self.rows.iter_mut().zip(&self.states) {
                    let last = *states.last().expect("a row has positions");
                    let experts = model::route(plan, last, layer, tiers).into_iter();
                    // A content that nobody gave counts as none: the result shows it.
                    *row = experts.fold(*row, |sum, key| mix(sum, whole.get(&key).copied().unwrap_or(0)));
                }
                self.at = At::Layer;
                self.go_on(plan, read, holds)
            }
            At::After => Step::Finished(self.results(plan)),
        }
    }

    /// Gives the others of the stage what this rank has read.
    fn share(&mut self, layer: u32) -> Step {
        self.read.sort_unstable();
        let group = Plan::new(Kind::AllGather, self.stage());
        let (exchange, sends) =
            Exchange::begin(group, self.tag(layer), self.rank, std::slice::from_ref(&self.read));
        let tag = self.tag(layer);
        self.at = At::Shares(exchange);
        Step::Send(sends.into_iter().map(|(to, part)| (to, tag, bytes_of(&part))).collect())
    }

    /// Gives the same seat of the next stage the rows.
    fn hand_on(&self) -> Step {
        let seat = self.topology.seat(self.rank);
        let next = lite_llm_core::topology::Seat { pipeline: seat.pipeline + 1, ..seat };
        if next.pipeline == self.topology.pipeline {
            return Step::Send(Vec::new());
        }
        Step::Send(vec![(self.topology.rank(next), self.tag(HAND_ON), bytes_of(&self.rows))])
    }

    fn results(&self, plan: &ModelPlan) -> Vec<RowResult> {
        let last = self.topology.seat(self.rank).pipeline + 1 == self.topology.pipeline;
        let results = self.rows.iter().zip(&self.forward.rows).map(|(&value, row)| {
            let token = u32::try_from(value % u64::from(plan.vocab)).expect("below the vocabulary");
            let token = row.sample.as_ref().filter(|_| last).map(|_| token);
            RowResult { token, stop: false, digest: Digest::of(&value.to_le_bytes()) }
        });
        results.collect()
    }
}

fn bytes_of<T: serde::Serialize>(value: &T) -> Vec<u8> {
    postcard::to_extend(value, Vec::with_capacity(64)).expect("numbers always encode")
}
