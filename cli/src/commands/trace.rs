//! `lite-llm trace`: which experts a text uses.

use crate::exit::{Exit, usage};
use crate::passes::{Passes, TextArgs};
use crate::settings::RuntimeArgs;
use crate::whole_file::write_whole;
use clap::Args;
use lite_llm_model::trace::Trace;
use lite_llm_model::{Capture, Checkpoint};
use std::collections::BTreeMap;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Args)]
pub(crate) struct TraceArgs {
    /// A Hugging Face directory or an imported checkpoint
    model: PathBuf,
    #[command(flatten)]
    text: TextArgs,
    /// Where the trace goes; standard output if left out
    #[arg(long, value_name = "TRACE")]
    out: Option<PathBuf>,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

impl TraceArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        if !self.runtime.tierset.is_empty() || self.runtime.mode.is_some() {
            return Err(usage("a trace is of all tiers: the router must be free to select any expert"));
        }
        let checkpoint = Checkpoint::open(&self.model)?;
        let arch = checkpoint.arch();
        let Some(moe) = &arch.moe else {
            anyhow::bail!("{} is a dense model: it has no experts to trace", self.model.display());
        };
        let mut settings = self.runtime.settle(&checkpoint)?;
        settings.config.tier_set.clear();
        let window = self.text.window(&checkpoint)?;
        let tokens = self.text.read(&checkpoint)?;
        anyhow::ensure!(!tokens.is_empty(), "the text is empty: there is nothing to trace");

        let seen = Seen::default();
        let windows: Vec<&[u32]> = tokens.chunks(window as usize).collect();
        let capture = Box::new(seen.clone());
        let (experts, layers) = (moe.experts as u32, arch.moe_layers());
        let trace = Passes::run(&self.model, &settings, capture, windows.len(), |passes| {
            let mut trace = Trace::new(passes.identity().weights, window, experts, &layers);
            for window in &windows {
                passes.pass(window)?;
                for ((layer, _), (experts, weights)) in std::mem::take(&mut *seen.routes()) {
                    trace.note(layer, &experts, &weights);
                }
                trace.tokens += window.len() as u64;
            }
            Ok(trace)
        })?;
        let mut text = serde_json::to_string(&trace)?;
        text.push('\n');
        match &self.out {
            Some(path) => write_whole(path, text.as_bytes())?,
            None => std::io::stdout().lock().write_all(text.as_bytes())?,
        }
        Ok(Exit::Ok)
    }
}

/// Experts and weights by layer and position.
type Routes = BTreeMap<(u32, u32), (Vec<u32>, Vec<f32>)>;

/// The routes of the window at hand. A position that is computed again overwrites itself, with the same routes.
#[derive(Clone, Debug, Default)]
struct Seen(Arc<Mutex<Routes>>);

impl Seen {
    fn routes(&self) -> MutexGuard<'_, Routes> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Capture for Seen {
    fn wants_logits(&self, _request: u64) -> bool {
        false
    }

    fn logits(&mut self, _request: u64, _position: u32, _logits: &[f32]) {}

    fn routes(&mut self, _request: u64, layer: u32, position: u32, experts: &[u32], weights: &[f32]) {
        Self::routes(self).insert((layer, position), (experts.to_vec(), weights.to_vec()));
    }
}
