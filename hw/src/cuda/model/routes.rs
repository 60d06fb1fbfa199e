//! Routing on the device, and who uses which expert: found there, or by the host.

use super::super::CudaError;
use super::super::stream::Arg::{At, Long, Value, Word};
use super::run::Run;
use super::sizes::places_of;
use super::standing::Resident;
use lite_llm_core::ids::ExpertKey;
use lite_llm_core::routing::GroupScore;
use lite_llm_model::Model;
use lite_llm_model::arch::{Moe, Score};
use std::ops::Range;

/// Lists begin at multiples of so many words.
const LIST: usize = 4;

/// What stands for no expert.
pub(super) const NONE: u32 = 0x7fff_ffff;

/// Where the router's outputs of a layer go, and its routes: of the layer under way, or of the next one that is foreseen.
#[derive(Clone, Copy, Debug)]
pub(super) struct Place {
    scores: u64,
    pub(super) routes: u64,
}

/// The routes of a layer as they came from the device: positions x places, then faults.
#[derive(Clone, Copy, Debug)]
pub(super) struct Routes<'a> {
    places: usize,
    experts: &'a [u32],
    weights: &'a [u32],
    pub(super) faults: &'a [u32],
}

impl<'a> Routes<'a> {
    /// Of as many words as [`Run::route_words`] says.
    pub(super) fn new(words: &'a [u32], positions: usize, places: usize) -> Self {
        let (experts, rest) = words.split_at(positions * places);
        let (weights, faults) = rest.split_at(positions * places);
        Self { places, experts, weights, faults }
    }

    /// The experts of a position, by original number, ascending.
    pub(super) fn experts(&self, position: usize) -> &'a [u32] {
        let own = &self.experts[position * self.places..][..self.places];
        &own[..own.iter().position(|&expert| expert == NONE).unwrap_or(own.len())]
    }

    /// Their weights.
    pub(super) fn weights(&self, position: usize) -> &'a [f32] {
        let count = self.experts(position).len();
        bytemuck::cast_slice(&self.weights[position * self.places..][..count])
    }
}

impl Run<'_> {
    /// Where the routes of the layer under way stand, or those that are foreseen.
    pub(super) fn place(&self, foreseen: bool) -> Place {
        let at = |piece, each| Self::value(piece, if foreseen { each } else { 0 });
        Place {
            scores: at(self.room.scores, self.sizes.positions * self.sizes.router_rows),
            routes: at(self.room.routes, self.route_words()),
        }
    }

    /// Where those of the so-manieth mixture layer stay until the end of the step.
    pub(super) fn kept(&self, mixture: usize) -> Place {
        Place {
            scores: self.room.scores,
            routes: Self::value(self.room.routes, mixture * self.route_words()),
        }
    }

    /// Words of the routes of the step's positions.
    pub(super) fn route_words(&self) -> usize {
        self.sizes.route_words(self.at.len())
    }

    /// Routes the normalised input, which is packed, by the router of a layer.
    pub(super) fn route(&self, layer: usize, moe: &Moe, place: Place) -> Result<(), CudaError> {
        let router = self.routers.of_layer[layer].as_ref().expect("routers are loaded before the first step");
        let rows = self.positions();
        let scores = &router.scores;
        self.product(self.room.packed, scores, (self.tables.all, rows), place.scores)?;
        let (places, width) = (places_of(moe), moe.router_rows() as u32);
        let experts = place.routes;
        let weights = Self::value(experts, rows as usize * places);
        let faults = Self::value(weights, rows as usize * places);
        let out = [At(experts), At(weights), At(faults)];
        let normalise = Word(u32::from(moe.normalise));
        let seed = [Long(self.model.routing_seed()), Word(layer as u32)];
        let positions = At(self.tables.positions);
        let blocks = [rows, 1, 1];
        if let Some(tiered) = &moe.tiered {
            let (active, actives) = self.standing.active;
            let groups = tiered.tiers.iter().map(|tier| tier.groups);
            let experts = tiered.tiers.iter().map(|tier| tier.experts);
            let best = [
                tiered.select.tiers.min(tiered.tiers.len()),
                tiered.select.groups.min(groups.clone().max().unwrap_or(0)),
                tiered.select.experts.min(experts.max().unwrap_or(0)),
            ];
            let mut arguments = vec![At(place.scores), At(active), At(self.standing.first_child), positions];
            arguments.extend(out);
            arguments
                .extend([width, actives, tiered.tiers.len() as u32, groups.sum::<usize>() as u32].map(Word));
            arguments.extend(best.map(|count| Word(count as u32)));
            arguments.extend([normalise, Value(moe.scaling)]);
            arguments.extend(seed);
            return self.launch(self.functions.route_tiers, blocks, 32, &arguments);
        }
        let eligible = At(self.standing.eligible[layer].expect("a layer with experts"));
        let score = match moe.score {
            Score::Softmax => 0,
            Score::SoftmaxOfSelected => 1,
            Score::Sigmoid => 2,
            Score::Sparsemixer { jitter } => {
                let mut arguments = vec![At(place.scores), eligible, positions];
                arguments.extend(out);
                arguments.extend([Word(width), Value(jitter), normalise, Value(moe.scaling)]);
                arguments.extend(seed);
                return self.launch(self.functions.route_sparsely, blocks, 32, &arguments);
            }
        };
        let limit = moe.group_limit.map_or([0; 3], |limit| {
            [limit.groups as u32, limit.keep as u32, u32::from(limit.score == GroupScore::SumOfTop2)]
        });
        let mut arguments = vec![At(place.scores), eligible, At(router.correction), positions];
        arguments.extend(out);
        arguments.extend([Word(width), Word(places as u32), Word(score), normalise, Value(moe.scaling)]);
        arguments.extend(limit.map(Word));
        arguments.extend(seed);
        self.launch(self.functions.route, blocks, 32, &arguments)
    }

    /// Finds who uses which of the experts of a layer, all of which are resident: those of each expert rank. Users of each are counted
    /// from where its results begin.
    pub(super) fn find_users(&self, resident: &[Resident], routes: u64) -> Result<Found, CudaError> {
        let (rows, places) = (self.at.len(), self.sizes.places);
        let (count, own) = (rows * places, self.model.share().seat().expert as usize);
        let used = |resident: &Resident| resident.count.min(count as u32);
        let most = resident.iter().map(used).max().unwrap_or(0) as usize;
        let weights_at = self.lists;
        let first_user = Self::value(weights_at, (2 * most).next_multiple_of(LIST));
        let positions = Self::value(first_user, (most + 1).next_multiple_of(LIST));
        let results = Self::value(positions, count.next_multiple_of(LIST));
        // This rank's last: of the others only the results stay.
        let seats = (0..resident.len()).filter(|&seat| seat != own).chain([own]);
        for (seat, of_seat) in
            seats.map(|seat| (seat, resident[seat])).filter(|(_, of_seat)| of_seat.count > 0)
        {
            let lists = [of_seat.places, of_seat.begins, weights_at, first_user, positions, results].map(At);
            let sizes = [count as u32, places as u32, used(&of_seat), (seat * count) as u32].map(Word);
            let choices = [At(routes), At(Self::value(routes, 2 * count))];
            let arguments = [&choices[..], &lists, &sizes].concat();
            self.launch(self.functions.find_users, [of_seat.count, 1, 1], 256, &arguments)?;
        }
        Ok(Found { experts: used(&resident[own]), weights_at, first_user, positions, results })
    }
}

/// Who uses which expert, as the device found it: addresses of lists.
#[derive(Clone, Copy, Debug)]
pub(super) struct Found {
    /// This rank's experts that have a place in the lists, at most as many as are used; if there are none, there are no lists of them.
    pub(super) experts: u32,
    /// Where the weights of each begin, counted from the first slot.
    pub(super) weights_at: u64,
    /// The first user of each, and where those of the last end.
    pub(super) first_user: u64,
    /// The position of each user.
    pub(super) positions: u64,
    /// For each position, place by place: which of all ranks' users it is, or [`NONE`].
    pub(super) results: u64,
}

/// Who uses which expert, expert by expert.
#[derive(Debug, Default)]
pub(super) struct Users {
    /// The experts that are used, ascending.
    pub(super) keys: Vec<ExpertKey>,
    /// Where the users of each begin, and where those of the last end.
    pub(super) firsts: Vec<u32>,
    /// By original number: how many users an expert has, then where its next one goes.
    next: Vec<u32>,
    /// The position of each user.
    pub(super) positions: Vec<u32>,
    /// For each position, place by place: which user it is, or [`NONE`].
    pub(super) results: Vec<u32>,
}

impl Users {
    pub(super) fn find(&mut self, model: &Model, layer: u32, experts: usize, routes: &Routes<'_>) {
        let Self { keys, firsts, next, positions, results } = self;
        let rows = 0..routes.faults.len();
        next.clear();
        next.resize(experts, 0);
        for &expert in rows.clone().flat_map(|row| routes.experts(row)) {
            next[expert as usize] += 1;
        }
        let checkpoint = model.checkpoint();
        let used = (0u32..).zip(&*next).filter(|&(_, &users)| users > 0);
        let mut used: Vec<(ExpertKey, u32)> =
            used.map(|(expert, _)| (checkpoint.key(layer, expert), expert)).collect();
        used.sort_unstable();
        keys.clear();
        keys.extend(used.iter().map(|(key, _)| *key));
        firsts.clear();
        firsts.push(0);
        let mut end = 0;
        for (_, expert) in used {
            end += std::mem::replace(&mut next[expert as usize], end);
            firsts.push(end);
        }
        positions.clear();
        positions.resize(end as usize, 0);
        results.clear();
        results.resize(routes.faults.len() * routes.places, NONE);
        for row in rows {
            for (place, &expert) in routes.experts(row).iter().enumerate() {
                let user = &mut next[expert as usize];
                positions[*user as usize] = row as u32;
                results[row * routes.places + place] = *user;
                *user += 1;
            }
        }
    }

    /// The first and the end of the users of some experts.
    pub(super) fn of(&self, experts: &Range<usize>) -> (u32, u32) {
        (self.firsts[experts.start], self.firsts[experts.end])
    }

    /// The most users that one of these experts has.
    pub(super) fn most(&self, experts: &Range<usize>) -> u32 {
        self.firsts[experts.start..=experts.end].windows(2).map(|pair| pair[1] - pair[0]).max().unwrap_or(0)
    }
}

/// The experts that the next layer will probably choose, the likeliest first: by how much they weigh in these routes.
pub(super) fn foreseen(model: &Model, layer: u32, experts: usize, routes: &Routes<'_>) -> Vec<ExpertKey> {
    if routes.faults.iter().any(|&fault| fault != 0) {
        return Vec::new();
    }
    let mut weights = vec![0.0f32; experts];
    for row in 0..routes.faults.len() {
        for (&expert, weight) in routes.experts(row).iter().zip(routes.weights(row)) {
            weights[expert as usize] += weight.abs();
        }
    }
    let weighty = (0u32..).zip(&weights).filter(|(_, weight)| **weight > 0.0);
    let mut found: Vec<u32> = weighty.map(|(expert, _)| expert).collect();
    found.sort_by(|&one, &other| weights[other as usize].total_cmp(&weights[one as usize]));
    found.into_iter().map(|expert| model.checkpoint().key(layer, expert)).collect()
}
