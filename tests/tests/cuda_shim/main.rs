//! The kernels of CUDA give the bits of the CPU's scalar ones: compiled for the CPU, in several orders of their threads, under a
//! shadow memory that finds accesses which no barrier orders. Each barrier is left out once, which has to be found.

mod attention;
mod moe;
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
            let found = shim.check(&launch.room(2 * n).word(n).value(1e-5));
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

/// A matrix in the packed layout.
struct Matrix {
    storage: Storage,
    outputs: usize,
    inputs: usize,
    packed: Vec<u8>,
    bias: Option<Vec<f32>>,
}

impl Matrix {
    fn plain(dtype: DType, outputs: usize, inputs: usize, has_bias: bool, operands: &mut Operands) -> Self {
        let mut packed = vec![0; packed_len(dtype, outputs, inputs).unwrap()];
        pack(dtype, outputs, inputs, &stored(dtype, &operands.values(outputs * inputs)), &mut packed);
        let bias = has_bias.then(|| operands.values(outputs));
        Self { storage: dtype.into(), outputs, inputs, packed, bias }
    }

    fn product(&self, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.inputs;
        let mut out = vec![0.0; rows * self.outputs];
        let view = PackedView::new(self.storage, self.outputs, self.inputs, &self.packed).unwrap();
        linear(&Pool::new(1), Isa::Scalar, x, rows, &view, self.bias.as_deref(), &mut out);
        out
    }
}

/// Several products in one grid, as experts are: bytes of all matrices, where each has its weights and bias, which rows are whose.
fn products(
    shim: &mut Shim,
    kernel: &str,
    grid: [u32; 2],
    matrices: &[&Matrix],
    x: &[f32],
    rows: &[usize],
) -> Vec<f32> {
    let (outputs, inputs) = (matrices[0].outputs, matrices[0].inputs);
    let (mut arena, mut weights_at, mut biases_at, mut first_row) = (vec![], vec![], vec![], vec![0]);
    for (matrix, rows) in matrices.iter().zip(rows) {
        weights_at.push(arena.len() as u64);
        arena.extend(&matrix.packed);
        biases_at.push(arena.len() as u64);
        arena.extend(matrix.bias.iter().flatten().flat_map(|value| value.to_le_bytes()));
        arena.resize(arena.len().next_multiple_of(16), 0xee);
        first_row.push(first_row.last().unwrap() + *rows as u32);
    }
    let all = *first_row.last().unwrap() as usize;
    // Rows are picked from the end, as if a router had chosen.
    let picked: Vec<u32> = (0..all as u32).rev().collect();
    let chunks = inputs.div_ceil(1024);
    let launch = Launch::new("repack", [chunks as u32, all as u32, 1], 256).values(x).words(&picked);
    let repacked = shim.check(&launch.room(all * chunks * 1024).word(inputs)).values(2);
    let launch = Launch::new(kernel, [grid[0], grid[1], matrices.len() as u32], 256).values(&repacked);
    let launch = launch.bytes(&arena).longs(&weights_at);
    let has_bias = matrices[0].bias.is_some();
    let launch = if has_bias { launch.bytes(&arena).longs(&biases_at) } else { launch.null().null() };
    let launch = launch.words(&first_row).room(all * outputs).word(inputs).word(outputs);
    shim.check(&launch).values(if has_bias { 6 } else { 4 })
}

/// What products of picked rows have to be.
fn expected_products(matrices: &[&Matrix], x: &[f32], rows: &[usize]) -> Vec<f32> {
    let inputs = matrices[0].inputs;
    let mut picked = x.chunks(inputs).rev();
    let mut expected = vec![];
    for (matrix, rows) in matrices.iter().zip(rows) {
        let x: Vec<f32> = picked.by_ref().take(*rows).flatten().copied().collect();
        expected.extend(matrix.product(&x));
    }
    expected
}

#[test]
fn products_of_few_rows_are_the_definition() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(4);
    for (dtype, name) in TYPES {
        for (outputs, inputs, bias) in
            [(1, 1, false), (17, 100, true), (33, 1061, false), (16, 9 * 1024 + 40, true)]
        {
            let own = |operands: &mut Operands| Matrix::plain(dtype, outputs, inputs, bias, operands);
            let matrices = [&own(&mut operands), &own(&mut operands)];
            for (kernel, high, rows) in [("one_row", 1, [1, 1]), ("few_rows", 2, [6, 3])] {
                let x = operands.values(rows.iter().sum::<usize>() * inputs);
                let grid = [outputs.div_ceil(16) as u32, high];
                let found =
                    products(&mut shim, &format!("linear_{kernel}_{name}"), grid, &matrices, &x, &rows);
                assert_bits(
                    &format!("{kernel} {name} {inputs}"),
                    &found,
                    &expected_products(&matrices, &x, &rows),
                );
            }
        }
    }
    shim.finish("linear.cu");
}

#[test]
fn products_of_many_rows_are_the_definition() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(5);
    for (dtype, name) in TYPES {
        for (outputs, inputs, bias, rows) in [(70, 1061, true, [70, 5]), (3, 20, false, [1, 64])] {
            let own = |operands: &mut Operands| Matrix::plain(dtype, outputs, inputs, bias, operands);
            let matrices = [&own(&mut operands), &own(&mut operands)];
            let x = operands.values(rows.iter().sum::<usize>() * inputs);
            let grid = [outputs.div_ceil(64) as u32, 2];
            let found = products(&mut shim, &format!("linear_many_rows_{name}"), grid, &matrices, &x, &rows);
            assert_bits(&format!("{name} {inputs}"), &found, &expected_products(&matrices, &x, &rows));
        }
    }
    shim.finish("linear.cu");
}
