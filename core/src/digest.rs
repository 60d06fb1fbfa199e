//! Digests: BLAKE3 over the encoded form, chained over inputs and outputs.

use core::fmt;
use serde::{Deserialize, Serialize};

/// A BLAKE3 digest.
#[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// The digest of some bytes.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// The digest of a value's journal encoding.
    #[must_use]
    pub fn of_value<T: Serialize>(value: &T) -> Self {
        let mut chain = Chain::new();
        chain.add(value);
        chain.finish()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Digest({self})")
    }
}

/// A running digest over encoded values.
pub(crate) struct Chain(blake3::Hasher);

impl Chain {
    pub(crate) fn new() -> Self {
        Self(blake3::Hasher::new())
    }

    /// Adds the encoding of a value. postcard is self-delimiting, so no two sequences of values collide.
    pub(crate) fn add<T: Serialize>(&mut self, value: &T) {
        struct Into<'a>(&'a mut blake3::Hasher);
        impl postcard::ser_flavors::Flavor for Into<'_> {
            type Output = ();
            fn try_push(&mut self, byte: u8) -> postcard::Result<()> {
                self.0.update(&[byte]);
                Ok(())
            }
            fn try_extend(&mut self, bytes: &[u8]) -> postcard::Result<()> {
                self.0.update(bytes);
                Ok(())
            }
            fn finalize(self) -> postcard::Result<()> {
                Ok(())
            }
        }
        postcard::serialize_with_flavor::<T, _, ()>(value, Into(&mut self.0))
            .expect("the vocabulary always encodes");
    }

    pub(crate) fn finish(self) -> Digest {
        Digest(*self.0.finalize().as_bytes())
    }
}
