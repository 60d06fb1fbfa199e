//! How experts are read, for people: what was chosen, and what came of it when memory was taken.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// How experts are read.
#[derive(Debug)]
pub(crate) struct Reading {
    chosen: String,
    said: Mutex<Said>,
}

#[derive(Debug)]
struct Said {
    /// Of the slots that files are read straight into.
    slots: String,
    /// It was not yet asked for.
    is_new: bool,
}

impl Reading {
    /// The way that was chosen; empty if there are no experts.
    pub(crate) fn new(chosen: &str) -> Self {
        let said = Said { slots: String::new(), is_new: !chosen.is_empty() };
        Self { chosen: chosen.into(), said: Mutex::new(said) }
    }

    fn said(&self) -> MutexGuard<'_, Said> {
        self.said.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether slots of a GPU that files are read straight into are registered with the library, or why not.
    pub(crate) fn say_slots(&self, registered: Result<(), &str>) {
        let slots = match registered {
            Ok(()) => "; all slots are registered with cuFile".into(),
            Err(why) => format!(
                "; slots are not registered with cuFile, so that it may read by way of memory of the GPU that it has itself: {why}; \
                 raise max_device_pinned_mem_size_kb in cufile.json"
            ),
        };
        let mut said = self.said();
        if said.slots != slots {
            *said = Said { slots, is_new: true };
        }
    }

    /// All that is known.
    pub(crate) fn whole(&self) -> String {
        format!("{}{}", self.chosen, self.said().slots)
    }

    /// The same, if it is not what it was the last time.
    pub(crate) fn news(&self) -> Option<String> {
        let is_new = std::mem::take(&mut self.said().is_new);
        is_new.then(|| self.whole())
    }
}
