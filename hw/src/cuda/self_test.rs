//! Rule 11 on a device: every kernel on the operands of the golden hashes, which are those of the CPU's self-test, and the hash of its
//! results beside the golden one. Each product goes through all its forms.

mod users;

use super::CudaError;
use super::driver::refusal;
use super::functions::{Form, Function, Linear};
use super::gpu::Gpu;
use super::memory::{ALIGN, Memory};
use super::stream::Arg::{self, At, Long, Value, Word};
use super::stream::Stream;
use bytemuck::Pod;
use cudarc::driver::result;
use lite_llm_core::routing::GroupScore;
use lite_llm_model::arch::Score;
use lite_llm_model::kernels::golden::{
    Attended, Chosen, Columns, Combined, EXP_CHUNK, GoldenExp, NOBODY, Operators, Routed, Rows, golden,
};
use lite_llm_model::kernels::sample::Params;
use lite_llm_model::kernels::{DType, KvShape, PAGE_POSITIONS, PackedView, RopeTable, Storage};
use std::sync::Arc;

/// Memory for the operands and results of one operator, which is given back.
const ROOM_BYTES: u64 = 8 << 20;
/// What results are before they are written: nothing that a kernel gives.
const UNWRITTEN: u8 = 0xa5;
/// Threads of a block, where it does not matter how many there are.
const THREADS: u32 = 128;
/// Chunks of exponentials of a launch: their hashes have room.
const CHUNKS: u32 = 1 << 16;
/// What stands for no logit that is not finite.
const NO_FAULT: u32 = u32::MAX;
/// What lies before the keys in a page of the cache, as those of other layers do.
const BEFORE_KEYS: usize = 32;

/// A kernel that was tried.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tried {
    /// Its operator, and of a product its form.
    pub kernel: String,
    /// The golden hash.
    pub expected: u64,
    /// The hash of what it gave.
    pub found: u64,
}

impl Tried {
    /// Whether it gives the golden bits.
    pub const fn is_right(&self) -> bool {
        self.expected == self.found
    }
}

/// Tries every kernel.
///
/// # Errors
/// If the device is lost, or has no memory for it.
pub fn try_kernels(gpu: &Arc<Gpu>) -> Result<Vec<Tried>, CudaError> {
    Desk::with(gpu, |desk| {
        let mut tried = Vec::new();
        for golden in golden() {
            let (name, forms) = match golden.product() {
                None => (golden.kernel, [("", ONE_ROW)].as_slice()),
                Some((product, Rows::Few)) => (product, &FORMS[..2]),
                Some((product, Rows::Many)) => (product, &FORMS[2..]),
            };
            for (of_form, form) in forms {
                desk.form = *form;
                let found = golden.found(desk)?;
                tried.push(Tried { kernel: format!("{name}{of_form}"), expected: golden.hash, found });
            }
        }
        tried.push(users::try_users(desk)?);
        Ok(tried)
    })
}

/// Tries the exponential of very many inputs.
///
/// # Errors
/// As above.
pub fn try_exponential(gpu: &Arc<Gpu>, of: GoldenExp) -> Result<Tried, CudaError> {
    Desk::with(gpu, |desk| {
        let mut hashes: Vec<u64> = Vec::new();
        while (hashes.len() as u32) < of.chunks() {
            let first = hashes.len() as u32;
            hashes.extend(desk.exponential_hashes(of.every, first, (of.chunks() - first).min(CHUNKS))?);
        }
        let found = GoldenExp::of_chunks(hashes);
        let kernel = format!("exp of {} inputs", u64::from(of.chunks()) * u64::from(EXP_CHUNK));
        Ok(Tried { kernel, expected: of.hash, found })
    })
}

/// A form of the kernels of a product, by name.
type Named = (&'static str, fn(Linear) -> Form);

const ONE_ROW: fn(Linear) -> Form = |linear| linear.one_row;

const FORMS: [Named; 4] = [
    (" of one row", ONE_ROW),
    (" of few rows", |linear| linear.few_rows),
    (" of some rows", |linear| linear.some_rows),
    (" of many rows", |linear| linear.many_rows),
];

/// The operators on a device.
struct Desk {
    // In this order: the stream goes first.
    stream: Stream,
    memory: Memory,
    gpu: Arc<Gpu>,
    used: u64,
    form: fn(Linear) -> Form,
}

type Values = Result<Vec<f32>, CudaError>;

impl Desk {
    /// Does something at a desk that is made for it. The budget of the device is nobody's yet, and so again after it.
    fn with<T>(gpu: &Arc<Gpu>, work: impl FnOnce(&mut Self) -> Result<T, CudaError>) -> Result<T, CudaError> {
        gpu.set_limit(ROOM_BYTES);
        let made = || {
            let stream = Stream::new(gpu)?;
            let memory = Memory::new(gpu, "the self-test", ROOM_BYTES)?;
            Ok(Self { stream, memory, gpu: Arc::clone(gpu), used: 0, form: ONE_ROW })
        };
        let done = made().and_then(|mut desk| {
            let done = work(&mut desk);
            if done.is_err() {
                // What is under way may never end, and would be waited for.
                gpu.lose();
            }
            done
        });
        gpu.set_limit(0);
        done
    }

    fn place(&mut self, bytes: usize) -> u64 {
        let at = self.used;
        self.used = (at + bytes as u64).next_multiple_of(ALIGN);
        assert!(self.used <= ROOM_BYTES, "there is room for what is tried");
        at
    }

    fn put<T: Pod>(&mut self, values: &[T]) -> Result<Arg, CudaError> {
        let bytes: &[u8] = bytemuck::cast_slice(values);
        let at = self.place(bytes.len());
        self.memory.fill(at, bytes)?;
        Ok(At(self.memory.at() + at))
    }

    /// Room for results, of which it can be told whether they were written.
    fn room(&mut self, bytes: usize) -> Result<Arg, CudaError> {
        self.put(&vec![UNWRITTEN; bytes])
    }

    fn run(
        &self,
        function: Function,
        blocks: [u32; 3],
        threads: u32,
        arguments: &[Arg],
    ) -> Result<(), CudaError> {
        // SAFETY: below, each kernel gets the arguments that its source names, in their order. Addresses are of this desk's memory,
        // which has what was put there and room for the results, and lives until the stream was waited for.
        unsafe { self.stream.launch(function, blocks, threads, arguments) }
    }

    /// What stands there, once all is done. What follows may use the memory again.
    fn take<T: Pod>(&mut self, at: Arg, count: usize) -> Result<Vec<T>, CudaError> {
        self.stream.wait()?;
        let mut values = vec![T::zeroed(); count];
        let (At(at), bytes) = (at, bytemuck::cast_slice_mut::<T, u8>(&mut values)) else {
            unreachable!("results stand at an address")
        };
        // SAFETY: the place is of this memory, and has room for as many.
        unsafe { result::memcpy_dtoh_sync(bytes, at) }.map_err(refusal("cuMemcpyDtoH"))?;
        self.used = 0;
        Ok(values)
    }

    fn exponential_hashes(&mut self, every: u32, first: u32, count: u32) -> Result<Vec<u64>, CudaError> {
        let hashes = self.room(8 * count as usize)?;
        let arguments = [hashes, Word(first), Word(every), Word(count)];
        let blocks = [count.div_ceil(THREADS), 1, 1];
        self.run(self.gpu.functions.exponential_hashes, blocks, THREADS, &arguments)?;
        self.take(hashes, count as usize)
    }

    /// Writes keys or values of all positions into the cache.
    fn write(
        &mut self,
        attended: &Attended<'_>,
        values: &[f32],
        dim: usize,
        (cache, page_bytes, at): (Arg, usize, usize),
    ) -> Result<(), CudaError> {
        let positions: Vec<u32> = (0..attended.len() as u32).collect();
        let pages: Vec<u32> = positions.iter().map(|at| page(at / PAGE_POSITIONS as u32, attended)).collect();
        let heads = attended.shape.kv_heads as u32;
        let arguments = [
            self.put(values)?,
            self.put(&positions)?,
            self.put(&pages)?,
            cache,
            Long(page_bytes as u64),
            Long(at as u64),
            Word(heads),
            Word(dim as u32),
        ];
        let write = self.gpu.functions.of_cache(attended.shape.dtype).write;
        self.run(write, [positions.len() as u32, 1, 1], THREADS, &arguments)
    }
}

/// Where a page of a sequence is in the cache: the last one first.
fn page(number: u32, attended: &Attended<'_>) -> u32 {
    attended.pages() as u32 - 1 - number
}

/// A share as the kernel takes it: in multiples of 2^-32.
fn share(value: f32) -> u64 {
    (f64::from(value) * 4_294_967_296.0).round_ties_even() as u64
}

impl Operators for Desk {
    type Error = CudaError;

    fn linear(&mut self, x: &[f32], rows: usize, weights: &PackedView<'_>, bias: Option<&[f32]>) -> Values {
        let (inputs, outputs, storage) = (weights.inputs(), weights.outputs(), weights.storage());
        // Rows stand from the last to the first, and are picked back; two thirds of them are of another product than the rest.
        let reversed: Vec<f32> = x.chunks_exact(inputs).rev().flatten().copied().collect();
        let picked: Vec<u32> = (0..rows as u32).rev().collect();
        let of_first = (rows - rows / 3) as u32;
        let mut matrices = weights.bytes().to_vec();
        matrices.resize(matrices.len().next_multiple_of(16), 0);
        let second = matrices.len() as u64;
        matrices.extend(weights.bytes());
        let [x, picked] = [self.put(&reversed)?, self.put(&picked)?];
        let [bias, biases_at] = match bias {
            Some(bias) => [self.put(bias)?, self.put(&[0u64, 0])?],
            None => [At(0); 2],
        };
        let [matrices, weights_at] = [self.put(&matrices)?, self.put(&[0, second])?];
        let first_row = self.put(&[0, of_first, rows as u32])?;
        let out = self.room(4 * rows * outputs)?;
        let form = (self.form)(self.gpu.functions.linear(storage));
        let mut arguments = vec![
            matrices,
            weights_at,
            bias,
            biases_at,
            first_row,
            out,
            Word(inputs as u32),
            Word(outputs as u32),
        ];
        if matches!(storage, Storage::Grouped(_)) {
            let groups = inputs.div_ceil(32);
            let [words, scales] = [self.room(32 * rows * groups)?, self.room(4 * rows * groups)?];
            let blocks = [groups.div_ceil(8) as u32, rows as u32, 1];
            let of_rows = [x, picked, words, scales, Word(inputs as u32)];
            self.run(self.gpu.functions.quantise, blocks, 256, &of_rows)?;
            arguments.insert(0, scales);
            arguments.push(words);
        } else {
            let chunks = inputs.div_ceil(1024);
            let packed = self.room(4 * rows * chunks * 1024)?;
            let of_rows = [x, picked, packed, Word(inputs as u32)];
            self.run(self.gpu.functions.repack, [chunks as u32, rows as u32, 1], 256, &of_rows)?;
            arguments.insert(0, packed);
        }
        let [x, y] = form.blocks(outputs as u32, of_first);
        self.run(form.function, [x, y, 2], form.threads, &arguments)?;
        self.take(out, rows * outputs)
    }

    fn attention(&mut self, attended: &Attended<'_>) -> Values {
        let Attended { shape, keys, values, q, positions, params } = *attended;
        let KvShape { kv_heads, key_dim, value_dim, values_in_keys, dtype } = shape;
        let page_bytes = BEFORE_KEYS + shape.key_page_bytes() + shape.value_page_bytes();
        let cache = self.room(attended.pages() * page_bytes)?;
        self.write(attended, keys, key_dim, (cache, page_bytes, BEFORE_KEYS))?;
        let mut values_at = BEFORE_KEYS;
        if !values_in_keys {
            values_at += shape.key_page_bytes();
            self.write(attended, values, value_dim, (cache, page_bytes, values_at))?;
        }
        // Two pieces, as a prefill has them.
        let (rows, half) = (positions.len(), positions.len().div_ceil(2));
        let pages: Vec<u32> = (0..attended.pages() as u32).map(|number| page(number, attended)).collect();
        let span = pages.len();
        let of_rows = [
            self.put(positions)?,
            self.put(&[0, half as u32, rows as u32])?,
            self.put(&[0u32, 0])?,
            self.put(&pages)?,
            cache,
            Long(page_bytes as u64),
            Word(params.heads as u32),
            Word(kv_heads as u32),
            Word(params.window.unwrap_or(0)),
            Word(span as u32),
        ];
        let with = |more: &[Arg]| [&of_rows[..], more].concat();
        let of_pages = rows * params.heads * span;
        let sinks = params.sinks.map_or(Ok(At(0)), |sinks| self.put(sinks))?;
        let [scores, maxima] = [self.room(4 * of_pages * PAGE_POSITIONS)?, self.room(4 * of_pages)?];
        let [numerators, denominators] = [self.room(4 * of_pages * value_dim)?, self.room(4 * of_pages)?];
        let [q, out] = [self.put(q)?, self.room(4 * rows * params.heads * value_dim)?];
        let functions = self.gpu.functions;
        let of_cache = functions.of_cache(dtype);
        let blocks = [span as u32, kv_heads as u32, 2];
        let more = [q, scores, maxima, Long(BEFORE_KEYS as u64), Word(key_dim as u32), Value(params.scale)];
        self.run(of_cache.scores, blocks, 128, &with(&more))?;
        let stride = if values_in_keys { key_dim } else { value_dim };
        let more = [
            scores,
            maxima,
            sinks,
            numerators,
            denominators,
            Long(values_at as u64),
            Word(stride as u32),
            Word(value_dim as u32),
        ];
        self.run(of_cache.mix, blocks, THREADS, &with(&more))?;
        let more = [maxima, sinks, numerators, denominators, out, Word(value_dim as u32)];
        self.run(functions.attention_sum, [params.heads as u32, 2, 1], THREADS, &with(&more))?;
        self.take(out, rows * params.heads * value_dim)
    }

    fn rms_norm(&mut self, x: &[f32], stride: usize, weight: &[f32], eps: f32) -> Values {
        let [values, weights] = [self.put(x)?, self.put(weight)?];
        let arguments = [values, weights, values, Word(weight.len() as u32), Word(stride as u32), Value(eps)];
        self.run(self.gpu.functions.rms_norm, [(x.len() / stride) as u32, 1, 1], 256, &arguments)?;
        self.take(values, x.len())
    }

    fn layer_norm(&mut self, x: &[f32], weight: &[f32], bias: Option<&[f32]>, eps: f32) -> Values {
        let [values, weights, out] = [self.put(x)?, self.put(weight)?, self.room(4 * x.len())?];
        let bias = bias.map_or(Ok(At(0)), |bias| self.put(bias))?;
        let arguments = [values, weights, bias, out, Word(x.len() as u32), Value(eps)];
        self.run(self.gpu.functions.layer_norm, [1, 1, 1], 256, &arguments)?;
        self.take(out, x.len())
    }

    fn rope(&mut self, table: &RopeTable, position: u32, head: &[f32], neighbours: bool) -> Values {
        let (cosines, sines) = table.row(position);
        let half = cosines.len();
        // Behind a row of another position.
        let behind = |row: &[f32]| [&vec![7.0; half][..], row].concat();
        let arguments = [
            self.put(head)?,
            self.put(&[1u32])?,
            self.put(&behind(cosines))?,
            self.put(&behind(sines))?,
            Word(1),
            Word(head.len() as u32),
            Word(half as u32),
            Word(u32::from(neighbours)),
        ];
        self.run(self.gpu.functions.rope, [1, 1, 1], THREADS, &arguments)?;
        self.take(arguments[0], head.len())
    }

    fn exp(&mut self, values: &[f32]) -> Values {
        self.in_place(self.gpu.functions.exponentials, values, &[])
    }

    fn sigmoid(&mut self, values: &[f32]) -> Values {
        // As the gates of a shared expert that gives 1.
        let [rows, ones] = [values.len(), values.len()];
        let x = self.put(&vec![0.0f32; rows])?;
        let arguments =
            [x, x, x, x, self.put(&vec![1.0f32; ones])?, self.put(values)?, Value(1.0), Word(1), Word(0)];
        self.run(self.gpu.functions.combine, [1, rows as u32, 1], 32, &arguments)?;
        self.take(x, rows)
    }

    fn swiglu(&mut self, gate: &[f32], up: &[f32]) -> Values {
        self.of_two(self.gpu.functions.swiglu, gate, up, &[])
    }

    fn clamped_swiglu(&mut self, gate: &[f32], up: &[f32], alpha: f32, limit: f32) -> Values {
        self.of_two(self.gpu.functions.clamped_swiglu, gate, up, &[Value(alpha), Value(limit)])
    }

    fn combine(&mut self, combined: &Combined<'_>) -> Values {
        let Combined { x, hidden, results, users, weights, shared, gates, multiplier } = *combined;
        let rows = x.len() / hidden;
        let arguments = [
            self.put(x)?,
            self.put(results)?,
            self.put(users)?,
            self.put(weights)?,
            self.put(shared)?,
            self.put(gates)?,
            Value(multiplier),
            Word(hidden as u32),
            Word((users.len() / rows) as u32),
        ];
        let blocks = [hidden.div_ceil(4 * THREADS as usize) as u32, rows as u32, 1];
        self.run(self.gpu.functions.combine, blocks, THREADS, &arguments)?;
        self.take(arguments[0], x.len())
    }

    fn add(&mut self, x: &[f32], y: &[f32], multiplier: f32) -> Values {
        let [sums, y] = [self.put(x)?, self.put(y)?];
        let arguments = [sums, y, Value(multiplier), Word(x.len() as u32)];
        self.run(self.gpu.functions.add, blocks_of(x.len()), THREADS, &arguments)?;
        self.take(sums, x.len())
    }

    fn clip(&mut self, values: &[f32], limit: f32) -> Values {
        self.in_place(self.gpu.functions.clip, values, &[Value(limit)])
    }

    fn divide(&mut self, values: &[f32], by: f32) -> Values {
        self.in_place(self.gpu.functions.divide, values, &[Value(by)])
    }

    fn arrange(&mut self, x: &[f32], picked: &[u32], columns: &Columns) -> Values {
        let Columns { n, from: [stride, from], to: [width, to] } = *columns;
        let count = picked.len() * width;
        let [x, rows, out] = [self.put(x)?, self.put(picked)?, self.put(&vec![0.0f32; count])?];
        let words = [n, stride, from, width, to].map(|word| Word(word as u32));
        let arguments = [&[x, rows, out][..], &words].concat();
        self.run(self.gpu.functions.arrange, [picked.len() as u32, 1, 1], THREADS, &arguments)?;
        self.take(out, count)
    }

    fn narrow(&mut self, dtype: DType, values: &[f32]) -> Result<Vec<u8>, CudaError> {
        let bytes = values.len() * dtype.bytes();
        let [x, zero, cache] = [self.put(values)?, self.put(&[0u32])?, self.room(bytes)?];
        let arguments =
            [x, zero, zero, cache, Long(bytes as u64), Long(0), Word(1), Word(values.len() as u32)];
        self.run(self.gpu.functions.of_cache(dtype).write, [1, 1, 1], THREADS, &arguments)?;
        self.take(cache, bytes)
    }

    fn embed(
        &mut self,
        storage: Storage,
        table: &[u8],
        tokens: &[u32],
        hidden: usize,
        multiplier: f32,
    ) -> Values {
        let count = tokens.len() * hidden;
        let function = self.gpu.functions.embed(storage).expect("tables are stored so");
        let [table, rows, out] = [self.put(table)?, self.put(tokens)?, self.room(4 * count)?];
        let arguments = [table, rows, out, Word(hidden as u32), Value(multiplier)];
        self.run(function, [tokens.len() as u32, 1, 1], THREADS, &arguments)?;
        self.take(out, count)
    }

    fn route(&mut self, routed: &Routed<'_>) -> Result<Vec<Chosen>, CudaError> {
        let Routed { moe, logits, positions, eligible, tiers, correction, seed, layer } = *routed;
        let rows = positions.len();
        let best = moe.tiered.as_ref().map(|tiered| tiered.select);
        let places = best.map_or(moe.top_k, |best| best.tiers * best.groups * best.experts);
        let functions = self.gpu.functions;
        let [logits, positions] = [self.put(logits)?, self.put(positions)?];
        let eligible: Vec<u32> = eligible.iter().map(|&eligible| u32::from(eligible)).collect();
        let eligible = self.put(&eligible)?;
        let out = self.room(4 * rows * (2 * places + 1))?;
        let At(experts) = out else { unreachable!("results stand at an address") };
        let weights = experts + 4 * (rows * places) as u64;
        let to = [out, At(weights), At(weights + 4 * (rows * places) as u64)];
        let [width, normalise] = [Word(moe.router_rows() as u32), Word(u32::from(moe.normalise))];
        let last = [Value(moe.scaling), Long(seed), Word(layer)];
        let (function, arguments) = match (&moe.tiered, moe.score) {
            (Some(tiered), _) => {
                let count = tiered.tiers.len();
                let firsts = (0..count).map(|tier| tiered.groups_of(tier).start);
                let groups = (0..count).flat_map(|tier| tiered.groups_of(tier));
                let firsts = firsts.chain(groups.map(|group| tiered.experts_of(group).start));
                let firsts: Vec<u32> = firsts.chain([tiered.rows()]).map(|row| row as u32).collect();
                let lists = [logits, self.put(tiers)?, self.put(&firsts)?, positions];
                let select = tiered.select;
                let sizes = [tiers.len(), count, tiered.first_expert() - count];
                let sizes = sizes.into_iter().chain([select.tiers, select.groups, select.experts]);
                let sizes: Vec<Arg> = sizes.map(|size| Word(size as u32)).collect();
                (functions.route_tiers, [&lists[..], &to, &[width], &sizes, &[normalise], &last].concat())
            }
            (None, Score::Sparsemixer { jitter }) => {
                let lists = [logits, eligible, positions];
                let more = [width, Value(jitter), normalise];
                (functions.route_sparsely, [&lists[..], &to, &more, &last].concat())
            }
            (None, score) => {
                let score = match score {
                    Score::Softmax => 0,
                    Score::SoftmaxOfSelected => 1,
                    _ => 2,
                };
                let lists = [logits, eligible, self.put(correction)?, positions];
                let more = [width, Word(places as u32), Word(score), normalise, last[0]];
                let limit = moe.group_limit.map_or([0; 3], |limit| {
                    [limit.groups as u32, limit.keep as u32, u32::from(limit.score == GroupScore::SumOfTop2)]
                });
                (functions.route, [&lists[..], &to, &more, &limit.map(Word), &last[1..]].concat())
            }
        };
        self.run(function, [rows as u32, 1, 1], 32, &arguments)?;
        let found: Vec<u32> = self.take(out, rows * (2 * places + 1))?;
        let (experts, found) = found.split_at(rows * places);
        let routes = experts.chunks_exact(places).zip(found.chunks_exact(places));
        let routes = routes.map(|(experts, weights)| {
            let used = experts.iter().zip(weights).take_while(|(expert, _)| **expert != NOBODY);
            used.map(|(&expert, &weight)| (expert, f32::from_bits(weight))).unzip()
        });
        Ok(routes.collect())
    }

    fn penalise(&mut self, logits: &[f32], tokens: &[u32], penalty: f32) -> Values {
        let [values, tokens_at] = [self.put(logits)?, self.put(tokens)?];
        let arguments = [values, tokens_at, Value(penalty), Word(tokens.len() as u32)];
        self.run(self.gpu.functions.penalise, [1, 1, 1], THREADS, &arguments)?;
        self.take(values, logits.len())
    }

    fn argmax(&mut self, logits: &[f32]) -> Result<u32, CudaError> {
        let [values, token, fault] = [self.put(logits)?, self.room(4)?, self.room(4)?];
        let arguments = [values, token, fault, Word(logits.len() as u32)];
        self.run(self.gpu.functions.argmax, [1, 1, 1], THREADS, &arguments)?;
        Ok(self.take(token, 1)?[0])
    }

    fn sample(&mut self, logits: &[f32], ways: &[(Params, u64)]) -> Result<Vec<u32>, CudaError> {
        let (best, rows, n) = (self.argmax(logits)?, ways.len(), logits.len());
        // A wrong one is found by its own hash; here it must not point elsewhere.
        let best = best.min(n as u32 - 1);
        let longs = |of: fn(&(Params, u64)) -> u64| ways.iter().map(of).collect::<Vec<u64>>();
        let temperatures: Vec<f32> = ways.iter().map(|(params, _)| params.temperature).collect();
        let top_k: Vec<u32> = ways.iter().map(|(params, _)| params.top_k).collect();
        let arguments = [
            self.put(&logits.repeat(rows))?,
            self.put(&vec![NO_FAULT; rows])?,
            self.put(&temperatures)?,
            self.put(&top_k)?,
            self.put(&longs(|(params, _)| if params.top_p < 1.0 { share(params.top_p) } else { u64::MAX }))?,
            self.put(&longs(|(params, _)| share(params.min_p)))?,
            self.put(&longs(|(_, draw)| *draw))?,
            self.room(8 * rows * n)?,
            self.put(&vec![best; rows])?,
            Word(n as u32),
        ];
        self.run(self.gpu.functions.sample, [rows as u32, 1, 1], THREADS, &arguments)?;
        self.take(arguments[8], rows)
    }
}

/// Blocks that go through so many values, four a thread.
fn blocks_of(values: usize) -> [u32; 3] {
    [values.div_ceil(4 * THREADS as usize) as u32, 1, 1]
}

impl Desk {
    /// A kernel that changes values where they stand; `n` is its last argument.
    fn in_place(&mut self, function: Function, values: &[f32], more: &[Arg]) -> Values {
        let at = self.put(values)?;
        let arguments = [&[at], more, &[Word(values.len() as u32)]].concat();
        self.run(function, blocks_of(values.len()), THREADS, &arguments)?;
        self.take(at, values.len())
    }

    /// A kernel of two lists of values; `n` comes before what more there is.
    fn of_two(&mut self, function: Function, one: &[f32], other: &[f32], more: &[Arg]) -> Values {
        let lists = [self.put(one)?, self.put(other)?, self.room(4 * one.len())?];
        let arguments = [&lists[..], &[Word(one.len() as u32)], more].concat();
        self.run(function, blocks_of(one.len()), THREADS, &arguments)?;
        self.take(lists[2], one.len())
    }
}
