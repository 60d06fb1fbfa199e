//! The shards of a simulated optimizer at a node: the production keeper, bytes in memory that die with the process, and
//! checkpoints on a simulated disk of their own that outlive it.
//!
//! Any of these disks may be damaged at any time: the versions before are elsewhere, or are computed again.

use super::{KIND_SHIFT, Life, NodeActor, SHARDS};
use crate::cluster::message::Said;
use crate::cluster::watch::Fact;
use crate::disk::{Ending, SimDisk};
use crate::hazard::Hazard;
use crate::mark::Mark;
use crate::model;
use crate::world::Context;
use lite_llm_core::cluster::membership::Member;
use lite_llm_core::cluster::shards::{
    Keeper, KeeperInput, KeeperOutput, ShardMessage, ShardStanding, ShardWord, Stamp,
};
use lite_llm_core::digest::Digest;
use lite_llm_core::disk::{Disk, DiskError};
use lite_llm_core::time::Time;
use std::collections::BTreeMap;

/// Bytes of a shard that go into one message.
const PART_BYTES: usize = 128;
/// The number of the alarm, which no answer reaches.
const ALARM: u64 = 1 << (KIND_SHIFT - 1);
/// Nanoseconds that computing a version takes, at least and by how much more, and that anything else takes.
const COMPUTE_NS: (u64, u64) = (10_000_000, 60_000_000);
const ELSE_NS: u64 = 300_000;
/// Times that a read is tried: one that fails, or gives other bytes, may not do so again.
const READS_MAX: u32 = 8;

/// The disk of a node for checkpoints of shards.
#[derive(Debug)]
pub(super) struct Vault(SimDisk);

/// What of shards dies with the process.
#[derive(Debug)]
pub(super) struct Shards {
    keeper: Keeper,
    memory: BTreeMap<Stamp, Vec<u8>>,
    /// What has come of a shard from another node.
    staging: Vec<u8>,
    /// Answers that are under way, by number.
    answers: BTreeMap<u64, KeeperInput>,
    answered: u64,
    /// When the keeper wants to be asked again: an alarm before it, or after it, means nothing.
    alarm: Option<Time>,
}

impl Shards {
    pub(super) const fn new(member: Member) -> Self {
        Self {
            keeper: Keeper::new(member, super::RETRY_NS),
            memory: BTreeMap::new(),
            staging: Vec::new(),
            answers: BTreeMap::new(),
            answered: 0,
            alarm: None,
        }
    }

    pub(super) fn standing(&self) -> ShardStanding {
        self.keeper.standing()
    }

    fn answer(&mut self, cx: &mut Context<'_, Said>, in_ns: u64, answer: KeeperInput) {
        self.answers.insert(self.answered, answer);
        cx.wake_in(in_ns, SHARDS << KIND_SHIFT | self.answered);
        self.answered += 1;
    }

    /// Has bytes in memory, under the digest that they have.
    fn make(&mut self, shard: u32, version: u64, bytes: Vec<u8>) -> KeeperInput {
        let stamp = Stamp { shard, version, digest: Digest::of(&bytes) };
        self.memory.insert(stamp, bytes);
        KeeperInput::Made(stamp)
    }
}

impl Vault {
    pub(super) const fn new(disk: SimDisk) -> Self {
        Self(disk)
    }

    pub(super) fn die(&mut self) {
        self.0.crash(&mut Ending::Decided);
    }

    fn name(stamp: &Stamp) -> String {
        format!("shard-{}-{}", stamp.shard, stamp.version)
    }

    /// All that is there and whole.
    fn found(&mut self) -> Vec<Stamp> {
        let names = self.0.list().unwrap_or_default();
        let mut found = Vec::new();
        for name in names {
            let numbers = name.strip_prefix("shard-").and_then(|rest| rest.split_once('-'));
            let Some((shard, version)) = numbers else {
                // What a death left half written.
                drop(self.0.remove(&name));
                continue;
            };
            let (shard, version) = (shard.parse().expect("as written"), version.parse().expect("as written"));
            if let Some((digest, _)) = self.read(&name) {
                found.push(Stamp { shard, version, digest });
            }
        }
        found
    }

    /// The bytes of a file, and their digest, if it is the one that was written with them.
    fn read(&mut self, name: &str) -> Option<(Digest, Vec<u8>)> {
        for _ in 0..READS_MAX {
            let len = self.0.len(name).ok()?;
            let mut all = vec![0; usize::try_from(len).ok()?];
            let Ok(read) = self.0.read_at(name, 0, &mut all) else { continue };
            if let Some((digest, bytes)) = all[..read].split_first_chunk::<32>()
                && Digest::of(bytes).0 == *digest
            {
                return Some((Digest(*digest), bytes.to_vec()));
            }
        }
        None
    }

    /// One step of writing a file at a time: the machine may die after each.
    fn write(&mut self, step: u32, stamp: &Stamp, bytes: &[u8]) -> Result<bool, DiskError> {
        match step {
            0 => {
                drop(self.0.remove("new"));
                self.0.create_new("new")?;
            }
            1 => self.0.append("new", &[&stamp.digest.0, bytes].concat())?,
            2 => self.0.sync("new")?,
            3 => self.0.rename("new", &Self::name(stamp))?,
            _ => {
                self.0.sync_dir()?;
                return Ok(true);
            }
        }
        Ok(false)
    }
}

impl NodeActor {
    /// A life begins: what is on disk is read, all of it.
    pub(super) fn find_shards(&mut self, cx: &mut Context<'_, Said>) {
        let Some(Life::Running(process)) = &mut self.life else { return };
        let Some(shards) = &mut process.shards else { return };
        let found = self.vault.found();
        if !found.is_empty() {
            self.common.watch.mark(Mark::ShardsFound);
        }
        shards.answer(cx, ELSE_NS + self.vault.0.take_ns(), KeeperInput::Found(found));
    }

    /// Something that took its time is done.
    pub(super) fn shards_answered(&mut self, cx: &mut Context<'_, Said>, number: u64) {
        let Some(Life::Running(process)) = &mut self.life else { return };
        let Some(shards) = &mut process.shards else { return };
        if number != ALARM {
            if let Some(answer) = shards.answers.remove(&number) {
                self.keep_shards(cx, answer);
            }
        } else if shards.alarm.take_if(|alarm| *alarm <= cx.clock()).is_some() {
            self.keep_shards(cx, KeeperInput::Tick);
        }
    }

    /// Gives the keeper an input and obeys what comes out.
    pub(super) fn keep_shards(&mut self, cx: &mut Context<'_, Said>, input: KeeperInput) {
        let Some(Life::Running(process)) = &mut self.life else { return };
        let Some(shards) = &mut process.shards else { return };
        let member = process.member;
        if let KeeperInput::Made(stamp) = &input {
            self.common.watch.see(cx.world_ns(), &Fact::Made { member, stamp });
        }
        let stored = match &input {
            KeeperInput::Stored(stamp) => std::slice::from_ref(stamp),
            KeeperInput::Found(stamps) => stamps,
            _ => &[],
        };
        for stamp in stored {
            self.common.watch.see(cx.world_ns(), &Fact::Stored { member, stamp });
        }
        shards.keeper.handle(cx.clock(), input);
        loop {
            let Some(Life::Running(process)) = &mut self.life else { return };
            let Some(shards) = &mut process.shards else { return };
            let output = shards.keeper.poll();
            if let KeeperOutput::Wait { until } = output {
                let until = until.map(|until| until.max(cx.clock()));
                if until.is_some() && until != shards.alarm {
                    cx.wake_at(until.unwrap_or_default(), SHARDS << KIND_SHIFT | ALARM);
                }
                shards.alarm = until;
                return;
            }
            if self.luck.befalls(cx, Hazard::Crash).is_some() {
                return cx.exit();
            }
            self.obey_keeper(cx, output);
        }
    }

    fn obey_keeper(&mut self, cx: &mut Context<'_, Said>, output: KeeperOutput) {
        let node = u64::from(self.node);
        let Some(Life::Running(process)) = &mut self.life else { return };
        let Some(shards) = &mut process.shards else { return };
        let member = process.member;
        match output {
            KeeperOutput::Begin { shard } => {
                let made = shards.make(shard, 0, model::first_shard(shard));
                shards.answer(cx, ELSE_NS, made);
            }
            KeeperOutput::Load(stamp) => {
                let read =
                    self.vault.read(&Vault::name(&stamp)).filter(|(digest, _)| *digest == stamp.digest);
                self.common.watch.mark(Mark::ShardLoaded);
                let answer = match read {
                    Some((_, bytes)) => shards.make(stamp.shard, stamp.version, bytes),
                    None => KeeperInput::Damaged(stamp),
                };
                shards.answer(cx, ELSE_NS + self.vault.0.take_ns(), answer);
            }
            KeeperOutput::Compute(stamp) => {
                let more = cx.decisions().ordinary(SHARDS, node, stamp.version) % COMPUTE_NS.1;
                let next = model::next_shard(&shards.memory[&stamp]);
                let made = shards.make(stamp.shard, stamp.version + 1, next);
                shards.answer(cx, COMPUTE_NS.0 + more, made);
            }
            KeeperOutput::Put { offset, bytes } => {
                if offset == 0 {
                    shards.staging.clear();
                }
                assert_eq!(offset, shards.staging.len() as u64, "what comes follows what came");
                shards.staging.extend(bytes);
            }
            KeeperOutput::Check(stamp) => {
                self.common.watch.mark(Mark::ShardFetched);
                let bytes = std::mem::take(&mut shards.staging);
                let answer = if Digest::of(&bytes) == stamp.digest {
                    shards.make(stamp.shard, stamp.version, bytes)
                } else {
                    KeeperInput::Wrong(stamp)
                };
                shards.answer(cx, ELSE_NS, answer);
            }
            KeeperOutput::Serve { to, stamp, offset } => {
                let all = &shards.memory[&stamp];
                let from = usize::try_from(offset).unwrap_or(usize::MAX).min(all.len());
                let bytes = all[from..].iter().take(PART_BYTES).copied().collect();
                let what = ShardWord::Part { stamp, offset, total: all.len() as u64, bytes };
                cx.send(to.node.0, Said::Shard(Box::new(ShardMessage { from: member, to, what })));
            }
            KeeperOutput::Send(message) => cx.send(message.to.node.0, Said::Shard(Box::new(message))),
            KeeperOutput::Store(stamp) => self.store_shard(cx, stamp),
            KeeperOutput::Drop(stamp) => {
                self.common.watch.see(cx.world_ns(), &Fact::Dropped { node: member.node, stamp: &stamp });
                shards.memory.remove(&stamp);
            }
            KeeperOutput::Remove(stamp) => {
                self.common.watch.see(cx.world_ns(), &Fact::Removed { node: member.node, stamp: &stamp });
                // A file that comes back after a crash does no harm.
                drop(self.vault.0.remove(&Vault::name(&stamp)));
            }
            KeeperOutput::Wait { .. } => unreachable!("taken by the caller"),
        }
    }

    fn store_shard(&mut self, cx: &mut Context<'_, Said>, stamp: Stamp) {
        let mut answer = KeeperInput::NotStored(stamp);
        for step in 0.. {
            let Some(Life::Running(process)) = &mut self.life else { return };
            let Some(shards) = &mut process.shards else { return };
            match self.vault.write(step, &stamp, &shards.memory[&stamp]) {
                Ok(false) => {}
                Ok(true) => {
                    answer = KeeperInput::Stored(stamp);
                    break;
                }
                Err(_) => break,
            }
            if self.luck.befalls(cx, Hazard::Crash).is_some() {
                return cx.exit();
            }
        }
        let Some(Life::Running(process)) = &mut self.life else { return };
        let Some(shards) = &mut process.shards else { return };
        shards.answer(cx, ELSE_NS + self.vault.0.take_ns(), answer);
    }
}
