//! Decode and prefill of the synthetic OLMoE shape, as bf16 and as integers, every expert in memory. Throughput is in tokens.

use criterion::{Criterion, SamplingMode, Throughput, criterion_group, criterion_main};
use lite_llm_benches::{Resident, olmoe_of_integers, olmoe_shape};
use lite_llm_model::kernels::Quantised;
use std::hint::black_box;
use std::path::Path;

fn decode(c: &mut Criterion) {
    of_model(c, "olmoe", &olmoe_shape());
    of_model(c, "olmoe q8", &olmoe_of_integers(Quantised::Q8));
    of_model(c, "olmoe q4", &olmoe_of_integers(Quantised::Q4));
}

fn of_model(c: &mut Criterion, name: &str, dir: &Path) {
    for threads in [1, 2] {
        let mut model = Resident::load(dir, threads);
        let prompt: Vec<u32> = (0..256).map(|i| 3 + i * 97 % 50000).collect();
        let mut group = c.benchmark_group(format!("{name}/{threads} threads"));
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
