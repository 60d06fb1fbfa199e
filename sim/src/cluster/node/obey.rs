//! What a node does of what its rank asks for.

use super::{Life, NodeActor};
use crate::chronicle::What;
use crate::cluster::check::first_bytes;
use crate::cluster::journal::OpenError;
use crate::cluster::message::Said;
use crate::cluster::watch::Fact;
use crate::hazard::Hazard;
use crate::mark::Mark;
use crate::world::Context;
use lite_llm_core::cluster::membership::NodeId;
use lite_llm_core::cluster::orders::LogEnd;
use lite_llm_core::cluster::peer::{Log, PeerInput, PeerOutput};
use lite_llm_core::event::Event;
use lite_llm_core::ids::Seq;
use lite_llm_core::input::Input;
use lite_llm_core::journal::Snapshot;
use lite_llm_core::output::Output;

impl NodeActor {
    /// Obeys an output; whether the process still runs.
    pub(super) fn obey(&mut self, cx: &mut Context<'_, Said>, output: PeerOutput) -> bool {
        let Some(Life::Running(process)) = &mut self.life else { return false };
        match output {
            PeerOutput::Append(record) => {
                process.dirty = true;
                // Where a log was opened or cut, its end is the first of these.
                if process.digests.back().is_none_or(|(last, _)| *last < record.seq) {
                    process.digests.push_back((record.seq, first_bytes(&record.digest)));
                }
                if self.journal.append(record).is_err() {
                    cx.exit_with(3);
                    return false;
                }
            }
            PeerOutput::Obey(output) => return self.carry_out(cx, output),
            PeerOutput::Tell(output) => self.tell(cx, output),
            PeerOutput::Send(message) => cx.send(message.to.node.0, Said::Rank(message)),
            PeerOutput::Data { from, tag, bytes } => {
                self.device(cx, |device, bench| device.hear(bench, from, tag, bytes));
            }
            PeerOutput::Forget => {
                process.inbox.retain(|input| {
                    matches!(input, PeerInput::Orders(_) | PeerInput::Message(_) | PeerInput::Command(_))
                });
                process.device.forget(process.peer.rank());
                let epoch = process.peer.membership().map(|membership| membership.epoch).unwrap_or_default();
                cx.note(|| What::State(format!("joining {epoch}")));
            }
            PeerOutput::Snapshot(snapshot) => return self.snapshot(cx, &snapshot),
            PeerOutput::ReadLog { from } => match self.journal.read_from(from) {
                Ok((snapshot, records)) => process.inbox.push_front(PeerInput::Log { snapshot, records }),
                Err(error) => return self.give_up(cx, &error),
            },
            PeerOutput::Rewind { keep } => {
                self.common.watch.mark(Mark::Rewound);
                // What is cut off, or replaced, is not expected again if that is cut short.
                self.durable = LogEnd::default();
                let log = self.journal.cut(keep);
                return self.rewound(cx, log);
            }
            PeerOutput::Install(snapshot) => {
                self.common.watch.mark(Mark::Installed);
                self.durable = LogEnd::default();
                let log = self.journal.install(&snapshot);
                return self.rewound(cx, log);
            }
            PeerOutput::Whole => {
                self.common.watch.mark(Mark::WholeAgain);
                if let Err(error) = self.journal.whole() {
                    return self.give_up(cx, &error);
                }
            }
            PeerOutput::Refused { input, reason } => {
                let mark = if reason.starts_with("not the leader") {
                    Some(Mark::NotLeader)
                } else {
                    reason.starts_with("no lease").then_some(Mark::NoLease)
                };
                if let Some(mark) = mark {
                    self.common.watch.mark(mark);
                }
                let client = match &input {
                    Input::Submit { id, .. } | Input::Cancel { id } => process.attached.remove(id),
                    _ => None,
                };
                if let Some(client) = client {
                    cx.send(client, Said::Refused { input: Box::new(input), reason });
                }
            }
            PeerOutput::Diverged { seq, expected, found } => {
                let what = format!(
                    "node {} has digest {found} before record {seq}, its leader has {expected}",
                    self.node
                );
                if !self.common.atlas.is_unrestricted() {
                    self.common.watch.violated(cx.world_ns(), "one-log", what);
                }
                cx.exit_with(3);
                return false;
            }
            PeerOutput::Wait { .. } => unreachable!("taken by the caller"),
        }
        true
    }

    fn give_up(&self, cx: &mut Context<'_, Said>, why: &dyn std::fmt::Display) -> bool {
        cx.note(|| What::Note(why.to_string()));
        cx.exit_with(3);
        false
    }

    fn rewound(&mut self, cx: &mut Context<'_, Said>, log: Result<Log, OpenError>) -> bool {
        let log = match log {
            Ok(log) => log,
            Err(error) => return self.give_up(cx, &error),
        };
        let Some(Life::Running(process)) = &mut self.life else { return false };
        self.durable = log.ends[log.ends.len() - 1];
        process.digests = log.ends.iter().map(|end| (end.last.0 + 1, first_bytes(&end.digest.0))).collect();
        process.committed = process.committed.min(log.ends[0].last);
        let fact = Fact::Durable { member: process.member, last: self.durable.last };
        self.common.watch.see(cx.world_ns(), &fact);
        process.inbox.push_front(PeerInput::Rewound(Box::new(log)));
        true
    }

    fn snapshot(&mut self, cx: &mut Context<'_, Said>, snapshot: &Snapshot) -> bool {
        let Some(Life::Running(process)) = &self.life else { return false };
        let committed = process.peer.committed();
        if snapshot.next > committed.0 + 1 {
            let what =
                format!("a snapshot before {} is written, and {committed} is committed", snapshot.next);
            self.common.watch.violated(cx.world_ns(), "committed-once", what);
        }
        if let Err(error) = self.journal.write_snapshot(snapshot) {
            return self.give_up(cx, &error);
        }
        self.common.watch.mark(Mark::SnapshotWritten);
        let Some(Life::Running(process)) = &mut self.life else { return false };
        process.inbox.push_back(PeerInput::Answer(Input::SnapshotDurable { next: Seq(snapshot.next) }));
        true
    }

    /// Does what the engine asks of this rank.
    fn carry_out(&mut self, cx: &mut Context<'_, Said>, output: Output) -> bool {
        match &output {
            Output::Exit { error, .. } => {
                let Some(Life::Running(process)) = &self.life else { return false };
                let code = if error.is_some() { 2 } else { 0 };
                let left = process.device.held();
                let fact = Fact::Exited { node: NodeId(self.node), code, left };
                self.common.watch.see(cx.world_ns(), &fact);
                cx.exit_with(code);
                return false;
            }
            Output::Event { event: Event::TierSet { generation, tiers }, .. } => {
                let replica = self.replica.unwrap_or_default();
                let fact = Fact::Entered { replica, generation: *generation, tiers };
                self.common.watch.see(cx.world_ns(), &fact);
                cx.note(|| What::Note(format!("generation {generation}")));
            }
            Output::Event { event: Event::Compared { .. }, .. } => self.common.watch.mark(Mark::Compared),
            Output::Event { event: Event::StepDone { ahead, foreseen, .. }, .. } => {
                if *foreseen > 0 {
                    self.common.watch.mark(Mark::Foreseen);
                }
                if ahead > foreseen {
                    self.common.watch.mark(Mark::ForeseenWrongly);
                }
            }
            Output::Event { event: Event::Preempted { .. }, .. } => self.common.watch.mark(Mark::Preempted),
            Output::Forward(_) if self.luck.befalls(cx, Hazard::DeviceLost).is_some() => {
                // A device that is lost comes back with a new process only.
                cx.exit_with(4);
                return false;
            }
            _ => {}
        }
        self.device(cx, |device, bench| device.obey(bench, output));
        true
    }

    fn tell(&self, cx: &mut Context<'_, Said>, output: Output) {
        let Some(Life::Running(process)) = &self.life else { return };
        let membership = process.peer.membership().expect("a leader tells");
        let fact = Fact::Told { member: process.member, membership, output: &output };
        self.common.watch.see(cx.world_ns(), &fact);
        if let Output::Answered { outcome, .. } = &output {
            if outcome.is_err() {
                self.common.watch.mark(Mark::WishRefused);
            }
            return cx.send(self.common.operator, Said::Tell(Box::new(output)));
        }
        let client = match &output {
            Output::Accepted { id, .. }
            | Output::Token { id, .. }
            | Output::Finish { id, .. }
            | Output::Refuse { id, .. } => process.attached.get(id),
            Output::Switched { outcome: Ok(_), .. } => {
                self.common.watch.mark(Mark::Switched);
                None
            }
            _ => None,
        };
        if let Some(&client) = client {
            cx.send(client, Said::Tell(Box::new(output)));
        }
    }
}
