//! What other threads do with a head.

use super::operator::Asked;
use super::status::ClusterStatus;
use crate::cluster::requests::replica_of;
use crate::cluster::said::Said;
use crate::node::StreamEvent;
use lite_llm_core::cluster::membership::NodeId;
use lite_llm_core::ids::{Incarnation, RequestId};
use lite_llm_core::input::{Body, Wish};
use lite_llm_core::output::Granted;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// What comes to the loop of a head.
#[derive(Debug)]
pub(super) enum Happened {
    Said(Said),
    Submit { id: RequestId, body: Box<Body>, from: u32, events: Sender<StreamEvent> },
    Asked(Asked),
    Drain { bound_ns: Option<u64> },
    Stop,
}

/// Asks a head from any thread.
#[derive(Clone, Debug)]
pub struct HeadHandle {
    messages: SyncSender<Happened>,
    replicas: u32,
}

/// What will be answered, to whoever waits for it. Dropped, it is not asked for again; what was heard stays asked for.
#[derive(Debug)]
pub struct Answer<T> {
    outcome: Receiver<Result<T, String>>,
    _waits: Arc<()>,
}

/// Where an answer goes.
#[derive(Debug)]
pub(in crate::cluster) struct Reply<T> {
    outcome: Sender<Result<T, String>>,
    waits: Weak<()>,
}

impl<T> Answer<T> {
    pub(in crate::cluster) fn new() -> (Reply<T>, Self) {
        let (sender, outcome) = channel();
        let waits = Arc::new(());
        (Reply { outcome: sender, waits: Arc::downgrade(&waits) }, Self { outcome, _waits: waits })
    }

    /// Waits for it for a while.
    ///
    /// # Errors
    /// If it is not there yet, or the head has ended.
    pub fn recv_timeout(&self, wait: Duration) -> Result<Result<T, String>, RecvTimeoutError> {
        self.outcome.recv_timeout(wait)
    }
}

impl<T> Reply<T> {
    /// Whoever has hung up wants no answer.
    pub(in crate::cluster) fn send(self, outcome: Result<T, String>) {
        let _ = self.outcome.send(outcome);
    }

    /// Whether somebody waits still.
    pub(in crate::cluster) fn is_awaited(&self) -> bool {
        self.waits.strong_count() > 0
    }
}

impl HeadHandle {
    pub(super) const fn new(messages: SyncSender<Happened>, replicas: u32) -> Self {
        Self { messages, replicas }
    }

    /// Asks for a stream from a token on. The same id with the same body attaches to what is there.
    #[must_use]
    pub fn submit(&self, id: RequestId, body: Body, from: u32) -> Receiver<StreamEvent> {
        let (events, receiver) = channel();
        self.send(Happened::Submit { id, body: Box::new(body), from, events });
        receiver
    }

    /// Asks for a clean stop: what is accepted is finished, or left in the journals once the bound is over.
    pub fn drain(&self, bound: Option<Duration>) {
        let bound_ns = bound.map(|bound| u64::try_from(bound.as_nanos()).unwrap_or(u64::MAX));
        self.send(Happened::Drain { bound_ns });
    }

    /// Wishes something of a replica: it is asked for until it is answered, whoever leads, and done once.
    #[must_use]
    pub fn wish(&self, replica: u32, wish: Wish) -> Answer<Granted> {
        let (reply, answer) = Answer::new();
        self.send(Happened::Asked(Asked::Wish { replica, wish, reply }));
        answer
    }

    /// Has a node begin a new life, and tells which it is once it has begun.
    #[must_use]
    pub fn restart(&self, node: NodeId) -> Answer<Incarnation> {
        let (reply, answer) = Answer::new();
        self.send(Happened::Asked(Asked::Restart { node, reply }));
        answer
    }

    /// How the cluster stands.
    #[must_use]
    pub fn status(&self) -> Answer<ClusterStatus> {
        let (reply, answer) = Answer::new();
        self.send(Happened::Asked(Asked::Status { reply }));
        answer
    }

    /// How many replicas there are.
    #[must_use]
    pub const fn replicas(&self) -> u32 {
        self.replicas
    }

    /// The replica that a request belongs to.
    #[must_use]
    pub fn replica_of(&self, id: &RequestId) -> u32 {
        replica_of(id, self.replicas)
    }

    /// A head that has ended answers nothing.
    pub(super) fn send(&self, happened: Happened) {
        let _ = self.messages.send(happened);
    }
}
