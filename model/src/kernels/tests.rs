//! The forms of each kernel against each other and against the plain definition, bit for bit.

#![allow(clippy::unwrap_used, reason = "a test may panic")]

use super::golden::{Bits, EXP_CHUNK, GOLDEN_EXP, Golden, GoldenExp, golden};
use super::self_test::{OfCpu, check};
use super::*;

mod bits;
mod grouped;
mod quantised;

#[test]
fn exp_is_close_and_exact_at_the_ends() {
    assert_eq!(math::exp(0.0).to_bits(), 1.0f32.to_bits());
    assert_eq!(math::exp(-0.0).to_bits(), 1.0f32.to_bits());
    assert_eq!(math::exp(f32::NEG_INFINITY).to_bits(), 0);
    assert_eq!(math::exp(f32::INFINITY), f32::INFINITY);
    assert_eq!(math::exp(89.0), f32::INFINITY);
    assert!(math::exp(-f32::NAN).to_bits() == 0x7fc0_0000);
    let mut worst = 0i64;
    for bits in (0..u32::MAX).step_by(9973) {
        let x = f32::from_bits(bits);
        if x.is_finite() {
            let exact = libm::exp(f64::from(x)) as f32;
            worst = worst.max((i64::from(exact.to_bits()) - i64::from(math::exp(x).to_bits())).abs());
        }
    }
    assert!(worst <= 1, "{worst} units in the last place");
}

#[test]
fn the_packed_layout_is_the_documented_one() {
    let (outputs, inputs) = (17, 1041);
    let src: Vec<u8> =
        (0..outputs * inputs).flat_map(|i| ((i % 60_000) as u16).wrapping_add(1).to_le_bytes()).collect();
    let mut dst = vec![0xff; packed_len(DType::Bf16, outputs, inputs).unwrap()];
    assert_eq!(dst.len(), 2 * 1056 * 32);
    pack(DType::Bf16, outputs, inputs, &src, &mut dst);
    let value = |output: usize, k: usize| ((output * inputs + k) % 60_000 + 1) as u16;
    let at = |tile: usize, entry: usize, half: usize| {
        let at = (tile * 1056 + entry) * 32 + half * 2;
        u16::from_le_bytes([dst[at], dst[at + 1]])
    };
    assert_eq!(at(0, 0, 0), value(0, 0));
    assert_eq!(at(0, 0, 1), value(8, 0));
    assert_eq!(at(0, 1, 2), value(1, 16));
    assert_eq!(at(0, 64, 0), value(0, 1));
    assert_eq!(at(0, 1024, 3), value(9, 1024));
    assert_eq!(at(0, 1025, 0), value(0, 1040));
    assert_eq!(at(0, 1026, 0), value(0, 1025));
    assert_eq!(at(0, 1027, 0), 0);
    assert_eq!(at(1, 0, 0), value(16, 0));
    assert_eq!(at(1, 0, 1), 0);
    let mut back = vec![0; src.len()];
    unpack(DType::Bf16, outputs, inputs, &dst, &mut back);
    assert_eq!(back, src);
}

#[test]
fn lengths_are_checked() {
    assert_eq!(packed_len(DType::F32, usize::MAX, 2), None);
    assert_eq!(packed_len(DType::F32, 2, usize::MAX), None);
    assert!(PackedView::new(DType::F32, 1, 1, &[0; 4]).is_err());
    assert!(PackedView::new(DType::F32, 1, 1, &[0; 1024]).is_ok());
}

/// Workers that are about to park, parked or still spinning all see the end.
#[test]
fn a_pool_ends_whatever_its_workers_are_about() {
    for round in 0..500 {
        let pool = Pool::new(3);
        (0..round * 7 % 2_000).for_each(|_| std::hint::spin_loop());
        drop(pool);
    }
}

#[test]
fn the_pool_runs_each_task_once_and_survives_panics() {
    use std::sync::atomic::{AtomicU32, Ordering};
    for threads in 1..4 {
        let pool = Pool::new(threads);
        for round in 0..200 {
            let counts: Vec<AtomicU32> = (0..round % 17).map(|_| AtomicU32::new(0)).collect();
            pool.run(counts.len(), &|task| {
                counts[task].fetch_add(1, Ordering::Relaxed);
                pool.run(3, &|_| {});
            });
            assert!(counts.iter().all(|count| count.load(Ordering::Relaxed) == 1));
        }
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            pool.run(8, &|task| assert!(task != 5));
        }));
        assert!(panicked.is_err());
        pool.run(8, &|_| {});
    }
}

/// Workers that sleep are woken for a job, and a caller that sleeps for the last task.
#[test]
fn a_job_waits_for_tasks_that_take_long() {
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;
    let pool = Pool::new(2);
    let caller = std::thread::current().id();
    for _ in 0..5 {
        std::thread::sleep(Duration::from_millis(5));
        let (both, done) = (std::sync::Barrier::new(2), AtomicBool::new(false));
        pool.run(2, &|_| {
            // Each thread has a task.
            both.wait();
            if std::thread::current().id() != caller {
                std::thread::sleep(Duration::from_millis(20));
                done.store(true, Ordering::Relaxed);
            }
        });
        assert!(done.load(Ordering::Relaxed));
    }
}

#[test]
fn logits_that_are_not_finite_are_faults() {
    assert_eq!(argmax(&[0.0, f32::NAN]), Err(NonFinite { token: 1 }));
    assert_eq!(argmax(&[f32::NEG_INFINITY]), Err(NonFinite { token: 0 }));
    assert_eq!(argmax(&[1.0, 3.0, 3.0]), Ok(1));
    assert_eq!(argmax(&[-0.0, 0.0]), Ok(0));
}

#[test]
fn penalties_touch_each_token_once() {
    let mut logits = [2.0, -2.0, 2.0];
    penalise(&mut logits, &[0, 1, 0], 2.0);
    assert_eq!(logits, [1.0, -4.0, 2.0]);
}

#[test]
fn draws_split_by_weight() {
    // Equal weights: the upper half of the draws takes the second token.
    let params = sample::Params { temperature: 1.0, ..Default::default() };
    assert_eq!(sample::sample(Isa::detect(), &[1.0, 1.0], &params, u64::MAX / 2), Ok(0));
    assert_eq!(sample::sample(Isa::detect(), &[1.0, 1.0], &params, u64::MAX / 2 + 1), Ok(1));
}

#[test]
fn the_least_weight_and_the_exact_threshold_count() {
    // The largest draw takes the last candidate: e^-22 still weighs 1, e^-23 nothing.
    let params = sample::Params { temperature: 1.0, ..Default::default() };
    assert_eq!(sample::sample(Isa::detect(), &[0.0, -22.0], &params, u64::MAX), Ok(1));
    assert_eq!(sample::sample(Isa::detect(), &[0.0, -23.0], &params, u64::MAX), Ok(0));
    // The first of two equal weights reaches a half.
    let params = sample::Params { top_p: 0.5, ..params };
    assert_eq!(sample::sample(Isa::detect(), &[1.0, 1.0], &params, u64::MAX), Ok(0));
}

#[test]
fn rope_rotates_halves_and_leaves_the_rest() {
    let table = RopeTable::new(&rope::inverse_frequencies(10_000.0, 4), 1.0, 8);
    let mut head = [1.0, 2.0, 3.0, 4.0, 5.0];
    table.apply(&mut head, 3);
    let (sin, cos) = (libm::sin(3.0) as f32, libm::cos(3.0) as f32);
    assert_eq!(head[0], cos - 3.0 * sin);
    assert_eq!(head[2], 3.0 * cos + sin);
    assert_eq!(head[4], 5.0);
}

#[test]
fn rope_rotates_neighbours_and_leaves_the_rest() {
    let table = RopeTable::new(&rope::inverse_frequencies(10_000.0, 4), 1.0, 8);
    let mut head = [1.0, 3.0, 2.0, 4.0, 5.0];
    table.apply_to_neighbours(&mut head, 3);
    let (sin, cos) = (libm::sin(3.0) as f32, libm::cos(3.0) as f32);
    assert_eq!(head[0], cos - 3.0 * sin);
    assert_eq!(head[1], 3.0 * cos + sin);
    assert_eq!(head[4], 5.0);
}

#[test]
fn a_clamped_gate_is_its_definition() {
    let (gate, up) = ([-9.0, 0.5, 9.0, 2.0], [1.0, -9.0, 9.0, 0.25]);
    let mut out = [0.0; 4];
    clamped_swiglu(Isa::Scalar, &gate, &up, 1.5, 7.0, &mut out);
    for ((gate, up), out) in gate.into_iter().zip(up).zip(out) {
        let (gate, up) = (f64::from(gate).min(7.0), f64::from(up).clamp(-7.0, 7.0));
        let expected = (up + 1.0) * gate / (1.0 + (-1.5 * gate).exp());
        assert!((f64::from(out) - expected).abs() < 1e-5, "{out} for {expected}");
    }
}

#[test]
fn conversions_round_to_even() {
    for bits in 0..=u16::MAX {
        let value = convert::f16_value(bits);
        if !value.is_nan() {
            assert_eq!(convert::f16_bits(value), bits);
        }
        let value = convert::bf16_value(bits);
        if !value.is_nan() {
            assert_eq!(convert::bf16_bits(value), bits);
        }
    }
    assert_eq!(convert::bf16_bits(f32::from_bits(0x3f80_8000)), 0x3f80);
    assert_eq!(convert::bf16_bits(f32::from_bits(0x3f81_8000)), 0x3f82);
    assert_eq!(convert::f16_bits(1.0 + 1.0 / 2048.0), 0x3c00);
    assert_eq!(convert::f16_bits(1.0 + 3.0 / 2048.0), 0x3c02);
}

fn isas() -> Vec<Isa> {
    Isa::ALL.into_iter().filter(|isa| isa.available()).collect()
}

#[test]
fn every_kernel_has_its_golden_bits_on_every_isa() {
    let all = golden();
    for isa in isas() {
        let named = |golden: &Golden<OfCpu>, hash: u64| format!("{} {hash:016x}", golden.kernel);
        let found = all.iter().map(|golden| named(golden, golden.found(&mut OfCpu(isa)).unwrap()));
        let found: Vec<String> = found.collect();
        let expected: Vec<String> = all.iter().map(|golden| named(golden, golden.hash)).collect();
        assert_eq!(found, expected, "{isa:?}");
        self_test(isa).unwrap();
    }
}

#[test]
fn other_bits_are_a_fault_that_names_the_kernel() {
    for mut other in golden() {
        let (kernel, hash) = (other.kernel, other.hash);
        other.hash ^= 1;
        for isa in isas() {
            let fault = SelfTestError::Bits { kernel, isa, expected: hash ^ 1, found: hash };
            assert_eq!(check(&other, isa), Err(fault));
        }
    }
}

/// The hash of chunks of inputs of exp.
fn exp_hash(isa: Isa, of: GoldenExp) -> u64 {
    let chunk = |chunk| {
        let inputs = (0..EXP_CHUNK).map(|i| f32::from_bits(of.first(chunk) + i));
        let mut values: Vec<f32> = inputs.collect();
        math::exp_in_place(isa, &mut values);
        let mut hash = Bits::default();
        hash.values(&values);
        hash.0
    };
    GoldenExp::of_chunks((0..of.chunks()).map(chunk))
}

/// With LITE_LLM_EXHAUSTIVE set, all 2^32 inputs on the fastest instruction set too (about half a minute).
#[test]
fn exp_has_its_golden_bits() {
    let [some, all] = GOLDEN_EXP;
    for isa in isas() {
        assert_eq!(exp_hash(isa, some), some.hash, "{isa:?}");
    }
    if std::env::var_os("LITE_LLM_EXHAUSTIVE").is_some() {
        assert_eq!(exp_hash(Isa::detect(), all), all.hash);
    }
}

#[test]
fn the_self_test_covers_every_thread_of_a_pool() {
    for threads in 1..4 {
        let pool = Pool::new(threads);
        for isa in isas() {
            assert_eq!(pool.self_test(isa), Ok(()));
        }
        // The pool still works afterwards.
        pool.run(8, &|_| {});
    }
}

/// Sets the control register of floats: MXCSR.
#[cfg(target_arch = "x86_64")]
fn set_control(value: u32) {
    // SAFETY: LDMXCSR reads four bytes; the value sets mode bits only and leaves every exception masked. The compiler
    // moves no arithmetic of the caller across, for there is none between setting and restoring but `is_ieee`, whose
    // operands pass through `black_box`.
    unsafe { std::arch::asm!("ldmxcsr [{}]", in(reg) &value, options(nostack, readonly)) }
}

/// Sets the control register of floats: FPCR.
#[cfg(target_arch = "aarch64")]
fn set_control(value: u32) {
    // SAFETY: as of the other architecture; no bit of these values lets an exception trap.
    unsafe { std::arch::asm!("msr fpcr, {}", in(reg) u64::from(value), options(nostack)) }
}

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[test]
fn a_control_register_that_breaks_the_contract_is_found() {
    #[cfg(target_arch = "x86_64")]
    const DEFAULT: u32 = 0x1f80;
    #[cfg(target_arch = "x86_64")]
    const MODES: [(&str, u32); 5] =
        [("FTZ", 0x8000), ("DAZ", 0x0040), ("down", 0x2000), ("up", 0x4000), ("zero", 0x6000)];
    #[cfg(target_arch = "aarch64")]
    const DEFAULT: u32 = 0;
    #[cfg(target_arch = "aarch64")]
    const MODES: [(&str, u32); 4] = [("FZ", 1 << 24), ("up", 1 << 22), ("down", 2 << 22), ("zero", 3 << 22)];
    for (name, mode) in MODES {
        set_control(DEFAULT | mode);
        let result = self_test(Isa::Scalar);
        set_control(DEFAULT);
        assert_eq!(result, Err(SelfTestError::ControlRegister), "{name}");
    }
    // A worker's register counts, not the caller's alone.
    let pool = Pool::new(2);
    let main = std::thread::current().id();
    let reached = std::sync::Barrier::new(2);
    let on_worker = |mode| {
        pool.run(2, &|_| {
            reached.wait();
            if std::thread::current().id() != main {
                set_control(mode);
            }
        });
    };
    on_worker(DEFAULT | MODES[0].1);
    let result = pool.self_test(Isa::Scalar);
    on_worker(DEFAULT);
    assert_eq!(result, Err(SelfTestError::ControlRegister));
    assert_eq!(pool.self_test(Isa::Scalar), Ok(()));
}
