//! A model that is shared out among ranks gives the bits of one machine, whatever the layout: tokens, logits, routes, digests.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::topology::Topology;
use lite_llm_model::Share;
use lite_llm_model::kernels::Isa;
use lite_llm_tests::harness::{How, PLAIN, every_form, open, run, run_shared};

const PROMPT: [u32; 9] = [265, 338, 449, 471, 56, 294, 193, 318, 99];
const STEPS: usize = 4;

const fn layout(tensor: u32, pipeline: u32, expert: u32) -> Topology {
    Topology { data: 1, tensor, pipeline, expert }
}

const LAYOUTS: [Topology; 8] = [
    layout(2, 1, 1),
    layout(4, 1, 1),
    layout(1, 2, 1),
    layout(1, 1, 2),
    layout(1, 1, 4),
    layout(2, 2, 1),
    layout(2, 1, 2),
    layout(2, 2, 2),
];

/// In short chunks, two sequences beside each other, and experts in waves.
const CUT: How = How { chunk: 4, threads: 1, isa: Isa::Scalar, resident: false, batch: 2 };

#[test]
fn every_layout_of_every_family_gives_the_bits_of_one_rank() {
    let mut compared = 0;
    for (name, dir) in every_form() {
        let whole = open(&dir, PLAIN);
        let tiers = [0];
        // Resident experts take another way; the last layout has all there is of it.
        let resident = &LAYOUTS[LAYOUTS.len() - 1..];
        for (how, layouts) in [(PLAIN, resident), (How { isa: Isa::detect(), ..CUT }, &LAYOUTS)] {
            let expected = run(&whole, &tiers, &PROMPT, STEPS, how);
            let (_, digests) = run_shared(&dir, Topology::SINGLE, &tiers, &PROMPT, STEPS, how);
            for &topology in layouts {
                if Share::check(&topology, whole.arch()).is_err() {
                    continue;
                }
                let (found, of_rows) = run_shared(&dir, topology, &tiers, &PROMPT, STEPS, how);
                assert!(found == expected, "{name}: {topology:?} gives other bits");
                assert_eq!(of_rows, digests, "{name}: {topology:?} gives other digests");
                compared += 1;
            }
        }
    }
    assert!(compared > 90, "only {compared} layouts fit a model");
}

#[test]
fn what_does_not_divide_is_refused_with_the_remedy() {
    let whole = open(&every_form().next().unwrap().1, PLAIN);
    let error = |topology| Share::check(&topology, whole.arch()).unwrap_err();
    assert!(
        error(layout(1, 9, 1)).contains("topology.pipeline is 9; the model has"),
        "{}",
        error(layout(1, 9, 1))
    );
    assert!(
        error(layout(7, 1, 1)).contains("topology.tensor is 7; the model has"),
        "{}",
        error(layout(7, 1, 1))
    );
}
