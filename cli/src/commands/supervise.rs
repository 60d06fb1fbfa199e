//! `lite-llm supervise`: a run that is started again when it dies.
//!
//! The supervisor owns standard output. It makes state directory and request id once, so that each life goes on where
//! the one before was, and prints each token once, whatever is sent again.

use crate::commands::cluster::ClusterArgs;
use crate::commands::run::RunArgs;
use crate::commands::{Cli, Command as Subcommand};
use crate::exit::{Exit, corrupt, usage};
use crate::state::{StateDir, unique};
use crate::stream::{Format, Printer};
use crate::terminal;
use crate::terminal::tell;
use anyhow::{Context, anyhow};
use clap::Args;
use lite_llm_core::ids::RequestId;
use lite_llm_hw::supervisor::{
    Delivered, Exit as ProcessExit, Outcome, RestartBudget, Supervisor, SupervisorHandle, SupervisorOptions,
    WatchLimits,
};
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::collections::BTreeSet;
use std::ffi::OsString;
use std::io::{self, Write};
use std::os::unix::process::CommandExt;
use std::process::Command;

#[derive(Debug, Args)]
pub(crate) struct SuperviseArgs {
    /// Restarts within ten minutes; one more crash is the end
    #[arg(long, value_name = "N", default_value_t = 10)]
    max_restarts: usize,
    #[command(flatten)]
    cluster: ClusterArgs,
    /// The command to supervise: run ...
    #[arg(last = true, required = true, value_name = "run ...")]
    command: Vec<OsString>,
}

impl SuperviseArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        let Some(run) = parse(&self.command)? else { return Ok(Exit::Ok) };
        if self.cluster.nodes.is_some() {
            return self.cluster.run(run, self.max_restarts);
        }
        if run.state.is_none() && run.batch.out.as_ref().is_some_and(|out| out.exists()) {
            return Err(usage(
                "--out is there already: name another file, or give the --state that wrote it",
            ));
        }
        let id = match (&run.batch.batch, &run.request_id) {
            (Some(_), _) => None,
            (None, Some(id)) => Some(id.clone()),
            (None, None) => Some(RequestId::new(unique("request")).map_err(anyhow::Error::msg)?),
        };
        let state = StateDir::choose(run.state.as_deref())?;
        let ended = self.supervise(&run, &state, id.as_ref());
        state.end(matches!(ended, Ok(Exit::Ok)));
        ended
    }

    fn supervise(&self, run: &RunArgs, state: &StateDir, id: Option<&RequestId>) -> anyhow::Result<Exit> {
        // A directory that is there from the first moment can take the report of a life that died at once.
        state
            .make()
            .with_context(|| format!("cannot make the state directory {}", state.path().display()))?;
        let prompt = stdin_prompt(run)?;
        let program = std::env::current_exe().context("cannot find this program")?;
        let arguments = arguments(run, (state, id), &self.command[1..], prompt.as_ref());
        let supervisor = Supervisor::new(SupervisorOptions {
            state_dir: state.path().to_path_buf(),
            budget: RestartBudget { restarts_max: self.max_restarts, ..RestartBudget::default() },
            limits: WatchLimits::default(),
            pass_stderr: true,
        });
        stop_on_signals(supervisor.handle())?;
        let command = |life| {
            if life > 0 {
                tell!("restart {life}: it goes on from the journal in {}", state.path().display());
            }
            let mut command = Command::new(&program);
            // A terminal's interrupt comes from the supervisor alone, or it would count as the second.
            command.args(&arguments).process_group(0);
            command
        };
        let mut client = Client::of(run);
        let outcome = supervisor.run(command, |line| client.take(line));
        if let Some(error) = client.contradiction.take() {
            return Err(corrupt(error));
        }
        end(&outcome?, state.goes_on(id))
    }
}

/// How the command ends when supervision is over.
fn end(outcome: &Outcome, goes_on: String) -> anyhow::Result<Exit> {
    for report in &outcome.reports {
        tell!("crash report: {}", report.display());
    }
    if let Some(why) = &outcome.gave_up {
        return Err(anyhow!("the run is given up: {why}").context(goes_on));
    }
    Ok(match outcome.exit {
        ProcessExit::Code(0) => Exit::Ok,
        ProcessExit::Code(2) => Exit::Usage,
        ProcessExit::Code(3) => Exit::Corrupt,
        ProcessExit::Code(4) => Exit::Bug,
        ProcessExit::Code(_) | ProcessExit::Signal(_) => Exit::Failed,
    })
}

/// The run to supervise; none if the command only asked for help, which is then printed.
fn parse(command: &[OsString]) -> anyhow::Result<Option<RunArgs>> {
    let whole = std::iter::once(OsString::from("lite-llm")).chain(command.iter().cloned());
    match Cli::of(whole) {
        Ok(Cli { command: Subcommand::Run(run) }) => Ok(Some(*run)),
        Ok(_) => Err(usage("only run can be supervised: lite-llm supervise -- run MODEL ...")),
        Err(error) if !error.use_stderr() => {
            error.print()?;
            Ok(None)
        }
        Err(error) => Err(usage(error.to_string().trim_start_matches("error: ").trim_end().to_owned())),
    }
}

/// The prompt on standard input, which each life needs anew.
fn stdin_prompt(run: &RunArgs) -> anyhow::Result<Option<tempfile::NamedTempFile>> {
    if run.batch.batch.is_some() || !run.prompt.takes_stdin() {
        return Ok(None);
    }
    let text = crate::prompt::stdin_prompt()?;
    let mut file = tempfile::NamedTempFile::new().context("cannot keep the prompt in a temporary file")?;
    file.write_all(text.as_bytes()).context("cannot keep the prompt in a temporary file")?;
    Ok(Some(file))
}

/// What each life is started with: the same, but with the state, the id and the form that a supervisor reads.
fn arguments(
    run: &RunArgs,
    (state, id): (&StateDir, Option<&RequestId>),
    given: &[OsString],
    prompt: Option<&tempfile::NamedTempFile>,
) -> Vec<OsString> {
    let mut all: Vec<OsString> = ["run", "--beats"].map(OsString::from).to_vec();
    if run.state.is_none() {
        all.extend(["--state".into(), state.path().into()]);
    }
    if let Some(id) = id {
        if run.request_id.is_none() {
            all.extend(["--request-id".into(), id.to_string().into()]);
        }
        if !run.stream {
            all.push("--stream".into());
        }
        if !run.json {
            all.push("--json".into());
        }
    }
    if let Some(file) = prompt {
        all.extend(["--prompt-file".into(), file.path().into()]);
    }
    // `--prompt -` has been read.
    let read = |pair: &[OsString]| prompt.is_some() && pair == ["--prompt", "-"];
    let mut at = 0;
    while at < given.len() {
        if at + 1 < given.len() && read(&given[at..at + 2]) {
            at += 2;
        } else {
            all.push(given[at].clone());
            at += 1;
        }
    }
    all
}

/// SIGTERM and SIGINT drain the run and start no other.
fn stop_on_signals(supervisor: SupervisorHandle) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGTERM, SIGINT]).context("cannot listen for signals")?;
    let listen = move || signals.forever().for_each(|_| supervisor.stop());
    std::thread::Builder::new()
        .name("signals".into())
        .spawn(listen)
        .context("cannot start the thread that waits for signals")?;
    Ok(())
}

/// What the user sees of all lives together.
struct Client {
    format: Format,
    printer: Printer<'static>,
    delivered: Delivered,
    /// The text printed so far.
    text: String,
    /// Ids of a batch whose results were printed.
    done: BTreeSet<String>,
    contradiction: Option<String>,
}

impl Client {
    fn of(run: &RunArgs) -> Self {
        let format = Format { stream: run.stream, json: run.json };
        Self {
            format,
            printer: Printer::new(format, None),
            delivered: Delivered::from(run.from_offset),
            text: String::new(),
            done: BTreeSet::new(),
            contradiction: None,
        }
    }

    fn take(&mut self, line: &str) -> io::Result<()> {
        // A life that is killed may leave half a line.
        let Ok(value) = serde_json::from_str::<Value>(line) else { return Ok(()) };
        let number = |key: &str| value[key].as_u64().and_then(|n| u32::try_from(n).ok());
        match (number("offset"), number("token")) {
            (Some(offset), Some(token)) => self.token(offset, token, &value),
            _ if value["tokens"].is_array() && value["request_id"].is_string() => self.end(&value),
            _ => self.batch_line(&value),
        }
    }

    fn token(&mut self, offset: u32, token: u32, value: &Value) -> io::Result<()> {
        match self.delivered.take(offset, token) {
            Ok(true) => {}
            Ok(false) => return Ok(()),
            Err(error) => {
                self.contradiction = Some(error.to_string());
                return Err(io::Error::other(error));
            }
        }
        match value["text"].as_str() {
            Some(piece) if self.format.stream && !self.format.json => {
                self.text.push_str(piece);
                let mut out = terminal::stdout();
                out.write_all(piece.as_bytes())?;
                out.flush()
            }
            Some(_) if self.format.stream => writeln!(terminal::stdout(), "{value}"),
            _ => self.printer.token(offset, token),
        }
    }

    fn end(&mut self, result: &Value) -> io::Result<()> {
        match result["text"].as_str() {
            Some(text) if self.format.stream && !self.format.json => {
                // What was held back for want of the rest of a character.
                let rest = text.strip_prefix(self.text.as_str()).unwrap_or_default();
                writeln!(terminal::stdout(), "{rest}")
            }
            _ => self.printer.end(result),
        }
    }

    fn batch_line(&mut self, value: &Value) -> io::Result<()> {
        match value["id"].as_str() {
            Some(id) if self.done.insert(id.to_owned()) => writeln!(terminal::stdout(), "{value}"),
            _ => Ok(()),
        }
    }
}
