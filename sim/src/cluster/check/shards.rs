//! Shards of an optimizer: every copy is what its version says, and no version counts before everybody has it.

use super::Checker;
use crate::atlas::Atlas;
use crate::cluster::watch::Fact;
use crate::model;
use lite_llm_core::cluster::membership::{Member, NodeId};
use lite_llm_core::cluster::shards::Stamp;
use lite_llm_core::cluster::supervisor::SupervisorEvent;
use lite_llm_core::digest::Digest;
use lite_llm_core::topology::Topology;
use std::collections::{BTreeMap, BTreeSet};

/// Which nodes have, or had, which shard of which version.
type Copies = BTreeMap<(u32, u64), BTreeSet<NodeId>>;

/// See the module.
#[derive(Debug)]
pub struct ShardsOne {
    topology: Topology,
    /// Which disks were damaged, by node.
    vaults: Atlas,
    /// The bytes of each shard in its newest known version, and the digests of all versions up to it.
    known: Vec<(Vec<u8>, Vec<Digest>)>,
    made: Copies,
    stored: Copies,
    /// The newest checkpoint.
    sealed: u64,
    given_up: BTreeSet<NodeId>,
}

impl ShardsOne {
    /// A rule for the shards of a topology, with the atlas of the disks that they are on.
    #[must_use]
    pub fn new(topology: &Topology, vaults: Atlas) -> Self {
        let first = |shard| {
            let bytes = model::first_shard(shard);
            let digest = Digest::of(&bytes);
            (bytes, vec![digest])
        };
        Self {
            topology: *topology,
            vaults,
            known: (0..topology.ranks()).map(first).collect(),
            made: Copies::new(),
            stored: Copies::new(),
            sealed: 0,
            given_up: BTreeSet::new(),
        }
    }

    fn digest(&mut self, shard: u32, version: u64) -> Digest {
        let (bytes, digests) = &mut self.known[shard as usize];
        while digests.len() as u64 <= version {
            *bytes = model::next_shard(bytes);
            digests.push(Digest::of(bytes));
        }
        digests[usize::try_from(version).expect("few")]
    }

    fn copy(&mut self, what: &str, member: Member, stamp: &Stamp) -> Result<(), String> {
        let Stamp { shard, version, digest } = *stamp;
        if digest == self.digest(shard, version) {
            return Ok(());
        }
        Err(format!("{member} has {what} shard {shard} in version {version}, and its bytes are others"))
    }

    /// Whether each shard of a version is with as many nodes as there are replicas.
    fn is_everywhere(&self, copies: &Copies, version: u64) -> bool {
        (0..self.topology.ranks()).all(|shard| {
            copies.get(&(shard, version)).is_some_and(|nodes| nodes.len() >= self.topology.data as usize)
        })
    }

    /// Whether nobody can read what is on a node's disk.
    fn is_lost(&self, node: NodeId) -> bool {
        self.vaults.is_damaged(node.0) || self.given_up.contains(&node)
    }

    /// A copy goes from a disk. Of a checkpoint the last that can be read has to stay, and counts as if it were there.
    fn removed(&mut self, node: NodeId, stamp: &Stamp) {
        let key = (stamp.shard, stamp.version);
        let Some(nodes) = self.stored.get(&key) else { return };
        let is_last = !nodes.iter().any(|other| *other != node && !self.is_lost(*other));
        if stamp.version == self.sealed && is_last {
            return;
        }
        self.stored.entry(key).or_default().remove(&node);
    }

    /// A supervisor that dies may have said less than it decided: each event has to be right by itself.
    fn event(&mut self, event: &SupervisorEvent) -> Result<(), String> {
        match event {
            SupervisorEvent::Trained { version } if !self.is_everywhere(&self.made, *version) => {
                return Err(format!("version {version} counts, and is not everywhere"));
            }
            SupervisorEvent::Sealed { version } if !self.is_everywhere(&self.stored, *version) => {
                return Err(format!("version {version} is a checkpoint, and not on every disk"));
            }
            SupervisorEvent::Restored { version, sealed, .. } if version < sealed => {
                let lost = |shard| {
                    let nodes = self.stored.get(&(shard, *sealed));
                    nodes.is_some_and(|nodes| nodes.iter().all(|node| self.is_lost(*node)))
                };
                if !(0..self.topology.ranks()).any(lost) {
                    return Err(format!(
                        "back to {version}, and {sealed} is whole on disks that can be read"
                    ));
                }
                self.sealed = *version;
            }
            SupervisorEvent::Sealed { version } => self.sealed = *version,
            SupervisorEvent::GaveUp { node, .. } => {
                self.given_up.insert(*node);
            }
            SupervisorEvent::ShardsDiffer { shard, version } => {
                return Err(format!("shard {shard} of version {version} has different bytes"));
            }
            _ => {}
        }
        Ok(())
    }
}

impl Checker for ShardsOne {
    fn name(&self) -> &'static str {
        "shards"
    }

    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Made { member, stamp } => {
                self.made.entry((stamp.shard, stamp.version)).or_default().insert(member.node);
                self.copy("made", *member, stamp)
            }
            Fact::Dropped { node, stamp } => {
                self.made.entry((stamp.shard, stamp.version)).or_default().remove(node);
                Ok(())
            }
            Fact::Stored { member, stamp } => {
                self.stored.entry((stamp.shard, stamp.version)).or_default().insert(member.node);
                self.copy("stored", *member, stamp)
            }
            Fact::Removed { node, stamp } => {
                self.removed(*node, stamp);
                Ok(())
            }
            Fact::Event(event) => self.event(event),
            _ => Ok(()),
        }
    }
}
