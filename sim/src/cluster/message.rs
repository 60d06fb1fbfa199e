//! What goes over the wires of a simulated cluster: the production messages, each in a frame with a checksum.

use crate::world::Wire;
use lite_llm_core::cluster::message::{Message, Payload};
use lite_llm_core::cluster::orders::{Beat, Orders};
use lite_llm_core::cluster::shards::{ShardMessage, ShardWord};
use lite_llm_core::cluster::supervisor::SupervisorInput;
use lite_llm_core::input::Input;
use lite_llm_core::output::Output;
use serde::{Deserialize, Serialize};

/// A message between two processes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Said {
    /// Between ranks.
    Rank(Box<Message>),
    /// Between keepers of shards.
    Shard(Box<ShardMessage>),
    /// From a node to the supervisor.
    Beat(Box<Beat>),
    /// From the supervisor to a node.
    Orders(Box<Orders>),
    /// From a client or operator to a node.
    Ask {
        /// The replica that it is meant for.
        replica: u32,
        /// What is asked.
        input: Box<Input>,
    },
    /// From an operator to the supervisor.
    Wish(Box<SupervisorInput>),
    /// From a node to a client or operator.
    Tell(Box<Output>),
    /// From a node to a client or operator: what was asked is not taken.
    Refused {
        /// What was asked.
        input: Box<Input>,
        /// Why not, and the remedy.
        reason: String,
    },
}

impl Wire for Said {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; 4];
        bytes = postcard::to_extend(self, bytes).expect("the vocabulary always encodes");
        let sum = crc32fast::hash(&bytes[4..]);
        bytes[..4].copy_from_slice(&sum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (sum, body) = bytes.split_first_chunk::<4>()?;
        if crc32fast::hash(body).to_le_bytes() != *sum {
            return None;
        }
        postcard::take_from_bytes(body).ok().filter(|(_, rest)| rest.is_empty()).map(|(said, _)| said)
    }

    fn label(&self) -> String {
        match self {
            Self::Rank(message) => {
                let what = message.payload.as_ref().map_or_else(|| "confirms".into(), payload);
                format!("{what} in {}", message.epoch)
            }
            Self::Shard(message) => match &message.what {
                ShardWord::Ask { stamp, offset } => {
                    format!("asks for shard {} in version {} from byte {offset}", stamp.shard, stamp.version)
                }
                ShardWord::Part { stamp, bytes, .. } => {
                    format!("{} bytes of shard {} in version {}", bytes.len(), stamp.shard, stamp.version)
                }
            },
            Self::Beat(beat) => format!("beat of {}, log ends at {}", beat.member, beat.log.last),
            Self::Orders(orders) => {
                let epoch = orders.membership.as_ref().map_or_else(String::new, |m| format!(" {}", m.epoch));
                format!("orders{epoch}{}", if orders.active { ", active" } else { "" })
            }
            Self::Ask { replica, input } => format!("asks replica {replica}: {input:?}"),
            Self::Wish(input) => format!("wishes: {input:?}"),
            Self::Tell(output) => format!("{output:?}"),
            Self::Refused { reason, .. } => format!("refused: {reason}"),
        }
    }
}

fn payload(payload: &Payload) -> String {
    match payload {
        Payload::Join { committed, digests } => {
            format!("join with {} after {committed}", digests.len().saturating_sub(1))
        }
        Payload::Rewind { keep } => format!("rewind to {keep}"),
        Payload::Install { snapshot } => format!("install a snapshot before {}", snapshot.next),
        Payload::Records { records, .. } => match (records.first(), records.last()) {
            (Some(first), Some(last)) => format!("records {} to {}", first.seq, last.seq),
            _ => "no records".into(),
        },
        Payload::Durable { seq } => format!("durable to {seq}"),
        Payload::Committed { seq } => format!("committed to {seq}"),
        Payload::Answer { input } => format!("answer: {input:?}"),
        Payload::Abort { step, attempt } => format!("abort step {step}, attempt {attempt}"),
        Payload::Data { tag, bytes } => format!("{} bytes of step {}", bytes.len(), tag.step),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lite_llm_core::cluster::membership::{Epoch, Member, NodeId};
    use lite_llm_core::digest::Digest;
    use lite_llm_core::ids::{Incarnation, Seq};
    use lite_llm_core::journal::Record;

    fn messages() -> Vec<Said> {
        let member = |node| Member { node: NodeId(node), incarnation: Incarnation(3) };
        let record = Record { seq: 9, time_ns: 1 << 40, digest: [7; 32], payload: vec![1, 2, 3] };
        let payloads = [
            None,
            Some(Payload::Join { committed: Seq(4), digests: vec![Digest([1; 32]); 2] }),
            Some(Payload::Records { records: [record].into(), committed: Seq(8) }),
            Some(Payload::Answer { input: Box::new(Input::Reserved) }),
        ];
        let (from, to, link) = (member(0), member(1), Default::default());
        let ranks = payloads
            .into_iter()
            .map(|payload| Said::Rank(Box::new(Message { epoch: Epoch(5), from, to, link, payload })));
        ranks.chain([Said::Ask { replica: 1, input: Box::new(Input::Drain { bound_ns: Some(3) }) }]).collect()
    }

    #[test]
    fn a_frame_is_read_again_and_no_changed_bit_passes() {
        for said in messages() {
            let bytes = said.encode();
            assert_eq!(Said::decode(&bytes), Some(said));
            for bit in 0..bytes.len() * 8 {
                let mut changed = bytes.clone();
                changed[bit / 8] ^= 1 << (bit % 8);
                assert_eq!(Said::decode(&changed), None, "bit {bit}");
            }
            assert_eq!(Said::decode(&bytes[..bytes.len() - 1]), None);
        }
    }

    #[test]
    fn labels_say_what_a_reader_looks_for() {
        let labels: Vec<String> = messages().iter().map(Wire::label).collect();
        assert_eq!(labels[0], "confirms in epoch 5");
        assert_eq!(labels[1], "join with 1 after 4 in epoch 5");
        assert_eq!(labels[2], "records 9 to 9 in epoch 5");
    }
}
