//! An active epoch: inputs get their order, records go to every journal, outputs to the ranks that they concern.

use super::{Held, Peer, PeerOutput, end_of};
use crate::cluster::gather::{Asked, GIVEN_UP, Gathered, everybody, of_stage, on_shelf};
use crate::cluster::message::Payload;
use crate::cluster::orders::LogEnd;
use crate::ids::{ExpertKey, LoadId, Seq, Slot, StepId, index};
use crate::input::{Fault, Input};
use crate::journal::{Record, Snapshot};
use crate::output::{Forward, Output};
use crate::plant::{self, Bug};
use crate::replay::encode_input;
use crate::time::Time;
use alloc::format;
use alloc::string::String;

impl Peer {
    /// As the leader: gives an input its place in the log.
    pub(super) fn order(&mut self, now: Time, input: Input) {
        let time = self.log_time(now).max(self.engine.now());
        let record = Record {
            seq: self.engine.next_seq().0,
            time_ns: time.0,
            digest: self.engine.digest().0,
            payload: encode_input(&input),
        };
        if !self.followers.is_empty() {
            self.batch.push(record.clone());
        }
        self.fold(time, input, record);
    }

    /// Journals a record and folds it into the engine.
    pub(super) fn fold(&mut self, time: Time, input: Input, record: Record) {
        let epoch = self.epoch().expect("records come in an epoch");
        if let Input::Boot { incarnation, .. } | Input::Restarted { incarnation, .. } = &input {
            self.obeying = incarnation.0 == epoch.0;
        }
        // Bringing a log up is work; a record of an epoch that serves may be a mere wish of a client.
        self.progress += u64::from(!self.obeying || plant::is(Bug::WishesAreProgress));
        self.out.push_back(PeerOutput::Append(record));
        self.engine.handle(time, input);
        self.ends.push_back(end_of(&self.engine));
        let mut snapshot = false;
        loop {
            let output = self.engine.poll();
            if let Output::Wait { until, reason: _ } = output {
                self.engine_until = until;
                break;
            }
            if output == Output::Snapshot {
                snapshot = true;
            } else if self.obeying {
                self.share(output);
            }
        }
        if snapshot && self.obeying {
            let LogEnd { last, digest } = end_of(&self.engine);
            let next = Seq(last.0 + 1);
            self.ask(Asked::Snapshot(next), everybody(self.topology()));
            // What is not committed may yet be cut off: a snapshot never holds it.
            let snapshot = Snapshot {
                next: next.0,
                digest: digest.0,
                logic_version: crate::LOGIC_VERSION,
                bytes: self.engine.snapshot(),
            };
            if plant::is(Bug::SnapshotEarly) {
                return self.out.push_back(PeerOutput::Snapshot(snapshot));
            }
            self.hold(last, Held::Snapshot(snapshot));
        }
    }

    fn ask(&mut self, asked: Asked, ranks: u64) {
        if self.leading() {
            self.gather.expect(asked, ranks);
        }
    }

    /// Expects the answers to a load; returns whether this rank is to give one.
    fn ask_shelf(&mut self, load: LoadId, expert: ExpertKey) -> bool {
        let shelf = self.engine.view().shelf(expert);
        self.ask(Asked::Load(load), on_shelf(self.topology(), shelf));
        self.holds(shelf)
    }

    /// Takes of an output what concerns this rank.
    fn share(&mut self, output: Output) {
        let all = everybody(self.topology());
        match output {
            Output::Reserve { .. } | Output::ReadManifest | Output::LoadBase { .. } | Output::LoadRouters => {
                self.ask(Asked::Boot, all);
                self.obey(output);
            }
            Output::Load { load, expert, blob, slot, origin } => {
                if self.ask_shelf(load, expert) {
                    let slot = self.own(slot);
                    let origin = origin.map(|slot| self.own_warm(slot));
                    self.obey(Output::Load { load, expert, blob, slot, origin });
                }
            }
            Output::Stage { load, expert, blob, slot } => {
                if self.ask_shelf(load, expert) {
                    let slot = self.own_warm(slot);
                    self.obey(Output::Stage { load, expert, blob, slot });
                }
            }
            Output::Provide { step, attempt, layer, wave, wave_len, expert, slot } => {
                if self.holds(self.engine.view().shelf(expert)) {
                    let slot = self.own(slot);
                    self.obey(Output::Provide { step, attempt, layer, wave, wave_len, expert, slot });
                }
            }
            Output::Forward(forward) => {
                self.ask(Asked::Step(forward.step, forward.attempt), all);
                let resident = forward.resident.as_ref().map(|all| {
                    let mine = all.iter().filter(|(key, _)| self.holds(self.engine.view().shelf(*key)));
                    mine.map(|&(key, slot)| (key, self.own(slot))).collect()
                });
                self.obey(Output::Forward(Forward { resident, ..forward }));
            }
            Output::Persist { asked, .. } => {
                self.ask(Asked::Persist(asked), all);
                self.obey(output);
            }
            Output::FlushTelemetry => {
                self.ask(Asked::Telemetry, all);
                self.obey(output);
            }
            Output::Release => {
                self.ask(Asked::Release, all);
                self.obey(output);
            }
            Output::Retire { blob, after, .. } => {
                self.ask(Asked::Retire(blob), all);
                self.hold(after, Held::Output(output));
            }
            Output::Ready { after }
            | Output::Accepted { after, .. }
            | Output::Token { after, .. }
            | Output::Finish { after, .. }
            | Output::Refuse { after, .. }
            | Output::Switched { after, .. }
            | Output::Modified { after, .. }
            | Output::Answered { after, .. }
            | Output::Exit { after, .. } => self.hold(after, Held::Output(output)),
            Output::Event { seq, .. } => self.hold(seq, Held::Output(output)),
            Output::Carve(_) | Output::Abort { .. } | Output::Trim { .. } => self.obey(output),
            Output::Snapshot | Output::Wait { .. } => unreachable!("taken by the caller"),
        }
    }

    fn obey(&mut self, output: Output) {
        self.out.push_back(PeerOutput::Obey(output));
    }

    /// Whether the experts of a shelf are this rank's.
    fn holds(&self, shelf: u32) -> bool {
        on_shelf(self.topology(), shelf) & (1 << self.rank) != 0
    }

    /// A hot slot of the whole replica as this rank counts its own.
    fn own(&self, slot: Slot) -> Slot {
        Slot(slot.0 % self.engine.view().carving().slots)
    }

    /// A warm slot of the whole replica as this rank counts its own.
    fn own_warm(&self, slot: Slot) -> Slot {
        Slot(slot.0 % self.engine.view().carving().warm_slots)
    }

    /// A command of a client or operator.
    pub(super) fn command(&mut self, now: Time, input: Input) {
        match self.may_take(now) {
            Ok(()) => self.order(now, input),
            Err(reason) => self.out.push_back(PeerOutput::Refused { input, reason }),
        }
    }

    fn may_take(&self, now: Time) -> Result<(), String> {
        if !self.leads() || !self.obeying {
            let leader = self.membership.as_ref().filter(|_| !self.leading()).map(|m| m.leading().node);
            return Err(leader.map_or_else(
                || "not ready: the epoch is not active yet; ask again".into(),
                |node| format!("not the leader: ask {node}"),
            ));
        }
        if !self.has_lease(now) {
            return Err("no lease: the supervisor has not been heard; ask again".into());
        }
        let busiest = self.links.values().map(super::Link::unconfirmed).max().unwrap_or(0);
        if busiest > index(self.settings.unconfirmed_max) {
            return Err("busy: another rank is behind (unconfirmed_max); ask again later".into());
        }
        Ok(())
    }

    fn has_lease(&self, now: Time) -> bool {
        plant::is(Bug::LeaseIgnored) || self.lease_until.is_some_and(|until| now < until)
    }

    /// The local driver has answered.
    pub(super) fn answer(&mut self, now: Time, input: Input) {
        if self.leading() {
            self.answered(now, self.rank, input);
        } else if let Some(membership) = &self.membership {
            let leader = membership.leader;
            self.send(now, leader, Payload::Answer { input: input.into() });
        }
    }

    /// As the leader: a rank has answered.
    pub(super) fn answered(&mut self, now: Time, rank: u32, input: Input) {
        if !self.leads() || !self.obeying {
            return;
        }
        match Asked::by(&input) {
            Some(asked @ Asked::Need(_, _, layer)) => {
                let layers = self.engine.view().plan().map_or(1, |plan| plan.layers);
                let stage = self.topology().stage(layers, layer.min(layers - 1));
                self.gather.expect_once(asked, of_stage(self.topology(), stage));
            }
            Some(asked @ Asked::Wave(_, _, layer, wave)) => {
                let Some((.., shelves)) = self.engine.view().wave().filter(|w| (w.0, w.1) == (layer, wave))
                else {
                    return;
                };
                let mine = |shelf: &u32| shelves & (1 << shelf) != 0;
                let ranks = (0..u64::BITS).filter(mine).map(|shelf| on_shelf(self.topology(), shelf));
                self.gather.expect_once(asked, ranks.fold(0, |bits, more| bits | more));
            }
            _ => {}
        }
        let topology = *self.topology();
        match self.gather.take(&topology, rank, input) {
            Gathered::More => {}
            // A stage may need before the leader has heard that the stage before it has released.
            Gathered::Input(input) if matches!(*input, Input::Need { .. }) => {
                self.early = Some(*input);
                self.go_on(now);
            }
            Gathered::Input(input) => {
                self.order(now, *input);
                self.go_on(now);
            }
            Gathered::GiveUp(step, attempt) => self.give_up(now, step, attempt),
            Gathered::Diverged(ranks) => self.diverged |= ranks,
        }
    }

    /// Gives the engine a need that had to wait for the release of the layer before.
    fn go_on(&mut self, now: Time) {
        if self.engine.view().wave().is_none()
            && let Some(need) = self.early.take()
        {
            self.order(now, need);
        }
    }

    /// A rank cannot go on with a step: the others would wait for it for ever.
    fn give_up(&mut self, now: Time, step: StepId, attempt: u32) {
        self.send_to_followers(now, &Payload::Abort { step, attempt });
        self.obey(Output::Abort { step, attempt });
    }

    /// The local journal has got further.
    pub(super) fn journalled(&mut self, now: Time, seq: Seq) {
        // A record that was cut off meanwhile is in no log.
        if let Some(&end) = self.ends.iter().find(|end| end.last == seq && seq > self.durable.last) {
            self.durable = end;
        }
        self.read_next();
        match &self.membership {
            Some(_) if self.standing == super::Standing::Joining => self.join(now),
            Some(membership) if !self.leading() && self.standing == super::Standing::Joined => {
                let leader = membership.leader;
                self.send(now, leader, Payload::Durable { seq: self.durable.last });
            }
            _ => {}
        }
    }

    pub(super) fn follower_durable(&mut self, rank: u32, seq: Seq) {
        if let Some(Some(durable)) = self.followers.get_mut(&rank) {
            *durable = seq.max(*durable);
        }
    }

    /// As the leader: records since the last message go out as one.
    pub(super) fn send_batch(&mut self, now: Time) {
        if !self.batch.is_empty() {
            let records = self.batch.drain(..).collect();
            self.send_to_followers(now, &Payload::Records { records, committed: self.committed() });
        }
    }

    /// As the leader: what every member has is committed.
    pub(super) fn commit(&mut self, now: Time) {
        if !self.leads() {
            return;
        }
        let followers = self.followers.values().map(|durable| durable.unwrap_or_default());
        let all = followers.chain([self.durable.last]);
        let committed = if plant::is(Bug::CommitFastest) { all.max() } else { all.min() };
        let committed = committed.expect("the leader itself");
        if committed > self.committed() {
            self.committed_to(committed);
            self.send_to_followers(now, &Payload::Committed { seq: committed });
        }
    }

    /// Lets go what is committed; clients hear it only under a lease.
    pub(super) fn release(&mut self, now: Time) {
        let own = plant::is(Bug::TellOwnDurable);
        let released = if own { self.durable.last.max(self.committed()) } else { self.committed() };
        while self.held.front().is_some_and(|&(after, _)| after <= released) {
            let told =
                matches!(&self.held[0].1, Held::Output(output) if self.leading() && is_for_clients(output));
            if told && !self.has_lease(now) {
                return;
            }
            let (_, held) = self.held.pop_front().expect("it was there");
            match held {
                Held::Snapshot(snapshot) => self.out.push_back(PeerOutput::Snapshot(snapshot)),
                Held::Output(output) if is_for_clients(&output) => {
                    if told {
                        self.out.push_back(PeerOutput::Tell(output));
                    }
                }
                Held::Output(output) => {
                    self.drained |= matches!(output, Output::Exit { error: None, .. });
                    self.obey(output);
                }
            }
        }
    }

    /// What a compute backend answers when it is told to give a step up.
    #[must_use]
    pub fn given_up(step: StepId, attempt: u32) -> Input {
        Input::Failed { step, attempt, fault: Fault::Device(GIVEN_UP.into()) }
    }

    /// Whether this rank holds an expert, or its rows of it.
    #[must_use]
    pub fn has_expert(&self, key: ExpertKey) -> bool {
        self.holds(self.engine.view().shelf(key))
    }
}

const fn is_for_clients(output: &Output) -> bool {
    matches!(
        output,
        Output::Ready { .. }
            | Output::Accepted { .. }
            | Output::Token { .. }
            | Output::Finish { .. }
            | Output::Refuse { .. }
            | Output::Switched { .. }
            | Output::Modified { .. }
            | Output::Answered { .. }
    )
}
