//! The launches of a step: each operator of the numeric contract as a kernel over the pieces of [`Room`].

use super::super::CudaError;
use super::super::functions::{Form, Function, Functions, Linear};
use super::super::stream::{Arg, Stream};
use super::Failed;
use super::graphs::Launches;
use super::ranks::Among;
use super::sizes::{Back, Packed, Room, Sizes};
use super::standing::Lists;
use super::tables::{self, Tables};
use super::weights::{Base, Matrix, Norm, Routers};
use Arg::{At, Value, Word};
use lite_llm_model::Model;
use lite_llm_model::arch::{Activation, Pairs};
use lite_llm_model::kernels::Storage;
use std::cell::RefCell;

/// The most rows of a product that go by few.
const FEW_MAX: u32 = 16;
/// A form of larger blocks has to have so many of them, or a smaller one, with more blocks, leaves less of a device idle: they have
/// some hundred multiprocessors. Not measured.
const SOME_BLOCKS_MIN: u32 = 80;
const MANY_BLOCKS_MIN: u32 = 128;
const CHUNK: u32 = 1024;
/// Groups of integers that a block quantises.
const GROUPS: u32 = 8;
const GROUP: u32 = 32;
/// Threads of a block that goes through values one by one, four values a thread, and the most such blocks.
const PLAIN_THREADS: u32 = 256;
const PLAIN_BLOCKS: u32 = 4096;

/// A step under way.
pub(super) struct Run<'a> {
    pub(super) model: &'a Model,
    pub(super) stream: &'a Stream,
    pub(super) functions: &'a Functions,
    pub(super) sizes: &'a Sizes,
    /// Where the values of this step stand, and what comes back of them.
    pub(super) room: &'a Room,
    pub(super) back: Back,
    /// Where the lists of a mixture stand.
    pub(super) lists: u64,
    pub(super) base: &'a Base,
    pub(super) routers: &'a Routers,
    /// The positions of the step.
    pub(super) at: &'a [tables::At],
    pub(super) tables: &'a Tables,
    pub(super) standing: &'a Lists,
    /// Where the cache begins, and bytes of a page.
    pub(super) cache: (u64, u64),
    /// Where the slots of experts begin, and bytes of each.
    pub(super) slots: (u64, u64),
    /// Whether the device finds out who uses which expert, and the host hears of routes at the end.
    pub(super) finds_users: bool,
    /// How launches are given to the stream.
    pub(super) launches: RefCell<Launches>,
}

/// Products of one shape, each with rows of its own.
#[derive(Clone, Copy, Debug)]
pub(super) struct Several {
    /// How many.
    pub(super) count: u32,
    /// A list of where the weights of each begin, counted from the matrix's, and one of biases.
    pub(super) weights_at: u64,
    pub(super) biases_at: u64,
    /// A list of the first row of each, and where those of the last end.
    pub(super) first_row: u64,
    /// The most rows that one has, and how many are usual, by which their form is chosen.
    pub(super) rows_max: u32,
    pub(super) rows_usual: u32,
}

impl Run<'_> {
    /// Every launch of a step. Whatever is given to the stream beside them comes after [`flush`](Self::flush).
    pub(super) fn launch(
        &self,
        function: Function,
        blocks: [u32; 3],
        threads: u32,
        arguments: &[Arg],
    ) -> Result<(), CudaError> {
        // SAFETY: the functions below give each kernel the arguments that its source names, in their order. Addresses are pieces
        // of `Room`, which has them for the largest step, weights, pages, slots and lists, all of which live until the stream
        // was waited for: a step does not end before. They stay where they are until memory is carved or weights are loaded again, and
        // then graphs are forgotten.
        unsafe { self.launches.borrow_mut().launch(self.stream, function, (blocks, threads), arguments) }
    }

    /// Gives the stream what was launched and waits to be.
    pub(super) fn flush(&self) -> Result<(), CudaError> {
        self.launches.borrow_mut().flush(self.stream)
    }

    /// Positions of the step.
    pub(super) fn positions(&self) -> u32 {
        self.at.len() as u32
    }

    pub(super) fn hidden(&self) -> u32 {
        self.sizes.hidden as u32
    }

    pub(super) fn embed(&self) -> Result<(), CudaError> {
        let (storage, table) = self.base.table.expect("the first stage has the embedding");
        let embed = self.functions.embed(storage);
        let embed = embed.ok_or_else(|| CudaError::Unsupported(format!("a table of {storage:?}")))?;
        let multiplier = self.model.arch().multipliers.embedding;
        let arguments =
            [At(table), At(self.tables.tokens), At(self.room.x), Word(self.hidden()), Value(multiplier)];
        self.launch(embed, [self.positions(), 1, 1], 128, &arguments)
    }

    /// A norm of the residual stream.
    pub(super) fn norm(&self, x: u64, norm: Norm, out: u64, rows: u32) -> Result<(), CudaError> {
        let eps = self.model.arch().norm_eps;
        if norm.bias == 0 {
            return self.rms_norm(x, norm.weight, out, rows, [self.hidden(); 2], eps);
        }
        let arguments = [At(x), At(norm.weight), At(norm.bias), At(out), Word(self.hidden()), Value(eps)];
        self.launch(self.functions.layer_norm, [rows, 1, 1], 256, &arguments)
    }

    /// Normalises the first values of rows: so many, of rows that begin so many apart.
    pub(super) fn rms_norm(
        &self,
        x: u64,
        weight: u64,
        out: u64,
        rows: u32,
        [width, stride]: [u32; 2],
        eps: f32,
    ) -> Result<(), CudaError> {
        let arguments = [At(x), At(weight), At(out), Word(width), Word(stride), Value(eps)];
        self.launch(self.functions.rms_norm, [rows, 1, 1], 256, &arguments)
    }

    /// Rotates heads that begin `stride` values apart.
    pub(super) fn rope(&self, values: u64, heads: u32, stride: u32) -> Result<(), CudaError> {
        let rope = &self.model.arch().rope;
        let half = rope.dims as u32 / 2;
        if half == 0 {
            return Ok(());
        }
        let neighbours = u32::from(rope.pairs == Pairs::Neighbours);
        let [cosines, sines] = self.base.rope;
        let arguments = [
            At(values),
            At(self.tables.positions),
            At(cosines),
            At(sines),
            Word(heads),
            Word(stride),
            Word(half),
            Word(neighbours),
        ];
        self.launch(self.functions.rope, [self.positions(), 1, 1], 128, &arguments)
    }

    /// Brings rows in the order that products with such matrices want: all of them, or those of a list.
    pub(super) fn pack(
        &self,
        x: u64,
        picked: u64,
        rows: u32,
        inputs: u32,
        storages: &[Storage],
        to: Packed,
    ) -> Result<(), CudaError> {
        let grouped = |storage: &Storage| matches!(storage, Storage::Grouped(_));
        if !storages.iter().all(grouped) {
            let blocks = [inputs.div_ceil(CHUNK), rows, 1];
            let arguments = [At(x), At(picked), At(to.values), Word(inputs)];
            self.launch(self.functions.repack, blocks, 256, &arguments)?;
        }
        if storages.iter().any(grouped) {
            let blocks = [inputs.div_ceil(GROUP).div_ceil(GROUPS), rows, 1];
            let arguments = [At(x), At(picked), At(to.words), At(to.scales), Word(inputs)];
            self.launch(self.functions.quantise, blocks, 256, &arguments)?;
        }
        Ok(())
    }

    /// A product of packed rows with one matrix; the list says that its rows are all.
    pub(super) fn product(
        &self,
        packed: Packed,
        matrix: &Matrix,
        (all, rows): (u64, u32),
        out: u64,
    ) -> Result<(), CudaError> {
        let zeros = self.standing.zeros;
        let one = Several {
            count: 1,
            weights_at: zeros,
            biases_at: zeros,
            first_row: all,
            rows_max: rows,
            rows_usual: rows,
        };
        self.products(packed, matrix, one, out)
    }

    /// Products of one shape.
    pub(super) fn products(
        &self,
        packed: Packed,
        matrix: &Matrix,
        several: Several,
        out: u64,
    ) -> Result<(), CudaError> {
        let forms = self.functions.linear(matrix.storage);
        let (rows, outputs) = (several.rows_max, matrix.outputs);
        // Of a narrow matrix there are tiles for some tensor ranks only.
        if outputs == 0 {
            return Ok(());
        }
        if several.rows_usual == 0 {
            return Ok(());
        }
        let form = form_of(forms, several, outputs);
        let [x, y] = form.blocks(outputs, rows);
        let grouped = matches!(matrix.storage, Storage::Grouped(_));
        let has_bias = matrix.bias != 0;
        let arguments = [
            At(if grouped { packed.scales } else { packed.values }),
            At(matrix.weights),
            At(several.weights_at),
            At(matrix.bias),
            At(if has_bias { several.biases_at } else { 0 }),
            At(several.first_row),
            At(out),
            Word(matrix.inputs),
            Word(outputs),
            At(packed.words),
        ];
        let arguments = if grouped { &arguments[..] } else { &arguments[..9] };
        self.launch(form.function, [x, y, several.count], form.threads, arguments)
    }

    /// Columns of rows to other places: row i of `out` gets `n` values from column `to` on, of the row that `picked` says.
    pub(super) fn arrange(
        &self,
        (x, x_stride, from): (u64, u32, u32),
        picked: u64,
        (out, out_stride, to): (u64, u32, u32),
        n: u32,
        rows: u32,
    ) -> Result<(), CudaError> {
        let arguments =
            [At(x), At(picked), At(out), Word(n), Word(x_stride), Word(from), Word(out_stride), Word(to)];
        self.launch(self.functions.arrange, [rows, 1, 1], 128, &arguments)
    }

    /// What a gated block computes between its matrices.
    pub(super) fn activate(
        &self,
        activation: Activation,
        gates: u64,
        ups: u64,
        out: u64,
        n: u32,
    ) -> Result<(), CudaError> {
        let [gates, ups, out, n_word] = [At(gates), At(ups), At(out), Word(n)];
        match activation {
            Activation::SwiGlu => {
                self.launch(self.functions.swiglu, plain(n), PLAIN_THREADS, &[gates, ups, out, n_word])
            }
            Activation::Clamped { alpha, limit } => {
                let arguments = [gates, ups, out, n_word, Value(alpha), Value(limit)];
                self.launch(self.functions.clamped_swiglu, plain(n), PLAIN_THREADS, &arguments)
            }
        }
    }

    pub(super) fn clip(&self, values: u64, limit: f32, n: u32) -> Result<(), CudaError> {
        let arguments = [At(values), Value(limit), Word(n)];
        self.launch(self.functions.clip, plain(n), PLAIN_THREADS, &arguments)
    }

    /// Adds what a block gives to the residual stream.
    pub(super) fn add(&self, y: u64) -> Result<(), CudaError> {
        let n = self.positions() * self.hidden();
        let multiplier = self.model.arch().multipliers.residual;
        let arguments = [At(self.room.x), At(y), Value(multiplier), Word(n)];
        self.launch(self.functions.add, plain(n), PLAIN_THREADS, &arguments)
    }

    /// Divides logits.
    pub(super) fn divide(&self, logits: u64, by: f32, n: u32) -> Result<(), CudaError> {
        let arguments = [At(logits), Value(by), Word(n)];
        self.launch(self.functions.divide, plain(n), PLAIN_THREADS, &arguments)
    }

    /// A block that every position uses, of the normalised input, whose inner values are an exchange of that number.
    pub(super) fn gated(
        &self,
        [gate, up, down]: &[Matrix; 3],
        out: u64,
        exchange: u32,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        let (room, rows, inside) = (self.room, self.positions(), self.room.inside);
        let all = (self.tables.all, rows);
        self.pack(room.normed, 0, rows, gate.inputs, &[gate.storage, up.storage], room.packed)?;
        self.product(room.packed, gate, all, room.gates)?;
        self.product(room.packed, up, all, room.ups)?;
        self.activate(Activation::SwiGlu, room.gates, room.ups, inside, rows * gate.outputs)?;
        self.gather_rows((inside, inside), rows, down.inputs, exchange, among)?;
        self.pack(inside, 0, rows, down.inputs, &[down.storage], room.packed_inside)?;
        self.product(room.packed_inside, down, all, out)?;
        self.gather_rows((out, out), rows, self.hidden(), exchange + 1, among)
    }

    /// Where a value of a piece is.
    pub(super) const fn value(piece: u64, index: usize) -> u64 {
        piece + 4 * index as u64
    }
}

/// The form of products: of the largest blocks that their usual rows fill, if there are enough of these.
fn form_of(forms: Linear, several: Several, outputs: u32) -> Form {
    let rows = several.rows_usual;
    let has = |form: Form, blocks_min: u32| {
        let [x, y] = form.blocks(outputs, rows);
        x.saturating_mul(y).saturating_mul(several.count) >= blocks_min
    };
    match rows {
        0 | 1 => forms.one_row,
        2..=FEW_MAX => forms.few_rows,
        _ if rows > forms.some_rows.rows && has(forms.many_rows, MANY_BLOCKS_MIN) => forms.many_rows,
        _ if has(forms.some_rows, SOME_BLOCKS_MIN) => forms.some_rows,
        _ => forms.few_rows,
    }
}

/// Blocks that go through so many values.
fn plain(n: u32) -> [u32; 3] {
    [n.div_ceil(4 * PLAIN_THREADS).clamp(1, PLAIN_BLOCKS), 1, 1]
}
