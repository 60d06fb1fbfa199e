//! The journal thread: takes records and snapshots in order, writes them in commit groups, tells how far it is durable.
//!
//! While one group is being synced the next gathers in the channel, so the slower the disk the larger the groups. The
//! channel is bounded: when it is full the event loop waits, and with it everything else.

use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use lite_llm_core::ids::Seq;
use lite_llm_core::journal::frame::{GROUP_BYTES_MAX, frame_bytes};
use lite_llm_core::journal::{JournalError, Record, Store};

use super::NodeError;
use super::event_loop::Message;
use crate::disk::FileDisk;

/// Records that may wait for the disk.
const RECORDS_MAX: usize = 4096;

enum Entry {
    Record(Record),
    Snapshot { next: Seq, digest: [u8; 32], bytes: Vec<u8> },
    Trim { before: Seq },
    Abandon,
}

/// How far the journal is.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// The last durable record.
    pub(super) durable: Seq,
    /// A snapshot that became durable, and is not yet taken note of.
    pub(super) snapshot: Option<Seq>,
    /// How long the last groups took, not yet taken note of.
    pub(super) flushes: Vec<Duration>,
    /// Nothing more will be durable.
    pub(super) failed: Option<JournalError>,
}

/// The event loop's end of the journal thread.
#[derive(Debug)]
pub(super) struct Journal {
    entries: SyncSender<Entry>,
    progress: Arc<Mutex<Progress>>,
    thread: JoinHandle<()>,
}

impl Journal {
    /// Starts the thread. It wakes the event loop by `messages`.
    pub(super) fn start(store: Store<FileDisk>, messages: SyncSender<Message>) -> Result<Self, NodeError> {
        let (entries, receiver) = sync_channel(RECORDS_MAX);
        let progress =
            Arc::new(Mutex::new(Progress { durable: Seq(store.durable()), ..Progress::default() }));
        let writer = Writer { store, buffered: 0, messages, progress: Arc::clone(&progress) };
        let thread = std::thread::Builder::new()
            .name("journal".into())
            .spawn(move || writer.run(&receiver))
            .map_err(|source| NodeError::System { what: "cannot start the journal thread", source })?;
        Ok(Self { entries, progress, thread })
    }

    /// Hands over a record, before its input is handled.
    pub(super) fn record(&self, record: Record) -> Result<(), NodeError> {
        self.send(Entry::Record(record))
    }

    /// Hands over a snapshot: the state before input `next`.
    pub(super) fn snapshot(&self, next: Seq, digest: [u8; 32], bytes: Vec<u8>) -> Result<(), NodeError> {
        self.send(Entry::Snapshot { next, digest, bytes })
    }

    /// Lets go of records before `before`.
    pub(super) fn trim(&self, before: Seq) -> Result<(), NodeError> {
        self.send(Entry::Trim { before })
    }

    /// How far the journal is.
    pub(super) fn progress(&self) -> MutexGuard<'_, Progress> {
        lock(&self.progress)
    }

    /// Writes what was handed over, and ends the thread.
    pub(super) fn close(self) -> Result<(), NodeError> {
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
    pub(super) fn abandon(self) {
        // It may have ended already.
        let _ = self.entries.send(Entry::Abandon);
        let _ = self.thread.join();
    }

    fn send(&self, entry: Entry) -> Result<(), NodeError> {
        self.entries.send(entry).map_err(|_| match self.progress().failed.take() {
            Some(error) => error.into(),
            None => NodeError::Panic {
                seq: self.progress().durable,
                thread: "journal",
                message: "the thread is gone".into(),
            },
        })
    }
}

struct Writer {
    store: Store<FileDisk>,
    /// Bytes of the records that are not yet written.
    buffered: usize,
    messages: SyncSender<Message>,
    progress: Arc<Mutex<Progress>>,
}

impl Writer {
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
                    lock(&self.progress).snapshot = Some(next);
                }
                Entry::Trim { before } => self.store.trim(before.0)?,
                Entry::Abandon => return Ok(false),
            }
            next = entries.try_recv().ok();
        }
        self.flush()?;
        self.wake();
        Ok(true)
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
        self.buffered = 0;
        let mut progress = lock(&self.progress);
        if durable > progress.durable && progress.flushes.len() < RECORDS_MAX {
            progress.flushes.push(started.elapsed());
        }
        progress.durable = durable;
        Ok(())
    }

    /// A full channel needs no wake-up: the event loop looks at the progress after every message.
    fn wake(&self) {
        let _ = self.messages.try_send(Message::Wake);
    }
}

fn lock(progress: &Mutex<Progress>) -> MutexGuard<'_, Progress> {
    progress.lock().unwrap_or_else(PoisonError::into_inner)
}
