//! The processes of nodes on this machine: started, ended, and found again by a supervisor that was itself restarted.
//!
//! A node's process inherits a lock on the file `alive` in the node's directory. The lock goes when the process does, however it
//! ends, so whether it lives is known for certain, parent or not; the process writes its id and life into the file.

use super::ClusterError;
use crate::supervisor::JournalTail;
use lite_llm_core::cluster::membership::{Member, NodeId};
use lite_llm_core::cluster::supervisor::Ending;
use lite_llm_core::ids::{Incarnation, Seq};
use rustix::fs::{FlockOperation, flock};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use std::collections::BTreeMap;
use std::fs::{DirBuilder, File, OpenOptions};
use std::io;
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};

/// The file whose lock says that a node's process lives.
const ALIVE_NAME: &str = "alive";
/// The last word of a process that has nothing left to do.
const CLEAN: &str = "clean";
/// The exit code of a bug.
const BUG: i32 = 4;

/// A process that was started.
#[derive(Debug)]
struct Running {
    member: Member,
    /// Ours to wait for; a former supervisor's is not.
    child: Option<Child>,
}

/// The nodes' processes.
#[derive(Debug)]
pub(super) struct Processes {
    state_dir: PathBuf,
    running: BTreeMap<NodeId, Running>,
    /// Ends that are to be told.
    ended: Vec<(Member, Ending)>,
}

impl Processes {
    pub(super) const fn new(state_dir: PathBuf) -> Self {
        Self { state_dir, running: BTreeMap::new(), ended: Vec::new() }
    }

    /// Where a node keeps its journal.
    pub(super) fn dir(&self, node: NodeId) -> PathBuf {
        self.state_dir.join(format!("node-{}", node.0))
    }

    /// Takes over a life that a former supervisor began, whether or not it still runs.
    pub(super) fn adopt(&mut self, member: Member) {
        self.running.insert(member.node, Running { member, child: None });
    }

    /// Starts a life, unless it runs already. One that was begun and is over has ended.
    pub(super) fn start(
        &mut self,
        member: Member,
        command: impl FnOnce(&Path) -> Command,
    ) -> Result<(), ClusterError> {
        self.try_start(member, |dir| Ok(command(dir)))
    }

    /// The same, where the command may not be had.
    pub(super) fn try_start(
        &mut self,
        member: Member,
        command: impl FnOnce(&Path) -> io::Result<Command>,
    ) -> Result<(), ClusterError> {
        if self.running.get(&member.node).is_some_and(|running| running.member == member) {
            return Ok(());
        }
        let dir = self.dir(member.node);
        let failed = |source| ClusterError::Process { what: "start", source };
        DirBuilder::new().recursive(true).mode(0o700).create(&dir).map_err(failed)?;
        let Some(alive) = lock(&dir).map_err(failed)? else {
            // A former supervisor started it: this very life, or one whose end was not asked for.
            self.running.insert(member.node, Running { member, child: None });
            return Ok(());
        };
        if written(&dir).is_some_and(|(_, life, _)| life >= member.incarnation) {
            self.ended.push((member, Ending::Unknown));
            return Ok(());
        }
        // The child has the lock as long as it lives; this process lets go of it.
        fcntl_setfd(&alive, FdFlags::empty()).map_err(|error| failed(error.into()))?;
        let child = command(&dir).and_then(|mut command| command.spawn()).map_err(failed)?;
        drop(alive);
        self.running.insert(member.node, Running { member, child: Some(child) });
        Ok(())
    }

    /// Ends a life; its end is told once it is certain.
    pub(super) fn kill(&mut self, member: Member) {
        let dir = self.dir(member.node);
        let running = self.running.get_mut(&member.node).filter(|running| running.member == member);
        match running {
            // One that has ended already is found so.
            Some(Running { child: Some(child), .. }) => drop(child.kill()),
            Some(Running { child: None, .. }) => kill_foreign(&dir),
            None if matches!(lock(&dir), Ok(None))
                && written(&dir).is_some_and(|(_, life, _)| life == member.incarnation) =>
            {
                kill_foreign(&dir);
                self.running.insert(member.node, Running { member, child: None });
            }
            None => self.ended.push((member, Ending::Unknown)),
        }
    }

    /// Who has ended since the last look, and how.
    pub(super) fn poll(&mut self) -> Vec<(Member, Ending)> {
        let mut ended = std::mem::take(&mut self.ended);
        let dirs: Vec<(NodeId, PathBuf)> = self.running.keys().map(|&node| (node, self.dir(node))).collect();
        for (node, dir) in dirs {
            let running = self.running.get_mut(&node).expect("it was there");
            let ending = match &mut running.child {
                Some(child) => match child.try_wait() {
                    Ok(Some(status)) => Some(ending(status, &dir)),
                    Ok(None) => None,
                    Err(_) => Some(Ending::Unknown),
                },
                // Nobody but its parent is told how it ended, unless it said so itself.
                None => matches!(lock(&dir), Ok(Some(_))).then(|| {
                    let clean = written(&dir)
                        .is_some_and(|(_, life, clean)| clean && life == running.member.incarnation);
                    if clean { Ending::Clean } else { Ending::Unknown }
                }),
            };
            if let Some(ending) = ending {
                ended.push((running.member, ending));
                self.running.remove(&node);
            }
        }
        ended
    }

    /// The process of a life, if it runs here.
    pub(super) fn pid(&self, member: Member) -> Option<u32> {
        let running = self.running.get(&member.node).filter(|running| running.member == member)?;
        match &running.child {
            Some(child) => Some(child.id()),
            None => {
                let (pid, life, _) = written(&self.dir(member.node))?;
                (life == member.incarnation).then(|| pid.as_raw_nonzero().get().unsigned_abs())
            }
        }
    }

    /// Ends everything that runs.
    pub(super) fn kill_all(&mut self) {
        let members: Vec<Member> = self.running.values().map(|running| running.member).collect();
        members.into_iter().for_each(|member| self.kill(member));
    }
}

fn ending(status: ExitStatus, dir: &Path) -> Ending {
    match (status.code(), status.signal()) {
        (Some(0), _) => Ending::Clean,
        (Some(BUG), _) => match JournalTail::read(dir).panic_record {
            Some(record) => Ending::Panic { record: Seq(record) },
            None => Ending::Code(BUG),
        },
        (Some(code), _) => Ending::Code(code),
        (None, Some(signal)) => Ending::Signal(signal),
        (None, None) => Ending::Unknown,
    }
}

/// Takes the lock that says that a process lives; `None` if one does.
fn lock(dir: &Path) -> io::Result<Option<File>> {
    let mut options = OpenOptions::new();
    let file =
        options.read(true).write(true).create(true).truncate(false).mode(0o600).open(dir.join(ALIVE_NAME))?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Ends every node's process in a cluster's state directory, and waits until they are gone.
pub fn end_all(state_dir: &Path) -> io::Result<()> {
    let mut dirs = Vec::new();
    for entry in std::fs::read_dir(state_dir)? {
        let entry = entry?;
        if entry.file_name().as_encoded_bytes().starts_with(b"node-")
            && entry.path().join(ALIVE_NAME).exists()
        {
            dirs.push(entry.path());
        }
    }
    for dir in dirs {
        while lock(&dir)?.is_none() {
            kill_foreign(&dir);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
    }
    Ok(())
}

/// What the last process wrote of itself: its id, its life, and whether it had nothing left to do.
fn written(dir: &Path) -> Option<(Pid, Incarnation, bool)> {
    let text = std::fs::read_to_string(dir.join(ALIVE_NAME)).ok()?;
    let mut words = text.split_whitespace();
    let pid = Pid::from_raw(words.next()?.parse().ok()?)?;
    let life = Incarnation(words.next()?.parse().ok()?);
    Some((pid, life, words.next() == Some(CLEAN)))
}

/// The process of a node says who it is, first of all; and last, that it ends with nothing left to do.
pub(super) fn introduce(dir: &Path, incarnation: Incarnation, clean: bool) -> io::Result<()> {
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(dir.join(ALIVE_NAME))?;
    let end = if clean { CLEAN } else { "" };
    let text = format!("{} {incarnation} {end}", std::process::id());
    std::os::unix::fs::FileExt::write_all_at(&file, text.as_bytes(), 0)
}

/// Ends a process that is not our child. While the lock is held the id is its own, and a descriptor of it stays so.
fn kill_foreign(dir: &Path) {
    let Some((pid, ..)) = written(dir) else { return };
    let Ok(process) = pidfd_open(pid, PidfdFlags::empty()) else { return };
    if matches!(lock(dir), Ok(None)) {
        // One that has ended meanwhile is found so.
        let _ = pidfd_send_signal(&process, Signal::KILL);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use std::time::{Duration, Instant};

    fn member(incarnation: u64) -> Member {
        Member { node: NodeId(0), incarnation: Incarnation(incarnation) }
    }

    /// A process that says who it is, then does as the script says.
    fn script(life: u64, then: &'static str) -> impl FnOnce(&Path) -> Command {
        move |dir: &Path| {
            let mut command = Command::new("sh");
            let alive = dir.join(ALIVE_NAME);
            command.arg("-c").arg(format!("echo $$ {life} > {}; {then}", alive.display()));
            command
        }
    }

    fn wait_for_end(processes: &mut Processes) -> (Member, Ending) {
        let began = Instant::now();
        loop {
            if let Some(end) = processes.poll().pop() {
                return end;
            }
            assert!(began.elapsed() < Duration::from_secs(20));
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    fn ends_are_told_as_they_were() {
        let dir = tempfile::tempdir().unwrap();
        let mut processes = Processes::new(dir.path().to_path_buf());
        for (life, then, expected) in [
            (1, "exit 0", Ending::Clean),
            (2, "exit 7", Ending::Code(7)),
            (3, "kill -9 $$", Ending::Signal(9)),
        ] {
            processes.start(member(life), script(life, then)).unwrap();
            assert_eq!(wait_for_end(&mut processes), (member(life), expected));
        }
        // A life that was begun is not begun again.
        processes.start(member(3), script(3, "exit 0")).unwrap();
        assert_eq!(wait_for_end(&mut processes), (member(3), Ending::Unknown));
        processes.kill(member(3));
        assert_eq!(wait_for_end(&mut processes), (member(3), Ending::Unknown));
    }

    #[test]
    fn a_restarted_supervisor_finds_who_lives_and_can_end_him() {
        let dir = tempfile::tempdir().unwrap();
        let mut first = Processes::new(dir.path().to_path_buf());
        first.start(member(1), script(1, "exec sleep 1000")).unwrap();
        while written(&first.dir(NodeId(0))).is_none() {
            std::thread::sleep(Duration::from_millis(5));
        }
        let mut second = Processes::new(dir.path().to_path_buf());
        second.start(member(1), |_| unreachable!("it lives")).unwrap();
        assert!(second.poll().is_empty() && second.running.len() == 1);
        second.kill(member(1));
        // Its parent has to take note of it, as init would.
        assert_eq!(wait_for_end(&mut first), (member(1), Ending::Signal(9)));
        assert_eq!(wait_for_end(&mut second), (member(1), Ending::Unknown));
    }
}
