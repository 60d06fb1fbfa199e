//! What is recorded of a death: when, how, what the node said last, and where its journal ends.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use lite_llm_core::engine::Engine;
use lite_llm_core::input::Input;
use lite_llm_core::journal::{Record, Scanned, scan};
use lite_llm_core::replay::{decode_input, fold};
use serde::Serialize;

use super::{Exit, Verdict};
use crate::disk::FileDisk;

/// Records of the journal's end that a report shows.
const TAIL_RECORDS: usize = 16;
/// Characters of an input that a report shows.
const INPUT_CHARS: usize = 400;
/// Reports that are kept in a state directory.
const REPORTS_MAX: usize = 32;
const PREFIX: &str = "crash-";
const SUFFIX: &str = ".json";

/// One death.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct CrashReport {
    /// When, in nanoseconds since 1970.
    pub failed_at_ns: u64,
    /// How.
    pub exit: Exit,
    /// What the beats said; anything but `Alive` is why the supervisor killed it.
    pub verdict: Verdict,
    /// The last record number that a beat told.
    pub progress: Option<u64>,
    /// The last lines on its standard error.
    pub stderr: Vec<String>,
    /// The end of its journal.
    pub journal: JournalTail,
}

/// The end of a journal, read when its writer is dead.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct JournalTail {
    /// The incarnation that last opened it.
    pub incarnation: Option<u64>,
    /// The last record that can be read.
    pub last: u64,
    /// Digest of the state after it, in hexadecimal.
    pub state_digest: Option<String>,
    /// The record at which the fold panics.
    pub panic_record: Option<u64>,
    /// Why it cannot be read, or not be folded.
    pub error: Option<String>,
    /// Bytes of a torn write at its end.
    pub torn_bytes: u64,
    /// The last records, oldest first.
    pub records: Vec<TailRecord>,
}

/// A record for people.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct TailRecord {
    /// Its number.
    pub seq: u64,
    /// Its time, in nanoseconds.
    pub time_ns: u64,
    /// The input, cut short.
    pub input: String,
}

impl JournalTail {
    /// Reads and folds the journal of a state directory. What is wrong with it is part of the answer.
    pub fn read(state_dir: &Path) -> Self {
        let disk = FileDisk::open_read_only(state_dir).map_err(|error| error.to_string());
        let scanned = disk.and_then(|mut disk| scan(&mut disk).map_err(|error| error.to_string()));
        match scanned {
            Ok(scanned) => Self::of(&scanned),
            Err(error) => Self { error: Some(error), ..Self::default() },
        }
    }

    fn of(scanned: &Scanned) -> Self {
        let mut tail = Self {
            incarnation: scanned.header.map(|header| header.incarnation),
            torn_bytes: scanned.cut.as_ref().map_or(0, |cut| cut.bytes),
            records: last_records(&scanned.records),
            ..Self::default()
        };
        let mut engine = match &scanned.snapshot {
            None => Engine::new(),
            Some(snapshot) => match Engine::restore(&snapshot.bytes) {
                Ok(engine) => engine,
                Err(error) => return Self { error: Some(error.to_string()), ..tail },
            },
        };
        let folded = catch_unwind(AssertUnwindSafe(|| fold(&mut engine, &scanned.records, |_, _| {})));
        tail.last = engine.next_seq().0 - 1;
        match folded {
            Ok(Ok(())) => tail.state_digest = Some(engine.state_digest().to_string()),
            Ok(Err(error)) => tail.error = Some(error.to_string()),
            Err(_) => {
                tail.panic_record = Some(tail.last);
                tail.error = Some(format!("folding record {} panics", tail.last));
            }
        }
        tail
    }
}

fn last_records(records: &[Record]) -> Vec<TailRecord> {
    let start = records.len().saturating_sub(TAIL_RECORDS);
    let show = |record: &Record| {
        let input = match decode_input::<Input>(&record.payload) {
            Ok(input) => format!("{input:?}"),
            Err(error) => format!("cannot be decoded: {error}"),
        };
        let cut = input.char_indices().nth(INPUT_CHARS).map_or(input.len(), |(at, _)| at);
        TailRecord { seq: record.seq, time_ns: record.time_ns, input: input[..cut].to_owned() }
    };
    records[start..].iter().map(show).collect()
}

impl CrashReport {
    /// Writes the report into a state directory, durably, and lets go of the oldest above a bound.
    ///
    /// # Errors
    /// If the file system refuses.
    pub fn write(&self, state_dir: &Path) -> io::Result<PathBuf> {
        let path = state_dir.join(format!("{PREFIX}{:020}{SUFFIX}", self.failed_at_ns));
        let aside = path.with_extension("aside");
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside)?;
        let text = serde_json::to_string_pretty(self).expect("a report is plain data");
        file.write_all(text.as_bytes())?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        std::fs::rename(&aside, &path)?;
        let mut reports: Vec<PathBuf> = std::fs::read_dir(state_dir)?
            .filter_map(|entry| Some(entry.ok()?.path()))
            .filter(|path| is_report(path))
            .collect();
        reports.sort();
        for old in &reports[..reports.len().saturating_sub(REPORTS_MAX)] {
            std::fs::remove_file(old)?;
        }
        File::open(state_dir)?.sync_all()?;
        Ok(path)
    }
}

fn is_report(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str());
    name.is_some_and(|name| name.starts_with(PREFIX) && name.ends_with(SUFFIX))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;
    use lite_llm_core::config::Config;
    use lite_llm_core::ids::Incarnation;
    use lite_llm_core::journal::{Header, Store};
    use lite_llm_core::replay::encode_input;

    /// A journal of these inputs, whose digests are right as far as the engine bears them.
    fn write_journal(dir: &Path, inputs: &[Input]) -> Engine {
        let header = Header { logic_version: 1, node: 0, incarnation: 3, identity: [7; 32] };
        let (mut store, _) = Store::open(FileDisk::open(dir).unwrap(), &header).unwrap();
        let mut engine = Engine::new();
        for (at, input) in (1..).zip(inputs) {
            store.push(at, at * 10, engine.digest().0, encode_input(input)).unwrap();
            let handle = || {
                engine.handle(lite_llm_core::time::Time(at * 10), input.clone());
                while !matches!(engine.poll(), lite_llm_core::output::Output::Wait { .. }) {}
            };
            let _ = catch_unwind(AssertUnwindSafe(handle));
        }
        store.flush().unwrap();
        engine
    }

    fn boot() -> Input {
        Input::Boot { incarnation: Incarnation(3), config: Config::default().into(), entropy: 1 }
    }

    #[test]
    fn the_tail_names_the_record_that_panics() {
        let dir = tempfile::tempdir().unwrap();
        let engine = write_journal(dir.path(), &[boot(), Input::Reserved]);
        let tail = JournalTail::read(dir.path());
        assert_eq!((tail.last, tail.panic_record, tail.incarnation), (2, None, Some(3)));
        assert_eq!(tail.state_digest, Some(engine.state_digest().to_string()));
        assert!(tail.records[1].input.starts_with("Reserved"), "{:?}", tail.records);

        let dir = tempfile::tempdir().unwrap();
        // No base parameters were asked for: an engine that is told of them has a driver that is broken.
        write_journal(dir.path(), &[boot(), Input::BaseLoaded { shard: 0 }]);
        let tail = JournalTail::read(dir.path());
        assert_eq!((tail.last, tail.panic_record, tail.state_digest), (2, Some(2), None));
        assert!(JournalTail::read(Path::new("/nowhere")).error.is_some());
    }

    #[test]
    fn reports_are_kept_up_to_a_bound() {
        let dir = tempfile::tempdir().unwrap();
        let report = |failed_at_ns| CrashReport {
            failed_at_ns,
            exit: Exit::Signal(9),
            verdict: Verdict::Alive,
            progress: Some(4),
            stderr: vec!["last words".into()],
            journal: JournalTail::default(),
        };
        for at in 0..REPORTS_MAX as u64 + 3 {
            report(at).write(dir.path()).unwrap();
        }
        let mut names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
        names.sort();
        assert_eq!(names.len(), REPORTS_MAX);
        let oldest: serde_json::Value =
            serde_json::from_str(&std::fs::read_to_string(&names[0]).unwrap()).unwrap();
        assert_eq!(oldest["failed_at_ns"], 3);
        assert_eq!(oldest["exit"]["Signal"], 9);
        assert_eq!(oldest["stderr"][0], "last words");
    }
}
