//! Telemetry files beside the journal: `telemetry.jsonl` holds events, `timings.jsonl` what was measured.
//!
//! Events are a pure function of the journal: one line each, keyed by the number of the input, written only once that
//! input is durable. A restart regenerates from the fold what the former life had not yet written, so the file is what a
//! replay writes, byte for byte, unless lines had to be dropped; those are counted. Measured times are kept apart.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use lite_llm_core::event::Event;
use lite_llm_core::ids::Seq;
use serde::{Deserialize, Serialize};

/// The file of events.
pub const EVENTS_NAME: &str = "telemetry.jsonl";
/// The file of measured durations.
pub const TIMINGS_NAME: &str = "timings.jsonl";
/// Bytes that may wait for a file that cannot be written; what comes on top is dropped.
const BUFFER_BYTES_MAX: usize = 1 << 20;
/// Bytes after which a buffer is written without being asked.
const BUFFER_BYTES: usize = 1 << 16;
/// Bytes at the end of a file in which its last line is looked for.
const TAIL_BYTES: u64 = 1 << 20;

/// A line of `telemetry.jsonl`.
#[derive(Debug, Serialize)]
struct Line<'a> {
    seq: u64,
    event: &'a Event,
}

/// As much of a line as its place in the journal.
#[derive(Debug, Deserialize)]
struct Place {
    seq: u64,
}

/// What was measured, and of what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub enum Timing {
    /// A phase of the boot sequence.
    Phase(lite_llm_core::event::Phase),
    /// A batch step with this many rows.
    Step(u64, usize),
    /// Writing a commit group of the journal.
    Flush,
}

#[derive(Debug, Serialize)]
struct TimingLine {
    incarnation: u64,
    what: Timing,
    duration_ns: u64,
}

/// The event as a line of `telemetry.jsonl`, as replay writes it too.
pub fn line(seq: Seq, event: &Event) -> String {
    let mut text = serde_json::to_string(&Line { seq: seq.0, event }).expect("events are plain data");
    text.push('\n');
    text
}

/// Writer of both files.
#[derive(Debug)]
pub struct Telemetry {
    incarnation: u64,
    events: Log,
    timings: Log,
    /// Number of the last input in the file, and how many lines it has there.
    written: (u64, u64),
}

impl Telemetry {
    /// Opens the files in a state directory, and cuts off a line that a crash tore.
    ///
    /// # Errors
    /// If a file cannot be opened, read or cut.
    pub fn open(state_dir: &Path, incarnation: u64) -> io::Result<Self> {
        let (events, tail) = Log::open(&state_dir.join(EVENTS_NAME))?;
        let (timings, _) = Log::open(&state_dir.join(TIMINGS_NAME))?;
        Ok(Self { incarnation, events, timings, written: last_written(&tail) })
    }

    /// Takes an event of the fold; only what the file lacks is written.
    pub fn regenerate(&mut self, seq: Seq, event: &Event) {
        let (last, lines) = &mut self.written;
        if seq.0 == *last && *lines > 0 {
            *lines -= 1;
        } else if seq.0 >= *last {
            self.event(seq, event);
        }
    }

    /// Takes an event of a durable input.
    pub fn event(&mut self, seq: Seq, event: &Event) {
        self.events.line(&line(seq, event));
    }

    /// Takes a measured duration.
    pub fn timing(&mut self, what: Timing, duration: Duration) {
        let duration_ns = u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX);
        let line = TimingLine { incarnation: self.incarnation, what, duration_ns };
        let mut text = serde_json::to_string(&line).expect("timings are plain data");
        text.push('\n');
        self.timings.line(&text);
    }

    /// Lines that could not be written.
    pub fn dropped(&self) -> u64 {
        self.events.dropped + self.timings.dropped
    }

    /// Writes out what waits.
    pub fn flush(&mut self) {
        self.events.flush();
        self.timings.flush();
    }

    /// Writes out what waits, and makes it durable.
    ///
    /// # Errors
    /// If the file system refuses. Lines that wait are then dropped and counted.
    pub fn sync(&mut self) -> io::Result<()> {
        self.flush();
        self.events.sync()?;
        self.timings.sync()
    }
}

/// A file of lines with a bounded buffer. A write that failed half-way is written over by the next.
#[derive(Debug)]
struct Log {
    file: File,
    bytes: u64,
    buffer: Vec<u8>,
    lines: u64,
    dropped: u64,
}

impl Log {
    /// Opens a file for more lines, and returns the whole lines at its end.
    fn open(path: &Path) -> io::Result<(Self, Vec<u8>)> {
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
        let length = file.metadata()?.len();
        let start = length.saturating_sub(TAIL_BYTES);
        let mut tail = vec![0; usize::try_from(length - start).expect("a bounded tail")];
        file.read_exact_at(&mut tail, start)?;
        let whole = tail.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
        tail.truncate(whole);
        let bytes = start + whole as u64;
        file.set_len(bytes)?;
        Ok((Self { file, bytes, buffer: Vec::new(), lines: 0, dropped: 0 }, tail))
    }

    fn line(&mut self, text: &str) {
        if self.buffer.len() + text.len() > BUFFER_BYTES_MAX {
            self.dropped += 1;
            return;
        }
        self.buffer.extend_from_slice(text.as_bytes());
        self.lines += 1;
        if self.buffer.len() >= BUFFER_BYTES {
            self.flush();
        }
    }

    fn flush(&mut self) {
        if !self.buffer.is_empty() && self.file.write_all_at(&self.buffer, self.bytes).is_ok() {
            self.bytes += self.buffer.len() as u64;
            self.buffer.clear();
            self.lines = 0;
        }
    }

    fn sync(&mut self) -> io::Result<()> {
        if !self.buffer.is_empty() {
            self.dropped += std::mem::take(&mut self.lines);
            self.buffer.clear();
            self.file.set_len(self.bytes)?;
        }
        self.file.sync_data()
    }
}

/// The last input that lines speak of, and how many of the lines.
fn last_written(tail: &[u8]) -> (u64, u64) {
    let mut last = (0, 0);
    for line in tail.split(|&byte| byte == b'\n').rev().filter(|line| !line.is_empty()) {
        match serde_json::from_slice::<Place>(line) {
            Ok(Place { seq }) if last.1 == 0 => last = (seq, 1),
            Ok(Place { seq }) if seq == last.0 => last.1 += 1,
            _ => break,
        }
    }
    last
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use lite_llm_core::event::Phase;

    fn events() -> Vec<(Seq, Event)> {
        let phase = |phase| Event::PhaseDone { phase, bytes: 5 };
        vec![
            (Seq(1), phase(Phase::Config)),
            (Seq(2), phase(Phase::Resources)),
            (Seq(2), phase(Phase::Seed)),
            (Seq(2), phase(Phase::Log)),
            (Seq(4), Event::SwitchAborted),
        ]
    }

    #[test]
    fn a_restart_writes_exactly_what_is_missing() {
        let whole: String = events().iter().map(|(seq, event)| line(*seq, event)).collect();
        for cut in 0..=whole.len() {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join(EVENTS_NAME), &whole[..cut]).unwrap();
            let mut telemetry = Telemetry::open(dir.path(), 2).unwrap();
            for (seq, event) in events() {
                telemetry.regenerate(seq, &event);
            }
            telemetry.sync().unwrap();
            let written = std::fs::read_to_string(dir.path().join(EVENTS_NAME)).unwrap();
            assert_eq!(written, whole, "cut at {cut}");
        }
    }

    #[test]
    fn a_full_buffer_drops_and_counts() {
        let dir = tempfile::tempdir().unwrap();
        let mut telemetry = Telemetry::open(dir.path(), 1).unwrap();
        telemetry.events.file = File::open(dir.path().join(EVENTS_NAME)).unwrap();
        let lines = 2 * BUFFER_BYTES_MAX / line(Seq(4), &Event::SwitchAborted).len();
        for _ in 0..lines {
            telemetry.event(Seq(4), &Event::SwitchAborted);
        }
        assert!(telemetry.events.buffer.len() <= BUFFER_BYTES_MAX);
        assert!(telemetry.dropped() > lines as u64 / 3);
        telemetry.timing(Timing::Step(3, 2), Duration::from_nanos(17));
        telemetry.flush();
        let timings = std::fs::read_to_string(dir.path().join(TIMINGS_NAME)).unwrap();
        assert_eq!(timings, "{\"incarnation\":1,\"what\":{\"Step\":[3,2]},\"duration_ns\":17}\n");
    }
}
