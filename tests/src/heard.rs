//! A rank of a replica that hears anything in the frames of its peers, whole frames and true ones among them.

use lite_llm_core::cluster::membership::{Epoch, Member, Membership, NodeId};
use lite_llm_core::cluster::message::{Message, Payload};
use lite_llm_core::cluster::orders::{Facts, Orders};
use lite_llm_core::cluster::peer::{Log, Peer, PeerConfig, PeerInput, PeerOutput};
use lite_llm_core::config::Config;
use lite_llm_core::engine::Engine;
use lite_llm_core::ids::Incarnation;
use lite_llm_core::time::Time;
use lite_llm_core::topology::Topology;
use lite_llm_sim::cluster::message::Said;
use lite_llm_sim::world::Wire;

/// Payloads that one input may hold.
const PAYLOADS_MAX: usize = 64;

/// Decodes bytes as a frame and as its body, and has a leader and a follower hear the payloads in them.
///
/// # Panics
/// If a frame that was read is not written as it was, or a rank breaks an invariant.
pub fn anything_heard(bytes: &[u8]) {
    drop(Said::decode(bytes));
    let framed: Vec<u8> =
        crc32fast::hash(bytes).to_le_bytes().into_iter().chain(bytes.iter().copied()).collect();
    if let Some(said) = Said::decode(&framed) {
        let again = Said::decode(&said.encode()).expect("what is written can be read");
        assert_eq!(again.encode(), said.encode());
        drop(said.label());
    }
    for leader in [0, 1] {
        let mut rank = Rank::new(leader);
        let mut rest = bytes;
        for _ in 0..PAYLOADS_MAX {
            let Ok((payload, after)) = postcard::take_from_bytes::<Payload>(rest) else { break };
            rest = after;
            // What a leader orders is the engine's input: the journal and the engine have targets of their own.
            if !matches!(payload, Payload::Records { .. }) {
                rank.hear(payload);
            }
        }
    }
}

/// A rank of two, and what its driver does with an empty disk.
struct Rank {
    peer: Peer,
    membership: Membership,
    now: Time,
    heard: u64,
}

impl Rank {
    fn new(leader: u32) -> Self {
        let topology = Topology { tensor: 2, ..Topology::SINGLE };
        let member = |node| Member { node: NodeId(node), incarnation: Incarnation(1) };
        let settings = PeerConfig {
            member: member(0),
            facts: Facts::default(),
            config: Config { topology, ..Config::default() },
            torn: true,
            began: Incarnation(1),
            entropy: 1,
            retry_ns: 100,
            unconfirmed_max: 16,
            drift_per_mille: 10,
        };
        let members = vec![member(0), member(1)];
        let membership = Membership { replica: 0, epoch: Epoch(1), members, leader };
        let peer = Peer::new(settings, Log::new(Engine::new(), &[]));
        let mut rank = Self { peer, membership, now: Time(1), heard: 0 };
        rank.orders();
        rank
    }

    /// The supervisor says that the epoch is active; who is not synced lets it pass.
    fn orders(&mut self) {
        let orders = Orders {
            to: self.membership.members[0],
            membership: Some(self.membership.clone()),
            active: true,
            lease: None,
            drain: None,
            refused: None,
            shards: None,
        };
        self.give(PeerInput::Orders(Box::new(orders)));
    }

    fn hear(&mut self, payload: Payload) {
        self.heard += 1;
        let link = lite_llm_core::cluster::LinkHeader { number: self.heard, confirms: self.heard };
        let [to, from] = [self.membership.members[0], self.membership.members[1]];
        let message = Message { epoch: self.membership.epoch, from, to, link, payload: Some(payload) };
        self.give(PeerInput::Message(Box::new(message)));
        self.orders();
        self.give(PeerInput::Tick);
    }

    fn give(&mut self, input: PeerInput) {
        self.now = self.now.after_ns(60);
        self.peer.handle(self.now, input);
        let mut answers = Vec::new();
        loop {
            match self.peer.poll() {
                PeerOutput::Wait { .. } => break,
                PeerOutput::ReadLog { .. } => {
                    answers.push(PeerInput::Log { snapshot: None, records: Vec::new() });
                }
                PeerOutput::Rewind { .. } | PeerOutput::Install(_) => {
                    answers.push(PeerInput::Rewound(Box::new(Log::new(Engine::new(), &[]))));
                }
                _ => {}
            }
        }
        answers.into_iter().for_each(|answer| self.give(answer));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lite_llm_core::digest::Digest;
    use lite_llm_core::ids::{Seq, StepId};
    use lite_llm_core::input::Input;
    use lite_llm_core::journal::Snapshot;

    fn bytes(payloads: &[Payload]) -> Vec<u8> {
        payloads.iter().flat_map(|payload| postcard::to_allocvec(payload).expect("it encodes")).collect()
    }

    fn join(committed: u64, digests: usize) -> Payload {
        Payload::Join { committed: Seq(committed), digests: vec![Digest::default(); digests] }
    }

    #[test]
    fn what_makes_no_sense_is_not_heard_or_ends_the_rank() {
        let snapshot = Snapshot {
            next: 5,
            digest: [1; 32],
            logic_version: lite_llm_core::LOGIC_VERSION,
            bytes: vec![1],
        };
        for payloads in [
            vec![join(0, 0)],
            vec![join(9, 0), join(u64::MAX, 2), join(u64::MAX, 0)],
            vec![join(0, 1), Payload::Answer { input: Box::new(Input::Reserved) }, join(0, 1)],
            vec![join(0, 3), Payload::Durable { seq: Seq(u64::MAX) }, Payload::Committed { seq: Seq(7) }],
            vec![Payload::Rewind { keep: Seq(u64::MAX) }, Payload::Install { snapshot }],
            vec![Payload::Durable { seq: Seq(9) }, Payload::Abort { step: StepId(3), attempt: 1 }],
        ] {
            anything_heard(&bytes(&payloads));
        }
    }
}
