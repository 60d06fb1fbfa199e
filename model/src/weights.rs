//! The weights of a model in the form in which the kernels read them.

use crate::arch::{Arch, Latent, Norm};
use crate::checkpoint::{
    Checkpoint, Gated, Tensor, expert_parts, latent_projections, projections, qk_norm_sizes,
};
use crate::kernels::{DType, Isa, PackedView, Piece, Storage, convert, pack, pack_groups, packed_len};
use crate::model::ModelError;
use crate::parts::ExpertPart;
use crate::share::Share;
use std::borrow::Cow;
use std::ops::Range;

/// A matrix in the packed layout.
#[derive(Debug)]
pub(crate) struct Matrix {
    storage: Storage,
    outputs: usize,
    inputs: usize,
    bytes: Piece,
}

impl Matrix {
    pub(crate) fn load(checkpoint: &Checkpoint, tensor: &Tensor) -> Result<Self, ModelError> {
        Self::load_rows(checkpoint, tensor, 0..tensor.shape[0])
    }

    /// Some rows of a matrix.
    fn load_rows(checkpoint: &Checkpoint, tensor: &Tensor, rows: Range<usize>) -> Result<Self, ModelError> {
        let [_, inputs] = tensor.shape[..] else { unreachable!("matrices are asked for by shape") };
        let matrix = if let Storage::Grouped(kind) = tensor.storage() {
            let row = kind.row_bytes(inputs);
            let stored = &checkpoint.bytes(tensor)[rows.start * row..rows.end * row];
            Self::packed(kind, rows.len(), inputs, |dst| pack_groups(kind, rows.len(), inputs, stored, dst))?
        } else {
            let row = inputs * tensor.dtype.bytes();
            let bytes = checkpoint.row_major(tensor);
            Self::pack(tensor.dtype, rows.len(), inputs, &bytes[rows.start * row..rows.end * row])?
        };
        checkpoint.forget(tensor);
        Ok(matrix)
    }

    fn pack(dtype: DType, outputs: usize, inputs: usize, row_major: &[u8]) -> Result<Self, ModelError> {
        Self::packed(dtype, outputs, inputs, |dst| pack(dtype, outputs, inputs, row_major, dst))
    }

    fn packed(
        storage: impl Into<Storage>,
        outputs: usize,
        inputs: usize,
        pack: impl FnOnce(&mut [u8]),
    ) -> Result<Self, ModelError> {
        let storage = storage.into();
        let size = packed_len(storage, outputs, inputs)
            .ok_or(ModelError::Memory { what: "a matrix", bytes: u64::MAX })?;
        let refused = |_| ModelError::Memory { what: "a matrix", bytes: size as u64 };
        let bytes = Piece::written(size, pack).map_err(refused)?;
        Ok(Self { storage, outputs, inputs, bytes })
    }

    pub(crate) fn view(&self) -> PackedView<'_> {
        PackedView::new(self.storage, self.outputs, self.inputs, &self.bytes).expect("packed for this shape")
    }
}

/// A matrix and its bias.
#[derive(Debug)]
pub(crate) struct Projection {
    pub(crate) matrix: Matrix,
    pub(crate) bias: Option<Vec<f32>>,
}

/// Gate, up and down of a block that every position uses.
#[derive(Debug)]
pub(crate) struct GatedBlock {
    pub(crate) gate: Matrix,
    pub(crate) up: Matrix,
    pub(crate) down: Matrix,
}

impl GatedBlock {
    fn load(checkpoint: &Checkpoint, gated: &Gated, share: &Share) -> Result<Self, ModelError> {
        let load = |tensor: &Tensor| Matrix::load_rows(checkpoint, tensor, share.rows(tensor.shape[0]));
        Ok(Self { gate: load(&gated.gate)?, up: load(&gated.up)?, down: load(&gated.down)? })
    }

    pub(crate) fn views(&self) -> GatedViews<'_> {
        GatedViews { matrices: [self.gate.view(), self.up.view(), self.down.view()], biases: None }
    }
}

/// A gated block where it lies, of whatever kind: gate, up and down.
#[derive(Clone, Debug)]
pub(crate) struct GatedViews<'a> {
    pub(crate) matrices: [PackedView<'a>; 3],
    /// Of all three, one after the other.
    biases: Option<Cow<'a, [f32]>>,
}

impl GatedViews<'_> {
    /// The biases of gate, up and down.
    pub(crate) fn biases(&self) -> [Option<&[f32]>; 3] {
        let Some(values) = &self.biases else { return [None; 3] };
        let width = self.matrices[0].outputs();
        let (gate, rest) = values.split_at(width);
        let (up, down) = rest.split_at(width);
        [Some(gate), Some(up), Some(down)]
    }
}

/// The norm of a row.
#[derive(Debug)]
pub(crate) struct NormWeights {
    pub(crate) weight: Vec<f32>,
    /// A norm by mean and variance has one.
    pub(crate) bias: Option<Vec<f32>>,
}

/// What makes queries, keys and values.
#[derive(Debug)]
pub(crate) enum Inputs {
    /// Query, key, value; the norms of queries and keys.
    Plain { projections: [Projection; 3], qk_norm: Option<(Vec<f32>, Vec<f32>)> },
    /// Multi-head latent attention.
    Latent(LatentWeights),
}

/// The weights of multi-head latent attention but its output.
#[derive(Debug)]
pub(crate) struct LatentWeights {
    /// Queries, of the input; or the vector that they are made of, its norm, and queries of it.
    pub(crate) query: Projection,
    pub(crate) query_norm: Option<(Vec<f32>, Projection)>,
    /// The latent, and the rotated part of all keys.
    pub(crate) latent: Projection,
    pub(crate) latent_norm: Vec<f32>,
    /// For each head: a plain query into a query of the latent, and a mix of latents into a mix of values. Keys and
    /// values themselves are never made: a score of a key is a score of its latent.
    pub(crate) heads: Vec<(Matrix, Matrix)>,
}

/// The base parameters of a decoder layer.
#[derive(Debug)]
pub(crate) struct LayerWeights {
    pub(crate) attention_norm: NormWeights,
    pub(crate) block_norm: NormWeights,
    pub(crate) inputs: Inputs,
    pub(crate) output: Projection,
    pub(crate) sinks: Option<Vec<f32>>,
    pub(crate) dense: Option<GatedBlock>,
    pub(crate) shared: Option<(GatedBlock, Option<Matrix>)>,
}

/// The base parameters of a rank.
#[derive(Debug)]
pub(crate) struct Base {
    pub(crate) embedding: Tensor,
    pub(crate) norm: NormWeights,
    /// Only the last stage has it.
    pub(crate) head: Option<Projection>,
    /// The layers of the stage.
    pub(crate) layers: Vec<LayerWeights>,
}

/// A router.
#[derive(Debug)]
pub(crate) struct Router {
    pub(crate) matrix: Matrix,
    /// Added to its outputs.
    pub(crate) bias: Option<Vec<f32>>,
    /// Added to scores where they select, not where they weigh.
    pub(crate) correction: Option<Vec<f32>>,
}

impl Router {
    pub(crate) fn load(checkpoint: &Checkpoint, layer: usize) -> Result<Self, ModelError> {
        let names = checkpoint.arch().moe.as_ref().map_or_else(Vec::new, |moe| moe.router_vectors());
        let vector = |name: &str| {
            let there = names.contains(&name).then(|| checkpoint.router_vector(layer, name)).transpose()?;
            Ok::<_, ModelError>(there.map(|tensor| values(checkpoint, &tensor)))
        };
        Ok(Self {
            matrix: Matrix::load(checkpoint, &checkpoint.router(layer)?)?,
            bias: vector("bias")?,
            correction: vector("e_score_correction_bias")?,
        })
    }
}

/// Where the parts of an expert, or of a rank's rows of it, lie in its slot, and how its matrices are typed: the three
/// matrices packed, then their biases as `f32`.
#[derive(Clone, Debug)]
pub(crate) struct ExpertLayout {
    /// As published, of each part.
    pub(crate) storages: Vec<Storage>,
    /// Inputs of gate and up; of down.
    pub(crate) hidden: usize,
    pub(crate) width: usize,
    /// Which rows of gate and up, and of down.
    wide: Range<usize>,
    deep: Range<usize>,
    /// Where each ends.
    matrices: [usize; 3],
}

impl ExpertLayout {
    /// `None` where a size cannot be said.
    pub(crate) fn new(storages: &[Storage], arch: &Arch) -> Option<Self> {
        let (width, hidden) = (arch.moe.as_ref()?.intermediate, arch.hidden);
        Self::of_rows(storages.into(), [hidden, width], [0..width, 0..hidden])
    }

    fn of_rows(
        storages: Vec<Storage>,
        [hidden, width]: [usize; 2],
        [wide, deep]: [Range<usize>; 2],
    ) -> Option<Self> {
        let gate = packed_len(storages[0], wide.len(), hidden)?;
        let up = gate.checked_add(packed_len(storages[1], wide.len(), hidden)?)?;
        let down = up.checked_add(packed_len(storages[2], deep.len(), width)?)?;
        let layout = Self { storages, hidden, width, wide, deep, matrices: [gate, up, down] };
        down.checked_add(layout.bias_bytes()).map(|_| layout)
    }

    /// The same of the rows of a tensor rank.
    pub(crate) fn of_rank(&self, share: &Share, tensor: u32) -> Self {
        let rows = [self.width, self.hidden].map(|rows| share.rows_of(tensor, rows));
        Self::of_rows(self.storages.clone(), [self.hidden, self.width], rows)
            .expect("the whole can be counted")
    }

    /// Cuts a rank's rows out of a whole expert: rows of whole tiles lie together.
    pub(crate) fn cut(&self, whole: &Self, expert: &[u8], slot: &mut [u8]) {
        let rows = [&self.wide, &self.wide, &self.deep];
        let inputs = [self.hidden, self.hidden, self.width];
        let (mut from, mut to) = (0, 0);
        for i in 0..3 {
            let before = packed_len(self.storages[i], rows[i].start, inputs[i]).expect("less than the whole");
            let part = self.matrices[i] - to;
            slot[to..to + part].copy_from_slice(&expert[from + before..][..part]);
            (from, to) = (whole.matrices[i], self.matrices[i]);
        }
        if self.storages.len() > 3 {
            for (rows, all) in rows.into_iter().zip([self.width, self.width, self.hidden]) {
                slot[to..to + 4 * rows.len()]
                    .copy_from_slice(&expert[from + 4 * rows.start..][..4 * rows.len()]);
                (from, to) = (from + 4 * all, to + 4 * rows.len());
            }
        }
    }

    /// Bytes of gate, up or down.
    pub(crate) fn matrix_bytes(&self, matrix: usize) -> usize {
        self.matrices[matrix] - matrix.checked_sub(1).map_or(0, |before| self.matrices[before])
    }

    fn bias_bytes(&self) -> usize {
        if self.storages.len() > 3 { 4 * (2 * self.wide.len() + self.deep.len()) } else { 0 }
    }

    /// Where all of it lies, for other devices.
    pub(crate) fn part(&self) -> ExpertPart {
        let [gate, up, down] = self.matrices;
        let wide = 4 * self.wide.len();
        let biases = (self.storages.len() > 3).then_some([down, down + wide, down + 2 * wide]);
        let storages = [self.storages[0], self.storages[1], self.storages[2]];
        let outputs = [self.wide.len(), self.wide.len(), self.deep.len()];
        ExpertPart { outputs, storages, matrices: [0, gate, up], biases }
    }

    /// Bytes of an expert.
    pub(crate) fn bytes(&self) -> usize {
        self.matrices[2] + self.bias_bytes()
    }

    /// The expert in a slot.
    pub(crate) fn views<'a>(&self, slot: &'a [u8]) -> GatedViews<'a> {
        let [gate, up, down] = self.matrices;
        let view = |i: usize, outputs, inputs, start: usize, end: usize| {
            PackedView::new(self.storages[i], outputs, inputs, &slot[start..end])
                .expect("a slot of this layout")
        };
        let biases = (self.storages.len() > 3).then(|| {
            let bytes = &slot[down..self.bytes()];
            // In place where the slot is aligned, as those of an arena are.
            let there = bytemuck::try_cast_slice(bytes).map(Cow::Borrowed);
            there.unwrap_or_else(|_| Cow::Owned(bytemuck::pod_collect_to_vec(bytes)))
        });
        GatedViews {
            matrices: [
                view(0, self.wide.len(), self.hidden, 0, gate),
                view(1, self.wide.len(), self.hidden, gate, up),
                view(2, self.deep.len(), self.width, up, down),
            ],
            biases,
        }
    }
}

/// Packs the parts of an expert one after the other.
pub(crate) fn pack_expert(checkpoint: &Checkpoint, gated: &Gated, layout: &ExpertLayout, slot: &mut [u8]) {
    let mut start = 0;
    for (tensor, end) in [&gated.gate, &gated.up, &gated.down].into_iter().zip(layout.matrices) {
        checkpoint.pack(tensor, &mut slot[start..end]);
        checkpoint.forget(tensor);
        start = end;
    }
    pack_biases(checkpoint, gated, &mut slot[start..]);
}

/// The biases of an expert, if it has any, one after the other.
pub(crate) fn pack_biases(checkpoint: &Checkpoint, gated: &Gated, mut rest: &mut [u8]) {
    for tensor in gated.biases.iter().flatten() {
        let values = values(checkpoint, tensor);
        let into = rest.split_off_mut(..4 * values.len()).expect("room for every part");
        convert::narrow(DType::F32, &values, into);
    }
}

/// The one layout that all experts of a checkpoint have.
pub(crate) fn expert_layout(checkpoint: &Checkpoint) -> Result<Option<ExpertLayout>, ModelError> {
    let arch = checkpoint.arch();
    let Some(moe) = &arch.moe else { return Ok(None) };
    let layout = |storages: &[Storage]| {
        let too_large = ModelError::Memory { what: "an expert", bytes: u64::MAX };
        ExpertLayout::new(storages, arch).ok_or(too_large).map(Some)
    };
    if let Some(native) = checkpoint.native() {
        return layout(native.expert_storages());
    }
    let mut first: Option<Vec<Storage>> = None;
    for layer in arch.moe_layers() {
        for ordinal in 0..moe.experts {
            let gated = checkpoint.expert(layer as usize, ordinal)?;
            let storages: Vec<Storage> = gated.parts().map(Tensor::storage).collect();
            debug_assert_eq!(storages.len(), expert_parts(moe, arch.hidden).len());
            match &first {
                None => first = Some(storages),
                Some(first) if *first != storages => {
                    return Err(ModelError::MixedTypes(checkpoint.key(layer, ordinal as u32)));
                }
                Some(_) => {}
            }
        }
    }
    first.map_or(Ok(None), |storages| layout(&storages))
}

/// Loads the base parameters of a rank, routers apart.
pub(crate) fn load_base(checkpoint: &Checkpoint, share: &Share) -> Result<Base, ModelError> {
    let arch = checkpoint.arch();
    let embedding = checkpoint.embedding()?;
    let mut head = None;
    if share.is_last_stage() {
        let tensor = if arch.tied {
            embedding.clone()
        } else {
            checkpoint.tensor("lm_head.weight", &[arch.vocab, arch.hidden])?
        };
        let bias = arch.head_bias.then(|| vector(checkpoint, "lm_head.bias", arch.vocab)).transpose()?;
        let rows = share.rows(arch.vocab);
        let bias = bias.map(|bias| bias[rows.clone()].to_vec());
        head = Some(Projection { matrix: Matrix::load_rows(checkpoint, &tensor, rows)?, bias });
    }
    let layers =
        share.layers(arch).map(|layer| load_layer(checkpoint, share, layer)).collect::<Result<_, _>>()?;
    Ok(Base { norm: norm(checkpoint, "model.norm")?, head, embedding, layers })
}

fn load_layer(checkpoint: &Checkpoint, share: &Share, layer: usize) -> Result<LayerWeights, ModelError> {
    let arch = checkpoint.arch();
    let prefix = format!("model.layers.{layer}");
    let (tensor, attention) = (share.seat().tensor, &arch.attention);
    let heads = share.heads_of(tensor, attention);
    let of_heads = |width: usize| heads.start * width..heads.end * width;
    let kv_heads = share.kv_heads_of(tensor, attention);
    let of_kv_heads = |width: usize| kv_heads.start * width..kv_heads.end * width;
    let projection = |(name, outputs, inputs, bias): (&str, usize, usize, bool), rows: Range<usize>| {
        let name = format!("{prefix}.self_attn.{name}");
        let bias = bias.then(|| vector(checkpoint, &format!("{name}.bias"), outputs)).transpose()?;
        let bias = bias.map(|bias| bias[rows.clone()].to_vec());
        let tensor = checkpoint.tensor(&format!("{name}.weight"), &[outputs, inputs])?;
        Ok::<_, ModelError>(Projection { matrix: Matrix::load_rows(checkpoint, &tensor, rows)?, bias })
    };
    let of_attention =
        |name: &str, size: usize| vector(checkpoint, &format!("{prefix}.self_attn.{name}"), size);
    let [q, k, v, o] = projections(arch);
    let inputs = if let Some(latent) = arch.attention.latent {
        Inputs::Latent(load_latent(checkpoint, &prefix, latent, heads.clone(), projection)?)
    } else {
        let qk_norm = match qk_norm_sizes(arch) {
            Some((q, k)) => Some((of_attention("q_norm.weight", q)?, of_attention("k_norm.weight", k)?)),
            None => None,
        };
        let (key, value) = (attention.head_dim, attention.value_dim);
        let (q, k) = (projection(q, of_heads(key))?, projection(k, of_kv_heads(key))?);
        Inputs::Plain { projections: [q, k, projection(v, of_kv_heads(value))?], qk_norm }
    };
    let dense = match arch.layers[layer].dense {
        Some(width) => {
            Some(GatedBlock::load(checkpoint, &checkpoint.gated(&format!("{prefix}.mlp"), width)?, share)?)
        }
        None => None,
    };
    let mut shared = None;
    if let Some(block) = arch.moe.as_ref().and_then(|moe| moe.shared.as_ref()).filter(|_| dense.is_none()) {
        let name = format!("{prefix}.{}", block.name);
        let gated = checkpoint.gated(&name, block.intermediate)?;
        let gate = if block.gated {
            let gate = checkpoint.tensor(&format!("{name}_gate.weight"), &[1, arch.hidden])?;
            Some(Matrix::load(checkpoint, &gate)?)
        } else {
            None
        };
        shared = Some((GatedBlock::load(checkpoint, &gated, share)?, gate));
    }
    let sinks = attention.sinks.then(|| of_attention("sinks", attention.heads)).transpose()?;
    Ok(LayerWeights {
        attention_norm: norm(checkpoint, &format!("{prefix}.input_layernorm"))?,
        block_norm: norm(checkpoint, &format!("{prefix}.post_attention_layernorm"))?,
        inputs,
        output: projection(o, share.rows(arch.hidden))?,
        sinks: sinks.map(|sinks| sinks[heads].to_vec()),
        dense,
        shared,
    })
}

fn load_latent(
    checkpoint: &Checkpoint,
    prefix: &str,
    latent: Latent,
    own: Range<usize>,
    projection: impl Fn((&str, usize, usize, bool), Range<usize>) -> Result<Projection, ModelError>,
) -> Result<LatentWeights, ModelError> {
    let attention = &checkpoint.arch().attention;
    let of_heads = own.start * attention.head_dim..own.end * attention.head_dim;
    let mut list = latent_projections(checkpoint.arch(), latent).into_iter();
    let mut next = || list.next().expect("as many projections as are taken here");
    let of_attention =
        |name: &str, size: usize| vector(checkpoint, &format!("{prefix}.self_attn.{name}"), size);
    // What all heads share is computed by every rank.
    let of_first = latent.query_rank.map_or(of_heads.clone(), |rank| 0..rank);
    let query = projection(next(), of_first)?;
    let query_norm = match latent.query_rank {
        Some(rank) => Some((of_attention("q_a_layernorm.weight", rank)?, projection(next(), of_heads)?)),
        None => None,
    };
    let (name, outputs, inputs, bias) = next();
    let of_latent = projection((name, outputs, inputs, bias), 0..outputs)?;
    let (name, outputs, inputs, _) = next();
    let tensor = checkpoint.tensor(&format!("{prefix}.self_attn.{name}.weight"), &[outputs, inputs])?;
    let (plain, values, rank) = (latent.plain, attention.value_dim, latent.rank);
    let bytes = checkpoint.row_major(&tensor);
    let row = rank * tensor.dtype.bytes();
    let heads = bytes.chunks_exact((plain + values) * row).skip(own.start).take(own.len()).map(|head| {
        let (keys, of_values) = head.split_at(plain * row);
        let transposed = transpose(keys, plain, rank, tensor.dtype.bytes());
        let query = Matrix::pack(tensor.dtype, rank, plain, &transposed)?;
        Ok((query, Matrix::pack(tensor.dtype, values, rank, of_values)?))
    });
    let heads = heads.collect::<Result<_, ModelError>>()?;
    checkpoint.forget(&tensor);
    let latent_norm = of_attention("kv_a_layernorm.weight", rank)?;
    Ok(LatentWeights { query, query_norm, latent: of_latent, latent_norm, heads })
}

fn transpose(bytes: &[u8], rows: usize, columns: usize, size: usize) -> Vec<u8> {
    let mut transposed = Vec::with_capacity(bytes.len());
    for column in 0..columns {
        for row in 0..rows {
            transposed.extend_from_slice(&bytes[(row * columns + column) * size..][..size]);
        }
    }
    transposed
}

fn norm(checkpoint: &Checkpoint, name: &str) -> Result<NormWeights, ModelError> {
    let arch = checkpoint.arch();
    let bias = (arch.norm == Norm::Layer)
        .then(|| vector(checkpoint, &format!("{name}.bias"), arch.hidden))
        .transpose()?;
    Ok(NormWeights { weight: vector(checkpoint, &format!("{name}.weight"), arch.hidden)?, bias })
}

fn vector(checkpoint: &Checkpoint, name: &str, size: usize) -> Result<Vec<f32>, ModelError> {
    Ok(values(checkpoint, &checkpoint.tensor(name, &[size])?))
}

fn values(checkpoint: &Checkpoint, tensor: &Tensor) -> Vec<f32> {
    let mut values = vec![0.0; tensor.shape.iter().product()];
    convert::widen(Isa::Scalar, tensor.dtype, &checkpoint.row_major(tensor), &mut values);
    values
}
