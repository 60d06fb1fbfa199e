//! Matrix products, of floats and of integers.

use crate::{TYPES, ready, stored};
use lite_llm_model::kernels::*;
use lite_llm_tests::cuda::{Launch, Operands, Shim, assert_bits};

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

    fn grouped(
        kind: Quantised,
        outputs: usize,
        inputs: usize,
        has_bias: bool,
        operands: &mut Operands,
    ) -> Self {
        let mut packed = vec![0; packed_len(kind, outputs, inputs).unwrap()];
        pack_groups(kind, outputs, inputs, &rows_of(kind, outputs, inputs, operands), &mut packed);
        let bias = has_bias.then(|| operands.values(outputs));
        Self { storage: kind.into(), outputs, inputs, packed, bias }
    }

    fn coded(
        storage: Storage,
        outputs: usize,
        inputs: usize,
        has_bias: bool,
        operands: &mut Operands,
    ) -> Self {
        let mut packed = vec![0; packed_len(storage, outputs, inputs).unwrap()];
        let codes: Vec<u8> = (0..outputs * inputs).map(|_| operands.word() as u8).collect();
        let code = |output, input| codes[output * inputs + input];
        if storage == Storage::Mxfp4 {
            // Subnormal powers too, and one that is no number.
            let exponent = |output, block| match (output * 7 + block) % 11 {
                0 => 0,
                1 => 1,
                2 if output == 5 => u8::MAX,
                other => 120 + other as u8,
            };
            pack_mxfp4(outputs, inputs, code, exponent, &mut packed);
        } else {
            let factors = operands.values(outputs.div_ceil(128) * inputs.div_ceil(128));
            // Without what is no number but for one, which makes a block none.
            let code = |output, input| {
                if (output, input) == (0, inputs - 1) { 0x7f } else { code(output, input) & 0xf7 }
            };
            let factor = |down, across| factors[down * inputs.div_ceil(128) + across];
            pack_e4m3(outputs, inputs, code, factor, &mut packed);
        }
        Self { storage, outputs, inputs, packed, bias: has_bias.then(|| operands.values(outputs)) }
    }

    fn product(&self, x: &[f32]) -> Vec<f32> {
        let rows = x.len() / self.inputs;
        let mut out = vec![0.0; rows * self.outputs];
        let view = PackedView::new(self.storage, self.outputs, self.inputs, &self.packed).unwrap();
        linear(&Pool::new(1), Isa::Scalar, x, rows, &view, self.bias.as_deref(), &mut out);
        out
    }
}

/// Quantised rows.
fn rows_of(kind: Quantised, outputs: usize, inputs: usize, operands: &mut Operands) -> Vec<u8> {
    let mut rows = vec![0; outputs * kind.row_bytes(inputs)];
    for row in rows.chunks_mut(kind.row_bytes(inputs)) {
        quantise::quantise_row(kind, &operands.values(inputs), row).unwrap();
    }
    rows
}

/// Several products in one grid, as experts are: bytes of all matrices, where each has its weights and bias, which rows are whose.
fn products(shim: &mut Shim, form: &str, matrices: &[&Matrix], x: &[f32], rows: &[usize]) -> Vec<f32> {
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
    let (x, words) = repacked(shim, matrices[0].storage, x, &picked, inputs);
    let kernel = format!("linear_{form}_{}", name(matrices[0].storage));
    let grouped = !words.is_empty();
    let (wide, high, threads) = match form {
        "one_row" => (16, 1, 256),
        "few_rows" => (16, 4, 256),
        "some_rows" if grouped => (64, 32, 128),
        "many_rows" if grouped => (64, 64, 128),
        "some_rows" => (128, 32, 128),
        _ => (128, 64, 128),
    };
    // A column of blocks more than the rows take.
    let most = rows.iter().max().expect("there are products").div_ceil(high) + 1;
    let grid = [outputs.div_ceil(wide) as u32, most as u32, matrices.len() as u32];
    let launch = Launch::new(&kernel, grid, threads).values(&x);
    let launch = launch.bytes(&arena).longs(&weights_at);
    let has_bias = matrices[0].bias.is_some();
    let launch = if has_bias { launch.bytes(&arena).longs(&biases_at) } else { launch.null().null() };
    let launch = launch.words(&first_row).room(all * outputs).word(inputs).word(outputs);
    let launch = if words.is_empty() { launch } else { launch.words(&words) };
    shim.check(&launch).values(if has_bias { 6 } else { 4 })
}

/// Picked rows in the form that products want: in their order, or as scales and integers.
fn repacked(
    shim: &mut Shim,
    storage: Storage,
    x: &[f32],
    picked: &[u32],
    inputs: usize,
) -> (Vec<f32>, Vec<u32>) {
    if matches!(storage, Storage::Grouped(_)) {
        let groups = picked.len() * inputs.div_ceil(32);
        let grid = [inputs.div_ceil(32).div_ceil(8) as u32, picked.len() as u32, 1];
        let launch = Launch::new("quantise", grid, 256).values(x).words(picked).room(groups * 8).room(groups);
        let found = shim.check(&launch.word(inputs));
        return (found.values(3), found.words(2));
    }
    let chunks = inputs.div_ceil(1024);
    let launch = Launch::new("repack", [chunks as u32, picked.len() as u32, 1], 256).values(x).words(picked);
    (shim.check(&launch.room(picked.len() * chunks * 1024).word(inputs)).values(2), vec![])
}

fn name(storage: Storage) -> &'static str {
    match storage {
        Storage::Plain(DType::F32) => "f32",
        Storage::Plain(DType::Bf16) => "bf16",
        Storage::Plain(DType::F16) => "f16",
        Storage::Grouped(Quantised::Q8) => "q8",
        Storage::Grouped(Quantised::Q4) => "q4",
        Storage::Mxfp4 => "mxfp4",
        Storage::E4m3 => "e4m3",
    }
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

/// Two matrices of a kind by one form of the kernels.
fn check(shim: &mut Shim, matrices: [&Matrix; 2], form: &str, rows: [usize; 2], x: &[f32]) {
    let found = products(shim, form, &matrices, x, &rows);
    let what = format!("{form} {:?} {} x {}", matrices[0].storage, matrices[0].outputs, matrices[0].inputs);
    assert_bits(&what, &found, &expected_products(&matrices, x, &rows));
}

#[test]
fn products_of_few_rows_are_the_definition() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(4);
    for (dtype, _) in TYPES {
        for (outputs, inputs, bias) in
            [(1, 1, false), (17, 100, true), (33, 1061, false), (16, 9 * 1024 + 40, true)]
        {
            let own = |operands: &mut Operands| Matrix::plain(dtype, outputs, inputs, bias, operands);
            let matrices = [&own(&mut operands), &own(&mut operands)];
            for (form, rows) in [("one_row", [1, 1]), ("few_rows", [6, 3])] {
                let x = operands.values(rows.iter().sum::<usize>() * inputs);
                check(&mut shim, matrices, form, rows, &x);
            }
        }
    }
    shim.finish("linear.cu");
}

#[test]
fn products_of_many_rows_are_the_definition() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(5);
    for (dtype, _) in TYPES {
        // Pieces that are whole, end after a four of steps and amid one; blocks of all their rows, of half of them or less.
        for (form, outputs, inputs, bias, rows) in [
            ("some_rows", 134, 1355, true, [34, 5]),
            ("many_rows", 134, 1061, false, [70, 34]),
            ("many_rows", 3, 20, true, [1, 33]),
            ("some_rows", 3, 2048, false, [17, 0]),
        ] {
            let own = |operands: &mut Operands| Matrix::plain(dtype, outputs, inputs, bias, operands);
            let matrices = [&own(&mut operands), &own(&mut operands)];
            let x = operands.values(rows.iter().sum::<usize>() * inputs);
            check(&mut shim, matrices, form, rows, &x);
        }
    }
    shim.finish("linear.cu");
}

#[test]
fn products_of_codes_are_the_definition() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(9);
    for storage in [Storage::Mxfp4, Storage::E4m3] {
        for (outputs, inputs, bias) in [(1, 1, true), (33, 1061, true), (18, 2 * 1024 + 144, false)] {
            let own = |operands: &mut Operands| Matrix::coded(storage, outputs, inputs, bias, operands);
            let matrices = [&own(&mut operands), &own(&mut operands)];
            let forms =
                [("one_row", [1, 1]), ("few_rows", [6, 3]), ("some_rows", [7, 18]), ("many_rows", [33, 5])];
            for (form, rows) in forms {
                if form == "many_rows" && inputs > 2000 {
                    continue;
                }
                let x = operands.values(rows.iter().sum::<usize>() * inputs);
                check(&mut shim, matrices, form, rows, &x);
            }
        }
    }
}

#[test]
fn products_that_overflow_are_the_definition() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(6);
    let (outputs, inputs) = (20, 1100);
    let huge = |operands: &mut Operands, count: usize| -> Vec<f32> {
        // Sums that become infinite and, of both signs, no number.
        operands.values(count).iter().map(|value| value * 1e19).collect()
    };
    let mut packed = vec![0; packed_len(DType::F32, outputs, inputs).unwrap()];
    pack(
        DType::F32,
        outputs,
        inputs,
        &stored(DType::F32, &huge(&mut operands, outputs * inputs)),
        &mut packed,
    );
    let matrix = Matrix { storage: DType::F32.into(), outputs, inputs, packed, bias: None };
    let mut x = huge(&mut operands, 4 * inputs);
    x[7] = f32::INFINITY;
    x[2 * inputs + 30] = f32::NAN;
    for form in ["few_rows", "some_rows", "many_rows"] {
        check(&mut shim, [&matrix, &matrix], form, [3, 1], &x);
    }
}

/// Products so small that a sum is a zero: its sign tells whether inputs were padded.
#[test]
fn products_that_underflow_are_the_definition() {
    let Some(mut shim) = ready() else { return };
    for inputs in [16, 20, 32] {
        let mut packed = vec![0; packed_len(DType::F32, 2, inputs).unwrap()];
        pack(DType::F32, 2, inputs, &stored(DType::F32, &vec![1e-30; 2 * inputs]), &mut packed);
        let matrix = Matrix { storage: DType::F32.into(), outputs: 2, inputs, packed, bias: None };
        let mut x = vec![-1e-30; 4 * inputs];
        x[3 * inputs..].fill(1e-30);
        assert_eq!(matrix.product(&x)[0].is_sign_negative(), inputs % 16 == 0);
        for form in ["few_rows", "some_rows", "many_rows"] {
            check(&mut shim, [&matrix, &matrix], form, [3, 1], &x);
        }
    }
}

/// A scale so small that it is rounded down by a third: integers beyond 127 are clamped.
#[test]
fn integers_of_subnormals_are_clamped() {
    let Some(mut shim) = ready() else { return };
    let (outputs, inputs) = (3, 32);
    let mut rows = vec![0; outputs * Quantised::Q8.row_bytes(inputs)];
    for row in rows.chunks_mut(Quantised::Q8.row_bytes(inputs)) {
        quantise::quantise_row(Quantised::Q8, &vec![3e5; inputs], row).unwrap();
    }
    let mut packed = vec![0; packed_len(Quantised::Q8, outputs, inputs).unwrap()];
    pack_groups(Quantised::Q8, outputs, inputs, &rows, &mut packed);
    let matrix = Matrix { storage: Quantised::Q8.into(), outputs, inputs, packed, bias: None };
    let mut x = vec![0.0; 2 * inputs];
    x[0] = f32::from_bits(190);
    x[inputs] = -f32::from_bits(189);
    assert!(matrix.product(&x)[0] > 0.0);
    check(&mut shim, [&matrix, &matrix], "one_row", [1, 1], &x);
}

#[test]
fn products_of_integers_are_the_definition() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(7);
    for kind in [Quantised::Q8, Quantised::Q4] {
        for (outputs, inputs, bias) in [(1, 1, false), (33, 96, true), (70, 2500, false)] {
            let own = |operands: &mut Operands| Matrix::grouped(kind, outputs, inputs, bias, operands);
            let matrices = [&own(&mut operands), &own(&mut operands)];
            let forms =
                [("one_row", [1, 1]), ("few_rows", [6, 3]), ("some_rows", [34, 5]), ("many_rows", [70, 5])];
            for (form, rows) in forms {
                if matches!(form, "some_rows" | "many_rows") && inputs > 2000 && kind == Quantised::Q4 {
                    continue;
                }
                let mut x = operands.values(rows.iter().sum::<usize>() * inputs);
                // Groups of zeros and of subnormals; rows with something that is no number.
                let zeros = 32.min(inputs);
                x[..zeros].fill(-0.0);
                let last = x.len() - inputs;
                x[last..last + zeros].fill(f32::from_bits(3));
                x[inputs / 2] = 5e-44;
                if rows[0] == 6 {
                    x[inputs + inputs / 2] = f32::NEG_INFINITY;
                    x[4 * inputs] = f32::NAN;
                }
                check(&mut shim, matrices, form, rows, &x);
            }
        }
    }
    shim.finish("grouped.cu");
}

#[test]
fn rows_of_integers_are_embedded() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(8);
    for kind in [Quantised::Q8, Quantised::Q4] {
        for hidden in [1, 64, 77] {
            let table = rows_of(kind, 9, hidden, &mut operands);
            let tokens = [3, 0, 8, 3];
            let launch = Launch::new(&format!("embed_{}", name(kind.into())), [4, 1, 1], 64).bytes(&table);
            let found = shim.check(&launch.words(&tokens).room(4 * hidden).word(hidden).value(1.7));
            let mut expected = vec![0.0; 4 * hidden];
            for (token, out) in tokens.iter().zip(expected.chunks_mut(hidden)) {
                let size = kind.row_bytes(hidden);
                quantise::dequantise_row(kind, &table[*token as usize * size..][..size], out);
                out.iter_mut().for_each(|value| *value *= 1.7);
            }
            assert_bits("embedding", &found.values(2), &expected);
        }
    }
}
