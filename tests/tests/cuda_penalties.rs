//! Penalties for repetition on a GPU (`hw/src/cuda/model/ending.rs`), over a stand-in for the driver: logits are changed and tokens chosen
//! there, digests are of logits as they were. Nothing here has met a GPU.

use lite_llm_tests::gpu_machine::{Machine, folder};

fn machine() -> Option<Machine> {
    let mut machine = Machine::new(env!("CARGO_TARGET_TMPDIR"), "penalties on a stand-in for a GPU")?;
    machine.length = 9;
    Some(machine)
}

/// Lists of tokens grow past what they were rounded up to: steps are recorded again then, and not before.
#[test]
fn penalised_tokens_are_those_of_the_cpu_also_in_recorded_steps() {
    let Some(mut machine) = machine() else { return };
    (machine.length, machine.chosen) = (52, "40");
    for (seed, name) in ["olmoe", "llama"].into_iter().enumerate() {
        let (model, seed) = (folder("fixtures").join(name), seed.to_string());
        for how in [
            &["--repetition-penalty", "1.7"][..],
            &["--repetition-penalty", "0.6", "--temperature", "0.9"],
            &["--repetition-penalty", "1.3", "--temperature", "1.4", "--top-k", "30", "--top-p", "0.9"],
        ] {
            let plain = machine.expected(&model, &how[2..]);
            let expected = machine.expected(&model, how);
            assert_ne!(plain, expected, "{name} {how:?}: a penalty that changes something");
            let more = [how, &["--memory", "400MiB"]].concat();
            machine.check(&model, &more, &[("SEED", &seed)], &expected);
        }
    }
    machine.length = 9;
    let model = folder("fixtures/olmoe");
    let more = ["--memory", "300MiB", "--repetition-penalty", "1.3"];
    let [few, many] = [4, 30].map(|tokens| machine.tally(&model, &more, tokens));
    let more = |what: &str| many[what] - few[what];
    assert_eq!((more("penalise"), more("argmax")), (26, 26), "{few:?} {many:?}");
    // One copy each way, and one graph of all.
    assert_eq!((more("replay"), more("copy"), more("fetch")), (26, 26, 26), "{few:?} {many:?}");
    assert!(many["graph"] <= few["graph"] + 1, "{few:?} {many:?}");
}

/// Rows with penalties of their own beside rows without, experts that come and go: tokens and every digest.
#[test]
fn rows_have_penalties_of_their_own() {
    let Some(machine) = machine() else { return };
    let model = folder("fixtures/qwen3_moe");
    let ways = [
        "\"temperature\": 0.0",
        "\"temperature\": 0.9, \"repetition_penalty\": 1.3",
        "\"temperature\": 0.0, \"repetition_penalty\": 0.7",
        "\"temperature\": 0.9",
        "\"temperature\": 1.5, \"top_k\": 40, \"min_p\": 0.02, \"repetition_penalty\": 2.5",
    ];
    let least = (machine.least(&model, &["--cache-positions", "400"]) + (300 << 10)).to_string();
    let batch = |device: &str, memory: &str| machine.batch(&model, ways, 12, [device, memory]);
    let expected = batch("cpu", "300MiB");
    for memory in ["300MiB", &least] {
        assert_eq!(batch("cuda", memory), expected, "{memory}");
        machine.replay(&model);
    }
}
