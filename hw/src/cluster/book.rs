//! Where the processes of nodes are to be told something.

use lite_llm_core::cluster::membership::{Member, NodeId};
use lite_llm_core::ids::Incarnation;
use std::collections::BTreeMap;
use std::net::SocketAddr;

/// Where lives are to be told. An older life of a node may still say something, and is answered where it is.
#[derive(Debug, Default)]
pub(super) struct Book(BTreeMap<Member, SocketAddr>);

impl Book {
    /// Lives of a node whose addresses are kept.
    const LIVES: usize = 4;

    pub(super) fn insert(&mut self, member: Member, address: SocketAddr) {
        self.0.insert(member, address);
        let older: Vec<Member> =
            self.lives(member.node).rev().skip(Self::LIVES).map(|(member, _)| member).collect();
        for member in older {
            self.0.remove(&member);
        }
    }

    fn lives(&self, node: NodeId) -> impl DoubleEndedIterator<Item = (Member, SocketAddr)> {
        let life = |incarnation| Member { node, incarnation: Incarnation(incarnation) };
        self.0.range(life(0)..=life(u64::MAX)).map(|(&member, &address)| (member, address))
    }

    pub(super) fn of(&self, member: Member) -> Option<SocketAddr> {
        self.0.get(&member).copied()
    }

    pub(super) fn newest_of(&self, node: NodeId) -> Option<SocketAddr> {
        self.lives(node).next_back().map(|(_, address)| address)
    }

    /// Each node's newest life.
    pub(super) fn newest(&self) -> impl Iterator<Item = (NodeId, SocketAddr)> {
        let newest: BTreeMap<NodeId, SocketAddr> =
            self.0.iter().map(|(member, &address)| (member.node, address)).collect();
        newest.into_iter()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lives_are_told_where_they_are_and_the_newest_is_the_nodes() {
        let member = |node, life| Member { node: NodeId(node), incarnation: Incarnation(life) };
        let at = |port| SocketAddr::from(([127, 0, 0, 1], port));
        let mut book = Book::default();
        for life in [1, 2, 3, 4, 5] {
            book.insert(member(0, u64::from(life)), at(100 + life));
        }
        book.insert(member(1, 7), at(7));
        // An older life that is heard late takes nobody's place.
        book.insert(member(0, 4), at(104));
        assert_eq!(book.of(member(0, 4)), Some(at(104)));
        assert_eq!(book.of(member(0, 1)), None);
        assert_eq!(book.newest().collect::<Vec<_>>(), [(NodeId(0), at(105)), (NodeId(1), at(7))]);
        assert_eq!(book.newest_of(NodeId(2)), None);
    }
}
