//! What the threads of a node report to its loop, whichever loop that is.

use crate::telemetry::Timing;
use lite_llm_core::cluster::message::Tag;
use lite_llm_core::input::Input;
use std::sync::Arc;
use std::sync::mpsc::SyncSender;
use std::time::Duration;

/// Something that a thread has done.
#[allow(
    clippy::large_enum_variant,
    reason = "it moves once, through a bounded channel; a box would be one allocation more"
)]
#[derive(Debug)]
pub(crate) enum Report {
    /// A completion, from compute or a loader, of the epoch that it was asked in; with what it took, if it was measured.
    Done { epoch: u64, input: Input, took: Option<(Timing, Duration)> },
    /// The compute backend has something for another rank.
    Data { epoch: u64, to: u32, tag: Tag, bytes: Vec<u8> },
    /// The journal is further than before.
    Wake,
    /// A device answers no more, and keeps slots: there is no going on.
    Lost { what: String },
    /// What computes is lost, by an error or a hang of the device: there is no going on in this process.
    DeviceLost { what: String },
    /// A thread found a bug.
    Panicked { thread: &'static str, message: String },
}

/// Where threads report to; whether anybody hears it.
#[derive(Clone)]
pub(crate) struct Reports(Arc<dyn Fn(Report) -> bool + Send + Sync>);

impl Reports {
    /// To a loop that takes reports among other messages. A full channel needs no wake-up: a loop looks at the journal after
    /// every message.
    pub(crate) fn to<M: From<Report> + Send + 'static>(messages: SyncSender<M>) -> Self {
        Self(Arc::new(move |report| match report {
            Report::Wake => {
                let _ = messages.try_send(Report::Wake.into());
                true
            }
            report => messages.send(report.into()).is_ok(),
        }))
    }

    pub(crate) fn tell(&self, report: Report) -> bool {
        (self.0)(report)
    }
}

impl std::fmt::Debug for Reports {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reports")
    }
}
