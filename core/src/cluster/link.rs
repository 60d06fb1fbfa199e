//! One end of a conversation between two members: messages arrive once and in order, or not at all.
//!
//! The network may lose, double, delay and reorder. Each message has a number and says which was the last that came in
//! order from the other side; what is not confirmed in time is sent again, oldest first. A link lives as long as both members
//! are in the epoch: a new epoch has new links, so nothing of an old one is ever delivered.

use crate::plant::{self, Bug};
use crate::time::Time;
use alloc::collections::VecDeque;
use serde::{Deserialize, Serialize};

/// What a link adds to a message.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LinkHeader {
    /// The number of this message, dense from 1; 0 if it only confirms.
    pub number: u64,
    /// The last message of the other side that came in order.
    pub confirms: u64,
}

/// One end of a link.
#[derive(Clone, Debug)]
pub(super) struct Link<P> {
    /// Sent and not confirmed, oldest first.
    unconfirmed: VecDeque<(u64, P)>,
    sent: u64,
    received: u64,
    /// Something came that has not been confirmed yet.
    owes: bool,
    /// When to send again, ever more seldom.
    again: Option<Time>,
    /// How often it was in vain since the last confirmation.
    vain: u32,
}

impl<P> Default for Link<P> {
    fn default() -> Self {
        Self { unconfirmed: VecDeque::new(), sent: 0, received: 0, owes: false, again: None, vain: 0 }
    }
}

impl<P: Clone> Link<P> {
    /// Messages that the other side has not confirmed.
    pub(super) fn unconfirmed(&self) -> usize {
        self.unconfirmed.len()
    }

    /// The header of a new message, which is kept until it is confirmed.
    pub(super) fn send(&mut self, now: Time, retry_ns: u64, payload: P) -> LinkHeader {
        self.sent += 1;
        self.unconfirmed.push_back((self.sent, payload));
        self.again.get_or_insert(now.after_ns(retry_ns));
        self.owes = false;
        LinkHeader { number: self.sent, confirms: self.received }
    }

    /// Takes a header; whether its message is the next one and to be delivered.
    pub(super) fn receive(&mut self, now: Time, retry_ns: u64, header: LinkHeader) -> bool {
        let before = self.unconfirmed.len();
        while self.unconfirmed.front().is_some_and(|&(number, _)| number <= header.confirms) {
            self.unconfirmed.pop_front();
        }
        if self.unconfirmed.is_empty() {
            (self.again, self.vain) = (None, 0);
        } else if self.unconfirmed.len() < before {
            (self.again, self.vain) = (Some(now.after_ns(retry_ns)), 0);
        }
        if header.number == 0 {
            return false;
        }
        // What came before is confirmed again: the confirmation may have been lost.
        self.owes = true;
        let again = plant::is(Bug::LinkDoubled) && header.number == self.received;
        let next = header.number == self.received + 1;
        self.received += u64::from(next);
        next || again
    }

    /// Gives what is to be sent again, if its time has come, and the mere confirmation that is owed. Says when there may be
    /// more.
    pub(super) fn due(
        &mut self,
        now: Time,
        retry_ns: u64,
        mut carry: impl FnMut(LinkHeader, Option<P>),
    ) -> Option<Time> {
        if self.again.is_some_and(|again| again <= now) {
            self.vain = (self.vain + 1).min(VAIN_MAX);
            self.again = Some(now.after_ns(retry_ns.saturating_mul(1 << self.vain)));
            for (number, payload) in self.unconfirmed.iter().take(AGAIN_MAX) {
                let header = LinkHeader { number: *number, confirms: self.received };
                carry(header, Some(payload.clone()));
            }
            self.owes = false;
        }
        if self.owes {
            self.owes = false;
            carry(LinkHeader { number: 0, confirms: self.received }, None);
        }
        self.again
    }
}

/// The longest pause between two attempts, as a power of two of the first.
const VAIN_MAX: u32 = 5;
/// Messages that are sent again at once.
const AGAIN_MAX: usize = 16;

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::{vec, vec::Vec};
    use proptest::prelude::*;

    const RETRY_NS: u64 = 10;

    proptest! {
        /// Two ends over a network that loses, doubles and reorders: everything arrives once, in order.
        #[test]
        fn everything_arrives_once_and_in_order(
            sends in prop::collection::vec(any::<bool>(), 1..40),
            fates in prop::collection::vec(0u8..8, 400),
        ) {
            let mut ends = [Link::<u32>::default(), Link::default()];
            let mut sent: [Vec<u32>; 2] = [vec![], vec![]];
            let mut got: [Vec<u32>; 2] = [vec![], vec![]];
            let mut air: Vec<(usize, LinkHeader, Option<u32>)> = Vec::new();
            let mut fates = fates.into_iter();
            let mut sends = sends.into_iter();
            for now in 0..4000u64 {
                let now = Time(now);
                if let Some(first) = sends.next() {
                    let from = usize::from(first);
                    let payload = u32::try_from(sent[from].len()).unwrap();
                    sent[from].push(payload);
                    let header = ends[from].send(now, RETRY_NS, payload);
                    air.push((1 - from, header, Some(payload)));
                }
                for (from, end) in ends.iter_mut().enumerate() {
                    let again = end.due(now, RETRY_NS, |header, payload| air.push((1 - from, header, payload)));
                    prop_assert_eq!(again.is_some(), end.unconfirmed() > 0);
                }
                if air.is_empty() {
                    continue;
                }
                let (to, header, payload) = match fates.next() {
                    Some(0 | 1) => { air.remove(0); continue }
                    Some(2) => air[0],
                    Some(3) => air.pop().unwrap(),
                    _ => air.remove(0),
                };
                if ends[to].receive(now, RETRY_NS, header) {
                    got[to].push(payload.expect("a numbered message has a payload"));
                }
            }
            prop_assert_eq!(&got[1], &sent[0]);
            prop_assert_eq!(&got[0], &sent[1]);
            prop_assert!(ends.iter().all(|end| end.unconfirmed() == 0 && end.again.is_none()), "all is confirmed");
        }
    }
}
