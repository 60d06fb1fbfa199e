//! The engine: one door in, one door out.
//!
//! [`Engine::handle`](Chain::handle) takes an input and its time; [`Engine::poll`](Chain::poll) gives the outputs until
//! [`Output::Wait`]. Every output of an input must be drained before the next input. The state is a pure fold over
//! (time, input) pairs, which is why restart and replay need nothing but the journal: the door itself, with the digest
//! chain, is in `crate::chain`. `State::dispatch` below is the only dispatch: each arm is one decision, in the module
//! that its name says.

use crate::chain::{self, Chain, Fold};
use crate::digest::Digest;
use crate::event::Event;
use crate::ids::Seq;
use crate::input::Input;
use crate::output::Output;
use crate::state::State;
use crate::time::Time;
use crate::view::View;

/// The state machine of one node.
pub type Engine = Chain<State>;

/// What handling one input may use: when it is, and where outputs go.
pub(crate) type Context<'a> = chain::Context<'a, Output>;

impl Context<'_> {
    pub(crate) fn event(&mut self, event: Event) {
        let seq = self.seq;
        self.say(Output::Event { seq, event });
    }
}

impl Engine {
    /// What may be looked at.
    #[must_use]
    pub const fn view(&self) -> View<'_> {
        View::new(self.folded())
    }
}

impl Fold for State {
    type Input = Input;
    type Output = Output;

    fn handle(&mut self, cx: &mut Context<'_>, input: Input) {
        self.dispatch(cx, input);
    }

    fn wait(&self, now: Time) -> Output {
        self.waiting(now)
    }

    fn is_wait(output: &Output) -> bool {
        matches!(output, Output::Wait { .. })
    }

    fn state_digest(seq: Seq, digest: Digest) -> Output {
        Output::Event { seq, event: Event::State { digest } }
    }

    fn check(&self) {
        self.assert_invariants();
    }
}

impl State {
    fn dispatch(&mut self, cx: &mut Context<'_>, input: Input) {
        match input {
            Input::Boot { incarnation, config, entropy } => self.boot(cx, incarnation, *config, entropy),
            Input::Restarted { incarnation, config, entropy } => {
                self.restarted(cx, incarnation, *config, entropy);
            }
            Input::Reserved => self.reserved(cx),
            Input::ManifestRead { plan } => self.manifest_read(cx, *plan),
            Input::BaseLoaded { shard } => self.base_loaded(cx, shard),
            Input::RoutersLoaded => self.routers_loaded(cx),
            Input::BootFailed { fault } => self.boot_failed(cx, &fault),
            Input::Loaded { load, fault } => self.loaded(cx, load, fault),
            Input::Submit { id, body, from } => self.submit(cx, id, *body, from),
            Input::Cancel { id } => self.cancel(cx, id),
            Input::Switch { target, at } => self.switch(cx, target, at),
            Input::Drain { bound_ns } => self.drain(cx, bound_ns),
            Input::SnapshotWanted => self.snapshots.wanted = true,
            Input::SnapshotDurable { next } => self.snapshot_durable(cx, next),
            Input::Need { step, attempt, layer, experts, foreseen } => {
                self.need(cx, step, attempt, layer, experts, foreseen);
            }
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
            Input::Wish { id, wish } => self.wish(cx, id, wish),
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
