//! The engine: one door in, one door out.
//!
//! [`Engine::handle`] takes an input and its time; [`Engine::poll`] gives the outputs until [`Output::Wait`]. Every
//! output of an input must be drained before the next input. The state is a pure fold over (time, input) pairs, which
//! is why restart and replay need nothing but the journal. `State::handle` below is the only dispatch: each arm is one
//! decision, in the module that its name says.

use crate::digest::{Digest, encode};
use crate::event::Event;
use crate::ids::Seq;
use crate::input::Input;
use crate::output::Output;
use crate::state::State;
use crate::time::Time;
use crate::view::View;
use alloc::collections::VecDeque;
use alloc::vec::Vec;
use core::fmt;
use serde::{Deserialize, Serialize};

/// Records between two digests of the whole state.
const STATE_DIGEST_EVERY: u64 = 4096;

/// The state machine of one node.
#[derive(Clone, Debug, Default)]
pub struct Engine {
    core: Core,
    out: VecDeque<Output>,
    scratch: Vec<u8>,
}

/// Everything that a snapshot holds.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct Core {
    seq: Seq,
    now: Time,
    head: Digest,
    state: State,
}

/// Bytes that are no snapshot of this logic version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the snapshot's state cannot be decoded ({0}); it is damaged or of another logic version")]
pub struct RestoreError(postcard::Error);

/// What handling one input may use: when it is, and where outputs go.
pub(crate) struct Context<'a> {
    pub(crate) now: Time,
    pub(crate) seq: Seq,
    out: &'a mut VecDeque<Output>,
}

impl Context<'_> {
    pub(crate) fn say(&mut self, output: Output) {
        self.out.push_back(output);
    }

    pub(crate) fn event(&mut self, event: Event) {
        self.out.push_back(Output::Event { seq: self.seq, event });
    }
}

impl Engine {
    /// An engine that has seen nothing.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Handles an input and returns its number. What it brings about comes out of [`poll`](Self::poll).
    ///
    /// # Panics
    /// If the driver broke the protocol (outputs not drained, time going backwards, an answer to nothing), or the
    /// engine an invariant.
    pub fn handle(&mut self, now: Time, input: Input) -> Seq {
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
            let digest = Digest::of_value(&core.state);
            self.out.push_back(Output::Event { seq: core.seq, event: Event::State { digest } });
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

    /// The next output; [`Output::Wait`] when there is none. Changes nothing that is digested.
    pub fn poll(&mut self) -> Output {
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

    /// The whole state in words, for comparing two engines field by field.
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

    /// The engine that [`snapshot`](Self::snapshot) saw.
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

    /// What may be looked at.
    #[must_use]
    pub const fn view(&self) -> View<'_> {
        View::new(&self.core.state)
    }
}

impl State {
    fn handle(&mut self, cx: &mut Context<'_>, input: Input) {
        match input {
            Input::Boot { incarnation, config, entropy } => self.boot(cx, incarnation, config, entropy),
            Input::Restarted { incarnation, config, entropy } => {
                self.restarted(cx, incarnation, config, entropy);
            }
            Input::Reserved => self.reserved(cx),
            Input::ManifestRead { plan } => self.manifest_read(cx, plan),
            Input::BaseLoaded { shard } => self.base_loaded(cx, shard),
            Input::RoutersLoaded => self.routers_loaded(cx),
            Input::BootFailed { fault } => self.boot_failed(cx, &fault),
            Input::Loaded { load, fault } => self.loaded(cx, load, fault),
            Input::Submit { id, body, from } => self.submit(cx, id, body, from),
            Input::Cancel { id } => self.cancel(cx, id),
            Input::Switch { target, at } => self.switch(cx, target, at),
            Input::Drain { bound_ns } => self.drain(cx, bound_ns),
            Input::SnapshotWanted => self.snapshots.wanted = true,
            Input::SnapshotDurable { next } => self.snapshot_durable(cx, next),
            Input::Need { step, attempt, layer, experts } => self.need(cx, step, attempt, layer, experts),
            Input::Released { step, attempt, layer, wave } => self.released(cx, step, attempt, layer, wave),
            Input::Finished { step, attempt, rows, duration_ns } => {
                self.finished(cx, step, attempt, &rows, duration_ns);
            }
            Input::Failed { step, attempt, fault } => self.failed(cx, step, attempt, fault),
            Input::Tick => {}
            Input::TelemetryFlushed => self.telemetry_flushed(cx),
            Input::ResourcesReleased => self.resources_released(cx),
            Input::Retired { blob } => self.retired(blob),
            Input::Modify { experts } => self.modify(cx, experts),
            Input::Persisted { asked, fault } => self.persisted(cx, asked, fault),
        }
        self.advance(cx);
    }

    /// What follows from the state alone, whatever the input was.
    fn advance(&mut self, cx: &mut Context<'_>) {
        self.fill_experts(cx);
        self.begin_wave(cx);
        self.issue_loads(cx);
        self.expire(cx);
        self.advance_switch(cx);
        self.advance_modification(cx);
        self.schedule(cx);
        self.advance_drain(cx);
        self.take_snapshot(cx);
    }
}
