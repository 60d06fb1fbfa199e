//! The only source of choice in a simulation: one ChaCha stream from one seed.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A stream of choices: some given bytes first, then a seed's.
#[derive(Clone, Debug)]
pub struct Choice {
    given: Vec<u8>,
    seeded: ChaCha8Rng,
}

impl Choice {
    /// The stream of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { given: Vec::new(), seeded: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// Takes its first choices from bytes, one each, as a fuzzer wants it.
    #[must_use]
    pub fn given(bytes: &[u8]) -> Self {
        Self { given: bytes.iter().rev().copied().collect(), ..Self::new(0) }
    }

    /// A number below `n`.
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn below(&mut self, n: u64) -> u64 {
        assert!(n > 0, "a choice among nothing");
        self.given.pop().map_or_else(|| self.seeded.next_u64(), u64::from) % n
    }

    /// True in `per_mille` of 1000 cases.
    pub fn chance(&mut self, per_mille: u64) -> bool {
        self.below(1000) < per_mille
    }

    /// An index into a collection of `len` elements.
    pub fn index(&mut self, len: usize) -> usize {
        usize::try_from(self.below(len as u64)).expect("below a usize")
    }
}
