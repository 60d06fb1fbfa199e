//! The engine alone, its journal on this disk, and the fold: throughput in inputs, records and bytes.

use criterion::{BatchSize, BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use lite_llm_benches::drive::Driven;
use lite_llm_core::engine::Engine;
use lite_llm_core::journal::{Header, Record, Store};
use lite_llm_core::replay::fold;
use lite_llm_hw::disk::FileDisk;
use std::hint::black_box;
use std::path::Path;

/// Experts of the plan: all of them are resident.
const ALL: u64 = 16 * 64;
const REQUESTS: u32 = 8;
const TOKENS: u32 = 100;

fn engine(c: &mut Criterion) {
    let mut group = c.benchmark_group("engine");
    for (name, slots) in [("inputs, experts resident", ALL), ("inputs, a quarter resident", ALL / 4)] {
        let inputs = Driven::boot(slots, false).serve(REQUESTS, TOKENS);
        group.throughput(Throughput::Elements(inputs));
        group.bench_function(name, |b| {
            b.iter_batched_ref(
                || Driven::boot(slots, false),
                |driven| black_box(driven.serve(REQUESTS, TOKENS)),
                BatchSize::LargeInput,
            );
        });
    }
    group.finish();
}

fn recorded() -> Vec<Record> {
    let mut driven = Driven::boot(ALL / 4, true);
    driven.serve(REQUESTS, TOKENS);
    driven.records
}

fn replay(c: &mut Criterion) {
    let records = recorded();
    let mut group = c.benchmark_group("replay");
    group.throughput(Throughput::Elements(records.len() as u64));
    group.bench_function("records", |b| {
        b.iter(|| {
            let mut engine = Engine::new();
            fold(&mut engine, &records, |_, output| {
                black_box(output);
            })
            .expect("they fold");
            engine.digest()
        });
    });
    group.finish();
}

/// Records as a run with demand loading makes them, in groups of several sizes, each group synced.
fn journal(c: &mut Criterion) {
    let records = recorded();
    let payload: usize = records.iter().map(|record| record.payload.len()).sum();
    println!("a record's payload has {} bytes in the mean", payload / records.len());
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target");
    let mut group = c.benchmark_group("journal");
    group.sample_size(10);
    for in_group in [1usize, 16, 256, 2048] {
        let groups = (512 / in_group).clamp(4, 64);
        let count = in_group * groups;
        let dir = tempfile::tempdir_in(&root).expect("room in the target directory");
        let disk = FileDisk::open(dir.path()).expect("a directory");
        let header = Header { logic_version: 1, node: 0, incarnation: 1, identity: [0; 32] };
        let (mut store, _) = Store::open(disk, &header).expect("a new journal");
        let mut source = records.iter().cycle();
        let mut seq = 0;
        let mut bytes = 0;
        let mut append = |store: &mut Store<FileDisk>| {
            for _ in 0..groups {
                for record in source.by_ref().take(in_group) {
                    seq += 1;
                    bytes += record.payload.len() as u64;
                    store.push(seq, seq, record.digest, record.payload.clone()).expect("in order");
                }
                store.flush().expect("room on the disk");
            }
        };
        append(&mut store);
        group.throughput(Throughput::Elements(count as u64));
        let id = BenchmarkId::new("records in synced groups of", in_group);
        group.bench_function(id, |b| b.iter(|| append(&mut store)));
        println!("{} payload bytes a group", bytes / (seq / in_group as u64));
    }
    group.finish();
}

criterion_group!(benches, engine, replay, journal);
criterion_main!(benches);
