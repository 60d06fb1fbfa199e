//! What computes the steps of a node: the seam between the compute thread, which speaks with the engine, and the device.
//!
//! The engine decides which expert is in which slot, and when; a backend reads slots that it was given, says when it reads them no
//! more, and gives the rows of the numeric contract, bit for bit. [`Cpu`] is the model itself.

use lite_llm_core::input::{Fault, RowResult};
use lite_llm_core::output::Forward;
use lite_llm_model::{
    Capture, CheckpointError, ExpertSource, KvCache, Model, ModelError, StepError, Workspace,
};
use std::sync::Arc;

use crate::arena::Arena;

/// Why a step has no rows.
#[derive(Debug)]
pub(crate) enum Unfinished {
    /// The step was given up, or has values that are not finite. The next one may do.
    Step(StepError),
    /// The device is lost: nothing more can be computed by this process.
    Lost(String),
}

impl From<StepError> for Unfinished {
    fn from(error: StepError) -> Self {
        Self::Step(error)
    }
}

/// What computes the steps of a node, on the compute thread.
pub(crate) trait Backend: Send {
    /// Takes the memory that steps need: a cache of so many pages, for experts in the slots of this arena.
    fn carve(&mut self, arena: &Arc<Arena>, pages: u32) -> Result<(), Fault>;

    /// Loads a shard of the base parameters.
    fn load_base(&mut self, shard: u32) -> Result<(), Fault>;

    /// Loads the routers, whose ties are drawn by this seed.
    fn load_routers(&mut self, routing_seed: u64) -> Result<(), Fault>;

    /// Computes a step. When it returns, no slot is read any more.
    ///
    /// # Panics
    /// If there is no memory for it yet, or weights are missing.
    fn forward(
        &mut self,
        step: &Forward,
        source: &mut dyn ExpertSource,
        capture: Option<&mut dyn Capture>,
    ) -> Result<Vec<RowResult>, Unfinished>;

    /// Lets go of the memory of steps.
    fn release(&mut self);

    /// Computes another share of the model from now on.
    fn take(&mut self, model: Model);

    /// The rank that it computes.
    fn rank(&self) -> u32;
}

/// The model on the CPU.
#[derive(Debug)]
pub(crate) struct Cpu {
    model: Model,
    /// What is carved once, so that no step allocates it.
    memory: Option<(KvCache, Workspace)>,
}

impl Cpu {
    pub(crate) const fn new(model: Model) -> Self {
        Self { model, memory: None }
    }
}

impl Backend for Cpu {
    fn carve(&mut self, _: &Arc<Arena>, pages: u32) -> Result<(), Fault> {
        let cache = KvCache::new(&self.model, pages).map_err(|error| fault_of(&error))?;
        self.memory = Some((cache, Workspace::default()));
        Ok(())
    }

    fn load_base(&mut self, shard: u32) -> Result<(), Fault> {
        self.model.load_base(shard).map_err(|error| fault_of(&error))
    }

    fn load_routers(&mut self, routing_seed: u64) -> Result<(), Fault> {
        self.model.set_routing_seed(routing_seed);
        self.model.load_routers().map_err(|error| fault_of(&error))
    }

    fn forward(
        &mut self,
        step: &Forward,
        source: &mut dyn ExpertSource,
        capture: Option<&mut dyn Capture>,
    ) -> Result<Vec<RowResult>, Unfinished> {
        let (cache, workspace) = self.memory.as_mut().expect("memory is carved before the first step");
        Ok(self.model.forward(step, cache, workspace, source, capture)?)
    }

    fn release(&mut self) {
        self.memory = None;
    }

    fn take(&mut self, model: Model) {
        self.model = model;
    }

    fn rank(&self) -> u32 {
        self.model.share().rank()
    }
}

/// The fault of a boot sequence that ends with this error.
pub(crate) fn fault_of(error: &ModelError) -> Fault {
    let what = error.to_string();
    match error {
        ModelError::Memory { .. } => Fault::Resource(what),
        ModelError::Checkpoint(CheckpointError::Corrupt { .. }) => Fault::Corrupt(what),
        _ => Fault::Checkpoint(what),
    }
}
