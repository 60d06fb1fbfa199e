//! What steps are computed in: buffers that grow to the largest step and are kept, so that a step allocates nothing that
//! an earlier one already had.

use super::exchange::ROWS_TOGETHER;
use super::ranks::RowDigest;
use super::{At, attention, experts, gated, latent, output};
use crate::arch::Arch;
use crate::kernels::attention::room_of_thread;
use crate::kernels::{Buffer, KvShape, Products};
use crate::share::Share;

/// The memory of steps. Whatever an earlier step left in it, no bit of a later one depends on it.
#[derive(Debug, Default)]
pub struct Workspace {
    pub(super) stream: Stream,
    pub(super) rooms: Rooms,
}

impl Workspace {
    /// Bytes that it keeps.
    pub fn bytes(&self) -> usize {
        let Stream { at, positions, x, normed, digests } = &self.stream;
        let Rooms { products, attention, latent, gated, experts, output, added } = &self.rooms;
        let lists = at.capacity() * size_of::<At>() + 4 * positions.capacity();
        let stream = lists + digests.capacity() * size_of::<RowDigest>() + x.bytes() + normed.bytes();
        let rooms = [attention.bytes(), latent.bytes(), gated.bytes(), experts.bytes(), output.bytes()];
        stream + products.bytes() + rooms.iter().sum::<usize>() + added.bytes()
    }
}

/// Bytes of the workspace that a step of so many positions and rows needs at most, and of what the threads of the pool
/// keep beside it.
pub(crate) fn planned_bytes(
    arch: &Arch,
    kv: KvShape,
    share: &Share,
    threads: u64,
    positions: u64,
    rows: u64,
) -> u64 {
    let attention = &arch.attention;
    let (hidden, heads) = (arch.hidden, attention.heads);
    let dense = arch.layers.iter().filter_map(|layer| layer.dense).max().unwrap_or(0);
    let queries = attention.q_dim();
    let (mut each, mut widest) = (3 * hidden, hidden.max(attention.mixed_dim()));
    each += match attention.latent {
        None => queries + attention.k_dim() + attention.v_dim() + attention.mixed_dim(),
        Some(latent) => {
            let by_head = latent.rank.max(latent.plain).max(attention.value_dim);
            widest = widest.max(heads * latent.rank.max(latent.plain).next_multiple_of(16));
            let first = latent.query_rank.unwrap_or(queries);
            first
                + queries
                + kv.key_dim * (1 + heads)
                + heads * (latent.rank + 2 * by_head)
                + attention.mixed_dim()
        }
    };
    let (mut gated, mut of_experts) = (dense, 0);
    if let Some(moe) = &arch.moe {
        let shared = moe.shared.as_ref().map_or(0, |shared| shared.intermediate);
        gated = gated.max(shared).max(moe.intermediate);
        // Results and the routes to them, scores twice; what is shared, and its gates.
        each += moe.top_k * (hidden + 8) + 2 * moe.router_rows() + hidden + 1;
        let users = positions.saturating_mul(moe.top_k as u64).min(ROWS_TOGETHER as u64);
        of_experts =
            users * (3 * moe.intermediate + hidden.max(moe.intermediate).next_multiple_of(16)) as u64;
    }
    // What is foreseen is foreseen of steps with one position a row.
    let foreseen = arch.moe.as_ref().map_or(0, |moe| 2 * moe.router_rows() + 10 * moe.top_k);
    let mut of_rows = (hidden + arch.vocab + foreseen) as u64;
    if share.topology().ranks() > 1 {
        // What ranks exchange is there three times at most: in a buffer, on its way out, on its way in.
        each += 3 * queries.max(attention.mixed_dim()).max(gated).max(2 * hidden);
        of_experts +=
            3 * positions.saturating_mul(arch.moe.as_ref().map_or(0, |moe| moe.top_k * hidden) as u64);
        of_rows += 3 * arch.vocab as u64;
    }
    // What is picked for experts is repacked in their place; a list entry is a few words.
    widest = widest.max(gated).next_multiple_of(16);
    each += 3 * gated + widest + size_of::<At>() + 64;
    let room = (room_of_thread(kv, heads, arch.context as usize) as u64)
        .max(16 * positions.max(ROWS_TOGETHER as u64));
    of_rows += widest as u64 + 1024;
    4 * (positions.saturating_mul(each as u64) + of_experts + rows.saturating_mul(of_rows) + threads * room)
}

/// What runs through all layers.
#[derive(Debug, Default)]
pub(super) struct Stream {
    pub(super) at: Vec<At>,
    pub(super) positions: Vec<u32>,
    pub(super) x: Buffer,
    pub(super) normed: Buffer,
    pub(super) digests: Vec<RowDigest>,
}

/// What one part of the computation after another works in.
#[derive(Debug, Default)]
pub(super) struct Rooms {
    pub(super) products: Products,
    pub(super) attention: attention::Room,
    pub(super) latent: latent::Room,
    pub(super) gated: gated::Room,
    pub(super) experts: experts::Room,
    pub(super) output: output::Room,
    /// What a block gives, before it is added to the residual stream.
    pub(super) added: Buffer,
}
