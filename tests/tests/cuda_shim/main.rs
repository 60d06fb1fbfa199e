//! The kernels of CUDA give the bits of the CPU's scalar ones: compiled for the CPU, in several orders of their threads, under a
//! shadow memory that finds accesses which no barrier orders. Each barrier is left out once, which has to be found.

mod attention;
mod moe;
mod products;
mod sampling;

use lite_llm_model::kernels::*;
use lite_llm_tests::cuda::{Launch, Operands, Shim, assert_bits, shim};

/// The shim, if it can be had.
fn ready() -> Option<Shim> {
    shim(env!("CARGO_TARGET_TMPDIR"))
}

const TYPES: [(DType, &str); 3] = [(DType::F32, "f32"), (DType::Bf16, "bf16"), (DType::F16, "f16")];

fn stored(dtype: DType, values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.bytes()];
    convert::narrow(dtype, values, &mut bytes);
    bytes
}

#[test]
fn planted_faults_are_found() {
    let Some(mut shim) = ready() else { return };
    let values: Vec<u32> = (0..64).collect();
    let mut found = |kernel: &str, blocks: u32, threads: u32, order: u64| {
        shim.launch(&Launch::new(kernel, [blocks, 1, 1], threads).words(&values), order, "")
    };
    let wrong = [
        ("planted_race", 1, 64, "race: "),
        ("planted_race_of_warp", 1, 32, "race: "),
        ("planted_race_of_blocks", 2, 64, "race: "),
        ("planted_late_write", 1, 64, "race: "),
        ("planted_divergence", 1, 64, "ended"),
        ("planted_overrun", 1, 64, "beside every buffer"),
        ("planted_unwritten", 1, 64, "nobody wrote"),
        ("planted_early_read", 1, 64, "a copy is under way"),
        ("planted_copies_of_others", 1, 64, "a copy is under way"),
        ("planted_early_copy", 1, 64, "shared memory at byte"),
        ("planted_lost_copy", 1, 64, "ended while its copies"),
        ("planted_misaligned_copy", 1, 64, "multiple of as many"),
    ];
    for (kernel, blocks, threads, word) in wrong {
        for order in [0, 1, 2, 3] {
            let fault = found(kernel, blocks, threads, order).expect_err(kernel);
            assert!(fault.contains(word), "{kernel}: {fault}");
        }
    }
    for order in [0, 1, 2, 3] {
        let buffers = found("planted_none", 1, 64, order).expect("nothing is wrong with it");
        let expected: Vec<u32> = (0..64).map(|i: u32| (63 - i) / 32 * 32 + 31 - (63 - i) % 32).collect();
        assert_eq!(buffers.words(0), expected);
        let buffers = found("planted_no_bad_copy", 1, 64, order).expect("nothing is wrong with it");
        assert_eq!(buffers.words(0), (0..64).rev().collect::<Vec<u32>>());
    }
}

#[test]
fn rows_are_embedded() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(1);
    for (dtype, name) in TYPES {
        for hidden in [1, 8, 77, 136] {
            let table = stored(dtype, &operands.values(9 * hidden));
            let tokens = [3, 0, 8, 3];
            let launch = Launch::new(&format!("embed_{name}"), [4, 1, 1], 64).bytes(&table).words(&tokens);
            let found = shim.check(&launch.room(4 * hidden).word(hidden).value(1.7));
            let mut expected = vec![0.0; 4 * hidden];
            for (token, out) in tokens.iter().zip(expected.chunks_mut(hidden)) {
                let size = hidden * dtype.bytes();
                convert::widen(Isa::Scalar, dtype, &table[*token as usize * size..][..size], out);
                out.iter_mut().for_each(|value| *value *= 1.7);
            }
            assert_bits(name, &found.values(2), &expected);
        }
    }
    // Every value that a table of 16 bits may hold.
    for (dtype, name) in [(DType::Bf16, "bf16"), (DType::F16, "f16")] {
        let table: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        let launch = Launch::new(&format!("embed_{name}"), [1, 1, 1], 256).bytes(&table).words(&[0]);
        let found = shim.launch(&launch.room(1 << 16).word(1 << 16).value(1.0), 0, "").unwrap();
        let mut expected = vec![0.0; 1 << 16];
        convert::widen(Isa::Scalar, dtype, &table, &mut expected);
        assert_bits(name, &found.values(2), &expected);
    }
}

#[test]
fn rows_are_normalised() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(2);
    for n in [1, 15, 16, 72, 1024, 1061, 2 * 1024 + 5, 9 * 1024 + 1] {
        let (x, weight, bias) = (operands.values(2 * n), operands.values(n), operands.values(n));
        for threads in [32, 256] {
            let launch = Launch::new("rms_norm", [2, 1, 1], threads).values(&x).values(&weight);
            let found = shim.check(&launch.room(2 * n).word(n).word(n).value(1e-5));
            let mut expected = vec![0.0; 2 * n];
            for (out, x) in expected.chunks_mut(n).zip(x.chunks(n)) {
                rms_norm(Isa::Scalar, x, &weight, 1e-5, out);
            }
            assert_bits(&format!("rms_norm of {n}"), &found.values(2), &expected);
            for bias in [None, Some(&bias[..])] {
                let launch = Launch::new("layer_norm", [2, 1, 1], threads).values(&x).values(&weight);
                let found = shim.check(&launch.values_if(bias).room(2 * n).word(n).value(1e-5));
                for (out, x) in expected.chunks_mut(n).zip(x.chunks(n)) {
                    layer_norm(Isa::Scalar, x, &weight, bias, 1e-5, out);
                }
                assert_bits(
                    &format!("layer_norm of {n}"),
                    &found.values(2 + usize::from(bias.is_some())),
                    &expected,
                );
            }
        }
    }
    shim.finish("contract.cuh");
}

#[test]
fn positions_are_rotated() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(3);
    for (heads, head_dim, dims) in [(1, 2, 2), (3, 72, 64), (2, 128, 128), (5, 9, 6)] {
        let table = RopeTable::new(&rope::inverse_frequencies(10_000.0, dims), 1.25, 40);
        let cosines: Vec<f32> = (0..40).flat_map(|at| table.row(at).0).copied().collect();
        let sines: Vec<f32> = (0..40).flat_map(|at| table.row(at).1).copied().collect();
        let positions = [0, 39, 7];
        let values = operands.values(positions.len() * heads * head_dim);
        for neighbours in [false, true] {
            let launch = Launch::new("rope", [3, 1, 1], 32)
                .values(&values)
                .words(&positions)
                .values(&cosines)
                .values(&sines);
            let launch = launch.word(heads).word(head_dim).word(dims / 2).word(usize::from(neighbours));
            let found = shim.check(&launch);
            let mut expected = values.clone();
            for (row, position) in expected.chunks_mut(heads * head_dim).zip(positions) {
                for head in row.chunks_mut(head_dim) {
                    if neighbours {
                        table.apply_to_neighbours(head, position)
                    } else {
                        table.apply(head, position)
                    }
                }
            }
            assert_bits("rope", &found.values(0), &expected);
        }
    }
}

#[test]
fn latents_are_normalised_before_their_keys() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(12);
    let (rank, width) = (70, 83);
    let (cached, weight) = (operands.values(3 * width), operands.values(rank));
    let launch = Launch::new("rms_norm", [3, 1, 1], 64).values(&cached).values(&weight).same_as(0);
    let found = shim.check(&launch.word(rank).word(width).value(1e-6)).values(0);
    let mut expected = cached;
    for row in expected.chunks_mut(width) {
        rms_norm_in_place(Isa::Scalar, &mut row[..rank], &weight, 1e-6);
    }
    assert_bits("rms_norm of latents", &found, &expected);
}

#[test]
fn columns_are_arranged() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(13);
    // All at multiples of sixteen bytes; all but one, each in turn; none.
    let forms = [
        (64, 96, 32, 80, 16),
        (6, 16, 4, 16, 4),
        (8, 18, 4, 16, 4),
        (8, 16, 6, 16, 4),
        (8, 16, 4, 17, 4),
        (8, 16, 4, 16, 6),
        (131, 133, 1, 135, 3),
    ];
    for (n, x_stride, from, out_stride, to) in forms {
        let (x, out) = (operands.values(6 * x_stride), operands.values(4 * out_stride));
        for picked in [None, Some([5u32, 0, 3, 3])] {
            let launch = Launch::new("arrange", [4, 1, 1], 32).values(&x);
            let launch = if let Some(picked) = picked { launch.words(&picked) } else { launch.null() };
            let launch = launch.values(&out).word(n).word(x_stride).word(from).word(out_stride).word(to);
            let found = shim.check(&launch).values(1 + usize::from(picked.is_some()));
            let mut expected = out.clone();
            for (row, out) in expected.chunks_mut(out_stride).enumerate() {
                let x = &x[picked.map_or(row, |picked| picked[row] as usize) * x_stride..];
                out[to..to + n].copy_from_slice(&x[from..from + n]);
            }
            assert_bits("arrange", &found, &expected);
        }
    }
}
