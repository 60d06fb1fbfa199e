//! The simulated arithmetic: every result mixes exactly what it may depend on, so that any wrong expert, page, order,
//! generation or stale byte shows in the next token.

use lite_llm_core::config::Placement;
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::ExpertKey;
use lite_llm_core::input::Body;
use lite_llm_core::output::Row;
use lite_llm_core::pages::PageRun;
use lite_llm_core::plan::{Identity, ModelPlan, TierPlan};
use lite_llm_core::random::{Purpose, draw};
use std::collections::BTreeMap;

/// Positions that a position sees in the second group of layers, its own included: more than a page of them.
const WINDOW: u32 = 6;

/// A small plan: two tiers of 3 and 4 experts in 3 mixture layers, pages of 4 positions; one group of layers sees all
/// positions, one a window of 6.
#[must_use]
pub fn plan() -> ModelPlan {
    ModelPlan {
        format: ModelPlan::FORMAT,
        identity: Identity::default(),
        tiers: vec![
            TierPlan { name: "small".into(), groups: 1, experts: 3, placement: Placement::Hot },
            TierPlan { name: "large".into(), groups: 2, experts: 2, placement: Placement::Hot },
        ],
        layers: 4,
        moe_layers: vec![0, 1, 3],
        top_k: 2,
        slot_bytes: 1000,
        base_shards: vec![500, 300],
        router_bytes: 100,
        overhead_bytes: 1000,
        page_positions: 4,
        page_bytes: 200,
        kv_groups: vec![None, Some(WINDOW)],
        context: 48,
        vocab: 97,
        eos: vec![1],
    }
}

/// Words of a shard of the simulated optimizer.
const SHARD_WORDS: u64 = 40;

/// The bytes of a shard of the simulated optimizer that training begins with.
#[must_use]
pub fn first_shard(shard: u32) -> Vec<u8> {
    (0..SHARD_WORDS).flat_map(|word| mix(u64::from(shard), word).to_le_bytes()).collect()
}

/// Those of the next version.
#[must_use]
pub fn next_shard(bytes: &[u8]) -> Vec<u8> {
    let words: Vec<u64> =
        bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().expect("eight"))).collect();
    let after = words.iter().cycle().skip(1);
    words.iter().zip(after).flat_map(|(&word, &after)| mix(word, after).to_le_bytes()).collect()
}

/// Mixes two numbers: the finaliser of splitmix64 over their combination.
#[must_use]
pub const fn mix(a: u64, b: u64) -> u64 {
    let mut z = a.rotate_left(23) ^ b.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x632b_e59b_d9b4_e019);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// What an expert's bytes are worth: those of the checkpoint, or those of a blob.
#[must_use]
pub fn content(key: ExpertKey, blob: Option<Digest>) -> u64 {
    let ExpertKey { layer, tier, group, expert } = key;
    let own = [layer, tier, group, expert].iter().fold(7, |sum, &part| mix(sum, u64::from(part)));
    blob.map_or(own, |blob| blob.0.iter().fold(own, |sum, &byte| mix(sum, u64::from(byte))))
}

/// What positions are computed under.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Setting {
    /// The tiers that may be selected.
    pub tiers: Vec<u32>,
    /// The experts that were modified.
    pub blobs: BTreeMap<ExpertKey, Digest>,
}

/// What a position leaves in the cache: it depends on every token before it and on the tiers of each. `before` is what the
/// position before it left, `seen` what those left that its window shows, oldest first, its own excluded.
#[must_use]
pub fn cached(before: u64, seen: impl IntoIterator<Item = u64>, token: u32, tiers: &[u32]) -> u64 {
    let sum = seen.into_iter().fold(mix(before, u64::from(token)), mix);
    tiers.iter().fold(sum, |sum, &tier| mix(sum, u64::from(tier)))
}

/// The positions before this one that its window shows.
pub fn seen(position: u32) -> core::ops::Range<u32> {
    (position + 1).saturating_sub(WINDOW)..position
}

/// What the positions of a row leave, in order; their pages, of four positions each, have it too.
///
/// # Panics
/// If a position, or one that it sees, has no page: the engine gives one to each.
pub fn row(pages: &mut [[u64; 4]], row: &Row, tiers: &[u32]) -> Vec<u64> {
    let [whole, window] = row.pages.as_slice() else { panic!("a run for each group of layers") };
    let place = |run: &PageRun, position: u32| {
        let page = run.page(position / 4).expect("a page of every position that is computed or seen");
        (page as usize, position as usize % 4)
    };
    let mut states = Vec::new();
    for (position, &token) in (row.start..).zip(&row.tokens) {
        let read = |run, position| {
            let (page, at) = place(run, position);
            pages[page][at]
        };
        let before = position.checked_sub(1).map_or(0, |before| read(whole, before));
        let state = cached(before, seen(position).map(|seen| read(window, seen)), token, tiers);
        for run in [whole, window] {
            let (page, at) = place(run, position);
            pages[page][at] = state;
        }
        states.push(state);
    }
    states
}

/// The experts that a position selects in a layer: one or two of the active tiers.
#[must_use]
pub fn route(plan: &ModelPlan, cached: u64, layer: u32, tiers: &[u32]) -> Vec<ExpertKey> {
    let all = || plan.experts(tiers).filter(|key| key.layer == layer);
    let count = all().count() as u64;
    let pick = |n: u64| {
        let picked = mix(cached, mix(u64::from(layer), n)) % count;
        all().nth(usize::try_from(picked).unwrap_or(0)).expect("below their number")
    };
    let mut experts = vec![pick(0), pick(1)];
    experts.sort_unstable();
    experts.dedup();
    experts
}

/// What these positions will probably select in a layer: as often as not what they do.
#[must_use]
pub fn foresee<'a>(
    plan: &ModelPlan,
    states: impl Iterator<Item = &'a u64>,
    layer: u32,
    tiers: &[u32],
) -> Vec<ExpertKey> {
    let guess = |&state: &u64| if state.is_multiple_of(2) { state } else { mix(state, 1) };
    let mut foreseen: Vec<ExpertKey> =
        states.flat_map(|state| route(plan, guess(state), layer, tiers)).collect();
    foreseen.sort_unstable();
    foreseen.dedup();
    foreseen
}

/// The token after a position whose experts had these contents, in order of layer and key.
#[must_use]
pub fn token(plan: &ModelPlan, cached: u64, contents: impl IntoIterator<Item = u64>, draw: u64) -> u32 {
    let sum = contents.into_iter().fold(mix(cached, draw), mix);
    u32::try_from(sum % u64::from(plan.vocab)).expect("a token is below the vocabulary")
}

/// The stream of a request alone, without an engine: `setting_at` gives the setting of each position.
#[must_use]
pub fn reference(plan: &ModelPlan, body: &Body, setting_at: impl Fn(u32) -> Setting, len: usize) -> Vec<u32> {
    let mut sequence = body.prompt.clone();
    let mut tokens = Vec::new();
    let mut states: Vec<u64> = Vec::new();
    let mut position = 0u32;
    while tokens.len() < len {
        let Setting { tiers, blobs } = setting_at(position);
        let seen = seen(position).map(|seen| states[seen as usize]);
        let state = cached(states.last().copied().unwrap_or(0), seen, sequence[position as usize], &tiers);
        states.push(state);
        position += 1;
        if position as usize == sequence.len() {
            let experts = plan.moe_layers.iter().flat_map(|&layer| route(plan, state, layer, &tiers));
            let draw = draw(body.sampling.seed, Purpose::Sample, 0, u64::from(position));
            let next = token(plan, state, experts.map(|key| content(key, blobs.get(&key).copied())), draw);
            sequence.push(next);
            tokens.push(next);
        }
    }
    tokens
}
