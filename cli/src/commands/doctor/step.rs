//! How long a step of one row takes here, as runs have it: the model computes some with experts that are all zero.

use anyhow::Context;
use lite_llm_core::ids::{ExpertKey, Generation, Slot, StepId};
use lite_llm_core::input::Sampling;
use lite_llm_core::output::{Forward, Row, SampleSpec};
use lite_llm_core::pages::PageRun;
use lite_llm_model::kernels::PAGE_POSITIONS;
use lite_llm_model::{ExpertSource, KvCache, Model, Provided, Stopped, Workspace};
use memmap2::{Advice, MmapMut};
use std::cell::Cell;
use std::time::{Duration, Instant};

/// How long steps are computed, and how many at least.
const TIME: Duration = Duration::from_millis(1500);
const STEPS: u32 = 4;
/// Steps before, which find their weights and memory cold.
const STEPS_COLD: u32 = 2;
/// Pages of KV cache for each group of layers.
const PAGES: u32 = 16;

/// Experts of zeros. Whichever is asked for is another piece of the room, so that none is found in a cache.
struct Zeros {
    room: MmapMut,
    slot_bytes: usize,
    next: Cell<usize>,
}

impl Zeros {
    fn new(room: usize, slot_bytes: usize) -> anyhow::Result<Self> {
        let bytes = room.next_multiple_of(slot_bytes.max(1)).max(1);
        let mut room = MmapMut::map_anon(bytes).context("cannot have memory for experts")?;
        // As slots have them; written to, so that it is not the one page of zeros.
        let _ = room.advise(Advice::HugePage);
        room.fill(0);
        Ok(Self { room, slot_bytes, next: Cell::new(0) })
    }
}

impl ExpertSource for Zeros {
    fn need(&mut self, _: u32, _: &[ExpertKey], _: &[ExpertKey]) -> Result<(), Stopped> {
        Err(Stopped)
    }

    fn provided(&mut self) -> Result<Provided, Stopped> {
        Err(Stopped)
    }

    fn slot(&self, _: Slot) -> &[u8] {
        let at = self.next.get();
        let end = at + self.slot_bytes;
        self.next.set(if end + self.slot_bytes > self.room.len() { 0 } else { end });
        &self.room[at..end]
    }

    fn released(&mut self, _: u32, _: u32) -> Result<(), Stopped> {
        Err(Stopped)
    }
}

/// The mean of some steps at the beginning of a text, each of which samples its token. Loads the base parameters.
pub(super) fn time(
    model: &mut Model,
    experts: &[ExpertKey],
    tiers: &[u32],
    room: usize,
) -> anyhow::Result<Duration> {
    model.load_base(0)?;
    model.load_routers()?;
    let mut zeros = Zeros::new(room, model.slot_bytes())?;
    let groups = u32::try_from(model.kv_groups().len()).expect("few groups");
    let mut cache = KvCache::new(model, PAGES * groups)?;
    let mut workspace = Workspace::default();
    let resident: Vec<(ExpertKey, Slot)> = experts.iter().map(|&key| (key, Slot(0))).collect();
    let positions = (PAGES * PAGE_POSITIONS as u32).min(model.arch().context);
    let cold = STEPS_COLD.min(positions.saturating_sub(1));
    let (mut steps, mut took) = (0, Duration::ZERO);
    let mut token = 0;
    for position in 0..positions {
        let pages = |group| PageRun { first: 0, pages: (PAGES * group..PAGES * (group + 1)).collect() };
        let sampling = Sampling { temperature: 1.0, ..Sampling::default() };
        let row = Row {
            request: 0,
            start: position,
            tokens: vec![token],
            pages: (0..groups).map(pages).collect(),
            sample: Some(SampleSpec { sampling, draw: u64::from(position), history: Vec::new() }),
        };
        let step = Forward {
            step: StepId(u64::from(position)),
            attempt: 0,
            generation: Generation(0),
            tiers: tiers.to_vec(),
            rows: vec![row],
            resident: Some(resident.clone()),
            foresee: false,
        };
        let began = Instant::now();
        let rows =
            model.forward(&step, &mut cache, &mut workspace, &mut zeros, None).context("a trial step")?;
        if position >= cold {
            steps += 1;
            took += began.elapsed();
        }
        token = rows.first().and_then(|row| row.token).context("a row that samples has a token")?;
        if steps >= STEPS && took >= TIME {
            break;
        }
    }
    Ok(took / steps.max(1))
}
