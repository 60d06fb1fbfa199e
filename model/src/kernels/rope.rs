//! Rotary position embedding by tables, in the half-split order of Hugging Face transformers (`rotate_half`).
//!
//! An angle is `f32(position) * inverse_frequency` rounded to `f32`; its sine and cosine are taken in `f64` by the
//! pinned `libm` and rounded once. Devices take these tables and compute none of their own.

/// Sine and cosine of every angle up to a number of positions.
#[derive(Clone, Debug)]
pub struct RopeTable {
    half: usize,
    cos: Vec<f32>,
    sin: Vec<f32>,
}

impl RopeTable {
    /// Tables for positions `0..positions`. `inv_freq` has one frequency for each pair of dimensions; `scaling`
    /// multiplies sine and cosine (1 for plain RoPE, the attention factor of YaRN).
    pub fn new(inv_freq: &[f32], scaling: f32, positions: u32) -> Self {
        let mut table = Self { half: inv_freq.len(), cos: Vec::new(), sin: Vec::new() };
        table.cos.reserve_exact(positions as usize * table.half);
        table.sin.reserve_exact(positions as usize * table.half);
        for position in 0..positions {
            for frequency in inv_freq {
                let angle = f64::from(position as f32 * frequency);
                table.cos.push(libm::cos(angle) as f32 * scaling);
                table.sin.push(libm::sin(angle) as f32 * scaling);
            }
        }
        table
    }

    /// Dimensions of a head that are rotated: two for each frequency.
    pub fn dims(&self) -> usize {
        self.half * 2
    }

    /// Positions that the tables hold.
    pub fn positions(&self) -> usize {
        self.cos.len().checked_div(self.half).unwrap_or(0)
    }

    /// Cosines and sines of one position.
    ///
    /// # Panics
    /// If the tables do not hold the position.
    pub fn row(&self, position: u32) -> (&[f32], &[f32]) {
        let at = position as usize * self.half;
        (&self.cos[at..at + self.half], &self.sin[at..at + self.half])
    }

    /// All cosines and all sines, position by position.
    pub fn tables(&self) -> [&[f32]; 2] {
        [&self.cos, &self.sin]
    }

    /// Rotates the first [`dims`](Self::dims) values of one head, each with the one half of them further; the rest stay.
    ///
    /// # Panics
    /// If the head has fewer values, or the tables do not hold the position.
    pub fn apply(&self, head: &mut [f32], position: u32) {
        let (cos, sin) = self.row(position);
        let (first, rest) = head.split_at_mut(self.half);
        let second = &mut rest[..self.half];
        for (((a, b), cos), sin) in first.iter_mut().zip(second).zip(cos).zip(sin) {
            let (x, y) = (*a, *b);
            *a = x * cos - y * sin;
            *b = y * cos + x * sin;
        }
    }

    /// Rotates the first [`dims`](Self::dims) values of one head, neighbour with neighbour; the rest stay.
    ///
    /// # Panics
    /// If the head has fewer values, or the tables do not hold the position.
    pub fn apply_to_neighbours(&self, head: &mut [f32], position: u32) {
        let (cos, sin) = self.row(position);
        for ((pair, cos), sin) in head[..self.dims()].chunks_exact_mut(2).zip(cos).zip(sin) {
            let (x, y) = (pair[0], pair[1]);
            pair[0] = x * cos - y * sin;
            pair[1] = y * cos + x * sin;
        }
    }
}

/// `theta^(2i / dims)` for i in `0..dims / 2`: the exponent is rounded to `f32`, the power is taken in `f64` and rounded
/// to `f32`.
pub fn powers(theta: f64, dims: usize) -> impl Iterator<Item = f32> {
    (0..dims / 2).map(move |i| libm::pow(theta, f64::from((2 * i) as f32 / dims as f32)) as f32)
}

/// The reciprocals of the [`powers`], rounded to `f32`.
pub fn inverse_frequencies(theta: f64, dims: usize) -> Vec<f32> {
    powers(theta, dims).map(|power| 1.0 / power).collect()
}
