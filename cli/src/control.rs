//! The runtime API of a running process or cluster, over a Unix socket in its state directory: a JSON line asks, a line
//! answers.

mod cluster;
mod process;

use crate::state::is_of_node;
use anyhow::{Context, bail};
use lite_llm_core::ids::RequestId;
use rustix::fs::{Mode, OFlags, open};
use rustix::net::{RecvFlags, recv};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::RecvTimeoutError;
use std::time::Duration;

/// The socket's name in the state directory.
const NAME: &str = "control.sock";
/// Bytes of the longest line.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Clients at once.
const CLIENTS_MAX: usize = 32;
/// Clients that wait for what may never come, so that the others are heard.
const WAITING_MAX: usize = 16;
/// How long a client may take to say what it wants, and to hear the answer.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a client that waits is looked after.
const LOOK_PERIOD: Duration = Duration::from_millis(200);
/// How long a process may take to answer what needs no waiting.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);

/// What can be asked of a running process.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum Ask {
    /// What it is doing.
    Status,
    /// Serve from these tiers, from a position of a request on if one is given.
    Tierset { tiers: Vec<String>, at: Option<(String, u32)> },
    /// Serve from the tiers of a mode.
    Mode { mode: String, at: Option<(String, u32)> },
    /// Serve from the largest mode whose step takes no longer.
    Budget { ns: u64, at: Option<(String, u32)> },
    /// Stop, after what is unfinished or the bound.
    Drain { bound_ms: Option<u64> },
    /// End a request.
    Cancel { id: String },
    /// Write a snapshot.
    Snapshot,
    /// Have a node of a cluster begin a new life.
    Restart { node: u32 },
}

/// Whoever can be asked: a process, or a cluster.
pub(crate) trait Controlled: Clone + Send + 'static {
    /// Does what is asked, and says what came of it.
    fn obey(&self, ask: Ask, client: &Client<'_>) -> anyhow::Result<Value>;
}

/// Who asks, as far as he may have to be waited with.
pub(crate) struct Client<'a> {
    stream: &'a UnixStream,
    waiting: &'a Places,
}

impl Client<'_> {
    /// One of the places of those who wait for what may never come.
    fn place(&self) -> anyhow::Result<Place> {
        self.waiting.take().context("too many clients wait for something to come; ask again later")
    }

    /// Waits for an outcome as long as the client does. Whoever goes leaves it asked for.
    fn wait<T>(
        &self,
        outcome: impl Fn(Duration) -> Result<Result<T, String>, RecvTimeoutError>,
    ) -> anyhow::Result<T> {
        loop {
            match outcome(LOOK_PERIOD) {
                Ok(outcome) => return outcome.map_err(anyhow::Error::msg),
                Err(RecvTimeoutError::Disconnected) => bail!("the process ended before it had answered"),
                Err(RecvTimeoutError::Timeout) => {
                    anyhow::ensure!(!has_gone(self.stream), "nobody waits any more");
                }
            }
        }
    }
}

/// Whether a client has closed its end.
fn has_gone(client: &UnixStream) -> bool {
    let flags = RecvFlags::PEEK | RecvFlags::DONTWAIT;
    matches!(recv(client, &mut [0; 1][..], flags), Ok((_, 0)))
}

fn request_id(id: &str) -> anyhow::Result<RequestId> {
    RequestId::new(id).map_err(anyhow::Error::msg)
}

/// A request and a position of it.
fn pinned(at: Option<(String, u32)>) -> anyhow::Result<Option<(RequestId, u32)>> {
    at.map(|(id, position)| Ok((request_id(&id)?, position))).transpose()
}

/// The listening end. Dropped, it is gone from the directory.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    path: PathBuf,
}

impl ControlSocket {
    /// Listens in a state directory that this process has locked.
    pub(crate) fn open(state: &Path, controlled: impl Controlled) -> anyhow::Result<Self> {
        let path = state.join(NAME);
        // The lock on the directory says that whoever left one there is dead.
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(|| format!("cannot replace {}", path.display()));
            }
            _ => {}
        }
        let (_directory, short) = short_path(state)?;
        let listener = UnixListener::bind(&short)
            .with_context(|| format!("cannot listen on the control socket {}", path.display()))?;
        std::thread::Builder::new()
            .name("control".into())
            .spawn(move || listen(&listener, &controlled))
            .context("cannot start the thread of the control socket")?;
        Ok(Self { path })
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        // A leftover is replaced by the next process.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A path to the socket that fits a socket address however long the directory's is, and what keeps it valid.
fn short_path(state: &Path) -> anyhow::Result<(OwnedFd, PathBuf)> {
    let directory = open(state, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .with_context(|| format!("cannot open {}", state.display()))?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{NAME}", directory.as_raw_fd()));
    Ok((directory, path))
}

fn listen(listener: &UnixListener, controlled: &impl Controlled) {
    let (clients, waiting) = (Places::new(CLIENTS_MAX), Places::new(WAITING_MAX));
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        // A client that stops reading is not waited for.
        let _ = stream.set_write_timeout(Some(ASK_TIMEOUT));
        let Some(place) = clients.take() else {
            answer(&stream, &json!({ "error": "too many clients of the control socket; ask again later" }));
            continue;
        };
        let (controlled, waiting) = (controlled.clone(), waiting.clone());
        let serve = move || {
            let client = Client { stream: &stream, waiting: &waiting };
            let value = match read_ask(&stream).and_then(|ask| controlled.obey(ask, &client)) {
                Ok(value) => json!({ "ok": value }),
                Err(error) => json!({ "error": format!("{error:#}") }),
            };
            answer(&stream, &value);
            drop(place);
        };
        // Without a thread there is no answer, and the client hears the end.
        let _ = std::thread::Builder::new().name("control".into()).spawn(serve);
    }
}

/// So many at once.
#[derive(Clone, Debug)]
struct Places {
    taken: Arc<AtomicUsize>,
    max: usize,
}

/// One of them; free again when dropped.
struct Place(Arc<AtomicUsize>);

impl Places {
    fn new(max: usize) -> Self {
        Self { taken: Arc::default(), max }
    }

    fn take(&self) -> Option<Place> {
        let more = |taken| (taken < self.max).then_some(taken + 1);
        self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Place(Arc::clone(&self.taken)))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

fn answer(mut stream: &UnixStream, value: &Value) {
    // A client that went away hears nothing.
    let _ = writeln!(stream, "{value}");
}

fn read_ask(stream: &UnixStream) -> anyhow::Result<Ask> {
    stream.set_read_timeout(Some(ASK_TIMEOUT))?;
    let mut line = String::new();
    BufReader::new(stream.take(LINE_BYTES_MAX)).read_line(&mut line)?;
    Ok(serde_json::from_str(&line)?)
}

/// Asks the process, or the cluster, that has a state directory open.
///
/// # Errors
/// If there is none, or it refuses.
pub(crate) fn ask(state: &Path, ask: &Ask) -> anyhow::Result<Value> {
    anyhow::ensure!(state.is_dir(), "{} is no state directory", state.display());
    let (_directory, short) = short_path(state)?;
    let mut stream = UnixStream::connect(short).with_context(|| nobody(state))?;
    let silent = || format!("the process in {} does not answer", state.display());
    // A switch waits for its position, or for what it loads; a restart until the former life has certainly ended.
    let waits = match ask {
        Ask::Tierset { .. } | Ask::Mode { .. } | Ask::Budget { .. } | Ask::Restart { .. } => true,
        Ask::Status | Ask::Drain { .. } | Ask::Cancel { .. } | Ask::Snapshot => false,
    };
    if !waits {
        stream.set_read_timeout(Some(ANSWER_TIMEOUT))?;
    }
    stream.set_write_timeout(Some(ANSWER_TIMEOUT))?;
    writeln!(stream, "{}", serde_json::to_string(ask)?).with_context(silent)?;
    let mut line = String::new();
    BufReader::new(stream.take(LINE_BYTES_MAX)).read_line(&mut line).with_context(silent)?;
    let mut answer: Value =
        serde_json::from_str(&line).context("the process ended before it had answered")?;
    match answer["error"].as_str() {
        Some(error) => bail!("{error}"),
        None => Ok(answer["ok"].take()),
    }
}

/// What is said where nobody listens.
fn nobody(state: &Path) -> String {
    if is_of_node(state) {
        return format!(
            "{} is the directory of one node: ask its cluster, in the directory around it",
            state.display()
        );
    }
    format!(
        "no running process answers in {}; start one with `run --state` or `supervise -- run --state`",
        state.display()
    )
}
