//! What a run is excused by: what it needs is really gone, by the disks themselves, and whoever can know it says so.

use super::cast::Cast;
use super::phases::Cluster;
use crate::cluster::check::first_bytes;
use crate::cluster::node::NodeActor;
use lite_llm_core::cluster::supervisor::{ReplicaStanding, Supervisor};
use lite_llm_core::ids::Seq;

impl Cluster {
    /// Why nothing goes on, if damage took what is needed for that: the supervisor's journal, which is on one disk, or
    /// a replica's, from every disk that is known to have had it.
    pub(super) fn halted(&self) -> Option<String> {
        let supervisor = self.supervisor();
        let damaged = self.common.atlas.is_damaged(self.setup.nodes);
        if let Some(error) = supervisor.unreadable().filter(|_| damaged) {
            return Some(format!("the supervisor's disk was damaged, and it says: {error}"));
        }
        let (view, now) = supervisor.supervisor().map(|of: &Supervisor| (of.view(), of.now()))?;
        (0..).zip(view.replicas(now)).find_map(|(replica, view)| {
            let ReplicaStanding::WaitsForDisks(nodes) = view.standing else { return None };
            let held = self.common.watch.committed(replica);
            // A copy that came by way of an epoch that never began may be there, but nobody can know that it is all.
            let on_none = |(seq, digest): (Seq, u64)| {
                let kept = self.seated(replica).filter(|(node, _)| !self.common.atlas.is_lost_to(*node, seq.0));
                !{ kept }.any(|(_, node)| has(node, seq, digest))
            };
            let gone = self.common.atlas.is_gone(replica as usize) && held.is_none_or(on_none);
            let last = held.map_or(Seq(0), |(seq, _)| seq);
            gone.then(|| {
                format!(
                    "every journal of replica {replica} was damaged, none of them reaches record {last} any more, and \
                     the supervisor waits for the disks of {nodes:?}"
                )
            })
        })
    }

    /// Why a log goes on differently than it was told, if damage took what was told: the end of the log, from every
    /// disk that had it. Such a disk cannot be told from one whose machine died in the middle of a write.
    pub(super) fn taken_from_all(&self) -> Option<String> {
        (0..self.setup.topology.data).find_map(|replica| {
            let (Seq(seq), _) = self.common.watch.committed(replica)?;
            self.common.atlas.is_lost(replica as usize, seq).then(|| {
                format!("record {seq} of replica {replica} was told, and damage took it from all disks that had it")
            })
        })
    }

    /// The nodes of the last epoch that was active: nobody else is known to have its log.
    fn seated(&self, replica: u32) -> impl Iterator<Item = (u32, &NodeActor)> {
        let nodes = self.common.atlas.group(replica as usize).into_iter();
        nodes.filter_map(|node| match &self.world.actors()[node as usize] {
            Cast::Node(actor) => Some((node, &**actor)),
            Cast::Supervisor(_) | Cast::Clients(_) | Cast::Operator(_) => None,
        })
    }
}

/// Whether a record, known by the digest before it, is on a node's disk and can be read.
fn has(node: &NodeActor, seq: Seq, digest: u64) -> bool {
    node.look().is_ok_and(|found| {
        let next = found.snapshot.map_or(1, |snapshot| snapshot.next);
        let mut records = found.records.iter().filter(|record| record.seq == seq.0);
        next > seq.0 || records.any(|record| first_bytes(&record.digest) == digest)
    })
}
