//! A mixture layer on the device. Where all experts are resident, the device finds out who uses which, and the host hears of the
//! router's choice at the end of the step. Else the choice comes to the host first, which asks for experts that are not there and says who
//! uses which. Results wait in a buffer and are combined in ascending order, so that the order of arrival changes
//! no bit.

use super::super::CudaError;
use super::super::stream::Arg::{At, Value, Word};
use super::agreement::Ways;
use super::mirror::{Mirror, Results};
use super::ranks::Among;
use super::routes::{Routes, Users, foreseen};
use super::run::{Run, Several};
use super::standing::Resident;
use super::transport::Transport;
use super::weights::{Layer, Matrix};
use super::{Failed, Step};
use lite_llm_core::ids::Slot;
use lite_llm_model::forward::exchange::{of_block, of_experts};
use lite_llm_model::parts::ExpertPart;
use lite_llm_model::{ExpertSource, Provided, StepError};
use std::ops::Range;

/// Positions of a step, at most, whose experts are taken to have few rows.
const FEW_POSITIONS: u32 = 64;

/// What mixtures are made with on the host.
#[derive(Debug)]
pub(super) struct Desk {
    pub(super) lists: Mirror,
    pub(super) results: Results,
    pub(super) users: Users,
    pub(super) ways: Ways,
}

/// The matrices of experts, as those of the slot where slots begin.
#[derive(Clone, Copy, Debug)]
struct Experts {
    matrices: [Matrix; 3],
}

impl Run<'_> {
    /// A layer whose experts come and go, or have many users among ranks: the host hears of the choice, and asks for what it needs.
    pub(super) fn mixture(
        &self,
        index: usize,
        layer: &Layer,
        step: &mut Step<'_, '_>,
        source: &mut dyn ExpertSource,
        desk: &mut Desk,
    ) -> Result<(), Failed> {
        let moe = self.model.arch().moe.as_ref().expect("a mixture layer");
        let (number, rows) = (index as u32, self.at.len());
        let next =
            (index + 1..self.routers.of_layer.len()).find(|&next| self.routers.of_layer[next].is_some());
        let next = next.filter(|_| step.forward.foresee);
        let own = self.routers.of_layer[index].as_ref().expect("routers are loaded").scores.storage;
        let other =
            next.and_then(|next| self.routers.of_layer[next].as_ref()).map(|next| next.scores.storage);
        let storages = [own, other.unwrap_or(own)];
        self.pack(self.room.normed, 0, rows as u32, self.hidden(), &storages, self.room.packed)?;
        self.route(index, moe, self.place(false))?;
        desk.results.ask(self.stream, self.place(false).routes, self.route_words())?;
        if let Some(next) = next {
            self.route(next, moe, self.place(true))?;
            desk.results.ask(self.stream, self.place(true).routes, self.route_words())?;
        }
        let (routes, after) = desk.results.look(self.stream)?.split_at(self.route_words());
        let routes = Routes::new(routes, rows, self.sizes.places);
        self.take_routes(number, &routes, step)?;
        let users = &mut desk.users;
        users.find(self.model, number, moe.experts, &routes);
        let foreseen = next.map_or_else(Vec::new, |next| {
            let after = Routes::new(after, rows, self.sizes.places);
            foreseen(self.model, next as u32, moe.experts, &after)
        });
        let experts = self.experts();
        // Those that this rank computes are neighbours, as an expert rank's always are.
        let own = users.own(self.model);
        desk.lists.clear();
        let positions = desk.lists.words(&users.positions);
        let results = desk.lists.words(&users.results);
        let first_row = desk.lists.words(&users.firsts);
        let transport = desk.ways.transport();
        if let Some(resident) = &step.forward.resident {
            let slots = users.keys[own.clone()].iter().map(|key| {
                let at = resident.binary_search_by_key(key, |&(key, _)| key);
                resident[at.expect("every expert of the tiers is resident")].1
            });
            let begins: Vec<u64> = slots.map(|slot| self.begin(slot)).collect();
            let begins = desk.lists.longs(&begins);
            desk.lists.send(self.stream)?;
            self.pack_users(&experts, users.of(&own), positions)?;
            let (mut first, mut count) = (own.start, 0);
            while first < own.end {
                let group = users.together(first, own.end, self.is_tensor());
                let begins = begins + 8 * (first - own.start) as u64;
                let several = Several {
                    count: group.len() as u32,
                    weights_at: begins,
                    biases_at: begins,
                    first_row: Self::value(first_row, first),
                    rows_max: users.most(&group),
                    rows_usual: users.most(&group),
                };
                let mut among = Among { source, transport };
                self.together(
                    &experts,
                    several,
                    (users.of(&group), 0),
                    of_experts(index, count),
                    &mut among,
                )?;
                (first, count) = (group.end, count + 1);
            }
            self.exchange_results(index, users, &mut Among { source, transport })?;
            self.shared(index, layer, &mut Among { source, transport })?;
        } else {
            desk.lists.send(self.stream)?;
            source.need(number, &users.keys, &foreseen)?;
            // Tensor ranks exchange what it gives, in the order of the model on the CPU.
            if !self.is_tensor() {
                self.shared(index, layer, &mut Among { source, transport })?;
            }
            self.pack_users(&experts, users.of(&own), positions)?;
            self.as_they_come(index, &experts, (users, &own), first_row, (source, transport))?;
            self.exchange_results(index, users, &mut Among { source, transport })?;
            if self.is_tensor() {
                self.shared(index, layer, &mut Among { source, transport })?;
            }
        }
        self.combine(layer, results, self.place(false).routes)?;
        Ok(())
    }

    /// Takes the routes of a layer.
    pub(super) fn take_routes(
        &self,
        number: u32,
        routes: &Routes<'_>,
        step: &mut Step<'_, '_>,
    ) -> Result<(), StepError> {
        if let Some(at) = routes.faults.iter().position(|&fault| fault != 0) {
            let at = &self.at[at];
            return Err(StepError::NonFinite { row: at.row as u32, layer: number, position: at.position });
        }
        for (i, at) in self.at.iter().enumerate() {
            step.route(number, at, routes.experts(i), routes.weights(i));
        }
        Ok(())
    }

    /// A layer whose experts are all there: nothing is asked of the host. What it hears at the end may be that the step has no rows;
    /// what is computed until then of values that are not finite is nobody's. Ranks exchange a row for each user that there may be,
    /// of which those without an expert are nobody's too; each expert rank has results in a place of its own.
    pub(super) fn with_resident(
        &self,
        index: usize,
        layer: &Layer,
        resident: &[Resident],
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        let (moe, rows) = (self.model.arch().moe.as_ref().expect("a mixture layer"), self.positions());
        let storage = self.routers.of_layer[index].as_ref().expect("routers are loaded").scores.storage;
        self.pack(self.room.normed, 0, rows, self.hidden(), &[storage], self.room.packed)?;
        let place = self.kept(self.routers.mixtures_before(index));
        self.route(index, moe, place)?;
        let found = self.find_users(resident, place.routes)?;
        let (experts, users) = (self.experts(), rows * self.sizes.places as u32);
        let all: u32 = resident.iter().map(|of_rank| of_rank.count).sum();
        let several = Several {
            count: found.experts,
            weights_at: found.weights_at,
            biases_at: found.weights_at,
            first_row: found.first_user,
            rows_max: rows,
            rows_usual: usual_rows(rows, users, all),
        };
        if several.count > 0 {
            self.pack_users(&experts, (0, users), found.positions)?;
            let behind = self.model.share().seat().expert * users;
            self.together(&experts, several, ((0, users), behind), of_experts(index, 0), among)?;
        }
        self.exchange_places(index, among)?;
        self.shared(index, layer, among)?;
        Ok(self.combine(layer, found.results, place.routes)?)
    }

    /// Computes each expert when it comes. Experts come in orders that tensor ranks do not share: they compute a whole wave in the order
    /// of experts.
    fn as_they_come(
        &self,
        index: usize,
        experts: &Experts,
        (users, own): (&Users, &Range<usize>),
        first_row: u64,
        (source, transport): (&mut dyn ExpertSource, &mut dyn Transport),
    ) -> Result<(), Failed> {
        let (mut left, mut count, mut came) = (own.len(), 0, 0);
        let mut wave: Vec<Provided> = Vec::new();
        while left > 0 {
            let last = source.provided()?;
            came += 1;
            let whole = came == last.wave_len;
            wave.push(last);
            wave.sort_unstable_by_key(|provided| provided.expert);
            let ready = if whole || !self.is_tensor() { std::mem::take(&mut wave) } else { Vec::new() };
            for provided in ready {
                let at = users.keys.binary_search(&provided.expert).expect("an expert that is needed");
                let group = at..at + 1;
                let several = Several {
                    count: 1,
                    weights_at: self.standing.zeros,
                    biases_at: self.standing.zeros,
                    first_row: Self::value(first_row, at),
                    rows_max: users.most(&group),
                    rows_usual: users.most(&group),
                };
                let here = experts.at(self.begin(provided.slot));
                let mut among = Among { source, transport };
                self.together(&here, several, (users.of(&group), 0), of_experts(index, count), &mut among)?;
                (left, count) = (left - 1, count + 1);
            }
            if whole {
                came = 0;
                // Nobody may write a slot that is still read.
                self.stream.wait()?;
                source.released(index as u32, last.wave)?;
            }
        }
        Ok(())
    }

    /// Where a slot begins, counted from the first.
    fn begin(&self, slot: Slot) -> u64 {
        u64::from(slot.0) * self.slots.1
    }

    fn experts(&self) -> Experts {
        let part = self.model.expert_part().expect("a mixture has experts");
        let ExpertPart { outputs, storages, matrices, biases } = part;
        let (hidden, width) =
            (self.hidden(), self.model.arch().moe.as_ref().map_or(0, |moe| moe.intermediate));
        let matrix = |i: usize, inputs: u32| Matrix {
            storage: storages[i],
            outputs: outputs[i] as u32,
            inputs,
            weights: self.slots.0 + matrices[i] as u64,
            bias: biases.map_or(0, |biases| self.slots.0 + biases[i] as u64),
        };
        Experts { matrices: [matrix(0, hidden), matrix(1, hidden), matrix(2, width as u32)] }
    }

    /// Brings the rows of the users of some experts in the order that products want, each to the user's place.
    fn pack_users(
        &self,
        experts: &Experts,
        (first, end): (u32, u32),
        positions: u64,
    ) -> Result<(), CudaError> {
        let [gate, up, _] = &experts.matrices;
        if first == end {
            return Ok(());
        }
        let (storages, to) = ([gate.storage, up.storage], self.room.packed.at_row(first, gate.inputs));
        let picked = Self::value(positions, first as usize);
        self.pack(self.room.normed, picked, end - first, gate.inputs, &storages, to)
    }

    /// Computes some experts, whose users are packed: those of a range. Their results stand as many rows farther behind as is said. Their
    /// inner values are an exchange of that number, if there are others to exchange with.
    fn together(
        &self,
        experts: &Experts,
        several: Several,
        ((first, end), behind): ((u32, u32), u32),
        exchange: u32,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        if first == end {
            return Ok(());
        }
        let (room, [gate, up, down]) = (self.room, &experts.matrices);
        let activation = self.model.arch().moe.as_ref().expect("a mixture").activation;
        self.products(room.packed, gate, several, room.gates)?;
        self.products(room.packed, up, several, room.ups)?;
        let from = |piece| Self::value(piece, (first * gate.outputs) as usize);
        let (count, n) = (end - first, (end - first) * gate.outputs);
        self.activate(activation, from(room.gates), from(room.ups), from(room.inside), n)?;
        let inside = Self::value(room.inside, (first * down.inputs) as usize);
        self.gather_rows((from(room.inside), inside), count, down.inputs, exchange, among)?;
        let to = room.packed_inside.at_row(first, down.inputs);
        self.pack(inside, 0, count, down.inputs, &[down.storage], to)?;
        // A rank's rows of results stand closer together: they are put beside those that are there.
        let results = Self::value(room.results, (behind * self.hidden()) as usize);
        let own = if self.is_tensor() { room.own } else { results };
        self.products(room.packed_inside, down, several, own)?;
        let results = Self::value(results, (first * self.hidden()) as usize);
        let own = Self::value(own, (first * down.outputs) as usize);
        self.gather_rows((own, results), count, self.hidden(), exchange + 1, among)
    }

    /// What the shared expert gives every position, and the outputs of its gate.
    fn shared(&self, index: usize, layer: &Layer, among: &mut Among<'_>) -> Result<(), Failed> {
        let Some((block, gate)) = &layer.shared else { return Ok(()) };
        // It works where experts do, so that none of them may be packed or under way.
        let (room, rows) = (self.room, self.positions());
        self.gated(block, room.shared, of_block(index), among)?;
        if let Some(gate) = gate {
            self.pack(room.normed, 0, rows, gate.inputs, &[gate.storage], room.packed)?;
            self.product(room.packed, gate, (self.tables.all, rows), room.shared_gates)?;
        }
        Ok(())
    }

    /// Adds the weighted results in ascending order of expert, then the shared expert, to the residual stream.
    fn combine(&self, layer: &Layer, users: u64, routes: u64) -> Result<(), CudaError> {
        let (room, rows, hidden, places) = (self.room, self.positions(), self.hidden(), self.sizes.places);
        let weights = Self::value(routes, rows as usize * places);
        let (shared, gates) = match &layer.shared {
            None => (0, 0),
            Some((_, gate)) => (room.shared, if gate.is_some() { room.shared_gates } else { 0 }),
        };
        let multiplier = self.model.arch().multipliers.residual;
        let arguments = [
            At(room.x),
            At(room.results),
            At(users),
            At(weights),
            At(shared),
            At(gates),
            Value(multiplier),
            Word(hidden),
            Word(places as u32),
        ];
        let blocks = [hidden.div_ceil(4 * 128), rows, 1];
        self.launch(self.functions.combine, blocks, 128, &arguments)
    }
}

/// Rows that an expert usually has, where nobody has counted them: twice as many as on average. Of many positions some expert may
/// have most, and blocks for few rows would be too many that find nothing to do.
fn usual_rows(positions: u32, users: u32, experts: u32) -> u32 {
    match positions {
        1 => 1,
        2..=FEW_POSITIONS => (2 * users.div_ceil(experts)).clamp(2, positions),
        _ => positions,
    }
}

impl Experts {
    /// Those of the slot that begins there, counted from the first.
    fn at(&self, begin: u64) -> Self {
        let moved = |matrix: Matrix| Matrix {
            weights: matrix.weights + begin,
            bias: if matrix.bias == 0 { 0 } else { matrix.bias + begin },
            ..matrix
        };
        Self { matrices: self.matrices.map(moved) }
    }
}
