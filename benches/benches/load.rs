//! Experts from a native checkpoint into slots in each way, nothing cached, beside plain reading of the same files past the cache.

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use lite_llm_benches::{Experts, olmoe_native};
use lite_llm_hw::cold::Io;
use std::hint::black_box;
use std::time::{Duration, Instant};

fn load(c: &mut Criterion) {
    let experts = Experts::open(&olmoe_native());
    let mut group = c.benchmark_group("load");
    group.sample_size(10).sampling_mode(SamplingMode::Flat);
    group.throughput(Throughput::Bytes(experts.bytes()));
    for threads in [1, 2, 4] {
        group.bench_function(format!("O_DIRECT in order, {threads} readers"), |b| {
            b.iter_custom(|count| cold(count, &experts, || experts.read_directly(threads)));
        });
    }
    for (io, threads) in [(Io::Uring, &[1][..]), (Io::Pread, &[1, 2, 4]), (Io::Mmap, &[1, 2, 4])] {
        let way = experts.way(io);
        println!("{}", way.report());
        for &threads in threads {
            let name = if io == Io::Uring { io.to_string() } else { format!("{io}, {threads} loaders") };
            group.bench_function(name, |b| {
                b.iter_custom(|count| cold(count, &experts, || way.load(threads)));
            });
        }
    }
    group.finish();
}

fn cold(count: u64, experts: &Experts, mut run: impl FnMut() -> u64) -> Duration {
    let mut total = Duration::ZERO;
    for _ in 0..count {
        experts.drop_cached();
        let begun = Instant::now();
        black_box(run());
        total += begun.elapsed();
    }
    total
}

criterion_group!(benches, load);
criterion_main!(benches);
