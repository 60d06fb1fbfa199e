//! Native checkpoints: the same bits as their source, tiers that mask, imports that resume, damage that is found.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::ids::ExpertKey;
use lite_llm_model::checkpoint::import::{Imported, import};
use lite_llm_model::checkpoint::tiers::parse_tiers;
use lite_llm_model::kernels::Isa;
use lite_llm_model::{Checkpoint, Model, ModelOptions};
use lite_llm_tests::harness::{PLAIN, every_form, folder, open, oracle, run};
use proptest::prelude::*;
use std::fs;
use std::path::Path;
use std::sync::Arc;

const PROMPT: [u32; 9] = [265, 338, 449, 471, 56, 294, 193, 318, 99];

fn imported(name: &str, into: &Path, tiers: Option<&str>) -> Imported {
    imported_from(&folder(name), into, tiers)
}

fn imported_from(source: &Path, into: &Path, tiers: Option<&str>) -> Imported {
    let tiers = tiers.map(|spec| parse_tiers(spec).unwrap());
    import(source, into, tiers.as_ref(), 2, |_, _| {}).unwrap()
}

#[test]
fn an_import_has_the_digest_and_the_bits_of_its_source() {
    let prompt = PROMPT.map(|token| token % 64);
    for (name, source) in every_form() {
        let dir = tempfile::tempdir().unwrap();
        let native = dir.path().join("native");
        imported_from(&source, &native, None);
        let digest = |dir: &Path| Checkpoint::open(dir).unwrap().weights_digest(1).unwrap();
        assert_eq!(digest(&native), digest(&source), "{name}");
        let reference = run(&open(&source, PLAIN), &[0], &prompt, 6, PLAIN);
        assert_eq!(run(&open(&native, PLAIN), &[0], &prompt, 6, PLAIN), reference, "{name}");
    }
}

/// Quantised experts stay so, in slots and on disk.
#[test]
fn quantised_experts_are_not_blown_up() {
    for (name, bits) in [("mxfp4", 4.5), ("fp8", 8.25)] {
        let dir = tempfile::tempdir().unwrap();
        let native = dir.path().join("native");
        imported_from(&oracle(name), &native, None);
        for source in [oracle(name), native] {
            let model = open(&source, PLAIN);
            let arch = model.arch();
            let moe = arch.moe.as_ref().unwrap();
            let weights = 3 * arch.hidden.next_multiple_of(16) * moe.intermediate.next_multiple_of(16);
            let biases = 4 * (2 * moe.intermediate + arch.hidden);
            let most = (weights as f64 * bits / 8.0) as usize + biases;
            let slot = model.slot_bytes();
            assert!(slot <= most.next_multiple_of(4096), "{name}: {slot} bytes for {weights} weights");
        }
    }
}

#[test]
fn tiers_keep_the_bits_together_and_mask_apart() {
    let dir = tempfile::tempdir().unwrap();
    let native = dir.path().join("native");
    imported("olmoe", &native, Some("small:3,large:5:cold"));
    let model = open(&native, PLAIN);
    let reference = run(&open(&folder("olmoe"), PLAIN), &[0], &PROMPT, 6, PLAIN);
    assert_eq!(run(&model, &[0, 1], &PROMPT, 6, PLAIN), reference);
    for (tiers, range) in [(vec![0], 0..3), (vec![1], 3..8)] {
        let seen = run(&model, &tiers, &PROMPT, 6, PLAIN);
        assert!(
            seen.routes.values().all(|(experts, _)| experts.iter().all(|e| range.contains(e))),
            "{tiers:?}"
        );
        assert_ne!(seen, reference);
    }
}

#[test]
fn an_import_goes_on_where_it_was_cut() {
    let dir = tempfile::tempdir().unwrap();
    let (whole, again) = (dir.path().join("whole"), dir.path().join("again"));
    assert_eq!(imported("mixtral", &whole, None).kept, 0);
    imported("mixtral", &again, None);
    // As a crash leaves it: under the other name, one shard cut, the last note torn.
    let partial = dir.path().join("again.partial");
    fs::rename(&again, &partial).unwrap();
    fs::remove_file(partial.join("manifest.json")).unwrap();
    let bytes = fs::read(partial.join("experts-00001.bin")).unwrap();
    fs::write(partial.join("experts-00001.bin"), &bytes[..5000]).unwrap();
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(whole.join("manifest.json")).unwrap()).unwrap();
    let weights = Checkpoint::open(&whole).unwrap().weights_digest(1).unwrap().to_string();
    let note = |note: serde_json::Value| {
        let note = note.to_string();
        format!("{} {note}\n", blake3::hash(note.as_bytes()).to_hex())
    };
    let mut notes = note(serde_json::json!({ "Source": { "weights": weights, "tiers": manifest["tiers"] } }));
    notes += &note(serde_json::json!({ "Base": manifest["base"] }));
    for shard in manifest["experts"].as_array().unwrap() {
        notes += &note(serde_json::json!({ "Experts": shard }));
    }
    notes += "{\"Experts\":{\"file\":";
    fs::write(partial.join("progress.jsonl"), notes).unwrap();
    let report = imported("mixtral", &again, None);
    assert_eq!((report.kept, report.written), (3, 1));
    for entry in fs::read_dir(&whole).unwrap() {
        let name = entry.unwrap().file_name();
        assert_eq!(fs::read(whole.join(&name)).unwrap(), fs::read(again.join(&name)).unwrap(), "{name:?}");
    }
}

#[test]
fn what_cannot_be_imported_is_said() {
    let dir = tempfile::tempdir().unwrap();
    let native = dir.path().join("native");
    let refused = |source: &Path, tiers: Option<&str>| {
        let tiers = tiers.map(|spec| parse_tiers(spec).unwrap());
        import(source, &dir.path().join("other"), tiers.as_ref(), 1, |_, _| {}).unwrap_err().to_string()
    };
    assert!(
        refused(&folder("olmoe"), Some("a:4,b:5")).contains("the tiers have 9 experts, the checkpoint 8")
    );
    assert!(refused(&folder("none"), None).contains("config.json"));
    imported("olmoe", &native, None);
    assert!(refused(&native, None).contains("native checkpoint already"));
    let exists = import(&folder("olmoe"), &native, None, 1, |_, _| {}).unwrap_err().to_string();
    assert!(exists.contains("exists already"), "{exists}");
    for spec in ["", "a", "a:0", "a:x", "a:1:lukewarm", "a:1,a:2", ":3", "a:1:hot:x"] {
        assert!(parse_tiers(spec).is_err(), "{spec}");
    }
}

/// Loads everything; what it gives is either an error or the very bytes.
fn load_all(dir: &Path) -> Result<Vec<u8>, String> {
    let checkpoint = Checkpoint::open(dir).map_err(|e| e.to_string())?;
    let options = ModelOptions { threads: 1, isa: Isa::detect(), kv_dtype: None, ..ModelOptions::default() };
    let mut model = Model::open(Arc::new(checkpoint), options).map_err(|e| e.to_string())?;
    let plan = model.plan(16, 2, Default::default()).map_err(|e| e.to_string())?;
    plan.check()?;
    model.load_base(0).map_err(|e| e.to_string())?;
    model.load_routers().map_err(|e| e.to_string())?;
    let mut all = format!("{plan:?}").into_bytes();
    let tiers: Vec<u32> = (0..).zip(&plan.tiers).map(|(tier, _)| tier).collect();
    let mut slot = vec![0; usize::try_from(plan.slot_bytes).unwrap()];
    for key in plan.experts(&tiers).collect::<Vec<ExpertKey>>() {
        model.expert_loader().load(key, &mut slot).map_err(|e| e.to_string())?;
        all.extend_from_slice(&slot);
    }
    Ok(all)
}

/// Damages one byte, or cuts the file there; the result is an error or exactly what it was.
fn damage(dir: &Path, file: &str, at: usize, cut: bool, good: &[u8]) {
    let path = dir.join(file);
    let bytes = fs::read(&path).unwrap();
    let mut damaged = bytes.clone();
    if cut {
        damaged.truncate(at);
    } else {
        damaged[at] ^= 0x10;
    }
    fs::write(&path, &damaged).unwrap();
    if let Ok(found) = load_all(dir) {
        assert!(found == good, "{file}, byte {at}, cut {cut}: loaded other bytes without a word");
    }
    fs::write(&path, &bytes).unwrap();
}

#[test]
fn damage_is_found_or_harmless() {
    let dir = tempfile::tempdir().unwrap();
    let native = dir.path().join("native");
    imported("olmoe", &native, Some("small:3,large:5"));
    let good = load_all(&native).unwrap();
    for file in ["manifest.json", "config.json", "base.bin", "experts-00000.bin", "experts-00002.bin"] {
        let len = fs::read(native.join(file)).unwrap().len();
        for i in 0..48 {
            damage(&native, file, i * (len - 1) / 47, false, &good);
            damage(&native, file, i * (len - 1) / 47, true, &good);
        }
    }
}

#[test]
fn a_damaged_safetensors_header_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(folder("olmoe").join(name), dir.path().join(name)).unwrap();
    }
    let path = dir.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    let header = 8 + usize::try_from(u64::from_le_bytes(bytes[..8].try_into().unwrap())).unwrap();
    for at in (0..header).step_by(37) {
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x08;
        fs::write(&path, &damaged).unwrap();
        // A changed name, type or size is missed; a changed offset overlaps. Nothing panics.
        let _ = load_all(dir.path());
    }
    for at in [0, 4, 8, 100, header, header + 1000, bytes.len() - 1] {
        fs::write(&path, &bytes[..at]).unwrap();
        let error = load_all(dir.path()).unwrap_err();
        assert!(error.contains("model.safetensors"), "{error}");
    }
    let huge = [&u64::MAX.to_le_bytes()[..], &bytes[8..]].concat();
    fs::write(&path, huge).unwrap();
    assert!(load_all(dir.path()).is_err());
}

#[test]
fn configurations_that_are_not_computed_are_named() {
    let dir = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(folder("mixtral_sharded")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
    }
    let config: serde_json::Value =
        serde_json::from_slice(&fs::read(dir.path().join("config.json")).unwrap()).unwrap();
    let with = |key: &str, value: serde_json::Value| {
        let mut config = config.clone();
        config[key] = value;
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
        fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
        error
    };
    for (key, value, word) in [
        ("model_type", "mamba".into(), "this program knows deepseek_v2"),
        ("model_type", serde_json::Value::Null, "model_type: it is missing"),
        ("hidden_act", "gelu".into(), "hidden_act = gelu is not supported"),
        ("hidden_size", 0.into(), "hidden_size: it must not be 0"),
        ("hidden_size", (-4).into(), "hidden_size"),
        ("hidden_size", (1u64 << 40).into(), "hidden_size"),
        ("hidden_size", 128.into(), "has shape"),
        ("num_key_value_heads", 3.into(), "num_key_value_heads"),
        ("num_experts_per_tok", 9.into(), "num_experts_per_tok"),
        ("quantization_config", serde_json::json!({ "quant_method": "awq" }), "quantization_config = awq"),
        (
            "rope_parameters",
            serde_json::json!({ "rope_theta": 1e4, "rope_type": "axial" }),
            "rope_type = axial is not supported",
        ),
    ] {
        let error = with(key, value);
        assert!(
            error.contains(word) && error.contains("config.json") || error.contains("has shape"),
            "{error}"
        );
    }
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    fs::remove_file(dir.path().join("model-00003-of-00007.safetensors")).unwrap();
    let error = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("model-00003-of-00007.safetensors") && error.contains("complete"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn tier_specs_never_panic(spec in "[a-z:,0-9]{0,20}") {
        let _ = parse_tiers(&spec);
    }
}
