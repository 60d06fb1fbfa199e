//! Attention over the paged cache by the kernels of CUDA, over a cache that kernels wrote, rows
//! of several sequences, decode and prefill.

use crate::ready;
use lite_llm_model::kernels::*;
use lite_llm_tests::cuda::{Launch, Operands, Shim, assert_bits};

/// What attends to what.
struct Case {
    shape: KvShape,
    heads: usize,
    window: Option<u32>,
    has_sinks: bool,
}

/// Positions of the sequences.
const LENGTHS: [u32; 2] = [150, 70];
/// Which page of the cache each page of each sequence is.
const PAGES: [&[u32]; 2] = [&[3, 0, 4], &[5, 1]];
/// What lies before the keys of this layer in a page.
const KEYS_AT: usize = 32;
const ALL_PAGES: usize = 6;
/// Rows that are computed together, of one sequence each.
const ROWS: [(usize, &[u32]); 4] = [(0, &[149]), (0, &[0, 63, 64, 130, 131]), (1, &[69]), (1, &[3, 4])];

impl Case {
    fn page_bytes(&self) -> usize {
        KEYS_AT + self.shape.key_page_bytes() + self.shape.value_page_bytes()
    }

    fn values_at(&self) -> usize {
        if self.shape.values_in_keys { KEYS_AT } else { KEYS_AT + self.shape.key_page_bytes() }
    }

    fn page(&self, sequence: usize, position: u32) -> u32 {
        PAGES[sequence][position as usize / PAGE_POSITIONS]
    }

    /// Writes keys or values of every position, by a kernel and as the model does.
    fn write(&self, shim: &mut Shim, cache: &[u8], is_value: bool, operands: &mut Operands) -> Vec<u8> {
        let dim = if is_value { self.shape.value_dim } else { self.shape.key_dim };
        let at = if is_value { self.values_at() } else { KEYS_AT };
        let all: Vec<(usize, u32)> = (0..2)
            .flat_map(|sequence| (0..LENGTHS[sequence]).map(move |position| (sequence, position)))
            .collect();
        let size = self.shape.kv_heads * dim;
        let values = operands.values(all.len() * size);
        let positions: Vec<u32> = all.iter().map(|(_, position)| *position).collect();
        let pages: Vec<u32> = all.iter().map(|&(sequence, position)| self.page(sequence, position)).collect();
        let kernel = format!("write_cache_{}", name(self.shape.dtype));
        let launch = Launch::new(&kernel, [all.len() as u32, 1, 1], 32)
            .values(&values)
            .words(&positions)
            .words(&pages);
        let launch = launch.bytes(cache).word(self.page_bytes()).word(at).word(self.shape.kv_heads).word(dim);
        let found = shim.check(&launch).bytes(3).to_vec();
        let mut expected = cache.to_vec();
        for (&(sequence, position), values) in all.iter().zip(values.chunks(size)) {
            let page = &mut expected[self.page(sequence, position) as usize * self.page_bytes()..];
            if is_value {
                self.shape.write_values(position, values, &mut page[at..][..self.shape.value_page_bytes()]);
            } else {
                self.shape.write_keys(position, values, &mut page[at..][..self.shape.key_page_bytes()]);
            }
        }
        assert!(found == expected, "the cache differs after {kernel}");
        found
    }

    /// What all rows attend to, by the model.
    fn expected(&self, cache: &[u8], q: &[f32], scale: f32, sinks: Option<&[f32]>) -> Vec<f32> {
        let (mut q, mut expected) = (q, vec![]);
        for (sequence, positions) in ROWS {
            let pages: Vec<KvPage<'_>> = PAGES[sequence]
                .iter()
                .map(|&page| {
                    let page = &cache[page as usize * self.page_bytes()..][..self.page_bytes()];
                    let (keys, values) = page[KEYS_AT..].split_at(self.shape.key_page_bytes());
                    KvPage { keys, values }
                })
                .collect();
            let kv = PagedKv::new(self.shape, &pages).unwrap();
            let params = AttentionParams { heads: self.heads, scale, window: self.window, sinks };
            let own = q.split_off(..positions.len() * self.heads * self.shape.key_dim).unwrap();
            let mut out = vec![0.0; positions.len() * self.heads * self.shape.value_dim];
            attention(&Pool::new(1), Isa::Scalar, own, positions, &kv, &params, &mut out);
            expected.extend(out);
        }
        expected
    }

    /// The arguments that all kernels have first.
    fn rows(&self, kernel: &str, grid: [u32; 3], threads: u32, cache: &[u8], span: usize) -> Launch {
        let mut first_row = vec![0];
        for (_, positions) in ROWS {
            first_row.push(first_row.last().unwrap() + positions.len() as u32);
        }
        let positions: Vec<u32> = ROWS.iter().flat_map(|(_, positions)| *positions).copied().collect();
        let first_page: Vec<u32> =
            ROWS.iter().map(|(sequence, _)| *sequence as u32 * PAGES[0].len() as u32).collect();
        let launch =
            Launch::new(kernel, grid, threads).words(&positions).words(&first_row).words(&first_page);
        let launch = launch.words(&PAGES.concat()).bytes(cache).word(self.page_bytes()).word(self.heads);
        launch.word(self.shape.kv_heads).word(self.window.unwrap_or(0) as usize).word(span)
    }

    fn check(&self, shim: &mut Shim, operands: &mut Operands) {
        let KvShape { kv_heads, key_dim, value_dim, values_in_keys, dtype } = self.shape;
        let mut cache = vec![0x7f; ALL_PAGES * self.page_bytes()];
        cache = self.write(shim, &cache, false, operands);
        if !values_in_keys {
            cache = self.write(shim, &cache, true, operands);
        }
        let rows: usize = ROWS.iter().map(|(_, positions)| positions.len()).sum();
        let q: Vec<f32> =
            operands.values(rows * self.heads * key_dim).iter().map(|value| value * 4.0).collect();
        let (scale, sinks) = (0.117_851_13, operands.values(self.heads));
        let sinks = self.has_sinks.then_some(&sinks[..]);

        // One page more than anybody sees, as grids of steps that are recorded are rounded up.
        let (span, queries) = (PAGES[0].len() + 1, rows * self.heads);
        let grid = [span as u32, kv_heads as u32, ROWS.len() as u32];
        let launch =
            self.rows(&format!("attention_scores_{}", name(dtype)), grid, 128, &cache, span).values(&q);
        let launch = launch.room(queries * span * PAGE_POSITIONS).room(queries * span);
        let found = shim.check(&launch.word(KEYS_AT).word(key_dim).value(scale));
        let (scores, maxima) = (found.values(6), found.values(7));

        let launch = self.rows(&format!("attention_mix_{}", name(dtype)), grid, 64, &cache, span);
        let launch = launch.values(&scores).values(&maxima).values_if(sinks);
        let launch = launch.room(queries * span * value_dim).room(queries * span).word(self.values_at());
        let found =
            shim.check(&launch.word(if values_in_keys { key_dim } else { value_dim }).word(value_dim));
        let next = 7 + usize::from(sinks.is_some());
        let (numerators, denominators) = (found.values(next), found.values(next + 1));

        let grid = [self.heads as u32, ROWS.len() as u32, 1];
        let launch = self.rows("attention_sum", grid, 32, &cache, span).values(&maxima).values_if(sinks);
        let launch =
            launch.values(&numerators).values(&denominators).room(queries * value_dim).word(value_dim);
        let found = shim.check(&launch).values(next + 1);
        assert_bits(
            &format!("{:?} {:?}", self.shape, self.window),
            &found,
            &self.expected(&cache, &q, scale, sinks),
        );
    }
}

fn name(dtype: DType) -> &'static str {
    match dtype {
        DType::F32 => "f32",
        DType::Bf16 => "bf16",
        DType::F16 => "f16",
    }
}

#[test]
fn attention_over_pages_is_the_definition() {
    let Some(mut shim) = ready() else { return };
    let mut operands = Operands::new(11);
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let shape = |kv_heads, key_dim, value_dim, values_in_keys| KvShape {
            kv_heads,
            key_dim,
            value_dim,
            values_in_keys,
            dtype,
        };
        // Dimensions that fill no step and no sixteen bytes, grouped heads, latents that are their own values.
        let cases = [
            Case { shape: shape(2, 32, 40, false), heads: 10, window: None, has_sinks: false },
            Case { shape: shape(1, 19, 13, false), heads: 2, window: Some(70), has_sinks: true },
            Case { shape: shape(1, 56, 48, true), heads: 3, window: Some(1), has_sinks: true },
        ];
        for case in cases {
            case.check(&mut shim, &mut operands);
        }
    }
    shim.finish("attention.cu");
}

#[test]
fn values_are_rounded_to_storage() {
    let Some(mut shim) = ready() else { return };
    let mut values = vec![];
    for bits in (0..=u32::MAX).step_by(32_749) {
        // As it is, half-way between two of bfloat16 and of binary16, and half-way between two subnormals of binary16.
        values.extend([bits, bits & 0xffff_0000 | 0x8000, bits & 0xffff_e000 | 0x1000].map(f32::from_bits));
        let halves = (bits >> 16 & 0x7ff) as f32 + 0.5;
        values.push(halves * f32::from_bits((127 - 24) << 23) * if bits & 1 == 0 { 1.0 } else { -1.0 });
    }
    values.retain(|value| !value.is_nan());
    for dtype in [DType::F32, DType::Bf16, DType::F16] {
        let shape =
            KvShape { kv_heads: 1, key_dim: values.len() / 64, value_dim: 1, values_in_keys: false, dtype };
        let mut expected = vec![0; shape.key_page_bytes()];
        for (position, keys) in (0..64).zip(values.chunks_exact(shape.key_dim)) {
            shape.write_keys(position, keys, &mut expected);
        }
        let positions: Vec<u32> = (0..64).collect();
        let launch = Launch::new(&format!("write_cache_{}", name(dtype)), [64, 1, 1], 64).values(&values);
        let launch = launch.words(&positions).words(&[0; 64]).bytes(&vec![0; expected.len()]);
        let launch = launch.word(expected.len()).word(0).word(1).word(shape.key_dim);
        let found = shim.launch(&launch, 0, "").unwrap();
        assert!(found.bytes(3) == expected, "the cache of {dtype:?} differs");
    }
}
