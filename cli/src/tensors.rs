//! Captured logits and routes of one request, written as safetensors.

use crate::whole_file::{aside, put, write_whole};
use anyhow::Context;
use lite_llm_model::Capture;
use safetensors::tensor::{Dtype, Metadata, TensorInfo, TensorView, serialize};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tempfile::NamedTempFile;

/// Experts and weights by layer and position.
type Routes = BTreeMap<(u32, u32), (Vec<u32>, Vec<f32>)>;

/// What is wanted of a request.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// Where the logits of the prompt's positions go.
    pub(crate) logits: Option<PathBuf>,
    /// Where the experts of every position go.
    pub(crate) routes: Option<PathBuf>,
    /// Positions of the prompt.
    pub(crate) prompt: u32,
    /// Layers that have experts.
    pub(crate) layers: usize,
}

/// Which requests are looked at.
#[derive(Debug, Default)]
enum Subject {
    /// It is not known yet which one is wanted.
    #[default]
    All,
    /// This one.
    One(u64),
    /// The one that comes after these.
    After(BTreeSet<u64>),
}

impl Subject {
    fn is(&self, request: u64) -> bool {
        match self {
            Self::All => true,
            Self::One(one) => *one == request,
            Self::After(others) => !others.contains(&request),
        }
    }
}

#[derive(Debug, Default)]
struct Seen {
    subject: Subject,
    logits: BTreeMap<u64, Logits>,
    routes: BTreeMap<u64, Routes>,
}

/// Keeps what one request of a node computes. A recomputed position overwrites itself, with the same bits.
#[derive(Clone, Debug)]
pub(crate) struct Recorder {
    wanted: Wanted,
    seen: Arc<Mutex<Seen>>,
}

impl Recorder {
    pub(crate) fn new(wanted: Wanted) -> Self {
        Self { wanted, seen: Arc::default() }
    }

    /// Looks at one request from here on: at this one, or at the next that is none of the `others`.
    pub(crate) fn follow(&self, request: Option<u64>, others: impl IntoIterator<Item = u64>) {
        let mut seen = self.seen();
        let seen = &mut *seen;
        seen.subject = request.map_or_else(|| Subject::After(others.into_iter().collect()), Subject::One);
        seen.logits.retain(|&request, _| seen.subject.is(request));
        seen.routes.retain(|&request, _| seen.subject.is(request));
    }

    /// Forgets what was seen, and looks at this request.
    pub(crate) fn begin_again(&self, request: u64) {
        *self.seen() = Seen { subject: Subject::One(request), ..Seen::default() };
    }

    /// Whether all that is wanted of a request of so many positions was seen: of one that an earlier process finished,
    /// nothing was.
    pub(crate) fn is_complete(&self, positions: u32) -> bool {
        let seen = self.seen();
        let logits = seen.logits.values().next().map_or(0, |logits| logits.written.len());
        let routes = seen.routes.values().next().map_or(0, BTreeMap::len);
        (self.wanted.logits.is_none() || logits == self.wanted.prompt as usize)
            && (self.wanted.routes.is_none() || routes == self.wanted.layers * positions as usize)
    }

    /// Writes what is wanted.
    ///
    /// # Errors
    /// If something was not seen, or cannot be written.
    pub(crate) fn write(&self, positions: u32) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.is_complete(positions),
            "no tensors are written: some of the {positions} positions were not computed"
        );
        let mut seen = self.seen();
        if let (Some(path), Some((_, logits))) = (&self.wanted.logits, seen.logits.pop_first()) {
            logits.put(path)?;
        }
        if let Some(path) = &self.wanted.routes {
            write_routes(path, seen.routes.pop_first().map(|(_, routes)| routes).unwrap_or_default())?;
        }
        Ok(())
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Capture for Recorder {
    fn wants_logits(&self, request: u64) -> bool {
        self.wanted.logits.is_some() && self.seen().subject.is(request)
    }

    fn logits(&mut self, request: u64, position: u32, logits: &[f32]) {
        let Some(path) = self.wanted.logits.as_deref().filter(|_| position < self.wanted.prompt) else {
            return;
        };
        let mut seen = self.seen();
        let of_request = seen.logits.entry(request).or_default();
        of_request.note(path, self.wanted.prompt, position, logits);
    }

    fn routes(&mut self, request: u64, layer: u32, position: u32, experts: &[u32], weights: &[f32]) {
        let mut seen = self.seen();
        if self.wanted.routes.is_some() && seen.subject.is(request) {
            let value = (experts.to_vec(), weights.to_vec());
            seen.routes.entry(request).or_default().insert((layer, position), value);
        }
    }
}

/// `logits`, f32 `[positions, vocab]`, in a file beside the one that is wanted: the memory plan has no room for them.
#[derive(Debug, Default)]
struct Logits {
    file: Option<NamedTempFile>,
    written: BTreeSet<u32>,
    /// The first thing that went wrong.
    failed: Option<anyhow::Error>,
}

impl Logits {
    fn note(&mut self, path: &Path, positions: u32, position: u32, logits: &[f32]) {
        match self.write(path, positions, position, logits) {
            Err(error) if self.failed.is_none() => self.failed = Some(error),
            _ => {}
        }
        self.written.insert(position);
    }

    fn write(&mut self, path: &Path, positions: u32, position: u32, logits: &[f32]) -> anyhow::Result<()> {
        let row = size_of_val(logits);
        let (shape, end) = (vec![positions as usize, logits.len()], positions as usize * row);
        let info = TensorInfo { dtype: Dtype::F32, shape, data_offsets: (0, end) };
        let header = serde_json::to_vec(&Metadata::new(None, vec![("logits".into(), info)])?)?;
        // The header's length comes first, and tensors begin at a multiple of 8.
        let len = header.len().next_multiple_of(8);
        let file = match &self.file {
            Some(file) => file.as_file(),
            None => {
                let file = self.file.insert(aside(path)?).as_file();
                let mut start = (len as u64).to_le_bytes().to_vec();
                start.extend(header);
                start.resize(8 + len, b' ');
                file.write_all_at(&start, 0).with_context(|| cannot(path))?;
                file
            }
        };
        let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
        let at = 8 + len + position as usize * row;
        file.write_all_at(&bytes, at as u64).with_context(|| cannot(path))
    }

    fn put(self, path: &Path) -> anyhow::Result<()> {
        match (self.failed, self.file) {
            (Some(error), _) => Err(error),
            (None, Some(file)) => put(file, path),
            (None, None) => Ok(()),
        }
    }
}

fn cannot(path: &Path) -> String {
    format!("cannot write {}", path.display())
}

/// Writes `experts` (i32) and `weights` (f32), `[layers, positions, k]`, and which `layers` (i32) these are.
fn write_routes(path: &Path, routes: Routes) -> anyhow::Result<()> {
    let mut layers: Vec<u32> = routes.keys().map(|(layer, _)| *layer).collect();
    layers.dedup();
    // A tiered router selects fewer where the active tiers have fewer; the rest of the row says so.
    let k = routes.values().map(|(experts, _)| experts.len()).max().unwrap_or(0);
    let shape = vec![layers.len(), routes.len() / layers.len().max(1), k];
    let (mut experts, mut weights) = (Vec::new(), Vec::new());
    for (of_position, with) in routes.into_values() {
        let selected = of_position.iter().map(|&expert| expert as i32);
        let none = std::iter::repeat(-1);
        experts.extend(selected.chain(none).take(k).flat_map(i32::to_le_bytes));
        weights.extend(with.into_iter().chain(std::iter::repeat(0.0)).take(k).flat_map(f32::to_le_bytes));
    }
    let names: Vec<u8> = layers.iter().flat_map(|layer| layer.to_le_bytes()).collect();
    let tensors = [
        ("experts", TensorView::new(Dtype::I32, shape.clone(), &experts)?),
        ("layers", TensorView::new(Dtype::I32, vec![layers.len()], &names)?),
        ("weights", TensorView::new(Dtype::F32, shape, &weights)?),
    ];
    write_whole(path, &serialize(tensors, None)?)
}
