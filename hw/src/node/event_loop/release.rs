//! What leaves the node: nothing before the journal has what it follows from.

use super::EventLoop;
use crate::node::{NodeError, report};
use crate::telemetry::Timing;
use lite_llm_core::event::Event;
use lite_llm_core::ids::Seq;
use lite_llm_core::input::Input;
use lite_llm_core::output::Output;
use std::time::Instant;

impl EventLoop {
    /// Lets go of what has become durable, and takes note of a durable snapshot.
    pub(super) fn release(&mut self) -> Result<(), NodeError> {
        let (durable, snapshot, bytes, flushes) = {
            let mut progress = self.journal.progress();
            if let Some(error) = progress.failed.take() {
                return Err(error.into());
            }
            let flushes = std::mem::take(&mut progress.flushes);
            (progress.durable, progress.snapshot.take(), progress.bytes, flushes)
        };
        self.durable = durable;
        for flush in flushes {
            self.telemetry.timing(Timing::Flush, flush);
        }
        while self.held.front().is_some_and(|(after, _)| *after <= durable) {
            let (_, output) = self.held.pop_front().expect("it was there");
            self.tell(output);
        }
        let waiting = self.done.split_off(&Seq(durable.0 + 1));
        for (_, reply) in std::mem::replace(&mut self.done, waiting) {
            let _ = reply.send(Ok(()));
        }
        if self.snapshot_bytes.is_some_and(|most| bytes > most) && !self.snapshot_asked {
            self.snapshot_asked = true;
            self.inbox.push_back(Input::SnapshotWanted);
        }
        if let Some(next) = snapshot {
            self.snapshot_asked = false;
            self.inbox.push_back(Input::SnapshotDurable { next });
            self.snapshots.retain(|(asked, reply)| *asked >= next || reply.send(next).is_err());
        }
        if self.held.is_empty() {
            self.telemetry.flush();
        }
        Ok(())
    }

    /// What leaves the node.
    fn tell(&mut self, output: Output) {
        match output {
            Output::Accepted { id, generated, after } => self.streams.accepted(&id, generated, after),
            Output::Token { id, offset, token, after } => self.streams.token(&id, offset, token, after),
            Output::Finish { id, reason, generated, after } => {
                // Said with the end, because the node may be gone when somebody asks.
                let generations = report::generations(&self.engine, &id).unwrap_or_default();
                self.streams.finish(&id, (&reason, generated), &generations, after);
            }
            Output::Refuse { id, refusal, reason, after } => match self.done.remove(&after) {
                Some(reply) => drop(reply.send(Err(reason))),
                None => self.streams.refused(&id, refusal, &reason, after),
            },
            Output::Retire { blob, .. } => {
                self.blobs.remove(blob);
                self.inbox.push_back(Input::Retired { blob });
            }
            Output::Switched { asked, outcome, .. } | Output::Modified { asked, outcome, .. } => {
                if let Some(reply) = self.switches.remove(&asked) {
                    let _ = reply.send(outcome);
                }
            }
            // Wishes are of a cluster; one whose journal this was heard no answer, and asks nobody here.
            Output::Answered { .. } => {}
            Output::Event { seq, event } => self.event(seq, &event),
            Output::Ready { .. } => {
                if let Some(ready) = self.ready.take() {
                    let _ = ready.send(());
                }
            }
            Output::FlushTelemetry => {
                // Telemetry that cannot be written is dropped and counted, and keeps nobody from stopping.
                let _ = self.telemetry.sync();
                self.inbox.push_back(Input::TelemetryFlushed);
            }
            Output::Exit { error, .. } => {
                self.end = Some(match error {
                    None => Ok(report::exit(&self.engine)),
                    Some(error) => Err(NodeError::Boot(error)),
                });
            }
            other => unreachable!("{other:?} is not held"),
        }
    }

    fn event(&mut self, seq: Seq, event: &Event) {
        self.telemetry.event(seq, event);
        if let Event::PhaseDone { phase, .. } = event {
            let began = std::mem::replace(&mut self.phase_began, Instant::now());
            self.telemetry.timing(Timing::Phase(*phase), began.elapsed());
        }
        if let Some(on_event) = &mut self.on_event {
            on_event(seq, event);
        }
    }
}
