//! What the operator decides: flags over a configuration file over defaults.

use crate::exit::usage;
use crate::quantity::{Size, duration};
use anyhow::Context;
use clap::{Args, ValueEnum};
use lite_llm_core::config::{Config, Foresight, Placement};
use lite_llm_hw::cold::Io;
use lite_llm_hw::memory;
use lite_llm_hw::node::Computer;
use lite_llm_model::Checkpoint;
use lite_llm_model::checkpoint::Tier;
use lite_llm_model::kernels::{DType, Isa};
use serde::Deserialize;
use std::collections::BTreeMap;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The most compute threads.
const THREADS_MAX: u16 = 1024;

/// How long unfinished requests may go on when the node is told to stop.
const DRAIN_BOUND: Duration = Duration::from_secs(10);
/// The least that a journal may be bounded to.
const JOURNAL_MAX_MIN: u64 = 128 << 10;

/// Rows of a step at most, says the engine.
const ROWS_MAX: u32 = 1024;
/// Bytes of the largest configuration file.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// The modes that every checkpoint has: how many quarters of its tiers, smallest first, each takes.
const MODES: [(&str, usize); 4] = [("fast", 1), ("balanced", 2), ("deep", 3), ("max", 4)];

/// How the model is served.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Runtime")]
pub(crate) struct RuntimeArgs {
    /// Serve from these tiers of the checkpoint, by name; all if left out
    #[arg(long, value_name = "A,B", value_delimiter = ',', conflicts_with = "mode")]
    pub(crate) tierset: Vec<String>,
    /// Serve from the tiers of a mode: fast, balanced, deep, max, or one of the configuration file
    #[arg(long, value_name = "MODE")]
    pub(crate) mode: Option<String>,
    /// Memory that the process may use, in bytes or with KiB, MiB, GiB; three quarters of what is available if left out
    #[arg(long, value_name = "SIZE")]
    pub(crate) memory: Option<Size>,
    /// Memory, of that, for experts that are verified and near at hand, but not where steps read them [default: 0]
    #[arg(long, value_name = "SIZE")]
    pub(crate) warm: Option<Size>,
    /// Positions, over all requests, that memory is kept for; the rest goes to experts [default: those of a single request]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) cache_positions: Option<u32>,
    /// Compute threads; one per core if left out
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=i64::from(THREADS_MAX)))]
    pub(crate) threads: Option<u16>,
    /// Instruction set; the choice changes no bit
    #[arg(long, value_name = "ISA")]
    pub(crate) isa: Option<IsaName>,
    /// Storage type of cached keys and values [default: f32]
    #[arg(long, value_name = "TYPE")]
    pub(crate) kv_type: Option<KvType>,
    /// How experts are read from an imported checkpoint; the best that works here if left out
    #[arg(long, value_name = "WAY")]
    pub(crate) io: Option<IoName>,
    /// Whether experts are loaded, while the disk is idle, that the next layer will probably choose [default: paired]
    #[arg(long, value_name = "WHEN")]
    pub(crate) foresight: Option<ForesightName>,
    /// Positions of a prompt that one step computes [default: 256]
    #[arg(long, value_name = "N")]
    pub(crate) prefill_chunk: Option<u32>,
    /// Seed of ties between experts; a journal keeps the one that it was begun with [default: 0]
    #[arg(long, value_name = "N")]
    pub(crate) routing_seed: Option<u64>,
    /// Records between two snapshots of the state, 0 for none [default: 4096]
    #[arg(long, value_name = "N")]
    pub(crate) snapshot_every: Option<u64>,
    /// Bytes that the journal may grow to; at half of them a snapshot lets old records go
    #[arg(long, value_name = "SIZE")]
    pub(crate) journal_max: Option<Size>,
    /// How long tokens may gather before the journal is synced and they are told; 0s syncs for each [default: 20ms]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) sync_every: Option<Duration>,
    /// How long unfinished requests may go on after SIGTERM or SIGINT [default: 10s]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) drain_bound: Option<Duration>,
    /// Configuration file (TOML); flags go before it
    #[arg(long, value_name = "FILE")]
    pub(crate) config: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum IsaName {
    /// Portable code, the reference
    Scalar,
    /// x86-64 with AVX2, FMA and F16C
    Avx2,
    /// The same with AVX-512 and VNNI, for matrices of integers
    Avx512,
    /// AArch64, of which NEON is a part
    Neon,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum ForesightName {
    /// Never
    Off,
    /// Where steps with it and without, compared now and then, say that it pays
    Paired,
    /// Always
    On,
}

impl From<ForesightName> for Foresight {
    fn from(name: ForesightName) -> Self {
        match name {
            ForesightName::Off => Self::Off,
            ForesightName::Paired => Self::Paired,
            ForesightName::On => Self::On,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum KvType {
    F32,
    Bf16,
    F16,
}

impl From<KvType> for DType {
    fn from(kv: KvType) -> Self {
        match kv {
            KvType::F32 => Self::F32,
            KvType::Bf16 => Self::Bf16,
            KvType::F16 => Self::F16,
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub(crate) enum IoName {
    /// One thread with many direct reads in flight
    Uring,
    /// Threads that each read one expert, past the cache where the file system allows
    Pread,
    /// The same threads, through maps of the files
    Mmap,
    /// The same threads, straight into memory of a GPU (GPUDirect Storage)
    Direct,
}

impl From<IoName> for Io {
    fn from(io: IoName) -> Self {
        match io {
            IoName::Uring => Self::Uring,
            IoName::Pread => Self::Pread,
            IoName::Mmap => Self::Mmap,
            IoName::Direct => Self::Direct,
        }
    }
}

/// The configuration file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct File {
    memory: Option<toml::Value>,
    warm: Option<toml::Value>,
    cache_positions: Option<u32>,
    foresight: Option<ForesightName>,
    threads: Option<u16>,
    isa: Option<IsaName>,
    kv_type: Option<KvType>,
    io: Option<IoName>,
    tierset: Vec<String>,
    mode: Option<String>,
    modes: BTreeMap<String, Vec<String>>,
    placement: BTreeMap<String, PlacementName>,
    prefill_chunk: Option<u32>,
    routing_seed: Option<u64>,
    snapshot_every: Option<u64>,
    journal_max: Option<toml::Value>,
    sync_every: Option<String>,
    drain_bound: Option<String>,
    limits: FileLimits,
}

#[derive(Clone, Copy, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum PlacementName {
    Cold,
    Warm,
    Hot,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct FileLimits {
    requests_max: Option<u32>,
    rows_max: Option<u32>,
    step_positions_max: Option<u32>,
    loads_max: Option<u32>,
    retries_max: Option<u32>,
    finished_max: Option<u32>,
    finished_age_s: Option<u64>,
    tombstones_max: Option<u32>,
    switches_max: Option<u32>,
}

/// Everything that was decided.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) config: Config,
    pub(crate) threads: usize,
    pub(crate) isa: Isa,
    pub(crate) kv_dtype: DType,
    pub(crate) io: Option<Io>,
    pub(crate) computer: Computer,
    /// Whether somebody said how much memory there is.
    pub(crate) memory_is_given: bool,
    pub(crate) journal_bytes: Option<u64>,
    /// How long tokens may gather before the journal is synced; as the node has it if `None`.
    pub(crate) sync_every: Option<Duration>,
    pub(crate) drain_bound: Duration,
}

impl Settings {
    /// Has the cache hold no more than the positions of these requests, unless somebody has said how many.
    pub(crate) fn expect_positions(&mut self, positions: u64) {
        let wanted = u32::try_from(positions).unwrap_or(u32::MAX).max(1);
        self.config.cache_positions.get_or_insert(wanted);
    }

    /// Makes room for the logits of every position of a step, as if it were a row: the memory plan has to know.
    pub(crate) fn expect_all_logits(&mut self) {
        let config = &mut self.config;
        let chunk = config.prefill_chunk.min(config.limits.step_positions_max).min(ROWS_MAX);
        config.prefill_chunk = chunk;
        config.limits.rows_max = config.limits.rows_max.max(chunk);
    }
}

impl RuntimeArgs {
    /// Puts flags, file and defaults together, and checks what can be checked without the engine.
    pub(crate) fn settle(&self, checkpoint: &Checkpoint) -> anyhow::Result<Settings> {
        let file = match &self.config {
            Some(path) => read(path)?,
            None => File::default(),
        };
        if let Some(size) = self.journal_max {
            check_journal_max(size).map_err(|error| usage(format!("--journal-max: {error}")))?;
        }
        let isa = match self.isa.or(file.isa) {
            None => Isa::detect(),
            Some(IsaName::Scalar) => Isa::Scalar,
            Some(IsaName::Avx2) => Isa::Avx2,
            Some(IsaName::Avx512) => Isa::Avx512,
            Some(IsaName::Neon) => Isa::Neon,
        };
        let lacking = match isa {
            Isa::Avx512 => "AVX-512 with VNNI",
            Isa::Neon => "NEON",
            Isa::Avx2 | Isa::Scalar => "AVX2, FMA and F16C",
        };
        anyhow::ensure!(isa.available(), "this machine has no {lacking}; use --isa scalar");
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let time = |key, flag: Option<Duration>, text: &Option<String>| match (flag, text) {
            (None, Some(text)) => {
                duration(text).map(Some).map_err(|error| self.in_file(&format!("{key}: {error}")))
            }
            (flag, _) => Ok(flag),
        };
        let drain_bound = time("drain_bound", self.drain_bound, &file.drain_bound)?.unwrap_or(DRAIN_BOUND);
        let journal_max = match (self.journal_max, &file.journal_max) {
            (Some(size), _) => Some(size),
            (None, Some(value)) => Some(self.size("journal_max", value)?),
            (None, None) => None,
        };
        Ok(Settings {
            journal_bytes: journal_max.map(|size| size.0),
            sync_every: time("sync_every", self.sync_every, &file.sync_every)?,
            threads: self.threads.or(file.threads).map_or(cores, usize::from),
            isa,
            // Not the type of the weights: a cache that rounds is a choice, and the published oracles do not make it.
            kv_dtype: self.kv_type.or(file.kv_type).map_or(DType::F32, DType::from),
            io: self.io.or(file.io).map(Io::from),
            computer: Computer::Cpu,
            memory_is_given: self.memory.is_some() || file.memory.is_some(),
            drain_bound,
            config: self.engine_config(file, checkpoint.tiers())?,
        })
    }

    /// An error in the configuration file.
    fn in_file(&self, what: &str) -> anyhow::Error {
        let path = self.config.as_deref().unwrap_or(Path::new("")).display();
        usage(format!("in the configuration {path}: {what}"))
    }

    /// A size in the configuration file: a number of bytes, or a text with a unit.
    fn size(&self, key: &str, value: &toml::Value) -> anyhow::Result<Size> {
        let text = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
        let size: Size = text.parse().map_err(|error| self.in_file(&format!("{key}: {error}")))?;
        if key == "journal_max" {
            check_journal_max(size).map_err(|error| self.in_file(&format!("{key}: {error}")))?;
        }
        Ok(size)
    }

    fn engine_config(&self, file: File, tiers: &[Tier]) -> anyhow::Result<Config> {
        let mut config = Config::default();
        let names: Vec<String> = tiers.iter().map(|tier| tier.name.clone()).collect();
        if let Some(memory) = self.memory {
            config.memory_bytes = memory.0;
        } else if let Some(value) = &file.memory {
            config.memory_bytes = self.size("memory", value)?.0;
        } else {
            // What is available changes while we look; a part of it will be there.
            let measured =
                memory::measure().context("cannot tell how much memory there is; give --memory")?;
            config.memory_bytes = measured.available / 4 * 3;
        }
        if let Some(warm) = self.warm {
            config.warm_bytes = warm.0;
        } else if let Some(value) = &file.warm {
            config.warm_bytes = self.size("warm", value)?.0;
        }
        config.cache_positions = self.cache_positions.or(file.cache_positions);
        config.foresight = self.foresight.or(file.foresight).map_or(config.foresight, Into::into);
        config.routing_seed = self.routing_seed.or(file.routing_seed).or(config.routing_seed);
        config.prefill_chunk = self.prefill_chunk.or(file.prefill_chunk).unwrap_or(config.prefill_chunk);
        config.snapshot_every = self.snapshot_every.or(file.snapshot_every).unwrap_or(config.snapshot_every);
        config.modes = if file.modes.is_empty() { modes(&names) } else { file.modes };
        config.placement = tiers.iter().map(|tier| (tier.name.clone(), tier.placement)).collect();
        for (tier, placement) in file.placement {
            let placement = match placement {
                PlacementName::Cold => Placement::Cold,
                PlacementName::Warm => Placement::Warm,
                PlacementName::Hot => Placement::Hot,
            };
            config.placement.insert(tier, placement);
        }
        let limits = &mut config.limits;
        for (given, limit) in [
            (file.limits.requests_max, &mut limits.requests_max),
            (file.limits.rows_max, &mut limits.rows_max),
            (file.limits.step_positions_max, &mut limits.step_positions_max),
            (file.limits.loads_max, &mut limits.loads_max),
            (file.limits.retries_max, &mut limits.retries_max),
            (file.limits.finished_max, &mut limits.finished_max),
            (file.limits.tombstones_max, &mut limits.tombstones_max),
            (file.limits.switches_max, &mut limits.switches_max),
        ] {
            *limit = given.unwrap_or(*limit);
        }
        if let Some(seconds) = file.limits.finished_age_s {
            limits.finished_age_ns = seconds.saturating_mul(1_000_000_000);
        }
        let named =
            config.modes.iter().flat_map(|(mode, tiers)| tiers.iter().map(move |tier| (mode.as_str(), tier)));
        let placed = config.placement.keys().map(|tier| ("placement", tier));
        if let Some((key, unknown)) = named.chain(placed).find(|(_, tier)| !names.contains(tier)) {
            return Err(self.in_file(&format!("{key}: {}", no_tier(unknown, &names))));
        }
        let no_mode = |mode: &str| {
            let known: Vec<&str> = config.modes.keys().map(String::as_str).collect();
            format!("unknown mode {mode:?}; there are {}", known.join(", "))
        };
        let unknown =
            |set: &[String]| set.iter().find(|tier| !names.contains(tier)).map(|tier| no_tier(tier, &names));
        config.tier_set = match (&self.mode, &file.mode) {
            _ if !self.tierset.is_empty() => {
                unknown(&self.tierset).map_or(Ok(()), |what| Err(usage(what)))?;
                self.tierset.clone()
            }
            (Some(mode), _) => config.modes.get(mode).cloned().ok_or_else(|| usage(no_mode(mode)))?,
            (None, Some(mode)) => {
                config.modes.get(mode).cloned().ok_or_else(|| self.in_file(&no_mode(mode)))?
            }
            (None, None) => {
                unknown(&file.tierset)
                    .map_or(Ok(()), |what| Err(self.in_file(&format!("tierset: {what}"))))?;
                file.tierset
            }
        };
        // Limits have no flags; a chunk has both.
        config.check().map_err(|error| match &self.config {
            Some(path) => usage(format!("in the flags or the configuration {}: {error}", path.display())),
            None => usage(error),
        })?;
        Ok(config)
    }
}

/// The words for a tier that is not there.
pub(crate) fn no_tier(name: &str, known: &[String]) -> String {
    format!("unknown tier {name:?}; this checkpoint has {}", known.join(", "))
}

/// Reads no more than a configuration file may have: a device has no end. What is wrong in it is named with the file.
fn read(path: &Path) -> anyhow::Result<File> {
    let cannot = || format!("cannot read the configuration {}", path.display());
    let mut text = String::new();
    let opened = std::fs::File::open(path).with_context(cannot)?;
    opened.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).with_context(cannot)?;
    let in_file = |what: &str| usage(format!("in the configuration {}: {what}", path.display()));
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(in_file("it is longer than any configuration (1 MiB)"));
    }
    let file: File = toml::from_str(&text).map_err(|error| in_file(&error.to_string()))?;
    file.check().map_err(|error| in_file(&error))?;
    Ok(file)
}

impl File {
    /// Checks what flags check when they are parsed.
    fn check(&self) -> Result<(), String> {
        if let Some(threads) = self.threads.filter(|threads| !(1..=THREADS_MAX).contains(threads)) {
            return Err(format!("threads is {threads}; it must be 1 to {THREADS_MAX}"));
        }
        if self.mode.is_some() && !self.tierset.is_empty() {
            return Err("both tierset and mode are given; leave one of them out".into());
        }
        if let Some((mode, _)) = self.modes.iter().find(|(_, tiers)| tiers.is_empty()) {
            return Err(format!("modes.{mode} has no tiers; name at least one"));
        }
        Ok(())
    }
}

/// The journal is cut at snapshots: a bound below a few groups of records would ask for one after the other.
fn check_journal_max(size: Size) -> Result<(), String> {
    if size.0 < JOURNAL_MAX_MIN {
        return Err(format!("{} is too little; give at least {}", size, Size(JOURNAL_MAX_MIN)));
    }
    Ok(())
}

/// The modes of a checkpoint whose configuration names none.
fn modes(tiers: &[String]) -> BTreeMap<String, Vec<String>> {
    MODES
        .iter()
        .map(|&(mode, quarters)| {
            let count = (tiers.len() * quarters).div_ceil(4);
            (mode.to_owned(), tiers[..count].to_vec())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_take_more_tiers_from_fast_to_max() {
        let tiers: Vec<String> = ["a", "b", "c"].map(String::from).to_vec();
        let modes = modes(&tiers);
        assert_eq!(modes["fast"], ["a"]);
        assert_eq!(modes["balanced"], ["a", "b"]);
        assert_eq!(modes["deep"], ["a", "b", "c"]);
        assert_eq!(modes["max"], ["a", "b", "c"]);
    }

    #[test]
    fn file_refuses_unknown_keys() {
        assert!(toml::from_str::<File>("memory = \"1GiB\"\n[limits]\nrows_max = 4\n").is_ok());
        let error = toml::from_str::<File>("memroy = 1\n").expect_err("a misspelt key").to_string();
        assert!(error.contains("memroy"), "{error}");
    }
}
