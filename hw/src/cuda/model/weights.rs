//! The base parameters of a model in the memory of a device, as they lie packed on the CPU: only addresses are new.

use super::super::CudaError;
use super::super::gpu::Gpu;
use super::super::memory::{ALIGN, Memory};
use lite_llm_model::Model;
use lite_llm_model::kernels::{PackedView, Storage};
use lite_llm_model::parts::{InputsPart, LinearPart, NormPart};
use std::sync::Arc;

/// A matrix where it lies. An address of 0 is nothing.
#[derive(Clone, Copy, Debug)]
pub(super) struct Matrix {
    pub(super) storage: Storage,
    pub(super) outputs: u32,
    pub(super) inputs: u32,
    pub(super) weights: u64,
    pub(super) bias: u64,
}

/// The norm of a row; the address of its bias is 0 where it has none.
#[derive(Clone, Copy, Debug)]
pub(super) struct Norm {
    pub(super) weight: u64,
    pub(super) bias: u64,
}

/// What makes queries, keys and values.
#[derive(Debug)]
pub(super) enum Inputs {
    Plain {
        projections: [Matrix; 3],
        /// Where the norms of queries and keys are, and how wide they are.
        qk_norm: Option<[(u64, u32); 2]>,
    },
    Latent(Latent),
}

#[derive(Debug)]
pub(super) struct Latent {
    pub(super) query: Matrix,
    pub(super) query_norm: Option<(u64, Matrix)>,
    pub(super) latent: Matrix,
    pub(super) latent_norm: u64,
    /// The first head's, and lists of where each head's begins, counted from it: a number of 64 bits each.
    pub(super) through: [(Matrix, u64); 2],
}

#[derive(Debug)]
pub(super) struct Layer {
    pub(super) attention_norm: Norm,
    pub(super) block_norm: Norm,
    pub(super) inputs: Inputs,
    pub(super) output: Matrix,
    pub(super) sinks: u64,
    pub(super) dense: Option<[Matrix; 3]>,
    pub(super) shared: Option<([Matrix; 3], Option<Matrix>)>,
}

/// A router.
#[derive(Clone, Copy, Debug)]
pub(super) struct Router {
    pub(super) scores: Matrix,
    pub(super) correction: u64,
}

/// All base parameters of the share but routers.
#[derive(Debug)]
pub(super) struct Base {
    _memory: Memory,
    /// The embedding; only the first stage has it.
    pub(super) table: Option<(Storage, u64)>,
    /// The layers of the stage.
    pub(super) layers: Vec<Layer>,
    pub(super) norm: Norm,
    /// Only the last stage has it.
    pub(super) head: Option<Matrix>,
    /// Cosines and sines.
    pub(super) rope: [u64; 2],
}

/// The routers, layer by layer.
#[derive(Debug)]
pub(super) struct Routers {
    _memory: Memory,
    pub(super) of_layer: Vec<Option<Router>>,
}

/// Puts one thing after the other: the first time to see how much it is, the second time into memory.
struct Places<'a> {
    memory: Option<&'a Memory>,
    used: u64,
}

impl Places<'_> {
    fn put(&mut self, bytes: &[u8]) -> Result<u64, CudaError> {
        let offset = self.used;
        self.used = (offset + bytes.len() as u64).next_multiple_of(ALIGN);
        let Some(memory) = self.memory else { return Ok(0) };
        memory.fill(offset, bytes)?;
        Ok(memory.at() + offset)
    }

    fn values(&mut self, values: &[f32]) -> Result<u64, CudaError> {
        self.put(bytemuck::cast_slice(values))
    }

    /// The address of what may be nothing.
    fn values_if(&mut self, values: Option<&[f32]>) -> Result<u64, CudaError> {
        values.map_or(Ok(0), |values| self.values(values))
    }

    fn view(&mut self, view: &PackedView<'_>) -> Result<Matrix, CudaError> {
        self.matrix(&LinearPart { weights: *view, bias: None })
    }

    fn matrix(&mut self, part: &LinearPart<'_>) -> Result<Matrix, CudaError> {
        Ok(Matrix {
            storage: part.weights.storage(),
            outputs: part.weights.outputs() as u32,
            inputs: part.weights.inputs() as u32,
            weights: self.put(part.weights.bytes())?,
            bias: self.values_if(part.bias)?,
        })
    }

    fn gated(&mut self, views: &[PackedView<'_>; 3]) -> Result<[Matrix; 3], CudaError> {
        Ok([self.view(&views[0])?, self.view(&views[1])?, self.view(&views[2])?])
    }

    fn norm(&mut self, part: &NormPart<'_>) -> Result<Norm, CudaError> {
        Ok(Norm { weight: self.values(part.weight)?, bias: self.values_if(part.bias)? })
    }

    fn inputs(&mut self, part: &InputsPart<'_>) -> Result<Inputs, CudaError> {
        Ok(match part {
            InputsPart::Plain { projections: [q, k, v], qk_norm } => {
                let projections = [self.matrix(q)?, self.matrix(k)?, self.matrix(v)?];
                let qk_norm = match qk_norm {
                    None => None,
                    Some([q, k]) => {
                        Some([(self.values(q)?, q.len() as u32), (self.values(k)?, k.len() as u32)])
                    }
                };
                Inputs::Plain { projections, qk_norm }
            }
            InputsPart::Latent { query, query_norm, latent, latent_norm, heads } => Inputs::Latent(Latent {
                query: self.matrix(query)?,
                query_norm: match query_norm {
                    None => None,
                    Some((norm, second)) => Some((self.values(norm)?, self.matrix(second)?)),
                },
                latent: self.matrix(latent)?,
                latent_norm: self.values(latent_norm)?,
                through: [self.by_head(heads, 0)?, self.by_head(heads, 1)?],
            }),
        })
    }

    fn by_head(&mut self, heads: &[[PackedView<'_>; 2]], which: usize) -> Result<(Matrix, u64), CudaError> {
        let of_heads = heads.iter().map(|head| self.view(&head[which])).collect::<Result<Vec<_>, _>>()?;
        let first = of_heads[0];
        let from: Vec<u64> = of_heads.iter().map(|head| head.weights - first.weights).collect();
        Ok((first, self.put(bytemuck::cast_slice(&from))?))
    }

    fn layer(&mut self, model: &Model, layer: usize) -> Result<Layer, CudaError> {
        let part = model.layer_part(layer);
        Ok(Layer {
            attention_norm: self.norm(&part.attention_norm)?,
            block_norm: self.norm(&part.block_norm)?,
            inputs: self.inputs(&part.inputs)?,
            output: self.matrix(&part.output)?,
            sinks: self.values_if(part.sinks)?,
            dense: match &part.dense {
                None => None,
                Some(views) => Some(self.gated(views)?),
            },
            shared: match &part.shared {
                None => None,
                Some((views, gate)) => {
                    let gate = gate.as_ref().map(|gate| self.view(gate)).transpose()?;
                    Some((self.gated(views)?, gate))
                }
            },
        })
    }
}

impl Base {
    /// Copies base parameters that are loaded into memory of the device.
    ///
    /// # Errors
    /// If the device does not have so much, or is lost.
    pub(super) fn load(gpu: &Arc<Gpu>, model: &Model) -> Result<Self, CudaError> {
        let all = |places: &mut Places<'_>| {
            let (share, table) = (model.share(), model.embedding_part());
            let (norm, head) = model.head_part();
            let [cosines, sines] = model.rope_table().tables();
            let layers = share.layers(model.arch());
            let table =
                if share.is_first_stage() { Some((table.storage, places.put(table.bytes)?)) } else { None };
            Ok::<_, CudaError>((
                table,
                layers.map(|layer| places.layer(model, layer)).collect::<Result<Vec<_>, _>>()?,
                places.norm(&norm)?,
                head.as_ref().map(|head| places.matrix(head)).transpose()?,
                [places.values(cosines)?, places.values(sines)?],
            ))
        };
        let mut seen = Places { memory: None, used: 0 };
        all(&mut seen)?;
        let memory = Memory::new(gpu, "base parameters", seen.used)?;
        let (table, layers, norm, head, rope) = all(&mut Places { memory: Some(&memory), used: 0 })?;
        Ok(Self { _memory: memory, table, layers, norm, head, rope })
    }
}

impl Routers {
    /// How many mixture layers come before this one.
    pub(super) fn mixtures_before(&self, layer: usize) -> usize {
        self.of_layer[..layer].iter().flatten().count()
    }

    /// Copies routers that are loaded into memory of the device.
    ///
    /// # Errors
    /// If the device does not have so much, or is lost.
    pub(super) fn load(gpu: &Arc<Gpu>, model: &Model) -> Result<Self, CudaError> {
        let all = |places: &mut Places<'_>| {
            let layers = 0..model.arch().layers.len();
            let of_layer = layers.map(|layer| {
                let Some(part) = model.router_part(layer) else { return Ok(None) };
                let scores = places.matrix(&part.scores)?;
                Ok(Some(Router { scores, correction: places.values_if(part.correction)? }))
            });
            of_layer.collect::<Result<Vec<_>, CudaError>>()
        };
        let mut seen = Places { memory: None, used: 0 };
        all(&mut seen)?;
        let memory = Memory::new(gpu, "routers", seen.used)?;
        let of_layer = all(&mut Places { memory: Some(&memory), used: 0 })?;
        Ok(Self { _memory: memory, of_layer })
    }
}
