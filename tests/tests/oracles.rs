//! Every golden checkpoint against what Hugging Face transformers gives for it, and against itself: the bits must not
//! depend on chunking, batch, threads, instruction set or the order in which experts come.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{ExpertKey, Generation, Slot, StepId};
use lite_llm_core::input::{RowResult, Sampling};
use lite_llm_core::output::{Forward, Row, SampleSpec};
use lite_llm_model::kernels::{DType, Isa};
use lite_llm_model::tokenizer::{Message, Tokenizer};
use lite_llm_model::{Capture, Checkpoint, ExpertSource, KvCache, Model, ModelOptions, Provided, Stopped};
use safetensors::SafeTensors;
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

const FOLDERS: [&str; 8] = [
    "llama",
    "mixtral",
    "mixtral_bf16",
    "mixtral_sharded",
    "olmoe",
    "qwen2_moe",
    "qwen3_moe",
    "qwen3_moe_bf16",
];

fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("fixtures").join(name)
}

/// How a run is cut and computed. None of it may change a bit.
#[derive(Clone, Copy, Debug)]
struct How {
    chunk: usize,
    threads: usize,
    isa: Isa,
    resident: bool,
    batch: usize,
}

const PLAIN: How = How { chunk: 64, threads: 1, isa: Isa::Scalar, resident: true, batch: 1 };

fn open(dir: &Path, how: How) -> Model {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let options =
        ModelOptions { threads: how.threads, isa: how.isa, kv_dtype: Some(DType::F32), routing_seed: 0 };
    let mut model = Model::open(Arc::new(checkpoint), options).unwrap();
    model.load_base(0).unwrap();
    model.load_routers().unwrap();
    model
}

/// Every expert in a slot of its own; hands them out in waves of three, last first.
struct Experts {
    slots: Vec<Vec<u8>>,
    table: Vec<(ExpertKey, Slot)>,
    wanted: Vec<ExpertKey>,
    wave: u32,
    wave_len: u32,
}

impl Experts {
    fn load(model: &Model) -> Self {
        let loader = model.expert_loader();
        let plan = model.plan(64, 8, Digest::default()).unwrap();
        let mut this = Self { slots: vec![], table: vec![], wanted: vec![], wave: 0, wave_len: 0 };
        for key in plan.experts(&[0]) {
            let mut slot = vec![0; usize::try_from(plan.slot_bytes).unwrap()];
            loader.load(key, &mut slot).unwrap();
            this.table.push((key, Slot(u32::try_from(this.slots.len()).unwrap())));
            this.slots.push(slot);
        }
        this
    }
}

impl ExpertSource for Experts {
    fn need(&mut self, _: u32, experts: &[ExpertKey]) -> Result<(), Stopped> {
        assert!(self.wanted.is_empty() && experts.is_sorted());
        self.wanted = experts.to_vec();
        (self.wave, self.wave_len) = (0, u32::try_from(experts.len().min(3)).unwrap());
        Ok(())
    }
    fn provided(&mut self) -> Result<Provided, Stopped> {
        let expert = self.wanted.pop().unwrap();
        let at = self.table.binary_search_by_key(&expert, |&(key, _)| key).unwrap();
        Ok(Provided { wave: self.wave, wave_len: self.wave_len, expert, slot: self.table[at].1 })
    }
    fn slot(&self, slot: Slot) -> &[u8] {
        &self.slots[slot.0 as usize]
    }
    fn released(&mut self, _: u32, wave: u32) -> Result<(), Stopped> {
        assert_eq!(wave, self.wave);
        self.wave += 1;
        self.wave_len = u32::try_from(self.wanted.len().min(3)).unwrap();
        Ok(())
    }
}

/// What a run shows.
#[derive(Clone, Debug, Default, PartialEq)]
struct Seen {
    logits: BTreeMap<u32, Vec<u32>>,
    routes: BTreeMap<(u32, u32), (Vec<u32>, Vec<u32>)>,
    tokens: Vec<u32>,
}

impl Capture for Seen {
    fn wants_logits(&self, request: u64) -> bool {
        request == 0
    }
    fn logits(&mut self, _: u64, position: u32, logits: &[f32]) {
        self.logits.insert(position, logits.iter().map(|l| l.to_bits()).collect());
    }
    fn routes(&mut self, request: u64, layer: u32, position: u32, experts: &[u32], weights: &[f32]) {
        if request == 0 {
            let bits = weights.iter().map(|w| w.to_bits()).collect();
            self.routes.insert((layer, position), (experts.to_vec(), bits));
        }
    }
}

/// Runs a prompt greedily as request 0, beside other requests with other prompts.
fn run(model: &Model, prompt: &[u32], steps: usize, how: How) -> Seen {
    let mut cache = KvCache::new(model, 3 * u32::try_from(how.batch).unwrap()).unwrap();
    let mut experts = Experts::load(model);
    let table = experts.table.clone();
    let mut sequences: Vec<Vec<u32>> = (0..how.batch)
        .map(|r| prompt.iter().map(|t| (t + 13 * u32::try_from(r).unwrap()) % 512).collect())
        .collect();
    let mut computed = 0;
    let mut seen = Seen::default();
    while seen.tokens.len() < steps {
        let end = sequences[0].len().min(computed + how.chunk);
        let rows: Vec<Row> = (0u32..)
            .zip(&sequences)
            .map(|(r, sequence)| Row {
                request: u64::from(r),
                start: u32::try_from(computed).unwrap(),
                tokens: sequence[computed..end].to_vec(),
                pages: vec![3 * r + 2, 3 * r, 3 * r + 1],
                sample: (end == sequence.len()).then(|| SampleSpec {
                    sampling: Sampling::default(),
                    draw: 0,
                    history: vec![],
                }),
            })
            .collect();
        let step = Forward {
            step: StepId(0),
            attempt: 0,
            generation: Generation(0),
            tiers: vec![0],
            rows,
            resident: how.resident.then(|| table.clone()),
        };
        let results: Vec<RowResult> =
            model.forward(&step, &mut cache, &mut experts, Some(&mut seen)).unwrap();
        computed = end;
        for (sequence, result) in sequences.iter_mut().zip(&results) {
            sequence.extend(result.token);
        }
        seen.tokens.extend(results[0].token);
    }
    seen
}

fn json(dir: &Path, file: &str) -> Value {
    serde_json::from_slice(&std::fs::read(dir.join(file)).unwrap()).unwrap()
}

fn numbers(value: &Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|n| u32::try_from(n.as_u64().unwrap()).unwrap()).collect()
}

fn floats(tensors: &SafeTensors<'_>, name: &str) -> Vec<f32> {
    let data = tensors.tensor(name).unwrap().data().to_vec();
    data.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect()
}

/// One prompt of a folder against its oracle.
fn check(name: &str, seen: &Seen, p: usize, oracle: &Value, tensors: &SafeTensors<'_>) {
    let prompt = numbers(&oracle["prompts"][p]);
    assert_eq!(seen.tokens, numbers(&oracle["greedy"][p]["tokens"]), "{name}, prompt {p}: greedy tokens");
    let vocab = 512;
    let expected = floats(tensors, &format!("prompt{p}.logits"));
    let greedy = floats(tensors, &format!("prompt{p}.greedy_logits"));
    let mut worst = 0.0f32;
    for position in 0..prompt.len() + 23 {
        let row = if position < prompt.len() {
            &expected[position * vocab..][..vocab]
        } else {
            &greedy[(position + 1 - prompt.len()) * vocab..][..vocab]
        };
        for (bits, expected) in seen.logits[&u32::try_from(position).unwrap()].iter().zip(row) {
            worst = worst.max((f32::from_bits(*bits) - expected).abs());
        }
    }
    assert!(worst < 2e-4, "{name}, prompt {p}: logits differ by {worst}");
    for (layer, routes) in oracle["router"][p].as_object().into_iter().flatten() {
        let layer: u32 = layer.parse().unwrap();
        for position in 0..prompt.len() {
            let (experts, weights) = &seen.routes[&(layer, u32::try_from(position).unwrap())];
            assert_eq!(*experts, numbers(&routes["ids"][position]), "{name}: experts of layer {layer}");
            for (bits, expected) in weights.iter().zip(routes["weights"][position].as_array().unwrap()) {
                let difference = f64::from(f32::from_bits(*bits)) - expected.as_f64().unwrap();
                assert!(difference.abs() < 3e-5, "{name}: weights of layer {layer} differ by {difference}");
            }
        }
    }
}

fn check_folder(name: &str, dir: &Path) {
    let (oracle, bytes) = (json(dir, "oracle.json"), std::fs::read(dir.join("oracle.safetensors")).unwrap());
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let model = open(dir, PLAIN);
    for p in 0..3 {
        let seen = run(&model, &numbers(&oracle["prompts"][p]), 24, PLAIN);
        check(name, &seen, p, &oracle, &tensors);
    }
}

#[test]
fn every_family_gives_what_transformers_gives() {
    for name in FOLDERS {
        check_folder(name, &folder(name));
    }
}

#[test]
fn the_spelling_of_the_hub_is_read_too() {
    for name in FOLDERS {
        let dir = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(folder(name)).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
        std::fs::rename(dir.path().join("config_v4.json"), dir.path().join("config.json")).unwrap();
        check_folder(name, dir.path());
    }
}

#[test]
fn bits_do_not_depend_on_how_they_are_computed() {
    let isas = if Isa::Avx2.available() { vec![Isa::Scalar, Isa::Avx2] } else { vec![Isa::Scalar] };
    for name in FOLDERS {
        let dir = folder(name);
        let prompt = numbers(&json(&dir, "oracle.json")["prompts"][2]);
        let reference = run(&open(&dir, PLAIN), &prompt, 8, PLAIN);
        for &isa in &isas {
            for threads in [1, 2] {
                let model = open(&dir, How { threads, isa, ..PLAIN });
                for (chunk, resident, batch) in [(1, false, 1), (7, true, 2), (64, false, 8), (13, false, 3)]
                {
                    let how = How { chunk, threads, isa, resident, batch };
                    assert_eq!(run(&model, &prompt, 8, how), reference, "{name}, {how:?}");
                }
            }
        }
    }
}

#[test]
fn shards_and_one_file_have_one_digest() {
    let digest = |name: &str| Checkpoint::open(&folder(name)).unwrap().weights_digest(2).unwrap();
    assert_eq!(digest("mixtral"), digest("mixtral_sharded"));
    assert_ne!(digest("mixtral"), digest("mixtral_bf16"));
}

#[test]
fn tokenizers_and_templates_give_what_transformers_gives() {
    for name in ["mixtral", "qwen3_moe"] {
        let dir = folder(name);
        let tokenizer = Tokenizer::open(&dir).unwrap().unwrap();
        let oracle = json(&dir, "tokenizer_oracle.json");
        for text in oracle["texts"].as_array().unwrap() {
            let ids = numbers(&text["ids"]);
            assert_eq!(tokenizer.encode(text["text"].as_str().unwrap()).unwrap(), ids, "{name}: {text}");
            assert_eq!(tokenizer.decode(&ids).unwrap(), text["decoded_skip_special"].as_str().unwrap());
        }
        for chat in oracle["chats"].as_array().unwrap() {
            let messages: Vec<Message> = serde_json::from_value(chat["messages"].clone()).unwrap();
            let open = chat["add_generation_prompt"].as_bool().unwrap();
            let text = tokenizer.chat_text(&messages, open).unwrap();
            assert_eq!(text, chat["text"].as_str().unwrap(), "{name}");
            if open {
                assert_eq!(tokenizer.chat(&messages).unwrap(), numbers(&chat["ids"]), "{name}");
            }
        }
    }
}
