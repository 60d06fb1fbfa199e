//! The agent of a node on another machine: it starts and ends the node's process for the supervisor, and tells how lives
//! ended and what they left. It decides nothing, and says everything until it is confirmed.

use super::ClusterError;
use super::processes::Processes;
use super::said::{AgentSays, Ended, Said, Wanted};
use crate::net::{Key, Mesh};
use crate::node::NodeError;
use crate::supervisor::JournalTail;
use lite_llm_core::cluster::membership::{Member, NodeId};
use lite_llm_core::ids::Seq;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

/// Time between two words to the supervisor.
const SAY_EVERY: Duration = Duration::from_millis(100);
/// Time between two looks at the process.
const LOOK_EVERY: Duration = Duration::from_millis(20);
const MESSAGES_MAX: usize = 64;

/// Makes the command of a life: its member, where the supervisor listens, what all nodes are started with, its directory.
pub type LifeCommand = Box<dyn FnMut(Member, SocketAddr, &str, &Path) -> std::io::Result<Command>>;

/// What an agent is started with.
pub struct AgentOptions {
    /// Where the node's directory is.
    pub state_dir: PathBuf,
    /// Where the supervisor listens.
    pub supervisor: SocketAddr,
    /// Where to listen.
    pub listen: SocketAddr,
    /// What all processes of the cluster share.
    pub key: Key,
    /// How the node's process is started.
    pub command: LifeCommand,
    /// Called once the supervisor has said which node this is.
    pub on_joined: Box<dyn FnMut(NodeId)>,
    /// Whether to end: the node's process is ended too.
    pub over: Arc<AtomicBool>,
}

/// Serves the supervisor until it is over, or refused.
///
/// # Errors
/// Why it ended otherwise.
pub fn run(options: AgentOptions) -> Result<(), ClusterError> {
    let AgentOptions { state_dir, supervisor, listen, key, mut command, mut on_joined, over } = options;
    // One agent for a directory: a second would start a second process.
    let _lock = crate::disk::FileDisk::open(&state_dir).map_err(NodeError::from)?;
    let (messages, heard) = sync_channel(MESSAGES_MAX);
    let mesh = Mesh::listen(listen, key, move |bytes: Vec<u8>| match Said::decode(&bytes) {
        Some(Said::Wanted(wanted)) => messages.send(wanted).is_ok(),
        Some(_) => true,
        None => false,
    })?;
    let mut processes = Processes::new(state_dir.clone());
    let mut says = AgentSays { node: former(&state_dir), address: mesh.address(), ended: Vec::new() };
    let (mut joined, mut said, mut looked) = (false, None::<Instant>, Instant::now());
    while !over.load(Ordering::Relaxed) {
        if said.is_none_or(|said| said.elapsed() >= SAY_EVERY) {
            said = Some(Instant::now());
            mesh.send(supervisor, Said::Agent(Box::new(says.clone())).encode());
        }
        match heard.recv_timeout(LOOK_EVERY) {
            Ok(wanted) => {
                let Wanted { node, settings, start, kill, known, refused } = *wanted;
                if let Some(reason) = refused {
                    return Err(ClusterError::Refused(reason));
                }
                if !std::mem::replace(&mut joined, true) {
                    on_joined(node);
                }
                says.node = Some(node);
                says.ended.retain(|ended| !known.contains(&ended.member));
                let over = |member: Member| says.ended.iter().any(|ended| ended.member == member);
                if let Some(member) = start.filter(|member| !over(*member)) {
                    let start = |dir: &Path| command(member, supervisor, &settings, dir);
                    processes.try_start(member, start)?;
                }
                if let Some(member) = kill.filter(|member| !over(*member)) {
                    processes.kill(member);
                }
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return Err(NodeError::Ended.into()),
        }
        if looked.elapsed() >= LOOK_EVERY {
            looked = Instant::now();
            for (member, ending) in processes.poll() {
                let journal = JournalTail::read(&processes.dir(member.node));
                let tail = match &journal.error {
                    Some(error) => Err(error.clone()),
                    None => Ok((journal.last > 0).then_some(Seq(journal.last))),
                };
                let journal = serde_json::to_string(&journal).expect("plain data");
                says.ended.push(Ended { member, ending, tail, journal });
            }
        }
    }
    processes.kill_all();
    Ok(())
}

/// Which node this directory was, if it was one.
fn former(state_dir: &Path) -> Option<NodeId> {
    let names = std::fs::read_dir(state_dir).ok()?.flatten().map(|entry| entry.file_name());
    let numbers = names.filter_map(|name| name.to_str()?.strip_prefix("node-")?.parse().ok());
    numbers.min().map(NodeId)
}
