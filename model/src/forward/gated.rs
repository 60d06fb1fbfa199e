//! Gated blocks: `down(silu(gate x) * up x)`.

use crate::arch::Activation;
use crate::kernels::buffer::emptied;
use crate::kernels::{Buffer, Product, Products, clamped_swiglu, swiglu};
use crate::model::Model;
use crate::weights::GatedViews;

/// A block and the rows that it is for: some of the input's, or all.
#[derive(Debug)]
pub(super) struct Block<'a> {
    pub(super) views: GatedViews<'a>,
    pub(super) picked: Option<&'a [u32]>,
}

impl Block<'_> {
    fn rows(&self, all: usize) -> usize {
        self.picked.map_or(all, <[u32]>::len)
    }
}

/// What blocks work in.
#[derive(Debug, Default)]
pub(super) struct Room {
    blocks: Vec<Block<'static>>,
    gates: Buffer,
    ups: Buffer,
    h: Buffer,
}

impl Room {
    pub(super) fn bytes(&self) -> usize {
        self.blocks.capacity() * size_of::<Block<'_>>()
            + self.gates.bytes()
            + self.ups.bytes()
            + self.h.bytes()
    }
}

impl Model {
    /// Computes blocks of one shape, each of its rows of `x`; the results stand one after the other in `y`.
    pub(super) fn gated<'a>(
        &self,
        blocks: impl IntoIterator<Item = Block<'a>>,
        activation: Activation,
        x: &[f32],
        y: &mut [f32],
        room: &mut Room,
        products: &mut Products,
    ) {
        let mut list: Vec<Block<'a>> = emptied(std::mem::take(&mut room.blocks));
        list.extend(blocks);
        if let Some(Block { views: GatedViews { matrices: [gate, ..], .. }, .. }) = list.first() {
            let (all, width) = (x.len() / gate.inputs(), gate.outputs());
            let rows: usize = list.iter().map(|block| block.rows(all)).sum();
            let gates = room.gates.values(rows * width);
            let ups = room.ups.values(rows * width);
            let h = room.h.values(rows * width);
            self.gates_and_ups(&list, x, gates, ups, products);
            let (gates, ups) = (&*gates, &*ups);
            self.pool.each_row(h, width, 2, &|row, h| {
                let (gate, up) = (&gates[row * width..][..width], &ups[row * width..][..width]);
                match activation {
                    Activation::SwiGlu => swiglu(self.isa, gate, up, h),
                    Activation::Clamped { alpha, limit } => {
                        clamped_swiglu(self.isa, gate, up, alpha, limit, h);
                    }
                }
            });
            let (mut h, mut y) = (&*h, y);
            let downs = list.iter().map(|block| {
                let ([_, _, w], [_, _, bias], rows) =
                    (block.views.matrices, block.views.biases(), block.rows(all));
                let x = h.split_off(..rows * width).expect("rows for every block");
                let out = y.split_off_mut(..rows * w.outputs()).expect("rows for every block");
                Product::new(x, w, bias, out)
            });
            products.compute(&self.pool, self.isa, downs);
        }
        room.blocks = emptied(list);
    }

    fn gates_and_ups(
        &self,
        blocks: &[Block<'_>],
        x: &[f32],
        mut gates: &mut [f32],
        mut ups: &mut [f32],
        products: &mut Products,
    ) {
        let pairs = blocks.iter().flat_map(|Block { views, picked }| {
            let ([gate, up, _], [gate_bias, up_bias, _]) = (views.matrices, views.biases());
            let size = picked.map_or(x.len() / gate.inputs(), <[u32]>::len) * gate.outputs();
            let gates = gates.split_off_mut(..size).expect("rows for every block");
            let ups = ups.split_off_mut(..size).expect("rows for every block");
            [(gate, gate_bias, gates), (up, up_bias, ups)].map(|(w, bias, out)| match picked {
                None => Product::new(x, w, bias, out),
                Some(rows) => Product::of_picked(x, rows, w, bias, out),
            })
        });
        products.compute(&self.pool, self.isa, pairs);
    }
}
