//! What the steps of a model need of a device's memory beside weights, cache and experts: said before any of it is taken, and what
//! the kernels do not know is refused here, at start.

use super::super::CudaError;
use super::super::memory::ALIGN;
use lite_llm_model::Model;
use lite_llm_model::arch::{Moe, Norm, QkNorm};
use lite_llm_model::forward::exchange::ROWS_TOGETHER;
use lite_llm_model::kernels::{PAGE_POSITIONS, Storage};
use lite_llm_model::parts::ExpertPart;

/// Bounds of the kernels (`docs/gpu.md`, "The host has to keep these").
const KEY_MAX: usize = 1024;
const VALUE_MAX: usize = 2048;
const OUTPUTS_MAX: usize = 1024;
const WARP: usize = 32;
/// Blocks along the second and third side of a grid.
const GRID_MAX: usize = 65_535;
/// Bytes that attention has for scores and mixes of pages, where one position does not need more.
const ATTENTION_BYTES: usize = 64 << 20;
/// Bytes for what stands between weights so that they begin where they have to, and what pads them.
const PADDING_BYTES: u64 = 16 << 20;
/// Inputs of a chunk, to which rows are padded.
const CHUNK: usize = 1024;
/// Inputs of a group of integers.
const GROUP: usize = 32;
/// Words that pieces of what comes back are multiples of.
const BACK: usize = 64;

/// The largest step, and what of a model its memory depends on.
#[derive(Clone, Debug)]
pub(crate) struct Sizes {
    /// Positions of a step.
    pub(super) positions: usize,
    /// Rows whose logits are computed together.
    pub(super) rows: usize,
    /// Experts of a position.
    pub(super) places: usize,
    /// Experts of all positions.
    pub(super) users: usize,
    /// Their results: those that expert ranks have places for, if these are more.
    pub(super) results: usize,
    pub(super) hidden: usize,
    pub(super) vocab: usize,
    /// Tokens that a sequence can have, each once, and as many more as lists of them are rounded up by.
    pub(super) seen: usize,
    pub(super) heads: usize,
    pub(super) experts: usize,
    /// Ranks that share them out.
    pub(super) seats: usize,
    pub(super) moe_layers: usize,
    pub(super) router_rows: usize,
    /// Pages of the longest sequence.
    pub(super) pages: usize,
    pub(super) groups: usize,
    /// Values that attention has for pages.
    pub(super) attention: usize,
    /// Values of one page for one query.
    pub(super) page_values: usize,
    /// Values of queries, keys and values of a position, and of what is mixed.
    pub(super) wide: [usize; 4],
    /// The same of latent attention: the first vector, queries, latents, queries of latents, head by head.
    pub(super) latent: [usize; 5],
    /// Values of gates of a step, and the widest rows that are packed: for all positions, for users, for what is inside.
    pub(super) gates: usize,
    pub(super) packed: usize,
    pub(super) packed_inside: usize,
    /// Of a share: queries or keys of all tensor ranks, where their norm is over all; a rank's rows of the results of experts; and the
    /// most values that ranks exchange at once.
    pub(super) whole: usize,
    pub(super) own: usize,
    pub(super) exchanged: usize,
    /// The most that tensor ranks gather at once, with what aligns their parts.
    pub(super) gathered: usize,
}

/// Values that a row has once it is packed, whatever the storage of the matrix.
const fn padded(inputs: usize) -> usize {
    inputs.next_multiple_of(CHUNK)
}

/// How long a list of so many tokens is: what grows step by step is rounded up, so that many steps have one shape.
pub(super) const fn places_of_tokens(tokens: usize) -> usize {
    if tokens < 64 { 64 } else { tokens.next_power_of_two() }
}

/// Experts of a position as kernels count them.
pub(super) fn places_of(moe: &Moe) -> usize {
    moe.tiered.as_ref().map_or(moe.top_k, |router| {
        let select = &router.select;
        let groups = router.tiers.iter().map(|tier| tier.groups).max().unwrap_or(0);
        let experts = router.tiers.iter().map(|tier| tier.experts).max().unwrap_or(0);
        select.tiers.min(router.tiers.len()) * select.groups.min(groups) * select.experts.min(experts)
    })
}

impl Sizes {
    /// Of a model and its largest step: the same for every rank, as all have one plan of memory. A rank has room for what all tensor
    /// ranks have, since that comes together in each of them.
    ///
    /// # Errors
    /// If the kernels do not compute such a model.
    pub(crate) fn of(model: &Model, positions: u32, rows: u32) -> Result<Self, CudaError> {
        let arch = model.arch();
        check(model, positions as usize)?;
        let (attention, kv, moe) = (&arch.attention, model.kv_shape(), arch.moe.as_ref());
        let (positions, rows, hidden) = (positions as usize, rows as usize, arch.hidden);
        let places = moe.map_or(0, places_of);
        let users = positions * places;
        let width = moe.map_or(0, |moe| moe.intermediate);
        let shared = moe.and_then(|moe| moe.shared.as_ref()).map_or(0, |shared| shared.intermediate);
        let dense = arch.layers.iter().filter_map(|layer| layer.dense).max().unwrap_or(0).max(shared);
        let pages = (arch.context as usize).div_ceil(PAGE_POSITIONS);
        let heads = attention.heads;
        let page_values = PAGE_POSITIONS + kv.value_dim + 2;
        let of_one = heads * pages * page_values;
        let attention_values = of_one.max((of_one * positions).min(ATTENTION_BYTES / 4));
        let mixed = heads * kv.value_dim;
        let (wide, latent, inner) = match attention.latent {
            None => {
                let wide = [attention.q_dim(), attention.k_dim(), attention.v_dim(), mixed];
                (wide, [0; 5], attention.mixed_dim())
            }
            Some(latent) => {
                let by_head = heads * latent.rank.max(latent.plain).max(attention.value_dim);
                let first = latent.query_rank.unwrap_or(attention.q_dim());
                let wide = [0, 0, attention.mixed_dim(), mixed];
                let inner = (heads * padded(latent.rank.max(latent.plain))).max(attention.mixed_dim());
                (wide, [first, attention.q_dim(), kv.key_dim, heads * kv.key_dim, by_head], inner.max(first))
            }
        };
        let packed =
            (positions * padded(hidden.max(inner))).max(users * padded(hidden)).max(rows * padded(hidden));
        let (topology, inside) = (model.share().topology(), (positions * dense).max(users * width));
        let whole = if model.share().is_tensor() && attention.qk_norm == QkNorm::Whole {
            positions * attention.q_dim().max(attention.k_dim())
        } else {
            0
        };
        let (seats, few) = (topology.expert as usize, users.min(ROWS_TOGETHER));
        let results = if model.share().is_expert() { users.max(seats * few) } else { users };
        let deepest = (0..topology.tensor).map(|rank| model.share().rows_of(rank, hidden).len()).max();
        let own = if model.share().is_tensor() { users * deepest.unwrap_or(0) } else { 0 };
        // Experts that are computed together have few rows, or are one, which every position may use.
        let together = if places > 0 { users.min(positions.max(ROWS_TOGETHER)) } else { 0 };
        let gathered = whole
            .max(positions * dense.max(hidden).max(attention.mixed_dim()))
            .max(together * width.max(hidden))
            .max(rows * arch.vocab);
        let exchanged = whole
            .max(inside)
            .max(positions * hidden.max(attention.mixed_dim()))
            .max(results * hidden)
            .max(rows * arch.vocab);
        Ok(Self {
            whole,
            own,
            gathered: if model.share().is_tensor() { gathered + 4 * topology.tensor as usize } else { 0 },
            exchanged: if topology.ranks() > 1 { exchanged } else { 0 },
            positions,
            rows,
            places,
            users,
            results,
            seats,
            hidden,
            vocab: arch.vocab,
            seen: places_of_tokens(arch.vocab.min(arch.context as usize)),
            heads,
            experts: moe.map_or(0, |moe| moe.experts),
            moe_layers: arch.moe_layers().len(),
            router_rows: moe.map_or(0, Moe::router_rows),
            pages,
            groups: model.kv_groups().len(),
            attention: attention_values,
            page_values,
            wide,
            latent,
            gates: inside,
            packed,
            packed_inside: (positions * padded(dense)).max(users * padded(width)),
        })
    }

    /// Values that stand in the memory of a device during a step, piece by piece, in the order of [`Room::of`].
    fn pieces(&self) -> [usize; PIECES] {
        let Self { positions, results, hidden, .. } = *self;
        let [q, k, v, mixed] = self.wide.map(|values| values * positions);
        let [first, queries, cached, of_latents, by_head] = self.latent.map(|values| values * positions);
        [
            self.back(positions, self.moe_layers, self.rows).end,
            positions * hidden,
            positions * hidden,
            self.packed,
            self.packed_inside,
            // Integers and scales of what is packed.
            self.packed / 4,
            self.packed / GROUP,
            self.packed_inside / 4,
            self.packed_inside / GROUP,
            q.max(of_latents),
            k.max(cached),
            v,
            mixed,
            first,
            queries,
            by_head,
            by_head,
            self.attention,
            self.gates,
            self.gates,
            self.gates,
            results * hidden,
            positions * hidden,
            positions,
            2 * positions * self.router_rows,
            self.rows * hidden,
            2 * self.rows * self.vocab,
            self.rows * self.vocab,
            self.whole,
            self.own,
            self.gathered,
        ]
    }

    /// Where what comes back of a step stands: the residual stream, the routes of so many layers, tokens of so many rows, their logits,
    /// one behind the other, so that one copy brings them. There is room for two layers at least: the one under way, and the next one
    /// that is foreseen.
    pub(super) const fn back(&self, positions: usize, layers: usize, rows: usize) -> Back {
        let layers = if layers < 2 { 2 } else { layers };
        let routes = (positions * self.hidden).next_multiple_of(BACK);
        let tokens = routes + (layers * self.route_words(positions)).next_multiple_of(BACK);
        let faults = tokens + rows.next_multiple_of(BACK);
        let logits = faults + rows.next_multiple_of(BACK);
        Back { routes, tokens, faults, logits, end: logits + rows * self.vocab }
    }

    /// Words of the routes of a layer: experts, weights, faults.
    pub(super) const fn route_words(&self, positions: usize) -> usize {
        positions * (2 * self.places + 1)
    }

    /// Words of the lists that stay from step to step: which expert is eligible, where each stands and begins.
    pub(super) const fn standing_words(&self) -> usize {
        // Each list begins at a multiple of sixteen bytes.
        let places = self.seats * (self.experts + 8);
        self.moe_layers * (3 * self.experts + places + 4) + 2 * self.router_rows + 64
    }

    /// Words of the tables of a step.
    pub(super) fn table_words(&self) -> usize {
        let Self { positions, heads, pages, groups, rows, .. } = *self;
        let of_groups = groups * (12 * positions + rows.max(1) * (pages + 2));
        let of_heads = 2 * positions * heads + 3 * heads;
        // Each list begins at a multiple of sixteen bytes.
        4 * positions + of_groups + of_heads + 9 * positions + (8 + self.seen) * rows + 4096
    }

    /// Words of the lists of a mixture: users, and for each expert where it lies and which users it has.
    pub(super) const fn list_words(&self) -> usize {
        2 * self.users + self.experts * 13 + 256
    }

    /// Bytes of pinned memory that exchanges go through.
    pub(super) const fn exchanged_bytes(&self) -> usize {
        4 * self.exchanged
    }

    /// Bytes of pinned memory that results come through.
    pub(super) fn results_bytes(&self) -> usize {
        4 * self.back(self.positions, self.moe_layers, self.rows).end.max(self.standing_words())
    }

    /// Bytes of a device beside base parameters, cache and experts, for the memory plan.
    pub(crate) fn overhead_bytes(&self, model: &Model) -> u64 {
        let arch = model.arch();
        let tables = u64::from(arch.context) * arch.rope.dims as u64 * 4;
        self.bytes() + tables + PADDING_BYTES
    }

    /// Bytes that steps need of the device beside weights, cache and experts.
    pub(super) fn bytes(&self) -> u64 {
        let room =
            self.pieces().iter().map(|&values| (4 * values as u64).next_multiple_of(ALIGN)).sum::<u64>();
        room + 4 * (self.table_words() + self.list_words() + self.standing_words()) as u64 + 4 * ALIGN
    }
}

/// Pieces of memory of a step.
const PIECES: usize = 31;

/// Offsets in what comes back of a step, in words from the residual stream on.
#[derive(Clone, Copy, Debug)]
pub(super) struct Back {
    pub(super) routes: usize,
    pub(super) tokens: usize,
    /// Of each row the lowest token whose logit is not finite.
    pub(super) faults: usize,
    pub(super) logits: usize,
    pub(super) end: usize,
}

/// Where the values of a step stand.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// The residual stream; routes, tokens and logits stand behind it, where a step says ([`Room::with`]).
    pub(super) x: u64,
    pub(super) normed: u64,
    pub(super) added: u64,
    pub(super) packed: Packed,
    pub(super) packed_inside: Packed,
    pub(super) q: u64,
    pub(super) k: u64,
    pub(super) v: u64,
    pub(super) mixed: u64,
    pub(super) first: u64,
    pub(super) queries: u64,
    pub(super) apart: u64,
    pub(super) through: u64,
    pub(super) attention: u64,
    pub(super) gates: u64,
    pub(super) ups: u64,
    pub(super) inside: u64,
    pub(super) results: u64,
    pub(super) shared: u64,
    pub(super) shared_gates: u64,
    pub(super) scores: u64,
    pub(super) routes: u64,
    pub(super) last: u64,
    /// A number of 64 bits for each logit.
    pub(super) shares: u64,
    /// Logits as repetition makes them.
    pub(super) penalised: u64,
    pub(super) tokens: u64,
    pub(super) faults: u64,
    pub(super) logits: u64,
    pub(super) whole: u64,
    pub(super) own: u64,
    /// Parts of tensor ranks as they came from their devices.
    pub(super) gathered: u64,
}

/// Where rows are brought in the order that products want: values, or integers and their scales.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packed {
    pub(super) values: u64,
    pub(super) words: u64,
    pub(super) scales: u64,
}

impl Packed {
    /// Where the rows from this one on are, each of so many inputs: as products count them.
    pub(super) const fn at_row(self, row: u32, inputs: u32) -> Self {
        let (row, groups) = (row as u64, (inputs as u64).div_ceil(GROUP as u64));
        Self {
            values: self.values + 4 * row * padded(inputs as usize) as u64,
            words: self.words + 4 * row * groups * (GROUP as u64 / 4),
            scales: self.scales + 4 * row * groups,
        }
    }
}

impl Room {
    /// Pieces one after the other, from an address on; and where they end.
    pub(super) fn of(sizes: &Sizes, start: u64) -> (Self, u64) {
        let mut next = start;
        let at = sizes.pieces().map(|values| {
            let at = next;
            next = (at + 4 * values as u64).next_multiple_of(ALIGN);
            at
        });
        let [x, normed, added, values, inner, words, scales, inner_words, inner_scales, rest @ ..] = at;
        let [q, k, v, mixed, first, queries, apart, through, attention, rest @ ..] = rest;
        let [gates, ups, inside, results, shared, shared_gates, scores, rest @ ..] = rest;
        let [last, shares, penalised, whole, own, gathered] = rest;
        let packed = Packed { values, words, scales };
        let packed_inside = Packed { values: inner, words: inner_words, scales: inner_scales };
        let this = Self {
            x,
            normed,
            added,
            packed,
            packed_inside,
            q,
            k,
            v,
            mixed,
            first,
            queries,
            apart,
            through,
            attention,
            gates,
            ups,
            inside,
            results,
            shared,
            shared_gates,
            scores,
            routes: 0,
            last,
            shares,
            penalised,
            tokens: 0,
            faults: 0,
            logits: 0,
            whole,
            own,
            gathered,
        };
        (this, next)
    }

    /// The same of a step, of which all comes back from these places.
    pub(super) const fn with(self, back: Back) -> Self {
        let Back { routes, tokens, faults, logits, end: _ } = back;
        let (routes, tokens) = (self.x + 4 * routes as u64, self.x + 4 * tokens as u64);
        let (faults, logits) = (self.x + 4 * faults as u64, self.x + 4 * logits as u64);
        Self { routes, tokens, faults, logits, ..self }
    }
}

/// Refuses what the kernels do not know.
fn check(model: &Model, positions: usize) -> Result<(), CudaError> {
    let (arch, kv) = (model.arch(), model.kv_shape());
    let refuse = |what: String| Err(CudaError::Unsupported(what));
    if kv.key_dim > KEY_MAX || kv.value_dim > VALUE_MAX {
        return refuse(format!(
            "keys of {} and values of {} values (they know {KEY_MAX} and {VALUE_MAX})",
            kv.key_dim, kv.value_dim
        ));
    }
    // Four values are loaded at once wherever rows of several experts stand together.
    let width = arch.moe.as_ref().map_or(0, |moe| moe.intermediate);
    if !width.is_multiple_of(4) {
        return refuse(format!("experts of {width} values inside, which are not a multiple of 4"));
    }
    let heads = model.attention_part().heads;
    if heads == 0 || kv.kv_heads == 0 || !heads.is_multiple_of(kv.kv_heads) {
        return refuse(format!("{heads} heads for {} of keys", kv.kv_heads));
    }
    if arch.attention.latent.is_some() && arch.norm == Norm::Layer {
        return refuse("latent attention beside norms by mean and variance".into());
    }
    let Some(moe) = &arch.moe else { return check_grid(positions, 1) };
    let places = places_of(moe);
    if moe.router_rows() > OUTPUTS_MAX || places > WARP {
        return refuse(format!(
            "a router of {} outputs that selects {places} (they know {OUTPUTS_MAX} and {WARP})",
            moe.router_rows()
        ));
    }
    let groups = moe.group_limit.as_ref().map_or(0, |limit| limit.groups);
    let tiers = moe.tiered.as_ref().map_or(0, |router| router.tiers.len());
    if groups > WARP || tiers > WARP {
        return refuse(format!("a router of {groups} groups and {tiers} tiers (they know {WARP})"));
    }
    if let Some(ExpertPart { storages, matrices, .. }) = model.expert_part() {
        for (storage, at) in storages.into_iter().zip(matrices) {
            let align = if storage == Storage::E4m3 { 4 } else { 16 };
            if !at.is_multiple_of(align) {
                return refuse(format!("matrices of experts that begin at byte {at} of a slot"));
            }
        }
    }
    check_grid(positions, places)
}

fn check_grid(positions: usize, places: usize) -> Result<(), CudaError> {
    if positions * places.max(1) > GRID_MAX {
        let what = format!(
            "steps of {positions} positions with {places} experts each; give limits.step_positions_max of {} or less",
            GRID_MAX / places.max(1)
        );
        return Err(CudaError::Unsupported(what));
    }
    Ok(())
}
