//! What the client of a supervised stream has got: each token once, whatever the lives of the node send again.

/// A life of the node that contradicts an earlier one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeliveryError {
    /// A token is not what it was.
    #[error("token {offset} is {now} after a restart, but was {before}: the streams differ, which is a bug")]
    Changed {
        /// Which token.
        offset: u32,
        /// What was delivered.
        before: u32,
        /// What is sent now.
        now: u32,
    },
    /// Tokens are missing.
    #[error("token {found} comes where token {expected} is due")]
    Gap {
        /// The offset that is due.
        expected: u32,
        /// The offset that comes.
        found: u32,
    },
}

/// The tokens of one stream that have been delivered.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Delivered {
    from: u32,
    tokens: Vec<u32>,
}

impl Delivered {
    /// A stream of which everything before `from` is of no interest.
    pub fn from(from: u32) -> Self {
        Self { from, tokens: Vec::new() }
    }

    /// The offset of the next token that is new.
    pub fn next(&self) -> u32 {
        self.from + self.tokens.len() as u32
    }

    /// Takes a token; tells whether it is new.
    ///
    /// # Errors
    /// If it contradicts what was delivered, or leaves a gap.
    pub fn take(&mut self, offset: u32, token: u32) -> Result<bool, DeliveryError> {
        if offset < self.from {
            return Ok(false);
        }
        match self.tokens.get((offset - self.from) as usize) {
            Some(&before) if before == token => Ok(false),
            Some(&before) => Err(DeliveryError::Changed { offset, before, now: token }),
            None if offset == self.next() => {
                self.tokens.push(token);
                Ok(true)
            }
            None => Err(DeliveryError::Gap { expected: self.next(), found: offset }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_token_is_delivered_once() {
        let mut stream = Delivered::from(2);
        assert_eq!(stream.take(1, 9), Ok(false));
        assert_eq!(stream.take(2, 5), Ok(true));
        assert_eq!(stream.take(3, 6), Ok(true));
        assert_eq!(stream.take(2, 5), Ok(false));
        assert_eq!(stream.take(3, 7), Err(DeliveryError::Changed { offset: 3, before: 6, now: 7 }));
        assert_eq!(stream.take(5, 7), Err(DeliveryError::Gap { expected: 4, found: 5 }));
        assert_eq!((stream.take(4, 8), stream.next()), (Ok(true), 5));
    }
}
