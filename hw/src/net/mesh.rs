//! Everybody's connections: one listener, and a thread for each process that something is sent to.
//!
//! Sending never waits: what a process cannot take is lost, as on any network, and whoever minds says it again.

use super::session::{Key, Receiver, Sender, SessionError};
use std::collections::BTreeMap;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Messages, and their bytes, that may wait for one process.
const WAITING_MAX: usize = 4096;
const WAITING_BYTES_MAX: usize = 512 << 20;
/// Time between two looks at whether anything waits yet.
const SETTLE_EVERY: Duration = Duration::from_millis(2);
/// Connections from others.
const CONNECTIONS_MAX: usize = 512;
/// How long a dial, a handshake and a write may take.
const DIAL_WAIT: Duration = Duration::from_secs(1);
const HANDSHAKE_WAIT: Duration = Duration::from_secs(5);
const WRITE_WAIT: Duration = Duration::from_secs(5);
/// How long a process that could not be reached is left alone.
const REDIAL_PAUSE: Duration = Duration::from_millis(100);
/// A connection on which nothing comes for so long is given up; who has something to say dials again.
const SILENCE_WAIT: Duration = Duration::from_secs(120);

/// Why there is no network.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Nobody can be heard there.
    #[error("cannot listen on {address}: {source}; give another address with --listen")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// A thread cannot be had.
    #[error("cannot start a thread of the network: {0}")]
    Thread(io::Error),
}

/// A process's ends of all its connections.
#[derive(Debug)]
pub struct Mesh {
    address: SocketAddr,
    key: Key,
    lines: Mutex<BTreeMap<SocketAddr, Line>>,
    over: Arc<AtomicBool>,
}

/// What waits for a process, or is being sent.
#[derive(Debug)]
struct Line {
    messages: SyncSender<Vec<u8>>,
    bytes: Arc<AtomicUsize>,
}

impl Mesh {
    /// Listens, and hands on every message whose sender has the key. `heard` may wait; its sender then waits too. It returns
    /// whether anybody hears more.
    ///
    /// # Errors
    /// If the address cannot be had.
    pub fn listen(
        address: SocketAddr,
        key: Key,
        heard: impl Fn(Vec<u8>) -> bool + Clone + Send + 'static,
    ) -> Result<Self, NetError> {
        let failed = |source| NetError::Listen { address, source };
        let listener = TcpListener::bind(address).map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let over = Arc::new(AtomicBool::new(false));
        let mesh = Self { address, key: key.clone(), lines: Mutex::default(), over: Arc::clone(&over) };
        let accept = move || {
            let connections = Arc::new(AtomicUsize::new(0));
            for stream in listener.incoming() {
                if over.load(Ordering::Relaxed) {
                    return;
                }
                // One that is gone already, or one too many.
                let Ok(stream) = stream else { continue };
                if connections.fetch_add(1, Ordering::Relaxed) >= CONNECTIONS_MAX {
                    connections.fetch_sub(1, Ordering::Relaxed);
                    continue;
                }
                let (key, heard, counted) = (key.clone(), heard.clone(), Arc::clone(&connections));
                let serve = move || {
                    // Why it is over is the business of whoever dials again.
                    let _ = serve(&stream, &key, &heard);
                    counted.fetch_sub(1, Ordering::Relaxed);
                };
                if std::thread::Builder::new().name("hears".into()).spawn(serve).is_err() {
                    connections.fetch_sub(1, Ordering::Relaxed);
                }
            }
        };
        std::thread::Builder::new().name("listener".into()).spawn(accept).map_err(NetError::Thread)?;
        Ok(mesh)
    }

    /// Where it listens.
    pub const fn address(&self) -> SocketAddr {
        self.address
    }

    /// Sends a message, or loses it.
    pub fn send(&self, to: SocketAddr, message: Vec<u8>) {
        let mut lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
        let line = match lines.entry(to) {
            std::collections::btree_map::Entry::Occupied(line) => line.into_mut(),
            std::collections::btree_map::Entry::Vacant(place) => match self.line(to) {
                Ok(line) => place.insert(line),
                Err(_) => return,
            },
        };
        let size = message.len();
        if line.bytes.fetch_add(size, Ordering::Relaxed) + size > WAITING_BYTES_MAX {
            line.bytes.fetch_sub(size, Ordering::Relaxed);
            return;
        }
        match line.messages.try_send(message) {
            Ok(()) => {}
            Err(TrySendError::Full(_)) => {
                line.bytes.fetch_sub(size, Ordering::Relaxed);
            }
            Err(TrySendError::Disconnected(_)) => {
                lines.remove(&to);
            }
        }
    }

    /// Waits until all that was sent is on its way, for as long as is given at most: says whether it is. Who ends at once after its
    /// last word has not said it.
    pub fn settle(&self, wait: Duration) -> bool {
        let began = Instant::now();
        loop {
            let lines = self.lines.lock().unwrap_or_else(PoisonError::into_inner);
            if lines.values().all(|line| line.bytes.load(Ordering::Acquire) == 0) {
                return true;
            }
            drop(lines);
            if began.elapsed() >= wait {
                return false;
            }
            std::thread::sleep(SETTLE_EVERY);
        }
    }

    fn line(&self, to: SocketAddr) -> io::Result<Line> {
        let (messages, waiting) = sync_channel::<Vec<u8>>(WAITING_MAX);
        let bytes = Arc::new(AtomicUsize::new(0));
        let (key, counted) = (self.key.clone(), Arc::clone(&bytes));
        let carry = move || {
            let mut session: Option<Sender<TcpStream>> = None;
            let mut left_alone = Instant::now();
            // Who has nothing to hear for long may be gone for good; one that is told again has another thread.
            while let Ok(message) = waiting.recv_timeout(SILENCE_WAIT) {
                if session.is_none() && Instant::now() >= left_alone {
                    session = dial(to, &key).ok();
                    left_alone = Instant::now() + REDIAL_PAUSE;
                }
                if session.as_mut().is_some_and(|session| session.send(&message).is_err()) {
                    session = None;
                }
                // Only now: what is on its way no longer waits.
                counted.fetch_sub(message.len(), Ordering::Release);
            }
        };
        std::thread::Builder::new().name("tells".into()).spawn(carry)?;
        Ok(Line { messages, bytes })
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.over.store(true, Ordering::Relaxed);
        // The listener wakes up and finds that it is over.
        let _ = TcpStream::connect_timeout(&self.address, DIAL_WAIT);
    }
}

fn dial(to: SocketAddr, key: &Key) -> Result<Sender<TcpStream>, SessionError> {
    let stream = TcpStream::connect_timeout(&to, DIAL_WAIT)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HANDSHAKE_WAIT))?;
    stream.set_write_timeout(Some(WRITE_WAIT))?;
    Sender::begin(stream, key)
}

fn serve(stream: &TcpStream, key: &Key, heard: &impl Fn(Vec<u8>) -> bool) -> Result<(), SessionError> {
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HANDSHAKE_WAIT))?;
    stream.set_write_timeout(Some(HANDSHAKE_WAIT))?;
    let mut session = Receiver::begin(stream, key)?;
    stream.set_read_timeout(Some(SILENCE_WAIT))?;
    while heard(session.receive()?) {}
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    fn mesh(address: SocketAddr, key: &Key) -> (Mesh, Receiver<Vec<u8>>) {
        let (sender, receiver) = channel();
        let mesh = Mesh::listen(address, key.clone(), move |bytes| sender.send(bytes).is_ok()).unwrap();
        (mesh, receiver)
    }

    fn key(dir: &std::path::Path, name: &str) -> Key {
        Key::of_file(&dir.join(name)).unwrap()
    }

    #[test]
    fn a_process_that_comes_back_is_heard_and_told_again() {
        let dir = tempfile::tempdir().unwrap();
        let (own, foreign) = (key(dir.path(), "own"), key(dir.path(), "foreign"));
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        let (a, _) = mesh(any, &own);
        let (stranger, _) = mesh(any, &foreign);
        let (b, heard) = mesh(any, &own);
        let at = b.address();
        let wait = Duration::from_secs(20);
        stranger.send(at, b"from a stranger".to_vec());
        a.send(at, b"first".to_vec());
        assert_eq!(heard.recv_timeout(wait).unwrap(), b"first");
        drop((b, heard));
        // The address may be in use for a moment yet.
        let began = Instant::now();
        let (sender, heard) = channel();
        let _again = loop {
            let sender = sender.clone();
            match Mesh::listen(at, own.clone(), move |bytes| sender.send(bytes).is_ok()) {
                Ok(mesh) => break mesh,
                Err(error) if began.elapsed() > wait => panic!("{error}"),
                Err(_) => std::thread::sleep(Duration::from_millis(10)),
            }
        };
        let told = (0u8..).find(|nth| {
            a.send(at, vec![*nth]);
            heard.recv_timeout(Duration::from_millis(100)).is_ok()
        });
        assert!(told.is_some(), "what is said again arrives at last");
    }

    #[test]
    fn it_settles_once_the_last_word_is_on_its_way() {
        let dir = tempfile::tempdir().unwrap();
        let own = key(dir.path(), "own");
        let any: SocketAddr = "127.0.0.1:0".parse().unwrap();
        // Nothing after the first message is heard before the gate opens, and sockets hold less than the last.
        let (opens, gate) = channel::<()>();
        let gate = Arc::new(Mutex::new(gate));
        let (sender, heard) = channel();
        let hear = move |bytes: Vec<u8>| gate.lock().unwrap().recv().is_err() && sender.send(bytes).is_ok();
        let listening = Mesh::listen(any, own.clone(), hear).unwrap();
        let (speaking, _) = mesh(any, &own);
        assert!(speaking.settle(Duration::ZERO), "nothing was said");
        let said = [vec![1], vec![2; 64 << 20]];
        said.iter().for_each(|message| speaking.send(listening.address(), message.clone()));
        assert!(!speaking.settle(Duration::from_millis(100)), "the last is being sent");
        drop(opens);
        assert!(speaking.settle(Duration::from_secs(60)));
        let wait = Duration::from_secs(60);
        said.iter().for_each(|message| assert_eq!(heard.recv_timeout(wait).as_ref(), Ok(message)));
    }
}
