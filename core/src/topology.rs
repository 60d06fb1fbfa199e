//! Who holds what when a model is spread over ranks: pure functions of the topology, so that a rank that restarts, or a
//! node that replaces another, finds the very same share without asking.
//!
//! Layers are divided among pipeline stages, the outputs (rows) of a matrix among tensor ranks, experts among expert
//! ranks; each share is contiguous and ascending. Inputs (columns, the K of a product) are deliberately never divided:
//! every output is one dot product on one rank, so gathering the outputs gives the bits of a single machine, and no
//! partial sum ever crosses ranks. There is no way to say a division of K with the types below.

use crate::cluster::membership::NodeId;
use alloc::{format, string::String, vec::Vec};
use core::fmt;
use core::ops::Range;
use core::str::FromStr;
use serde::{Deserialize, Serialize};

/// How many ranks there are of each kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Replicas of the whole model, each with requests of its own.
    pub data: u32,
    /// Ranks that share the rows of every matrix.
    pub tensor: u32,
    /// Stages that share the layers.
    pub pipeline: u32,
    /// Ranks that share the experts of every layer.
    pub expert: u32,
}

/// The place of a rank in its replica. Ranks are numbered stage by stage, in a stage tensor rank by tensor rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Seat {
    /// Pipeline stage, from 0.
    pub pipeline: u32,
    /// Tensor rank in the stage, from 0.
    pub tensor: u32,
    /// Expert rank in the stage, from 0.
    pub expert: u32,
}

/// One holder of base parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Rank {
    /// Pipeline stage, from 0.
    pub pipeline: u32,
    /// Tensor rank in the stage, from 0.
    pub tensor: u32,
}

/// Which stage a tensor belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// Before the layers: the embedding.
    Front,
    /// In a layer.
    Layer(u32),
    /// After the layers: the last norm and the output projection.
    Back,
}

/// How a tensor is divided among the tensor ranks of its stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Division {
    /// By rows, this many always together: 1, or the rows of one attention head.
    Rows {
        /// Rows that stay together; divides the rows of the tensor.
        together: u32,
    },
    /// Every tensor rank has all of it (norms, routers); the first owns it.
    Copies,
}

/// A tensor of base parameters, row-major.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BaseTensor {
    /// Which stage has it.
    pub place: Place,
    /// Rows, that is outputs.
    pub rows: u32,
    /// How the rows are divided.
    pub division: Division,
}

/// Rows of a tensor at a rank.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slice {
    /// Index into the tensors given to [`assign`].
    pub tensor: usize,
    /// Who holds the rows.
    pub rank: Rank,
    /// Which rows.
    pub rows: Range<u32>,
    /// Whether another rank owns these rows, and this is a copy of them.
    pub copy: bool,
}

impl Topology {
    /// One rank of everything.
    pub const SINGLE: Self = Self { data: 1, tensor: 1, pipeline: 1, expert: 1 };
    /// No replica may have more ranks: the leader keeps a bit for each.
    pub const REPLICA_RANKS_MAX: u32 = 64;
    /// No kind may have more ranks.
    pub const RANKS_MAX: u32 = 1 << 12;

    /// Checks the counts against a model's layers and the experts of a layer (0 for a dense model).
    ///
    /// # Errors
    /// The count and the remedy, for people.
    pub fn check(&self, layers: u32, experts: u32) -> Result<(), String> {
        self.check_counts()?;
        if self.pipeline > layers {
            return Err(format!(
                "topology.pipeline is {}; the model has {layers} layers to share",
                self.pipeline
            ));
        }
        if self.expert > experts.max(1) {
            return Err(format!(
                "topology.expert is {}; a layer has {experts} experts to share",
                self.expert
            ));
        }
        Ok(())
    }

    /// Checks what needs no model.
    ///
    /// # Errors
    /// The count and the remedy, for people.
    pub fn check_counts(&self) -> Result<(), String> {
        for (name, count) in [
            ("data", self.data),
            ("tensor", self.tensor),
            ("pipeline", self.pipeline),
            ("expert", self.expert),
        ] {
            if !(1..=Self::RANKS_MAX).contains(&count) {
                return Err(format!("topology.{name} is {count}; it must be 1 to {}", Self::RANKS_MAX));
            }
        }
        let ranks = [self.pipeline, self.tensor, self.expert].into_iter().fold(1u64, |n, m| n * u64::from(m));
        if ranks > u64::from(Self::REPLICA_RANKS_MAX) {
            return Err(format!(
                "topology has {ranks} ranks in a replica; pipeline x tensor x expert must be at most {}",
                Self::REPLICA_RANKS_MAX
            ));
        }
        Ok(())
    }

    /// Ranks of one replica.
    #[must_use]
    pub const fn ranks(&self) -> u32 {
        self.pipeline * self.tensor * self.expert
    }

    /// Nodes that the whole topology needs.
    #[must_use]
    pub const fn nodes(&self) -> u32 {
        self.data * self.ranks()
    }

    /// The replica and rank that a node has unless the supervisor says otherwise; `None` for a spare.
    #[must_use]
    pub fn home(&self, node: NodeId) -> Option<(u32, u32)> {
        (node.0 < self.nodes()).then(|| (node.0 / self.ranks(), node.0 % self.ranks()))
    }

    /// Where a rank sits.
    #[must_use]
    pub const fn seat(&self, rank: u32) -> Seat {
        Seat {
            pipeline: rank / (self.tensor * self.expert),
            tensor: rank / self.expert % self.tensor,
            expert: rank % self.expert,
        }
    }

    /// Who sits there.
    #[must_use]
    pub const fn rank(&self, seat: Seat) -> u32 {
        (seat.pipeline * self.tensor + seat.tensor) * self.expert + seat.expert
    }

    /// The stage of a layer.
    ///
    /// # Panics
    /// If there is no such layer.
    #[must_use]
    pub fn stage(&self, layers: u32, layer: u32) -> u32 {
        (0..self.pipeline).find(|&s| self.layers(layers, s).contains(&layer)).expect("a layer of the model")
    }

    /// The expert rank that has an expert, by its ordinal in its layer.
    ///
    /// # Panics
    /// If there is no such expert.
    #[must_use]
    pub fn holder(&self, experts: u32, ordinal: u32) -> u32 {
        (0..self.expert)
            .find(|&r| self.experts(experts, r).contains(&ordinal))
            .expect("an expert of the layer")
    }

    /// The layers of a stage.
    #[must_use]
    pub fn layers(&self, layers: u32, stage: u32) -> Range<u32> {
        share(layers, self.pipeline, stage)
    }

    /// The rows, or groups of rows, that a tensor rank holds.
    #[must_use]
    pub fn rows(&self, rows: u32, rank: u32) -> Range<u32> {
        share(rows, self.tensor, rank)
    }

    /// The experts of a layer, by ordinal, that an expert rank holds.
    #[must_use]
    pub fn experts(&self, experts: u32, rank: u32) -> Range<u32> {
        share(experts, self.expert, rank)
    }
}

/// Divides base tensors among ranks: every row is owned by exactly one rank, and slices come in the order of tensor,
/// then rank, so that the owned rows of a tensor, one after the other, are the tensor.
///
/// A rank whose share of a tensor is empty gets no slice of it.
///
/// # Errors
/// If the topology does not fit the model, or a tensor's rows cannot be divided as it says; for people.
pub fn assign(topology: &Topology, layers: u32, tensors: &[BaseTensor]) -> Result<Vec<Slice>, String> {
    Topology { expert: 1, ..*topology }.check(layers, 1)?;
    let mut slices = Vec::new();
    for (index, tensor) in tensors.iter().enumerate() {
        let pipeline = stage(topology, layers, tensor.place).ok_or_else(|| {
            format!("tensor {index} is of {:?}, the model has {layers} layers", tensor.place)
        })?;
        let at = |tensor| Rank { pipeline, tensor };
        match tensor.division {
            Division::Copies => slices.extend((0..topology.tensor).map(|rank| Slice {
                tensor: index,
                rank: at(rank),
                rows: 0..tensor.rows,
                copy: rank > 0,
            })),
            Division::Rows { together } => {
                if together == 0 || !tensor.rows.is_multiple_of(together) {
                    return Err(format!("tensor {index}: {} rows are not groups of {together}", tensor.rows));
                }
                let shares =
                    (0..topology.tensor).map(|rank| (rank, topology.rows(tensor.rows / together, rank)));
                slices.extend(shares.filter(|(_, groups)| !groups.is_empty()).map(|(rank, groups)| Slice {
                    tensor: index,
                    rank: at(rank),
                    rows: groups.start * together..groups.end * together,
                    copy: false,
                }));
            }
        }
    }
    Ok(slices)
}

fn stage(topology: &Topology, layers: u32, place: Place) -> Option<u32> {
    match place {
        Place::Front => Some(0),
        Place::Layer(layer) => (layer < layers).then(|| topology.stage(layers, layer)),
        Place::Back => Some(topology.pipeline - 1),
    }
}

/// The `part`th of `parts` contiguous shares of `0..count`, whose sizes differ by at most 1.
fn share(count: u32, parts: u32, part: u32) -> Range<u32> {
    let cut = |part: u32| {
        let cut = u64::from(count) * u64::from(part) / u64::from(parts);
        u32::try_from(cut).expect("at most count")
    };
    cut(part)..cut(part + 1)
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { data, tensor, pipeline, expert } = self;
        write!(f, "dp={data},tp={tensor},pp={pipeline},ep={expert}")
    }
}

/// `dp=2,tp=1,pp=2,ep=2`, in any order; what is left out is 1.
impl FromStr for Topology {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut topology = Self::SINGLE;
        for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
            let wrong = || format!("{part:?} is no part of a topology; write it as dp=2,tp=1,pp=2,ep=2");
            let (name, count) = part.split_once('=').ok_or_else(wrong)?;
            let count = count.trim().parse().map_err(|_| wrong())?;
            match name.trim() {
                "dp" => topology.data = count,
                "tp" => topology.tensor = count,
                "pp" => topology.pipeline = count,
                "ep" => topology.expert = count,
                _ => return Err(wrong()),
            }
        }
        topology.check_counts()?;
        Ok(topology)
    }
}

impl Default for Topology {
    fn default() -> Self {
        Self::SINGLE
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    fn tensor() -> impl Strategy<Value = (u32, u32, bool)> {
        (1u32..200, 1u32..20, any::<bool>())
    }

    proptest! {
        #[test]
        fn every_row_is_owned_once_and_the_owned_are_the_whole(
            ranks in (1u32..9, 1u32..7),
            more_layers in 0u32..9,
            shapes in prop::collection::vec((tensor(), 0u32..99), 1..12),
        ) {
            let topology = Topology { data: 1, tensor: ranks.0, pipeline: ranks.1, expert: 1 };
            let layers = ranks.1 + more_layers;
            let tensors: Vec<BaseTensor> = shapes
                .iter()
                .map(|&((groups, together, copies), place)| BaseTensor {
                    place: match place % (layers + 2) {
                        0 => Place::Front,
                        n if n <= layers => Place::Layer(n - 1),
                        _ => Place::Back,
                    },
                    rows: groups * together,
                    division: if copies { Division::Copies } else { Division::Rows { together } },
                })
                .collect();
            let slices = assign(&topology, layers, &tensors).expect("it fits");
            prop_assert!(slices.is_sorted_by_key(|s| (s.tensor, s.rank)));
            for (index, tensor) in tensors.iter().enumerate() {
                let mine: Vec<&Slice> = slices.iter().filter(|s| s.tensor == index).collect();
                let mut at = 0;
                for slice in mine.iter().filter(|s| !s.copy) {
                    prop_assert_eq!(slice.rows.start, at, "no gap, no overlap");
                    prop_assert!(!slice.rows.is_empty());
                    at = slice.rows.end;
                }
                prop_assert_eq!(at, tensor.rows);
                let stages: Vec<u32> = mine.iter().map(|s| s.rank.pipeline).collect();
                prop_assert!(stages.windows(2).all(|w| w[0] == w[1]), "a tensor is in one stage");
                if let Place::Layer(layer) = tensor.place {
                    prop_assert!(topology.layers(layers, stages[0]).contains(&layer));
                }
                match tensor.division {
                    Division::Copies => {
                        prop_assert_eq!(mine.len(), topology.tensor as usize);
                        prop_assert!(mine.iter().all(|s| s.rows == (0..tensor.rows)));
                    }
                    Division::Rows { together } => {
                        prop_assert!(mine.iter().all(|s| !s.copy && s.rows.start % together == 0));
                        let sizes: Vec<u32> = mine.iter().map(|s| s.rows.end - s.rows.start).collect();
                        if tensor.rows / together >= topology.tensor {
                            prop_assert_eq!(mine.len(), topology.tensor as usize);
                            let (least, most) = (sizes.iter().min(), sizes.iter().max());
                            prop_assert!(most.zip(least).is_some_and(|(a, b)| a - b <= together), "balanced");
                        }
                    }
                }
            }
        }

        #[test]
        fn every_rank_has_a_seat_of_its_own(data in 1u32..4, tensor in 1u32..5, pipeline in 1u32..5, expert in 1u32..4) {
            let topology = Topology { data, tensor, pipeline, expert };
            for rank in 0..topology.ranks() {
                prop_assert_eq!(topology.rank(topology.seat(rank)), rank);
            }
            let homes: Vec<_> = (0..=topology.nodes()).map(|node| topology.home(NodeId(node))).collect();
            let seats = (0..data).flat_map(|replica| (0..topology.ranks()).map(move |rank| Some((replica, rank))));
            prop_assert_eq!(homes, seats.chain([None]).collect::<Vec<_>>());
        }

        #[test]
        fn layers_and_experts_are_shared_out_exactly(count in 1u32..300, parts in 1u32..40) {
            let topology = Topology { data: 1, tensor: 1, pipeline: parts, expert: parts };
            let layers: Vec<u32> = (0..parts).flat_map(|s| topology.layers(count, s)).collect();
            let experts: Vec<u32> = (0..parts).flat_map(|r| topology.experts(count, r)).collect();
            prop_assert_eq!(&layers, &(0..count).collect::<Vec<u32>>());
            prop_assert_eq!(&experts, &layers);
        }
    }

    #[test]
    fn what_cannot_be_shared_is_refused() {
        let ok = Topology { data: 2, tensor: 2, pipeline: 2, expert: 4 };
        assert_eq!(ok.check(2, 4), Ok(()));
        assert_eq!(Topology::SINGLE.check(1, 0), Ok(()));
        for (topology, word) in [
            (Topology { tensor: 0, ..ok }, "topology.tensor is 0; it must be 1"),
            (Topology { pipeline: 3, ..ok }, "topology.pipeline is 3; the model has 2 layers"),
            (Topology { expert: 5, ..ok }, "topology.expert is 5; a layer has 4 experts"),
            (Topology { tensor: u32::MAX, ..ok }, "it must be 1 to 4096"),
            (Topology { tensor: 64, ..ok }, "512 ranks in a replica"),
        ] {
            let error = topology.check(2, 4).expect_err("it does not fit");
            assert!(error.contains(word), "{error}");
        }
        let odd = BaseTensor { place: Place::Front, rows: 10, division: Division::Rows { together: 4 } };
        assert!(assign(&ok, 2, &[odd]).expect_err("10 is no multiple of 4").contains("groups of 4"));
        let beyond = BaseTensor { place: Place::Layer(2), rows: 1, division: Division::Copies };
        assert!(assign(&ok, 2, &[beyond]).expect_err("there is no layer 2").contains("2 layers"));
    }

    #[test]
    fn the_assignment_is_the_documented_one() {
        let tensors = [
            BaseTensor { place: Place::Front, rows: 5, division: Division::Rows { together: 1 } },
            BaseTensor { place: Place::Layer(1), rows: 12, division: Division::Rows { together: 4 } },
            BaseTensor { place: Place::Back, rows: 1, division: Division::Copies },
        ];
        let slices =
            assign(&Topology { data: 1, tensor: 2, pipeline: 2, expert: 1 }, 3, &tensors).expect("it fits");
        let shown: Vec<_> =
            slices.into_iter().map(|s| (s.tensor, s.rank.pipeline, s.rank.tensor, s.rows, s.copy)).collect();
        assert_eq!(
            shown,
            vec![
                (0, 0, 0, 0..2, false),
                (0, 0, 1, 2..5, false),
                (1, 1, 0, 0..4, false),
                (1, 1, 1, 4..12, false),
                (2, 1, 0, 0..1, false),
                (2, 1, 1, 0..1, true),
            ]
        );
    }
}
