//! The results of a batch: where they go, and which an earlier process has had.

use crate::exit::usage;
use crate::terminal;
use crate::whole_file::write_whole;
use anyhow::Context;
use lite_llm_core::digest::Digest;
use lite_llm_core::input::Body;
use serde_json::{Value, json};
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, ErrorKind, Seek, SeekFrom, Write};
use std::path::Path;

/// Results that go to standard output, kept in the state directory: the journal may have forgotten a stream before its
/// reader has its result.
const KEPT: &str = "results.jsonl";

/// The results of a batch.
#[derive(Debug)]
pub(crate) struct Results {
    to: To,
    done: BTreeSet<String>,
    /// Those that are not what was asked for.
    pub(crate) failed: u64,
}

#[derive(Debug)]
enum To {
    /// The file of `--out`.
    Out(File),
    /// Standard output, and the file that keeps them, if somebody can ask again.
    Stdout { before: String, kept: Option<File> },
}

impl Results {
    /// Opens where the results go. Those that are there are done; those that were printed are printed again, because
    /// nobody knows what their reader has of them.
    ///
    /// # Errors
    /// If the file cannot be written, has something else in it, or is there without the state that wrote it.
    pub(crate) fn open(
        out: Option<&Path>,
        state: Option<&Path>,
        bodies: &BTreeMap<&str, Digest>,
    ) -> anyhow::Result<Self> {
        let mut results =
            Self { to: To::Stdout { before: String::new(), kept: None }, done: BTreeSet::new(), failed: 0 };
        match (out, state) {
            (Some(path), _) => {
                let (file, lines) = open(path)?;
                if !lines.is_empty() && state.is_none() {
                    return Err(usage(format!(
                        "{} is there already: name another file, or go on with the --state that wrote it",
                        path.display()
                    )));
                }
                lines.iter().for_each(|line| results.note(line));
                results.to = To::Out(file);
            }
            (None, Some(state)) => {
                let before = results.print_again(&state.join(KEPT), bodies)?;
                results.to = To::Stdout { before, kept: None };
            }
            (None, None) => {}
        }
        Ok(results)
    }

    /// Prints the results that were kept of these requests; their lines are what is to be kept from here on.
    fn print_again(&mut self, path: &Path, bodies: &BTreeMap<&str, Digest>) -> anyhow::Result<String> {
        let cannot = || format!("cannot read the results {}", path.display());
        match path.metadata() {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(String::new()),
            // A pipe may never answer.
            there => anyhow::ensure!(there.with_context(cannot)?.is_file(), "{}: it is no file", cannot()),
        }
        let file = File::open(path).with_context(cannot)?;
        let mut kept = String::new();
        for mut line in Lines::read(path, &file)?.lines {
            let id = line["result"]["id"].as_str().unwrap_or_default();
            if bodies.get(id).map(Digest::to_string).as_deref() == line["body"].as_str() {
                kept += &format!("{line}\n");
                let result = line["result"].take();
                print(&result)?;
                self.note(&result);
            }
        }
        Ok(kept)
    }

    fn note(&mut self, result: &Value) {
        self.done.insert(result["id"].as_str().unwrap_or_default().to_owned());
        let complete = matches!(result["finish_reason"].as_str(), Some("eos" | "stop" | "length"));
        self.failed += u64::from(!complete);
    }

    /// Whether a request has its result.
    pub(crate) fn has(&self, id: &str) -> bool {
        self.done.contains(id)
    }

    /// Keeps the results that go to standard output in a state directory, of which this process has the lock.
    pub(crate) fn keep(&mut self, state: &Path) -> anyhow::Result<()> {
        if let To::Stdout { before, kept } = &mut self.to {
            let path = state.join(KEPT);
            write_whole(&path, std::mem::take(before).as_bytes())?;
            *kept = Some(open(&path)?.0);
        }
        Ok(())
    }

    /// Writes the result of a request.
    ///
    /// # Errors
    /// If it cannot be written; then it is not done.
    pub(crate) fn write(&mut self, body: &Body, result: &Value) -> anyhow::Result<()> {
        // A line that is lost after the journal has forgotten its request could not be had again.
        let append = |mut file: &File, line: &Value| {
            file.write_all(format!("{line}\n").as_bytes()).and_then(|()| file.sync_data())
        };
        match &self.to {
            To::Out(file) => append(file, result).context("cannot write a result to --out")?,
            To::Stdout { kept, .. } => {
                if let Some(file) = kept {
                    let line = json!({ "body": Digest::of_value(body).to_string(), "result": result });
                    append(file, &line).with_context(|| format!("cannot write a result to {KEPT}"))?;
                }
                print(result)?;
            }
        }
        self.note(result);
        Ok(())
    }
}

/// Standard output is locked for one result at a time, because beats go there too.
fn print(result: &Value) -> anyhow::Result<()> {
    let mut out = terminal::stdout();
    writeln!(out, "{result}").and_then(|()| out.flush()).context("cannot write a result")
}

/// Opens a file of results to go on at its end, without the line that a crash tore.
fn open(path: &Path) -> anyhow::Result<(File, Vec<Value>)> {
    let cannot = || format!("cannot write the results {}", path.display());
    if let Ok(there) = path.metadata() {
        anyhow::ensure!(there.is_file(), "{}: it is there and no file", cannot());
    }
    let mut options = OpenOptions::new();
    let mut file =
        options.read(true).write(true).create(true).truncate(false).open(path).with_context(cannot)?;
    // Whoever else writes there would lose the line that it is writing.
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => anyhow::bail!("{}: another process is writing them", cannot()),
        locked => locked.with_context(cannot)?,
    }
    let Lines { lines, whole, open_end } = Lines::read(path, &file)?;
    file.set_len(whole).with_context(cannot)?;
    file.seek(SeekFrom::End(0)).with_context(cannot)?;
    if open_end {
        file.write_all(b"\n").with_context(cannot)?;
    }
    Ok((file, lines))
}

/// The lines of a file of results.
struct Lines {
    lines: Vec<Value>,
    /// Their bytes.
    whole: u64,
    /// Whether the last one lacks nothing but its end.
    open_end: bool,
}

impl Lines {
    fn read(path: &Path, file: &File) -> anyhow::Result<Self> {
        let mut all = Self { lines: Vec::new(), whole: 0, open_end: false };
        let mut reader = BufReader::new(file);
        loop {
            let mut bytes = Vec::new();
            let read = reader.read_until(b'\n', &mut bytes);
            let read = read.with_context(|| format!("cannot read the results {}", path.display()))?;
            let ended = bytes.last() == Some(&b'\n');
            match serde_json::from_slice::<Value>(&bytes) {
                Ok(line) if is_result(&line) => all.lines.push(line),
                // The end, or what was torn.
                Err(_) if !ended && is_torn(&bytes) => return Ok(all),
                _ => anyhow::bail!("{} has lines that are no results: name another file", path.display()),
            }
            all.whole += read as u64;
            all.open_end = !ended;
        }
    }
}

/// Whether a line is a result, or one that is kept.
fn is_result(line: &Value) -> bool {
    let result = if line["result"].is_object() { &line["result"] } else { line };
    result["id"].is_string() && (result["finish_reason"].is_string() || result["error"].is_string())
}

/// Whether bytes are the beginning of a line that is written here, or nothing, with zeros where a crash left some: what
/// else is there is somebody's, and stays.
fn is_torn(bytes: &[u8]) -> bool {
    let text = bytes.iter().rposition(|&byte| byte != 0).map_or(&[][..], |last| &bytes[..=last]);
    let begins = |start: &&[u8]| text.starts_with(start) || start.starts_with(text);
    [&br#"{"id":"#[..], br#"{"body":"#].iter().any(begins)
        && (text.len() < bytes.len() || serde_json::from_slice::<Value>(text).is_err_and(|e| e.is_eof()))
}
