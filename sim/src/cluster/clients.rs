//! The clients of a simulated cluster, on one machine: each request is asked for until it has ended, wherever its leader is.
//!
//! A client knows nothing of epochs. It asks a node; if that does not answer, or says no, it asks the next one, from the
//! offset where its stream stands. Tokens that come out of order it asks for again.

use super::message::Said;
use super::watch::Watch;
use crate::chronicle::What;
use crate::mark::Mark;
use crate::world::{Context, Happening};
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::{Body, Input, Priority, Sampling};
use lite_llm_core::output::{FinishReason, Output, Refusal};
use std::collections::BTreeMap;

/// Nanoseconds without news after which a client asks again, and after which it asks somebody else who refused.
const PATIENCE_NS: u64 = 400_000_000;
const PAUSE_NS: u64 = 20_000_000;

/// How many requests there are, and how they come.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Workload {
    /// How many requests.
    pub requests: u64,
    /// Nanoseconds over which they come.
    pub over_ns: u64,
    /// Longest prompt, in tokens.
    pub prompt_max: u64,
    /// Most tokens of a stream.
    pub tokens_max: u64,
    /// Requests in a thousand that their client does not want to the end.
    pub cancelled_per_mille: u64,
    /// Requests in a thousand that have a deadline.
    pub deadline_per_mille: u64,
}

impl Default for Workload {
    fn default() -> Self {
        Self {
            requests: 12,
            over_ns: 8_000_000_000,
            prompt_max: 20,
            tokens_max: 24,
            cancelled_per_mille: 100,
            deadline_per_mille: 100,
        }
    }
}

/// One request, as its client sees it.
#[derive(Clone, Debug)]
pub struct Client {
    /// Idempotency key.
    pub id: RequestId,
    /// Which replica it is for.
    pub replica: u32,
    /// What is asked for.
    pub body: Body,
    /// Whether it was accepted.
    pub accepted: bool,
    /// Its stream so far.
    pub tokens: Vec<u32>,
    /// How it ended.
    pub finish: Option<FinishReason>,
    /// It was refused for good.
    pub refused: Option<String>,
    /// The node that it asks.
    target: u32,
    /// When the last news came.
    news_ns: u64,
    /// When it no longer wants it.
    cancel_at_ns: Option<u64>,
    /// When it asked first, in nanoseconds of the world.
    begun_ns: Option<u64>,
    /// Counts what it set its alarm to: an older alarm means nothing.
    alarms: u64,
}

impl Client {
    /// Sets its only alarm.
    fn wake_in(&mut self, cx: &mut Context<'_, Said>, ns: u64, at: usize) {
        self.alarms += 1;
        cx.wake_in(ns, self.alarms << 32 | at as u64);
    }

    /// Whether there is nothing more to ask for.
    #[must_use]
    pub const fn is_over(&self) -> bool {
        self.finish.is_some() || self.refused.is_some()
    }
}

/// The clients.
#[derive(Debug)]
pub struct ClientsActor {
    clients: Vec<Client>,
    by_id: BTreeMap<RequestId, usize>,
    arrivals: Vec<u64>,
    nodes: u32,
    watch: Watch,
    /// New requests come still.
    open: bool,
}

impl ClientsActor {
    /// The clients of a workload, each request for one of the replicas.
    #[must_use]
    pub fn new(
        workload: &Workload,
        draw: impl Fn(u64, u64) -> u64,
        replicas: u32,
        nodes: u32,
        watch: Watch,
    ) -> Self {
        let mut clients = Vec::new();
        let mut arrivals = Vec::new();
        for number in 0..workload.requests {
            let below = |purpose: u64, n: u64| draw(purpose, number) % n.max(1);
            let small = |purpose: u64, n: u64| u32::try_from(below(purpose, n)).expect("a small number");
            let arrives_ns = below(1, workload.over_ns);
            let priority = if below(2, 2) == 0 { Priority::Batch } else { Priority::Interactive };
            let body = Body {
                prompt: (0..=below(3, workload.prompt_max))
                    .map(|at| 2 + u32::try_from(draw(4, number << 16 | at) % 90).expect("a small number"))
                    .collect(),
                max_tokens: 1 + small(5, workload.tokens_max),
                sampling: Sampling { seed: below(6, 5), ..Sampling::default() },
                priority,
                deadline_ns: (below(7, 1000) < workload.deadline_per_mille)
                    .then(|| 100_000_000 + below(8, 20_000_000_000)),
                ignore_eos: below(9, 10) < 8,
                stop: vec![],
            };
            let cancelled = below(10, 1000) < workload.cancelled_per_mille;
            clients.push(Client {
                id: RequestId::new(format!("request-{number}")).expect("a good id"),
                replica: small(11, u64::from(replicas)),
                body,
                accepted: false,
                tokens: Vec::new(),
                finish: None,
                refused: None,
                target: small(12, u64::from(nodes)),
                news_ns: 0,
                cancel_at_ns: cancelled.then(|| arrives_ns + below(13, 4_000_000_000)),
                begun_ns: None,
                alarms: 0,
            });
            arrivals.push(arrives_ns);
        }
        let by_id = clients.iter().enumerate().map(|(at, client)| (client.id.clone(), at)).collect();
        Self { clients, by_id, arrivals, nodes, watch, open: true }
    }

    /// The requests.
    #[must_use]
    pub fn clients(&self) -> &[Client] {
        &self.clients
    }

    /// No request that has not been asked for will be.
    pub const fn close(&mut self) {
        self.open = false;
    }

    /// Whether every stream that was begun has ended.
    #[must_use]
    pub fn is_over(&self) -> bool {
        self.clients.iter().all(|client| client.begun_ns.is_none() || client.is_over())
    }

    /// Deals with what happened.
    pub fn handle(&mut self, cx: &mut Context<'_, Said>, happening: Happening<Said>) {
        match happening {
            Happening::Started { .. } => {
                for (at, (client, &arrives_ns)) in self.clients.iter_mut().zip(&self.arrivals).enumerate() {
                    client.wake_in(cx, arrives_ns, at);
                }
            }
            Happening::Woken { token } => {
                let at = usize::try_from(token & 0xffff_ffff).expect("a request");
                if self.clients[at].alarms == token >> 32 {
                    self.look(cx, at);
                }
            }
            Happening::Message { from, message: Said::Tell(output) } => self.told(cx, from, *output),
            Happening::Message { from, message: Said::Refused { input, reason: _ } } => {
                let (Input::Submit { id, .. } | Input::Cancel { id }) = &*input else { return };
                let at = self.by_id[id];
                self.move_on_from(cx, from, at);
            }
            Happening::Message { .. } | Happening::Tampered { .. } | Happening::Ended { .. } => {}
        }
    }

    /// Asks the next node after one that said no, after a pause.
    ///
    /// Whoever asked two things of one node hears twice that it is not the one, and moves on once: of an even number of nodes
    /// every second would never be asked.
    fn move_on_from(&mut self, cx: &mut Context<'_, Said>, from: u32, at: usize) {
        let client = &mut self.clients[at];
        if from != client.target {
            return;
        }
        client.target = (client.target + 1) % self.nodes;
        client.news_ns = 0;
        client.wake_in(cx, PAUSE_NS, at);
    }

    /// Sees whether a request is to be asked for.
    fn look(&mut self, cx: &mut Context<'_, Said>, at: usize) {
        let now = cx.world_ns();
        let client = &mut self.clients[at];
        if client.is_over() || !(client.begun_ns.is_some() || self.open) {
            return;
        }
        client.begun_ns.get_or_insert(now);
        if client.accepted && client.cancel_at_ns.is_some_and(|cancel| cancel <= now) {
            let input = Box::new(Input::Cancel { id: client.id.clone() });
            cx.send(client.target, Said::Ask { replica: client.replica, input });
        }
        if client.news_ns + PATIENCE_NS <= now {
            if client.news_ns > 0 {
                client.target = (client.target + 1) % self.nodes;
            }
            client.news_ns = now;
            Self::ask(cx, client);
        }
        client.wake_in(cx, PATIENCE_NS, at);
    }

    fn ask(cx: &mut Context<'_, Said>, client: &Client) {
        let from = u32::try_from(client.tokens.len()).expect("a short stream");
        let body = Box::new(client.body.clone());
        let input = Box::new(Input::Submit { id: client.id.clone(), body, from });
        cx.send(client.target, Said::Ask { replica: client.replica, input });
    }

    fn told(&mut self, cx: &mut Context<'_, Said>, from: u32, output: Output) {
        let (Output::Accepted { id, .. }
        | Output::Token { id, .. }
        | Output::Finish { id, .. }
        | Output::Refuse { id, .. }) = &output
        else {
            return;
        };
        let at = self.by_id[id];
        let client = &mut self.clients[at];
        let now = cx.world_ns();
        let wrong = |what: String| self.watch.violated(now, "streams", format!("{}: {what}", client.id));
        let mut again = false;
        match output {
            Output::Accepted { .. } => {
                if client.accepted {
                    self.watch.mark(Mark::Reattached);
                }
                (client.accepted, client.news_ns, client.target) = (true, now, from);
            }
            Output::Token { offset, token, .. } => {
                client.news_ns = now;
                match client.tokens.get(offset as usize) {
                    Some(&known) if known != token => {
                        wrong(format!("token {offset} is {token}, and was {known}"));
                    }
                    Some(_) => {}
                    None if client.finish.is_some() => wrong(format!("token {offset} comes after the end")),
                    None if offset as usize == client.tokens.len() => client.tokens.push(token),
                    None => again = true,
                }
            }
            Output::Finish { reason, generated, .. } => {
                if (generated as usize) < client.tokens.len() {
                    wrong(format!("it ends after {generated} of {} tokens", client.tokens.len()));
                }
                if client.finish.as_ref().is_some_and(|known| *known != reason) {
                    wrong(format!("it ends by {reason:?}, and had ended by {:?}", client.finish));
                }
                let waited_ns = now - client.begun_ns.unwrap_or(now);
                // Its time runs from acceptance, by clocks that may be a little fast.
                let due_ns = client.body.deadline_ns.unwrap_or(0) / 100 * 97;
                if reason == FinishReason::Deadline && waited_ns < due_ns {
                    wrong(format!("its time is over after {waited_ns} ns, of {:?}", client.body.deadline_ns));
                }
                if client.tokens.len() == generated as usize {
                    cx.note(|| What::Note(format!("{} ends: {reason:?}", client.id)));
                    client.finish = Some(reason);
                } else {
                    again = true;
                }
            }
            Output::Refuse { refusal, reason, .. } => match refusal {
                Refusal::Busy | Refusal::NotServing => self.move_on_from(cx, from, at),
                Refusal::Expired | Refusal::Invalid if client.accepted => {
                    wrong(format!("it was accepted, and is refused: {reason}"));
                }
                Refusal::Invalid | Refusal::Expired => client.refused = Some(reason),
            },
            _ => {}
        }
        if again {
            // Something before it was lost, or is late: ask from there, a little later.
            self.clients[at].news_ns = 0;
            self.clients[at].wake_in(cx, PAUSE_NS, at);
        }
    }
}
