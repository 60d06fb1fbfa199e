//! GGUF files: what maps exactly gives, byte for byte, what an import of the same integers gives; all else is refused by name.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_model::Checkpoint;
use lite_llm_model::checkpoint::import::{Wanted, import};
use lite_llm_model::kernels::Quantised;
use lite_llm_model::kernels::quantise::quantise_row;
use lite_llm_model::synth::{SynthFamily, SynthSpec, synth};
use safetensors::SafeTensors;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

/// A tensor of a file to be: sizes slowest first, type, bytes.
#[derive(Clone)]
struct Stored {
    shape: Vec<usize>,
    kind: u32,
    bytes: Vec<u8>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

/// A file of version 3, as the specification has it: values, what tensors there are, their data.
fn write(path: &Path, values: &[(&str, Vec<u8>)], tensors: &BTreeMap<String, Stored>) {
    let mut file = [&b"GGUF"[..], &3u32.to_le_bytes()].concat();
    file.extend((tensors.len() as u64).to_le_bytes());
    file.extend((values.len() as u64).to_le_bytes());
    for (key, value) in values {
        file.extend(text(key));
        file.extend(value);
    }
    let (mut offset, mut data) = (0u64, Vec::new());
    for (name, stored) in tensors {
        file.extend(text(name));
        file.extend((stored.shape.len() as u32).to_le_bytes());
        stored.shape.iter().rev().for_each(|&size| file.extend((size as u64).to_le_bytes()));
        file.extend(stored.kind.to_le_bytes());
        file.extend(offset.to_le_bytes());
        data.extend(&stored.bytes);
        data.resize(data.len().next_multiple_of(32), 0);
        offset = data.len() as u64;
    }
    file.resize(file.len().next_multiple_of(32), 0);
    file.extend(data);
    fs::write(path, file).unwrap();
}

fn value_of_u32(value: u32) -> Vec<u8> {
    [4u32.to_le_bytes(), value.to_le_bytes()].concat()
}

/// What the converter of llama.cpp says of a model, and arrays that nobody asks for.
fn values(spec: &SynthSpec, name: &str) -> Vec<(String, Vec<u8>)> {
    let mut values = vec![
        ("general.architecture".to_owned(), [&8u32.to_le_bytes()[..], &text(name)].concat()),
        (format!("{name}.block_count"), value_of_u32(spec.layers)),
        (format!("{name}.embedding_length"), value_of_u32(spec.hidden)),
        (format!("{name}.attention.head_count"), value_of_u32(spec.heads)),
        (format!("{name}.attention.head_count_kv"), value_of_u32(spec.kv_heads)),
        (
            format!("{name}.attention.layer_norm_rms_epsilon"),
            [6u32.to_le_bytes(), 1e-5f32.to_le_bytes()].concat(),
        ),
    ];
    let tokens = [&8u32.to_le_bytes()[..], &2u64.to_le_bytes(), &text("<a>"), &text("b")].concat();
    values.push(("tokenizer.ggml.tokens".into(), [&9u32.to_le_bytes()[..], &tokens].concat()));
    let scores = [&6u32.to_le_bytes()[..], &1u64.to_le_bytes(), &0.5f32.to_le_bytes()].concat();
    values.push(("tokenizer.ggml.scores".into(), [&9u32.to_le_bytes()[..], &scores].concat()));
    values
}

/// The rows of queries or keys as the converter puts them for a llama: neighbours rotate together.
fn neighbours(rows: Vec<Vec<u8>>, heads: usize) -> Vec<Vec<u8>> {
    let of_head = rows.len() / heads;
    let mut turned = rows.clone();
    for (row, bytes) in rows.into_iter().enumerate() {
        let (head, within) = (row / of_head, row % of_head);
        let (half, pair) = (within / (of_head / 2), within % (of_head / 2));
        turned[head * of_head + 2 * pair + half] = bytes;
    }
    turned
}

/// The tensors of a directory of f32 as the converter names them, quantised but for vectors and routers.
fn converted(source: &Path, spec: &SynthSpec, kind: Quantised) -> BTreeMap<String, Stored> {
    let bytes = fs::read(source.join("model.safetensors")).unwrap();
    let reordered = matches!(spec.family, SynthFamily::Llama | SynthFamily::Mixtral);
    let mut tensors: BTreeMap<String, Stored> = BTreeMap::new();
    let mut listed: Vec<(String, Vec<usize>, Vec<u8>)> = SafeTensors::deserialize(&bytes)
        .unwrap()
        .iter()
        .map(|(name, view)| (name.to_owned(), view.shape().to_vec(), view.data().to_vec()))
        .collect();
    // Experts follow each other by their numbers.
    let number = |name: &str| -> usize {
        name.split(".experts.").nth(1).map_or(0, |rest| rest.split('.').next().unwrap().parse().unwrap())
    };
    listed.sort_by_key(|(name, _, _)| number(name));
    for (name, shape, data) in listed {
        let router = name.ends_with("mlp.gate.weight") || name.ends_with("_sparse_moe.gate.weight");
        let plain = shape.len() == 1 || router || name.ends_with("_gate.weight");
        let columns = *shape.last().unwrap();
        let mut rows: Vec<Vec<u8>> =
            if shape.len() == 1 && name.contains("self_attn") && name.ends_with("bias") {
                data.chunks(4).map(<[u8]>::to_vec).collect()
            } else {
                data.chunks(4 * columns).map(<[u8]>::to_vec).collect()
            };
        if !plain {
            rows.iter_mut().for_each(|row| {
                let values: Vec<f32> =
                    row.as_chunks::<4>().0.iter().map(|&four| f32::from_le_bytes(four)).collect();
                *row = vec![0; kind.row_bytes(columns)];
                quantise_row(kind, &values, row).unwrap();
            });
        }
        if reordered && name.contains("q_proj") {
            rows = neighbours(rows, spec.heads as usize);
        } else if reordered && name.contains("k_proj") {
            rows = neighbours(rows, spec.kv_heads as usize);
        }
        let expert = name.contains(".experts.");
        let shape = if name.ends_with("_gate.weight") { vec![columns] } else { shape };
        let kind = if plain {
            0
        } else if kind == Quantised::Q8 {
            8
        } else {
            2
        };
        let stored = tensors.entry(name_of(&name)).or_insert_with(|| Stored {
            shape: if expert { [&[0], &shape[..]].concat() } else { shape },
            kind,
            bytes: Vec::new(),
        });
        stored.bytes.extend(rows.concat());
        stored.shape[0] += usize::from(expert);
    }
    tensors
}

/// The name that the converter of llama.cpp gives.
fn name_of(name: &str) -> String {
    for (published, converted) in
        [("model.embed_tokens", "token_embd"), ("lm_head", "output"), ("model.norm", "output_norm")]
    {
        if let Some(end) = name.strip_prefix(published) {
            return format!("{converted}{end}");
        }
    }
    let (layer, rest) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
    let (part, end) = rest.rsplit_once('.').unwrap();
    let last = part.rsplit('.').next().unwrap();
    let which = match last {
        "gate_proj" | "w1" => "gate",
        "up_proj" | "w3" => "up",
        "down_proj" | "w2" => "down",
        _ => "",
    };
    let part = match last {
        _ if part.contains(".experts.") => format!("ffn_{which}_exps"),
        _ if part.contains("shared_expert.") => format!("ffn_{which}_shexp"),
        "gate_proj" | "up_proj" | "down_proj" => format!("ffn_{which}"),
        "shared_expert_gate" => "ffn_gate_inp_shexp".into(),
        "gate" => "ffn_gate_inp".into(),
        "input_layernorm" => "attn_norm".into(),
        "post_attention_layernorm" => "ffn_norm".into(),
        "q_proj" => "attn_q".into(),
        "k_proj" => "attn_k".into(),
        "v_proj" => "attn_v".into(),
        "o_proj" => "attn_output".into(),
        "q_norm" => "attn_q_norm".into(),
        "k_norm" => "attn_k_norm".into(),
        other => panic!("{other}"),
    };
    format!("blk.{layer}.{part}.{end}")
}

struct Case {
    dir: tempfile::TempDir,
    spec: SynthSpec,
    source: PathBuf,
    file: PathBuf,
    values: Vec<(String, Vec<u8>)>,
    tensors: BTreeMap<String, Stored>,
}

impl Case {
    fn new(family: SynthFamily, kind: Quantised) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let spec = SynthSpec { layers: 2, ..SynthSpec::of(family) };
        let source = dir.path().join("source");
        synth(&source, &spec).unwrap();
        let name = match family {
            SynthFamily::Llama | SynthFamily::Mixtral => "llama",
            SynthFamily::Olmoe => "olmoe",
            SynthFamily::Qwen2Moe => "qwen2moe",
            _ => "qwen3moe",
        };
        let (values, tensors) = (values(&spec, name), converted(&source, &spec, kind));
        let file = dir.path().join("model.gguf");
        Self { dir, spec, source, file, values, tensors }
    }

    fn write(&self) {
        let values: Vec<_> = self.values.iter().map(|(key, value)| (key.as_str(), value.clone())).collect();
        write(&self.file, &values, &self.tensors);
    }

    fn import(&self, quantise: Option<Quantised>) -> Result<PathBuf, String> {
        let target = self.dir.path().join("native");
        let wanted = Wanted { with: Some(&self.source), quantise, ..Wanted::default() };
        import(&self.file, &target, wanted, 2, |_, _| {}).map(|_| target).map_err(|error| error.to_string())
    }

    fn refusal(&self) -> String {
        self.write();
        self.import(None).unwrap_err()
    }
}

fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

/// The same integers give the same checkpoint, whichever way they came.
#[test]
fn a_file_of_integers_is_an_import_that_was_quantised() {
    let families = [
        SynthFamily::Llama,
        SynthFamily::Mixtral,
        SynthFamily::Olmoe,
        SynthFamily::Qwen2Moe,
        SynthFamily::Qwen3Moe,
    ];
    for family in families {
        for kind in [Quantised::Q8, Quantised::Q4] {
            let case = Case::new(family, kind);
            case.write();
            let native = case.import(None).unwrap();
            let other = case.dir.path().join("other");
            let wanted = Wanted { quantise: Some(kind), ..Wanted::default() };
            import(&case.source, &other, wanted, 1, |_, _| {}).unwrap();
            let (found, expected) = (files(&native), files(&other));
            for (name, bytes) in &expected {
                assert!(found.get(name) == Some(bytes), "{family:?} {kind:?}: {name} differs");
            }
            assert_eq!(found.len(), expected.len());
        }
    }
}

#[test]
fn what_does_not_map_exactly_is_refused_by_name() {
    let mut case = Case::new(SynthFamily::Qwen3Moe, Quantised::Q8);
    let change = |case: &mut Case, name: &str, change: &dyn Fn(&mut Stored)| {
        let before = case.tensors[name].clone();
        change(case.tensors.get_mut(name).unwrap());
        let error = case.refusal();
        case.tensors.insert(name.into(), before);
        error
    };
    let error = change(&mut case, "output.weight", &|stored| stored.kind = 14);
    assert!(error.contains("output.weight of type Q6_K") && error.contains("--pure"), "{error}");
    let error = change(&mut case, "blk.1.ffn_up_exps.weight", &|stored| stored.shape[0] -= 1);
    assert!(error.contains("15 experts of 16"), "{error}");
    let error = change(&mut case, "blk.1.attn_q.weight", &|stored| stored.shape[0] /= 2);
    assert!(error.contains("has shape"), "{error}");
    let error = change(&mut case, "blk.0.ffn_down_exps.weight", &|stored| stored.bytes[1] = 0x7c);
    assert!(error.contains("a scale is NaN or infinite"), "{error}");
    let error = change(&mut case, "blk.0.attn_k.weight", &|stored| stored.shape = vec![usize::MAX / 64, 64]);
    assert!(error.contains("sizes are none") || error.contains("beyond the end"), "{error}");

    let norm = case.tensors["output_norm.weight"].clone();
    case.tensors.insert("blk.0.attn_gate.weight".into(), norm.clone());
    assert!(case.refusal().contains("blk.0.attn_gate.weight: it is not one of this model"));
    case.tensors.remove("blk.0.attn_gate.weight");
    case.tensors.remove("output_norm.weight");
    assert!(case.refusal().contains("model.norm.weight is missing"));
    case.tensors.insert("output_norm.weight".into(), norm);

    for (key, value, words) in [
        ("qwen3moe.block_count", value_of_u32(3), "block_count is 3, the configuration says 2"),
        ("general.architecture", [&8u32.to_le_bytes()[..], &text("gemma3")].concat(), "\"qwen3moe\""),
        (
            "qwen3moe.attention.layer_norm_rms_epsilon",
            [6u32.to_le_bytes(), 1e-6f32.to_le_bytes()].concat(),
            "different models",
        ),
    ] {
        let at = case.values.iter().position(|(found, _)| found == key).unwrap();
        let before = std::mem::replace(&mut case.values[at].1, value);
        let error = case.refusal();
        case.values[at].1 = before;
        assert!(error.contains(words), "{error}");
    }
    case.values.push(("split.count".into(), [&2u32.to_le_bytes()[..], &4u16.to_le_bytes()].concat()));
    assert!(case.refusal().contains("one of 4 parts"));
    case.values.pop();

    case.write();
    let error = case.import(Some(Quantised::Q4)).unwrap_err();
    assert!(error.contains("quantised already"), "{error}");
    let alone = import(&case.file, &case.dir.path().join("n"), None, 1, |_, _| {}).unwrap_err().to_string();
    assert!(alone.contains("has no config.json"), "{alone}");
    let with = Wanted { with: Some(&case.source), ..Wanted::default() };
    let error = import(&case.source, &case.dir.path().join("n"), with, 1, |_, _| {}).unwrap_err().to_string();
    assert!(error.contains("no GGUF file"), "{error}");
    let as_it_is = Checkpoint::open(&case.file).unwrap_err().to_string();
    assert!(as_it_is.contains("import it first"), "{as_it_is}");
    let missing = import(&case.dir.path().join("no.gguf"), &case.dir.path().join("n"), with, 1, |_, _| {});
    assert!(missing.unwrap_err().to_string().contains("no.gguf"));
    assert!(case.import(None).is_ok() && case.spec.layers == 2, "and it was sound all the time");
}

/// Cut anywhere, or with a byte that is another, a file is refused or read; nothing panics.
#[test]
fn a_damaged_file_is_an_error_or_read() {
    let case = Case::new(SynthFamily::Olmoe, Quantised::Q8);
    case.write();
    let bytes = fs::read(&case.file).unwrap();
    let header = bytes.len().min(6000);
    for at in (0..header).step_by(7) {
        fs::write(&case.file, &bytes[..at]).unwrap();
        assert!(Checkpoint::open_source(&case.file, Some(&case.source)).is_err(), "cut at {at}");
    }
    for at in (0..header).step_by(41) {
        let mut bytes = bytes.clone();
        bytes[at] ^= 1 << (at % 8);
        fs::write(&case.file, &bytes).unwrap();
        let _ = Checkpoint::open_source(&case.file, Some(&case.source));
    }
}
