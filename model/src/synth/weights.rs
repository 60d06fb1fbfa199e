//! The values of a tensor: a keyed ChaCha8 stream, one word for each value, shaped in integers.

use super::tensors::{Draw, Tensor};
use crate::kernels::DType;
use crate::kernels::convert::narrow;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Values drawn at a time.
const BLOCK: usize = 1 << 15;
/// Deviation of a sum of four independent uniform bytes is 147.8; with 13 bits of fraction below it:
const DEVIATION: f64 = 147.800_766_8 * 8192.0;
/// The middle of the shaped words: four bytes of 127.5 each, and half a step of the fraction.
const MIDDLE: i32 = 510 * 8192 + 4096;
/// What a matrix makes of unit inputs. The golden checkpoints of this project's tests have the same, and spread their
/// logits over about 1.7.
const GAIN: f64 = 1.6;
const BIAS_DEVIATION: f64 = 0.2;

/// The stream of values of one tensor, already in the storage type.
pub(super) struct Values {
    stream: ChaCha8Rng,
    draw: Draw,
    dtype: DType,
    left: u64,
    /// Added to every token of an embedding, value by value; empty if tokens have nothing in common.
    common: Vec<f32>,
    /// Where in a token's values the next one is.
    at: usize,
    words: Vec<u8>,
    values: Vec<f32>,
    bytes: Vec<u8>,
}

impl Values {
    pub(super) fn new(seed: u64, tensor: &Tensor, dtype: DType) -> Self {
        // The name is hashed into the key: values depend neither on the order nor on the number of the tensors.
        let mut key = blake3::Hasher::new();
        key.update(b"lite-llm synth 1").update(&seed.to_le_bytes()).update(tensor.name.as_bytes());
        let stream = ChaCha8Rng::from_seed(*key.finalize().as_bytes());
        let common = match tensor.draw {
            Draw::Embedding { width, skew: skew @ 1.. } => {
                key.update(b", what all tokens have in common");
                let mut words = vec![0; width as usize * 4];
                ChaCha8Rng::from_seed(*key.finalize().as_bytes()).fill_bytes(&mut words);
                let mut values = vec![0.0; width as usize];
                normal(&words, (f64::from(skew) / 100.0).sqrt(), &mut values);
                values
            }
            _ => Vec::new(),
        };
        Self {
            stream,
            draw: tensor.draw,
            dtype,
            left: tensor.len(),
            common,
            at: 0,
            words: vec![0; BLOCK * 4],
            values: vec![0.0; BLOCK],
            bytes: vec![0; BLOCK * dtype.bytes()],
        }
    }

    /// The next bytes of the tensor; `None` after the last.
    pub(super) fn next(&mut self) -> Option<&[u8]> {
        let count = usize::try_from(self.left).unwrap_or(usize::MAX).min(BLOCK);
        if count == 0 {
            return None;
        }
        self.left -= count as u64;
        let words = &mut self.words[..count * 4];
        self.stream.fill_bytes(words);
        let values = &mut self.values[..count];
        match self.draw {
            Draw::Matrix { inputs } => normal(words, GAIN / f64::from(inputs).sqrt(), values),
            Draw::Embedding { skew, .. } => normal(words, (1.0 - f64::from(skew) / 100.0).sqrt(), values),
            Draw::Bias => normal(words, BIAS_DEVIATION, values),
            Draw::Norm => uniform(words, values),
        }
        for (value, common) in values.iter_mut().zip(self.common.iter().cycle().skip(self.at)) {
            *value += common;
        }
        self.at = (self.at + count) % self.common.len().max(1);
        let bytes = &mut self.bytes[..count * self.dtype.bytes()];
        narrow(self.dtype, values, bytes);
        Some(bytes)
    }
}

/// About normal: the sum of a word's four bytes, its steps filled by a multiplicative hash of the same word. Integers
/// below 2^24 up to the last product, so every machine rounds the same.
fn normal(words: &[u8], deviation: f64, values: &mut [f32]) {
    let scale = (deviation / DEVIATION) as f32;
    for (value, word) in values.iter_mut().zip(words.as_chunks::<4>().0) {
        let sum: i32 = word.iter().map(|&byte| i32::from(byte)).sum();
        let fraction = u32::from_le_bytes(*word).wrapping_mul(0x9e37_79b1) >> 19;
        *value = (sum * 8192 + fraction as i32 - MIDDLE) as f32 * scale;
    }
}

/// Uniform in 0.5 to 1.5, in steps of 2^-16.
fn uniform(words: &[u8], values: &mut [f32]) {
    for (value, word) in values.iter_mut().zip(words.as_chunks::<4>().0) {
        *value = 0.5 + f32::from(u16::from_le_bytes([word[0], word[1]])) / 65536.0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(draw: Draw, len: u32) -> Vec<f32> {
        let tensor = Tensor { name: "t".into(), shape: vec![len], draw };
        let mut source = Values::new(7, &tensor, DType::F32);
        let mut all = Vec::new();
        while let Some(bytes) = source.next() {
            all.extend(bytes.as_chunks::<4>().0.iter().map(|&four| f32::from_le_bytes(four)));
        }
        assert_eq!(all.len(), len as usize);
        all
    }

    #[test]
    fn tokens_have_in_common_what_is_asked_for() {
        let (width, tokens) = (97, 5_000);
        let values = drawn(Draw::Embedding { width, skew: 30 }, width * tokens);
        let token = |at: usize| &values[at * width as usize..][..width as usize];
        let product = |a: &[f32], b: &[f32]| -> f64 { a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum() };
        let mean = |of: &dyn Fn(usize) -> f64| (0..4_999).map(of).sum::<f64>() / 4_999.0 / f64::from(width);
        let (length, common) =
            (mean(&|at| product(token(at), token(at))), mean(&|at| product(token(at), token(at + 1))));
        // The direction is one draw of 97 values: its own length may be off by a few tenths.
        assert!((length - 1.0).abs() < 0.1, "length {length}");
        assert!((common - (length - 0.7)).abs() < 0.01, "{common} of {length} in common");
        assert_eq!(
            drawn(Draw::Embedding { width, skew: 0 }, 99),
            drawn(Draw::Embedding { width: 1, skew: 0 }, 99)
        );
    }

    #[test]
    fn normals_have_the_stated_moments() {
        let values = drawn(Draw::Embedding { width: 1, skew: 0 }, 300_001);
        let n = values.len() as f64;
        let mean = values.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
        let variance = values.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / n;
        let fourth = values.iter().map(|&v| f64::from(v).powi(4)).sum::<f64>() / n;
        assert!(mean.abs() < 0.01, "mean {mean}");
        assert!((variance - 1.0).abs() < 0.01, "variance {variance}");
        // Four uniform summands: kurtosis 3 - 1.2 / 4.
        assert!((fourth - 2.7).abs() < 0.05, "fourth moment {fourth}");
        let mut distinct: Vec<u32> = values.iter().map(|v| v.to_bits()).collect();
        distinct.sort_unstable();
        distinct.dedup();
        assert!(distinct.len() > 250_000, "only {} values", distinct.len());
    }

    #[test]
    fn matrices_scale_with_their_inputs_and_norms_stay_in_range() {
        let wide = drawn(Draw::Matrix { inputs: 1600 }, 100_000);
        let variance = wide.iter().map(|&v| f64::from(v).powi(2)).sum::<f64>() / 1e5;
        assert!((variance.sqrt() - 0.04).abs() < 0.001, "deviation {}", variance.sqrt());
        assert!(drawn(Draw::Norm, 100_000).iter().all(|v| (0.5..1.5).contains(v)));
    }
}
