//! The lives of a node: start, beats, suspicion, the fence, what is recorded of an end, and the next start.

use super::config::Restarts;
use super::detector::Detector;
use super::words::{Cause, Ending, Failure, SupervisorEvent, SupervisorOutput};
use super::{Context, State};
use crate::cluster::membership::{Member, NodeId};
use crate::cluster::orders::{Beat, Facts, Orders};
use crate::cluster::shards::ShardOrders;
use crate::ids::{Incarnation, Seq, index, len32};
use crate::plant::{self, Bug};
use crate::time::Time;
use alloc::boxed::Box;
use alloc::collections::VecDeque;
use alloc::{format, string::String};
use serde::{Deserialize, Serialize};

/// Where a node is in its present life.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Life {
    /// Over; the next one begins then.
    Down { until: Time },
    /// Its process was started, and has to beat until then.
    Starting { until: Time },
    /// It beats.
    Up,
    /// Its process is to be ended, and may still run.
    Fencing { cause: Cause },
    /// Over; what is left of its log is being captured.
    Capturing,
    /// Over, and the operator's.
    GivenUp,
    /// Over after a drain.
    #[default]
    Stopped,
}

/// What the supervisor knows of a node.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Node {
    /// The newest life that was ever begun.
    pub(super) incarnation: Incarnation,
    pub(super) life: Life,
    pub(super) detector: Detector,
    /// The newest beat of this life.
    pub(super) beat: Option<Beat>,
    /// How far its log was said to reach, in any life, since it was in an epoch that became active.
    pub(super) reached: Seq,
    /// It was suspected in this life, and heard again.
    wronged: bool,
    /// Until when it may believe to hold a lease, by the supervisor's clock.
    pub(super) lease_until: Time,
    /// The replica that it has a seat in, or had last.
    pub(super) home: Option<u32>,
    began: Time,
    /// Failures in a row.
    failures: u32,
    /// Restarts within the window.
    restarts: VecDeque<Time>,
    /// The record at which the last life panicked.
    panicked: Option<Seq>,
    /// The end of the last life that was recorded, or is being captured.
    pub(super) failure: Option<Failure>,
    /// Why there is to be no further life, if so.
    pub(super) hopeless: Option<String>,
    /// The operator wishes the next life: it costs nothing of the budget.
    wished: bool,
    /// What it was told of its shards in this life.
    pub(super) shards: Option<Box<ShardOrders>>,
}

impl Node {
    pub(super) const fn new(now: Time) -> Self {
        Self {
            incarnation: Incarnation(0),
            life: Life::Down { until: now },
            detector: Detector::NEW,
            beat: None,
            reached: Seq(0),
            wronged: false,
            lease_until: Time(0),
            home: None,
            began: now,
            failures: 0,
            restarts: VecDeque::new(),
            panicked: None,
            failure: None,
            hopeless: None,
            wished: false,
            shards: None,
        }
    }

    /// A new run after all was over.
    pub(super) fn reopen(&mut self, now: Time) {
        self.life = Life::Down { until: now };
        self.panicked = None;
        self.failures = 0;
        self.restarts.clear();
        (self.hopeless, self.wished) = (None, false);
    }

    /// Restarts that count within a window.
    pub(super) fn restarts_within(&self, now: Time, window_ns: u64) -> u32 {
        len32(self.restarts.iter().filter(|at| at.after_ns(window_ns) > now).count())
    }

    pub(super) const fn member(&self, node: NodeId) -> Member {
        Member { node, incarnation: self.incarnation }
    }

    /// Whether a process of this node may exist.
    pub(super) const fn may_run(&self) -> bool {
        matches!(self.life, Life::Starting { .. } | Life::Up | Life::Fencing { .. })
    }

    /// Whether nothing will happen to it by itself any more.
    pub(super) const fn is_over(&self) -> bool {
        matches!(self.life, Life::GivenUp | Life::Stopped)
    }
}

impl State {
    /// A node tells how it stands: it hears how things stand.
    pub(super) fn beat(&mut self, cx: &mut Context<'_>, beat: Beat) {
        let member = beat.member;
        let known = self.nodes.get(index(member.node.0)).map(|node| node.incarnation);
        if known != Some(member.incarnation) {
            let reason = match known {
                None => format!("{} is none of this cluster's {} nodes", member.node, self.nodes.len()),
                Some(newest) => format!("{} has begun incarnation {newest}; this one is over", member.node),
            };
            return self.refuse(cx, member, reason);
        }
        let wrong = differs(member, &self.config.facts, &beat.facts);
        let node = &mut self.nodes[index(member.node.0)];
        if node.beat.as_ref().is_some_and(|last| beat.sent <= last.sent) {
            return;
        }
        match &node.life {
            Life::Starting { .. } => {
                (node.life, node.began) = (Life::Up, cx.now);
                node.detector.begin(cx.now);
            }
            Life::Up => {}
            Life::Fencing { cause } => {
                if matches!(cause, Cause::Suspected(_)) && !core::mem::replace(&mut node.wronged, true) {
                    node.detector.wronged();
                }
                let reason = if *cause == Cause::Drained {
                    format!("{member} is needed no more: the cluster has drained")
                } else {
                    format!("{member} is to end ({cause:?}) and come back in its next incarnation")
                };
                return self.refuse(cx, member, reason);
            }
            Life::Down { .. } | Life::Capturing | Life::GivenUp | Life::Stopped => {
                return self.refuse(cx, member, format!("{member} has ended, it was said"));
            }
        }
        if let Some(reason) = wrong {
            self.refuse(cx, member, reason.clone());
            return self.end(cx, member.node, Cause::Refused(reason));
        }
        let membership = node.home.and_then(|replica| self.replicas[index(replica)].membership.as_ref());
        let epoch = membership.filter(|membership| membership.rank_of(member).is_some()).map(|m| m.epoch);
        node.detector.heard(cx.now, &beat, epoch.is_none_or(|epoch| beat.epoch == epoch));
        node.reached = node.reached.max(beat.log.last);
        node.beat = Some(beat);
        self.take_stock(cx, member);
        self.tell(cx, member.node, true);
    }

    /// It may take no part.
    fn refuse(&mut self, cx: &mut Context<'_>, to: Member, reason: String) {
        let refused = Some(reason);
        let orders =
            Orders { to, membership: None, active: false, lease: None, drain: None, refused, shards: None }
                .into();
        cx.say(SupervisorOutput::Orders { orders, after: self.decided });
    }

    /// Fences a node: whatever its process believes, it is to end.
    pub(super) fn end(&mut self, cx: &mut Context<'_>, id: NodeId, cause: Cause) {
        let node = &mut self.nodes[index(id.0)];
        let member = node.member(id);
        node.life = Life::Fencing { cause: cause.clone() };
        self.decided = cx.seq;
        cx.say(SupervisorOutput::Kill { member, cause, after: cx.seq });
    }

    /// Ends what was silent, or stuck, or never heard, for too long.
    pub(super) fn suspect(&mut self, cx: &mut Context<'_>) {
        for id in self.ids() {
            let node = &self.nodes[index(id.0)];
            let cause = match node.life {
                Life::Starting { until } => (cx.now >= until).then_some(Cause::NeverHeard),
                Life::Up => node.detector.suspicion(cx.now, &self.config.patience).map(Cause::Suspected),
                Life::Down { .. }
                | Life::Fencing { .. }
                | Life::Capturing
                | Life::GivenUp
                | Life::Stopped => None,
            };
            if let Some(cause) = cause {
                self.end(cx, id, cause);
            }
        }
    }

    /// A process has ended, for certain.
    pub(super) fn ended(&mut self, cx: &mut Context<'_>, member: Member, ending: Ending) {
        let id = member.node;
        let Some(node) = self.nodes.get_mut(index(id.0)) else { return };
        if node.incarnation != member.incarnation || !node.may_run() {
            return;
        }
        self.decided = cx.seq;
        if self.drain.is_some() && (ending == Ending::Clean || self.is_finished(id)) {
            self.nodes[index(id.0)].life = Life::Stopped;
            if let Some(replica) = self.nodes[index(id.0)].home {
                // A member stops by itself only when all is finished; its last beat may be lost.
                self.drained(cx, replica);
            }
            return;
        }
        let node = &mut self.nodes[index(id.0)];
        let panicked = match ending {
            Ending::Panic { record } => Some(record),
            Ending::Clean | Ending::Code(_) | Ending::Signal(_) | Ending::Unknown => None,
        };
        let life = core::mem::replace(&mut node.life, Life::Capturing);
        let cause = if let Life::Fencing { cause } = life { cause } else { Cause::Ended(ending) };
        node.lease_until = Time(0);
        let (epoch, log) = node.beat.as_ref().map_or_else(Default::default, |beat| (beat.epoch, beat.log));
        let failure = Failure { member, at: cx.now, cause, epoch, log };
        let again = panicked.filter(|record| node.panicked == Some(*record));
        node.panicked = panicked;
        if cx.now.0.saturating_sub(node.began.0) >= self.config.restarts.stable_ns {
            node.failures = 0;
        }
        let hopeless = match (&failure.cause, again) {
            (Cause::Refused(reason), _) => Some(reason.clone()),
            (_, Some(record)) => {
                Some(format!("it panicked at record {record} twice: the next life would do the same"))
            }
            _ => None,
        };
        (node.failure, node.hopeless) = (Some(failure.clone()), hopeless);
        cx.event(SupervisorEvent::Failed(failure.clone()));
        if plant::is(Bug::RestartUnrecorded) {
            return self.captured(cx, member, Ok(None));
        }
        cx.say(SupervisorOutput::Capture { failure, after: cx.seq });
    }

    /// What the life left is safe: the next one may come, if the budget allows.
    pub(super) fn captured(
        &mut self,
        cx: &mut Context<'_>,
        member: Member,
        tail: Result<Option<Seq>, String>,
    ) {
        let Restarts { most, window_ns, .. } = self.config.restarts;
        let Some(node) = self.nodes.get_mut(index(member.node.0)) else { return };
        if node.incarnation != member.incarnation || node.life != Life::Capturing {
            return;
        }
        cx.event(SupervisorEvent::Captured { member, tail });
        self.decided = cx.seq;
        if node.wished {
            node.life = Life::Down { until: cx.now };
            return;
        }
        node.restarts.retain(|at| at.after_ns(window_ns) > cx.now);
        let spent = len32(node.restarts.len()) >= most;
        let reason = node
            .hopeless
            .take()
            .or_else(|| spent.then(|| format!("it was started {most} times again (restarts.most)")));
        if let Some(reason) = reason {
            node.life = Life::GivenUp;
            let reason = format!("{reason}; mend it, then restart the node");
            node.hopeless = Some(reason.clone());
            return cx.event(SupervisorEvent::GaveUp { node: member.node, reason });
        }
        node.life = Life::Down { until: cx.now.after_ns(self.config.restarts.pause_ns(node.failures)) };
        node.failures += 1;
    }

    /// Begins the lives whose time has come.
    pub(super) fn start(&mut self, cx: &mut Context<'_>) {
        for id in self.ids() {
            let finished = self.drain.is_some() && self.is_finished(id);
            let node = &mut self.nodes[index(id.0)];
            if !matches!(node.life, Life::Down { until } if until <= cx.now) {
                continue;
            }
            self.decided = cx.seq;
            if finished {
                node.life = Life::Stopped;
                continue;
            }
            if !core::mem::take(&mut node.wished) && node.incarnation > Incarnation(0) {
                node.restarts.push_back(cx.now);
            }
            let again = plant::is(Bug::LifeReused) && node.incarnation > Incarnation(0);
            node.incarnation.0 += u64::from(!again);
            (node.beat, node.wronged, node.shards) = (None, false, None);
            node.life = Life::Starting { until: cx.now.after_ns(self.config.patience.starting_ns) };
            cx.say(SupervisorOutput::Start { member: node.member(id), after: cx.seq });
        }
    }

    /// The operator wishes a new life: the present one ends, if it has not, and whatever spoke against another is mended.
    pub(super) fn restart(&mut self, cx: &mut Context<'_>, id: NodeId) {
        let Some(node) = self.nodes.get_mut(index(id.0)) else { return };
        if matches!(node.life, Life::Stopped | Life::Fencing { cause: Cause::Drained }) {
            return;
        }
        node.restarts.clear();
        (node.failures, node.panicked, node.hopeless, node.wished) = (0, None, None, true);
        match node.life {
            Life::Down { .. } | Life::GivenUp => {
                node.life = Life::Down { until: cx.now };
                self.decided = cx.seq;
            }
            Life::Starting { .. } | Life::Up => self.end(cx, id, Cause::Operator),
            // It is ending: the next life comes as soon as the end is recorded.
            Life::Fencing { .. } | Life::Capturing | Life::Stopped => {}
        }
    }

    /// The supervisor itself has a new life: what it asked for may not have been done, and whom it heard it heard long ago.
    pub(super) fn take_up_nodes(&mut self, cx: &mut Context<'_>) {
        for id in self.ids() {
            let node = &mut self.nodes[index(id.0)];
            let member = node.member(id);
            match node.life.clone() {
                Life::Starting { .. } => {
                    node.life = Life::Starting { until: cx.now.after_ns(self.config.patience.starting_ns) };
                    cx.say(SupervisorOutput::Start { member, after: cx.seq });
                }
                Life::Up => node.detector.begin(cx.now),
                Life::Fencing { cause } => cx.say(SupervisorOutput::Kill { member, cause, after: cx.seq }),
                Life::Capturing => {
                    let failure = node.failure.clone().expect("an end that is captured is recorded");
                    cx.say(SupervisorOutput::Capture { failure, after: cx.seq });
                }
                Life::Down { .. } | Life::GivenUp | Life::Stopped => {}
            }
        }
    }

    /// Whether the supervisor was so late that what it waited for may wait in its inbox: then it waits once more.
    pub(super) fn forgive(&mut self, now: Time) {
        let patience = self.config.patience;
        let Some(due) = self.nodes_until() else { return };
        let late = now.0.saturating_sub(due.0);
        if late <= patience.silence_min_ns / 2 {
            return;
        }
        let grace = late.saturating_add(patience.silence_min_ns);
        for node in &mut self.nodes {
            node.detector.forgive(grace);
            if let Life::Starting { until } = &mut node.life {
                *until = until.after_ns(grace);
            }
        }
    }

    /// When a node is to be looked at again.
    pub(super) fn nodes_until(&self) -> Option<Time> {
        let until = |node: &Node| match node.life {
            Life::Down { until } | Life::Starting { until } => Some(until),
            Life::Up => Some(node.detector.until(&self.config.patience)),
            Life::Fencing { .. } | Life::Capturing | Life::GivenUp | Life::Stopped => None,
        };
        self.nodes.iter().filter_map(until).min()
    }

    pub(super) fn ids(&self) -> impl Iterator<Item = NodeId> + use<> {
        (0..len32(self.nodes.len())).map(NodeId)
    }
}

/// What a node says of itself that the cluster does not have.
fn differs(member: Member, ours: &Facts, theirs: &Facts) -> Option<String> {
    let what = if theirs.contract != ours.contract {
        format!(
            "numeric contract {}, and the cluster {}: give it the same version",
            theirs.contract, ours.contract
        )
    } else if theirs.logic != ours.logic {
        format!("logic version {}, and the cluster {}: give it the same version", theirs.logic, ours.logic)
    } else if theirs.model != ours.model {
        format!("model {}, and the cluster {}: give it the same checkpoint", theirs.model, ours.model)
    } else if theirs.config != ours.config {
        format!("configuration {}, and the cluster {}: give it the same", theirs.config, ours.config)
    } else {
        return None;
    };
    Some(format!("{member} has {what}"))
}
