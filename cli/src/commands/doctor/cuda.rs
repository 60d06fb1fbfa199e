//! `lite-llm doctor --device cuda`: which GPUs there are, whether the kernels compile for them, and whether they give the golden bits
//! there.

use crate::exit::Exit;
use crate::quantity::Size;
use crate::terminal::stdout;
use lite_llm_hw::cold::direct_report;
use lite_llm_hw::cuda::cache::{Built, Cache, Origin};
use lite_llm_hw::cuda::kernels::Target;
use lite_llm_hw::cuda::nvrtc::Nvrtc;
use lite_llm_hw::cuda::self_test::{Tried, try_exponential, try_kernels};
use lite_llm_hw::cuda::{Gpu, PATIENCE, driver};
use lite_llm_model::kernels::golden::GOLDEN_EXP;
use serde::Serialize;
use std::collections::BTreeSet;
use std::fmt;
use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

/// What is said last, so that nobody takes a GPU that was found for one that was tried.
const UNTRIED: &str =
    "run --device cuda:N computes on one of them; nobody has tried that on a GPU yet, only on a stand-in";

/// Bytes of a file that is read into a device.
const FILE_BYTES: usize = 64 << 10;

/// What was found.
#[derive(Debug, Serialize)]
struct Findings {
    /// The version of CUDA that the driver knows.
    driver: String,
    devices: Vec<Device>,
    /// The compiler's version, if it is there.
    nvrtc: Option<String>,
    kernels: Vec<Kernels>,
    /// What the kernels give, device by device.
    golden: Vec<Given>,
    /// Why there are not kernels for every device, or which of them are wrong.
    refusal: Option<String>,
    /// Whether a model can run on a GPU.
    runs_models: bool,
}

#[derive(Debug, Serialize)]
struct Device {
    name: String,
    compute_capability: String,
    memory_bytes: u64,
}

/// The kernels for one kind of device.
#[derive(Debug, Serialize)]
struct Kernels {
    target: String,
    sources: usize,
    code_bytes: usize,
    seconds: f64,
    from_cache: bool,
    /// The file that keeps them.
    kept_in: Option<String>,
    /// Why none does.
    not_kept: Option<String>,
    /// There was one that did not verify.
    replaced_damage: bool,
}

/// What the kernels give on a device.
#[derive(Debug, Serialize)]
struct Given {
    device: u32,
    seconds: f64,
    kernels: Vec<Verdict>,
    /// How experts would come to it.
    experts: String,
}

#[derive(Debug, Serialize)]
struct Verdict {
    kernel: String,
    golden: bool,
}

/// Asks driver and compiler, compiles, and tries what was compiled on one device or all; of all inputs of the exponential if
/// `thorough`.
///
/// # Errors
/// If there is no driver, or it has no such device. That kernels do not compile, or are wrong, is a finding, and a failure.
pub(super) fn run(number: Option<u32>, json: bool, thorough: bool) -> anyhow::Result<Exit> {
    let driver = driver::find()?;
    let wanted: Vec<u32> = match number {
        None => (0..driver.devices.len() as u32).collect(),
        Some(number) => vec![number],
    };
    let capabilities = wanted.iter().map(|&number| driver.device(number).map(|device| device.capability));
    let capabilities = capabilities.collect::<Result<BTreeSet<u32>, _>>()?;
    let (major, minor) = driver.version;
    let mut findings = Findings {
        driver: format!("{major}.{minor}"),
        devices: driver.devices.iter().map(Device::of).collect(),
        nvrtc: None,
        kernels: Vec::new(),
        golden: Vec::new(),
        refusal: None,
        runs_models: true,
    };
    let tried = findings
        .compile(&capabilities)
        .and_then(|()| wanted.iter().try_for_each(|&device| findings.try_device(device, thorough)));
    findings.refusal = tried.err().map(|error| error.to_string());
    let mut out = stdout();
    if json {
        writeln!(out, "{}", serde_json::to_string(&findings)?)?;
    } else {
        write!(out, "{findings}")?;
    }
    Ok(if findings.refusal.is_none() { Exit::Ok } else { Exit::Failed })
}

impl Findings {
    fn compile(&mut self, capabilities: &BTreeSet<u32>) -> anyhow::Result<()> {
        let (nvrtc, cache) = (Nvrtc::find()?, Cache::of_user());
        self.nvrtc = Some(nvrtc.number());
        let targets = capabilities.iter().map(|&capability| nvrtc.target(capability));
        for target in targets.collect::<Result<BTreeSet<Target>, _>>()? {
            self.kernels.push(Kernels::of(cache.kernels(&nvrtc, target)?));
        }
        Ok(())
    }
}

impl Findings {
    /// Tries every kernel on a device. All are said; the first that is wrong is the refusal.
    fn try_device(&mut self, device: u32, thorough: bool) -> anyhow::Result<()> {
        let gpu = Gpu::open_untried(device, PATIENCE)?;
        let began = Instant::now();
        let mut tried = try_kernels(&gpu)?;
        tried.push(try_exponential(&gpu, GOLDEN_EXP[usize::from(thorough)])?);
        let seconds = began.elapsed().as_secs_f64();
        let verdict = |tried: &Tried| Verdict { kernel: tried.kernel.clone(), golden: tried.is_right() };
        let (kernels, experts) = (tried.iter().map(verdict).collect(), experts(&gpu));
        self.golden.push(Given { device, seconds, kernels, experts });
        match tried.into_iter().find(|tried| !tried.is_right()) {
            None => Ok(()),
            Some(wrong) => Err(gpu.wrong(wrong).into()),
        }
    }
}

/// How experts would come to a device, tried with a file of the system's temporary directory.
fn experts(gpu: &Arc<Gpu>) -> String {
    let dir = std::env::temp_dir();
    let written = tempfile::NamedTempFile::new().and_then(|mut file| {
        let bytes: Vec<u8> = (0..FILE_BYTES).map(|at| (at % 251) as u8).collect();
        file.write_all(&bytes)?;
        // What is written is read past the cache.
        file.as_file().sync_all()?;
        Ok(file)
    });
    match written {
        Ok(file) => format!("{}; tried in {}", direct_report(gpu, file.path()), dir.display()),
        Err(error) => format!("cannot write a file to read in {}: {error}", dir.display()),
    }
}

impl Device {
    fn of(device: &driver::Device) -> Self {
        let (major, minor) = (device.capability / 10, device.capability % 10);
        Self {
            name: device.name.clone(),
            compute_capability: format!("{major}.{minor}"),
            memory_bytes: device.memory_bytes,
        }
    }
}

impl Kernels {
    fn of(built: Built) -> Self {
        let (from_cache, replaced_damage, kept) = match built.origin {
            Origin::Cache(path) => (true, false, Ok(path)),
            Origin::Compiled { damaged, kept } => (false, damaged, kept),
        };
        let (kept_in, not_kept) = match kept {
            Ok(path) => (Some(path.display().to_string()), None),
            Err(error) => (None, Some(error.to_string())),
        };
        Self {
            target: built.target.to_string(),
            sources: built.modules.len(),
            code_bytes: built.modules.iter().map(|module| module.code.len()).sum(),
            seconds: built.took.as_secs_f64(),
            from_cache,
            kept_in,
            not_kept,
            replaced_damage,
        }
    }
}

impl fmt::Display for Findings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "driver     there, of CUDA {}", self.driver)?;
        for (number, Device { name, compute_capability, memory_bytes }) in self.devices.iter().enumerate() {
            let memory = Size(*memory_bytes);
            writeln!(
                f,
                "device {number:<3} {name}, compute capability {compute_capability}, {memory} of memory"
            )?;
        }
        if let Some(version) = &self.nvrtc {
            writeln!(f, "nvrtc      {version}")?;
        }
        for kernels in &self.kernels {
            writeln!(f, "kernels    {kernels}")?;
        }
        for given in &self.golden {
            writeln!(f, "golden {:<3} {given}", given.device)?;
            writeln!(f, "experts {:<2} {}", given.device, given.experts)?;
        }
        if let Some(refusal) = &self.refusal {
            let what = if self.kernels.is_empty() { "kernels    not compiled" } else { "golden     refused" };
            writeln!(f, "{what}: {refusal}")?;
        }
        writeln!(f, "models     {UNTRIED}")
    }
}

impl fmt::Display for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wrong: Vec<&str> =
            self.kernels.iter().filter(|of| !of.golden).map(|of| of.kernel.as_str()).collect();
        let (all, seconds) = (self.kernels.len(), self.seconds);
        write!(f, "{} of {all} give the golden bits, in {seconds:.2} s", all - wrong.len())?;
        match (&wrong[..], self.kernels.last()) {
            ([], Some(last)) => write!(f, "; the last is {}", last.kernel),
            _ => write!(f, "; not {}", wrong.join(", ")),
        }
    }
}

impl fmt::Display for Kernels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (sources, target, bytes) = (self.sources, &self.target, Size(self.code_bytes as u64));
        let how = if self.from_cache { "from the cache" } else { "compiled" };
        write!(f, "{sources} sources for {target}, {bytes}: {how} in {:.2} s", self.seconds)?;
        if let Some(path) = &self.kept_in {
            write!(f, ", {} {}", if self.from_cache { "in" } else { "kept in" }, path)?;
        }
        if let Some(why) = &self.not_kept {
            write!(f, ", not kept: {why}")?;
        }
        if self.replaced_damage { write!(f, "; what was there did not verify") } else { Ok(()) }
    }
}
