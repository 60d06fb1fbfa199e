//! The subcommands, one file each.

mod batch;
mod bench;
mod cluster;
mod completions;
mod ctl;
mod debug;
mod demo;
mod doctor;
mod import;
mod inspect;
mod node;
mod perplexity;
mod rank;
mod replay;
mod run;
mod sim;
mod supervise;
mod synth;
mod trace;

use crate::exit::Exit;
use clap::{Arg, CommandFactory, FromArgMatches, Parser, Subcommand};
use std::ffi::OsString;

/// Run mixture-of-experts language models that never forget where they were.
#[derive(Debug, Parser)]
#[command(
    name = "lite-llm",
    version,
    after_help = "Exit codes: 0 done; 1 refused or failed; 2 wrong command line or configuration; 3 bytes fail their \
                  verification or a replay diverges; 4 a bug of this program."
)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

impl Cli {
    /// What a command line asks for.
    ///
    /// # Errors
    /// What is wrong with it, or the help that it asks for.
    pub(crate) fn of(line: impl IntoIterator<Item = OsString>) -> Result<Self, clap::Error> {
        let mut matches = negative_numbers_are_values(Self::command()).try_get_matches_from(line)?;
        Self::from_arg_matches_mut(&mut matches)
    }
}

/// Whatever takes a value gets a negative number too, and refuses it by what it may be: it is no unknown flag.
fn negative_numbers_are_values(command: clap::Command) -> clap::Command {
    let value =
        |arg: Arg| if arg.get_action().takes_values() { arg.allow_negative_numbers(true) } else { arg };
    command.mut_args(value).mut_subcommands(negative_numbers_are_values)
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Generate: one request, or a batch of them
    Run(Box<run::RunArgs>),
    /// Run, and start again after a crash; each token is printed once
    Supervise(supervise::SuperviseArgs),
    /// Add a node of this machine to a cluster whose supervisor is on another
    Node(node::NodeArgs),
    /// Ask a running process or cluster to switch tiers, drain, cancel, snapshot, restart a node or tell its status
    Ctl(ctl::CtlArgs),
    /// Verify a journal: fold it again and compare every digest
    Replay(replay::ReplayArgs),
    /// Step through journals, forward and back, and see what each record made of the state
    Debug(debug::DebugArgs),
    /// Say what a checkpoint, state directory, journal segment, snapshot or crash report holds
    Inspect(inspect::InspectArgs),
    /// Turn a Hugging Face directory into a native checkpoint, whole or in tiers
    Import(import::ImportArgs),
    /// Say which experts a text uses, layer by layer
    Trace(Box<trace::TraceArgs>),
    /// Say how well a model predicts a text, under one or all of its TierSets
    Perplexity(Box<perplexity::PerplexityArgs>),
    /// Say what this machine can do, and how fast a model will run on it with how much memory
    Doctor(doctor::DoctorArgs),
    /// Say how fast a model runs here, where the time goes, and what would have been possible
    Bench(Box<bench::BenchArgs>),
    /// Write a random checkpoint of any size
    Synth(synth::SynthArgs),
    /// Run simulated clusters under every fault, and check everything
    Sim(Box<sim::SimArgs>),
    /// Show it all: generate, get killed in mid-token, recover, prove that the bits are the same
    Demo(demo::DemoArgs),
    /// One life of a node; started by supervise or node
    #[command(hide = true)]
    Rank(rank::RankArgs),
    /// Write shell completions to standard output
    Completions(completions::CompletionsArgs),
}

impl Command {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        match self {
            Self::Run(args) => args.run(),
            Self::Supervise(args) => args.run(),
            Self::Ctl(args) => args.run(),
            Self::Replay(args) => args.run(),
            Self::Debug(args) => args.run(),
            Self::Inspect(args) => args.run(),
            Self::Import(args) => args.run(),
            Self::Trace(args) => args.run(),
            Self::Perplexity(args) => args.run(),
            Self::Doctor(args) => args.run(),
            Self::Bench(args) => args.run(),
            Self::Synth(args) => args.run(),
            Self::Sim(args) => args.run(),
            Self::Demo(args) => args.run(),
            Self::Rank(args) => args.run(),
            Self::Node(args) => args.run(),
            Self::Completions(args) => args.run(),
        }
    }
}
