//! The fold: a journal's records back into a state machine, each proved by the digest that it carries.

use crate::chain::{Chain, Fold};
use crate::digest::{Digest, encode};
use crate::ids::Seq;
use crate::journal::Record;
use crate::time::Time;
use alloc::vec::Vec;
use serde::Serialize;
use serde::de::DeserializeOwned;

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
        /// The machine's digest.
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
pub fn encode_input<I: Serialize>(input: &I) -> Vec<u8> {
    // Most fit into this, and are not moved while they grow.
    let mut bytes = Vec::with_capacity(64);
    encode(input, &mut bytes);
    bytes
}

/// An input from the journal.
///
/// # Errors
/// If the bytes are not exactly one input.
pub fn decode_input<I: DeserializeOwned>(bytes: &[u8]) -> Result<I, DecodeError> {
    let (input, rest) = postcard::take_from_bytes(bytes).map_err(DecodeError::Encoding)?;
    if rest.is_empty() { Ok(input) } else { Err(DecodeError::Trailing(rest.len())) }
}

/// Feeds records to a machine, whose outputs go to `on_output` and nowhere else.
///
/// # Errors
/// At the first record that does not follow from what is before it. The machine is then useless.
pub fn fold<'a, S: Fold>(
    machine: &mut Chain<S>,
    records: impl IntoIterator<Item = &'a Record>,
    mut on_output: impl FnMut(Seq, &S::Output),
) -> Result<(), ReplayError> {
    for record in records {
        let seq = Seq(record.seq);
        if seq != machine.next_seq() {
            return Err(ReplayError::Order { expected: machine.next_seq(), found: seq });
        }
        let expected = Digest(record.digest);
        if expected != machine.digest() {
            return Err(ReplayError::Diverged { seq, expected, found: machine.digest() });
        }
        let time = Time(record.time_ns);
        if time < machine.now() {
            return Err(ReplayError::Time { seq });
        }
        let input = decode_input(&record.payload).map_err(|source| ReplayError::Decode { seq, source })?;
        machine.handle(time, input);
        loop {
            let output = machine.poll();
            if S::is_wait(&output) {
                break;
            }
            on_output(seq, &output);
        }
    }
    Ok(())
}
