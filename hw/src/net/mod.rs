//! Messages between processes over TCP: framed, bounded, authenticated, and lost when they cannot be carried.

mod mesh;
mod session;

pub use mesh::{Mesh, NetError};
pub use session::{FRAME_BYTES_MAX, Key, KeyError, Receiver, Sender, SessionError};
