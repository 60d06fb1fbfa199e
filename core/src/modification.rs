//! Experts with new parameters (spec 002, "Persist Hot Cache").
//!
//! The driver holds the new bytes under their digests. They are made durable as blobs of their own first; then, at a
//! step boundary, a new revision and with it a new generation begins. Positions that exist keep their revision, so the old
//! blobs live until no stream refers to them. A crash before the bytes are durable forgets the modification, one
//! after it commits it.

use crate::digest::Digest;
use crate::engine::Context;
use crate::event::Event;
use crate::ids::{ExpertKey, Generation, Revision, Seq};
use crate::input::Fault;
use crate::lifecycle::Lifecycle;
use crate::output::Output;
use crate::residency::Held;
use crate::state::State;
use crate::switch::Info;
use alloc::collections::BTreeMap;
use alloc::{format, string::String, vec::Vec};
use serde::{Deserialize, Serialize};

/// What has been modified, and what is about to be.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Modifications {
    /// For each modified expert its blobs, by the revision that brought each.
    blobs: BTreeMap<ExpertKey, BTreeMap<Revision, Digest>>,
    last: Revision,
    pending: Option<Pending>,
    /// Blobs that are being removed. Until they are known to be gone the same bytes cannot come back: the removal would
    /// take them.
    retiring: BTreeMap<Digest, ExpertKey>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
struct Pending {
    asked: Seq,
    experts: Vec<(ExpertKey, Digest)>,
    durable: bool,
}

impl Modifications {
    /// Whether bytes are being made durable, or wait for their step boundary.
    pub(crate) const fn pending(&self) -> bool {
        self.pending.is_some()
    }

    /// Every expert that is not the checkpoint's under a revision.
    pub(crate) fn of(&self, revision: Revision) -> BTreeMap<ExpertKey, Digest> {
        self.blobs.keys().filter_map(|&key| self.blob(key, revision).map(|blob| (key, blob))).collect()
    }

    fn blob(&self, key: ExpertKey, revision: Revision) -> Option<Digest> {
        self.blobs.get(&key)?.range(..=revision).next_back().map(|(_, &blob)| blob)
    }

    /// Whether any revision has the blob, for whichever expert.
    fn refers_to(&self, blob: Digest) -> bool {
        self.blobs.values().any(|blobs| blobs.values().any(|&other| other == blob))
    }
}

impl State {
    /// An expert as a generation has it.
    pub(crate) fn held(&self, key: ExpertKey, generation: Generation) -> Held {
        (key, self.modifications.blob(key, self.generations.revision(generation)))
    }

    /// The parameters that new positions use.
    pub(crate) fn current_blob(&self, key: ExpertKey) -> Option<Digest> {
        self.held(key, self.generations.current()).1
    }

    pub(crate) fn modify(&mut self, cx: &mut Context<'_>, experts: Vec<(ExpertKey, Digest)>) {
        let asked = cx.seq;
        if let Err(reason) = self.check_modification(&experts) {
            return cx.say(Output::Modified { asked, outcome: Err(reason), after: asked });
        }
        self.modifications.pending = Some(Pending { asked, experts: experts.clone(), durable: false });
        cx.say(Output::Persist { asked, experts });
    }

    fn check_modification(&self, experts: &[(ExpertKey, Digest)]) -> Result<(), String> {
        if !matches!(self.lifecycle, Lifecycle::Active | Lifecycle::Reconfiguring) {
            return Err(format!(
                "the engine is {:?}; experts are modified while it is Active",
                self.lifecycle
            ));
        }
        if self.modifications.pending() {
            return Err("another modification is under way; ask again when it is committed".into());
        }
        if experts.is_empty() || !experts.is_sorted_by(|a, b| a.0 < b.0) {
            return Err("experts must be given, each once, in ascending order".into());
        }
        if let Some((key, _)) = experts.iter().find(|(key, _)| !self.plan().has(*key)) {
            return Err(format!("the checkpoint has no expert {key:?}"));
        }
        match experts.iter().find(|(_, blob)| self.modifications.retiring.contains_key(blob)) {
            Some((key, _)) => {
                Err(format!("the former bytes that {key:?} is given are being removed; ask again"))
            }
            None => Ok(()),
        }
    }

    /// Bytes that were not durable are not relied on; what was being removed is removed again.
    pub(crate) fn restart_modifications(&mut self, cx: &mut Context<'_>) {
        for (&blob, &expert) in &self.modifications.retiring {
            cx.say(Output::Retire { expert, blob, after: cx.seq });
        }
        if let Some(pending) = self.modifications.pending.take_if(|pending| !pending.durable) {
            self.let_go(cx, pending.experts);
        }
    }

    pub(crate) fn persisted(&mut self, cx: &mut Context<'_>, asked: Seq, fault: Option<Fault>) {
        let pending = self.modifications.pending.as_mut().filter(|p| p.asked == asked && !p.durable);
        let pending = pending.expect("Persisted answers Persist");
        match fault {
            None => pending.durable = true,
            Some(fault) => {
                let experts = self.modifications.pending.take().map(|pending| pending.experts);
                let outcome = Err(format!("the modified experts cannot be made durable: {fault}"));
                cx.say(Output::Modified { asked, outcome, after: cx.seq });
                self.let_go(cx, experts.unwrap_or_default());
            }
        }
    }

    /// The driver has removed a blob.
    pub(crate) fn retired(&mut self, blob: Digest) {
        self.modifications.retiring.remove(&blob).expect("Retired answers Retire");
    }

    /// Commits what is durable, at a step boundary.
    pub(crate) fn advance_modification(&mut self, cx: &mut Context<'_>) {
        let durable = self.modifications.pending.as_ref().is_some_and(|pending| pending.durable);
        if !durable || !self.serving() || self.steps.current.is_some() {
            return;
        }
        let Pending { asked, experts, .. } = self.modifications.pending.take().expect("it was there");
        self.modifications.last.0 += 1;
        let revision = self.modifications.last;
        for &(key, blob) in &experts {
            self.modifications.blobs.entry(key).or_default().insert(revision, blob);
        }
        let tiers = self.generations.active_tiers().to_vec();
        let generation = self.enter(cx, Info { tiers, revision });
        cx.event(Event::Modified { generation, experts });
        cx.say(Output::Modified { asked, outcome: Ok(generation), after: cx.seq });
    }

    /// Lets go of the blobs that were replaced before the oldest revision that anything refers to.
    pub(crate) fn retire_blobs(&mut self, cx: &mut Context<'_>) {
        let referred: Vec<Revision> = self.generations.revisions().collect();
        let mut retired = Vec::new();
        let Modifications { blobs, pending, .. } = &mut self.modifications;
        let awaited = |blob| pending.iter().any(|p| p.experts.iter().any(|&(_, other)| other == blob));
        for (&key, blobs) in blobs {
            let revisions: Vec<Revision> = blobs.keys().copied().collect();
            for pair in revisions.windows(2) {
                let (first, next) = (pair[0], pair[1]);
                let unreferred = referred.iter().all(|revision| *revision < first || *revision >= next);
                // One that is just being read, or is about to come back, goes with a later generation.
                if unreferred && !awaited(blobs[&first]) && self.residency.forget(key, blobs[&first]) {
                    retired.extend(blobs.remove(&first).map(|blob| (key, blob)));
                }
            }
        }
        self.let_go(cx, retired);
    }

    /// Has the blobs removed that no revision has: the same bytes may be those of another expert, or of a later revision.
    fn let_go(&mut self, cx: &mut Context<'_>, blobs: Vec<(ExpertKey, Digest)>) {
        for (expert, blob) in blobs {
            let modifications = &mut self.modifications;
            if !modifications.refers_to(blob) && modifications.retiring.insert(blob, expert).is_none() {
                cx.say(Output::Retire { expert, blob, after: cx.seq });
            }
        }
    }
}
