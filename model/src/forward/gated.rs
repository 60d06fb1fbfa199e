//! Gated blocks: `down(silu(gate x) * up x)`.

use super::Stopped;
use super::ranks::Among;
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
    /// What all tensor ranks have.
    whole: Buffer,
    own: Buffer,
}

impl Room {
    pub(super) fn bytes(&self) -> usize {
        self.blocks.capacity() * size_of::<Block<'_>>()
            + self.gates.bytes()
            + self.ups.bytes()
            + [&self.h, &self.whole, &self.own].map(Buffer::bytes).iter().sum::<usize>()
    }
}

impl Model {
    /// Computes blocks of one shape, each of its rows of `x`; the results stand one after the other in `y`. Tensor ranks compute
    /// the same blocks, each its rows of their matrices.
    pub(super) fn gated<'a>(
        &self,
        blocks: impl IntoIterator<Item = Block<'a>>,
        activation: Activation,
        x: &[f32],
        y: &mut [f32],
        among: Among<'_>,
        (room, products): (&mut Room, &mut Products),
    ) -> Result<(), Stopped> {
        let mut list: Vec<Block<'a>> = emptied(std::mem::take(&mut room.blocks));
        list.extend(blocks);
        if let Some(Block { views: GatedViews { matrices: [gate, _, down], .. }, .. }) = list.first() {
            let (all, width, inner) = (x.len() / gate.inputs(), gate.outputs(), down.inputs());
            let (deep, hidden) = (down.outputs(), gate.inputs());
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
            let columns = |tensor| self.share.rows_of(tensor, inner);
            let mut h = self.gather(h, rows, columns, &mut room.whole, among)?;
            let own = if self.share.is_tensor() { room.own.values(rows * deep) } else { &mut *y };
            let mut rest = own;
            let downs = list.iter().map(|block| {
                let ([_, _, w], [_, _, bias], rows) =
                    (block.views.matrices, block.views.biases(), block.rows(all));
                let x = h.split_off(..rows * inner).expect("rows for every block");
                let out = rest.split_off_mut(..rows * deep).expect("rows for every block");
                Product::new(x, w, bias, out)
            });
            products.compute(&self.pool, self.isa, downs);
            if self.share.is_tensor() {
                let columns = |tensor| self.share.rows_of(tensor, hidden);
                self.gather_into(
                    room.own.written(rows * deep),
                    rows,
                    columns,
                    &mut y[..rows * hidden],
                    among.next(),
                )?;
            }
        }
        room.blocks = emptied(list);
        Ok(())
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
