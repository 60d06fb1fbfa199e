//! How a node begins a life: its journal is opened, and what was durable has to be there again.

use super::device::Device;
use super::shards::Shards;
use super::{KIND_SHIFT, Life, NodeActor, OPEN, OPEN_NS, OPENINGS_MAX, Process, RETRY_NS, SLOW_START_NS};
use crate::chronicle::What;
use crate::cluster::check::first_bytes;
use crate::cluster::journal::OpenError;
use crate::cluster::message::Said;
use crate::cluster::watch::Fact;
use crate::hazard::Hazard;
use crate::mark::Mark;
use crate::world::Context;
use lite_llm_core::cluster::membership::{Epoch, Member, NodeId};
use lite_llm_core::cluster::orders::{Facts, LogEnd};
use lite_llm_core::cluster::peer::{Log, Peer, PeerConfig};
use lite_llm_core::ids::{Incarnation, Seq};
use lite_llm_core::journal::{JournalError, Recovered};
use std::collections::{BTreeMap, VecDeque};

impl NodeActor {
    pub(super) fn start(&mut self, cx: &mut Context<'_, Said>, incarnation: u64) {
        if self.crash_loop > 0 {
            self.crash_loop -= 1;
            return cx.exit();
        }
        if let Some(value) = self.luck.befalls(cx, Hazard::CrashLoop) {
            self.crash_loop = value % 5;
            return cx.exit();
        }
        self.life = Some(Life::Opening { incarnation });
        let slow = self.luck.befalls(cx, Hazard::SlowStart).map_or(0, |value| value % SLOW_START_NS);
        cx.wake_in(OPEN_NS + slow, OPEN << KIND_SHIFT);
    }

    pub(super) fn open(&mut self, cx: &mut Context<'_, Said>, incarnation: u64) {
        // What is damaged from now on, while the journal is opened too, its reading may not have seen.
        let damages = self.common.atlas.damages(self.node);
        let opened = self.journal.open(incarnation);
        if self.luck.befalls(cx, Hazard::CrashRecovering).is_some() {
            return cx.exit();
        }
        match opened {
            Ok((log, found)) => self.begin(cx, incarnation, log, &found, damages),
            Err(error) => self.unopened(cx, &error),
        }
    }

    /// The journal cannot be read. What ails the disk may pass; if it is damage, an operator replaces it.
    fn unopened(&mut self, cx: &mut Context<'_, Said>, error: &OpenError) {
        self.failures += 1;
        cx.note(|| What::Note(format!("journal: {error}")));
        let damaged = self.common.atlas.is_damaged(self.node);
        let transient = matches!(error, OpenError::Journal(JournalError::Disk(_)));
        if !transient && !damaged {
            let what = format!("node {} cannot read its journal, and nothing damaged it: {error}", self.node);
            self.common.watch.violated(cx.world_ns(), "durable", what);
        }
        if damaged && (!transient || self.failures >= OPENINGS_MAX) {
            self.common.watch.mark(Mark::DiskReplaced);
            cx.note(|| What::Note("the disk is replaced".into()));
            self.journal.die(None);
            self.journal.replace_disk();
            self.common.atlas.lose(self.node, 1);
            (self.durable, self.failures) = (LogEnd::default(), 0);
        } else {
            self.common.watch.mark(Mark::OpenFailed);
        }
        cx.exit_with(3);
    }

    fn begin(
        &mut self,
        cx: &mut Context<'_, Said>,
        incarnation: u64,
        log: Log,
        found: &Recovered,
        damages: u64,
    ) {
        self.failures = 0;
        self.check_recovered(cx, &log);
        let common = &self.common;
        let member = Member { node: NodeId(self.node), incarnation: Incarnation(incarnation) };
        let digests = log.ends.iter().map(|end| (end.last.0 + 1, first_bytes(&end.digest.0))).collect();
        if found.torn {
            common.watch.mark(Mark::Torn);
        }
        if log.ends.len() > 1 {
            common.watch.mark(Mark::Recovered);
        }
        if log.ends[0].last > Seq(0) {
            common.watch.mark(Mark::RecoveredSnapshot);
        }
        let last = Seq(log.engine.next_seq().0 - 1);
        self.durable = log.ends[log.ends.len() - 1];
        common.watch.see(cx.world_ns(), &Fact::Durable { member, last });
        let logic = common.installed[self.node as usize].get();
        let settings = PeerConfig {
            member,
            facts: Facts { logic, ..common.facts.clone() },
            config: common.config.clone(),
            torn: found.torn,
            began: Incarnation(found.began),
            entropy: cx.decisions().ordinary(7, u64::from(self.node), incarnation),
            retry_ns: RETRY_NS,
            unconfirmed_max: 1000,
            drift_per_mille: common.drift_per_mille,
        };
        let committed = log.ends[0].last;
        self.life = Some(Life::Running(Box::new(Process {
            member,
            peer: Peer::new(settings, log),
            device: Device::new(common.config.topology, 0, common.real),
            shards: common.trains.then(|| Shards::new(member)),
            inbox: VecDeque::new(),
            flushing: false,
            dirty: false,
            alarm: None,
            attached: BTreeMap::new(),
            digests,
            committed,
            active: Epoch(0),
            damages,
        })));
        self.find_shards(cx);
        self.beat(cx);
    }

    /// What was durable is there again, with the same digest, unless damage took it.
    fn check_recovered(&self, cx: &Context<'_, Said>, log: &Log) {
        let found = log.ends.iter().find(|end| end.last == self.durable.last);
        let last = log.ends[log.ends.len() - 1].last;
        let what = match found {
            Some(end) if end.digest == self.durable.digest || self.durable == LogEnd::default() => return,
            Some(_) => "has another digest than before",
            None if log.ends[0].last > self.durable.last => return,
            None => "is lost",
        };
        if self.common.atlas.is_damaged(self.node) {
            return self.common.atlas.lose(self.node, last.0 + 1);
        }
        let what = format!(
            "record {} of node {}, durable, {what}: {last} is the last",
            self.durable.last, self.node
        );
        self.common.watch.violated(cx.world_ns(), "durable", what);
    }
}
