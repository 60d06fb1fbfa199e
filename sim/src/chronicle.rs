//! What happened in a run, for people: the entries of a timeline. Kept only when asked for.

/// One thing that happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// When, in nanoseconds of the world.
    pub at_ns: u64,
    /// To whom: the number of an actor.
    pub lane: u32,
    /// What.
    pub what: What,
}

/// What an entry says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum What {
    /// A message was sent; it is found again by its number.
    Sent {
        /// Its number in the run.
        message: u64,
        /// To whom.
        to: u32,
        /// What it says.
        text: String,
    },
    /// A message came.
    Received {
        /// Its number in the run.
        message: u64,
    },
    /// A message did not come, or not whole.
    Lost {
        /// Its number in the run.
        message: u64,
    },
    /// A fault struck.
    Fault(String),
    /// The actor's state from now on: a short word that stands for a colour.
    State(String),
    /// Something worth a mark.
    Note(String),
}

/// The entries of a run.
#[derive(Clone, Debug, Default)]
pub struct Chronicle {
    entries: Option<Vec<Entry>>,
    lanes: Vec<String>,
}

impl Chronicle {
    /// One that keeps entries, or none.
    #[must_use]
    pub fn new(kept: bool, lanes: Vec<String>) -> Self {
        Self { entries: kept.then(Vec::new), lanes }
    }

    /// Adds an entry; `what` is only asked if entries are kept.
    pub fn add(&mut self, at_ns: u64, lane: u32, what: impl FnOnce() -> What) {
        if let Some(entries) = &mut self.entries {
            entries.push(Entry { at_ns, lane, what: what() });
        }
    }

    /// What was kept, in order of time.
    #[must_use]
    pub fn entries(&self) -> &[Entry] {
        self.entries.as_deref().unwrap_or_default()
    }

    /// The names of the actors.
    #[must_use]
    pub fn lanes(&self) -> &[String] {
        &self.lanes
    }
}
