//! A keeper of shards that hears anything: orders that contradict each other, bytes of shards that nobody asked for.

use lite_llm_core::cluster::membership::Member;
use lite_llm_core::cluster::shards::{Keeper, KeeperInput, KeeperOutput, Stamp};
use lite_llm_core::digest::Digest;
use lite_llm_core::time::Time;
use std::collections::{BTreeSet, VecDeque};

/// Words that one input may hold, and answers that one word may ask for.
const WORDS_MAX: usize = 64;
const ANSWERS_MAX: usize = 1000;

/// Has a keeper hear the words in some bytes; its driver does what it asks for, and can do it.
///
/// # Panics
/// If it asks for what it does not have, or never has enough.
pub fn anything_kept(bytes: &[u8]) {
    let mut keeper = Keeper::new(Member::default(), 100);
    let (mut now, mut rest) = (Time(1), bytes);
    let (mut memory, mut staged) = (BTreeSet::new(), 0);
    for _ in 0..WORDS_MAX {
        let Some((word, after)) = word(rest) else { break };
        rest = after;
        now = now.after_ns(60);
        let mut inputs = VecDeque::from([word]);
        let mut answers = 0;
        while let Some(input) = inputs.pop_front() {
            answers += 1;
            assert!(answers < ANSWERS_MAX, "it never has enough");
            keeper.handle(now, input);
            loop {
                match keeper.poll() {
                    KeeperOutput::Wait { .. } => break,
                    KeeperOutput::Begin { shard } => {
                        inputs.push_back(made(
                            &mut memory,
                            Stamp { shard, version: 0, digest: Digest::default() },
                        ));
                    }
                    KeeperOutput::Load(stamp) | KeeperOutput::Check(stamp) => {
                        staged = 0;
                        inputs.push_back(made(&mut memory, stamp));
                    }
                    KeeperOutput::Compute(stamp) => {
                        assert!(memory.contains(&stamp), "only what is there can be brought further");
                        inputs.push_back(made(&mut memory, Stamp { version: stamp.version + 1, ..stamp }));
                    }
                    KeeperOutput::Put { offset, bytes } => {
                        assert!(offset == staged || offset == 0, "what comes follows what came");
                        staged = offset + bytes.len() as u64;
                    }
                    KeeperOutput::Serve { stamp, .. } => assert!(memory.contains(&stamp)),
                    KeeperOutput::Store(stamp) => {
                        assert!(memory.contains(&stamp), "only what is there can be stored");
                        inputs.push_back(KeeperInput::Stored(stamp));
                    }
                    KeeperOutput::Drop(stamp) => drop(memory.remove(&stamp)),
                    KeeperOutput::Send(_) | KeeperOutput::Remove(_) => {}
                }
            }
        }
        assert_eq!(keeper.standing().held, memory.iter().copied().collect::<Vec<_>>());
    }
}

fn made(memory: &mut BTreeSet<Stamp>, stamp: Stamp) -> KeeperInput {
    memory.insert(stamp);
    KeeperInput::Made(stamp)
}

/// What a network, a disk or a clock may bring, and the bytes after it.
fn word(bytes: &[u8]) -> Option<(KeeperInput, &[u8])> {
    let (kind, rest) = bytes.split_first()?;
    match kind {
        0 => postcard::take_from_bytes(rest).ok().map(|(orders, rest)| (KeeperInput::Orders(orders), rest)),
        1 => postcard::take_from_bytes(rest).ok().map(|(heard, rest)| (KeeperInput::Message(heard), rest)),
        2 => postcard::take_from_bytes(rest).ok().map(|(found, rest)| (KeeperInput::Found(found), rest)),
        3 => Some((KeeperInput::Tick, rest)),
        _ => None,
    }
}
