//! The arenas of a simulated machine, and the loads into them: in any order, some with a fault.

use super::Machine;
use crate::model;
use lite_llm_core::digest::Digest;
use lite_llm_core::ids::{ExpertKey, LoadId, Slot};
use lite_llm_core::input::Input;
use lite_llm_core::output::{Carving, Origin};

/// A load under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Load {
    pub(super) load: LoadId,
    pub(super) expert: ExpertKey,
    pub(super) blob: Option<Digest>,
    pub(super) path: Path,
}

/// Where to, and from where.
#[derive(Clone, Copy, Debug)]
pub(super) enum Path {
    Stage(Slot),
    Heat(Slot, Origin),
}

impl Load {
    const fn hot(&self) -> Option<Slot> {
        match self.path {
            Path::Stage(_) => None,
            Path::Heat(slot, _) => Some(slot),
        }
    }

    const fn warm(&self) -> Option<Slot> {
        match self.path {
            Path::Stage(slot) | Path::Heat(_, Origin::Warm { slot, .. }) => Some(slot),
            Path::Heat(_, Origin::Disk { keep }) => keep,
        }
    }
}

/// What is in memory.
#[derive(Debug, Default)]
pub(super) struct Arenas {
    pub(super) hot: Vec<Option<u64>>,
    pub(super) warm: Vec<Option<u64>>,
    pub(super) loads: Vec<Load>,
}

impl Arenas {
    pub(super) fn of(carving: Carving) -> Self {
        Self {
            hot: vec![None; carving.slots as usize],
            warm: vec![None; carving.warm_slots as usize],
            loads: vec![],
        }
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.hot.is_empty() && self.warm.is_empty() && self.loads.is_empty()
    }
}

impl Machine {
    pub(super) fn begin_load(&mut self, load: Load) {
        if let Some(slot) = load.hot() {
            self.check_unused(slot);
        }
        if let Some(slot) = load.warm() {
            let others = &self.arenas.loads;
            assert!(others.iter().all(|other| other.warm() != Some(slot)), "warm slot {slot} has two loads");
        }
        self.arenas.loads.push(load);
    }

    /// A slot that the running step may read is never overwritten.
    fn check_unused(&self, slot: Slot) {
        if let Some(compute) = &self.compute {
            let resident = compute.forward.resident.iter().flatten();
            let mut used = resident.chain(&compute.provided).map(|&(_, slot)| slot);
            assert!(used.all(|used| used != slot), "slot {slot} is overwritten while in use");
        }
        assert!(self.arenas.loads.iter().all(|load| load.hot() != Some(slot)), "slot {slot} has two loads");
    }

    /// Some load ends. After a fault there may be anything in its slots.
    pub(super) fn end_load(&mut self) {
        if self.arenas.loads.is_empty() {
            return;
        }
        let at = self.choice.index(self.arenas.loads.len());
        let Load { load, expert, blob, path } = self.arenas.loads.swap_remove(at);
        let fault = self.fault("read failed");
        let expected = Some(model::content(expert, blob));
        let from_disk = matches!(path, Path::Stage(_) | Path::Heat(_, Origin::Disk { .. }));
        let there = blob.is_none_or(|blob| self.blobs.contains(&blob));
        assert!(there || !from_disk, "a blob lives while anything refers to it");
        let Arenas { hot, warm, .. } = &mut self.arenas;
        match path {
            Path::Stage(slot) => {
                warm[slot.0 as usize] = expected.filter(|_| fault.is_none());
                self.report.staged += 1;
            }
            Path::Heat(slot, origin) => {
                let content = expected.filter(|_| fault.is_none());
                let old = core::mem::replace(&mut hot[slot.0 as usize], content);
                let (kept, staged) = match origin {
                    Origin::Disk { keep } => (keep, None),
                    Origin::Warm { slot, exchange } => (Some(slot).filter(|_| exchange), Some(slot)),
                };
                if let Some(slot) = staged {
                    let staged = warm[slot.0 as usize].take();
                    assert_eq!(staged, expected, "an expert is where it is promoted from");
                    self.report.promoted += 1;
                }
                if let Some(slot) = kept {
                    assert!(old.is_some(), "what is demoted is there");
                    warm[slot.0 as usize] = old.filter(|_| fault.is_none());
                    self.report.demoted += 1;
                }
            }
        }
        self.handle(Input::Loaded { load, fault });
    }
}
