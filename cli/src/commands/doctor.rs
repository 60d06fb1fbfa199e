//! `lite-llm doctor`: what this machine can do, measured in seconds, and what to expect of a model on it.

mod cuda;
mod step;

use crate::device::DeviceName;
use crate::exit::{Exit, usage};
use crate::quantity::Size;
use crate::settings::RuntimeArgs;
use crate::terminal::stdout;
use anyhow::Context;
use clap::Args;
use lite_llm_core::carving::carve;
use lite_llm_core::config::Config;
use lite_llm_core::ids::ExpertKey;
use lite_llm_core::plan::ModelPlan;
use lite_llm_hw::bandwidth::memory_read;
use lite_llm_hw::cold::{Cold, Io, trial};
use lite_llm_hw::memory::{self, Memory};
use lite_llm_model::kernels::{CONTRACT_VERSION, Isa, Pool};
use lite_llm_model::trace::Trace;
use lite_llm_model::{Checkpoint, Model, ModelOptions};
use rustix::process::{Resource, getrlimit};
use serde::Serialize;
use std::fmt;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

/// Bytes that memory is measured with, where there are four times as many.
const ROOM_BYTES: u64 = 512 << 20;
const ROOM_BYTES_MIN: u64 = 16 << 20;
/// How long experts are loaded to see how fast they come.
const DISK_TIME: Duration = Duration::from_secs(2);
/// Positions of the request that budgets are said for, unless the flags say how many.
const POSITIONS: u64 = 1024;
/// Experts from one that is loaded to the next: prime, so that all have their turn.
const STRIDE: usize = 7919;
/// Shares of a model's experts that a budget may hold.
const SHARES: [f64; 5] = [1.0, 0.75, 0.5, 0.25, 0.125];

#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// A checkpoint to look at, too
    model: Option<PathBuf>,
    /// Which experts a text uses, as trace wrote it: hits are those of the most used ones
    #[arg(long, value_name = "TRACE", requires = "model")]
    trace: Option<PathBuf>,
    /// What to look at: cpu; cuda for the GPUs that there are, whose kernels are compiled and tried on fixed operands; cuda:N for one
    #[arg(long, value_name = "DEVICE", value_parser = DeviceName::parse, default_value_t)]
    device: DeviceName,
    /// Try the exponential of all 2^32 inputs on a GPU, not of 2^24
    #[arg(long)]
    thorough: bool,
    /// Print one JSON object
    #[arg(long, help_heading = "Output")]
    json: bool,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// What was found.
#[derive(Debug, Serialize)]
struct Findings {
    cores: usize,
    threads: usize,
    isa: String,
    contract: u32,
    memory_bytes: u64,
    available_bytes: u64,
    /// By one thread, and by all.
    dram_bytes_per_s: [f64; 2],
    /// Bytes that a process may lock; no limit if there is none.
    memlock_bytes: Option<u64>,
    /// How experts are read, or would be.
    reading: String,
    model: Option<Prospects>,
}

/// What to expect of a model.
#[derive(Debug, Serialize)]
struct Prospects {
    path: String,
    experts: u64,
    expert_bytes: u64,
    /// Bytes of base parameters that a token reads, and of experts.
    base_bytes_per_token: u64,
    expert_bytes_per_token: u64,
    /// Experts as they are loaded; nothing of a checkpoint that is not imported.
    disk_bytes_per_s: Option<f64>,
    /// How fast products with one row go through weights.
    base_bytes_per_s: f64,
    expert_bytes_per_s: f64,
    /// A token, once every expert that it needs is in memory; nothing if the base parameters have no room to try it.
    step_ms: Option<f64>,
    budgets: Vec<Budget>,
}

/// What to expect of it within a budget.
#[derive(Debug, Serialize)]
struct Budget {
    memory_bytes: u64,
    expert_slots: u32,
    /// By the uses of the trace; without one, as if every expert were as likely as any other.
    hit_rate: f64,
    decode_tokens_per_s: Option<f64>,
}

/// What there is to try a model with.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    threads: usize,
    /// Bytes that speeds are measured with.
    room: usize,
    /// Bytes that could be used now.
    available: u64,
}

impl Sizes {
    /// Whether steps of a model can be computed that needs so many bytes, without its experts.
    fn has_room_for(&self, needed: impl IntoIterator<Item = u64>) -> bool {
        needed.into_iter().fold(self.room as u64, u64::saturating_add) <= self.available
    }
}

impl DoctorArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        if let DeviceName::Cuda(number) = self.device {
            return match self.model {
                None => cuda::run(number, self.json, self.thorough),
                Some(_) => Err(usage(
                    "nothing is measured on a GPU yet, so nothing can be said of a model on one: give --device cuda without a checkpoint",
                )),
            };
        }
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let Memory { total, available } =
            memory::measure().context("cannot tell how much memory there is")?;
        let room = (available / 4).clamp(ROOM_BYTES_MIN, ROOM_BYTES) as usize;
        let (threads, isa, model) = match &self.model {
            None => (cores, Isa::detect(), None),
            Some(path) => {
                let checkpoint = Checkpoint::open(path)?;
                let mut settings = self.runtime.settle(&checkpoint)?;
                settings.expect_positions(POSITIONS.min(u64::from(checkpoint.arch().context)));
                (settings.threads, settings.isa, Some((path, checkpoint, settings)))
            }
        };
        // A machine with other bits serves nothing: that is to be known first.
        Pool::new(threads).self_test(isa)?;
        let read = |threads| memory_read(threads, room).context("cannot have memory to read");
        let dram_bytes_per_s = [read(1)?, read(threads)?];
        let (reading, model) = match model {
            None => (reading()?, None),
            Some((path, checkpoint, settings)) => {
                let options = ModelOptions {
                    threads,
                    isa,
                    kv_dtype: Some(settings.kv_dtype),
                    ..ModelOptions::default()
                };
                let mut model = Model::open(Arc::new(checkpoint), options)?;
                let loader = model.expert_loader();
                let cold = Cold::open(settings.io, &loader, settings.config.memory_bytes)?;
                let report = cold.report().to_owned();
                let sizes = Sizes { threads, room, available };
                let prospects = Prospects::of(path, &mut model, cold, &settings.config, &self.trace, sizes)?;
                (report, Some(prospects))
            }
        };
        let findings = Findings {
            cores,
            threads,
            isa: format!("{isa:?}").to_lowercase(),
            contract: CONTRACT_VERSION,
            memory_bytes: total,
            available_bytes: available,
            dram_bytes_per_s,
            memlock_bytes: getrlimit(Resource::Memlock).current,
            reading,
            model,
        };
        let mut out = stdout();
        if self.json {
            writeln!(out, "{}", serde_json::to_string(&findings)?)?;
        } else {
            write!(out, "{findings}")?;
        }
        Ok(Exit::Ok)
    }
}

/// How experts would be read, tried with a file of the system's temporary directory.
fn reading() -> anyhow::Result<String> {
    let cannot = || format!("cannot write a file to read in {}", std::env::temp_dir().display());
    let mut file = tempfile::NamedTempFile::new().with_context(cannot)?;
    file.write_all(&[0; 4096]).with_context(cannot)?;
    let cold = Cold::of_shards(None, &[file.path().to_path_buf()], ROOM_BYTES)?;
    Ok(match cold.io() {
        Some(Io::Uring) => format!("{}: in {}", cold.report(), std::env::temp_dir().display()),
        _ => cold.report().to_owned(),
    })
}

impl Prospects {
    fn of(
        path: &Path,
        model: &mut Model,
        cold: Cold,
        config: &Config,
        trace: &Option<PathBuf>,
        sizes: Sizes,
    ) -> anyhow::Result<Self> {
        let Sizes { threads, room, .. } = sizes;
        let plan = model.shape(config.limits.step_positions_max, config.limits.rows_max)?;
        let tiers = plan.tier_set(&config.tier_set).map_err(anyhow::Error::msg)?;
        let keys: Vec<ExpertKey> = plan.experts(&tiers).collect();
        let uses = match trace {
            Some(path) => uses(path, model, threads, &keys)?,
            None => vec![1; keys.len()],
        };
        let experts = keys.len() as u64;
        let base_bytes = model.checkpoint().step_bytes()?;
        let expert_bytes = plan.slot_bytes * u64::from(plan.top_k) * plan.moe_layers.len() as u64;
        // Any order will do that is not that of the files: a step needs some experts of each layer.
        let mixed: Vec<ExpertKey> = (0..keys.len()).map(|i| keys[i * STRIDE % keys.len()]).collect();
        let disk = trial::delivered(cold, &model.expert_loader(), &mixed, plan.slot_bytes, DISK_TIME)
            .map_err(anyhow::Error::msg)?;
        let speeds = model.speeds(room)?;
        let needed = plan.base_shards.iter().copied().chain([plan.router_bytes, plan.overhead_bytes]);
        let step = if sizes.has_room_for(needed) {
            Some(step::time(model, &keys, &tiers, room)?.as_secs_f64())
        } else {
            None
        };
        // Products are most of a step.
        let products = base_bytes as f64 / speeds.base + expert_bytes as f64 / speeds.experts;
        let pace = Pace {
            step_s: step.unwrap_or(products),
            layers: plan.moe_layers.len() as u32,
            together: plan.top_k,
            expert_s: plan.slot_bytes as f64 / speeds.experts,
            load_s: disk.map(|disk| plan.slot_bytes as f64 / disk),
        };
        let mut budgets: Vec<Budget> = Vec::new();
        for share in SHARES {
            let Some((memory_bytes, expert_slots)) = budget_for(&plan, config, experts, share) else {
                continue;
            };
            if budgets.last().is_some_and(|budget| budget.expert_slots == expert_slots) {
                continue;
            }
            let hit_rate = share_of_most_used(&uses, expert_slots as usize);
            let decode_tokens_per_s = pace.tokens_per_s(hit_rate);
            budgets.push(Budget { memory_bytes, expert_slots, hit_rate, decode_tokens_per_s });
        }
        Ok(Self {
            path: path.display().to_string(),
            experts,
            expert_bytes: plan.slot_bytes,
            base_bytes_per_token: base_bytes,
            expert_bytes_per_token: expert_bytes,
            disk_bytes_per_s: disk,
            base_bytes_per_s: speeds.base,
            expert_bytes_per_s: speeds.experts,
            step_ms: step.map(|step| step * 1e3),
            budgets,
        })
    }
}

/// How often a text used each expert.
fn uses(path: &Path, model: &Model, threads: usize, keys: &[ExpertKey]) -> anyhow::Result<Vec<u64>> {
    let trace = Trace::read(path).map_err(usage)?;
    let (arch, weights) = (model.arch(), model.checkpoint().weights_digest(threads)?.to_string());
    let experts = arch.moe.as_ref().map_or(0, |moe| moe.experts as u32);
    let refuse = |why| usage(format!("--trace {}: {why}", path.display()));
    trace.check(&weights, experts, &arch.moe_layers()).map_err(refuse)?;
    let counts = |key: &ExpertKey| {
        let layer = trace.layers.iter().find(|layer| layer.layer == key.layer)?;
        let number = model.checkpoint().ordinal(*key)?;
        layer.counts.get(number as usize).copied()
    };
    let counts: Option<Vec<u64>> = keys.iter().map(counts).collect();
    counts.ok_or_else(|| refuse("it lacks counts of experts; trace the text again".into()))
}

/// How much of all use the experts have that are used most, so many of them: what is evicted is what is used least.
fn share_of_most_used(uses: &[u64], slots: usize) -> f64 {
    let all: u64 = uses.iter().sum();
    if all == 0 {
        return 1.0;
    }
    let mut uses = uses.to_vec();
    uses.sort_unstable_by(|a, b| b.cmp(a));
    uses.iter().take(slots).sum::<u64>() as f64 / all as f64
}

/// The least memory with slots for this share of the experts; nothing if no memory has so few.
fn budget_for(plan: &ModelPlan, config: &Config, experts: u64, share: f64) -> Option<(u64, u32)> {
    let wanted = (experts as f64 * share).floor() as u32;
    let slots = |memory_bytes: u64| {
        let config = Config { memory_bytes, ..config.clone() };
        carve(&config, plan, 1).ok().map(|carving| carving.slots)
    };
    // More memory never has fewer slots.
    let (mut few, mut many) = (0u64, 1u64 << 46);
    slots(many).filter(|slots| *slots >= wanted)?;
    while many - few > 1 << 20 {
        let middle = few + (many - few) / 2;
        match slots(middle) {
            Some(slots) if slots >= wanted => many = middle,
            _ => few = middle,
        }
    }
    let slots = slots(many)?;
    (experts == 0 || f64::from(slots) <= experts as f64 * share + 64.0).then_some((many, slots))
}

/// What a token's time is made of.
#[derive(Debug)]
struct Pace {
    /// A step that waits for nothing.
    step_s: f64,
    /// Layers with experts, and how many of them a position selects in one.
    layers: u32,
    together: u32,
    /// Of that step, the products of one expert.
    expert_s: f64,
    /// An expert's way from the disk, among others; nothing if it was not measured.
    load_s: Option<f64>,
}

impl Pace {
    /// Tokens a second, if each selected expert is there with this probability, whichever the others are.
    fn tokens_per_s(&self, hit_rate: f64) -> Option<f64> {
        if hit_rate >= 1.0 || self.layers == 0 {
            return Some(1.0 / self.step_s);
        }
        // Without a disk that was measured nothing can be said.
        let load_s = self.load_s?;
        let miss = 1.0 - hit_rate;
        // How many are missing is binomial.
        let mut ways = 1.0;
        let mut waits = 0.0;
        for missing in 1..=self.together {
            let (there, count) = (self.together - missing, f64::from(missing));
            ways *= (f64::from(there) + 1.0) / count;
            let chance = ways * miss.powi(missing as i32) * hit_rate.powi(there as i32);
            waits += chance * self.wait_s(count, load_s);
        }
        Some(1.0 / (self.step_s + f64::from(self.layers) * waits))
    }

    /// How long a layer waits: those that are there are computed while the others come, and of these each when it has come.
    fn wait_s(&self, missing: f64, load_s: f64) -> f64 {
        let all = f64::from(self.together);
        let first = load_s - (all - missing) * self.expert_s;
        let last = missing * load_s - (all - 1.0) * self.expert_s;
        first.max(last).max(0.0)
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gb = |bytes: f64| format!("{:.1} GB/s", bytes / 1e9);
        let [one, all] = self.dram_bytes_per_s;
        writeln!(f, "cores      {}", self.cores)?;
        writeln!(f, "kernels    {}; they give the bits of numeric contract {}", self.isa, self.contract)?;
        writeln!(f, "memory     {}, {} available", Size(self.memory_bytes), Size(self.available_bytes))?;
        writeln!(f, "reads it   {} with 1 thread, {} with {}", gb(one), gb(all), self.threads)?;
        match self.memlock_bytes {
            None => writeln!(f, "locked     no limit")?,
            Some(bytes) => writeln!(f, "locked     at most {} (ulimit -l)", Size(bytes))?,
        }
        if !self.reading.is_empty() {
            writeln!(f, "disk       {}", self.reading)?;
        }
        self.model.as_ref().map_or(Ok(()), |model| write!(f, "{model}"))
    }
}

impl fmt::Display for Prospects {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gb = |bytes: f64| format!("{:.1} GB/s", bytes / 1e9);
        writeln!(f, "\n{}", self.path)?;
        writeln!(
            f,
            "a token    reads {} of base parameters at {}, {} of experts at {}",
            Size(self.base_bytes_per_token),
            gb(self.base_bytes_per_s),
            Size(self.expert_bytes_per_token),
            gb(self.expert_bytes_per_s)
        )?;
        match self.step_ms {
            Some(ms) => writeln!(f, "           takes {ms:.2} ms, once all that it needs is in memory")?,
            None => writeln!(
                f,
                "           is said by these alone: to try one, its base parameters need more memory than is available"
            )?,
        }
        writeln!(f, "experts    {} of {}", self.experts, Size(self.expert_bytes))?;
        match self.disk_bytes_per_s {
            Some(rate) => writeln!(f, "its disk   delivers experts at {}", gb(rate))?,
            None if self.experts > 0 => {
                writeln!(
                    f,
                    "its disk   not measured: import the checkpoint, then experts are read by themselves"
                )?;
            }
            None => {}
        }
        writeln!(f, "\n--memory     experts in it    hits   tokens/s")?;
        for budget in &self.budgets {
            writeln!(
                f,
                "{:<12} {:>13} {:>5.1} %   {:>8}",
                Size(budget.memory_bytes).to_string().replace(' ', ""),
                budget.expert_slots,
                budget.hit_rate * 100.0,
                budget.decode_tokens_per_s.map_or_else(|| "?".into(), |rate| format!("{rate:.2}"))
            )?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(a: Option<f64>, b: f64) -> bool {
        a.is_some_and(|a| (a / b - 1.0).abs() < 1e-9)
    }

    #[test]
    fn a_model_is_only_tried_where_it_has_room() {
        let sizes = Sizes { threads: 1, room: 10, available: 100 };
        assert!(sizes.has_room_for([60, 30]));
        assert!(!sizes.has_room_for([60, 31]));
        assert!(!sizes.has_room_for([u64::MAX, u64::MAX]));
    }

    #[test]
    fn a_token_waits_for_what_its_layers_lack() {
        let pace = Pace { step_s: 0.01, layers: 2, together: 4, expert_s: 0.001, load_s: Some(0.005) };
        assert!(close(pace.tokens_per_s(1.0), 100.0));
        // All four come one after the other, and only the last one is computed after that.
        assert!(close(pace.tokens_per_s(0.0), 1.0 / (0.01 + 2.0 * (0.020 - 0.003))));
        // One alone comes while three are computed.
        assert!((pace.wait_s(1.0, 0.005) - 0.002).abs() < 1e-12);
        let fast = Pace { load_s: Some(0.0005), ..pace };
        // What comes faster than it is computed is waited for once.
        assert!(close(fast.tokens_per_s(0.0), 1.0 / (0.01 + 2.0 * 0.0005)));
        let one = Pace { together: 1, layers: 1, ..fast };
        assert!(close(one.tokens_per_s(0.5), 1.0 / (0.01 + 0.5 * 0.0005)));
        let unknown = Pace { load_s: None, ..one };
        assert!(unknown.tokens_per_s(0.5).is_none() && close(unknown.tokens_per_s(1.0), 100.0));
    }
}
