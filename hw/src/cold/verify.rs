//! What has come is verified here, while the reader has the next in flight: the tail that no direct read reaches, the checksum.

use std::sync::mpsc::{Receiver, Sender};

use super::fault::corrupt;
use super::fetch::{Fetch, read_all};
use super::reader::{Answer, Message, Read, Told};
use super::staging::{Outlet, Staged};

/// The verifying thread's own.
pub(super) struct Verify {
    pub(super) fetch: Fetch,
    pub(super) reader: Sender<Message>,
    /// To whoever brings experts on from their rooms.
    pub(super) onward: Sender<Staged>,
    pub(super) outlet: Outlet,
}

impl Verify {
    pub(super) fn run(&self, reads: &Receiver<Read>) {
        while let Ok(read) = reads.recv() {
            if !self.one(read) {
                return;
            }
        }
    }

    /// Whether anybody hears what came of it.
    fn one(&self, mut read: Read) -> bool {
        let (expert, blob) = (read.load.expert, read.load.blob);
        let path = self.fetch.path(blob.shard);
        let direct = read.direct.min(blob.bytes);
        let slot = &mut read.place()[..blob.bytes];
        let tail = blob.bytes - direct;
        let came =
            read_all(&*self.fetch.blocks, blob.shard, blob.offset + direct as u64, &mut slot[direct..], tail);
        let result = match came {
            Err(fault) => Err(fault.of(expert, path)),
            Ok(()) => match blob.verify(path, slot) {
                Ok(()) => Ok(()),
                Err(_) if !read.again => {
                    read.again = true;
                    // A reader that is gone reads nothing again, and nobody waits for it.
                    let _ = self.reader.send(Message::Again(read));
                    self.outlet.bell.ring();
                    return true;
                }
                Err(error) => Err(corrupt(expert, &error)),
            },
        };
        let Some(room) = read.room.take() else {
            return (self.outlet.tell)(Told::Answer(read.answer(result)));
        };
        let Read { load, began, .. } = read;
        let staged = Staged { load, room, began };
        match result {
            // Whoever takes it on and is gone has said why.
            Ok(()) => self.onward.send(staged).is_ok(),
            Err(_) => self.outlet.answer(staged, result),
        }
    }
}

impl Read {
    /// Lets go of the slot, and says what came: whoever hears it may give the slot to somebody else at once.
    pub(super) fn answer(self, result: Result<(), lite_llm_core::input::Fault>) -> Answer {
        let Self { load, began, .. } = self;
        Answer { epoch: load.epoch, load: load.load, result, took: began.elapsed() }
    }
}
