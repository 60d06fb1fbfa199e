//! The bytes of a simulated file without the zeros that end its blocks: a journal pads every group to a block, so most of
//! what a file holds is zeros, and neither memory nor time is spent on them.
//!
//! What is kept of all blocks lies one after the other in the order in which it was written. A block that is changed is
//! written anew; what it was before stays behind, for that is rare.

use std::ops::Range;

/// Bytes of a block.
const BLOCK: usize = 4096;
/// Bytes that are looked at together.
const LANE: usize = 64;

/// The bytes of a file.
#[derive(Clone, Debug, Default)]
pub(super) struct Bytes {
    len: usize,
    /// Where the start of each block lies in `kept`; what is missing up to its end is zero.
    blocks: Vec<Range<usize>>,
    kept: Vec<u8>,
}

impl Bytes {
    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// Adds bytes at the end.
    pub(super) fn extend(&mut self, mut bytes: &[u8]) {
        let over = self.len % BLOCK;
        if over > 0 && !bytes.is_empty() {
            let (first, rest) = bytes.split_at(bytes.len().min(BLOCK - over));
            let at = self.len;
            self.len += first.len();
            self.change(at..self.len, |stretch| stretch.copy_from_slice(first));
            bytes = rest;
        }
        for block in bytes.chunks(BLOCK) {
            let range = self.keep(block);
            self.blocks.push(range);
        }
        self.len += bytes.len();
    }

    /// Lets go of what is behind a length.
    pub(super) fn truncate(&mut self, len: usize) {
        if len < self.len {
            self.len = len;
            self.blocks.truncate(len.div_ceil(BLOCK));
            if let Some(last) = self.blocks.last_mut().filter(|_| !len.is_multiple_of(BLOCK)) {
                last.end = last.end.min(last.start + len % BLOCK);
            }
        }
    }

    /// Copies what begins there.
    ///
    /// # Panics
    /// If there is less.
    pub(super) fn read(&self, start: usize, into: &mut [u8]) {
        assert!(start + into.len() <= self.len, "only what is there is read");
        for part in parts(start..start + into.len()) {
            let kept = self.kept(part.start / BLOCK);
            let at = part.start % BLOCK;
            let into = &mut into[part.start - start..part.end - start];
            let there = kept.get(at..).unwrap_or_default();
            let there = &there[..there.len().min(into.len())];
            into[..there.len()].copy_from_slice(there);
            into[there.len()..].fill(0);
        }
    }

    /// Changes a stretch, block by block: what begins where is given.
    ///
    /// # Panics
    /// If the stretch is not there.
    pub(super) fn change_each(&mut self, range: Range<usize>, mut change: impl FnMut(usize, &mut [u8])) {
        assert!(range.end <= self.len, "only what is there is changed");
        for part in parts(range) {
            let start = part.start;
            self.change(part, |stretch| change(start, stretch));
        }
    }

    /// Makes a stretch zero.
    pub(super) fn zero(&mut self, range: Range<usize>) {
        self.change_each(range, |_, stretch| stretch.fill(0));
    }

    /// Changes a stretch of one block.
    fn change(&mut self, range: Range<usize>, change: impl FnOnce(&mut [u8])) {
        let number = range.start / BLOCK;
        let mut block = [0; BLOCK];
        let kept = self.kept(number);
        block[..kept.len()].copy_from_slice(kept);
        let first = number * BLOCK;
        change(&mut block[range.start - first..range.end - first]);
        self.blocks[number] = self.keep(&block[..(self.len - first).min(BLOCK)]);
    }

    fn kept(&self, number: usize) -> &[u8] {
        &self.kept[self.blocks[number].clone()]
    }

    /// Keeps a block but for the zeros at its end, and says where.
    fn keep(&mut self, block: &[u8]) -> Range<usize> {
        let is_zero = |lane: &[u8]| lane.iter().fold(0, |bits, byte| bits | byte) == 0;
        let zeros = block.rchunks(LANE).take_while(|lane| is_zero(lane)).map(<[u8]>::len).sum::<usize>();
        let start = self.kept.len();
        self.kept.extend_from_slice(&block[..block.len() - zeros]);
        start..self.kept.len()
    }
}

/// The parts of a stretch that lie in one block each.
fn parts(range: Range<usize>) -> impl Iterator<Item = Range<usize>> {
    let blocks = range.start / BLOCK..range.end.div_ceil(BLOCK);
    let part = move |number: usize| range.start.max(number * BLOCK)..range.end.min((number + 1) * BLOCK);
    blocks.map(part).filter(|part| !part.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever is written, cut and changed: what is read is what a plain vector would have.
        #[test]
        fn they_are_those_of_a_plain_vector(
            steps in prop::collection::vec((0u8..5, 0usize..9000, 0usize..9000, 0u8..3), 1..30),
        ) {
            let (mut bytes, mut plain) = (Bytes::default(), Vec::new());
            for (what, a, b, value) in steps {
                let (start, end) = (a.min(b).min(plain.len()), a.max(b).min(plain.len()));
                match what {
                    0 => {
                        bytes.truncate(a);
                        plain.truncate(a);
                    }
                    1 => {
                        bytes.zero(start..end);
                        plain[start..end].fill(0);
                    }
                    2 => {
                        bytes.change_each(start..end, |_, part| part.fill(value));
                        plain[start..end].fill(value);
                    }
                    _ => {
                        let mut more = vec![value; a];
                        more.resize(a.max(b), 0);
                        bytes.extend(&more);
                        plain.extend(&more);
                    }
                }
                prop_assert_eq!(bytes.len(), plain.len());
                let mut read = vec![9; plain.len()];
                bytes.read(0, &mut read);
                prop_assert_eq!(&read, &plain);
                let mut part = vec![9; end.min(plain.len()).saturating_sub(start)];
                bytes.read(start.min(plain.len()), &mut part);
                let end = start.min(plain.len()) + part.len();
                prop_assert_eq!(&part[..], &plain[start.min(plain.len())..end]);
            }
        }
    }
}
