//! SIGKILL at pseudo-random moments of real processes, until the stream ends: it is that of an undisturbed run.
//!
//! 20 crashes in the normal run; `CRASHES=100 cargo test -p lite-llm-tests --test crash_loop` is the full loop, and
//! `CRASH_SEED` gives other moments.

use lite_llm_tests::command::{Place, Ran, parse_stream};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::io::Read;
use std::time::{Duration, Instant};

/// Crashes of one request; then it may end, and another begins.
const CRASHES_OF_ONE: u32 = 10;

fn number(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

/// A request that goes through everything: prefill in chunks, sampling, snapshots, switches, loads on demand.
fn arguments(seed: u64) -> Vec<String> {
    let map = json!([
        { "from": 0, "tiers": ["small"] },
        { "from": 90, "tiers": ["small", "large"] },
        { "from": 200, "tiers": ["large"] },
    ]);
    let prompt: Vec<String> = (0..60).map(|i| (3 + (i * 37 + seed) % 500).to_string()).collect();
    let seed = seed.to_string();
    let map = map.to_string();
    let prompt = prompt.join(",");
    [
        "run",
        "m",
        "--prompt-tokens",
        &prompt,
        "--max-tokens",
        "300",
        "--ignore-eos",
        "--temperature",
        "1",
        "--repetition-penalty",
        "1.1",
        "--seed",
        &seed,
        "--prefill-chunk",
        "16",
        "--snapshot-every",
        "500",
        "--generations",
        &map,
        "--stream",
        "--json",
    ]
    .map(String::from)
    .to_vec()
}

fn tokens(result: &Value) -> Vec<u64> {
    result["tokens"].as_array().unwrap().iter().map(|token| token.as_u64().unwrap()).collect()
}

/// Runs to the end undisturbed: the result, and how long it took.
fn reference(place: &Place, seed: u64) -> (Value, Duration) {
    let begun = Instant::now();
    let ran = place.run(arguments(seed));
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    let (_, result) = parse_stream(&ran.stdout);
    (result.unwrap(), begun.elapsed())
}

/// One life: killed after `delay`, unless it ends before.
fn live(place: &Place, arguments: &[String], delay: Option<Duration>) -> Ran {
    let mut child = place.command(arguments).spawn().unwrap();
    let Some(delay) = delay else { return child.wait_with_output().unwrap().into() };
    let mut stdout = child.stdout.take().unwrap();
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).unwrap();
        text
    });
    std::thread::sleep(delay);
    child.kill().unwrap();
    let ended: Ran = child.wait_with_output().unwrap().into();
    Ran { stdout: reader.join().unwrap(), ..ended }
}

/// Kills a request again and again; everything that any life tells must be of the reference. Returns the crashes.
fn crash(place: &Place, seed: u64, crashes: u32, rng: &mut ChaCha8Rng) -> u32 {
    let (expected, whole) = reference(place, seed);
    let all = tokens(&expected);
    let state = format!("state-{seed}");
    let mut arguments = arguments(seed);
    arguments.extend(["--state", &state, "--request-id", "crashing"].map(String::from));
    let mut told: BTreeMap<u64, u64> = BTreeMap::new();
    let mut done = 0;
    let mut early = 0;
    loop {
        // A little more than a whole run, so that shutdown and what comes after the end are hit, too.
        let delay = whole.mul_f64(f64::from(rng.next_u32() % 1100) / 1000.0);
        let ran = live(place, &arguments, (done + early < crashes).then_some(delay));
        assert!(!ran.stderr.contains("panicked"), "{}", ran.stderr);
        let (offsets, result) = parse_stream(&ran.stdout);
        for (at, (offset, token)) in (0..).zip(&offsets) {
            assert_eq!(at, *offset, "offsets are dense");
            assert_eq!(all[usize::try_from(*offset).unwrap()], *token, "token {offset} of seed {seed}");
            told.insert(*offset, *token);
        }
        match ran.code {
            None => done += 1,
            Some(code) => {
                assert_eq!(code, 0, "{}", ran.stderr);
                let result = result.unwrap();
                assert_eq!(tokens(&result), all);
                assert_eq!(result["generations"], expected["generations"]);
                assert_eq!(result["finish_reason"], "length");
                if done + early >= crashes {
                    break;
                }
                // It ended before its kill: the next life finds a finished request.
                early += 1;
            }
        }
    }
    assert_eq!(told.len(), all.len(), "nothing is lost");
    let control = place.run(["replay", &state, "--json"]).json();
    let full = place.run(["replay", &state, "--full", "m", "--json"]).json();
    assert_eq!(control["state_digest"], full["state_digest"]);
    done
}

#[test]
fn killed_anywhere_the_same_bits_come_back() {
    let place = Place::new();
    let spec = [
        "synth",
        "m",
        "--family",
        "olmoe",
        "--layers",
        "3",
        "--hidden",
        "64",
        "--heads",
        "4",
        "--experts",
        "16",
        "--tiers",
        "small:8,large:8:cold",
    ];
    assert_eq!(place.run(spec).code, Some(0));
    let crashes = u32::try_from(number("CRASHES", 20)).unwrap();
    let mut rng = ChaCha8Rng::seed_from_u64(number("CRASH_SEED", 1));
    let mut seed = 0;
    let mut left = crashes;
    while left > 0 {
        left = left.saturating_sub(crash(&place, seed, left.min(CRASHES_OF_ONE), &mut rng).max(1));
        seed += 1;
    }
}
