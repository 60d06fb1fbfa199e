//! What a step allocates once the same step has been computed before. A binary of its own: its allocator counts.

use lite_llm_model::synth::{SynthFamily, SynthSpec, synth};
use lite_llm_model::{KvCache, Workspace};
use lite_llm_tests::harness::{Experts, How, PLAIN, first_step, open};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};
use std::alloc::System;

#[global_allocator]
static COUNTED: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// What core's selection of experts gives back: two lists for each position and mixture layer.
const LISTS_OF_A_ROUTE: usize = 2;
/// The choices of a step, and its results.
const LISTS_OF_A_STEP: usize = 2;
/// The candidates of a bucket.
const LISTS_OF_A_SAMPLE: usize = 1;

#[test]
fn a_warm_decode_step_allocates_routes_and_results_alone() {
    const LAYERS: u32 = 3;
    let dir = tempfile::tempdir().unwrap();
    let spec = SynthSpec { layers: LAYERS, ..SynthSpec::of(SynthFamily::Olmoe) };
    synth(dir.path(), &spec).unwrap();
    for (threads, temperature) in [(1, 0.0), (2, 0.0), (1, 1.0), (2, 1.0)] {
        let of_sample = if temperature > 0.0 { LISTS_OF_A_SAMPLE } else { 0 };
        let allowed = LISTS_OF_A_STEP + of_sample + LAYERS as usize * LISTS_OF_A_ROUTE;
        let model = open(dir.path(), How { threads, ..PLAIN });
        let mut experts = Experts::load(&model);
        let mut cache = KvCache::new(&model, 1).unwrap();
        let mut workspace = Workspace::default();
        let resident = experts.resident();
        let mut step = first_step(&model, vec![5, 6, 7, 8], Some(resident));
        step.rows[0].sample.as_mut().unwrap().sampling.temperature = temperature;
        model.forward(&step, &mut cache, &mut workspace, &mut experts, None).unwrap();
        let mut counts = Vec::new();
        for position in 4..12 {
            (step.rows[0].start, step.rows[0].tokens) = (position, vec![9]);
            let region = Region::new(COUNTED);
            model.forward(&step, &mut cache, &mut workspace, &mut experts, None).unwrap();
            let change = region.change();
            counts.push(change.allocations + change.reallocations);
        }
        // Threads of the pool have their first task at some time or other.
        let least = counts.iter().copied().min().unwrap();
        assert!(least <= allowed, "{threads} threads, {temperature}: {counts:?}, not {allowed}");
    }
}
