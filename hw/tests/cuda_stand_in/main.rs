//! The stand-in for the CUDA driver (`hw/cuda/stand_in`), driven by cudarc: that it gives right results to who is right, and
//! that it finds who is not.
//!
//! The library is opened while a program runs, and what it reports ends the process: so each scenario is a process of its own,
//! this program again.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(target_os = "linux")]

mod gpu;

use cudarc::driver::result;
use cudarc::driver::sys::CUstream;
use gpu::{At, Gpu, Value, Word, code, put, read, record, room, stream, wait};
use lite_llm_hw::cuda::kernels::{Compiler, KERNELS, Target};
use lite_llm_hw::cuda::nvrtc::Nvrtc;
use lite_llm_model::kernels::{Isa, rms_norm};
use lite_llm_tests::cuda::{Operands, assert_bits, compile_driver, say_skipped};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

const SCENARIO: &str = "LITE_LLM_TEST_SCENARIO";
const PLAYED: &str = "played to its end";

/// Plays a scenario with what the stand-in is asked for. `None` where there is no compiler.
fn play(scenario: &str, wishes: &[(&str, &str)]) -> Option<Output> {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let Some(driver) = compile_driver(tmp) else {
        say_skipped("the stand-in for the CUDA driver, for want of Linux and a C++ compiler (c++, or CXX)");
        return None;
    };
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "scenario", "--nocapture"]).env(SCENARIO, scenario);
    command
        .env("LITE_LLM_STAND_IN", "90")
        .env("XDG_CACHE_HOME", tmp.join("cuda-cache"))
        .env("LD_LIBRARY_PATH", std::env::join_paths([&driver, &nvrtc()]).unwrap());
    for (name, value) in wishes {
        command.env(format!("LITE_LLM_STAND_IN_{name}"), value);
    }
    Some(command.output().unwrap())
}

fn nvrtc() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).parent().unwrap().join("nvrtc")
}

/// Plays a scenario that ends well.
fn passes(scenario: &str, wishes: &[(&str, &str)]) {
    let Some(output) = play(scenario, wishes) else { return };
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(
        output.status.success(),
        "{scenario} {wishes:?}: {said}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(said.contains(PLAYED), "{scenario} was not played: {said}");
}

/// Plays a scenario in which the stand-in reports this.
fn reports(scenario: &str, wishes: &[(&str, &str)], words: &[&str]) {
    let Some(output) = play(scenario, wishes) else { return };
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "{scenario} {wishes:?}: nothing was found");
    for word in ["stand-in for the CUDA driver: "].iter().chain(words) {
        assert!(said.contains(word), "{scenario} {wishes:?}: {word} is not in {said}");
    }
}

/// For how many of so many seeds a scenario ends well.
fn seeds_that_pass(scenario: &str) -> Option<usize> {
    let mut passed = 0;
    for seed in 0..SEEDS {
        let output = play(scenario, &[("SEED", &seed.to_string())])?;
        passed +=
            usize::from(output.status.success() && String::from_utf8_lossy(&output.stdout).contains(PLAYED));
    }
    Some(passed)
}

const SEEDS: usize = 24;

/// Played by the tests beside it, with a driver to open; by itself it is nothing.
#[test]
fn scenario() {
    let Ok(wanted) = std::env::var(SCENARIO) else { return };
    let (_, play) = SCENARIOS.iter().find(|(name, _)| *name == wanted).expect("a scenario");
    play();
    println!("{PLAYED}");
}

const SCENARIOS: &[(&str, fn())] = &[
    ("copies", copies),
    ("real images", real_images),
    ("nodes in turn", nodes_in_turn),
    ("an event between streams", || two_streams(true)),
    ("no event between streams", || two_streams(false)),
    ("a staging buffer that waits", || staging(true)),
    ("a staging buffer that does not wait", || staging(false)),
    ("the default stream", default_stream),
    ("a graph", graph),
    ("an unjoined graph", unjoined_graph),
    ("limits of a launch", limits),
    ("a lost context", || {
        let fault = std::env::var("LITE_LLM_STAND_IN_FAULT").unwrap();
        faults(fault.rsplit(':').next().unwrap().parse().unwrap());
    }),
    ("a launch refused", || faults(2)),
    ("an allocation refused", allocation_refused),
    ("a flipped bit", flipped),
    ("a page that is pinned", pinned_page),
    ("a flipped bit of a kernel", flipped_result),
    ("a hanging launch", hanging),
    ("a module refused", || {
        gpu::open();
        assert_eq!(code(Gpu::load(b"\0")), 218);
    }),
    ("a driver that is busy", || {
        result::init().unwrap();
        // SAFETY: the device is there.
        let retain =
            |number| code(unsafe { result::primary_ctx::retain(result::device::get(number).unwrap()) });
        assert_eq!([retain(0), retain(1)], [46, 0]);
    }),
    ("a driver refused", || assert_eq!(code(result::init()), 803)),
    ("a small device", small_device),
    ("little pinned memory", little_pinned),
    ("behind an allocation", || overrun(32)),
    ("behind a page", || overrun(64)),
    ("the host in device memory", || {
        gpu::open();
        assert_eq!(gpu::touch(put(&[1.0])), 0);
    }),
    ("two devices", two_devices),
    ("memory of another device", || {
        on_another_device(|gpu, [x, y], stream| gpu.add(stream, x, y, 1.0, 64).unwrap())
    }),
    ("a copy of another device", || on_another_device(|_, [x, y], stream| gpu::copy_later(y, x, 64, stream))),
    ("used after it was freed", freed_before),
    ("freed while it is used", freed_while_used),
    ("freed twice", freed_twice),
];

fn copies() {
    gpu::open();
    let values = Operands::new(1).values(1000);
    let (x, y) = (put(&values), room(4000).unwrap());
    assert!(read(y, 1000).unwrap().iter().all(|value| value.is_nan()), "fresh memory holds numbers");
    let stream = stream();
    gpu::copy_later(y, x, 1000, stream);
    wait(stream).unwrap();
    assert_bits("a copy", &read(y, 1000).unwrap(), &values);
    gpu::free(x).unwrap();
    gpu::free(y).unwrap();
    let (free, total) = result::mem_get_info().unwrap();
    assert_eq!(free, total);
}

#[test]
fn copies_arrive() {
    passes("copies", &[]);
}

fn real_images() {
    gpu::open();
    let source = KERNELS.iter().find(|source| source.name == "norm.cu").unwrap();
    let nvrtc = Nvrtc::find().unwrap();
    for target in [Target::Cubin(90), Target::Ptx(80)] {
        let mut image = nvrtc.compile(source, target).unwrap();
        image.push(0);
        let gpu = Gpu::load(&image).unwrap();
        assert_eq!(code(gpu.function("add")), 500, "add is not in {}", source.name);
        for n in [1, 72, 2 * 1024 + 5] {
            let mut operands = Operands::new(n as u64);
            let (x, weight) = (operands.values(3 * n), operands.values(n));
            let (x_at, weight_at, out) = (put(&x), put(&weight), room(3 * n * 4).unwrap());
            let words = [At(x_at), At(weight_at), At(out), Word(n as u32), Word(n as u32), Value(1e-5)];
            let stream = stream();
            gpu.launch("rms_norm", [(3, 1, 1), (256, 1, 1)], stream, &words).unwrap();
            // Machine code says how many threads it was compiled for, and that it has shared memory of its own.
            let more = |threads, shared| {
                let grid = [(3, 1, 1), (threads, 1, 1)];
                code(gpu.launch_with("rms_norm", grid, shared, stream, &words))
            };
            if matches!(target, Target::Cubin(_)) {
                assert_eq!([more(288, 0), more(256, 48 << 10)], [1; 2]);
            }
            assert_eq!([more(256, (47 << 10) - 64), more(256, (48 << 10) + 1)], [0, 1]);
            wait(stream).unwrap();
            let mut expected = vec![0.0; 3 * n];
            for (out, x) in expected.chunks_mut(n).zip(x.chunks(n)) {
                rms_norm(Isa::Scalar, x, &weight, 1e-5, out);
            }
            assert_bits(&format!("rms_norm of {n}"), &read(out, 3 * n).unwrap(), &expected);
        }
    }
}

#[test]
fn real_images_give_the_bits_of_the_cpu() {
    if !nvrtc().join("libnvrtc.so.12").exists() {
        return say_skipped(&format!("real images, for want of {}", nvrtc().display()));
    }
    passes("real images", &[]);
}

/// Nodes have devices in turn, and share them where there are fewer.
fn nodes_in_turn() {
    let open = |node| lite_llm_hw::cuda::Gpu::open_for(node, lite_llm_hw::cuda::PATIENCE).unwrap();
    let gpus = [0, 1, 2].map(open);
    assert_eq!(gpus.each_ref().map(|gpu| gpu.name()), ["Stand-in 0", "Stand-in 1", "Stand-in 0"]);
}

#[test]
fn nodes_have_devices_in_turn() {
    if !nvrtc().join("libnvrtc.so.12").exists() {
        return say_skipped(&format!("devices of nodes, for want of {}", nvrtc().display()));
    }
    passes("nodes in turn", &[]);
}

/// One stream adds, another copies the sum.
fn two_streams(ordered: bool) {
    let gpu = Gpu::open();
    let (x, y, z) = (put(&[1.0; 64]), put(&[2.0; 64]), put(&[0.0; 64]));
    let (adds, copies) = (stream(), stream());
    gpu.add(adds, x, y, 1.0, 64).unwrap();
    if ordered {
        gpu::follow(copies, record(adds)).unwrap();
    }
    gpu::copy_later(z, x, 64, copies);
    wait(copies).unwrap();
    assert_eq!(read(z, 64).unwrap(), [3.0; 64]);
}

#[test]
fn a_missing_event_is_noticed() {
    let Some(ordered) = seeds_that_pass("an event between streams") else { return };
    assert_eq!(ordered, SEEDS);
    let lucky = seeds_that_pass("no event between streams").unwrap();
    assert!(0 < lucky && lucky < SEEDS, "{lucky} of {SEEDS} seeds pass without the event");
}

/// Two copies from one place of the host.
fn staging(waits: bool) {
    gpu::open();
    let (x, y, stream) = (room(256).unwrap(), room(256).unwrap(), stream());
    let mut staging = vec![1.0; 64];
    gpu::put_later(x, &staging, stream).unwrap();
    let event = record(stream);
    while waits && code(gpu::query(event)) == 600 {}
    staging.fill(2.0);
    gpu::put_later(y, &staging, stream).unwrap();
    wait(stream).unwrap();
    assert_eq!((read(x, 64).unwrap(), read(y, 64).unwrap()), (vec![1.0; 64], vec![2.0; 64]));
}

#[test]
fn a_staging_buffer_that_is_used_too_early_is_noticed() {
    let Some(waiting) = seeds_that_pass("a staging buffer that waits") else { return };
    assert_eq!(waiting, SEEDS);
    let lucky = seeds_that_pass("a staging buffer that does not wait").unwrap();
    assert!(0 < lucky && lucky < SEEDS, "{lucky} of {SEEDS} seeds pass without waiting");
}

/// The legacy default stream comes after what is queued in others that wait for it.
fn default_stream() {
    let gpu = Gpu::open();
    let (x, y) = (put(&[1.0; 64]), put(&[2.0; 64]));
    let blocking = result::stream::create(result::stream::StreamKind::Default).unwrap();
    let mut expected = 1.0;
    // Nothing is waited for in between: each has to wait for the other by itself.
    for _ in 0..4 {
        gpu.add(blocking, x, y, 1.0, 64).unwrap();
        gpu.add(result::stream::null(), x, x, 1.0, 64).unwrap();
        expected = (expected + 2.0) * 2.0;
    }
    assert_eq!(read(x, 64).unwrap(), [expected; 64]);
}

#[test]
fn the_default_stream_waits_and_is_waited_for() {
    for seed in 0..8 {
        passes("the default stream", &[("SEED", &seed.to_string())]);
    }
}

/// Two streams of a graph, which part and meet.
fn graph() {
    let gpu = Gpu::open();
    let (x, y, z) = (put(&[0.0; 64]), put(&[1.0; 64]), put(&[0.0; 64]));
    let (one, other) = (stream(), stream());
    let graph = gpu::capture(one, || {
        gpu.add(one, x, y, 1.0, 64).unwrap();
        gpu::follow(other, record(one)).unwrap();
        gpu.add(other, z, x, 1.0, 64).unwrap();
        gpu::follow(one, record(other)).unwrap();
        gpu.add(one, x, z, 1.0, 64).unwrap();
    })
    .unwrap();
    assert_eq!(read(x, 64).unwrap(), [0.0; 64], "a capture runs nothing");
    let (mut sum, mut other_sum) = (0.0, 0.0);
    for _ in 0..3 {
        gpu::replay(graph, one).unwrap();
        gpu::replay(graph, other).unwrap();
        for _ in 0..2 {
            sum += 1.0;
            other_sum += sum;
            sum += other_sum;
        }
        wait(other).unwrap();
        assert_eq!((read(x, 64).unwrap(), read(z, 64).unwrap()), (vec![sum; 64], vec![other_sum; 64]));
    }
}

fn unjoined_graph() {
    let gpu = Gpu::open();
    let (x, y) = (put(&[0.0; 64]), put(&[1.0; 64]));
    let (one, other) = (stream(), stream());
    let unjoined = gpu::capture(one, || {
        gpu.add(one, x, y, 1.0, 64).unwrap();
        gpu::follow(other, record(one)).unwrap();
        gpu.add(other, x, y, 1.0, 64).unwrap();
    });
    assert_eq!(code(unjoined), 904);
    let waiting = gpu::capture(one, || assert_eq!(code(wait(one)), 900));
    assert_eq!(code(waiting), 901);
    let isolated = gpu::capture(one, || assert_eq!(code(gpu::follow(one, record(other))), 905));
    assert_eq!(code(isolated), 901);
}

#[test]
fn graphs_are_recorded_and_replayed() {
    for seed in 0..8 {
        passes("a graph", &[("SEED", &seed.to_string())]);
    }
    passes("an unjoined graph", &[]);
}

fn limits() {
    let gpu = Gpu::open();
    let (x, y, stream) = (put(&[0.0; 64]), put(&[1.0; 64]), stream());
    let arguments = [At(x), At(y), Value(1.0), Word(64)];
    let launch = |grid, threads| code(gpu.launch("add", [grid, threads], stream, &arguments));
    assert_eq!(launch((1, 65535, 1), (32, 1, 1)), 0);
    assert_eq!(launch((1, 1, 1), (1024, 1, 1)), 0);
    for (grid, threads) in [
        ((0, 1, 1), (32, 1, 1)),
        ((1, 65536, 1), (32, 1, 1)),
        ((1, 1, 65536), (32, 1, 1)),
        ((1, 1, 1), (1056, 1, 1)),
        ((1, 1, 1), (1024, 2, 1)),
    ] {
        assert_eq!(launch(grid, threads), 1, "{grid:?} blocks of {threads:?} threads");
    }
}

#[test]
fn launches_above_the_limits_are_refused() {
    passes("limits of a launch", &[]);
}

/// The second of three launches fails.
fn faults(with: u32) {
    let gpu = Gpu::open();
    let (x, y, stream) = (put(&[0.0; 64]), put(&[1.0; 64]), stream());
    let launches = [0; 3].map(|_| code(gpu.add(stream, x, y, 1.0, 64)));
    if with == 2 {
        assert_eq!(launches, [0, 2, 0]);
        wait(stream).unwrap();
        assert_eq!(read(x, 64).unwrap(), [2.0; 64]);
        return;
    }
    assert_eq!(code(wait(stream)), with);
    assert_eq!(
        [code(read(x, 64)), code(room(4)), code(gpu.add(stream, x, y, 1.0, 64)), code(wait(stream))],
        [with; 4]
    );
}

#[test]
fn faults_come_when_they_are_asked_for() {
    let sticky = [214, 220, 226, 700, 702, 710, 714, 715, 716, 717, 718, 719, 721, 999];
    for (seed, lost) in sticky.into_iter().enumerate() {
        let fault = format!("launch:2:{lost}");
        passes("a lost context", &[("FAULT", &fault), ("SEED", &seed.to_string())]);
    }
    passes("a launch refused", &[("FAULT", "launch:2:2")]);
    passes("an allocation refused", &[("FAULT", "alloc:2:2")]);
    passes("a flipped bit", &[("FAULT", "copy:2:flip")]);
    passes("a page that is pinned", &[("FAULT", "pages:1:2")]);
    for fault in ["launch:2:flip", "add:2:flip", "add:*:flip"] {
        passes("a flipped bit of a kernel", &[("FAULT", fault)]);
    }
    passes("a hanging launch", &[("FAULT", "launch:1:hang")]);
    passes("a module refused", &[("FAULT", "module:1:218")]);
    passes("a driver refused", &[("FAULT", "init:1:803")]);
    for fault in ["copy:1", "subtract:1:flip", "module:1:flip", "copy:0:flip"] {
        reports("copies", &[("FAULT", fault)], &[fault]);
    }
}

fn allocation_refused() {
    gpu::open();
    assert_eq!([0; 3].map(|_| code(room(4))), [0, 2, 0]);
}

/// A sum is another by a bit: the second one, or each.
fn flipped_result() {
    let gpu = Gpu::open();
    let (y, stream) = (put(&[1.0; 64]), stream());
    let sums = [0; 3].map(|_| {
        let x = put(&[1.0; 64]);
        gpu.add(stream, x, y, 1.0, 64).unwrap();
        wait(stream).unwrap();
        read(x, 64).unwrap().iter().map(|sum| (sum.to_bits() ^ 2.0f32.to_bits()).count_ones()).sum::<u32>()
    });
    assert_eq!(
        sums,
        if std::env::var("LITE_LLM_STAND_IN_FAULT").unwrap().contains('*') { [1; 3] } else { [0, 1, 0] }
    );
}

fn flipped() {
    gpu::open();
    let values = Operands::new(3).values(64);
    let differing = |at| -> u32 {
        let pairs = read(at, 64).unwrap();
        pairs.iter().zip(&values).map(|(a, b)| (a.to_bits() ^ b.to_bits()).count_ones()).sum()
    };
    assert_eq!([0; 3].map(|_| differing(put(&values))), [0, 1, 0]);
}

/// A fault of the first whole page is not that of a vector that begins at one by chance.
fn pinned_page() {
    gpu::open();
    let (at, stream, values) = (room(4096).unwrap(), stream(), vec![0.0; 2048]);
    let aligned = values.as_ptr().align_offset(4096);
    assert_eq!(code(gpu::put_later(at, &values[aligned..aligned + 1024], stream)), 0);
    assert_eq!(code(gpu::put_later(at, &gpu::pinned_page()[..512], stream)), 0);
    assert_eq!(code(gpu::put_later(at, gpu::pinned_page(), stream)), 2);
    wait(stream).unwrap();
}

fn hanging() {
    let gpu = Gpu::open();
    let (x, y, z) = (put(&[0.0; 64]), put(&[1.0; 64]), put(&[0.0; 64]));
    let (hangs, goes_on) = (stream(), stream());
    gpu.add(hangs, x, y, 1.0, 64).unwrap();
    let event = record(hangs);
    for _ in 0..1000 {
        assert_eq!(code(gpu::query(event)), 600);
    }
    gpu.add(goes_on, z, y, 1.0, 64).unwrap();
    wait(goes_on).unwrap();
    assert_eq!(read(z, 64).unwrap(), [1.0; 64]);
    let (done, seen) = std::sync::mpsc::channel();
    let (hangs, context) = (hangs as usize, result::ctx::get_current().unwrap().unwrap() as usize);
    std::thread::spawn(move || {
        // SAFETY: the context is that of the other thread.
        unsafe { result::ctx::set_current(context as _) }.unwrap();
        let _ = wait(hangs as _);
        done.send(())
    });
    assert!(seen.recv_timeout(std::time::Duration::from_millis(200)).is_err(), "who waits comes back");
}

fn small_device() {
    gpu::open();
    assert_eq!(code(room((1 << 20) + 1)), 2);
    let first = room(3 << 18).unwrap();
    assert_eq!(code(room((1 << 18) + 1)), 2);
    room(1 << 18).unwrap();
    assert_eq!(result::mem_get_info().unwrap(), (0, 1 << 20));
    gpu::free(first).unwrap();
    room(1).unwrap();
    assert_eq!(result::mem_get_info().unwrap().0, (3 << 18) - 256);
}

fn little_pinned() {
    gpu::open();
    gpu::pin(8000).unwrap();
    assert_eq!(code(gpu::pin(1000)), 2);
}

#[test]
fn memory_has_limits() {
    passes("a small device", &[("MEMORY", "1048576")]);
    passes("little pinned memory", &[("PINNED", "8192")]);
}

/// Writes one value behind so many of them.
fn overrun(values: usize) {
    let gpu = Gpu::open();
    let (x, stream) = (put(&vec![0.0; values]), stream());
    gpu.launch("planted_overrun", [(1, 1, 1), (values as u32, 1, 1)], stream, &[At(x)]).unwrap();
    wait(stream).unwrap();
}

/// Two devices, each with memory, modules and streams of its own, in one thread.
fn two_devices() {
    let first = Gpu::open();
    let first_context = result::ctx::get_current().unwrap().unwrap();
    let (x, y, of_first) = (put(&[1.0; 64]), put(&[2.0; 64]), stream());
    let free = result::mem_get_info().unwrap().0;
    let second = Gpu::open_device(1);
    let second_context = result::ctx::get_current().unwrap().unwrap();
    let (v, w, of_second) = (put(&[3.0; 64]), put(&[4.0; 64]), stream());
    assert_eq!(result::mem_get_info().unwrap().0, free, "each has memory of its own");
    second.add(of_second, v, w, 1.0, 64).unwrap();
    // A kernel of one device in a stream of the other.
    assert_eq!(
        [code(first.add(of_second, v, w, 1.0, 64)), code(second.add(of_first, x, y, 1.0, 64))],
        [201; 2]
    );
    gpu::enter(first_context);
    first.add(of_first, x, y, 1.0, 64).unwrap();
    wait(of_first).unwrap();
    assert_eq!(read(x, 64).unwrap(), [3.0; 64]);
    gpu::enter(second_context);
    wait(of_second).unwrap();
    assert_eq!(read(v, 64).unwrap(), [7.0; 64]);
}

/// Uses memory of the first device on the second.
fn on_another_device(use_it: fn(&Gpu, [u64; 2], CUstream)) {
    gpu::open();
    let x = put(&[0.0; 64]);
    let gpu = Gpu::open_device(1);
    let (y, stream) = (put(&[1.0; 64]), stream());
    use_it(&gpu, [x, y], stream);
    wait(stream).unwrap();
}

#[test]
fn a_second_device_is_another() {
    for seed in 0..4 {
        passes("two devices", &[("SEED", &seed.to_string())]);
    }
    for (scenario, operation) in
        [("memory of another device", "in add"), ("a copy of another device", "in a copy on the device")]
    {
        reports(scenario, &[], &["memory of another device", operation]);
    }
    passes("a driver that is busy", &[("BUSY", "0")]);
}

fn freed_before() {
    let gpu = Gpu::open();
    let (x, y, stream) = (put(&[0.0; 64]), put(&[1.0; 64]), stream());
    gpu::free(y).unwrap();
    gpu.add(stream, x, y, 1.0, 64).unwrap();
    wait(stream).unwrap();
}

fn freed_while_used() {
    let gpu = Gpu::open();
    let (x, y, stream) = (put(&[0.0; 64]), put(&[1.0; 64]), stream());
    gpu.add(stream, x, y, 1.0, 64).unwrap();
    gpu::free(y).unwrap();
}

fn freed_twice() {
    gpu::open();
    let x = put(&[0.0; 64]);
    gpu::free(x).unwrap();
    gpu::free(x).unwrap();
}

#[test]
fn memory_that_is_not_there_is_noticed() {
    reports(
        "behind an allocation",
        &[],
        &["written out of bounds", "byte 128 of an allocation of 128", "planted_overrun"],
    );
    reports("behind a page", &[], &["out of bounds", "byte 256 of an allocation of 256", "planted_overrun"]);
    reports(
        "the host in device memory",
        &[],
        &["the host touches device memory", "byte 0 of an allocation of 4"],
    );
    reports("used after it was freed", &[], &["not any more", "in add"]);
    reports("freed while it is used", &[("FAULT", "launch:1:hang")], &["cuMemFree", "still used by add"]);
    reports("freed twice", &[], &["that was freed"]);
}
