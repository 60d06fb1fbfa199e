//! `lite-llm ctl`: ask a running process, or a cluster of them.

use crate::control::{Ask, ask};
use crate::exit::Exit;
use crate::quantity::duration;
use crate::terminal;
use clap::{Args, Subcommand};
use serde_json::Value;
use std::io::Write;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Debug, Args)]
pub(crate) struct CtlArgs {
    /// The state directory of the running process or cluster
    state: PathBuf,
    #[command(subcommand)]
    what: What,
    /// Print JSON
    #[arg(long, global = true)]
    json: bool,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Serve from these tiers
    Tierset {
        /// Names, separated by commas
        #[arg(value_delimiter = ',', required = true)]
        tiers: Vec<String>,
        #[command(flatten)]
        at: AtArgs,
    },
    /// Serve from the tiers of a mode
    Mode {
        /// fast, balanced, deep, max, or one of the configuration
        mode: String,
        #[command(flatten)]
        at: AtArgs,
    },
    /// Serve from the largest mode whose step takes no longer than this
    Budget {
        /// For instance 20ms
        #[arg(value_parser = duration)]
        step: Duration,
        #[command(flatten)]
        at: AtArgs,
    },
    /// Finish what is there, accept nothing more, stop
    Drain {
        /// Leave what is unfinished after this time to the next process
        #[arg(long, value_name = "DURATION", value_parser = duration)]
        bound: Option<Duration>,
    },
    /// End a request
    Cancel {
        /// Its id
        id: String,
    },
    /// Write a snapshot of the state, so that the journal before it can go
    Snapshot,
    /// Say what the process, or each node of the cluster, is doing
    Status,
    /// Have a node of a cluster begin a new life: the present one is ended, and recorded as ended by the operator
    ///
    /// Its budget of restarts begins anew. A node that was given up is started again: mend what it was given up for first.
    Restart {
        /// Its number
        node: u32,
    },
}

#[derive(Debug, Args)]
struct AtArgs {
    /// The request and its first position that the new tiers compute; the next step of all if left out
    #[arg(long, value_name = "ID:POS")]
    at: Option<At>,
}

/// A position of a request.
#[derive(Clone, Debug)]
struct At(String, u32);

impl std::str::FromStr for At {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (id, position) = text.rsplit_once(':').ok_or("give a request id, a colon and a position")?;
        let position = position.parse().map_err(|_| format!("{position:?} is no position"))?;
        Ok(Self(id.into(), position))
    }
}

impl CtlArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        let pinned = |at: AtArgs| at.at.map(|At(id, position)| (id, position));
        let wanted = match self.what {
            What::Tierset { tiers, at } => Ask::Tierset { tiers, at: pinned(at) },
            What::Mode { mode, at } => Ask::Mode { mode, at: pinned(at) },
            What::Budget { step, at } => {
                Ask::Budget { ns: u64::try_from(step.as_nanos()).unwrap_or(u64::MAX), at: pinned(at) }
            }
            What::Drain { bound } => Ask::Drain {
                bound_ms: bound.map(|bound| u64::try_from(bound.as_millis()).unwrap_or(u64::MAX)),
            },
            What::Cancel { id } => Ask::Cancel { id },
            What::Snapshot => Ask::Snapshot,
            What::Status => Ask::Status,
            What::Restart { node } => Ask::Restart { node },
        };
        let answer = ask(&self.state, &wanted)?;
        let mut out = terminal::stdout();
        if self.json {
            writeln!(out, "{answer}")?;
        } else if let Value::Object(map) = &answer {
            for (key, value) in map {
                match value {
                    Value::Array(items) if items.iter().any(Value::is_object) => {
                        writeln!(out, "{key}")?;
                        items.iter().try_for_each(|item| writeln!(out, "  {}", line(item)))?;
                    }
                    value => writeln!(out, "{key:18} {}", line(value))?,
                }
            }
        }
        Ok(Exit::Ok)
    }
}

/// A value in one line: of an object what it has, without what is null.
fn line(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Array(items) => items.iter().map(line).collect::<Vec<_>>().join(" "),
        Value::Object(map) => {
            let told = map.iter().filter(|(_, value)| !value.is_null());
            told.map(|(key, value)| format!("{key} {}", line(value))).collect::<Vec<_>>().join(", ")
        }
        Value::Null => "-".into(),
        Value::Bool(_) | Value::Number(_) => value.to_string(),
    }
}
