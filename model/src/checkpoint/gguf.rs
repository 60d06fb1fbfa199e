//! Tensors of a GGUF file, under the names that Hugging Face gives them: those that are numbers, and those whose blocks are
//! the integers of this project to the bit (Q8_0, Q4_0). Nothing is quantised anew; what does not map exactly is refused.
//!
//! The file says too little of a model to compute it: its configuration and tokenizer are those of the directory that it was
//! made from. What both say has to be the same. Nothing in the file is trusted: numbers are checked before they are used.

use super::CheckpointError;
use super::encoded::Form;
use super::tensors::{Listed, TensorFiles, map_file};
use crate::arch::{Arch, ExpertForm};
use crate::kernels::{DType, Quantised};
use std::collections::BTreeMap;
use std::path::Path;

/// Where data begins, if the file does not say.
const ALIGNMENT: u64 = 32;

/// A family that is known to map exactly: its `model_type`, what GGUF calls it, and whether the rows of queries and keys were
/// put in the order of rotations of neighbours.
const FAMILIES: [(&str, &str, bool); 5] = [
    ("llama", "llama", true),
    ("mixtral", "llama", true),
    ("olmoe", "olmoe", false),
    ("qwen2_moe", "qwen2moe", false),
    ("qwen3_moe", "qwen3moe", false),
];

/// Whether a path is one of such a file, by its name.
pub(super) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|extension| extension == "gguf") && !path.is_dir()
}

/// The tensors of a file, for a model of this architecture.
pub(super) fn open(path: &Path, arch: &Arch) -> Result<TensorFiles, CheckpointError> {
    let map = map_file(path)?;
    let unsupported = |what: String, remedy: &str| CheckpointError::Unsupported {
        path: path.into(),
        what,
        remedy: remedy.into(),
    };
    let cut = || CheckpointError::invalid(path, "it ends within its header: it is cut, or no GGUF file");
    let mut reader = Reader { bytes: &map, at: 0 };
    let header = reader.header().ok_or_else(cut)?;
    if header.magic != *b"GGUF" || !(2..=3).contains(&header.version) {
        let what = format!("{:?} of version {}", String::from_utf8_lossy(&header.magic), header.version);
        return Err(unsupported(what, "GGUF of version 2 or 3, little-endian, is read"));
    }
    let mut values = BTreeMap::new();
    for _ in 0..header.values {
        let (key, value) = reader.key_and_value().ok_or_else(cut)?;
        values.insert(key, value);
    }
    let known = FAMILIES.into_iter().find(|(family, _, _)| *family == arch.family);
    let Some((_, name, reordered)) = known else {
        let families = FAMILIES.map(|(family, _, _)| family).join(", ");
        return Err(unsupported(
            format!("{} from GGUF", arch.family),
            &format!("the mapping is exact for {families}; import the Hugging Face directory instead"),
        ));
    };
    compare(path, &values, arch, name)?;
    let mut infos = Vec::new();
    for _ in 0..header.tensors {
        infos.push(reader.info().ok_or_else(cut)?);
    }
    let alignment = values.get("general.alignment").and_then(Value::integer).unwrap_or(ALIGNMENT);
    let data = (alignment > 0).then(|| (reader.at as u64).checked_next_multiple_of(alignment)).flatten();
    let data = data.ok_or_else(|| CheckpointError::invalid(path, "general.alignment is no alignment"))?;
    let mut listed = Vec::new();
    for info in infos {
        info.list(path, arch, reordered, data, &mut listed)?;
    }
    TensorFiles::of_map(path, map, listed)
}

/// What the file says of the model against its configuration.
fn compare(
    path: &Path,
    values: &BTreeMap<String, Value>,
    arch: &Arch,
    name: &str,
) -> Result<(), CheckpointError> {
    let contradicts = |key: &str, found: String, wanted: String| {
        let what = format!("{key} is {found}, the configuration says {wanted}: they are of different models");
        Err(CheckpointError::invalid(path, &what))
    };
    match values.get("general.architecture") {
        Some(Value::Text(found)) if found == name => {}
        found => {
            return contradicts("general.architecture", format!("{found:?}"), format!("{name:?}"));
        }
    }
    if let Some(count) = values.get("split.count").and_then(Value::integer).filter(|&count| count > 1) {
        let what = format!("it is one of {count} parts; merge them first (llama-gguf-split --merge)");
        return Err(CheckpointError::invalid(path, &what));
    }
    let moe = arch.moe.as_ref();
    let counts = [
        ("block_count", Some(arch.layers.len())),
        ("embedding_length", Some(arch.hidden)),
        ("attention.head_count", Some(arch.attention.heads)),
        ("attention.head_count_kv", Some(arch.attention.kv_heads)),
        ("expert_count", moe.map(|moe| moe.experts)),
        ("expert_used_count", moe.map(|moe| moe.top_k)),
    ];
    for (key, wanted) in counts {
        let key = format!("{name}.{key}");
        if let (Some(found), Some(wanted)) = (values.get(&key).and_then(Value::integer), wanted)
            && found != wanted as u64
        {
            return contradicts(&key, found.to_string(), wanted.to_string());
        }
    }
    let key = format!("{name}.attention.layer_norm_rms_epsilon");
    match values.get(&key) {
        Some(Value::Float(found)) if found.to_bits() != arch.norm_eps.to_bits() => {
            contradicts(&key, found.to_string(), arch.norm_eps.to_string())
        }
        _ => Ok(()),
    }
}

/// What is used of a value.
#[derive(Debug)]
enum Value {
    Integer(u64),
    Float(f32),
    Text(String),
    Other,
}

impl Value {
    fn integer(&self) -> Option<u64> {
        if let Self::Integer(value) = self { Some(*value) } else { None }
    }
}

struct Header {
    magic: [u8; 4],
    version: u32,
    tensors: u64,
    values: u64,
}

/// A tensor as the file lists it.
struct Info {
    name: String,
    /// Slowest first.
    shape: Vec<usize>,
    kind: u32,
    offset: u64,
}

impl Info {
    /// Adds what it is under other names: all experts of a layer lie in one tensor.
    fn list(
        self,
        path: &Path,
        arch: &Arch,
        reordered: bool,
        data: u64,
        listed: &mut Vec<Listed>,
    ) -> Result<(), CheckpointError> {
        let invalid = |what: &str| CheckpointError::invalid(path, &format!("tensor {}: {what}", self.name));
        let (dtype, form) = match self.kind {
            0 => (DType::F32, Form::Plain),
            1 => (DType::F16, Form::Plain),
            30 => (DType::Bf16, Form::Plain),
            2 => (DType::F32, Form::Groups(Quantised::Q4)),
            8 => (DType::F32, Form::Groups(Quantised::Q8)),
            kind => {
                return Err(CheckpointError::Unsupported {
                    path: path.into(),
                    what: format!("tensor {} of type {}", self.name, kind_name(kind)),
                    remedy: "F32, F16, BF16, Q8_0 and Q4_0 map exactly; quantise again to one of these for every tensor \
                             (llama-quantize --pure)"
                        .into(),
                });
            }
        };
        let Some(target) = target_of(&self.name, arch) else {
            return Err(invalid("it is not one of this model, and ignoring it would change the output"));
        };
        let columns = self.shape.last().copied().unwrap_or(1);
        let rows = self.shape.iter().rev().skip(1).try_fold(1usize, |rows, &size| rows.checked_mul(size));
        let row = match form {
            // A row of more could not be counted.
            Form::Groups(kind) if columns.is_multiple_of(32) && columns <= u32::MAX as usize => {
                Some(kind.row_bytes(columns))
            }
            Form::Groups(_) => None,
            _ => columns.checked_mul(dtype.bytes()),
        };
        let start = data.checked_add(self.offset).and_then(|start| usize::try_from(start).ok());
        let bytes = rows.zip(row).and_then(|(rows, row)| rows.checked_mul(row));
        let end = start.zip(bytes).and_then(|(start, bytes)| start.checked_add(bytes));
        let (Some(start), Some(bytes), Some(_)) = (start, bytes, end) else {
            return Err(invalid("its sizes are none of a tensor"));
        };
        let tensor = |name, form, shape, start, bytes| Listed { name, form, dtype, shape, start, bytes };
        match target {
            Target::Nothing => {}
            Target::One(name) => listed.push(tensor(name, form, self.shape, start, bytes)),
            Target::Row(name) => listed.push(tensor(name, form, vec![1, columns], start, bytes)),
            Target::Heads(name, heads) => {
                let kind = if let Form::Groups(kind) = form { Some(kind) } else { None };
                let even = heads > 0 && self.shape[0].is_multiple_of(2 * heads);
                let form = match (reordered, even) {
                    (false, _) => form,
                    (true, true) => Form::Reordered { kind, heads },
                    (true, false) => return Err(invalid("its rows are none of heads of pairs")),
                };
                listed.push(tensor(name, form, self.shape, start, bytes));
            }
            Target::Experts(names) => {
                let &[experts, rows, columns] = &self.shape[..] else {
                    return Err(invalid("experts are of three dimensions"));
                };
                if experts != names.len() {
                    return Err(invalid(&format!("it has {experts} experts of {}", names.len())));
                }
                for (expert, name) in names.into_iter().enumerate() {
                    let size = bytes / experts;
                    listed.push(tensor(name, form.clone(), vec![rows, columns], start + expert * size, size));
                }
            }
        }
        Ok(())
    }
}

/// The type that somebody is most likely to have, by name.
fn kind_name(kind: u32) -> String {
    let name = match kind {
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        10 => "Q2_K",
        11 => "Q3_K",
        12 => "Q4_K",
        13 => "Q5_K",
        14 => "Q6_K",
        39 => "MXFP4",
        _ => return format!("number {kind}"),
    };
    name.into()
}

/// What a tensor of a file is.
enum Target {
    One(String),
    /// A vector that is a matrix of one row.
    Row(String),
    /// Rows of so many heads.
    Heads(String, usize),
    Experts(Vec<String>),
    /// A table that is computed.
    Nothing,
}

fn target_of(name: &str, arch: &Arch) -> Option<Target> {
    let one = |name: String| Some(Target::One(name));
    match name {
        "token_embd.weight" => return one("model.embed_tokens.weight".into()),
        "output.weight" => return one("lm_head.weight".into()),
        "output_norm.weight" => return one("model.norm.weight".into()),
        "rope_freqs.weight" => return Some(Target::Nothing),
        _ => {}
    }
    let (layer, part) = name.strip_prefix("blk.")?.split_once('.')?;
    let layer: usize = layer.parse().ok()?;
    let prefix = format!("model.layers.{layer}");
    let (part, end) = part.rsplit_once('.')?;
    if !matches!(end, "weight" | "bias") {
        return None;
    }
    let attention = |part: &str| format!("{prefix}.self_attn.{part}.{end}");
    match part {
        "attn_norm" => return one(format!("{prefix}.input_layernorm.{end}")),
        "ffn_norm" => return one(format!("{prefix}.post_attention_layernorm.{end}")),
        "attn_q" => return Some(Target::Heads(attention("q_proj"), arch.attention.heads)),
        "attn_k" => return Some(Target::Heads(attention("k_proj"), arch.attention.kv_heads)),
        "attn_v" => return one(attention("v_proj")),
        "attn_output" => return one(attention("o_proj")),
        "attn_q_norm" => return one(attention("q_norm")),
        "attn_k_norm" => return one(attention("k_norm")),
        "ffn_gate" | "ffn_up" | "ffn_down" => {
            return one(format!("{prefix}.mlp.{}_proj.{end}", &part[4..]));
        }
        _ => {}
    }
    let moe = arch.moe.as_ref()?;
    if part == "ffn_gate_inp" {
        return one(format!("{prefix}.{}.{end}", moe.routers.first()?));
    }
    if let Some(which) = part.strip_prefix("ffn_").and_then(|part| part.strip_suffix("_exps")) {
        let which = ["gate", "up", "down"].iter().position(|part| *part == which)?;
        let apart = moe.forms.iter().find_map(|form| match form {
            ExpertForm::Apart { block, names } => Some((block, names[which])),
            ExpertForm::Fused { .. } | ExpertForm::Columns { .. } => None,
        });
        let (block, name) = apart?;
        let names = (0..moe.experts).map(|expert| format!("{prefix}.{block}.{expert}.{name}.{end}"));
        return Some(Target::Experts(names.collect()));
    }
    let shared = format!("{prefix}.{}", moe.shared.as_ref()?.name);
    match part {
        "ffn_gate_inp_shexp" => Some(Target::Row(format!("{shared}_gate.{end}"))),
        "ffn_gate_shexp" => one(format!("{shared}.gate_proj.{end}")),
        "ffn_up_shexp" => one(format!("{shared}.up_proj.{end}")),
        "ffn_down_shexp" => one(format!("{shared}.down_proj.{end}")),
        _ => None,
    }
}

/// Reads a header; `None` where the file ends, or a size cannot be.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let bytes = *self.bytes.get(self.at..)?.first_chunk::<N>()?;
        self.at += N;
        Some(bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn skip(&mut self, bytes: u64) -> Option<()> {
        self.at = self.at.checked_add(usize::try_from(bytes).ok()?).filter(|&at| at <= self.bytes.len())?;
        Some(())
    }

    fn text(&mut self) -> Option<String> {
        let len = self.u64()?;
        let start = self.at;
        self.skip(len)?;
        Some(String::from_utf8_lossy(&self.bytes[start..self.at]).into_owned())
    }

    fn header(&mut self) -> Option<Header> {
        let (magic, version) = (self.take()?, self.u32()?);
        Some(Header { magic, version, tensors: self.u64()?, values: self.u64()? })
    }

    fn key_and_value(&mut self) -> Option<(String, Value)> {
        let key = self.text()?;
        let kind = self.u32()?;
        if kind != 9 {
            return Some((key, self.value(kind)?));
        }
        let (kind, count) = (self.u32()?, self.u64()?);
        match scalar_bytes(kind) {
            Some(bytes) => self.skip(count.checked_mul(bytes)?)?,
            // Texts, one after the other; arrays of arrays do not occur.
            None if kind == 8 => (0..count).try_for_each(|_| self.u64().and_then(|len| self.skip(len)))?,
            None => return None,
        }
        Some((key, Value::Other))
    }

    fn value(&mut self, kind: u32) -> Option<Value> {
        Some(match kind {
            4 => Value::Integer(self.u32()?.into()),
            5 => i32::from_le_bytes(self.take()?).try_into().map_or(Value::Other, Value::Integer),
            6 => Value::Float(f32::from_le_bytes(self.take()?)),
            2 => Value::Integer(u16::from_le_bytes(self.take()?).into()),
            8 => Value::Text(self.text()?),
            10 => Value::Integer(self.u64()?),
            kind => {
                self.skip(scalar_bytes(kind)?)?;
                Value::Other
            }
        })
    }

    fn info(&mut self) -> Option<Info> {
        let name = self.text()?;
        let dimensions = self.u32().filter(|dimensions| (1..=4).contains(dimensions))?;
        let mut shape = Vec::new();
        for _ in 0..dimensions {
            shape.push(usize::try_from(self.u64()?).ok().filter(|&size| size > 0)?);
        }
        shape.reverse();
        Some(Info { name, shape, kind: self.u32()?, offset: self.u64()? })
    }
}

const fn scalar_bytes(kind: u32) -> Option<u64> {
    Some(match kind {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        _ => return None,
    })
}
