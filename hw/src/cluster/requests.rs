//! The clients' requests: asked of whoever leads, again and from where the stream stands, until they end.

use crate::node::StreamEvent;
use lite_llm_core::cluster::membership::{Epoch, NodeId};
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::{Body, Input};
use lite_llm_core::output::{Output, Refusal};
use std::collections::BTreeMap;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

/// How long nothing may come of a stream before it is asked for again.
const SILENCE: Duration = Duration::from_secs(2);
/// Pause after somebody could not take a request.
const PAUSE: Duration = Duration::from_millis(100);

/// A stream that somebody waits for.
#[derive(Debug)]
struct Request {
    body: Body,
    replica: u32,
    /// The next token that the client has not.
    next: u32,
    events: Sender<StreamEvent>,
    /// In which epoch it was asked for last.
    asked: Option<Epoch>,
    /// When to ask again.
    again: Instant,
}

/// Each request belongs to one replica, by its id.
pub(super) fn replica_of(id: &RequestId, replicas: u32) -> u32 {
    let hash = Digest::of(id.as_str().as_bytes());
    let hash = u64::from_le_bytes(*hash.0.first_chunk().expect("a digest is longer"));
    u32::try_from(hash % u64::from(replicas)).expect("below a number of replicas")
}

/// All requests that have not ended.
#[derive(Debug, Default)]
pub(super) struct Requests {
    open: BTreeMap<RequestId, Request>,
    replicas: u32,
}

impl Requests {
    pub(super) fn new(replicas: u32) -> Self {
        Self { replicas, ..Self::default() }
    }

    /// A client wants a stream from a token on.
    pub(super) fn submit(&mut self, id: RequestId, body: Body, from: u32, events: Sender<StreamEvent>) {
        let replica = replica_of(&id, self.replicas);
        let request = Request { body, replica, next: from, events, asked: None, again: Instant::now() };
        self.open.insert(id, request);
    }

    /// Whose replica each is of, and the tokens that its client was told, up to an offset.
    pub(super) fn told(&self) -> BTreeMap<RequestId, (u32, u32)> {
        self.open.iter().map(|(id, request)| (id.clone(), (request.replica, request.next))).collect()
    }

    /// What is to be asked now, and of whom: `leader` says who leads a replica.
    pub(super) fn due(
        &mut self,
        leader: impl Fn(u32) -> Option<(Epoch, NodeId)>,
    ) -> Vec<(NodeId, u32, Input)> {
        let now = Instant::now();
        let mut due = Vec::new();
        for (id, request) in &mut self.open {
            let Some((epoch, node)) = leader(request.replica) else { continue };
            if request.asked == Some(epoch) && request.again > now {
                continue;
            }
            request.asked = Some(epoch);
            request.again = now + SILENCE;
            let body = Box::new(request.body.clone());
            let input = Input::Submit { id: id.clone(), body, from: request.next };
            due.push((node, request.replica, input));
        }
        due
    }

    /// When something is due if nothing happens.
    pub(super) fn again(&self) -> Option<Instant> {
        self.open.values().map(|request| request.again).min()
    }

    /// A node could not take it.
    pub(super) fn refused(&mut self, input: &Input) {
        if let Input::Submit { id, .. } = input
            && let Some(request) = self.open.get_mut(id)
        {
            request.again = Instant::now() + PAUSE;
        }
    }

    /// A node tells something of a stream: each thing once, in order.
    pub(super) fn tell(&mut self, output: Output) {
        let id = match &output {
            Output::Accepted { id, .. }
            | Output::Token { id, .. }
            | Output::Finish { id, .. }
            | Output::Refuse { id, .. } => id.clone(),
            _ => return,
        };
        let Some(request) = self.open.get_mut(&id) else { return };
        request.again = Instant::now() + SILENCE;
        let event = match output {
            Output::Accepted { generated, .. } => StreamEvent::Accepted { generated },
            Output::Token { offset, token, .. } if offset == request.next => {
                request.next += 1;
                StreamEvent::Token { offset, token }
            }
            // What is missing before it was lost on the way.
            Output::Token { offset, .. } if offset > request.next => {
                request.again = Instant::now() + PAUSE;
                return;
            }
            Output::Finish { reason, generated, .. } if generated <= request.next => {
                StreamEvent::Finish { reason, generated, generations: Vec::new() }
            }
            Output::Finish { .. } => {
                request.again = Instant::now() + PAUSE;
                return;
            }
            // It boots, or drains and leaves the request to its next life, or has no room now.
            Output::Refuse { refusal: Refusal::NotServing | Refusal::Busy, .. } => {
                request.again = Instant::now() + PAUSE;
                return;
            }
            Output::Refuse { refusal, reason, .. } => StreamEvent::Refused { refusal, reason },
            _ => return,
        };
        let ends = matches!(event, StreamEvent::Finish { .. } | StreamEvent::Refused { .. });
        // Who has hung up wants nothing more.
        if request.events.send(event).is_err() || ends {
            self.open.remove(&id);
        }
    }
}
