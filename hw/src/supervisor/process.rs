//! A process under supervision: started, listened to, killed when its beats stop, recorded, started again.

use std::collections::VecDeque;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process, waitid};

use super::report::{CrashReport, JournalTail};
use super::{Beat, Decision, Exit, Policy, RestartBudget, Verdict, Watch, WatchLimits};

/// Lines of standard error that a report shows.
const STDERR_LINES: usize = 50;
/// Bytes of a line; a longer one is passed on in pieces.
const LINE_BYTES_MAX: u64 = 16 << 20;
/// Lines that may wait to be passed on; then the process waits.
const LINES_MAX: usize = 256;
/// Time between two looks at whether a process that has closed its output has ended.
const END_POLL: Duration = Duration::from_millis(5);

/// How a process is supervised.
#[derive(Clone, Debug)]
pub struct SupervisorOptions {
    /// The node's state directory: its journal is read after a death, and reports are written there.
    pub state_dir: PathBuf,
    /// How often it is started again.
    pub budget: RestartBudget,
    /// How long its silence is borne.
    pub limits: WatchLimits,
    /// Whether its standard error is passed on.
    pub pass_stderr: bool,
}

/// Why supervision ends before the process does.
#[derive(Debug, thiserror::Error)]
pub enum SupervisorError {
    /// The process cannot be started.
    #[error("cannot start the node's process: {0}")]
    Start(io::Error),
    /// It cannot be waited for.
    #[error("cannot wait for the node's process: {0}")]
    Wait(io::Error),
    /// A line could not be passed on.
    #[error("cannot pass on what the node says: {0}")]
    Output(io::Error),
    /// A report cannot be written.
    #[error("cannot record the crash in {}: {source}", state_dir.display())]
    Report {
        /// The state directory.
        state_dir: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// How supervision ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// How the last life ended.
    pub exit: Exit,
    /// Restarts, over all.
    pub restarts: u32,
    /// Why it is not started again, if it should have gone on.
    pub gave_up: Option<String>,
    /// The reports that were written.
    pub reports: Vec<PathBuf>,
}

/// A supervisor.
#[derive(Debug)]
pub struct Supervisor {
    options: SupervisorOptions,
    policy: Policy,
    began: Instant,
    shared: Arc<Shared>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// The process, until just before it is waited for: while it is here, no other can have its id.
    running: Option<Pid>,
    stopping: bool,
}

/// Ends supervision from another thread.
#[derive(Clone, Debug)]
pub struct SupervisorHandle(Arc<Shared>);

impl SupervisorHandle {
    /// Asks the process to stop, as SIGTERM does, and starts no other.
    pub fn stop(&self) {
        let mut state = self.0.state();
        state.stopping = true;
        if let Some(pid) = state.running {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::TERM);
        }
        self.0.wake.notify_all();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits out a pause; `false` if it is broken off because supervision is to end.
    fn pause(&self, pause: Duration) -> bool {
        let waited = self.wake.wait_timeout_while(self.state(), pause, |state| !state.stopping);
        !waited.unwrap_or_else(PoisonError::into_inner).0.stopping
    }
}

/// One life as its supervisor saw it.
struct Life {
    exit: Exit,
    verdict: Verdict,
    progress: Option<u64>,
    stderr: Vec<String>,
}

/// What was heard of a life until it closed its output.
struct Heard {
    verdict: Verdict,
    progress: Option<u64>,
    stderr: JoinHandle<Vec<String>>,
}

impl Supervisor {
    /// A supervisor that has not started anything.
    pub fn new(options: SupervisorOptions) -> Self {
        let policy = Policy::new(options.budget);
        Self { options, policy, began: Instant::now(), shared: Arc::default() }
    }

    /// A handle for other threads.
    pub fn handle(&self) -> SupervisorHandle {
        SupervisorHandle(Arc::clone(&self.shared))
    }

    /// Runs the process that `command` makes, life after life (counted from 0), and gives `on_line` every line of its
    /// standard output that is no beat.
    ///
    /// # Errors
    /// If the process cannot be run, `on_line` fails, or a crash cannot be recorded.
    pub fn run(
        mut self,
        mut command: impl FnMut(u32) -> Command,
        mut on_line: impl FnMut(&str) -> io::Result<()>,
    ) -> Result<Outcome, SupervisorError> {
        let mut reports = Vec::new();
        let mut restarts = 0;
        loop {
            let life = self.live(&mut command(restarts), &mut on_line)?;
            // What happened is recorded before anything is started again.
            let failed_at_ns = since_1970_ns();
            let exit = life.exit;
            let crashed = !matches!(exit, Exit::Code(0..=3));
            let mut panic_record = None;
            if crashed {
                let journal = JournalTail::read(&self.options.state_dir);
                panic_record = journal.panic_record;
                reports.push(self.record(failed_at_ns, life, journal)?);
            }
            let over = |gave_up, reports| Ok(Outcome { exit, restarts, gave_up, reports });
            match self.policy.decide(self.began.elapsed(), exit, panic_record) {
                Decision::Over => return over(None, reports),
                Decision::GiveUp(why) => return over(Some(why), reports),
                Decision::Restart(pause) if self.shared.pause(pause) => restarts += 1,
                Decision::Restart(_) => return over(None, reports),
            }
        }
    }

    fn record(
        &self,
        failed_at_ns: u64,
        life: Life,
        journal: JournalTail,
    ) -> Result<PathBuf, SupervisorError> {
        let Life { exit, verdict, progress, stderr } = life;
        let report = CrashReport { failed_at_ns, exit, verdict, progress, stderr, journal };
        let state_dir = &self.options.state_dir;
        report
            .write(state_dir)
            .map_err(|source| SupervisorError::Report { state_dir: state_dir.clone(), source })
    }

    /// One life of the process.
    fn live(
        &self,
        command: &mut Command,
        on_line: &mut impl FnMut(&str) -> io::Result<()>,
    ) -> Result<Life, SupervisorError> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().map_err(SupervisorError::Start)?;
        {
            let pid = Pid::from_child(&child);
            let mut state = self.shared.state();
            state.running = Some(pid);
            if state.stopping {
                // It is asked as one that was started a moment earlier would have been.
                let _ = kill_process(pid, Signal::TERM);
            }
        }
        let heard = self.listen(&mut child, on_line);
        if !matches!(heard, Ok(Heard { verdict: Verdict::Alive, .. })) || !self.ends(&mut child) {
            // It may have ended by itself.
            let _ = child.kill();
        }
        self.shared.state().running = None;
        let exit = child.wait().map_err(SupervisorError::Wait)?.into();
        let Heard { verdict, progress, stderr } = heard?;
        let stderr = stderr.join().unwrap_or_default();
        Ok(Life { exit, verdict, progress, stderr })
    }

    /// Whether a process that has closed its output ends before its silence is too long.
    fn ends(&self, child: &mut Child) -> bool {
        let deadline = Instant::now() + self.options.limits.silence_max;
        while has_not_ended(child) {
            if Instant::now() >= deadline {
                return false;
            }
            std::thread::sleep(END_POLL);
        }
        true
    }

    /// Passes on what the process says, until it closes its output or its beats stop.
    fn listen(
        &self,
        child: &mut Child,
        on_line: &mut impl FnMut(&str) -> io::Result<()>,
    ) -> Result<Heard, SupervisorError> {
        let (stdout, stderr) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
        let (lines, heard) = sync_channel(LINES_MAX);
        thread("stdout", move || read_lines(stdout, &lines))?;
        let pass = self.options.pass_stderr;
        let stderr = thread("stderr", move || last_lines(stderr, pass))?;

        let mut watch = Watch::new(self.options.limits, self.began.elapsed());
        let mut progress = None;
        loop {
            let wait = watch.next_check().saturating_sub(self.began.elapsed());
            match heard.recv_timeout(wait) {
                Ok(line) => {
                    // Whatever it says is a sign of life.
                    let beat = Beat::parse(&line);
                    watch.beat(self.began.elapsed(), &beat.unwrap_or(Beat::Heart));
                    match beat {
                        Some(Beat::Progress { record, .. }) => progress = Some(record),
                        Some(Beat::Heart) => {}
                        None => on_line(&line).map_err(SupervisorError::Output)?,
                    }
                }
                Err(RecvTimeoutError::Disconnected) => {
                    return Ok(Heard { verdict: Verdict::Alive, progress, stderr });
                }
                Err(RecvTimeoutError::Timeout) => {
                    let verdict = watch.verdict(self.began.elapsed());
                    if verdict != Verdict::Alive {
                        return Ok(Heard { verdict, progress, stderr });
                    }
                }
            }
        }
    }
}

/// Whether the process still runs; it is not yet waited for, so that its id stays its own.
fn has_not_ended(child: &Child) -> bool {
    let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
    matches!(waitid(WaitId::Pid(Pid::from_child(child)), options), Ok(None))
}

fn since_1970_ns() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_nanos()).unwrap_or(u64::MAX)
}

fn thread<T: Send + 'static>(
    name: &str,
    run: impl FnOnce() -> T + Send + 'static,
) -> Result<JoinHandle<T>, SupervisorError> {
    std::thread::Builder::new().name(name.into()).spawn(run).map_err(SupervisorError::Start)
}

/// The next line without its end; `None` when there are no more. What is no UTF-8 is shown as such.
fn next_line(from: &mut impl BufRead) -> Option<String> {
    let mut bytes = Vec::new();
    let read = from.by_ref().take(LINE_BYTES_MAX).read_until(b'\n', &mut bytes).ok()?;
    if read == 0 {
        return None;
    }
    if bytes.last() == Some(&b'\n') {
        bytes.pop();
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

fn read_lines(from: impl Read, lines: &SyncSender<String>) {
    let mut from = BufReader::new(from);
    while let Some(line) = next_line(&mut from) {
        if lines.send(line).is_err() {
            return;
        }
    }
}

/// The last lines, when there are no more.
fn last_lines(from: impl Read, pass: bool) -> Vec<String> {
    let mut from = BufReader::new(from);
    let mut last = VecDeque::new();
    while let Some(line) = next_line(&mut from) {
        if pass {
            // A standard error that is closed is no reason to stop listening.
            let _ = writeln!(io::stderr(), "{line}");
        }
        if last.len() == STDERR_LINES {
            last.pop_front();
        }
        last.push_back(line);
    }
    last.into()
}
