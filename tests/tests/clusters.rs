//! Simulated clusters as a property: any layout, any faults, any seed. What fails is shrunk by proptest.

use lite_llm_sim::cluster::run::run;
use lite_llm_sim::cluster::strategy::clusters;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, max_shrink_iters: 200, rng_seed: RngSeed::Fixed(1), ..ProptestConfig::default() })]

    #[test]
    fn whatever_strikes_everything_accepted_ends_and_nothing_is_violated(setup in clusters()) {
        let report = run(&setup);
        prop_assert_eq!(report.violation, None);
        prop_assert_eq!(report.excuse, None);
    }
}
