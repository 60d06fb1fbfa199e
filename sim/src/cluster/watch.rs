//! What the actors of a run tell its observers. Nothing here acts upon the run; a checker that finds something wrong
//! ends it.

use super::check::Checker;
use crate::mark::{Mark, Marks};
use lite_llm_core::cluster::membership::{Member, Membership, NodeId};
use lite_llm_core::cluster::shards::Stamp;
use lite_llm_core::cluster::supervisor::SupervisorEvent;
use lite_llm_core::ids::{Generation, Seq};
use lite_llm_core::output::Output;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fmt;
use std::rc::Rc;

/// Something that checkers are told.
#[derive(Clone, Debug)]
pub enum Fact<'a> {
    /// A node's journal is durable up to here; less than before after a cut.
    Durable {
        /// Whose.
        member: Member,
        /// The last durable record.
        last: Seq,
    },
    /// A rank knows a record to be committed, and has it with this digest before it.
    Committed {
        /// Who knows.
        member: Member,
        /// Of which replica.
        replica: u32,
        /// Which record.
        seq: Seq,
        /// First bytes of the digest before it.
        digest: u64,
    },
    /// A leader tells clients something.
    Told {
        /// Who.
        member: Member,
        /// Of which epoch.
        membership: &'a Membership,
        /// What.
        output: &'a Output,
    },
    /// A leader has taken a command.
    Took {
        /// Who.
        member: Member,
        /// Of which epoch.
        membership: &'a Membership,
    },
    /// A generation of experts was entered, by committed records.
    Entered {
        /// In which replica.
        replica: u32,
        /// Which.
        generation: Generation,
        /// The tiers that it may select.
        tiers: &'a [u32],
    },
    /// A shard of an optimizer is in a node's memory.
    Made {
        /// Whose.
        member: Member,
        /// Which.
        stamp: &'a Stamp,
    },
    /// A shard of an optimizer is let go of in a node's memory.
    Dropped {
        /// Whose.
        node: NodeId,
        /// Which.
        stamp: &'a Stamp,
    },
    /// A shard of an optimizer is on a node's disk, durable.
    Stored {
        /// Whose.
        member: Member,
        /// Which.
        stamp: &'a Stamp,
    },
    /// A shard of an optimizer is let go of on a node's disk; a crash may bring it back.
    Removed {
        /// Whose.
        node: NodeId,
        /// Which.
        stamp: &'a Stamp,
    },
    /// The supervisor says what happens.
    Event(&'a SupervisorEvent),
    /// A process has ended by itself, and said why.
    Exited {
        /// Whose.
        node: NodeId,
        /// The code.
        code: i32,
        /// Slots, pages and steps that it still held.
        left: usize,
    },
    /// Things that wait at a node: messages, outputs, data of steps to come.
    Queued {
        /// Whose.
        node: NodeId,
        /// How many.
        things: usize,
    },
}

/// What is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// Which checker found it, or `panic` or `liveness`.
    pub checker: String,
    /// When, in nanoseconds of the world.
    pub at_ns: u64,
    /// What, for people.
    pub what: String,
}

impl Violation {
    /// What makes two of them the same failure: the checker, and of a panic the place.
    #[must_use]
    pub fn kind(&self) -> String {
        let place =
            self.what.rsplit_once('(').filter(|_| self.checker == "panic").map_or("", |(_, place)| place);
        format!("{} {place}", self.checker)
    }
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.at_ns / 1_000_000_000;
        let millis = self.at_ns / 1_000_000 % 1000;
        write!(f, "{} at {seconds}.{millis:03} s: {}", self.checker, self.what)
    }
}

struct Inner {
    now_ns: u64,
    checkers: Vec<Box<dyn Checker>>,
    /// By replica: the last record that anybody knew to be committed, and the first bytes of the digest before it.
    committed: BTreeMap<u32, (Seq, u64)>,
    marks: Marks,
    inputs: u64,
    violation: Option<Violation>,
}

/// The observers of a run; clones share them.
#[derive(Clone)]
pub struct Watch(Rc<RefCell<Inner>>);

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watch").finish_non_exhaustive()
    }
}

impl Watch {
    /// Observers of a run that has not begun.
    #[must_use]
    pub fn new(checkers: Vec<Box<dyn Checker>>) -> Self {
        let (marks, committed) = (Marks::default(), BTreeMap::new());
        let inner = Inner { now_ns: 0, checkers, committed, marks, inputs: 0, violation: None };
        Self(Rc::new(RefCell::new(inner)))
    }

    /// Tells the checkers something.
    pub fn see(&self, now_ns: u64, fact: &Fact<'_>) {
        let mut inner = self.0.borrow_mut();
        inner.now_ns = now_ns;
        if inner.violation.is_some() {
            return;
        }
        let found = inner.checkers.iter_mut().find_map(|checker| {
            let what = checker.see(fact).err()?;
            Some(Violation { checker: checker.name().into(), at_ns: now_ns, what })
        });
        inner.violation = found;
        if let (Fact::Committed { replica, seq, digest, .. }, None) = (fact, &inner.violation) {
            let last = inner.committed.entry(*replica).or_insert((*seq, *digest));
            *last = (*last).max((*seq, *digest));
        }
    }

    /// The last record of a replica that anybody knew to be committed, and the first bytes of the digest before it.
    #[must_use]
    pub fn committed(&self, replica: u32) -> Option<(Seq, u64)> {
        self.0.borrow().committed.get(&replica).copied()
    }

    /// Something is wrong that an actor saw itself.
    pub fn violated(&self, now_ns: u64, checker: &str, what: String) {
        let violation = Violation { checker: checker.into(), at_ns: now_ns, what };
        self.0.borrow_mut().violation.get_or_insert(violation);
    }

    /// Counts a mark.
    pub fn mark(&self, mark: Mark) {
        self.0.borrow_mut().marks.hit(mark);
    }

    /// Counts an input of a core.
    pub fn input(&self) {
        self.0.borrow_mut().inputs += 1;
    }

    /// Inputs that cores were given.
    #[must_use]
    pub fn inputs(&self) -> u64 {
        self.0.borrow().inputs
    }

    /// The marks so far.
    #[must_use]
    pub fn marks(&self) -> Marks {
        self.0.borrow().marks.clone()
    }

    /// The first thing that is wrong.
    #[must_use]
    pub fn violation(&self) -> Option<Violation> {
        self.0.borrow().violation.clone()
    }

    /// What was wrong is excused.
    pub fn forgive(&self) {
        self.0.borrow_mut().violation = None;
    }

    /// Whether something is wrong.
    #[must_use]
    pub fn is_violated(&self) -> bool {
        self.0.borrow().violation.is_some()
    }
}
