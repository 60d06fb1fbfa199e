//! What becomes of a message. Every pair of machines has a link each way; a link is named by its ends and a message by
//! its number on the link.

use crate::decision::{Decisions, link};
use crate::hazard::Hazard;

/// A message takes this long when nothing is wrong, and up to as much again.
const LATENCY_NS: u64 = 50_000;
/// A late message is late by up to this.
const LATE_NS_MAX: u64 = 200_000_000;

/// When a message arrives, and how.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Fate {
    /// After how long; `None` if it is lost.
    pub(super) arrives_ns: Option<u64>,
    /// After how long once more.
    pub(super) again_ns: Option<u64>,
    /// Which of its bits change.
    pub(super) corrupt: Option<u64>,
}

/// One direction between two machines.
#[derive(Clone, Copy, Debug, Default)]
struct Link {
    sent: u64,
    /// Nothing passes before this time.
    cut_until: u64,
    /// Everything is late before this time, by this much.
    clogged_until: u64,
    clog_ns: u64,
    /// What was sent in a former connection is lost.
    connection: u32,
}

/// All links.
#[derive(Debug)]
pub(super) struct Network {
    machines: usize,
    links: Vec<Link>,
}

impl Network {
    pub(super) fn new(machines: usize) -> Self {
        Self { machines, links: vec![Link::default(); machines * machines] }
    }

    fn at(&mut self, from: u32, to: u32) -> &mut Link {
        &mut self.links[from as usize * self.machines + to as usize]
    }

    /// The connection that is open now.
    pub(super) fn connection(&self, from: u32, to: u32) -> u32 {
        self.links[from as usize * self.machines + to as usize].connection
    }

    /// What becomes of the next message on a link.
    pub(super) fn fate(&mut self, decisions: &Decisions, now: u64, from: u32, to: u32) -> Fate {
        let subject = link(from, to);
        let link = self.at(from, to);
        let nth = link.sent;
        link.sent += 1;
        if link.cut_until > now || decisions.at(Hazard::LoseMessage, subject, nth).is_some() {
            return Fate::default();
        }
        let clogged = if link.clogged_until > now { link.clog_ns } else { 0 };
        let usual = LATENCY_NS + decisions.ordinary(1, subject, nth) % LATENCY_NS + clogged;
        let late = decisions.at(Hazard::DelayMessage, subject, nth).map_or(0, |value| value % LATE_NS_MAX);
        let again = decisions.at(Hazard::DoubleMessage, subject, nth);
        Fate {
            arrives_ns: Some(usual + late),
            again_ns: again.map(|value| usual + value % LATE_NS_MAX),
            corrupt: decisions.at(Hazard::CorruptMessage, subject, nth),
        }
    }

    /// Parts some machines from the others, and says which.
    pub(super) fn part(&mut self, value: u64, now: u64) -> (u64, bool) {
        let until = now + 5_000_000 + (value >> 24) % 2_000_000_000;
        let apart = (value & 0xffff) % (1 << self.machines.min(16));
        let one_way = (value >> 16).is_multiple_of(3);
        let is_apart = |machine: u32| apart >> machine & 1 == 1;
        let machines = u32::try_from(self.machines).expect("few machines");
        for (from, to) in (0..machines).flat_map(|from| (0..machines).map(move |to| (from, to))) {
            if is_apart(from) != is_apart(to) && (!one_way || is_apart(from)) {
                self.at(from, to).cut_until = until;
            }
        }
        (apart, one_way)
    }

    /// Makes everything between two machines late, one way, and says which.
    pub(super) fn clog(&mut self, value: u64, now: u64) -> (u32, u32) {
        let (from, to) = self.pair(value);
        let link = self.at(from, to);
        link.clogged_until = now + 5_000_000 + (value >> 24) % 1_000_000_000;
        link.clog_ns = 1_000_000 + (value >> 40) % 300_000_000;
        (from, to)
    }

    /// Resets the connection between two machines, both ways, and says which.
    pub(super) fn reset(&mut self, value: u64) -> (u32, u32) {
        let (from, to) = self.pair(value);
        self.at(from, to).connection += 1;
        self.at(to, from).connection += 1;
        (from, to)
    }

    fn pair(&self, value: u64) -> (u32, u32) {
        let machines = self.machines as u64;
        let machine = |value: u64| u32::try_from(value % machines).expect("few machines");
        (machine(value & 0xfff), machine(value >> 12 & 0xfff))
    }

    /// Ends every partition and clog.
    pub(super) fn heal(&mut self) {
        for link in &mut self.links {
            (link.cut_until, link.clogged_until) = (0, 0);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_partition_holds_for_its_time_and_in_its_direction() {
        let calm = Decisions::of_log(1, &[]);
        let mut network = Network::new(3);
        // Machine 1 apart, its own messages only.
        assert_eq!(network.part(0b010, 0), (0b010, true));
        assert_eq!(network.fate(&calm, 10, 1, 0).arrives_ns, None);
        assert!(network.fate(&calm, 10, 0, 1).arrives_ns.is_some());
        assert!(network.fate(&calm, 10, 0, 2).arrives_ns.is_some());
        assert!(network.fate(&calm, 5_000_001, 1, 0).arrives_ns.is_some(), "it is over");
        assert_eq!(network.part(0b010 | 1 << 16, 0), (0b010, false));
        assert_eq!(network.fate(&calm, 10, 0, 1).arrives_ns, None);
        network.heal();
        assert!(network.fate(&calm, 10, 0, 1).arrives_ns.is_some());
    }

    #[test]
    fn each_fate_comes_about() {
        let decisions = Decisions::always(1, Hazard::ALL);
        let mut network = Network::new(2);
        let fates: Vec<Fate> = (0..1000).map(|_| network.fate(&decisions, 0, 0, 1)).collect();
        assert!(fates.iter().any(|fate| fate.arrives_ns.is_none()));
        assert!(fates.iter().any(|fate| fate.again_ns.is_some()));
        assert!(fates.iter().any(|fate| fate.corrupt.is_some()));
        assert!(fates.iter().any(|fate| fate.arrives_ns.is_some_and(|ns| ns > 10 * LATENCY_NS)));
        let before = network.clog(1 << 12, 0);
        assert_eq!(before, (0, 1));
        let late = network.fate(&Decisions::of_log(1, &[]), 1, 0, 1);
        assert!(late.arrives_ns.is_some_and(|ns| ns > 1_000_000));
    }
}
