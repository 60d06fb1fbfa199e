//! Decode and prefill of the synthetic OLMoE shape, every expert in memory. Throughput is in tokens.

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use lite_llm_benches::{Resident, olmoe_shape};
use std::hint::black_box;

fn decode(c: &mut Criterion) {
    let dir = olmoe_shape();
    for threads in [1, 2] {
        let mut model = Resident::load(&dir, threads);
        let prompt: Vec<u32> = (0..256).map(|i| 3 + i * 97 % 50000).collect();
        let mut group = c.benchmark_group(format!("olmoe/{threads} threads"));
        group.sample_size(10).sampling_mode(SamplingMode::Flat);
        group.throughput(Throughput::Elements(256));
        group.bench_function("prefill 256", |b| b.iter(|| black_box(model.step(0, &prompt))));
        group.throughput(Throughput::Elements(32));
        group.bench_function("decode 32", |b| {
            b.iter(|| {
                let mut token = 5;
                for position in 256..288 {
                    token = model.step(position, &[token]);
                }
                black_box(token)
            });
        });
        group.finish();
    }
}

criterion_group!(benches, decode);
criterion_main!(benches);
