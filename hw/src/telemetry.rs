//! Telemetry files beside the journal: `telemetry.jsonl` holds events, `timings.jsonl` what was measured.
//!
//! Events are a pure function of the journal: one line each, keyed by the number of the input, written only once that
//! input is durable. A restart regenerates from the fold what the former life had not yet written, so the file is what a
//! replay writes, byte for byte, unless lines had to be dropped; those are counted. Measured times are kept apart.
//!
//! A file that has grown to its bound is renamed to `NAME.old`, in the place of the one before, and begun anew.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
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
/// Bytes that a file may grow to; with the old one, twice as many are kept.
const FILE_BYTES_MAX: u64 = 64 << 20;
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
    /// Of that, waiting for experts: the number of the step. Only steps that waited have it.
    Wait(u64),
    /// Reading an expert into a slot: the number of the load.
    Load(u64),
    /// Bringing an expert from the warm arena into the hot one: the number of the load.
    Promote(u64),
    /// Making modified experts durable: the record that asked for it.
    Persist(u64),
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
    path: PathBuf,
    file: File,
    bytes_max: u64,
    bytes: u64,
    buffer: Vec<u8>,
    lines: u64,
    dropped: u64,
}

impl Log {
    /// Opens a file for more lines, and returns the whole lines at its end.
    fn open(path: &Path) -> io::Result<(Self, Vec<u8>)> {
        let (file, bytes, mut tail) = open(path)?;
        let old = old(path);
        if bytes < TAIL_BYTES && old.exists() {
            // The file was begun anew a little while ago: the lines before are in the old one.
            tail.splice(..0, tail_of(&File::open(&old)?)?.1);
        }
        let path = path.to_owned();
        let log =
            Self { path, file, bytes_max: FILE_BYTES_MAX, bytes, buffer: Vec::new(), lines: 0, dropped: 0 };
        Ok((log, tail))
    }

    /// Puts the full file aside, and begins another.
    fn begin_anew(&mut self) -> io::Result<()> {
        std::fs::rename(&self.path, old(&self.path))?;
        (self.file, self.bytes, _) = open(&self.path)?;
        Ok(())
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
        let full = self.bytes > 0 && self.bytes + self.buffer.len() as u64 > self.bytes_max;
        if full && self.begin_anew().is_err() {
            return;
        }
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

fn old(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".old");
    name.into()
}

/// Opens or makes a file, cuts off what is no whole line, and returns its length and last lines.
fn open(path: &Path) -> io::Result<(File, u64, Vec<u8>)> {
    let file =
        OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path)?;
    let (bytes, tail) = tail_of(&file)?;
    file.set_len(bytes)?;
    Ok((file, bytes, tail))
}

/// How long a file is without what is no whole line, and its last whole lines.
fn tail_of(file: &File) -> io::Result<(u64, Vec<u8>)> {
    let length = file.metadata()?.len();
    let start = length.saturating_sub(TAIL_BYTES);
    let mut tail = vec![0; usize::try_from(length - start).expect("a bounded tail")];
    file.read_exact_at(&mut tail, start)?;
    let whole = tail.iter().rposition(|&byte| byte == b'\n').map_or(0, |at| at + 1);
    tail.truncate(whole);
    Ok((start + whole as u64, tail))
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
    fn a_full_file_gives_way_to_another() {
        let whole: String = events().iter().map(|(seq, event)| line(*seq, event)).collect();
        // One record's lines never fill two files; here it has three.
        for bound in 3 * line(Seq(2), &events()[1].1).len()..=whole.len() + 1 {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join(EVENTS_NAME);
            for kept in 0..events().len() {
                // A life that ends after some lines, with the file as it then is; the next one writes what is missing.
                let mut telemetry = Telemetry::open(dir.path(), 1).unwrap();
                telemetry.events.bytes_max = bound as u64;
                for (seq, event) in &events()[..=kept] {
                    telemetry.regenerate(*seq, event);
                    telemetry.flush();
                }
                let written = std::fs::read_to_string(&path).unwrap();
                assert!(whole.contains(&written), "bound {bound}, {kept}: {written}");
                assert!(
                    written.len() <= bound || written.lines().count() == 1,
                    "bound {bound}, {kept}: {written}"
                );
            }
            let before = std::fs::read_to_string(old(&path)).unwrap_or_default();
            let both = before + &std::fs::read_to_string(&path).unwrap();
            assert!(whole.ends_with(&both), "bound {bound}: {both}");
            std::fs::write(&path, "").unwrap();
            let last = Telemetry::open(dir.path(), 3).unwrap().written;
            assert!(last.0 > 0 || !old(&path).exists(), "bound {bound}: the old file is looked at");
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
