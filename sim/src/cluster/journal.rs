//! The journal of a simulated node: the production store over a simulated disk that outlives the process.
//!
//! A process that dies may have been in the middle of a flush: any number of its disk operations has happened, and the
//! disk decides what is left of each. Nothing is repaired here; what cannot be opened is an error that says why.

use crate::disk::{Ending, Fault, SimDisk};
use lite_llm_core::LOGIC_VERSION;
use lite_llm_core::chain::RestoreError;
use lite_llm_core::cluster::peer::Log;
use lite_llm_core::disk::{Disk, DiskError};
use lite_llm_core::engine::Engine;
use lite_llm_core::ids::Seq;
use lite_llm_core::journal::{Header, JournalError, Record, Recovered, Scanned, Snapshot, Store, scan};
use lite_llm_core::replay::{ReplayError, fold};
use std::cell::RefCell;
use std::rc::Rc;

/// Disk operations of a flush that begins a segment, the most that a flush has.
const FLUSH_OPERATIONS: u64 = 6;

/// A disk that outlives the store over it; clones share it.
#[derive(Clone, Debug, Default)]
pub struct Platter(Rc<RefCell<SimDisk>>);

impl Platter {
    /// A disk to be shared.
    #[must_use]
    pub fn new(disk: SimDisk) -> Self {
        Self(Rc::new(RefCell::new(disk)))
    }

    /// Nanoseconds that the disk has taken since the last call.
    pub fn take_ns(&mut self) -> u64 {
        self.0.borrow_mut().take_ns()
    }

    /// What is on it now, without any fault of reading it.
    ///
    /// # Errors
    /// If it is damaged.
    pub fn look(&self) -> Result<Scanned, JournalError> {
        scan(&mut self.0.borrow().honest())
    }

    /// The machine dies, in the middle of a flush of this store if `flushing` says how far it had got.
    pub fn die(&mut self, store: Option<Store<Self>>, flushing: Option<u64>) {
        if let (Some(mut store), Some(far)) = (store, flushing) {
            self.0.borrow_mut().fail_at(far % FLUSH_OPERATIONS, Fault::Crash);
            // It is not acknowledged, whatever it says.
            drop(store.flush());
        }
        self.0.borrow_mut().crash(&mut Ending::Decided);
    }
}

/// Why a node has no log.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The journal cannot be read or written.
    #[error(transparent)]
    Journal(#[from] JournalError),
    /// The snapshot is no state of this version.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The records do not fold.
    #[error(transparent)]
    Replay(#[from] ReplayError),
}

/// A node's journal.
#[derive(Debug)]
pub struct NodeJournal {
    platter: Platter,
    node: u32,
    store: Option<Store<Platter>>,
}

impl NodeJournal {
    /// The journal of a node on a disk, not opened.
    #[must_use]
    pub fn new(node: u32, disk: SimDisk) -> Self {
        Self { platter: Platter::new(disk), node, store: None }
    }

    /// Opens it for a life and folds what is there; with it, what the store has found.
    ///
    /// # Errors
    /// If it cannot be read, written or folded; the process cannot go on, and may try again in its next life.
    pub fn open(&mut self, incarnation: u64) -> Result<(Log, Recovered), OpenError> {
        let header = Header { logic_version: LOGIC_VERSION, node: self.node, incarnation, identity: [0; 32] };
        let (store, found) = Store::open(self.platter.clone(), &header)?;
        let log = folded(found.snapshot.as_ref(), &found.records)?;
        self.store = Some(store);
        Ok((log, found))
    }

    /// What is on its disk now, whether or not it is open; to look at.
    ///
    /// # Errors
    /// If it is damaged.
    pub fn look(&self) -> Result<Scanned, JournalError> {
        self.platter.look()
    }

    /// Adds a record, not yet durable.
    ///
    /// # Errors
    /// If the journal is poisoned or full.
    ///
    /// # Panics
    /// If it is not open.
    pub fn append(&mut self, record: Record) -> Result<(), JournalError> {
        let Record { seq, time_ns, digest, payload } = record;
        self.store().push(seq, time_ns, digest, payload)
    }

    /// Makes everything durable, and says up to where.
    ///
    /// # Errors
    /// If the disk fails: what is on it is only known when it is opened again.
    ///
    /// # Panics
    /// If it is not open.
    pub fn flush(&mut self) -> Result<Seq, JournalError> {
        self.store().flush().map(Seq)
    }

    /// Writes a snapshot and lets go of what it makes unneeded.
    ///
    /// # Errors
    /// If the disk fails.
    ///
    /// # Panics
    /// If it is not open.
    pub fn write_snapshot(&mut self, snapshot: &Snapshot) -> Result<(), JournalError> {
        let store = self.store();
        store.write_snapshot(snapshot.next, snapshot.digest, &snapshot.bytes)?;
        store.trim(snapshot.next)
    }

    /// The records from one on, and the snapshot if the journal begins later.
    ///
    /// # Errors
    /// If the disk fails, or is damaged.
    ///
    /// # Panics
    /// If it is not open.
    pub fn read_from(&mut self, from: Seq) -> Result<(Option<Snapshot>, Vec<Record>), JournalError> {
        self.store().read_from(from.0)
    }

    /// Cuts everything after a record and folds the rest.
    ///
    /// # Errors
    /// If the disk fails, or is damaged.
    ///
    /// # Panics
    /// If it is not open.
    pub fn cut(&mut self, keep: Seq) -> Result<Log, OpenError> {
        self.store().cut(keep.0)?;
        self.fold_all()
    }

    /// Notes that nothing is missing.
    ///
    /// # Errors
    /// If the disk fails.
    ///
    /// # Panics
    /// If it is not open.
    pub fn whole(&mut self) -> Result<(), JournalError> {
        self.store().whole()
    }

    /// Takes a snapshot in place of everything.
    ///
    /// # Errors
    /// If the disk fails, or the snapshot is none.
    ///
    /// # Panics
    /// If it is not open.
    pub fn install(&mut self, snapshot: &Snapshot) -> Result<Log, OpenError> {
        self.store().install(snapshot)?;
        self.fold_all()
    }

    fn fold_all(&mut self) -> Result<Log, OpenError> {
        let (snapshot, records) = self.store().read_from(1)?;
        folded(snapshot.as_ref(), &records)
    }

    /// The process dies; `flushing` says how far a flush had got, if one was under way.
    pub fn die(&mut self, flushing: Option<u64>) {
        self.platter.die(self.store.take(), flushing);
    }

    /// Nanoseconds that the disk has taken since the last call.
    pub fn take_ns(&mut self) -> u64 {
        self.platter.take_ns()
    }

    /// A new disk in the place of the old one.
    pub fn replace_disk(&mut self) {
        self.store = None;
        self.platter.0.borrow_mut().replace();
    }

    fn store(&mut self) -> &mut Store<Platter> {
        self.store.as_mut().expect("the journal is open")
    }
}

fn folded(snapshot: Option<&Snapshot>, records: &[Record]) -> Result<Log, OpenError> {
    let mut engine = snapshot.map_or_else(|| Ok(Engine::new()), |found| Engine::restore(&found.bytes))?;
    fold(&mut engine, records, |_, _| {})?;
    Ok(Log::new(engine, records))
}

impl Disk for Platter {
    fn create_new(&mut self, name: &str) -> Result<(), DiskError> {
        self.0.borrow_mut().create_new(name)
    }
    fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), DiskError> {
        self.0.borrow_mut().append(name, bytes)
    }
    fn sync(&mut self, name: &str) -> Result<(), DiskError> {
        self.0.borrow_mut().sync(name)
    }
    fn sync_dir(&mut self) -> Result<(), DiskError> {
        self.0.borrow_mut().sync_dir()
    }
    fn read_at(&mut self, name: &str, offset: u64, into: &mut [u8]) -> Result<usize, DiskError> {
        self.0.borrow_mut().read_at(name, offset, into)
    }
    fn len(&mut self, name: &str) -> Result<u64, DiskError> {
        self.0.borrow_mut().len(name)
    }
    fn rename(&mut self, from: &str, to: &str) -> Result<(), DiskError> {
        self.0.borrow_mut().rename(from, to)
    }
    fn remove(&mut self, name: &str) -> Result<(), DiskError> {
        self.0.borrow_mut().remove(name)
    }
    fn list(&mut self) -> Result<Vec<String>, DiskError> {
        self.0.borrow_mut().list()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::atlas::Atlas;
    use crate::decision::Decisions;
    use crate::hazard::Hazard;
    use lite_llm_core::config::Config;
    use lite_llm_core::digest::Digest;
    use lite_llm_core::ids::Incarnation;
    use lite_llm_core::input::Input;
    use lite_llm_core::output::Output;
    use lite_llm_core::replay::encode_input;
    use lite_llm_core::time::Time;
    use std::collections::BTreeSet;

    /// An engine fed with ticks: what it was before each record.
    struct Life {
        engine: Engine,
        digests: Vec<Digest>,
    }

    impl Life {
        fn next(&mut self) -> Record {
            let seq = self.engine.next_seq();
            self.digests.truncate(usize::try_from(seq.0 - 1).expect("few"));
            self.digests.push(self.engine.digest());
            let input = if seq == Seq(1) {
                Input::Boot { incarnation: Incarnation(1), config: Config::default().into(), entropy: 1 }
            } else {
                Input::Tick
            };
            let record = Record {
                seq: seq.0,
                time_ns: seq.0,
                digest: self.engine.digest().0,
                payload: encode_input(&input),
            };
            self.engine.handle(Time(seq.0), input);
            while !matches!(self.engine.poll(), Output::Wait { .. }) {}
            record
        }
    }

    /// Works, dies and opens again under a seed; gives the last durable record and the deaths.
    fn live(seed: u64, hazards: &[Hazard]) -> (u64, u64) {
        let decisions = Decisions::always(seed, hazards);
        let atlas = Atlas::new(vec![BTreeSet::from([3])], false);
        let disk = SimDisk::of_node(3, 4096, decisions.clone(), atlas);
        let mut journal = NodeJournal::new(3, disk);
        let mut life = Life { engine: Engine::new(), digests: Vec::new() };
        let (mut acknowledged, mut deaths) = (0, 0);
        for incarnation in 1..60 {
            let Ok((log, _)) = journal.open(incarnation) else {
                journal.die(None);
                continue;
            };
            let last = log.engine.next_seq().0 - 1;
            assert!(last >= acknowledged, "seed {seed}: {last} of {acknowledged} acknowledged are there");
            let known = life.digests.get(usize::try_from(last).expect("few")).copied();
            assert_eq!(log.engine.digest(), known.unwrap_or_else(|| life.engine.digest()), "seed {seed}");
            life.engine = log.engine;
            for nth in 0..20 {
                let value = decisions.ordinary(9, incarnation, nth);
                journal.append(life.next()).expect("an open journal takes records");
                if value.is_multiple_of(11) {
                    break;
                }
                if value.is_multiple_of(3) {
                    match journal.flush() {
                        Ok(durable) => acknowledged = durable.0,
                        Err(_) => break,
                    }
                }
            }
            journal.die((incarnation % 2 == 0).then(|| decisions.ordinary(8, incarnation, 0)));
            deaths += 1;
        }
        (acknowledged, deaths)
    }

    #[test]
    fn nothing_acknowledged_is_lost_whatever_befalls_the_only_copy() {
        let hazards = Hazard::parse_list("disk").expect("an area");
        for seed in 0..40 {
            let (acknowledged, deaths) = live(seed, &hazards);
            assert!(acknowledged > 0 && deaths > 20, "seed {seed}: {acknowledged} in {deaths} lives");
        }
    }

    #[test]
    fn a_log_that_reads_shorter_than_it_is_counts_as_lost() {
        let mut journal = NodeJournal::new(3, SimDisk::new());
        let mut life = Life { engine: journal.open(1).expect("an empty disk").0.engine, digests: Vec::new() };
        for _ in 0..5 {
            journal.append(life.next()).expect("it is open");
            journal.flush().expect("no fault");
        }
        assert_eq!(journal.read_from(Seq(2)).expect("no fault").1.len(), 4);
        let mut disk = journal.platter.0.borrow_mut();
        let name = disk.list().expect("no fault").remove(0);
        let len = usize::try_from(disk.len(&name).expect("it is there")).expect("short");
        disk.cut(&name, len - 4096);
        drop(disk);
        let lost = JournalError::Missing { from: 5, to: 5 };
        assert_eq!(journal.read_from(Seq(2)).expect_err("a record is lost").to_string(), lost.to_string());
    }

    #[test]
    fn a_log_is_cut_and_replaced() {
        let mut journal = NodeJournal::new(3, SimDisk::new());
        let mut life = Life { engine: journal.open(1).expect("an empty disk").0.engine, digests: Vec::new() };
        for _ in 0..5 {
            journal.append(life.next()).expect("it is open");
        }
        assert_eq!(journal.flush().expect("no fault"), Seq(5));
        let log = journal.cut(Seq(2)).expect("no fault");
        assert_eq!((log.engine.next_seq(), log.engine.digest()), (Seq(3), life.digests[2]));
        let bytes = life.engine.snapshot();
        let digest = life.engine.digest().0;
        let snapshot = Snapshot { next: 6, digest, logic_version: LOGIC_VERSION, bytes };
        let log = journal.install(&snapshot).expect("no fault");
        assert_eq!((log.engine.next_seq(), log.engine.digest().0), (Seq(6), digest));
        journal.die(None);
        assert_eq!(journal.open(2).expect("it was durable").0.engine.digest().0, digest);
        assert!(journal.open(1).is_err(), "an older life does not write here");
        journal.replace_disk();
        assert_eq!(journal.open(3).expect("an empty disk").0.engine.next_seq(), Seq(1));
    }
}
