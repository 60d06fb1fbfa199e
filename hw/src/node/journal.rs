//! The journal thread: takes records and snapshots in order, writes them in commit groups, tells how far it is durable.
//!
//! While one group is being synced the next gathers in the channel, so the slower the disk the larger the groups. The
//! channel is bounded: when it is full the event loop waits, and with it everything else.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lite_llm_core::disk::Disk;
use lite_llm_core::ids::Seq;
use lite_llm_core::journal::frame::{BLOCK_BYTES, GROUP_BYTES_MAX, GROUP_HEADER_BYTES, frame_bytes};
use lite_llm_core::journal::{JournalError, Record, Snapshot, Store};

use super::NodeError;
use super::reports::{Report, Reports};

/// Records that may wait for the disk.
const RECORDS_MAX: usize = 4096;

enum Entry {
    Record(Record),
    Snapshot { next: Seq, digest: [u8; 32], bytes: Vec<u8> },
    Trim { before: Seq },
    Change(Change, SyncSender<Result<Contents, JournalError>>),
    Abandon,
}

/// What a rank does with its journal beside adding to it.
#[derive(Debug)]
pub(crate) enum Change {
    /// Nothing; its records from here on are wanted.
    Read { from: Seq },
    /// Forget what is after this record.
    Cut { keep: Seq },
    /// Take this in place of everything.
    Install(Snapshot),
    /// Nothing is missing, whatever tail was once cut.
    Whole,
}

/// What is in a journal: its snapshot, if it begins after what was asked for, and the records from there on.
pub(crate) type Contents = (Option<Snapshot>, Vec<Record>);

/// How far the journal is.
#[derive(Debug, Default)]
pub(crate) struct Progress {
    /// The last durable record.
    pub(crate) durable: Seq,
    /// A snapshot that became durable, and is not yet taken note of.
    pub(crate) snapshot: Option<Seq>,
    /// Bytes written since the last snapshot, or since the first record.
    pub(crate) bytes: u64,
    /// How long the last groups took, not yet taken note of.
    pub(crate) flushes: Vec<Duration>,
    /// Nothing more will be durable.
    pub(crate) failed: Option<JournalError>,
}

/// The event loop's end of the journal thread.
#[derive(Debug)]
pub(crate) struct Journal {
    entries: SyncSender<Entry>,
    progress: Arc<Mutex<Progress>>,
    thread: JoinHandle<()>,
}

impl Journal {
    /// Starts the thread over a journal that has `bytes` already. It wakes the loop by `reports`.
    pub(crate) fn start<D: Disk + Send + 'static>(
        store: Store<D>,
        bytes: u64,
        reports: Reports,
    ) -> Result<Self, NodeError> {
        let (entries, receiver) = sync_channel(RECORDS_MAX);
        let progress =
            Arc::new(Mutex::new(Progress { durable: Seq(store.durable()), bytes, ..Progress::default() }));
        let writer = Writer { store, buffered: 0, reports, progress: Arc::clone(&progress) };
        let thread = std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || writer.run(&receiver))
            .map_err(|source| NodeError::System { what: "cannot start the journal thread", source })?;
        Ok(Self { entries, progress, thread })
    }

    /// Hands over a record: the next one of the log.
    pub(crate) fn record(&self, record: Record) -> Result<(), NodeError> {
        self.send(Entry::Record(record))
    }

    /// Hands over a snapshot: the state before input `next`.
    pub(crate) fn snapshot(&self, next: Seq, digest: [u8; 32], bytes: Vec<u8>) -> Result<(), NodeError> {
        self.send(Entry::Snapshot { next, digest, bytes })
    }

    /// Lets go of records before `before`.
    pub(crate) fn trim(&self, before: Seq) -> Result<(), NodeError> {
        self.send(Entry::Trim { before })
    }

    /// Waits until all that was handed over is durable, then does this and says what is there afterwards.
    pub(crate) fn change(&self, change: Change) -> Result<Contents, NodeError> {
        let (reply, answer) = sync_channel(1);
        self.send(Entry::Change(change, reply))?;
        match answer.recv() {
            Ok(contents) => Ok(contents?),
            Err(_) => Err(self.gone()),
        }
    }

    /// How far the journal is.
    pub(crate) fn progress(&self) -> MutexGuard<'_, Progress> {
        lock(&self.progress)
    }

    /// Writes what was handed over, and ends the thread.
    pub(crate) fn close(self) -> Result<(), NodeError> {
        drop(self.entries);
        if let Err(panic) = self.thread.join() {
            let message = super::error::panic_message(&*panic);
            return Err(NodeError::Panic { seq: lock(&self.progress).durable, thread: "journal", message });
        }
        match lock(&self.progress).failed.take() {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// Ends the thread as a kill would: what it has not yet written is lost.
    pub(crate) fn abandon(self) {
        // It may have ended already.
        let _ = self.entries.send(Entry::Abandon);
        let _ = self.thread.join();
    }

    fn send(&self, entry: Entry) -> Result<(), NodeError> {
        self.entries.send(entry).map_err(|_| self.gone())
    }

    fn gone(&self) -> NodeError {
        let failed = self.progress().failed.take();
        match failed {
            Some(error) => error.into(),
            None => NodeError::Panic {
                seq: self.progress().durable,
                thread: "journal",
                message: "the thread is gone".into(),
            },
        }
    }
}

struct Writer<D: Disk> {
    store: Store<D>,
    /// Bytes of the records that are not yet written.
    buffered: usize,
    reports: Reports,
    progress: Arc<Mutex<Progress>>,
}

impl<D: Disk> Writer<D> {
    fn run(mut self, entries: &Receiver<Entry>) {
        while let Ok(first) = entries.recv() {
            match self.group(first, entries) {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    lock(&self.progress).failed = Some(error);
                    return self.wake();
                }
            }
        }
    }

    /// Writes everything that waits as one group; `false` if the journal is abandoned.
    fn group(&mut self, first: Entry, entries: &Receiver<Entry>) -> Result<bool, JournalError> {
        let mut next = Some(first);
        while let Some(entry) = next {
            match entry {
                Entry::Record(record) => self.push(record)?,
                Entry::Snapshot { next, digest, bytes } => {
                    self.store.write_snapshot(next.0, digest, &bytes)?;
                    let mut progress = lock(&self.progress);
                    progress.snapshot = Some(next);
                    progress.bytes = 0;
                }
                Entry::Trim { before } => self.store.trim(before.0)?,
                Entry::Change(change, reply) => {
                    self.flush()?;
                    let contents = self.change(change);
                    let failed = contents.is_err();
                    // Who asked is gone only if all is over.
                    let _ = reply.send(contents);
                    if failed {
                        return Ok(false);
                    }
                }
                Entry::Abandon => return Ok(false),
            }
            next = entries.try_recv().ok();
        }
        self.flush()?;
        self.wake();
        Ok(true)
    }

    fn change(&mut self, change: Change) -> Result<Contents, JournalError> {
        let from = match change {
            Change::Read { from } => from,
            Change::Cut { keep } => {
                self.store.cut(keep.0)?;
                Seq(1)
            }
            Change::Install(snapshot) => {
                self.store.install(&snapshot)?;
                Seq(1)
            }
            Change::Whole => {
                self.store.whole()?;
                return Ok((None, Vec::new()));
            }
        };
        lock(&self.progress).durable = Seq(self.store.durable());
        self.store.read_from(from.0)
    }

    /// Buffers a record, after writing out what is buffered if both are more than one group may be.
    fn push(&mut self, record: Record) -> Result<(), JournalError> {
        let Record { seq, time_ns, digest, payload } = record;
        let bytes = frame_bytes(&payload);
        if self.buffered + bytes > GROUP_BYTES_MAX {
            self.flush()?;
        }
        self.buffered += bytes;
        self.store.push(seq, time_ns, digest, payload)
    }

    fn flush(&mut self) -> Result<(), JournalError> {
        let started = Instant::now();
        let durable = Seq(self.store.flush()?);
        let bytes = (GROUP_HEADER_BYTES + std::mem::take(&mut self.buffered)).next_multiple_of(BLOCK_BYTES);
        let mut progress = lock(&self.progress);
        if durable > progress.durable {
            progress.bytes += bytes as u64;
        }
        if durable > progress.durable && progress.flushes.len() < RECORDS_MAX {
            progress.flushes.push(started.elapsed());
        }
        progress.durable = durable;
        Ok(())
    }

    fn wake(&self) {
        self.reports.tell(Report::Wake);
    }
}

fn lock(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use crate::disk::FileDisk;
    use lite_llm_core::disk::{DiskError, DiskErrorKind, DiskOp};
    use lite_llm_core::journal::{Header, scan};
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc::Receiver;

    const HEADER: Header = Header { logic_version: 1, node: 0, incarnation: 1, identity: [7; 32] };

    /// A disk whose appends can be made to fail for want of space.
    struct Full {
        disk: FileDisk,
        full: Arc<AtomicBool>,
    }

    impl Disk for Full {
        fn create_new(&mut self, name: &str) -> Result<(), DiskError> {
            self.disk.create_new(name)
        }
        fn append(&mut self, name: &str, bytes: &[u8]) -> Result<(), DiskError> {
            if self.full.load(Ordering::SeqCst) {
                let detail = "no space left on device".into();
                let (op, kind) = (DiskOp::Append, DiskErrorKind::NoSpace);
                return Err(DiskError { op, name: name.into(), kind, detail });
            }
            self.disk.append(name, bytes)
        }
        fn sync(&mut self, name: &str) -> Result<(), DiskError> {
            self.disk.sync(name)
        }
        fn sync_dir(&mut self) -> Result<(), DiskError> {
            self.disk.sync_dir()
        }
        fn read_at(&mut self, name: &str, offset: u64, into: &mut [u8]) -> Result<usize, DiskError> {
            self.disk.read_at(name, offset, into)
        }
        fn len(&mut self, name: &str) -> Result<u64, DiskError> {
            self.disk.len(name)
        }
        fn rename(&mut self, from: &str, to: &str) -> Result<(), DiskError> {
            self.disk.rename(from, to)
        }
        fn remove(&mut self, name: &str) -> Result<(), DiskError> {
            self.disk.remove(name)
        }
        fn list(&mut self) -> Result<Vec<String>, DiskError> {
            self.disk.list()
        }
    }

    fn record(seq: u64, bytes: usize) -> Record {
        Record { seq, time_ns: seq, digest: [0; 32], payload: vec![1; bytes] }
    }

    fn wait_for(journal: &Journal, messages: &Receiver<Report>, seq: u64) {
        while journal.progress().durable < Seq(seq) {
            assert!(matches!(messages.recv(), Ok(Report::Wake)));
        }
    }

    #[test]
    fn a_full_disk_ends_the_journal_and_what_was_durable_stays() {
        let dir = tempfile::tempdir().unwrap();
        let full = Arc::new(AtomicBool::new(false));
        let disk = Full { disk: FileDisk::open(dir.path()).unwrap(), full: Arc::clone(&full) };
        let (messages, wakes) = sync_channel(16);
        let journal =
            Journal::start(Store::open(disk, &HEADER).unwrap().0, 0, Reports::to(messages)).unwrap();
        journal.record(record(1, 100)).unwrap();
        wait_for(&journal, &wakes, 1);
        full.store(true, Ordering::SeqCst);
        journal.record(record(2, 100)).unwrap();
        while journal.progress().failed.is_none() {
            assert!(matches!(wakes.recv(), Ok(Report::Wake)), "a failure wakes the event loop");
        }
        assert_eq!(journal.progress().durable, Seq(1));
        let error = journal.close().unwrap_err().to_string();
        assert!(error.contains("no space left"), "{error}");
        let records = scan(&mut FileDisk::open_read_only(dir.path()).unwrap()).unwrap().records;
        assert_eq!(records, [record(1, 100)]);
    }

    #[test]
    fn what_is_more_than_a_group_becomes_several() {
        let dir = tempfile::tempdir().unwrap();
        let (messages, _wakes) = sync_channel::<Report>(1);
        let store = Store::open(FileDisk::open(dir.path()).unwrap(), &HEADER).unwrap().0;
        let journal = Journal::start(store, 0, Reports::to(messages)).unwrap();
        let large = 15 << 20;
        for seq in 1..=6 {
            journal.record(record(seq, large)).unwrap();
        }
        journal.snapshot(Seq(4), [9; 32], vec![5; 1000]).unwrap();
        journal.record(record(7, 10)).unwrap();
        journal.close().unwrap();
        let scanned = scan(&mut FileDisk::open_read_only(dir.path()).unwrap()).unwrap();
        assert_eq!(scanned.records.iter().map(|record| record.seq).collect::<Vec<_>>(), [4, 5, 6, 7]);
        assert_eq!(scanned.snapshot.unwrap().bytes, vec![5; 1000]);
    }

    #[test]
    fn what_is_abandoned_is_lost_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let (messages, wakes) = sync_channel(16);
        let store = Store::open(FileDisk::open(dir.path()).unwrap(), &HEADER).unwrap().0;
        let journal = Journal::start(store, 0, Reports::to(messages)).unwrap();
        journal.record(record(1, 10)).unwrap();
        wait_for(&journal, &wakes, 1);
        journal.record(record(2, 10)).unwrap();
        journal.abandon();
        let (_, recovered) = Store::open(FileDisk::open(dir.path()).unwrap(), &HEADER).unwrap();
        let seqs: Vec<u64> = recovered.records.iter().map(|record| record.seq).collect();
        assert!(seqs == [1] || seqs == [1, 2], "{seqs:?}");
    }
}
