//! Synthetic checkpoints: named as on the hub, the same bytes for the same seed, and computable.

use lite_llm_core::config::Placement;
use lite_llm_core::ids::{ExpertKey, Slot};
use lite_llm_model::checkpoint::Tier;
use lite_llm_model::kernels::{DType, Isa};
use lite_llm_model::synth::{SynthError, SynthFamily, SynthSpec, synth};
use lite_llm_model::tokenizer::{Message, Tokenizer};
use lite_llm_model::{
    Capture, Checkpoint, ExpertSource, KvCache, Model, ModelOptions, Provided, Stopped, Workspace,
};
use lite_llm_tests::harness::first_step;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

fn json(path: &Path) -> Value {
    serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap()
}

/// Name to (type, shape), of every tensor of a file.
fn tensors_of(path: &Path) -> BTreeMap<String, (String, Vec<u64>)> {
    let bytes = std::fs::read(path).unwrap();
    let len = usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    assert_eq!(len % 8, 0);
    let header: Value = serde_json::from_slice(&bytes[8..8 + len]).unwrap();
    let mut end = 0;
    let mut tensors = BTreeMap::new();
    for (name, entry) in header.as_object().unwrap().iter().filter(|(name, _)| *name != "__metadata__") {
        let shape: Vec<u64> =
            entry["shape"].as_array().unwrap().iter().map(|n| n.as_u64().unwrap()).collect();
        end = end.max(entry["data_offsets"][1].as_u64().unwrap());
        tensors.insert(name.clone(), (entry["dtype"].as_str().unwrap().to_owned(), shape));
    }
    assert_eq!(end, (bytes.len() - 8 - len) as u64, "no byte is without a tensor");
    tensors
}

/// The shape of a golden checkpoint, from its configuration.
fn spec_like(family: SynthFamily, dtype: DType, dir: &Path) -> SynthSpec {
    let config = json(&dir.join("config_v4.json"));
    let number = |key: &str| config[key].as_u64().map(|n| u32::try_from(n).unwrap());
    let either = |a, b| number(a).or_else(|| number(b)).unwrap_or(0);
    SynthSpec {
        layers: number("num_hidden_layers").unwrap(),
        hidden: number("hidden_size").unwrap(),
        heads: number("num_attention_heads").unwrap(),
        kv_heads: number("num_key_value_heads").unwrap(),
        head_dim: number("head_dim").unwrap_or(16),
        experts: either("num_experts", "num_local_experts"),
        top_k: either("num_experts_per_tok", ""),
        intermediate: either("moe_intermediate_size", "intermediate_size"),
        shared_intermediate: either("shared_expert_intermediate_size", ""),
        vocab: number("vocab_size").unwrap(),
        context: number("max_position_embeddings").unwrap(),
        dtype,
        ..SynthSpec::of(family)
    }
}

#[test]
fn tensors_are_named_and_shaped_as_on_the_hub() {
    let dir = tempfile::tempdir().unwrap();
    for (name, family, dtype) in [
        ("llama", SynthFamily::Llama, DType::F32),
        ("mixtral", SynthFamily::Mixtral, DType::F32),
        ("mixtral_bf16", SynthFamily::Mixtral, DType::Bf16),
        ("olmoe", SynthFamily::Olmoe, DType::F32),
        ("qwen2_moe", SynthFamily::Qwen2Moe, DType::F32),
        ("qwen3_moe", SynthFamily::Qwen3Moe, DType::F32),
        ("qwen3_moe_bf16", SynthFamily::Qwen3Moe, DType::Bf16),
    ] {
        let golden = fixture(name);
        let made = dir.path().join(name);
        let report = synth(&made, &spec_like(family, dtype, &golden)).unwrap();
        let tensors = tensors_of(&made.join("model.safetensors"));
        assert_eq!(tensors, tensors_of(&golden.join("model.safetensors")), "{name}");
        assert_eq!(report.tensors, tensors.len() as u64);
        // Same architecture for the reader, save what the golden files set otherwise.
        let (made, golden) = (Checkpoint::open(&made).unwrap(), Checkpoint::open(&golden).unwrap());
        let (made, golden) = (made.arch(), golden.arch());
        assert_eq!((made.family, &made.moe, &made.layers), (golden.family, &golden.moe, &golden.layers));
        assert_eq!((&made.attention, made.tied), (&golden.attention, golden.tied));
    }
}

#[test]
fn shards_divide_the_same_tensors_and_read_as_one() {
    let dir = tempfile::tempdir().unwrap();
    let whole = SynthSpec { layers: 2, ..SynthSpec::of(SynthFamily::Qwen2Moe) };
    let cut = SynthSpec { shard_bytes: 300_000, ..whole.clone() };
    let one = synth(&dir.path().join("whole"), &whole).unwrap();
    let many = synth(&dir.path().join("cut"), &cut).unwrap();
    assert!(many.shards > 3, "only {} shards", many.shards);
    assert_eq!((one.tensors, one.parameters, one.bytes), (many.tensors, many.parameters, many.bytes));
    let open = |name| Checkpoint::open(&dir.path().join(name)).unwrap().weights_digest(1).unwrap();
    assert_eq!(open("whole"), open("cut"), "sharding changes no weight");
    let index = json(&dir.path().join("cut/model.safetensors.index.json"));
    assert_eq!(index["metadata"]["total_size"], many.bytes);
    let held: usize = (1..=many.shards)
        .map(|n| {
            tensors_of(&dir.path().join(format!("cut/model-{n:05}-of-{:05}.safetensors", many.shards))).len()
        })
        .sum();
    assert_eq!(held, index["weight_map"].as_object().unwrap().len());
}

fn digest(dir: &Path) -> String {
    let mut names: Vec<_> = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name()).collect();
    names.sort();
    let mut hasher = blake3::Hasher::new();
    for name in names {
        let bytes = std::fs::read(dir.join(&name)).unwrap();
        hasher.update(name.as_encoded_bytes()).update(&(bytes.len() as u64).to_le_bytes()).update(&bytes);
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

#[test]
fn the_same_seed_gives_the_same_bytes_on_every_machine() {
    let dir = tempfile::tempdir().unwrap();
    let made: Vec<String> = SynthFamily::ALL
        .into_iter()
        .flat_map(|family| [DType::F32, DType::Bf16].map(|dtype| (family, dtype)))
        .map(|(family, dtype)| {
            let path = dir.path().join(format!("{}-{dtype:?}", family.name()));
            synth(&path, &SynthSpec { dtype, seed: 7, layers: 2, ..SynthSpec::of(family) }).unwrap();
            format!("{} {dtype:?} {}", family.name(), digest(&path))
        })
        .collect();
    // A change here changes every synthetic checkpoint: let it be meant, and say so in the change log.
    assert_eq!(made, GOLDEN);
    let again = dir.path().join("again");
    let spec = SynthSpec { dtype: DType::F32, seed: 7, layers: 2, ..SynthSpec::of(SynthFamily::Llama) };
    synth(&again, &spec).unwrap();
    assert_eq!(format!("llama F32 {}", digest(&again)), made[0]);
    let other = dir.path().join("other");
    synth(&other, &SynthSpec { seed: 8, ..spec }).unwrap();
    assert_ne!(digest(&other), digest(&again));
}

const GOLDEN: [&str; 12] = [
    "llama F32 743d6912c3ccb322",
    "llama Bf16 a3f162bd64e1d01d",
    "mixtral F32 131aaefa611547a8",
    "mixtral Bf16 a60136b71f89b9fe",
    "olmoe F32 ca60841dc2b58932",
    "olmoe Bf16 c9d39f58cb31b85a",
    "qwen2_moe F32 438263c963d36492",
    "qwen2_moe Bf16 d8aa1e17673b5f5a",
    "qwen3_moe F32 b7d1a22dc802016d",
    "qwen3_moe Bf16 48b0a3647cc68a2a",
    "tiered_moe F32 1ac4e73580d58465",
    "tiered_moe Bf16 9e1bcb9eab1e0501",
];

#[test]
fn what_is_there_is_never_overwritten_and_what_fails_leaves_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let spec = SynthSpec { layers: 1, ..SynthSpec::of(SynthFamily::Llama) };
    let empty = dir.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    synth(&empty, &spec).unwrap();
    let before = digest(&empty);
    let error = synth(&empty, &SynthSpec { seed: 1, ..spec.clone() }).unwrap_err();
    assert!(matches!(&error, SynthError::Occupied { dir } if *dir == empty), "{error}");
    assert!(error.to_string().contains("name another"), "{error}");
    assert_eq!(digest(&empty), before);
    std::fs::write(dir.path().join("file"), "x").unwrap();
    for occupied in ["file", "file/below"] {
        let error = synth(&dir.path().join(occupied), &spec).unwrap_err();
        assert!(matches!(error, SynthError::Occupied { .. }), "{occupied}: {error}");
    }
    let error = synth(&dir.path().join("no/parent"), &spec).unwrap_err();
    assert!(matches!(error, SynthError::Io { .. }), "{error}");
    let error = synth(Path::new("/proc/none"), &spec).unwrap_err();
    assert!(matches!(error, SynthError::Io { .. }), "{error}");
    // What a killed attempt left is cleared away; what another process is writing is not.
    std::fs::create_dir(dir.path().join(".again.partial")).unwrap();
    std::fs::write(dir.path().join(".again.partial/model.safetensors"), "half").unwrap();
    synth(&dir.path().join("again"), &spec).unwrap();
    assert_eq!(digest(&dir.path().join("again")), before);
    std::fs::remove_dir_all(dir.path().join("again")).unwrap();
    let other = lite_llm_model::disk::FileDisk::open(dir.path().join(".again.partial")).unwrap();
    let error = synth(&dir.path().join("again"), &spec).unwrap_err();
    assert!(error.to_string().contains("in use by another process"), "{error}");
    drop(other);
    synth(&dir.path().join("again"), &spec).unwrap();
    std::fs::remove_dir_all(dir.path().join("again")).unwrap();
    let left: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "{left:?}");
}

#[test]
fn impossible_shapes_are_refused_by_field() {
    let good = SynthSpec::of(SynthFamily::Mixtral);
    let huge = SynthSpec {
        layers: 1 << 20,
        hidden: 1 << 20,
        experts: 1 << 10,
        intermediate: 1 << 20,
        ..SynthSpec::of(SynthFamily::Mixtral)
    };
    let bad = [
        ("layers", huge),
        ("layers", SynthSpec { layers: 0, ..good.clone() }),
        ("hidden", SynthSpec { hidden: u32::MAX, ..good.clone() }),
        ("kv_heads", SynthSpec { kv_heads: 3, ..good.clone() }),
        ("head_dim", SynthSpec { head_dim: 15, ..good.clone() }),
        ("head_dim", SynthSpec { head_dim: 1 << 23, ..good.clone() }),
        ("experts", SynthSpec { experts: 0, ..good.clone() }),
        ("top_k", SynthSpec { top_k: 17, ..good.clone() }),
        ("vocab", SynthSpec { vocab: 0, ..good.clone() }),
        ("shard_bytes", SynthSpec { shard_bytes: 0, ..good }),
        ("head_dim", SynthSpec { head_dim: 32, ..SynthSpec::of(SynthFamily::Olmoe) }),
    ];
    let dir = tempfile::tempdir().unwrap();
    for (field, spec) in bad {
        match synth(&dir.path().join("none"), &spec) {
            Err(SynthError::Invalid { field: named, remedy, .. }) => {
                assert_eq!(named, field);
                assert!(!remedy.is_empty());
            }
            other => panic!("{field}: {other:?}"),
        }
    }
    // What a dense family does not use is not asked for.
    assert!(SynthSpec { experts: 0, top_k: 0, ..SynthSpec::of(SynthFamily::Llama) }.check().is_ok());
}

#[test]
fn text_survives_the_tokenizer() {
    let dir = tempfile::tempdir().unwrap();
    for vocab in [SynthSpec::TEXT_VOCAB_MIN, 512, 5000] {
        let path = dir.path().join(vocab.to_string());
        let spec = SynthSpec { vocab, layers: 1, ..SynthSpec::of(SynthFamily::Llama) };
        assert!(synth(&path, &spec).unwrap().tokenizer);
        let tokenizer = Tokenizer::open(&path).unwrap().unwrap();
        for text in ["", "Hello, world", "  two  spaces\n\tand tabs ", "naïve Привет 你好 🙂", "\u{0}\u{7f}"]
        {
            let ids = tokenizer.encode(text).unwrap();
            assert!(ids.iter().all(|&id| id < vocab), "{ids:?}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), text);
            if vocab == 5000 && text == "Hello, world" {
                assert!(ids.len() < text.len() - 3, "pairs are used: {ids:?}");
            }
        }
        let ids = tokenizer.chat(&[Message::user("Hi")], std::time::UNIX_EPOCH).unwrap();
        assert_eq!((ids[0], ids[1..].contains(&2)), (1, true), "special tokens are one id each");
        let plain: Vec<u32> = ids.into_iter().filter(|&id| id > 2).collect();
        assert_eq!(tokenizer.decode(&plain).unwrap(), "user\nHi\nassistant\n");
    }
    let path = dir.path().join("ids-only");
    let spec = SynthSpec { vocab: 64, layers: 1, ..SynthSpec::of(SynthFamily::Llama) };
    assert!(!synth(&path, &spec).unwrap().tokenizer);
    assert!(Tokenizer::open(&path).unwrap().is_none());
}

/// Serves every expert from a slot of its own.
struct Resident(Vec<Vec<u8>>);

impl ExpertSource for Resident {
    fn need(&mut self, _: u32, _: &[ExpertKey], _: &[ExpertKey]) -> Result<(), Stopped> {
        panic!("all is resident")
    }
    fn provided(&mut self) -> Result<Provided, Stopped> {
        panic!("all is resident")
    }
    fn slot(&self, slot: Slot) -> &[u8] {
        &self.0[slot.0 as usize]
    }
    fn released(&mut self, _: u32, _: u32) -> Result<(), Stopped> {
        panic!("all is resident")
    }
}

#[derive(Default)]
struct Seen {
    logits: Vec<Vec<f32>>,
    experts: BTreeMap<(u32, u32), u32>,
}

impl Capture for Seen {
    fn wants_logits(&self, _: u64) -> bool {
        true
    }
    fn logits(&mut self, _: u64, _: u32, logits: &[f32]) {
        self.logits.push(logits.to_vec());
    }
    fn routes(&mut self, _: u64, layer: u32, _: u32, experts: &[u32], _: &[f32]) {
        for &expert in experts {
            *self.experts.entry((layer, expert)).or_default() += 1;
        }
    }
}

#[test]
fn logits_are_finite_and_spread_and_experts_are_all_used() {
    let dir = tempfile::tempdir().unwrap();
    for family in SynthFamily::ALL {
        // Odd sizes; deep enough that a residual stream that grows without bound would show.
        let spec = SynthSpec {
            layers: 12,
            hidden: 72,
            heads: 6,
            kv_heads: 3,
            head_dim: 12,
            experts: 5,
            top_k: 2,
            tiers: vec![Tier { name: "all".into(), experts: 5, groups: 1, placement: Placement::Hot }],
            intermediate: 40,
            shared_intermediate: 24,
            vocab: 300,
            ..SynthSpec::of(family)
        };
        let path = dir.path().join(family.name());
        synth(&path, &spec).unwrap();
        let options =
            ModelOptions { threads: 2, isa: Isa::detect(), kv_dtype: None, ..ModelOptions::default() };
        let mut model = Model::open(Arc::new(Checkpoint::open(&path).unwrap()), options).unwrap();
        model.load_base(0).unwrap();
        model.load_routers().unwrap();
        let plan = model.plan(64, 1, Default::default()).unwrap();
        let (mut slots, mut table) = (Resident(vec![]), vec![]);
        for key in plan.experts(if family.is_mixture() { &[0] } else { &[] }) {
            let mut slot = vec![0; usize::try_from(plan.slot_bytes).unwrap()];
            model.expert_loader().load(key, &mut slot).unwrap();
            table.push((key, Slot(u32::try_from(slots.0.len()).unwrap())));
            slots.0.push(slot);
        }
        let mut cache = KvCache::new(&model, 1).unwrap();
        let step = first_step(&model, (3..63).map(|n| n * 4).collect(), Some(table));
        let mut seen = Seen::default();
        model.forward(&step, &mut cache, &mut Workspace::default(), &mut slots, Some(&mut seen)).unwrap();
        let all: Vec<f64> = seen.logits.iter().flatten().map(|&l| f64::from(l)).collect();
        assert_eq!(all.len(), 60 * 300);
        let deviation = (all.iter().map(|l| l * l).sum::<f64>() / all.len() as f64).sqrt();
        assert!((1.0..2.5).contains(&deviation), "{}: deviation {deviation}", family.name());
        let best: std::collections::BTreeSet<usize> = seen
            .logits
            .iter()
            .map(|row| (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b])).unwrap())
            .collect();
        assert!(best.len() > 20, "{}: only {} distinct choices", family.name(), best.len());
        let used = if family.is_mixture() { 12 * 5 } else { 0 };
        assert_eq!(seen.experts.len(), used, "{}: experts used", family.name());
    }
}
