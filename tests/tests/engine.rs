//! The engine on a simulated machine: crashes, faults, switches, small arenas; every stream against its reference.

use lite_llm_sim::machine::{Report, Scenario, run};
use proptest::prelude::*;

/// Seeds of the plain run; `SEEDS` asks for more.
fn seeds() -> u64 {
    std::env::var("SEEDS").ok().and_then(|seeds| seeds.parse().ok()).unwrap_or(300)
}

#[test]
fn streams_survive_everything_and_every_branch_is_taken() {
    let mut total = Report::default();
    for seed in 0..seeds() {
        let report = run(&Scenario::of(seed));
        total.inputs += report.inputs;
        total.crashes += report.crashes;
        total.tokens += report.tokens;
        total.complete += report.complete;
        total.switches += report.switches;
        total.preempted += report.preempted;
        total.modified += report.modified;
        total.retired += report.retired;
        total.waves += report.waves;
        total.retries += report.retries;
        total.staged += report.staged;
        total.promoted += report.promoted;
        total.demoted += report.demoted;
        total.restored += report.restored;
    }
    println!("{total:#?}");
    // A branch that the seeds never take is not tested.
    for (name, count) in [
        ("crashes", total.crashes),
        ("tokens", total.tokens),
        ("complete", total.complete),
        ("switches", total.switches),
        ("preempted", total.preempted),
        ("modified", total.modified),
        ("retired", total.retired),
        ("waves", total.waves),
        ("retries", total.retries),
        ("staged", total.staged),
        ("promoted", total.promoted),
        ("demoted", total.demoted),
        ("restored", total.restored),
    ] {
        assert!(count > 0, "no seed ever had {name}");
    }
}

#[test]
fn the_same_seed_gives_the_same_digest() {
    for seed in [1, 7, 99] {
        assert_eq!(run(&Scenario::of(seed)), run(&Scenario::of(seed)));
    }
    assert_ne!(run(&Scenario::of(1)).digest, run(&Scenario::of(2)).digest);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_seed_holds(seed: u64) {
        let _ = run(&Scenario::of(seed));
    }
}
