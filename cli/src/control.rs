//! The runtime API of a running process, over a Unix socket in its state directory: a JSON line asks, a line answers.

use anyhow::{Context, bail};
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::SwitchTarget;
use lite_llm_hw::node::NodeHandle;
use rustix::fs::{Mode, OFlags, open};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// The socket's name in the state directory.
const NAME: &str = "control.sock";
/// Bytes of the longest line.
const LINE_BYTES_MAX: u64 = 1 << 20;
/// Clients at once.
const CLIENTS_MAX: usize = 16;
/// How long a client may take to say what it wants.
const ASK_TIMEOUT: Duration = Duration::from_secs(10);

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
}

/// The listening end. Dropped, it is gone from the directory.
#[derive(Debug)]
pub(crate) struct ControlSocket {
    path: PathBuf,
}

impl ControlSocket {
    /// Listens in a state directory that this process has locked.
    pub(crate) fn open(state: &Path, node: NodeHandle) -> anyhow::Result<Self> {
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
            .spawn(move || listen(&listener, &node))
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

fn listen(listener: &UnixListener, node: &NodeHandle) {
    let clients = Arc::new(AtomicUsize::new(0));
    for stream in listener.incoming() {
        let Ok(stream) = stream else { continue };
        if clients.fetch_add(1, Ordering::Relaxed) >= CLIENTS_MAX {
            clients.fetch_sub(1, Ordering::Relaxed);
            answer(&stream, &json!({ "error": "too many clients of the control socket; ask again later" }));
            continue;
        }
        let (node, count) = (node.clone(), Arc::clone(&clients));
        let serve = move || {
            let value = match read_ask(&stream).and_then(|ask| obey(&node, ask)) {
                Ok(value) => json!({ "ok": value }),
                Err(error) => json!({ "error": format!("{error:#}") }),
            };
            answer(&stream, &value);
            count.fetch_sub(1, Ordering::Relaxed);
        };
        if std::thread::Builder::new().name("control".into()).spawn(serve).is_err() {
            clients.fetch_sub(1, Ordering::Relaxed);
        }
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

fn obey(node: &NodeHandle, ask: Ask) -> anyhow::Result<Value> {
    Ok(match ask {
        Ask::Status => status(node)?,
        Ask::Tierset { tiers, at } => switch(node, SwitchTarget::Tiers(tiers), at)?,
        Ask::Mode { mode, at } => switch(node, SwitchTarget::Mode(mode), at)?,
        Ask::Budget { ns, at } => switch(node, SwitchTarget::Budget(ns), at)?,
        Ask::Drain { bound_ms } => {
            node.drain(bound_ms.map(Duration::from_millis))?;
            json!({ "draining": true })
        }
        Ask::Cancel { id } => {
            node.cancel(request_id(&id)?)?;
            json!({ "cancelled": id })
        }
        Ask::Snapshot => json!({ "snapshot_before": node.snapshot()?.0 }),
    })
}

fn switch(node: &NodeHandle, target: SwitchTarget, at: Option<(String, u32)>) -> anyhow::Result<Value> {
    let at = match at {
        Some((id, position)) => Some((request_id(&id)?, position)),
        None => None,
    };
    match node.switch(target, at).recv() {
        Ok(Ok(generation)) => Ok(json!({ "generation": generation.0 })),
        Ok(Err(reason)) => bail!("{reason}"),
        Err(_) => bail!("the process ended before the switch"),
    }
}

fn request_id(id: &str) -> anyhow::Result<RequestId> {
    RequestId::new(id).map_err(anyhow::Error::msg)
}

fn status(node: &NodeHandle) -> anyhow::Result<Value> {
    let status = node.status()?;
    let requests: Vec<Value> = status
        .requests
        .iter()
        .map(|r| {
            json!({
                "id": r.id.as_str(),
                "prompt": r.prompt,
                "generated": r.generated,
                "computed": r.computed,
            })
        })
        .collect();
    Ok(json!({
        "lifecycle": format!("{:?}", status.lifecycle),
        "incarnation": status.incarnation.0,
        "record": status.seq.0,
        "durable": status.durable.0,
        "digest": status.digest.to_string(),
        "generation": status.generation.as_ref().map(|(generation, _)| generation.0),
        "tiers": status.generation.as_ref().map(|(_, tiers)| tiers),
        "routing_seed": status.routing_seed,
        "requests": requests,
        "memory_bytes": status.memory_bytes,
        "resident_bytes": status.resident_bytes,
        "slots": status.carving.slots,
        "slots_ready": status.slots_ready,
        "pages": status.carving.pages,
        "pages_free": status.pages_free,
        "telemetry_dropped": status.telemetry_dropped,
    }))
}

/// Asks the process that has a state directory open.
///
/// # Errors
/// If there is none, or it refuses.
pub(crate) fn ask(state: &Path, ask: &Ask) -> anyhow::Result<Value> {
    anyhow::ensure!(state.is_dir(), "{} is no state directory", state.display());
    let (_directory, short) = short_path(state)?;
    let mut stream = UnixStream::connect(short).with_context(|| {
        format!("no running process answers in {}; start one with `run --state`", state.display())
    })?;
    writeln!(stream, "{}", serde_json::to_string(ask)?)?;
    let mut line = String::new();
    BufReader::new(stream.take(LINE_BYTES_MAX)).read_line(&mut line)?;
    let mut answer: Value =
        serde_json::from_str(&line).context("the process ended before it had answered")?;
    match answer["error"].as_str() {
        Some(error) => bail!("{error}"),
        None => Ok(answer["ok"].take()),
    }
}
