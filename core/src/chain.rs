//! The door that every state machine of the core has, and the digest chain over what passes through it.
//!
//! A machine is a [`Fold`]: a state, and what one input makes of it. [`Chain`] numbers the inputs, holds the outputs until
//! they are drained, and chains a digest over each (time, input, outputs), so that a journal of the inputs proves itself
//! when it is folded again.

use crate::digest::{Digest, encode};
use crate::ids::Seq;
use crate::time::Time;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// Records between two digests of the whole state.
const STATE_DIGEST_EVERY: u64 = 4096;

/// A state that is a pure function of the inputs so far and their times.
pub trait Fold: Default + fmt::Debug + Serialize + DeserializeOwned {
    /// Everything that can happen to it. The encoding is the journal's format.
    type Input: Serialize + DeserializeOwned;
    /// Everything that it can ask for or say. Digested, all but what [`is_wait`](Self::is_wait).
    type Output: Serialize;

    /// What an input makes of the state, and what is said about it.
    fn handle(&mut self, cx: &mut Context<'_, Self::Output>, input: Self::Input);

    /// That there is nothing more to say, and until when.
    fn wait(&self, now: Time) -> Self::Output;

    /// Whether an output is one of [`wait`](Self::wait).
    fn is_wait(output: &Self::Output) -> bool;

    /// How the digest of the whole state is told.
    fn state_digest(seq: Seq, digest: Digest) -> Self::Output;

    /// The invariants that are asserted after every input where debug assertions are on.
    ///
    /// # Panics
    /// If one does not hold.
    fn check(&self);
}

/// What handling one input may use: when it is, and where outputs go.
#[derive(Debug)]
pub struct Context<'a, O> {
    pub(crate) now: Time,
    pub(crate) seq: Seq,
    out: &'a mut VecDeque<O>,
}

impl<O> Context<'_, O> {
    pub(crate) fn say(&mut self, output: O) {
        self.out.push_back(output);
    }
}

/// A state machine behind its door.
#[derive(Clone, Debug)]
pub struct Chain<S: Fold> {
    core: Core<S>,
    out: VecDeque<S::Output>,
    scratch: Vec<u8>,
}

/// Everything that a snapshot holds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Core<S> {
    seq: Seq,
    now: Time,
    head: Digest,
    state: S,
}

/// Bytes that are no snapshot of this logic version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the snapshot's state cannot be decoded ({0}); it is damaged or of another logic version")]
pub struct RestoreError(postcard::Error);

impl<S: Fold> Default for Chain<S> {
    fn default() -> Self {
        Self { core: Core::default(), out: VecDeque::new(), scratch: Vec::new() }
    }
}

impl<S: Fold> Chain<S> {
    /// A machine that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Handles an input and returns its number. What it brings about comes out of [`poll`](Self::poll).
    ///
    /// # Panics
    /// If the driver broke the protocol (outputs not drained, time going backwards, an answer to nothing), or the
    /// machine an invariant.
    pub fn handle(&mut self, now: Time, input: S::Input) -> Seq {
        assert!(self.out.is_empty(), "the outputs of one input are drained before the next");
        let core = &mut self.core;
        assert!(now >= core.now, "the driver clamps time: it never goes backwards");
        core.seq.0 += 1;
        core.now = now;
        self.scratch.clear();
        self.scratch.extend_from_slice(&core.head.0);
        encode(&(now, &input), &mut self.scratch);

        core.state.handle(&mut Context { now, seq: core.seq, out: &mut self.out }, input);
        if core.seq.0.is_multiple_of(STATE_DIGEST_EVERY) {
            self.out.push_back(S::state_digest(core.seq, Digest::of_value(&core.state)));
        }

        for output in &self.out {
            encode(output, &mut self.scratch);
        }
        core.head = Digest::of(&self.scratch);
        if cfg!(debug_assertions) {
            core.state.check();
        }
        core.seq
    }

    /// The next output; one that [waits](Fold::is_wait) when there is none. Changes nothing that is digested.
    pub fn poll(&mut self) -> S::Output {
        self.out.pop_front().unwrap_or_else(|| self.core.state.wait(self.core.now))
    }

    /// Head of the chain over every (time, input, outputs) so far.
    #[must_use]
    pub const fn digest(&self) -> Digest {
        self.core.head
    }

    /// Digest of the whole state.
    #[must_use]
    pub fn state_digest(&self) -> Digest {
        Digest::of_value(&self.core.state)
    }

    /// The whole state in words, for comparing two machines field by field.
    #[must_use]
    pub fn state(&self) -> impl fmt::Debug + '_ {
        &self.core.state
    }

    /// The number that the next input will have.
    #[must_use]
    pub const fn next_seq(&self) -> Seq {
        Seq(self.core.seq.0 + 1)
    }

    /// The time of the last input.
    #[must_use]
    pub const fn now(&self) -> Time {
        self.core.now
    }

    /// The state as bytes, for [`restore`](Self::restore).
    ///
    /// # Panics
    /// If outputs are not drained.
    #[must_use]
    pub fn snapshot(&self) -> Vec<u8> {
        assert!(self.out.is_empty(), "a snapshot is taken when all outputs are drained");
        let mut bytes = Vec::new();
        encode(&self.core, &mut bytes);
        bytes
    }

    /// The machine that [`snapshot`](Self::snapshot) saw.
    ///
    /// # Errors
    /// If the bytes are not a snapshot of this logic version.
    pub fn restore(bytes: &[u8]) -> Result<Self, RestoreError> {
        let (core, rest) = postcard::take_from_bytes(bytes).map_err(RestoreError)?;
        if rest.is_empty() {
            Ok(Self { core, ..Self::default() })
        } else {
            Err(RestoreError(postcard::Error::DeserializeBadEncoding))
        }
    }

    pub(crate) const fn folded(&self) -> &S {
        &self.core.state
    }
}
