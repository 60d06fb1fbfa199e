//! Simulated clusters of five nodes, all faults, checks and digests on: events of the world a second, on one core.

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use lite_llm_sim::cluster::run::{ClusterSetup, Report, run};

/// Seeds whose turn it is with the layouts of five nodes.
const SEEDS: [u64; 6] = [2, 3, 4, 7, 8, 9];

fn runs(real: bool) -> Vec<Report> {
    SEEDS.iter().map(|&seed| run(&ClusterSetup { real, ..ClusterSetup::of(seed) })).collect()
}

fn clusters(c: &mut Criterion) {
    let mut group = c.benchmark_group("clusters");
    group.sample_size(10);
    for (name, real) in [("digests", false), ("real arithmetic", true)] {
        let reports = runs(real);
        let sum = |of: fn(&Report) -> u64| reports.iter().map(of).sum::<u64>();
        let seconds = sum(|report| report.virtual_ns) / 1_000_000_000;
        println!(
            "{name}: {seconds} simulated seconds, {} inputs of ranks in each",
            sum(|report| report.inputs) / seconds
        );
        group.throughput(Throughput::Elements(sum(|report| report.events)));
        group.bench_function(name, |b| b.iter(|| runs(real)));
    }
    group.finish();
}

criterion_group!(benches, clusters);
criterion_main!(benches);
