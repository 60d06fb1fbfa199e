//! What handles ask for.

use super::EventLoop;
use crate::node::{GenerationSpan, NodeError, Status, StreamEvent, report};
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{ExpertKey, Generation, RequestId, Seq};
use lite_llm_core::input::{Body, Input, SwitchTarget};
use lite_llm_core::journal::frame::PAYLOAD_BYTES_MAX;
use lite_llm_core::output::Refusal;
use lite_llm_core::replay::encode_input;
use std::sync::mpsc::Sender;

/// What a handle asks for.
#[derive(Debug)]
pub(in crate::node) enum Command {
    Submit { id: RequestId, body: Box<Body>, from: u32, events: Sender<StreamEvent> },
    Cancel { id: RequestId, reply: Sender<Result<(), String>> },
    Switch { target: SwitchTarget, at: Option<(RequestId, u32)>, reply: Sender<Result<Generation, String>> },
    Modify { experts: Vec<(ExpertKey, Vec<u8>)>, reply: Sender<Result<Generation, String>> },
    Drain { bound_ns: Option<u64> },
    Snapshot { reply: Sender<Seq> },
    Status { reply: Sender<Status> },
    Generations { id: RequestId, reply: Sender<Option<Vec<GenerationSpan>>> },
    Abandon,
}

impl EventLoop {
    pub(super) fn command(&mut self, command: Command) -> Result<(), NodeError> {
        self.owed.is_waited_for();
        match command {
            Command::Submit { id, body, from, events } => self.submit(id, body, from, events)?,
            Command::Cancel { id, reply } => {
                let seq = self.handle(Input::Cancel { id })?;
                self.done.insert(seq, reply);
            }
            Command::Switch { target, at, reply } => {
                // The outcome may already be among the outputs: they are held until after this.
                let seq = self.handle(Input::Switch { target, at })?;
                self.switches.insert(seq, reply);
            }
            Command::Modify { experts, reply } => self.modify(experts, reply)?,
            Command::Drain { bound_ns } => {
                self.handle(Input::Drain { bound_ns })?;
            }
            Command::Snapshot { reply } => {
                let seq = self.handle(Input::SnapshotWanted)?;
                self.snapshots.push((seq, reply));
            }
            // Whoever asked and went away wants no answer.
            Command::Status { reply } => {
                let status = report::status(&self.engine, self.durable, self.telemetry.dropped());
                let _ = reply.send(status);
            }
            Command::Generations { id, reply } => drop(reply.send(report::generations(&self.engine, &id))),
            Command::Abandon => unreachable!("taken by the caller"),
        }
        Ok(())
    }

    fn submit(
        &mut self,
        id: RequestId,
        body: Box<Body>,
        from: u32,
        events: Sender<StreamEvent>,
    ) -> Result<(), NodeError> {
        let stops = !body.stop.is_empty();
        let input = Input::Submit { id: id.clone(), body, from };
        let payload = encode_input(&input);
        // What no journal could hold or no text could end is refused before it is an input.
        let reason = if payload.len() > PAYLOAD_BYTES_MAX {
            Some(format!(
                "the request is {} bytes long, above the journal's bound of {PAYLOAD_BYTES_MAX}: shorten the prompt",
                payload.len()
            ))
        } else if stops && !self.device.has_tokenizer() {
            Some("stop texts need a tokenizer, and this checkpoint has none: leave them out".into())
        } else {
            None
        };
        if let Some(reason) = reason {
            let _ = events.send(StreamEvent::Refused { refusal: Refusal::Invalid, reason });
            return Ok(());
        }
        let seq = self.handle_encoded(input, payload)?;
        self.streams.listen(id, seq, from, events);
        Ok(())
    }

    /// Modified bytes must fill a slot. The engine names them by their digests.
    fn modify(
        &mut self,
        experts: Vec<(ExpertKey, Vec<u8>)>,
        reply: Sender<Result<Generation, String>>,
    ) -> Result<(), NodeError> {
        let slot_bytes = self.device.plan().slot_bytes;
        if let Some((key, bytes)) = experts.iter().find(|(_, bytes)| bytes.len() as u64 != slot_bytes) {
            let reason = format!("expert {key:?} has {} bytes, a slot has {slot_bytes}", bytes.len());
            let _ = reply.send(Err(reason));
            return Ok(());
        }
        let named: Vec<_> = experts.iter().map(|(key, bytes)| (*key, Digest::of(bytes))).collect();
        let bytes = experts.into_iter().map(|(_, bytes)| bytes);
        self.device.stage(named.iter().map(|(_, blob)| *blob).zip(bytes).collect());
        let seq = self.handle(Input::Modify { experts: named })?;
        // Refused, nobody asks for them.
        self.device.stage(Vec::new());
        self.switches.insert(seq, reply);
        Ok(())
    }
}
