//! Clusters with the real arithmetic of a tiny model: under every fault, each stream has the tokens of one rank alone.

use lite_llm_core::topology::Topology;
use lite_llm_sim::cluster::run::{ClusterSetup, run};

fn real(seed: u64) -> ClusterSetup {
    ClusterSetup { real: true, duration_ns: 3_000_000_000, ..ClusterSetup::of(seed) }
}

#[test]
fn every_stream_is_that_of_one_rank_whatever_befalls_the_cluster() {
    let (mut tokens, mut faults) = (0, 0);
    for seed in 0..15 {
        let report = run(&real(seed));
        assert_eq!(report.violation, None, "seed {seed}");
        tokens += report.tokens;
        faults += report.decisions.len();
    }
    assert!(tokens > 1000 && faults > 500, "{tokens} tokens, {faults} faults");
    for (tensor, pipeline, expert) in [(4, 1, 1), (1, 1, 4), (2, 2, 2), (1, 4, 1)] {
        let topology = Topology { data: 1, tensor, pipeline, expert };
        let report = run(&ClusterSetup { topology, nodes: topology.nodes(), ..real(3) });
        assert_eq!(report.violation, None, "{topology}");
    }
}

#[test]
fn the_same_seed_gives_the_same_digest() {
    for seed in [2, 8] {
        let digests = [(); 2].map(|()| run(&real(seed)).digest);
        assert_eq!(digests[0], digests[1], "seed {seed}");
        let of_digests = ClusterSetup { real: false, ..real(seed) };
        assert_ne!(run(&of_digests).digest, digests[0], "another arithmetic gives other tokens");
    }
}
