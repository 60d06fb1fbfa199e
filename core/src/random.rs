//! Randomness by name: a draw is a pure function of (seed, purpose, id, position). No generator is kept, so there is
//! no call count that a refactoring or a retry could shift.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// What a draw is for; a purpose never shares a stream with another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Purpose {
    /// The routing seed, from the driver's entropy.
    RoutingSeed = 1,
    /// The token at a position of a request.
    Sample = 2,
    /// The order of experts with equal scores.
    Tie = 3,
}

/// The draw named by its arguments, uniform over all of `u64`.
#[must_use]
pub fn draw(seed: u64, purpose: Purpose, id: u64, position: u64) -> u64 {
    let mut key = [0u8; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&id.to_le_bytes());
    key[16] = purpose as u8;
    let mut stream = ChaCha8Rng::from_seed(key);
    stream.set_stream(position);
    stream.next_u64()
}
