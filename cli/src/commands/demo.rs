//! `lite-llm demo`: the promise, shown on this machine in a minute. No download: the model is random.
//!
//! A small mixture of experts is written and asked for one undisturbed stream. Then the same request runs in processes
//! that are killed with SIGKILL in mid-token, until one of them finishes. The streams must be equal, the logits too,
//! and the journal of the killed ones must fold, and recompute, to the digests that they wrote.

use crate::commands::replay::prove;
use crate::exit::{Exit, corrupt};
use crate::history::History;
use crate::quantity::Size;
use crate::terminal;
use anyhow::{Context, bail};
use clap::Args;
use lite_llm_core::digest::Digest;
use lite_llm_core::event::{Event, Phase};
use lite_llm_core::input::Input;
use lite_llm_core::output::{Forward, Output};
use lite_llm_model::checkpoint::import::import;
use lite_llm_model::checkpoint::tiers::parse_tiers;
use lite_llm_model::kernels::DType;
use lite_llm_model::synth::{SynthFamily, SynthSpec, synth};
use serde_json::Value;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Tokens of the stream.
const TOKENS: u32 = 400;
/// Processes that are killed before one may finish.
const KILLS: u32 = 5;
/// A process is killed when it has told this many tokens more than those before it.
const TOKENS_PER_LIFE: u64 = 13;
/// Experts of each layer: loaded at the start, loaded where there is room, loaded when they are first chosen.
const TIERS: &str = "small:4:hot,medium:12:warm,large:16:cold";
/// The id of the request.
const REQUEST: &str = "demo";
/// What the model, which knows nothing, is asked.
const PROMPT: &str = "It never forgets where it was: kill it anywhere, and the same bits come back.";

#[derive(Debug, Args)]
pub(crate) struct DemoArgs {
    /// Keep the model, the journals and the logits in this directory
    #[arg(long, value_name = "DIR")]
    keep: Option<PathBuf>,
}

/// Where everything is.
struct Stage {
    model: PathBuf,
    reference: PathBuf,
    killed: PathBuf,
    root: PathBuf,
}

impl DemoArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        let temporary = tempfile::Builder::new().prefix("lite-llm-demo-").tempdir();
        let temporary = temporary.context("cannot make a temporary directory")?;
        let root = match &self.keep {
            Some(dir) => {
                std::fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
                dir.clone()
            }
            None => temporary.path().to_path_buf(),
        };
        let stage = Stage {
            model: root.join("model"),
            reference: root.join("reference"),
            killed: root.join("killed"),
            root,
        };
        stage.play()?;
        if self.keep.is_some() {
            say(format_args!("kept      {}", stage.root.display()))?;
        }
        Ok(Exit::Ok)
    }
}

fn say(line: std::fmt::Arguments<'_>) -> std::io::Result<()> {
    let mut out = terminal::stdout();
    writeln!(out, "{line}")?;
    out.flush()
}

impl Stage {
    fn play(&self) -> anyhow::Result<()> {
        self.write_model()?;
        let reference = self.undisturbed()?;
        let (killed, kills) = self.killed_until_done()?;
        say(format_args!("killed    {kills} times with SIGKILL in mid-token, then finished"))?;
        self.compare(&reference, &killed)?;
        self.compare_rows()?;
        let proof = prove(&self.killed, None, None, 1)?;
        say(format_args!(
            "replay    control: {} records of {} lives fold, a digest at each",
            proof.records.1 - proof.records.0 + 1,
            proof.incarnation
        ))?;
        let proof = prove(&self.killed, Some(&self.model), None, 1)?;
        let (steps, rows, _) = proof.recomputed.unwrap_or_default();
        say(format_args!("          full: {steps} steps recomputed, all {rows} row digests equal"))?;
        say(format_args!("the bits are those of the undisturbed run"))?;
        Ok(())
    }

    fn write_model(&self) -> anyhow::Result<()> {
        if self.model.exists() {
            bail!("{} is there already: keep the demo in another directory", self.model.display());
        }
        let family = SynthFamily::Olmoe;
        let spec = SynthSpec {
            layers: 6,
            hidden: 256,
            heads: 8,
            kv_heads: 8,
            head_dim: 32,
            experts: 32,
            intermediate: 128,
            dtype: DType::Bf16,
            ..SynthSpec::of(family)
        };
        let source = self.root.join("source");
        let report = synth(&source, &spec)?;
        let tiers = parse_tiers(TIERS).map_err(anyhow::Error::msg)?;
        import(&source, &self.model, Some(&tiers), 1, |_, _| {})?;
        say(format_args!(
            "model     olmoe, {} layers of {} experts, {} at a time, {} of random weights",
            spec.layers,
            spec.experts,
            spec.top_k,
            Size(report.bytes)
        ))?;
        Ok(())
    }

    /// A child of this very program.
    fn command(&self, state: &Path, logits: &Path) -> anyhow::Result<Command> {
        let mut command = Command::new(std::env::current_exe().context("cannot find this program")?);
        command.arg("run").arg(&self.model).args(["--prompt", PROMPT]);
        command.args([
            "--max-tokens",
            &TOKENS.to_string(),
            "--ignore-eos",
            "--temperature",
            "0.8",
            "--seed",
            "7",
        ]);
        command
            .args(["--request-id", REQUEST, "--snapshot-every", "0", "--json", "--stream", "--state"])
            .arg(state);
        command.arg("--logits").arg(logits);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Ok(command)
    }

    fn undisturbed(&self) -> anyhow::Result<Life> {
        let life =
            Life::watch(self.command(&self.reference, &self.root.join("reference.safetensors"))?, None)?;
        let Some(result) = &life.result else {
            bail!("the undisturbed run failed: {}", life.complaint.trim());
        };
        self.say_what_was_loaded()?;
        let rate = result["timings"]["tokens_per_s"].as_f64().unwrap_or(0.0);
        say(format_args!("reference {} tokens undisturbed, {rate:.0} a second", life.tokens.len()))?;
        Ok(life)
    }

    /// The load phases of the undisturbed run, from its journal.
    fn say_what_was_loaded(&self) -> anyhow::Result<()> {
        let mut history = History::open(&self.reference)?;
        let (mut found, mut loaded) = (0u64, 0u64);
        history.walk(None, |moment| {
            if let Input::ManifestRead { plan } = moment.input {
                let placement = &moment.engine.view().config().placement;
                for tier in &plan.tiers {
                    let experts = u64::from(tier.experts) * plan.moe_layers.len() as u64;
                    let place = placement.get(&tier.name).copied().unwrap_or_default();
                    let bytes = Size(experts * plan.slot_bytes);
                    say(format_args!("tier      {}: {experts} experts, {bytes}, {place:?}", tier.name))?;
                }
            }
            for output in moment.outputs {
                match output {
                    Output::Event { event: Event::PhaseDone { phase, bytes }, .. }
                        if *bytes > 0 && *phase != Phase::Resources =>
                    {
                        say(format_args!("loaded    {phase:?}: {}", Size(*bytes)))?;
                    }
                    Output::Event { event: Event::StepDone { hits, misses, .. }, .. } => {
                        found += u64::from(*hits);
                        loaded += u64::from(*misses);
                    }
                    _ => {}
                }
            }
            Ok(())
        })?;
        say(format_args!("experts   {found} times found in memory, {loaded} times loaded when chosen"))?;
        Ok(())
    }

    /// Runs the request in process after process, and kills each but the last.
    fn killed_until_done(&self) -> anyhow::Result<(Life, u32)> {
        let logits = self.root.join("killed.safetensors");
        let mut told: BTreeMap<u64, u64> = BTreeMap::new();
        for kills in 0..=KILLS {
            let until = (kills < KILLS).then_some(told.len() as u64 + TOKENS_PER_LIFE);
            let mut life = Life::watch(self.command(&self.killed, &logits)?, until)?;
            for (offset, token) in &life.tokens {
                // A token that was told once is told the same for ever.
                if *told.entry(*offset).or_insert(*token) != *token {
                    return Err(corrupt(format!(
                        "token {offset} of life {kills} is not what was told before"
                    )));
                }
            }
            if life.result.is_some() {
                life.tokens = told;
                return Ok((life, kills));
            }
            if !life.killed {
                bail!("life {kills} failed: {}", life.complaint.trim());
            }
            say(format_args!("          life {}: killed with {} tokens told", kills + 1, told.len()))?;
        }
        bail!("the stream did not end")
    }

    fn compare(&self, reference: &Life, killed: &Life) -> anyhow::Result<()> {
        if reference.tokens != killed.tokens {
            return Err(corrupt(format!(
                "the streams differ: {:?} undisturbed, {:?} killed",
                reference.tokens, killed.tokens
            )));
        }
        let read = |name: &str| {
            let path = self.root.join(name);
            std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
        };
        say(format_args!("equal     {} tokens", killed.tokens.len()))?;
        // A life that was killed when all was computed leaves nothing for the last one to compute.
        if self.root.join("killed.safetensors").exists() {
            let logits = read("reference.safetensors")?;
            if logits != read("killed.safetensors")? {
                return Err(corrupt("the logits of the prompt differ"));
            }
            say(format_args!(
                "          {} of logits over the prompt, bit for bit",
                Size(logits.len() as u64)
            ))?;
        }
        Ok(())
    }

    /// Rows that both journals have computed must have the same digests, in whatever life.
    fn compare_rows(&self) -> anyhow::Result<()> {
        let reference = rows(&self.reference)?;
        let mut common = 0;
        for (row, digest) in rows(&self.killed)? {
            match reference.get(&row) {
                Some(expected) if *expected == digest => common += 1,
                Some(expected) => {
                    return Err(corrupt(format!(
                        "positions {}..{}: digest {digest} where the undisturbed run has {expected}",
                        row.0, row.1
                    )));
                }
                None => {}
            }
        }
        say(format_args!(
            "          {common} step digests (routes, hidden states, logits) in both journals"
        ))?;
        Ok(())
    }
}

/// The digest of each stretch of positions that a journal's steps computed, of their last computation.
fn rows(state: &Path) -> anyhow::Result<BTreeMap<(u32, u32, bool), Digest>> {
    let mut history = History::open(state)?;
    let mut pending: Option<Forward> = None;
    let mut found = BTreeMap::new();
    history.walk(None, |moment| {
        if let Input::Finished { step, attempt, rows, .. } = moment.input
            && let Some(forward) = pending.take().filter(|f| (f.step, f.attempt) == (*step, *attempt))
        {
            for (row, result) in forward.rows.iter().zip(rows) {
                let end = row.start + row.tokens.len() as u32;
                found.insert((row.start, end, row.sample.is_some()), result.digest);
            }
        }
        for output in moment.outputs {
            if let Output::Forward(forward) = output {
                pending = Some(forward.clone());
            }
        }
        Ok(())
    })?;
    Ok(found)
}

/// What one process told.
#[derive(Debug, Default)]
struct Life {
    tokens: BTreeMap<u64, u64>,
    result: Option<Value>,
    killed: bool,
    complaint: String,
}

impl Life {
    /// Runs a process, and kills it once it has told the tokens before `until`.
    fn watch(mut command: Command, until: Option<u64>) -> anyhow::Result<Self> {
        let mut child = command.spawn().context("cannot start a process")?;
        let mut life = Self::default();
        let stdout = child.stdout.take().context("a pipe from the process")?;
        for line in BufReader::new(stdout).lines() {
            // A killed process may leave half a line.
            let Ok(value) = serde_json::from_str::<Value>(&line?) else { continue };
            match (value["offset"].as_u64(), value["token"].as_u64()) {
                (Some(offset), Some(token)) => {
                    life.tokens.insert(offset, token);
                    if !life.killed && until.is_some_and(|until| offset + 1 >= until) {
                        child.kill().context("cannot kill the process")?;
                        life.killed = true;
                    }
                }
                _ if value["tokens"].is_array() => life.result = Some(value),
                _ => {}
            }
        }
        if let Some(mut stderr) = child.stderr.take() {
            read_complaint(&mut stderr, &mut life.complaint)?;
        }
        child.wait().context("cannot wait for the process")?;
        Ok(life)
    }
}

fn read_complaint(from: &mut impl std::io::Read, into: &mut String) -> anyhow::Result<()> {
    std::io::Read::read_to_string(from, into).context("cannot read what the process says")?;
    Ok(())
}
