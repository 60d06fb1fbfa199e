//! The fold: a journal's records back into an engine, each proved by the digest that it carries.

use crate::digest::{Digest, encode};
use crate::engine::Engine;
use crate::ids::Seq;
use crate::input::Input;
use crate::journal::Record;
use crate::output::Output;
use crate::time::Time;
use alloc::vec::Vec;

/// Why records do not fold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReplayError {
    /// A record's payload is no input of this logic version.
    #[error("record {seq} cannot be decoded ({source}): it is damaged or of another logic version")]
    Decode {
        /// Which record.
        seq: Seq,
        /// Why.
        source: DecodeError,
    },
    /// The state before a record is not the state that wrote it.
    #[error("replay diverges before record {seq}: the journal has digest {expected}, the fold {found}")]
    Diverged {
        /// Which record.
        seq: Seq,
        /// The record's digest.
        expected: Digest,
        /// The engine's digest.
        found: Digest,
    },
    /// A record is missing or doubled.
    #[error("record {found} comes where {expected} is due")]
    Order {
        /// The number that is due.
        expected: Seq,
        /// The number that comes.
        found: Seq,
    },
    /// Time goes backwards.
    #[error("the time of record {seq} is before that of the record before it")]
    Time {
        /// Which record.
        seq: Seq,
    },
}

/// Bytes that are no input of this logic version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DecodeError {
    /// The bytes end too early, or a value is impossible.
    #[error("{0}")]
    Encoding(postcard::Error),
    /// Bytes are left over.
    #[error("{0} bytes are left over")]
    Trailing(usize),
}

/// An input as the journal holds it.
#[must_use]
pub fn encode_input(input: &Input) -> Vec<u8> {
    let mut bytes = Vec::new();
    encode(input, &mut bytes);
    bytes
}

/// An input from the journal.
///
/// # Errors
/// If the bytes are not exactly one input.
pub fn decode_input(bytes: &[u8]) -> Result<Input, DecodeError> {
    let (input, rest) = postcard::take_from_bytes(bytes).map_err(DecodeError::Encoding)?;
    if rest.is_empty() { Ok(input) } else { Err(DecodeError::Trailing(rest.len())) }
}

/// Feeds records to an engine, whose outputs go to `on_output` and nowhere else.
///
/// # Errors
/// At the first record that does not follow from what is before it. The engine is then useless.
pub fn fold<'a>(
    engine: &mut Engine,
    records: impl IntoIterator<Item = &'a Record>,
    mut on_output: impl FnMut(Seq, &Output),
) -> Result<(), ReplayError> {
    for record in records {
        let seq = Seq(record.seq);
        if seq != engine.next_seq() {
            return Err(ReplayError::Order { expected: engine.next_seq(), found: seq });
        }
        let expected = Digest(record.digest);
        if expected != engine.digest() {
            return Err(ReplayError::Diverged { seq, expected, found: engine.digest() });
        }
        let time = Time(record.time_ns);
        if time < engine.now() {
            return Err(ReplayError::Time { seq });
        }
        let input = decode_input(&record.payload).map_err(|source| ReplayError::Decode { seq, source })?;
        engine.handle(time, input);
        loop {
            let output = engine.poll();
            if matches!(output, Output::Wait { .. }) {
                break;
            }
            on_output(seq, &output);
        }
    }
    Ok(())
}
