//! One connection: a handshake that proves on both sides that they have the same key, then frames in one direction.
//!
//! Every frame carries a keyed hash over its number and its bytes, so that what was changed, left out, doubled or recorded
//! elsewhere is no frame. Nothing is encrypted. All integers are little-endian.

use std::fs::OpenOptions;
use std::io::{self, Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Bytes of the largest frame.
pub const FRAME_BYTES_MAX: usize = 256 << 20;

const MAGIC: [u8; 8] = *b"LLMWIRE1";
const NONCE_BYTES: usize = 32;
const HASH_BYTES: usize = 32;
const MAC_BYTES: usize = 16;
/// What is read at a time: a length that lies costs its sender the bytes, not us.
const PIECE_BYTES: usize = 1 << 20;

/// What both ends of a connection share.
#[derive(Clone, PartialEq, Eq)]
pub struct Key([u8; 32]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key")
    }
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read or written.
    #[error("cannot use the key file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// It is not 64 hexadecimal digits.
    #[error("the key file {} does not hold 64 hexadecimal digits; remove it to have another made", .0.display())]
    Form(PathBuf),
    /// Others may read it.
    #[error("the key file {} can be read by others: chmod 600 it", .0.display())]
    Open(PathBuf),
}

impl Key {
    /// A key that is known already.
    #[must_use]
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// The key in a file, which is made if it is not there.
    ///
    /// # Errors
    /// If the file cannot be used, holds no key, or is not its owner's alone.
    pub fn of_file(path: &Path) -> Result<Self, KeyError> {
        let io = |source| KeyError::Io { path: path.to_path_buf(), source };
        match OpenOptions::new().write(true).create_new(true).mode(0o600).open(path) {
            Ok(mut file) => {
                let key = Self(random().map_err(io)?);
                let digits: String = key.0.iter().map(|byte| format!("{byte:02x}")).collect();
                file.write_all(digits.as_bytes()).and_then(|()| file.sync_all()).map_err(io)?;
                return Ok(key);
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => return Err(io(error)),
        }
        // A pipe may never answer.
        if !path.metadata().map_err(io)?.is_file() {
            return Err(KeyError::Form(path.to_path_buf()));
        }
        let file = std::fs::File::open(path).map_err(io)?;
        if file.metadata().map_err(io)?.permissions().mode() & 0o077 != 0 {
            return Err(KeyError::Open(path.to_path_buf()));
        }
        let mut text = String::new();
        file.take(256).read_to_string(&mut text).map_err(io)?;
        Self::of_digits(text.trim()).ok_or_else(|| KeyError::Form(path.to_path_buf()))
    }

    fn of_digits(text: &str) -> Option<Self> {
        let mut key = [0; 32];
        if text.len() != 64 || !text.is_ascii() {
            return None;
        }
        for (i, byte) in key.iter_mut().enumerate() {
            *byte = u8::from_str_radix(&text[2 * i..2 * i + 2], 16).ok()?;
        }
        Some(Self(key))
    }

    fn proof(&self, side: &[u8], nonces: &[[u8; NONCE_BYTES]; 2]) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        hasher.update(&MAGIC).update(side).update(&nonces[0]).update(&nonces[1]);
        hasher.finalize()
    }
}

fn random() -> io::Result<[u8; 32]> {
    let mut bytes = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes)
}

/// Why a connection is over.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The connection itself.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The other side speaks something else.
    #[error("the other side does not speak this protocol, or another version of it")]
    Protocol,
    /// The other side has another key.
    #[error("the other side has another key: give both the same key file")]
    Key,
    /// A frame is not what was sent.
    #[error("a frame is not what was sent")]
    Frame,
    /// A frame is too large.
    #[error("a frame of {0} bytes is above the bound of {FRAME_BYTES_MAX}")]
    TooLarge(u64),
}

/// The end that sends frames.
#[derive(Debug)]
pub struct Sender<S> {
    stream: S,
    key: [u8; 32],
    sent: u64,
}

/// The end that takes them.
#[derive(Debug)]
pub struct Receiver<S> {
    stream: S,
    key: [u8; 32],
    taken: u64,
}

impl<S: Write> Sender<S> {
    /// A session whose hands were shaken elsewhere.
    pub const fn of_session(stream: S, key: [u8; 32]) -> Self {
        Self { stream, key, sent: 0 }
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// If it is too large, or the connection breaks.
    pub fn send(&mut self, bytes: &[u8]) -> Result<(), SessionError> {
        let length = u32::try_from(bytes.len()).ok().filter(|_| bytes.len() <= FRAME_BYTES_MAX);
        let length = length.ok_or(SessionError::TooLarge(bytes.len() as u64))?;
        let mac = mac(&self.key, self.sent, bytes);
        self.sent += 1;
        let mut head = [0; 4 + MAC_BYTES];
        head[..4].copy_from_slice(&length.to_le_bytes());
        head[4..].copy_from_slice(&mac);
        self.stream.write_all(&head)?;
        self.stream.write_all(bytes)?;
        Ok(self.stream.flush()?)
    }
}

impl<S: Read + Write> Sender<S> {
    /// Shakes hands as the side that dialled.
    ///
    /// # Errors
    /// If the connection breaks, or the other side does not know the key.
    pub fn begin(mut stream: S, key: &Key) -> Result<Self, SessionError> {
        let own = random()?;
        stream.write_all(&[&MAGIC[..], &own].concat())?;
        let mut answer = [0; NONCE_BYTES + HASH_BYTES];
        stream.read_exact(&mut answer)?;
        let (nonce, proof) = answer.split_at(NONCE_BYTES);
        let nonces = [own, nonce.try_into().expect("so many bytes")];
        if key.proof(b"answers", &nonces) != *<&[u8; HASH_BYTES]>::try_from(proof).expect("so many bytes") {
            return Err(SessionError::Key);
        }
        stream.write_all(key.proof(b"dials", &nonces).as_bytes())?;
        Ok(Self { stream, key: *key.proof(b"frames", &nonces).as_bytes(), sent: 0 })
    }
}

impl<S: Read + Write> Receiver<S> {
    /// Shakes hands as the side that was dialled. Nothing is believed before the other side has proved itself.
    ///
    /// # Errors
    /// If the connection breaks, or the other side does not know protocol or key.
    pub fn begin(mut stream: S, key: &Key) -> Result<Self, SessionError> {
        let mut hello = [0; MAGIC.len() + NONCE_BYTES];
        stream.read_exact(&mut hello)?;
        let (magic, nonce) = hello.split_at(MAGIC.len());
        if magic != MAGIC {
            return Err(SessionError::Protocol);
        }
        let nonces = [nonce.try_into().expect("so many bytes"), random()?];
        stream.write_all(&[&nonces[1][..], key.proof(b"answers", &nonces).as_bytes()].concat())?;
        let mut proof = [0; HASH_BYTES];
        stream.read_exact(&mut proof)?;
        if key.proof(b"dials", &nonces) != proof {
            return Err(SessionError::Key);
        }
        Ok(Self { stream, key: *key.proof(b"frames", &nonces).as_bytes(), taken: 0 })
    }
}

impl<S: Read> Receiver<S> {
    /// A session whose hands were shaken elsewhere.
    pub const fn of_session(stream: S, key: [u8; 32]) -> Self {
        Self { stream, key, taken: 0 }
    }

    /// Waits for a frame.
    ///
    /// # Errors
    /// If it is not what was sent, or the connection breaks.
    pub fn receive(&mut self) -> Result<Vec<u8>, SessionError> {
        let mut head = [0; 4 + MAC_BYTES];
        self.stream.read_exact(&mut head)?;
        let (length, found) = head.split_at(4);
        let length = u32::from_le_bytes(length.try_into().expect("so many bytes")) as usize;
        if length > FRAME_BYTES_MAX {
            return Err(SessionError::TooLarge(length as u64));
        }
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let from = bytes.len();
            bytes.resize(length.min(from + PIECE_BYTES), 0);
            self.stream.read_exact(&mut bytes[from..])?;
        }
        // Compared in constant time, as the hash of the library is.
        let expected = mac(&self.key, self.taken, &bytes);
        let differs = expected.iter().zip(found).fold(0, |differs, (a, b)| differs | (a ^ b));
        if differs != 0 {
            return Err(SessionError::Frame);
        }
        self.taken += 1;
        Ok(bytes)
    }
}

fn mac(key: &[u8; 32], number: u64, bytes: &[u8]) -> [u8; MAC_BYTES] {
    let mut hasher = blake3::Hasher::new_keyed(key);
    hasher.update(&number.to_le_bytes()).update(bytes);
    let hash = hasher.finalize();
    hash.as_bytes()[..MAC_BYTES].try_into().expect("a hash is longer")
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    fn both(dials: &Key, answers: &Key) -> [Result<(), SessionError>; 2] {
        let (a, b) = UnixStream::pair().unwrap();
        let answers = answers.clone();
        let answering = std::thread::spawn(move || {
            let mut receiver = Receiver::begin(b, &answers)?;
            assert_eq!(receiver.receive()?, b"first");
            assert_eq!(receiver.receive()?, vec![7; 3 * PIECE_BYTES / 2]);
            Ok(())
        });
        let dialling = Sender::begin(a, dials).and_then(|mut sender| {
            sender.send(b"first")?;
            sender.send(&[7; 3 * PIECE_BYTES / 2])
        });
        [dialling, answering.join().unwrap()]
    }

    #[test]
    fn only_who_has_the_key_is_heard() {
        let (one, other) = (Key([1; 32]), Key([2; 32]));
        assert!(both(&one, &one).iter().all(Result::is_ok));
        let [dialling, answering] = both(&one, &other);
        assert!(matches!(dialling, Err(SessionError::Key)));
        assert!(answering.is_err());
    }

    #[test]
    fn what_is_no_handshake_is_refused_at_once() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(&[b'G'; 100]).unwrap();
        assert!(matches!(Receiver::begin(b, &Key([1; 32])), Err(SessionError::Protocol)));
    }

    /// A session whose frames went through somebody's hands.
    fn through(change: impl FnOnce(&mut Vec<u8>)) -> Result<Vec<u8>, SessionError> {
        let key = [3; 32];
        let mut wire = Vec::new();
        let mut sender = Sender::of_session(&mut wire, key);
        sender.send(b"one").unwrap();
        sender.send(b"two").unwrap();
        change(&mut wire);
        let mut receiver = Receiver::of_session(&wire[..], key);
        receiver.receive()?;
        receiver.receive()
    }

    #[test]
    fn what_was_changed_doubled_or_left_out_is_no_frame() {
        assert_eq!(through(|_| {}).unwrap(), b"two");
        let frame = 4 + MAC_BYTES + 3;
        for bit in 0..8 * 2 * frame {
            assert!(through(|wire| wire[bit / 8] ^= 1 << (bit % 8)).is_err(), "bit {bit}");
        }
        assert!(through(|wire| drop(wire.drain(..frame))).is_err());
        assert!(through(|wire| wire.copy_within(..frame, frame)).is_err());
        let huge = u32::try_from(FRAME_BYTES_MAX + 1).unwrap().to_le_bytes();
        let refused = through(|wire| wire[..4].copy_from_slice(&huge));
        assert!(matches!(refused, Err(SessionError::TooLarge(_))));
    }

    #[test]
    fn a_key_file_is_made_once_and_is_its_owners_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let key = Key::of_file(&path).unwrap();
        assert_eq!(Key::of_file(&path).unwrap(), key);
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
        assert!(matches!(Key::of_file(&path), Err(KeyError::Open(_))));
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
        std::fs::write(&path, "short").unwrap();
        assert!(matches!(Key::of_file(&path), Err(KeyError::Form(_))));
        std::fs::remove_file(&path).unwrap();
        let made = std::process::Command::new("mkfifo").arg("-m600").arg(&path).status().unwrap();
        assert!(made.success());
        assert!(matches!(Key::of_file(&path), Err(KeyError::Form(_))), "nobody writes into a pipe");
    }
}
