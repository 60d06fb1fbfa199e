//! Clients and operators of a simulated machine, and what they hold its streams against.

use super::{Client, Machine};
use crate::model::{self, Setting};
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{ExpertKey, RequestId};
use lite_llm_core::input::{Body, Input, Priority, Sampling, SwitchTarget};
use lite_llm_core::lifecycle::Lifecycle;
use lite_llm_core::output::FinishReason;

impl Machine {
    /// Something that a client or an operator does.
    pub(super) fn client(&mut self) {
        if self.engine.view().lifecycle() != Lifecycle::Active {
            return;
        }
        let known = self.clients.len() as u64;
        match self.choice.below(20) {
            0 => self.switch(),
            1 if known > 0 => {
                let id = self.some_client();
                self.handle(Input::Cancel { id });
            }
            2 => self.handle(Input::SnapshotWanted),
            3 | 4 if known > 0 => {
                let id = self.some_client();
                self.attach(&id);
            }
            5 => self.handle(Input::Tick),
            7 | 8 => self.modify(),
            6 => {
                let bound_ns = self.choice.chance(500).then(|| self.choice.below(10_000));
                if self.choice.chance(200) {
                    self.handle(Input::Drain { bound_ns });
                }
            }
            _ if known < self.scenario.requests => self.submit(known),
            _ => {}
        }
    }

    pub(super) fn some_client(&mut self) -> RequestId {
        let at = self.choice.index(self.clients.len());
        self.clients.keys().nth(at).expect("below the count").clone()
    }

    pub(super) fn switch(&mut self) {
        let target = match self.choice.below(4) {
            0 => SwitchTarget::Tiers(vec!["large".into()]),
            1 => SwitchTarget::Mode("fast".into()),
            2 => SwitchTarget::Mode("max".into()),
            _ => SwitchTarget::Budget(self.choice.below(2000)),
        };
        let at = if self.choice.chance(400) && !self.clients.is_empty() {
            let position = 1 + u32::try_from(self.choice.below(30)).unwrap_or(0);
            Some((self.some_client(), position))
        } else {
            None
        };
        self.handle(Input::Switch { target, at });
    }

    pub(super) fn modify(&mut self) {
        let all: Vec<ExpertKey> = self.plan.experts(&[0, 1]).collect();
        let mut experts: Vec<(ExpertKey, Digest)> = Vec::new();
        for key in all {
            if self.choice.chance(200) {
                // Few of them, so that bytes come back and experts share them.
                experts.push((key, Digest::of(&self.choice.below(12).to_le_bytes())));
            }
        }
        self.handle(Input::Modify { experts });
    }

    pub(super) fn submit(&mut self, number: u64) {
        let id = RequestId::new(format!("request-{number}")).expect("a good id");
        let length = 1 + self.choice.below(20);
        let body = Body {
            prompt: (0..length).map(|_| 2 + u32::try_from(self.choice.below(90)).unwrap_or(0)).collect(),
            max_tokens: 1 + u32::try_from(self.choice.below(30)).unwrap_or(0),
            sampling: Sampling { seed: self.choice.below(5), ..Sampling::default() },
            priority: if self.choice.chance(500) { Priority::Batch } else { Priority::Interactive },
            deadline_ns: self.choice.chance(100).then(|| 100_000 + self.choice.below(1_000_000)),
            ignore_eos: self.choice.chance(800),
            stop: vec![],
        };
        let client =
            Client { body: body.clone(), connected: true, accepted: false, tokens: vec![], finish: None };
        self.clients.insert(id.clone(), client);
        self.handle(Input::Submit { id, body: body.into(), from: 0 });
    }

    /// The client asks again, from where its stream stands. It does not know whether its request was ever accepted.
    pub(super) fn attach(&mut self, id: &RequestId) {
        let known = self.engine.view().stream(id).is_some();
        let refused = !known && self.engine.view().lifecycle() != Lifecycle::Active;
        let client = self.clients.get_mut(id).expect("a client");
        if !refused {
            client.connected = true;
            let from = u32::try_from(client.tokens.len()).expect("a short stream");
            let body = client.body.clone().into();
            self.handle(Input::Submit { id: id.clone(), body, from });
        }
    }

    pub(super) fn attach_all(&mut self) {
        let ids: Vec<RequestId> = self.clients.keys().cloned().collect();
        for id in ids {
            self.attach(&id);
        }
    }

    /// Every stream is the reference run of its request alone, under the journalled generations.
    pub(super) fn check_streams(&mut self) {
        let seed = self.scenario.seed;
        let view = self.engine.view();
        for (id, client) in &self.clients {
            if !client.accepted {
                continue;
            }
            let stream = view.stream(id).unwrap_or_else(|| panic!("seed {seed}: {id} is lost"));
            let setting_at = |position: u32| {
                let segment = stream.segments.iter().find(|segment| position < segment.until);
                segment.map_or_else(Setting::default, |segment| self.settings[&segment.generation].1.clone())
            };
            let expected = model::reference(&self.plan, &client.body, setting_at, stream.tokens.len());
            assert_eq!(stream.tokens, expected, "seed {seed}: {id} is not its reference");
            assert_eq!(client.tokens, stream.tokens, "seed {seed}: {id} was not delivered whole");
            let finish = client.finish.as_ref().unwrap_or_else(|| panic!("seed {seed}: {id} has no end"));
            match finish {
                FinishReason::Length => {
                    let room = 49 - client.body.prompt.len();
                    assert_eq!(
                        stream.tokens.len(),
                        room.min(client.body.max_tokens as usize),
                        "seed {seed}: {id}"
                    );
                }
                FinishReason::Eos => assert_eq!(stream.tokens.last(), Some(&1), "seed {seed}: {id}"),
                FinishReason::Fault(_) => {
                    assert!(self.scenario.fault_per_mille > 0, "seed {seed}: {id}: {finish:?}")
                }
                FinishReason::Stop | FinishReason::Cancelled | FinishReason::Deadline => {}
            }
            self.report.complete += u64::from(matches!(finish, FinishReason::Length | FinishReason::Eos));
        }
    }
}
