//! Captured logits and routes of one request, written as safetensors.

use crate::whole_file::write_whole;
use anyhow::Context;
use lite_llm_model::Capture;
use safetensors::tensor::{Dtype, TensorView, serialize};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Logits by position.
type Logits = BTreeMap<u32, Vec<f32>>;
/// Experts and weights by layer and position.
type Routes = BTreeMap<(u32, u32), (Vec<u32>, Vec<f32>)>;

#[derive(Debug, Default)]
struct Seen {
    /// Which request is wanted; the newest if it was not there before.
    wanted: Option<u64>,
    logits: BTreeMap<u64, Logits>,
    routes: BTreeMap<u64, Routes>,
}

/// Keeps what one request of a node computes. A recomputed position overwrites itself, with the same bits.
#[derive(Clone, Debug)]
pub(crate) struct Recorder {
    /// Positions whose logits are wanted: those of the prompt, or none.
    logits_positions: u32,
    /// Whether routes are wanted.
    routes: bool,
    seen: Arc<Mutex<Seen>>,
}

impl Recorder {
    /// A recorder of some logits and, if wanted, of all routes.
    pub(crate) fn new(logits_positions: u32, routes: bool) -> Self {
        Self { logits_positions, routes, seen: Arc::default() }
    }

    /// Names the request that is wanted, if it is among those that the node had before; otherwise the newest is.
    pub(crate) fn follow(&self, request: Option<u64>) {
        self.seen().wanted = request;
    }

    /// Writes `logits`, f32 `[positions, vocab]`.
    pub(crate) fn write_logits(&self, path: &Path) -> anyhow::Result<()> {
        let mut seen = self.seen();
        let request = seen.wanted.or(seen.logits.keys().next_back().copied()).unwrap_or_default();
        let logits = seen.logits.remove(&request).unwrap_or_default();
        complete(logits.keys().copied(), self.logits_positions)
            .with_context(|| format!("no logits are written to {}", path.display()))?;
        let vocab = logits.values().next().map_or(0, Vec::len);
        let bytes: Vec<u8> = logits.values().flatten().flat_map(|x| x.to_le_bytes()).collect();
        write(path, &[("logits", Dtype::F32, vec![logits.len(), vocab], bytes)])
    }

    /// Writes `experts` (i32) and `weights` (f32), `[layers, positions, k]`, and which `layers` (i32) these are.
    pub(crate) fn write_routes(&self, path: &Path) -> anyhow::Result<()> {
        let mut seen = self.seen();
        let request = seen.wanted.or(seen.routes.keys().next_back().copied()).unwrap_or_default();
        let routes = seen.routes.remove(&request).unwrap_or_default();
        let mut layers: Vec<u32> = routes.keys().map(|(layer, _)| *layer).collect();
        layers.dedup();
        let positions = routes.len() / layers.len().max(1);
        for &layer in &layers {
            let found = routes.range((layer, 0)..=(layer, u32::MAX)).map(|((_, position), _)| *position);
            complete(found, positions as u32)
                .with_context(|| format!("no routes are written to {}", path.display()))?;
        }
        // A tiered router selects fewer where the active tiers have fewer; the rest of the row says so.
        let k = routes.values().map(|(experts, _)| experts.len()).max().unwrap_or(0);
        let routes: Vec<(Vec<i32>, Vec<f32>)> = routes
            .into_values()
            .map(|(experts, mut weights)| {
                let mut experts: Vec<i32> = experts.iter().map(|&expert| expert as i32).collect();
                experts.resize(k, -1);
                weights.resize(k, 0.0);
                (experts, weights)
            })
            .collect();
        let shape = vec![layers.len(), positions, k];
        let experts = routes.iter().flat_map(|(e, _)| e).flat_map(|e| e.to_le_bytes()).collect();
        let weights = routes.iter().flat_map(|(_, w)| w).flat_map(|w| w.to_le_bytes()).collect();
        let names = layers.iter().flat_map(|layer| layer.to_le_bytes()).collect();
        write(
            path,
            &[
                ("experts", Dtype::I32, shape.clone(), experts),
                ("layers", Dtype::I32, vec![layers.len()], names),
                ("weights", Dtype::F32, shape, weights),
            ],
        )
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Every position from 0, or the request was finished before and nothing was computed.
fn complete(found: impl Iterator<Item = u32>, count: u32) -> anyhow::Result<()> {
    let found: Vec<u32> = found.collect();
    anyhow::ensure!(
        !found.is_empty() && found.iter().copied().eq(0..count),
        "only {} of {count} positions were computed in this run; a finished request is returned from the journal \
         without being computed, so use a new --request-id",
        found.len()
    );
    Ok(())
}

impl Capture for Recorder {
    fn wants_logits(&self, _request: u64) -> bool {
        self.logits_positions > 0
    }

    fn logits(&mut self, request: u64, position: u32, logits: &[f32]) {
        if position < self.logits_positions {
            self.seen().logits.entry(request).or_default().insert(position, logits.to_vec());
        }
    }

    fn routes(&mut self, request: u64, layer: u32, position: u32, experts: &[u32], weights: &[f32]) {
        if self.routes {
            let value = (experts.to_vec(), weights.to_vec());
            self.seen().routes.entry(request).or_default().insert((layer, position), value);
        }
    }
}

fn write(path: &Path, tensors: &[(&str, Dtype, Vec<usize>, Vec<u8>)]) -> anyhow::Result<()> {
    let mut views = Vec::new();
    for (name, dtype, shape, bytes) in tensors {
        views.push((*name, TensorView::new(*dtype, shape.clone(), bytes)?));
    }
    let bytes = serialize(views, None)?;
    write_whole(path, &bytes)
}
