//! When a snapshot is taken, and what it lets go of.

use crate::engine::Context;
use crate::ids::Seq;
use crate::output::Output;
use crate::state::State;
use serde::{Deserialize, Serialize};

/// What is known of snapshots.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Snapshots {
    /// Somebody asked for one.
    pub(crate) wanted: bool,
    /// One is being written.
    pub(crate) writing: bool,
    /// Where the last one was taken.
    pub(crate) last: Seq,
}

impl State {
    /// Asks for a snapshot when it is due or wanted.
    pub(crate) fn take_snapshot(&mut self, cx: &mut Context<'_>) {
        let every = self.config.snapshot_every;
        let due = every > 0 && cx.seq.0 - self.snapshots.last.0 >= every;
        if (due || self.snapshots.wanted) && !self.snapshots.writing && self.serving() && self.drain.is_none()
        {
            self.snapshots = Snapshots { wanted: false, writing: true, last: cx.seq };
            cx.say(Output::Snapshot);
        }
    }

    pub(crate) fn snapshot_durable(&mut self, cx: &mut Context<'_>, next: Seq) {
        assert!(self.snapshots.writing && next <= cx.seq, "a snapshot that nobody asked for");
        self.snapshots.writing = false;
        cx.say(Output::Trim { before: next });
        self.snapshot_granted(cx, next);
    }
}
