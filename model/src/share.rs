//! A rank's share of a model: which layers, heads, rows and experts are its own.
//!
//! Nothing here asks anybody: the topology and the rank decide it. Heads stay whole, and so do the tiles of a packed matrix;
//! inputs (the K of a product) are never divided, so every value is computed by one rank exactly as one machine would.

use crate::arch::{Arch, Attention};
use crate::kernels::TILE_OUTPUTS as TILE;
use lite_llm_core::topology::{Seat, Topology};
use std::ops::Range;

/// The place of a model in its replica.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    topology: Topology,
    rank: u32,
}

impl Default for Share {
    fn default() -> Self {
        Self::WHOLE
    }
}

impl Share {
    /// All of the model.
    pub const WHOLE: Self = Self { topology: Topology::SINGLE, rank: 0 };

    /// The share of a rank.
    ///
    /// # Panics
    /// If the topology has no such rank.
    pub fn new(topology: Topology, rank: u32) -> Self {
        assert!(rank < topology.ranks(), "rank {rank} of {}", topology.ranks());
        Self { topology, rank }
    }

    /// Whether a model can be shared like this.
    ///
    /// # Errors
    /// What does not divide, and the remedy, for people.
    pub fn check(topology: &Topology, arch: &Arch) -> Result<(), String> {
        let experts = arch.moe.as_ref().map_or(0, |moe| moe.experts);
        topology.check(number(arch.layers.len()), number(experts))?;
        let Attention { heads, kv_heads, .. } = arch.attention;
        let (ranks, group) = (topology.tensor as usize, heads / kv_heads.max(1));
        let fits = if arch.attention.latent.is_some() {
            ranks <= heads
        } else {
            ranks <= kv_heads || (ranks.is_multiple_of(kv_heads) && group.is_multiple_of(ranks / kv_heads))
        };
        if fits {
            return Ok(());
        }
        Err(format!(
            "topology.tensor is {ranks}; the model has {heads} heads over {kv_heads} of keys and values: take at most \
             {kv_heads}, or a multiple of it that divides the {heads}"
        ))
    }

    /// The topology.
    pub const fn topology(&self) -> &Topology {
        &self.topology
    }

    /// The rank.
    pub const fn rank(&self) -> u32 {
        self.rank
    }

    /// Its place.
    pub const fn seat(&self) -> Seat {
        self.topology.seat(self.rank)
    }

    /// Whether several ranks share the rows of matrices.
    pub const fn is_tensor(&self) -> bool {
        self.topology.tensor > 1
    }

    /// Whether several ranks share the experts of a layer.
    pub const fn is_expert(&self) -> bool {
        self.topology.expert > 1
    }

    /// Whether it begins with the embedding.
    pub const fn is_first_stage(&self) -> bool {
        self.seat().pipeline == 0
    }

    /// Whether it ends with the logits.
    pub const fn is_last_stage(&self) -> bool {
        self.seat().pipeline + 1 == self.topology.pipeline
    }

    /// The ranks that share rows with this one, in the order of rows; itself among them.
    pub fn tensor_ranks(&self) -> Vec<u32> {
        (0..self.topology.tensor).map(|tensor| self.topology.rank(Seat { tensor, ..self.seat() })).collect()
    }

    /// The ranks that share experts with this one, itself among them.
    pub fn expert_ranks(&self) -> Vec<u32> {
        (0..self.topology.expert).map(|expert| self.topology.rank(Seat { expert, ..self.seat() })).collect()
    }

    /// The same seat of another stage.
    pub fn in_stage(&self, pipeline: u32) -> u32 {
        self.topology.rank(Seat { pipeline, ..self.seat() })
    }

    /// The layers of its stage.
    pub fn layers(&self, arch: &Arch) -> Range<usize> {
        let layers = self.topology.layers(number(arch.layers.len()), self.seat().pipeline);
        layers.start as usize..layers.end as usize
    }

    /// The expert rank that has the expert at a place among those of its layer.
    pub(crate) fn holder(&self, arch: &Arch, place: u32) -> u32 {
        let experts = arch.moe.as_ref().map_or(0, |moe| moe.experts);
        self.topology.holder(number(experts), place)
    }

    /// The rows of a matrix that are a tensor rank's: whole tiles.
    pub fn rows_of(&self, tensor: u32, rows: usize) -> Range<usize> {
        let tiles = self.topology.rows(number(rows.div_ceil(TILE)), tensor);
        (tiles.start as usize * TILE).min(rows)..(tiles.end as usize * TILE).min(rows)
    }

    /// Its rows of a matrix.
    pub(crate) fn rows(&self, rows: usize) -> Range<usize> {
        self.rows_of(self.seat().tensor, rows)
    }

    /// The query heads of a tensor rank: those of whole heads of keys and values, or a part of those of one.
    pub fn heads_of(&self, tensor: u32, attention: &Attention) -> Range<usize> {
        let group = if attention.latent.is_some() { 1 } else { attention.heads / attention.kv_heads };
        let units = attention.heads / group;
        let (unit, units) =
            if self.topology.tensor as usize <= units { (group, units) } else { (1, attention.heads) };
        let own = self.topology.rows(number(units), tensor);
        own.start as usize * unit..own.end as usize * unit
    }

    /// Its heads of keys and values: those that its query heads look at.
    pub fn kv_heads_of(&self, tensor: u32, attention: &Attention) -> Range<usize> {
        let heads = self.heads_of(tensor, attention);
        let group = attention.heads / attention.kv_heads;
        heads.start / group..heads.end.div_ceil(group)
    }

    /// How many rows of a base tensor it has, by the tensor's canonical name.
    pub(crate) fn rows_held(&self, arch: &Arch, name: &str, rows: usize) -> usize {
        let (own, whole) = (self.attention(arch), &arch.attention);
        let name = name.trim_end_matches(".weight").trim_end_matches(".bias");
        match name.rsplit('.').next().unwrap_or(name) {
            "q_proj" | "q_b_proj" | "kv_b_proj" => rows / whole.heads * own.heads,
            "k_proj" | "v_proj" => rows / whole.kv_heads * own.kv_heads,
            "o_proj" | "gate" | "up" | "down" | "lm_head" => self.rows(rows).len(),
            _ => rows,
        }
    }

    /// Attention as this rank computes it: over its own heads.
    pub(crate) fn attention(&self, arch: &Arch) -> Attention {
        let (tensor, whole) = (self.seat().tensor, &arch.attention);
        Attention {
            heads: self.heads_of(tensor, whole).len(),
            kv_heads: self.kv_heads_of(tensor, whole).len(),
            ..whole.clone()
        }
    }
}

fn number(count: usize) -> u32 {
    u32::try_from(count).expect("a checkpoint's counts fit")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn arch(heads: usize, kv_heads: usize, layers: usize) -> Arch {
        let text = format!(
            r#"{{"model_type": "llama", "hidden_size": 64, "num_attention_heads": {heads}, "head_dim": 4,
            "num_key_value_heads": {kv_heads}, "num_hidden_layers": {layers}, "vocab_size": 64,
            "max_position_embeddings": 100, "intermediate_size": 64}}"#
        );
        let config = crate::checkpoint::config::Config::parse("config.json".as_ref(), text.as_bytes());
        crate::families::read(&config.expect("a configuration")).expect("a family")
    }

    proptest! {
        /// Heads and rows are each some rank's, once and in order; a query head is where its keys are.
        #[test]
        fn everything_is_shared_out(
            tensor in 1u32..9, pipeline in 1u32..4, expert in 1u32..4, kv_heads in 1usize..9, group in 1usize..5, rows in 1usize..400,
        ) {
            let arch = arch(kv_heads * group, kv_heads, 4);
            let topology = Topology { data: 1, tensor, pipeline, expert };
            let wanted = tensor as usize <= kv_heads
                || (tensor as usize).is_multiple_of(kv_heads) && group.is_multiple_of(tensor as usize / kv_heads);
            prop_assert_eq!(Share::check(&Topology { expert: 1, ..topology }, &arch).is_ok(), wanted);
            prop_assume!(wanted);
            let share = Share::new(topology, topology.ranks() - 1);
            let heads: Vec<usize> = (0..tensor).flat_map(|rank| share.heads_of(rank, &arch.attention)).collect();
            prop_assert_eq!(heads, (0..kv_heads * group).collect::<Vec<_>>());
            for rank in 0..tensor {
                let (heads, kv) = (share.heads_of(rank, &arch.attention), share.kv_heads_of(rank, &arch.attention));
                prop_assert!(heads.len().is_multiple_of(kv.len().max(1)), "as many queries to each");
                let own = heads.len() / kv.len().max(1);
                prop_assert!(heads.clone().all(|head| kv.start + (head - heads.start) / own == head / group));
            }
            let shared: Vec<usize> = (0..tensor).flat_map(|rank| share.rows_of(rank, rows)).collect();
            prop_assert_eq!(shared, (0..rows).collect::<Vec<_>>());
            let layers: Vec<usize> = (0..pipeline)
                .flat_map(|stage| Share::new(topology, share.in_stage(stage)).layers(&arch))
                .collect();
            prop_assert_eq!(layers, (0..4).collect::<Vec<_>>());
        }
    }
}
