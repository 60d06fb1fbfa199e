//! The kernels of the numeric contract on one and two threads: what `docs/performance.md` reports.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lite_llm_hw::bandwidth::sum_of_streams;
use lite_llm_model::kernels::{
    AttentionParams, DType, Isa, KvPage, KvShape, PAGE_POSITIONS, PackedView, PagedKv, Pool, Quantised,
    Storage, attention, linear, math, packed_len, rms_norm, sample,
};
use std::hint::black_box;

const THREADS: [usize; 2] = [1, 2];

/// Values in (-1, 1) from a counter.
fn values(len: usize) -> Vec<f32> {
    (0..len as u32).map(|i| i.wrapping_mul(2_654_435_761) as i32 as f32 / 2_147_483_648.0).collect()
}

/// Bytes that are small finite numbers in every storage.
fn weights(storage: Storage, outputs: usize, inputs: usize) -> Vec<u8> {
    let len = packed_len(storage, outputs, inputs).expect("the shape is small");
    let size = storage.dtype().bytes();
    (0..len).map(|i| if i % size == size - 1 { 0x3c } else { i as u8 & 0x3f }).collect()
}

const STORAGES: [(&str, Storage); 7] = [
    ("bf16", Storage::Plain(DType::Bf16)),
    ("f16", Storage::Plain(DType::F16)),
    ("f32", Storage::Plain(DType::F32)),
    ("mxfp4", Storage::Mxfp4),
    ("e4m3", Storage::E4m3),
    ("q8", Storage::Grouped(Quantised::Q8)),
    ("q4", Storage::Grouped(Quantised::Q4)),
];

/// What decode is held against: memory, read once.
fn memory(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("memory");
    let all: Vec<u64> = (0..1 << 27).collect();
    for threads in THREADS {
        group.throughput(Throughput::Bytes(size_of_val(&*all) as u64));
        for (name, read) in
            [("one stream", sum_of_streams::<1> as fn(&_) -> _), ("four", sum_of_streams::<4>)]
        {
            group.bench_function(BenchmarkId::new(name, threads), |bencher| {
                bencher.iter(|| {
                    std::thread::scope(|scope| {
                        for part in all.chunks(all.len() / threads) {
                            scope.spawn(move || black_box(read(part)));
                        }
                    });
                });
            });
        }
    }
    group.finish();
}

/// A decode step reads every weight once: matrices rotate through more memory than any cache has.
fn gemv(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gemv");
    let (outputs, inputs) = (2048, 2048);
    for (name, storage) in STORAGES {
        let one = packed_len(storage, outputs, inputs).expect("the shape is small");
        let all = weights(storage, outputs * ((512 << 20) / one), inputs);
        let x = values(inputs);
        let mut out = vec![0.0; outputs];
        for threads in THREADS {
            let pool = Pool::new(threads);
            let mut matrices = all.chunks_exact(one).cycle();
            group.throughput(Throughput::Bytes(one as u64));
            group.bench_function(BenchmarkId::new(name, threads), |bencher| {
                bencher.iter(|| {
                    let bytes = matrices.next().expect("the cycle has no end");
                    let view =
                        PackedView::new(storage, outputs, inputs, bytes).expect("the length is the shape's");
                    linear(&pool, Isa::detect(), black_box(&x), 1, &view, None, &mut out);
                });
            });
        }
    }
    group.finish();
}

/// A prefill: one matrix for many rows. An expert of a mixture sees few of them.
fn gemm(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("gemm");
    let (outputs, inputs) = (1024, 2048);
    for (name, storage) in STORAGES {
        let bytes = weights(storage, outputs, inputs);
        let view = PackedView::new(storage, outputs, inputs, &bytes).expect("the length is the shape's");
        for rows in [4, 32, 256] {
            let x = values(rows * inputs);
            let mut out = vec![0.0; rows * outputs];
            group.throughput(Throughput::Elements((2 * rows * outputs * inputs) as u64));
            for threads in THREADS {
                let pool = Pool::new(threads);
                group.bench_function(BenchmarkId::new(format!("{name}/{rows}"), threads), |bencher| {
                    bencher.iter(|| linear(&pool, Isa::detect(), black_box(&x), rows, &view, None, &mut out));
                });
            }
        }
    }
    group.finish();
}

/// 16 heads of 128: one position after 2,048, and the last 64 of them at once.
fn attend(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("attention");
    let len = 2048;
    for (name, kv_heads, dtype) in
        [("f32", 16, DType::F32), ("bf16", 16, DType::Bf16), ("bf16 grouped by 4", 4, DType::Bf16)]
    {
        let shape = KvShape { kv_heads, key_dim: 128, value_dim: 128, values_in_keys: false, dtype };
        let mut storage =
            vec![(vec![0; shape.key_page_bytes()], vec![0; shape.value_page_bytes()]); len / PAGE_POSITIONS];
        let vector = values(kv_heads * 128);
        for position in 0..len {
            let (keys, values) = &mut storage[position / PAGE_POSITIONS];
            shape.write_keys(position as u32, &vector, keys);
            shape.write_values(position as u32, &vector, values);
        }
        let pages: Vec<KvPage<'_>> = storage.iter().map(|(keys, values)| KvPage { keys, values }).collect();
        let kv = PagedKv::new(shape, &pages).expect("the pages have the shape's size");
        let params = AttentionParams { heads: 16, scale: 0.088, window: None, sinks: None };
        for rows in [1, 64] {
            let positions: Vec<u32> = (len - rows..len).map(|position| position as u32).collect();
            let q = values(rows * 16 * 128);
            let mut out = vec![0.0; q.len()];
            // Two fma for each dimension of each key and head.
            group.throughput(Throughput::Elements((4 * rows * 16 * 128 * len) as u64));
            for threads in THREADS {
                let pool = Pool::new(threads);
                group.bench_function(BenchmarkId::new(format!("{name}/{rows}"), threads), |bencher| {
                    bencher.iter(|| {
                        attention(&pool, Isa::detect(), black_box(&q), &positions, &kv, &params, &mut out);
                    });
                });
            }
        }
    }
    group.finish();
}

/// What sharing work out takes by itself: a job without work, one after the other.
fn pool(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("pool");
    for threads in THREADS {
        let pool = Pool::new(threads);
        group.bench_function(BenchmarkId::new("job", threads), |bencher| {
            bencher.iter(|| pool.run(2 * threads, &|task| _ = black_box(task)));
        });
    }
    group.finish();
}

fn rows(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("rows");
    let source = values(4096);
    let mut row = source.clone();
    group.throughput(Throughput::Elements(4096));
    for (name, isa) in [("scalar", Isa::Scalar), ("fastest", Isa::detect())] {
        group.bench_function(BenchmarkId::new("exp", name), |bencher| {
            bencher.iter(|| {
                row.copy_from_slice(black_box(&source));
                math::exp_in_place(isa, &mut row);
            });
        });
        group.bench_function(BenchmarkId::new("rms_norm", name), |bencher| {
            bencher.iter(|| rms_norm(isa, black_box(&source), &source, 1e-5, &mut row));
        });
    }
    group.finish();
}

/// A token of a vocabulary, by draws that fall near the front and far behind.
fn choice(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("choice");
    let logits: Vec<f32> = values(4 * 50_304).chunks(4).map(|four| four.iter().sum::<f32>() * 2.0).collect();
    group.throughput(Throughput::Elements(logits.len() as u64));
    let any = sample::Params { temperature: 1.0, ..Default::default() };
    for (name, params) in [
        ("likeliest", sample::Params::default()),
        ("any", any),
        ("top_k 50", sample::Params { top_k: 50, ..any }),
        ("top_p 0.9", sample::Params { top_p: 0.9, ..any }),
        ("min_p 0.1", sample::Params { min_p: 0.1, ..any }),
    ] {
        let mut draw = 0u64;
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                draw = draw.wrapping_add(0x9e37_79b9_7f4a_7c15);
                sample::sample(Isa::detect(), black_box(&logits), &params, draw).expect("all are finite")
            });
        });
    }
    group.finish();
}

criterion_group!(kernels, memory, gemv, gemm, attend, pool, rows, choice);
criterion_main!(kernels);
