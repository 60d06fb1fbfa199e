//! Loaders: a few threads that copy experts into slots, each expert packed and verified by the model.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use lite_llm_core::ids::{ExpertKey, LoadId};
use lite_llm_core::input::{Fault, Input};
use lite_llm_model::{CheckpointError, ExpertLoader, ModelError};

use super::NodeError;
use super::error::panic_message;
use super::event_loop::Message;
use crate::arena::SlotWriter;

/// One copy of an expert into a slot.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) load: LoadId,
    pub(super) expert: ExpertKey,
    pub(super) slot: SlotWriter,
}

/// The event loop's end of the loaders. The engine bounds how many jobs there are (`limits.loads_max`).
#[derive(Debug)]
pub(super) struct Loaders {
    jobs: Sender<Job>,
    threads: Vec<JoinHandle<()>>,
}

impl Loaders {
    pub(super) fn start(
        count: usize,
        loader: &ExpertLoader,
        messages: &SyncSender<Message>,
    ) -> Result<Self, NodeError> {
        let (jobs, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let mut loaders = Self { jobs, threads: Vec::new() };
        for index in 0..count.max(1) {
            let (loader, receiver, messages) = (loader.clone(), Arc::clone(&receiver), messages.clone());
            let thread = std::thread::Builder::new()
                .name(format!("loader-{index}"))
                .spawn(move || run(&loader, &receiver, &messages))
                .map_err(|source| NodeError::System { what: "cannot start a loader thread", source })?;
            loaders.threads.push(thread);
        }
        Ok(loaders)
    }

    pub(super) fn load(&self, job: Job) {
        // A loader that is gone has reported why.
        let _ = self.jobs.send(job);
    }

    /// Waits for the jobs under way, and ends the threads.
    pub(super) fn close(self) {
        drop(self.jobs);
        for thread in self.threads {
            let _ = thread.join();
        }
    }
}

fn run(loader: &ExpertLoader, jobs: &Mutex<Receiver<Job>>, messages: &SyncSender<Message>) {
    loop {
        let job = jobs.lock().unwrap_or_else(PoisonError::into_inner).recv();
        let Ok(Job { load, expert, mut slot }) = job else { return };
        let message = match catch_unwind(AssertUnwindSafe(|| loader.load(expert, &mut slot))) {
            Ok(result) => {
                let fault = result.err().map(|error| fault_of(expert, &error));
                Message::Input(Input::Loaded { load, fault })
            }
            Err(panic) => Message::Panicked { thread: "loader", message: panic_message(&*panic) },
        };
        // The engine may give the slot to somebody else as soon as it hears.
        drop(slot);
        if messages.send(message).is_err() {
            return;
        }
    }
}

fn fault_of(expert: ExpertKey, error: &ModelError) -> Fault {
    let ExpertKey { layer, tier, group, expert } = expert;
    let what = format!("expert {expert} of layer {layer}, tier {tier}, group {group}: {error}");
    match error {
        ModelError::Checkpoint(CheckpointError::Io { .. }) => Fault::Io(what),
        ModelError::Checkpoint(CheckpointError::Invalid { .. }) => Fault::Corrupt(what),
        ModelError::Memory { .. } => Fault::Resource(what),
        _ => Fault::Checkpoint(what),
    }
}
