//! The device of a node: arenas, the compute thread and the loaders. It obeys what an engine asks of them.

use super::compute::{Compute, Work};
use super::loaders::{Job, Loaders};
use super::stop;
use crate::arena::{Arena, ArenaError};
use crate::cold::{Direct, Reading};
use crate::cuda::Gpu;
use crate::cuda::staging::pinned_bytes;
use crate::memory;
use lite_llm_core::cluster::message::Tag;
use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::input::{Fault, Input, RowResult};
use lite_llm_core::output::{Carving, Origin, Output};
use lite_llm_core::plan::ModelPlan;
use lite_llm_model::tokenizer::Tokenizer;
use lite_llm_model::{Model, Provided};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// How long the last loads of an epoch that is over may keep their arena.
const FORGET_WAIT: Duration = Duration::from_secs(60);

/// Where experts are: in the hot arena steps read them, in the warm one they are near at hand.
#[derive(Debug)]
struct Arenas {
    hot: Arc<Arena>,
    warm: Arc<Arena>,
}

impl Arenas {
    /// Of a GPU, the hot one is the device's, and all that is not pinned is its budget.
    fn of(
        carving: Carving,
        budget: u64,
        gpu: Option<&Arc<Gpu>>,
        direct: Option<&Direct>,
    ) -> Result<Self, ArenaError> {
        let Carving { slots, warm_slots, slot_bytes, pages: _, page_bytes: _ } = carving;
        if let Some(gpu) = gpu {
            let warm_bytes = u64::from(warm_slots) * slot_bytes;
            gpu.set_limit(budget.saturating_sub(warm_bytes).saturating_sub(pinned_bytes(slot_bytes)));
            let hot = Arena::on_device(gpu, slots, slot_bytes, direct)?;
            return Ok(Self { hot, warm: Arena::pinned(gpu, warm_slots, slot_bytes, warm_bytes)? });
        }
        let hot = Arena::new(slots, slot_bytes, budget)?;
        let warm = Arena::new(warm_slots, slot_bytes, budget - u64::from(slots) * slot_bytes)?;
        Ok(Self { hot, warm })
    }
}

/// What an engine's outputs are done with.
#[derive(Debug)]
pub(crate) struct Device {
    compute: Compute,
    loaders: Loaders,
    plan: ModelPlan,
    tokenizer: Option<Tokenizer>,
    /// What computes, if it is not the CPU.
    gpu: Option<Arc<Gpu>>,
    /// How experts are read, for people.
    reading: Arc<Reading>,
    arenas: Option<Arenas>,
    /// Arenas of epochs that are over, until the last load lets go of them.
    former: Vec<Weak<Arena>>,
    /// Grows when all that was asked for is forgotten: answers of an older one are none.
    epoch: u64,
    /// The boot sequence was given up here: what the engine still asks for is not done.
    boot_failed: bool,
    /// Modified bytes that the engine has not yet asked for.
    staged: Vec<(Digest, Vec<u8>)>,
    /// The requests of the running step's rows.
    rows: Vec<u64>,
}

impl Device {
    pub(crate) const fn new(
        compute: Compute,
        loaders: Loaders,
        plan: ModelPlan,
        tokenizer: Option<Tokenizer>,
        gpu: Option<Arc<Gpu>>,
        reading: Arc<Reading>,
    ) -> Self {
        Self {
            compute,
            loaders,
            plan,
            tokenizer,
            gpu,
            reading,
            arenas: None,
            former: Vec::new(),
            epoch: 0,
            boot_failed: false,
            staged: Vec::new(),
            rows: Vec::new(),
        }
    }

    pub(crate) const fn plan(&self) -> &ModelPlan {
        &self.plan
    }

    pub(crate) const fn has_tokenizer(&self) -> bool {
        self.tokenizer.is_some()
    }

    /// The epoch whose answers count.
    pub(crate) const fn epoch(&self) -> u64 {
        self.epoch
    }

    /// Keeps modified bytes for a `Persist` to come.
    pub(crate) fn stage(&mut self, experts: Vec<(Digest, Vec<u8>)>) {
        self.staged = experts;
    }

    /// Drops arenas, loads, the running step, and every answer that is still to come; and takes another share of the model, if it
    /// changes.
    pub(crate) fn forget(&mut self, model: Option<Model>) {
        self.epoch += 1;
        self.boot_failed = false;
        self.staged.clear();
        self.rows.clear();
        self.former.retain(|arena| arena.strong_count() > 0);
        if let Some(Arenas { hot, warm }) = self.arenas.take() {
            self.former.extend([Arc::downgrade(&hot), Arc::downgrade(&warm)]);
        }
        self.interrupt();
        self.loaders.begin(self.epoch, model.as_ref().map(Model::expert_loader));
        self.compute.send(Work::Forget { epoch: self.epoch, model: model.map(Box::new) });
    }

    /// Ends waiting for other ranks on a device, which nothing that comes through a channel ends.
    fn interrupt(&self) {
        if let Some(gpu) = &self.gpu {
            gpu.interrupt();
        }
    }

    /// What people may want to know of how a rank on a GPU reads experts, and of how it exchanges with others: what is not as it was.
    pub(crate) fn news(&self) -> impl Iterator<Item = String> {
        self.gpu.iter().flat_map(|gpu| [self.reading.news(), gpu.news()]).flatten()
    }

    /// Hands the running step what another rank computed.
    pub(crate) fn data(&self, from: u32, tag: Tag, bytes: Vec<u8>) {
        self.compute.send(Work::Data { from, tag, bytes });
    }

    /// Does what an engine asks of its device, and says what is done already.
    pub(crate) fn obey(&mut self, engine: &Engine, output: Output) -> Option<Input> {
        match output {
            Output::Reserve { memory_bytes } => {
                let warm_bytes = engine.view().config().warm_bytes;
                return Some(match &self.gpu {
                    None => reserve(memory_bytes),
                    Some(gpu) => {
                        reserve_of(gpu, memory_bytes, warm_bytes, pinned_bytes(self.plan.slot_bytes))
                    }
                });
            }
            Output::ReadManifest => return Some(Input::ManifestRead { plan: Box::new(self.plan.clone()) }),
            Output::Carve(carving) => return self.carve(carving, engine.view().config().memory_bytes),
            Output::LoadBase { shard } => {
                if !self.boot_failed {
                    self.compute.send(Work::LoadBase { shard });
                }
            }
            Output::LoadRouters => {
                let routing_seed = engine.view().routing_seed().expect("decided in the first phase");
                self.compute.send(Work::LoadRouters { routing_seed });
            }
            Output::Load { load, expert, blob, slot, origin } => {
                let Arenas { hot, warm } = self.arenas.as_ref().expect("carved before any load");
                let slot = hot.write(slot);
                self.loaders.send(match origin {
                    Origin::Disk { keep } => {
                        Job::Load { load, expert, blob, slot, keep: keep.map(|keep| warm.write(keep)) }
                    }
                    Origin::Warm { slot: from, exchange } => {
                        Job::Promote { load, slot, warm: warm.write(from), exchange }
                    }
                });
            }
            Output::Stage { load, expert, blob, slot } => {
                let slot = self.arenas.as_ref().expect("carved before any load").warm.write(slot);
                self.loaders.send(Job::Load { load, expert, blob, slot, keep: None });
            }
            Output::Persist { asked, .. } => {
                let experts = std::mem::take(&mut self.staged);
                self.loaders.send(Job::Persist { asked, experts });
            }
            Output::Forward(forward) => {
                self.rows = forward.rows.iter().map(|row| row.request).collect();
                self.compute.send(Work::Forward(forward));
            }
            Output::Provide { step, attempt, layer, wave, wave_len, expert, slot } => {
                let provided = Provided { wave, wave_len, expert, slot };
                self.compute.send(Work::Provide { step, attempt, layer, provided });
            }
            Output::Abort { step, attempt } => {
                self.interrupt();
                self.compute.send(Work::Abort { step, attempt });
            }
            Output::Release => {
                self.arenas = None;
                self.loaders.release();
                self.compute.send(Work::Release);
            }
            other => unreachable!("{other:?} is nothing for a device"),
        }
        None
    }

    fn carve(&mut self, carving: Carving, budget: u64) -> Option<Input> {
        // The budget holds one set of arenas: the last loads of an epoch that is over end soon. Of a GPU nothing is taken before them.
        let began = Instant::now();
        let taken = || self.gpu.as_ref().is_some_and(|gpu| gpu.budget().1 > 0);
        let held = || taken() || self.former.iter().any(|arena| arena.strong_count() > 0);
        while held() && began.elapsed() < FORGET_WAIT {
            std::thread::sleep(Duration::from_millis(1));
        }
        let arenas = Arenas::of(carving, budget, self.gpu.as_ref(), self.loaders.direct());
        match arenas.and_then(|arenas| self.loaders.carve(carving.slot_bytes).map(|()| arenas)) {
            Ok(arenas) => {
                if let Some(registered) = arenas.hot.registered() {
                    self.reading.say_slots(registered);
                }
                self.compute.send(Work::Carve { arena: Arc::clone(&arenas.hot), pages: carving.pages });
                self.arenas = Some(arenas);
                None
            }
            Err(error) => {
                self.boot_failed = true;
                Some(Input::BootFailed { fault: Fault::Resource(error.to_string()) })
            }
        }
    }

    /// Finds the rows whose text has come to a stop text of their request.
    pub(crate) fn mark_stops(&self, engine: &Engine, rows: &mut [RowResult]) {
        let Some(tokenizer) = &self.tokenizer else { return };
        let view = engine.view();
        for (row, &number) in rows.iter_mut().zip(&self.rows) {
            if let (Some(token), Some(request)) = (row.token, view.request(number)) {
                row.stop = stop::stops(tokenizer, &request.body.stop, request.tokens, token);
            }
        }
    }

    /// Gives a running step up, waits for the loads under way, and ends the threads.
    pub(crate) fn close(self) {
        self.interrupt();
        self.loaders.close();
        self.compute.close();
    }
}

/// The same of a GPU: the budget is of its memory, but for the warm arena and what experts pass through, which is the host's.
fn reserve_of(gpu: &Gpu, memory_bytes: u64, warm_bytes: u64, passing_bytes: u64) -> Input {
    let refuse = |what: String| Input::BootFailed { fault: Fault::Resource(what) };
    let (free, total) = match gpu.memory() {
        Ok(memory) => memory,
        Err(error) => return refuse(format!("cannot tell how much memory the GPU has: {error}")),
    };
    // What this process has of an epoch that is over is given back before anything is taken.
    let (_, taken) = gpu.budget();
    let pinned_bytes = warm_bytes.saturating_add(passing_bytes);
    let most = free.saturating_add(taken).saturating_add(pinned_bytes);
    if memory_bytes > most {
        return refuse(format!(
            "memory_bytes is {memory_bytes}, of which {warm_bytes} are for the warm arena, and {passing_bytes} for what passes \
             through memory of the host; but of the {total} bytes of the GPU ({}) only {free} are free: give at most {most}",
            gpu.name()
        ));
    }
    if pinned_bytes == 0 { Input::Reserved } else { reserve(pinned_bytes) }
}

fn reserve(memory_bytes: u64) -> Input {
    let refuse = |what: String| Input::BootFailed { fault: Fault::Resource(what) };
    match memory::measure() {
        Err(error) => refuse(format!("cannot tell how much memory there is: {error}")),
        Ok(memory) => {
            // The budget is the whole process's: what it has already is part of it.
            let most = memory.available.saturating_add(memory::resident_bytes().unwrap_or(0));
            if memory_bytes <= most {
                Input::Reserved
            } else {
                refuse(format!(
                    "memory_bytes is {memory_bytes}, but of the {} bytes of this machine only {most} can be had: give \
                     at most that",
                    memory.total
                ))
            }
        }
    }
}
