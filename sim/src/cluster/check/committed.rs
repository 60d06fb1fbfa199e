//! There is one committed log, it is on the disk of every member of its epoch, and nothing else is ever told.

use super::Checker;
use crate::cluster::watch::Fact;
use lite_llm_core::cluster::membership::{Epoch, Member, NodeId};
use lite_llm_core::ids::Seq;
use lite_llm_core::output::Output;
use lite_llm_core::topology::Topology;
use std::collections::BTreeMap;

/// Committed records never change, recovered logs agree with them, and what is told is durable on all members.
#[derive(Debug)]
pub struct CommittedOnce {
    /// By replica: the digest before each record, as far as anybody knew it to be committed.
    logs: Vec<Vec<Option<u64>>>,
    /// By node: the life and its durable end.
    durable: BTreeMap<NodeId, (Member, Seq)>,
    /// The last end of lives that are over.
    over: BTreeMap<Member, Seq>,
}

impl CommittedOnce {
    /// For the replicas of a topology.
    #[must_use]
    pub fn new(topology: &Topology) -> Self {
        let logs = (0..topology.data).map(|_| Vec::new()).collect();
        Self { logs, durable: BTreeMap::new(), over: BTreeMap::new() }
    }

    fn agree(&mut self, replica: u32, seq: u64, digest: u64, who: Member) -> Result<(), String> {
        let (log, at) = (&mut self.logs[replica as usize], usize::try_from(seq).expect("few records"));
        if log.len() <= at {
            log.resize(at + 1, None);
        }
        let known = *log[at].get_or_insert(digest);
        if known == digest {
            return Ok(());
        }
        Err(format!(
            "{who} has digest {digest:016x} before record {seq} of replica {replica}, which was committed with {known:016x}"
        ))
    }

    /// Whether a record is on the disk of a member: in its present life, or when a later one took its place.
    fn has(&self, member: Member, seq: Seq) -> bool {
        let now = self.durable.get(&member.node);
        now.is_some_and(|(life, last)| *life == member && *last >= seq)
            || self.over.get(&member).is_some_and(|last| *last >= seq)
    }
}

/// What has to be committed before it is told.
const fn rests_on(output: &Output) -> Option<Seq> {
    match output {
        Output::Ready { after }
        | Output::Accepted { after, .. }
        | Output::Token { after, .. }
        | Output::Finish { after, .. }
        | Output::Refuse { after, .. }
        | Output::Switched { after, .. }
        | Output::Answered { after, .. }
        | Output::Modified { after, .. } => Some(*after),
        _ => None,
    }
}

impl Checker for CommittedOnce {
    fn name(&self) -> &'static str {
        "committed-once"
    }

    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
        match *fact {
            Fact::Durable { member, last } => {
                let before = self.durable.insert(member.node, (member, last));
                if let Some((life, last)) = before.filter(|(life, _)| *life != member) {
                    self.over.insert(life, last);
                }
                Ok(())
            }
            Fact::Committed { member, replica, seq, digest } => self.agree(replica, seq.0, digest, member),
            Fact::Told { member, membership, output } => {
                let Some(after) = rests_on(output) else { return Ok(()) };
                let lacks = membership.members.iter().find(|other| !self.has(**other, after));
                lacks.map_or(Ok(()), |other| {
                    let Epoch(epoch) = membership.epoch;
                    Err(format!(
                        "{member} tells {output:?} in epoch {epoch}, but record {after} is not durable on {other}"
                    ))
                })
            }
            Fact::Took { .. }
            | Fact::Entered { .. }
            | Fact::Made { .. }
            | Fact::Dropped { .. }
            | Fact::Stored { .. }
            | Fact::Removed { .. }
            | Fact::Event(_)
            | Fact::Exited { .. }
            | Fact::Queued { .. } => Ok(()),
        }
    }
}

/// A digest's first bytes: enough to tell two apart.
#[must_use]
pub fn first_bytes(digest: &[u8; 32]) -> u64 {
    let (first, _) = digest.split_first_chunk().expect("32 bytes");
    u64::from_le_bytes(*first)
}

#[cfg(test)]
mod tests {
    use super::*;
    use lite_llm_core::cluster::membership::Membership;
    use lite_llm_core::ids::Incarnation;

    fn member(node: u32, life: u64) -> Member {
        Member { node: NodeId(node), incarnation: Incarnation(life) }
    }

    #[test]
    fn what_is_told_is_on_every_disk_or_was() {
        let mut checker = CommittedOnce::new(&Topology::SINGLE);
        let membership =
            Membership { replica: 0, epoch: Epoch(1), members: vec![member(0, 1), member(1, 1)], leader: 0 };
        let told = |checker: &mut CommittedOnce| {
            let output = Output::Ready { after: Seq(5) };
            checker.see(&Fact::Told { member: member(0, 1), membership: &membership, output: &output })
        };
        let durable = |checker: &mut CommittedOnce, member, last| {
            checker.see(&Fact::Durable { member, last: Seq(last) }).expect("it is only noted");
        };
        durable(&mut checker, member(0, 1), 9);
        durable(&mut checker, member(1, 1), 4);
        assert!(told(&mut checker).expect_err("node 1 lacks it").contains("node 1"));
        durable(&mut checker, member(1, 1), 5);
        durable(&mut checker, member(1, 2), 0);
        assert_eq!(told(&mut checker), Ok(()), "its former life had it");
    }

    #[test]
    fn a_committed_record_never_changes() {
        let mut checker = CommittedOnce::new(&Topology::SINGLE);
        let mut committed = |node, digest| {
            checker.see(&Fact::Committed { member: member(node, 1), replica: 0, seq: Seq(3), digest })
        };
        assert_eq!((committed(0, 7), committed(1, 7)), (Ok(()), Ok(())));
        assert!(committed(1, 8).is_err());
    }
}
