//! What another device than the CPU has to know of a model to compute it: read-only views of the weights as they lie packed,
//! tables, and where things are. Sizes that [`Arch`](crate::arch::Arch) states are not said again.
//!
//! All is of the model's share, as large as its rank has it. What is loaded first ([`Model::load_base`], [`Model::load_routers`]) has
//! to be loaded.

use crate::arch::Attention;
use crate::kernels::{KvShape, PackedView, RopeTable, Storage};
use crate::model::Model;
use crate::weights::{GatedBlock, Inputs, Matrix, NormWeights, Projection};

/// A matrix and its bias, a value for each output.
#[derive(Clone, Copy, Debug)]
pub struct LinearPart<'a> {
    /// The matrix.
    pub weights: PackedView<'a>,
    /// The bias.
    pub bias: Option<&'a [f32]>,
}

/// The norm of a row.
#[derive(Clone, Copy, Debug)]
pub struct NormPart<'a> {
    /// Multiplies.
    pub weight: &'a [f32],
    /// Is added; only a norm by mean and variance has one.
    pub bias: Option<&'a [f32]>,
}

/// Gate, up and down of a block that every position uses.
pub type GatedPart<'a> = [PackedView<'a>; 3];

/// What makes queries, keys and values.
#[derive(Clone, Debug)]
pub enum InputsPart<'a> {
    /// Projections of the input.
    Plain {
        /// Of queries, keys and values.
        projections: [LinearPart<'a>; 3],
        /// Norms of queries and keys: as wide as a head, or as all of them.
        qk_norm: Option<[&'a [f32]; 2]>,
    },
    /// Multi-head latent attention.
    Latent {
        /// Queries, of the input; or the vector that they are made of.
        query: LinearPart<'a>,
        /// The norm of that vector, and queries of it.
        query_norm: Option<(&'a [f32], LinearPart<'a>)>,
        /// The latent, and the rotated part of all keys.
        latent: LinearPart<'a>,
        /// The norm of the latent.
        latent_norm: &'a [f32],
        /// For each head: a plain query into a query of the latent, and a mix of latents into a mix of values.
        heads: Vec<[PackedView<'a>; 2]>,
    },
}

/// The base parameters of a decoder layer, its router apart.
#[derive(Clone, Debug)]
pub struct LayerPart<'a> {
    /// The norm before attention.
    pub attention_norm: NormPart<'a>,
    /// The norm before the block.
    pub block_norm: NormPart<'a>,
    /// What attention is made of.
    pub inputs: InputsPart<'a>,
    /// The output of attention.
    pub output: LinearPart<'a>,
    /// A logit for each head that takes part in the softmax.
    pub sinks: Option<&'a [f32]>,
    /// The dense block; a mixture has none.
    pub dense: Option<GatedPart<'a>>,
    /// The shared expert of a mixture, and its gate: one output.
    pub shared: Option<(GatedPart<'a>, Option<PackedView<'a>>)>,
}

/// A router.
#[derive(Clone, Copy, Debug)]
pub struct RouterPart<'a> {
    /// Its outputs.
    pub scores: LinearPart<'a>,
    /// Added to scores where they select.
    pub correction: Option<&'a [f32]>,
}

/// The embedding: a row for each token, as published.
#[derive(Clone, Copy, Debug)]
pub struct TablePart<'a> {
    /// How its values are stored.
    pub storage: Storage,
    /// All rows.
    pub bytes: &'a [u8],
}

/// Where the parts of an expert lie in its slot, in bytes from the slot's beginning.
#[derive(Clone, Copy, Debug)]
pub struct ExpertPart {
    /// Outputs of gate, up and down: a tensor rank has some.
    pub outputs: [usize; 3],
    /// How gate, up and down are stored.
    pub storages: [Storage; 3],
    /// Where they begin.
    pub matrices: [usize; 3],
    /// Where their biases begin, as `f32`.
    pub biases: Option<[usize; 3]>,
}

impl Model {
    /// Attention over the heads of this share.
    pub const fn attention_part(&self) -> &Attention {
        &self.attention
    }

    /// The embedding, which the first stage uses.
    ///
    /// # Panics
    /// If base parameters are not loaded.
    pub fn embedding_part(&self) -> TablePart<'_> {
        let tensor = &self.loaded().embedding;
        TablePart { storage: tensor.storage(), bytes: self.checkpoint.bytes(tensor) }
    }

    /// A decoder layer.
    ///
    /// # Panics
    /// If base parameters are not loaded, or the layer is not of this share's stage.
    pub fn layer_part(&self, layer: usize) -> LayerPart<'_> {
        let weights = &self.loaded().layers[layer - self.share.layers(self.arch()).start];
        let inputs = match &weights.inputs {
            Inputs::Plain { projections, qk_norm } => InputsPart::Plain {
                projections: projections.each_ref().map(linear),
                qk_norm: qk_norm.as_ref().map(|(q, k)| [&q[..], &k[..]]),
            },
            Inputs::Latent(latent) => InputsPart::Latent {
                query: linear(&latent.query),
                query_norm: latent.query_norm.as_ref().map(|(norm, second)| (&norm[..], linear(second))),
                latent: linear(&latent.latent),
                latent_norm: &latent.latent_norm,
                heads: latent.heads.iter().map(|(query, value)| [query.view(), value.view()]).collect(),
            },
        };
        LayerPart {
            attention_norm: norm(&weights.attention_norm),
            block_norm: norm(&weights.block_norm),
            inputs,
            output: linear(&weights.output),
            sinks: weights.sinks.as_deref(),
            dense: weights.dense.as_ref().map(GatedBlock::views).map(|views| views.matrices),
            shared: weights
                .shared
                .as_ref()
                .map(|(block, gate)| (block.views().matrices, gate.as_ref().map(Matrix::view))),
        }
    }

    /// The norm before the output projection, and that projection, which the last stage has.
    ///
    /// # Panics
    /// If base parameters are not loaded.
    pub fn head_part(&self) -> (NormPart<'_>, Option<LinearPart<'_>>) {
        let base = self.loaded();
        (norm(&base.norm), base.head.as_ref().map(linear))
    }

    /// The router of a layer; none where there is no mixture, in another stage, or before routers are loaded.
    pub fn router_part(&self, layer: usize) -> Option<RouterPart<'_>> {
        let router = self.routers.get(layer)?.as_ref()?;
        let scores = LinearPart { weights: router.matrix.view(), bias: router.bias.as_deref() };
        Some(RouterPart { scores, correction: router.correction.as_deref() })
    }

    /// Where the parts of an expert lie in its slot; none if there are no experts.
    pub fn expert_part(&self) -> Option<ExpertPart> {
        self.expert.as_ref().map(|layout| layout.part())
    }

    /// What is cached of one position in one layer.
    pub const fn kv_shape(&self) -> KvShape {
        self.kv
    }

    /// The group of a layer ([`Model::kv_groups`]), and at which byte of a page its keys begin; its values follow.
    pub fn kv_place(&self, layer: usize) -> (usize, usize) {
        self.kv_groups.place_of(layer, self.kv)
    }

    /// The tables of the rotary embedding, once base parameters are loaded.
    pub const fn rope_table(&self) -> &RopeTable {
        &self.rope
    }

    /// The seed of ties between experts.
    pub const fn routing_seed(&self) -> u64 {
        self.routing_seed
    }

    /// Lets go of base parameters and routers, for whoever has them elsewhere: this model then computes nothing.
    pub fn forget_weights(&mut self) {
        self.base = None;
        self.routers.fill_with(|| None);
    }

    fn loaded(&self) -> &crate::weights::Base {
        self.base.as_ref().expect("base parameters are loaded")
    }
}

fn linear(projection: &Projection) -> LinearPart<'_> {
    LinearPart { weights: projection.matrix.view(), bias: projection.bias.as_deref() }
}

fn norm(weights: &NormWeights) -> NormPart<'_> {
    NormPart { weight: &weights.weight, bias: weights.bias.as_deref() }
}
