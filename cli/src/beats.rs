//! Signs of life for a supervisor, as JSON lines on standard output.
//!
//! The heart beats on a thread of its own from the first moment, whatever the node does. Progress is asked of the
//! node's event loop, so that a process that lives but is stuck is seen to be.

use crate::terminal;
use anyhow::Context;
use lite_llm_core::lifecycle::Lifecycle;
use lite_llm_hw::node::NodeHandle;
use lite_llm_hw::supervisor::Beat;
use std::io::Write;
use std::time::Duration;

/// Time between two beats.
const EVERY: Duration = Duration::from_millis(500);

/// Starts the heart.
pub(crate) fn heart() -> anyhow::Result<()> {
    spawn("heart", || {
        loop {
            if say(Beat::Heart).is_err() {
                return;
            }
            std::thread::sleep(EVERY);
        }
    })
}

/// Starts to tell progress.
pub(crate) fn progress(node: NodeHandle) -> anyhow::Result<()> {
    spawn("progress", move || {
        while let Ok(status) = node.status() {
            let serving = matches!(status.lifecycle, Lifecycle::Active | Lifecycle::Reconfiguring);
            let busy = status.stepping || !serving;
            if say(Beat::Progress { record: status.seq.0, busy }).is_err() {
                return;
            }
            std::thread::sleep(EVERY);
        }
    })
}

fn spawn(name: &str, beat: impl FnOnce() + Send + 'static) -> anyhow::Result<()> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(beat)
        .with_context(|| format!("cannot start the {name} thread"))?;
    Ok(())
}

fn say(beat: Beat) -> std::io::Result<()> {
    let mut out = terminal::stdout();
    writeln!(out, "{}", beat.line())?;
    out.flush()
}
