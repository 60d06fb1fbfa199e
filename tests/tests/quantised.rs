//! Checkpoints whose matrices are integers: the same bits however they are computed, logits near those of the same weights
//! as floats, and what an import makes of a source or refuses.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::digest::Digest;
use lite_llm_core::topology::Topology;
use lite_llm_model::Checkpoint;
use lite_llm_model::checkpoint::import::{Imported, Wanted, import};
use lite_llm_model::checkpoint::tiers::parse_tiers;
use lite_llm_model::kernels::quantise::{dequantise_row, quantise_row};
use lite_llm_model::kernels::{DType, Isa, Quantised};
use lite_llm_model::synth::{SynthFamily, SynthSpec, synth, synth_native};
use lite_llm_tests::harness::{GOLDEN, How, PLAIN, Seen, folder, open, oracle, run, run_shared};
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

const KINDS: [Quantised; 2] = [Quantised::Q8, Quantised::Q4];
const PROMPT: [u32; 24] = [
    265, 338, 449, 471, 56, 294, 193, 318, 99, 7, 500, 12, 480, 31, 222, 410, 5, 77, 301, 266, 18, 390, 141,
    64,
];

fn wanted<'a>(kind: Quantised) -> Wanted<'a> {
    Wanted { quantise: Some(kind), ..Wanted::default() }
}

fn imported(source: &Path, into: &Path, kind: Quantised) -> Imported {
    import(source, into, wanted(kind), 2, |_, _| {}).unwrap()
}

fn digest(dir: &Path) -> Digest {
    Checkpoint::open(dir).unwrap().weights_digest(1).unwrap()
}

/// Every file of a directory.
fn files(dir: &Path) -> BTreeMap<String, Vec<u8>> {
    let entries = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap());
    entries.map(|entry| (entry.file_name().into_string().unwrap(), fs::read(entry.path()).unwrap())).collect()
}

/// A Hugging Face directory of the values that a source's matrices become: routers and what is used transposed apart.
fn dequantised(source: &Path, into: &Path, kind: Quantised) {
    fs::create_dir(into).unwrap();
    fs::copy(source.join("config.json"), into.join("config.json")).unwrap();
    let bytes = fs::read(source.join("model.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let mut written = BTreeMap::new();
    for (name, view) in tensors.iter() {
        let mut values: Vec<f32> = match view.dtype() {
            Dtype::F32 => {
                view.data().as_chunks::<4>().0.iter().map(|&four| f32::from_le_bytes(four)).collect()
            }
            Dtype::BF16 => view
                .data()
                .as_chunks::<2>()
                .0
                .iter()
                .map(|&two| f32::from_bits(u32::from(u16::from_le_bytes(two)) << 16))
                .collect(),
            other => panic!("{name} is {other:?}"),
        };
        let kept = [".gate.weight", "_gate.weight", "kv_b_proj.weight"].iter().any(|end| name.ends_with(end));
        if let (&[_, columns], false) = (view.shape(), kept) {
            let mut stored = vec![0; kind.row_bytes(columns)];
            for row in values.chunks_exact_mut(columns) {
                quantise_row(kind, row, &mut stored).unwrap();
                dequantise_row(kind, &stored, row);
            }
        }
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        written.insert(name.to_owned(), (view.shape().to_vec(), bytes));
    }
    let views = written.iter().map(|(name, (shape, bytes))| {
        (name.as_str(), TensorView::new(Dtype::F32, shape.clone(), bytes).unwrap())
    });
    fs::write(into.join("model.safetensors"), safetensors::serialize(views, None).unwrap()).unwrap();
}

/// How far logits are from others, in units of the spread of those (root of the mean square of the differences at a position):
/// at the median position and at the worst; and how much better the others predict the prompt, in nats a token.
fn distance(a: &Seen, b: &Seen) -> (f64, f64, f64) {
    let (mut of_positions, mut loss) = (Vec::new(), 0.0);
    for (position, next) in (0u32..).zip(&PROMPT[1..]) {
        let [a, b] = [a, b].map(|seen| {
            let logits = seen.logits[&position].iter();
            logits.map(|&bits| f64::from(f32::from_bits(bits))).collect::<Vec<f64>>()
        });
        let nll = |logits: &[f64]| {
            logits.iter().map(|logit| logit.exp()).sum::<f64>().ln() - logits[*next as usize]
        };
        let (len, mean) = (b.len() as f64, b.iter().sum::<f64>() / b.len() as f64);
        let spread = (b.iter().map(|logit| (logit - mean).powi(2)).sum::<f64>() / len).sqrt();
        let apart = (a.iter().zip(&b).map(|(a, b)| (a - b).powi(2)).sum::<f64>() / len).sqrt();
        of_positions.push(apart / spread);
        loss += nll(&a) - nll(&b);
    }
    of_positions.sort_by(f64::total_cmp);
    let positions = of_positions.len();
    (of_positions[positions / 2], of_positions[positions - 1], loss / positions as f64)
}

/// What the quantisation of activations costs, against floats on the very weights; and what that of the weights costs beside
/// it, against the source. A router may select another expert where two are near each other, which is a jump: so the median
/// position is held, and every position of the dense model.
#[test]
fn logits_are_near_those_of_the_same_weights_as_floats() {
    let names = ["llama", "mixtral_bf16", "olmoe", "qwen2_moe", "qwen3_moe", "deepseek_v3", "glm4_moe"];
    let mut found = Vec::new();
    for name in names {
        for kind in KINDS {
            let dir = tempfile::tempdir().unwrap();
            let (native, floats) = (dir.path().join("native"), dir.path().join("floats"));
            imported(&folder(name), &native, kind);
            dequantised(&folder(name), &floats, kind);
            let seen =
                [&native, &floats, &folder(name)].map(|dir| run(&open(dir, PLAIN), &[0], &PROMPT, 1, PLAIN));
            let (of_integers, of_weights) = (distance(&seen[0], &seen[1]), distance(&seen[1], &seen[2]));
            println!("{name} {}: activations {of_integers:.4?}, weights {of_weights:.4?}", kind.name());
            found.push((name, kind, of_integers, of_weights));
        }
    }
    for (name, kind, (median, worst, loss), (of_weights, _, _)) in found {
        assert!(median > 0.0, "{name}: activations are quantised too");
        let every = if name == "llama" { 0.1 } else { f64::INFINITY };
        let near = median < 0.06 && worst < every && loss.abs() < 0.1;
        assert!(near, "{name} {kind:?}: {median} at the median, {worst} at most, {loss} nats");
        let most = if kind == Quantised::Q8 { 0.1 } else { 0.9 };
        assert!(of_weights < most, "{name} {kind:?}: {of_weights} of the weights");
    }
}

#[test]
fn bits_do_not_depend_on_how_they_are_computed() {
    let isas: Vec<Isa> = Isa::ALL.into_iter().filter(|isa| isa.available()).collect();
    for name in GOLDEN {
        for kind in KINDS {
            let dir = tempfile::tempdir().unwrap();
            let native = dir.path().join("native");
            imported(&folder(name), &native, kind);
            let reference = run(&open(&native, PLAIN), &[0], &PROMPT, 4, PLAIN);
            for &isa in &isas {
                for threads in [1, 2] {
                    let model = open(&native, How { threads, isa, ..PLAIN });
                    for (chunk, resident, batch) in [(1, false, 1), (7, true, 2), (64, false, 8)] {
                        let how = How { chunk, threads, isa, resident, batch };
                        assert_eq!(run(&model, &[0], &PROMPT, 4, how), reference, "{name} {kind:?}, {how:?}");
                    }
                }
            }
        }
    }
}

/// Ranks cut rows of whole tiles out of integers as out of floats.
#[test]
fn ranks_compute_what_one_machine_does() {
    let how = How { isa: Isa::detect(), ..PLAIN };
    for kind in KINDS {
        for name in ["olmoe", "gpt_oss"] {
            let dir = tempfile::tempdir().unwrap();
            let native = dir.path().join("native");
            imported(&folder(name), &native, kind);
            let reference = run(&open(&native, how), &[0], &PROMPT, 3, how);
            let topology = Topology { data: 1, tensor: 2, pipeline: 1, expert: 2 };
            let (seen, _) = run_shared(&native, topology, &[0], &PROMPT, 3, how);
            assert_eq!((seen.logits, seen.tokens), (reference.logits, reference.tokens), "{name} {kind:?}");
        }
    }
}

#[test]
fn integers_have_an_identity_and_a_size_of_their_own() {
    let spec = SynthSpec {
        dtype: DType::Bf16,
        hidden: 128,
        intermediate: 96,
        ..SynthSpec::of(SynthFamily::Qwen2Moe)
    };
    let dir = tempfile::tempdir().unwrap();
    let source = dir.path().join("source");
    let floats = synth(&source, &spec).unwrap().bytes as f64;
    let mut digests = vec![digest(&source)];
    for (kind, bits) in [(Quantised::Q8, 8.5), (Quantised::Q4, 4.5)] {
        let native = dir.path().join(kind.name());
        let bytes = imported(&source, &native, kind).bytes as f64;
        assert!(bytes < floats * bits / 16.0 * 1.4, "{bytes} of {floats}");
        let (of_slot, weights) = (open(&native, PLAIN).slot_bytes(), 3.0 * 128.0 * 96.0);
        assert!(of_slot as f64 <= weights * bits / 8.0 + 4096.0, "{of_slot}");
        digests.push(digest(&native));
        let tiers = parse_tiers("core:4,rest:rest:cold").unwrap();
        let divided = dir.path().join(format!("{}-tiers", kind.name()));
        import(&source, &divided, Wanted { division: Some(&tiers), ..wanted(kind) }, 1, |_, _| {}).unwrap();
        assert_eq!(digest(&divided), digest(&native), "tiers are no part of the weights");
    }
    digests.sort();
    digests.dedup();
    assert_eq!(digests.len(), 3);
}

/// What is drawn while it is written has the bytes of what was written before, whatever the family, with tiers or without.
#[test]
fn synthesised_integers_are_those_of_an_import() {
    for family in SynthFamily::ALL {
        for (kind, dtype, tiers) in [(Quantised::Q8, DType::Bf16, true), (Quantised::Q4, DType::F32, false)] {
            // No multiple of 32 anywhere, and matrices of more than one piece.
            let spec = SynthSpec {
                dtype,
                layers: 2,
                hidden: 72,
                heads: 6,
                kv_heads: 3,
                head_dim: 12,
                intermediate: 52,
                vocab: 700,
                ..SynthSpec::of(family)
            };
            let spec = SynthSpec { kv_heads: if family == SynthFamily::Olmoe { 6 } else { 3 }, ..spec };
            let divides = tiers && family.is_mixture() && family != SynthFamily::TieredMoe;
            let division = divides.then(|| parse_tiers("small:@1+5+7,large:rest:cold").unwrap());
            let wanted = Wanted { division: division.as_ref(), ..wanted(kind) };
            let dir = tempfile::tempdir().unwrap();
            let (source, one, other) =
                (dir.path().join("source"), dir.path().join("one"), dir.path().join("other"));
            let report = synth(&source, &spec).unwrap();
            import(&source, &one, wanted, 2, |_, _| {}).unwrap();
            fs::remove_dir_all(&source).unwrap();
            let drawn = synth_native(&other, &spec, wanted, 3, |_, _| {}).unwrap();
            assert_eq!(files(&other), files(&one), "{family:?} {kind:?}");
            assert_eq!((drawn.tensors, drawn.parameters), (report.tensors, report.parameters));
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "nothing is left beside them");
            let how = How { isa: Isa::detect(), ..PLAIN };
            assert_eq!(run(&open(&other, how), &[0], &PROMPT, 2, how).tokens.len(), 2);
        }
    }
}

/// Killed after any file, the same command goes on; another kind begins anew.
#[test]
fn an_import_of_integers_goes_on_where_it_was_cut() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, again) = (dir.path().join("whole"), dir.path().join("again"));
    imported(&folder("olmoe"), &whole, Quantised::Q8);
    // As a crash leaves it after the last note.
    let partial = dir.path().join("again.partial");
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(whole.join("manifest.json")).unwrap()).unwrap();
    let weights = digest(&folder("olmoe")).to_string();
    let note = |note: serde_json::Value| {
        let note = note.to_string();
        format!("{} {note}\n", blake3::hash(note.as_bytes()).to_hex())
    };
    let source = serde_json::json!({ "weights": weights, "tiers": manifest["tiers"], "quantise": "q8" });
    let mut notes = note(serde_json::json!({ "Source": source }));
    notes += &note(serde_json::json!({ "Base": manifest["base"] }));
    for shard in manifest["experts"].as_array().unwrap() {
        notes += &note(serde_json::json!({ "Experts": shard }));
    }
    let leave = |damaged: Option<&str>| {
        fs::create_dir(&partial).unwrap();
        for (name, mut bytes) in files(&whole) {
            if damaged == Some(&*name) {
                bytes[100] ^= 1;
            }
            fs::write(partial.join(name), bytes).unwrap();
        }
        fs::remove_file(partial.join("manifest.json")).unwrap();
        fs::write(partial.join("progress.jsonl"), &notes).unwrap();
    };
    let shards = 1 + manifest["experts"].as_array().unwrap().len();
    for (damaged, kept) in
        [(None, shards), (Some("base.bin"), shards - 1), (Some("experts-00001.bin"), shards - 1)]
    {
        leave(damaged);
        let report = imported(&folder("olmoe"), &again, Quantised::Q8);
        assert_eq!((report.kept, report.written), (kept, shards - kept), "{damaged:?}");
        assert_eq!(files(&again), files(&whole), "{damaged:?}");
        fs::remove_dir_all(&again).unwrap();
    }
    leave(None);
    assert_eq!(imported(&folder("olmoe"), &again, Quantised::Q4).kept, 0);
}

#[test]
fn what_cannot_be_quantised_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    let refused =
        |source: &Path| import(source, &target, wanted(Quantised::Q8), 1, |_, _| {}).unwrap_err().to_string();
    for name in ["fp8", "mxfp4"] {
        let error = refused(&oracle(name));
        assert!(error.contains("quantised already") && error.contains("without --quantise q8"), "{error}");
    }
    let native = dir.path().join("native");
    imported(&folder("llama"), &native, Quantised::Q4);
    assert!(refused(&native).contains("native checkpoint already"));
    // A weight that is no number.
    let source = dir.path().join("source");
    synth(&source, &SynthSpec { layers: 1, ..SynthSpec::of(SynthFamily::Mixtral) }).unwrap();
    let path = source.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.len() - 4;
    bytes[at..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(&path, bytes).unwrap();
    let error = refused(&source);
    assert!(error.contains("row 511 of lm_head.weight, column 127 is NaN"), "{error}");
    assert!(!target.exists());
}

/// Damage is found, and a manifest that says what cannot be is refused.
#[test]
fn damaged_integers_are_found() {
    let dir = tempfile::tempdir().unwrap();
    let native = dir.path().join("native");
    imported(&folder("olmoe"), &native, Quantised::Q8);
    let base = native.join("base.bin");
    let mut bytes = fs::read(&base).unwrap();
    bytes[70] ^= 4;
    fs::write(&base, &bytes).unwrap();
    let checkpoint = Checkpoint::open(&native).unwrap();
    assert!(checkpoint.verify_base().unwrap_err().to_string().contains("checksum"));
    bytes[70] ^= 4;
    fs::write(&base, &bytes[..bytes.len() - 4096]).unwrap();
    let error = Checkpoint::open(&native).unwrap_err().to_string();
    assert!(error.contains("beyond the end of the file"), "{error}");
}
