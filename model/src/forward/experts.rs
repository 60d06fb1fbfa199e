//! A mixture layer: route every position, compute each chosen expert once for all positions that chose it, combine.
//!
//! Experts are computed in the order in which they come; their results wait in a buffer and are combined in ascending
//! order of the experts' original numbers, so that the order of arrival never changes a bit.

use super::exchange::{ROWS_TOGETHER, of_block, of_experts, of_results};
use super::foresight;
use super::gated::{self, Block};
use super::ranks::{Among, bytes_of, read_values};
use super::router::{self, Routed};
use super::{Batch, Capture, ExpertSource, Layer, Provided, Rooms, StepError, Stopped};
use crate::arch::{Activation, Moe};
use crate::kernels::math::sigmoid;
use crate::kernels::{Buffer, Product, Products, axpy};
use crate::model::Model;
use lite_llm_core::ids::{ExpertKey, Slot};
use std::ops::Range;

/// Columns that are combined at a time, on the stack.
const COLUMNS: usize = 256;

/// What a mixture works in.
#[derive(Debug, Default)]
pub(super) struct Room {
    router: router::Room,
    foresight: foresight::Room,
    users: Users,
    /// A result of each user, expert by expert.
    results: Buffer,
    /// What the shared expert gives, and its gates.
    shared: Buffer,
    gates: Buffer,
}

impl Room {
    pub(super) fn bytes(&self) -> usize {
        let Users { keys, firsts, next, positions, results } = &self.users;
        let lists = [firsts, next, positions, results].map(Vec::capacity).iter().sum::<usize>();
        let buffers = [&self.results, &self.shared, &self.gates].map(Buffer::bytes).iter().sum::<usize>();
        self.router.bytes()
            + self.foresight.bytes()
            + buffers
            + 4 * lists
            + keys.capacity() * size_of::<ExpertKey>()
    }
}

/// Who uses which expert, expert by expert.
#[derive(Debug, Default)]
struct Users {
    /// The experts that are used, ascending.
    keys: Vec<ExpertKey>,
    /// Where the users of each begin, and where those of the last end.
    firsts: Vec<u32>,
    /// By original number: how many users an expert has, then where its next one goes.
    next: Vec<u32>,
    /// The position of each user.
    positions: Vec<u32>,
    /// For each position, place by place in its route: which user it is.
    results: Vec<u32>,
}

impl Users {
    fn find(&mut self, model: &Model, layer: u32, routed: &[Routed], moe: &Moe) {
        let Self { keys, firsts, next, positions, results } = self;
        next.clear();
        next.resize(moe.experts, 0);
        for &expert in routed.iter().flat_map(|routed| &routed.route.experts) {
            next[expert as usize] += 1;
        }
        keys.clear();
        let used = (0u32..).zip(&*next).filter(|&(_, &users)| users > 0);
        keys.extend(used.map(|(expert, _)| model.checkpoint.key(layer, expert)));
        keys.sort_unstable();
        firsts.clear();
        firsts.push(0);
        let mut end = 0;
        for &key in &*keys {
            let expert = model.checkpoint.ordinal(key).expect("a key of this checkpoint");
            let users = std::mem::replace(&mut next[expert as usize], end);
            end += users;
            firsts.push(end);
        }
        positions.clear();
        positions.resize(end as usize, 0);
        results.clear();
        results.resize(routed.len() * moe.top_k, 0);
        for (i, routed) in routed.iter().enumerate() {
            for (place, &expert) in routed.route.experts.iter().enumerate() {
                let user = &mut next[expert as usize];
                positions[*user as usize] = i as u32;
                results[i * moe.top_k + place] = *user;
                *user += 1;
            }
        }
    }

    /// The users of some experts.
    fn of(&self, experts: Range<usize>) -> Range<usize> {
        self.firsts[experts.start] as usize..self.firsts[experts.end] as usize
    }

    /// Those that are this rank's: neighbours.
    fn own(&self, model: &Model) -> Range<usize> {
        let seat = model.share.seat().expert;
        let holder = |key: &ExpertKey| model.holder(*key).expect("a key of this checkpoint");
        let first = self.keys.partition_point(|key| holder(key) < seat);
        first..self.keys.partition_point(|key| holder(key) <= seat)
    }

    /// Neighbours from an expert on, up to another, that have no more than [`ROWS_TOGETHER`] users: the fewer products wait
    /// for each other, the less do threads.
    fn together(&self, first: usize, end: usize) -> Range<usize> {
        let fits = |end: &usize| self.of(first..*end).len() <= ROWS_TOGETHER;
        let end = (first + 2..=end).take_while(fits).last();
        first..end.unwrap_or(first + 1)
    }
}

impl Model {
    pub(super) fn mixture(
        &self,
        layer: Layer<'_>,
        source: &mut dyn ExpertSource,
        capture: &mut Option<&mut dyn Capture>,
        batch: &mut Batch<'_>,
        rooms: &mut Rooms,
    ) -> Result<(), StepError> {
        let moe = self.arch().moe.as_ref().expect("a mixture layer");
        let (hidden, number) = (self.arch().hidden, layer.index as u32);
        let Rooms { products, experts: room, gated, .. } = rooms;
        let Room { router, foresight, users, results, shared, gates } = room;
        let routed = self.route(layer, moe, batch, router, products)?;
        for (at, Routed { route, .. }) in batch.at.iter().zip(routed) {
            let digest = &mut batch.digests[at.row as usize];
            for (expert, weight) in route.experts.iter().zip(&route.weights) {
                digest.update(&expert.to_le_bytes()).update(&weight.to_bits().to_le_bytes());
            }
            if let Some(capture) = capture {
                capture.routes(at.request, number, at.position, &route.experts, &route.weights);
            }
        }
        users.find(self, number, routed, moe);
        let foreseen = self.foresee(layer, moe, batch, foresight, products);
        let results = results.values(users.positions.len() * hidden);
        let normed = &*batch.normed;
        let mut compute = |among: Among<'_>, experts: Range<usize>, slot: &dyn Fn(ExpertKey) -> Slot| {
            let y = &mut results[users.of(experts.start..experts.start + 1).start * hidden..];
            self.experts(among, users, experts, slot, (normed, y), (gated, products))
        };
        // Those that this rank computes are neighbours, as an expert rank's always are.
        let own = users.own(self);
        if let Some(resident) = &layer.step.resident {
            let slot = |key: ExpertKey| {
                let at = resident.binary_search_by_key(&key, |&(key, _)| key);
                resident[at.expect("every expert of the tiers is resident")].1
            };
            let (mut first, mut count) = (own.start, 0);
            while first < own.end {
                let together = users.together(first, own.end);
                first = together.end;
                compute(Among { source, exchange: of_experts(layer.index, count) }, together, &slot)?;
                count += 1;
            }
        } else {
            source.need(number, &users.keys, foreseen)?;
            // Experts come in any order, which tensor ranks do not share: they compute a whole wave in the order of experts.
            let together = self.share.is_tensor();
            let (mut left, mut count, mut came) = (own.len(), 0, 0);
            let mut wave: Vec<Provided> = Vec::new();
            while left > 0 {
                let last = source.provided()?;
                came += 1;
                let whole = came == last.wave_len;
                if together {
                    wave.push(last);
                    wave.sort_unstable_by_key(|provided| provided.expert);
                }
                let ready = match (together, whole) {
                    (false, _) => std::slice::from_ref(&last),
                    (true, false) => &[],
                    (true, true) => &wave[..],
                };
                for provided in ready {
                    let at = users.keys.binary_search(&provided.expert).expect("an expert that is needed");
                    let among = Among { source, exchange: of_experts(layer.index, count) };
                    compute(among, at..at + 1, &|_| provided.slot)?;
                    (left, count) = (left - 1, count + 1);
                }
                if whole {
                    came = 0;
                    wave.clear();
                    source.released(number, last.wave)?;
                }
            }
        }
        if self.share.is_expert() {
            self.exchange_results(layer, source, users, results)?;
        }
        let shared = self.shared(layer, batch, shared, gates, source, (gated, products))?;
        let results = (&*results, &users.results[..]);
        self.combine(moe.top_k, routed, results, shared, batch.x);
        Ok(())
    }

    /// Computes some experts, each for all its users.
    fn experts(
        &self,
        among: Among<'_>,
        users: &Users,
        experts: Range<usize>,
        slot: &dyn Fn(ExpertKey) -> Slot,
        (x, y): (&[f32], &mut [f32]),
        rooms: (&mut gated::Room, &mut Products),
    ) -> Result<(), Stopped> {
        let layout = self.expert.as_ref().expect("a mixture has experts");
        let activation = self.arch().moe.as_ref().expect("a mixture").activation;
        let y = &mut y[..users.of(experts.clone()).len() * self.arch().hidden];
        let blocks = experts.map(|expert| Block {
            views: layout.views(among.source.slot(slot(users.keys[expert]))),
            picked: Some(&users.positions[users.of(expert..expert + 1)]),
        });
        self.gated(blocks, activation, x, y, among, rooms)
    }

    /// Gives the other expert ranks what this one's experts gave, and takes what theirs did.
    fn exchange_results(
        &self,
        layer: Layer<'_>,
        source: &dyn ExpertSource,
        users: &Users,
        results: &mut [f32],
    ) -> Result<(), Stopped> {
        let (hidden, own) = (self.arch().hidden, users.own(self));
        let rows = users.of(own);
        let part = bytes_of(&results[rows.start * hidden..rows.end * hidden]);
        let parts = source.gather(&self.share.expert_ranks(), of_results(layer.index), &part)?;
        // In the order of ranks they are all results, in the order of experts.
        let mut rest = results;
        for part in parts {
            let into = rest
                .split_off_mut(..part.len() / 4)
                .expect("ranks of this very version have the same routes");
            read_values(&part, into);
        }
        Ok(())
    }

    /// What the shared expert gives every position, and its weight there.
    fn shared<'a>(
        &self,
        layer: Layer<'_>,
        batch: &Batch<'_>,
        y: &'a mut Buffer,
        gates: &'a mut Buffer,
        source: &dyn ExpertSource,
        (room, products): (&mut gated::Room, &mut Products),
    ) -> Result<Option<[&'a [f32]; 2]>, Stopped> {
        let Some((block, gate)) = &layer.weights.shared else { return Ok(None) };
        let y = y.values(batch.x.len());
        let block = Block { views: block.views(), picked: None };
        let among = Among { source, exchange: of_block(layer.index) };
        self.gated([block], Activation::SwiGlu, batch.normed, y, among, (room, &mut *products))?;
        let gates = gates.values(batch.at.len());
        match gate {
            None => gates.fill(1.0),
            Some(gate) => {
                let product = Product::new(batch.normed, gate.view(), None, &mut *gates);
                products.compute(&self.pool, self.isa, [product]);
                gates.iter_mut().for_each(|gate| *gate = sigmoid(*gate));
            }
        }
        Ok(Some([y, gates]))
    }

    /// Adds the weighted results in ascending order of expert, then the shared expert, to the residual stream.
    fn combine(
        &self,
        top_k: usize,
        routed: &[Routed],
        (results, users): (&[f32], &[u32]),
        shared: Option<[&[f32]; 2]>,
        x: &mut [f32],
    ) {
        let hidden = self.arch().hidden;
        let multiplier = self.arch().multipliers.residual;
        self.pool.each_row(x, hidden, top_k, &|i, x| {
            let users = &users[i * top_k..];
            for (block, x) in x.chunks_mut(COLUMNS).enumerate() {
                let mut sum = [0.0f32; COLUMNS];
                let sum = &mut sum[..x.len()];
                let columns =
                    |row: usize| row * hidden + block * COLUMNS..row * hidden + block * COLUMNS + x.len();
                for (weight, &user) in routed[i].route.weights.iter().zip(users) {
                    axpy(self.isa, *weight, &results[columns(user as usize)], sum);
                }
                if let Some([y, gates]) = shared {
                    axpy(self.isa, gates[i], &y[columns(i)], sum);
                }
                for (x, sum) in x.iter_mut().zip(&*sum) {
                    *x += sum * multiplier;
                }
            }
        });
    }
}
