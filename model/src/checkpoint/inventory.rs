//! The one canonical list of the tensors that are used: the same for every layout of the same weights.

use super::tensors::Tensor;
use super::{Checkpoint, CheckpointError};
use crate::arch::{Arch, ExpertForm, Latent, Moe, Norm, QkNorm};
use crate::kernels::{DType, Quantised};
use lite_llm_core::digest::Digest;

/// A tensor that is used.
#[derive(Clone, Debug)]
pub(crate) struct Item {
    /// By which the weights digest lists it.
    pub(crate) name: String,
    /// By which it is looked up; nothing for a part of an expert.
    pub(crate) published: Option<String>,
    pub(crate) dtype: DType,
    /// The integers that it is stored as, if it is.
    pub(crate) grouped: Option<Quantised>,
    pub(crate) shape: Vec<usize>,
    /// Of its row-major form.
    pub(crate) bytes: u64,
    /// Where its values are, if they are in a mapped file.
    pub(crate) tensor: Option<Tensor>,
    /// BLAKE3 of its row-major bytes, if somebody has hashed them.
    pub(super) hash: Option<[u8; 32]>,
}

/// The matrices of a gated block and, if it has them, their biases.
#[derive(Clone, Debug)]
pub struct Gated {
    /// `[intermediate, hidden]`.
    pub gate: Tensor,
    /// `[intermediate, hidden]`.
    pub up: Tensor,
    /// `[hidden, intermediate]`.
    pub down: Tensor,
    /// Of gate, up and down.
    pub biases: Option<[Tensor; 3]>,
}

impl Gated {
    /// Its parts in the order of [`expert_parts`].
    pub(crate) fn parts(&self) -> impl Iterator<Item = &Tensor> {
        [&self.gate, &self.up, &self.down].into_iter().chain(self.biases.iter().flatten())
    }
}

/// A part of an expert: its canonical name and its shape.
#[derive(Clone, Debug)]
pub(crate) struct ExpertPart {
    pub(crate) name: &'static str,
    pub(crate) shape: Vec<usize>,
}

/// The parts of every expert: three matrices, then their biases if they have any.
pub(crate) fn expert_parts(moe: &Moe, hidden: usize) -> Vec<ExpertPart> {
    let width = moe.intermediate;
    let part = |name, shape: &[usize]| ExpertPart { name, shape: shape.into() };
    let mut parts =
        vec![part("gate", &[width, hidden]), part("up", &[width, hidden]), part("down", &[hidden, width])];
    if moe.expert_bias {
        parts.extend([part("gate_bias", &[width]), part("up_bias", &[width]), part("down_bias", &[hidden])]);
    }
    parts
}

/// The projections of plain attention: name, outputs, inputs, whether there is a bias.
pub(crate) fn projections(arch: &Arch) -> [(&'static str, usize, usize, bool); 4] {
    let (attention, hidden) = (&arch.attention, arch.hidden);
    [
        ("q_proj", attention.q_dim(), hidden, attention.qkv_bias),
        ("k_proj", attention.k_dim(), hidden, attention.qkv_bias),
        ("v_proj", attention.v_dim(), hidden, attention.qkv_bias),
        ("o_proj", hidden, attention.mixed_dim(), attention.o_bias),
    ]
}

/// The same of latent attention: queries in one product or two, the latent with the rotated key, what keys and values
/// are made with, the output.
pub(crate) fn latent_projections(arch: &Arch, latent: Latent) -> Vec<(&'static str, usize, usize, bool)> {
    let (attention, hidden) = (&arch.attention, arch.hidden);
    let rotated = attention.head_dim - latent.plain;
    let mut list = match latent.query_rank {
        None => vec![("q_proj", attention.q_dim(), hidden, false)],
        Some(rank) => {
            vec![("q_a_proj", rank, hidden, attention.qkv_bias), ("q_b_proj", attention.q_dim(), rank, false)]
        }
    };
    list.extend([
        ("kv_a_proj_with_mqa", latent.rank + rotated, hidden, attention.qkv_bias),
        ("kv_b_proj", attention.heads * (latent.plain + attention.value_dim), latent.rank, false),
        ("o_proj", hidden, attention.mixed_dim(), attention.o_bias),
    ]);
    list
}

/// Sizes of the norms of queries and keys.
pub(crate) fn qk_norm_sizes(arch: &Arch) -> Option<(usize, usize)> {
    let attention = &arch.attention;
    match attention.qk_norm {
        QkNorm::None => None,
        QkNorm::PerHead => Some((attention.head_dim, attention.head_dim)),
        QkNorm::Whole => Some((attention.q_dim(), attention.k_dim())),
    }
}

impl Checkpoint {
    /// An expert of a mixture layer, in whichever form it is published.
    pub fn expert(&self, layer: usize, expert: usize) -> Result<Gated, CheckpointError> {
        let moe = self.arch.moe.as_ref().expect("only a mixture has experts");
        let prefix = format!("model.layers.{layer}");
        let there = moe.forms.iter().find(|form| self.has_form(&prefix, form));
        // Where nothing is there, the first form says what is missing.
        let form = there.or(moe.forms.first()).expect("a family states how its experts are published");
        self.expert_of(form, moe, &prefix, expert)
    }

    fn has_form(&self, prefix: &str, form: &ExpertForm) -> bool {
        let there = |name: String| self.files.find(&name).is_some();
        match form {
            ExpertForm::Apart { block, names } => there(format!("{prefix}.{block}.0.{}.weight", names[0])),
            ExpertForm::Fused { gate_up, .. } => there(format!("{prefix}.{gate_up}")),
            ExpertForm::Columns { gate_up, .. } => {
                let name = format!("{prefix}.{gate_up}");
                self.files.mxfp4(&name, 0, 0, 2).is_some() || there(name)
            }
        }
    }

    fn expert_of(
        &self,
        form: &ExpertForm,
        moe: &Moe,
        prefix: &str,
        expert: usize,
    ) -> Result<Gated, CheckpointError> {
        let (experts, width, hidden) = (moe.experts, moe.intermediate, self.arch.hidden);
        match *form {
            ExpertForm::Apart { block, names } => {
                let name = |part: &str| format!("{prefix}.{block}.{expert}.{part}.weight");
                let [gate, up, down] = names.map(name);
                Ok(Gated {
                    gate: self.tensor(&gate, &[width, hidden])?,
                    up: self.tensor(&up, &[width, hidden])?,
                    down: self.tensor(&down, &[hidden, width])?,
                    biases: None,
                })
            }
            ExpertForm::Fused { gate_up, down } => {
                let gate_up = self.tensor(&format!("{prefix}.{gate_up}"), &[experts, 2 * width, hidden])?;
                let down = self.tensor(&format!("{prefix}.{down}"), &[experts, hidden, width])?;
                self.refuse_encoded(&[&gate_up, &down])?;
                Ok(Gated {
                    gate: gate_up.part(2 * expert, 2 * experts, vec![width, hidden]),
                    up: gate_up.part(2 * expert + 1, 2 * experts, vec![width, hidden]),
                    down: down.part(expert, experts, vec![hidden, width]),
                    biases: None,
                })
            }
            ExpertForm::Columns { gate_up, down } => self.expert_of_columns(
                &format!("{prefix}.{gate_up}"),
                &format!("{prefix}.{down}"),
                moe,
                expert,
            ),
        }
    }

    fn expert_of_columns(
        &self,
        gate_up: &str,
        down: &str,
        moe: &Moe,
        expert: usize,
    ) -> Result<Gated, CheckpointError> {
        let (experts, width, hidden) = (moe.experts, moe.intermediate, self.arch.hidden);
        let bias = |name: &str, size: usize| {
            let all = self.tensor(&format!("{name}_bias"), &[experts, size])?;
            self.refuse_encoded(&[&all])?;
            Ok::<_, CheckpointError>(all.part(expert, experts, vec![size]))
        };
        let (gate_up_bias, down_bias) = (bias(gate_up, 2 * width)?, bias(down, hidden)?);
        let every_other = |first| gate_up_bias.strided(first, 2, 1, vec![width]);
        let biases = Some([every_other(0), every_other(1), down_bias]);
        if let Some(gate) = self.files.mxfp4(gate_up, expert, 0, 2) {
            let up = self.files.mxfp4(gate_up, expert, 1, 2);
            let parts = (up, self.files.mxfp4(down, expert, 0, 1));
            if let (Some(up), Some(down)) = parts
                && (&gate.shape[..], &down.shape[..]) == (&[width, hidden][..], &[hidden, width][..])
            {
                return Ok(Gated { gate, up, down, biases });
            }
            let what = format!(
                "the blocks of {gate_up} and {down} are not those of {experts} experts of {width} x {hidden}, or \
                 without scales"
            );
            return Err(CheckpointError::invalid(self.files.path(), &what));
        }
        let gate_up = self.tensor(gate_up, &[experts, hidden, 2 * width])?;
        let down = self.tensor(down, &[experts, width, hidden])?;
        self.refuse_encoded(&[&gate_up, &down])?;
        let gate_up = gate_up.part(expert, experts, vec![hidden, 2 * width]);
        let down = down.part(expert, experts, vec![width, hidden]);
        Ok(Gated {
            gate: gate_up.strided(0, 2, 2 * width, vec![width, hidden]),
            up: gate_up.strided(1, 2, 2 * width, vec![width, hidden]),
            down: down.strided(0, 1, hidden, vec![hidden, width]),
            biases,
        })
    }

    /// What is cut into parts has to be in its file as it is.
    fn refuse_encoded(&self, tensors: &[&Tensor]) -> Result<(), CheckpointError> {
        if tensors.iter().all(|tensor| tensor.is_plain()) {
            return Ok(());
        }
        let what = "E4M3 is read in matrices of their own only, not in tensors of several experts";
        Err(CheckpointError::invalid(self.files.path(), what))
    }

    /// A gated block that is no expert.
    pub fn gated(&self, prefix: &str, width: usize) -> Result<Gated, CheckpointError> {
        let hidden = self.arch.hidden;
        Ok(Gated {
            gate: self.tensor(&format!("{prefix}.gate_proj.weight"), &[width, hidden])?,
            up: self.tensor(&format!("{prefix}.up_proj.weight"), &[width, hidden])?,
            down: self.tensor(&format!("{prefix}.down_proj.weight"), &[hidden, width])?,
            biases: None,
        })
    }

    /// What the router of a layer is called.
    fn router_name(&self, layer: usize) -> String {
        let moe = self.arch.moe.as_ref().expect("only a mixture has routers");
        let name = |router: &&str| format!("model.layers.{layer}.{router}");
        let there =
            moe.routers.iter().map(name).find(|name| self.files.find(&format!("{name}.weight")).is_some());
        there.or(moe.routers.first().map(name)).expect("a family states what its routers are called")
    }

    /// The router of a layer.
    pub fn router(&self, layer: usize) -> Result<Tensor, CheckpointError> {
        let rows = self.arch.moe.as_ref().map_or(0, Moe::router_rows);
        self.tensor(&format!("{}.weight", self.router_name(layer)), &[rows, self.arch.hidden])
    }

    /// A vector of the router of a layer: its `bias`, or another by name.
    pub fn router_vector(&self, layer: usize, name: &str) -> Result<Tensor, CheckpointError> {
        let rows = self.arch.moe.as_ref().map_or(0, Moe::router_rows);
        self.tensor(&format!("{}.{name}", self.router_name(layer)), &[rows])
    }

    /// Every tensor that is used, by its canonical name.
    pub(crate) fn inventory(&self) -> Result<Vec<Item>, CheckpointError> {
        let mut list = Vec::new();
        self.list_base(&mut list)?;
        self.list_experts(&mut list)?;
        list.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(list)
    }

    /// A tensor that nobody asks for would be left out of the computation without a word.
    pub(super) fn refuse_unknown(&self, list: &[Item]) -> Result<(), CheckpointError> {
        let unused = self.files.unused(list.iter().filter_map(|item| item.tensor.as_ref()));
        match unused.into_iter().find(|name| !self.may_be_left(name)) {
            None => Ok(()),
            Some(name) => {
                let what = format!(
                    "tensor {name} is not one of a {} with this configuration: ignoring it would change the output; \
                     correct config.json, or remove the tensor",
                    self.arch.family
                );
                Err(CheckpointError::invalid(self.files.path(), &what))
            }
        }
    }

    /// Tensors that change no output: tables that are computed, a copy of a tied embedding, layers after the last one
    /// that predict further tokens.
    fn may_be_left(&self, name: &str) -> bool {
        let layer = name.strip_prefix("model.layers.").and_then(|rest| rest.split('.').next());
        let beyond = layer.and_then(|n| n.parse::<usize>().ok()).is_some_and(|n| n >= self.arch.layers.len());
        name.ends_with("rotary_emb.inv_freq") || (self.arch.tied && name == "lm_head.weight") || beyond
    }

    fn item(&self, name: String, published: Option<String>, tensor: Tensor) -> Item {
        let hash = self.native.as_ref().and_then(|native| native.hash(&name));
        let bytes = tensor.bytes_len() as u64;
        let (dtype, shape) = (tensor.dtype, tensor.shape.clone());
        let grouped = tensor.storage().grouped();
        Item { name, published, dtype, grouped, shape, bytes, tensor: Some(tensor), hash }
    }

    fn list_base(&self, list: &mut Vec<Item>) -> Result<(), CheckpointError> {
        let arch = &self.arch;
        let mut add = |name: String, shape: &[usize]| -> Result<(), CheckpointError> {
            let tensor = self.tensor(&name, shape)?;
            list.push(self.item(name.clone(), Some(name), tensor));
            Ok(())
        };
        add("model.embed_tokens.weight".into(), &[arch.vocab, arch.hidden])?;
        if !arch.tied {
            add("lm_head.weight".into(), &[arch.vocab, arch.hidden])?;
        }
        if arch.head_bias {
            add("lm_head.bias".into(), &[arch.vocab])?;
        }
        let mut norms = vec!["model.norm".to_owned()];
        for i in 0..arch.layers.len() {
            let prefix = format!("model.layers.{i}");
            norms.extend(
                ["input_layernorm", "post_attention_layernorm"].map(|norm| format!("{prefix}.{norm}")),
            );
            let plain = || projections(arch).to_vec();
            let attention = &arch.attention;
            for (name, outputs, inputs, bias) in
                attention.latent.map_or_else(plain, |latent| latent_projections(arch, latent))
            {
                add(format!("{prefix}.self_attn.{name}.weight"), &[outputs, inputs])?;
                if bias {
                    add(format!("{prefix}.self_attn.{name}.bias"), &[outputs])?;
                }
            }
            if let Some(latent) = attention.latent {
                add(format!("{prefix}.self_attn.kv_a_layernorm.weight"), &[latent.rank])?;
                if let Some(rank) = latent.query_rank {
                    add(format!("{prefix}.self_attn.q_a_layernorm.weight"), &[rank])?;
                }
            }
            if let Some((q, k)) = qk_norm_sizes(arch) {
                add(format!("{prefix}.self_attn.q_norm.weight"), &[q])?;
                add(format!("{prefix}.self_attn.k_norm.weight"), &[k])?;
            }
            if attention.sinks {
                add(format!("{prefix}.self_attn.sinks"), &[attention.heads])?;
            }
        }
        for norm in norms {
            add(format!("{norm}.weight"), &[arch.hidden])?;
            if arch.norm == Norm::Layer {
                add(format!("{norm}.bias"), &[arch.hidden])?;
            }
        }
        for (i, layer) in arch.layers.iter().enumerate() {
            match (layer.dense, &arch.moe) {
                (Some(width), _) => {
                    let prefix = format!("model.layers.{i}.mlp");
                    self.list_gated(list, &prefix, &self.gated(&prefix, width)?);
                }
                (None, Some(moe)) => self.list_mixture(list, i, moe)?,
                (None, None) => {}
            }
        }
        Ok(())
    }

    /// What a mixture layer has beside its experts.
    fn list_mixture(&self, list: &mut Vec<Item>, layer: usize, moe: &Moe) -> Result<(), CheckpointError> {
        let prefix = format!("model.layers.{layer}");
        if let Some(shared) = &moe.shared {
            let name = format!("{prefix}.{}", shared.name);
            self.list_gated(list, &name, &self.gated(&name, shared.intermediate)?);
            if shared.gated {
                let gate = format!("{name}_gate.weight");
                let tensor = self.tensor(&gate, &[1, self.arch.hidden])?;
                list.push(self.item(gate.clone(), Some(gate), tensor));
            }
        }
        let name = self.router_name(layer);
        let published = Some(format!("{name}.weight"));
        list.push(self.item(format!("{prefix}.router"), published, self.router(layer)?));
        for vector in moe.router_vectors() {
            let tensor = self.router_vector(layer, vector)?;
            list.push(self.item(
                format!("{prefix}.router.{vector}"),
                Some(format!("{name}.{vector}")),
                tensor,
            ));
        }
        Ok(())
    }

    fn list_gated(&self, list: &mut Vec<Item>, name: &str, gated: &Gated) {
        for (part, tensor) in ["gate", "up", "down"].into_iter().zip(gated.parts()) {
            let published = format!("{name}.{part}_proj.weight");
            list.push(self.item(format!("{name}.{part}"), Some(published), tensor.clone()));
        }
    }

    fn list_experts(&self, list: &mut Vec<Item>) -> Result<(), CheckpointError> {
        let Some(moe) = &self.arch.moe else { return Ok(()) };
        let parts = expert_parts(moe, self.arch.hidden);
        for layer in self.arch.moe_layers() {
            for expert in 0..moe.experts as u32 {
                let name = format!("model.layers.{layer}.experts.{expert}");
                if let Some(native) = &self.native {
                    list.extend(native.expert_items(&name));
                    continue;
                }
                let gated = self.expert(layer as usize, expert as usize)?;
                for (part, tensor) in parts.iter().zip(gated.parts()) {
                    list.push(self.item(format!("{name}.{}", part.name), None, tensor.clone()));
                }
            }
        }
        Ok(())
    }

    /// Digest of the weights: canonical name, type, shape and BLAKE3 of the bytes of every tensor, in order of names.
    /// Reads whatever has not been hashed before, with this many threads.
    ///
    /// # Errors
    /// If a tensor is missing.
    pub fn weights_digest(&self, threads: usize) -> Result<Digest, CheckpointError> {
        let hashed = self.hashed(threads)?;
        let mut all = blake3::Hasher::new();
        for (item, hash) in &hashed {
            let hash = blake3::Hash::from_bytes(*hash);
            let dtype = item.grouped.map_or_else(|| format!("{:?}", item.dtype), |kind| kind.name().into());
            let line = format!("{} {dtype} {:?} {}\n", item.name, item.shape, hash.to_hex());
            all.update(line.as_bytes());
        }
        Ok(Digest(*all.finalize().as_bytes()))
    }

    /// Reads the base parameters of a native checkpoint and compares them with the manifest. A Hugging Face directory has
    /// nothing to compare with; there the weights digest of the identity is taken from the bytes themselves.
    ///
    /// # Errors
    /// Names the tensor that is damaged.
    pub fn verify_base(&self) -> Result<(), CheckpointError> {
        let mut list = Vec::new();
        self.list_base(&mut list)?;
        for item in &list {
            let (Some(tensor), Some(hash)) = (&item.tensor, item.hash) else { continue };
            if self.files.hash(tensor) != hash {
                let what =
                    format!("tensor {} does not have its checksum: import the checkpoint again", item.name);
                return Err(CheckpointError::corrupt(self.files.path(), &what));
            }
        }
        Ok(())
    }

    /// The inventory with the BLAKE3 of each tensor.
    pub(crate) fn hashed(&self, threads: usize) -> Result<Vec<(Item, [u8; 32])>, CheckpointError> {
        let list = self.inventory()?;
        let next = std::sync::atomic::AtomicUsize::new(0);
        let hashes = std::sync::Mutex::new(vec![[0u8; 32]; list.len()]);
        std::thread::scope(|scope| {
            for _ in 0..threads.max(1) {
                scope.spawn(|| {
                    loop {
                        let i = next.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
                        let Some(item) = list.get(i) else { break };
                        let hash = item.hash.unwrap_or_else(|| {
                            let tensor =
                                item.tensor.as_ref().expect("what is not hashed is in a mapped file");
                            self.files.hash(tensor)
                        });
                        hashes.lock().expect("no thread panics with the lock")[i] = hash;
                    }
                });
            }
        });
        let hashes = hashes.into_inner().expect("no thread panicked");
        Ok(list.into_iter().zip(hashes).collect())
    }
}
