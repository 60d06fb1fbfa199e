//! Where a replay leaves its journal, and what that makes of the state.

use lite_llm_core::engine::Engine;
use serde_json::{Value, json};
use similar::{ChangeTag, TextDiff};
use std::fmt;

/// Changed fields that are shown.
const FIELDS_MAX: usize = 40;

/// A replay that does not do what its journal says was done.
#[derive(Debug)]
pub(crate) struct Divergence {
    /// The record whose handling differs.
    pub(crate) record: u64,
    /// What happened, in a line.
    pub(crate) what: String,
    /// What the journal has there.
    pub(crate) expected: String,
    /// What the replay found.
    pub(crate) found: String,
    /// What the record brings about here, a line each.
    pub(crate) outputs: Vec<String>,
    /// Of which states the difference is.
    pub(crate) between: &'static str,
    /// The state's fields that differ, a line each.
    pub(crate) difference: Vec<String>,
}

impl Divergence {
    /// As `--json` shows it.
    pub(crate) fn to_json(&self) -> Value {
        json!({
            "verified": false,
            "record": self.record,
            "what": self.what,
            "expected": self.expected,
            "found": self.found,
            "outputs": self.outputs,
            "between": self.between,
            "difference": self.difference,
        })
    }
}

impl fmt::Display for Divergence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "the replay diverges at record {}: {}", self.record, self.what)?;
        writeln!(f, "  expected {}", self.expected)?;
        writeln!(f, "  found    {}", self.found)?;
        if !self.outputs.is_empty() {
            writeln!(f, "here it brings about")?;
            self.outputs.iter().try_for_each(|line| writeln!(f, "  {line}"))?;
        }
        write!(f, "state difference, {}:", self.between)?;
        if self.difference.is_empty() {
            write!(f, " none")?;
        }
        self.difference.iter().try_for_each(|line| write!(f, "\n  {line}"))
    }
}

impl std::error::Error for Divergence {}

/// The fields in which two states differ: those of the first with a minus, those of the second with a plus.
pub(crate) fn difference(first: &Engine, second: &Engine) -> Vec<String> {
    let (first, second) = (format!("{:#?}", first.state()), format!("{:#?}", second.state()));
    let (first_paths, second_paths) = (paths(&first), paths(&second));
    let mut lines = Vec::new();
    for change in TextDiff::from_lines(&first, &second).iter_all_changes() {
        let (sign, path) = match change.tag() {
            ChangeTag::Equal => continue,
            ChangeTag::Delete => ('-', change.old_index().and_then(|at| first_paths.get(at))),
            ChangeTag::Insert => ('+', change.new_index().and_then(|at| second_paths.get(at))),
        };
        let value = change.value().trim().trim_end_matches(',');
        // Brackets alone say nothing that their content does not.
        if value.chars().any(char::is_alphanumeric) && !value.ends_with(['{', '[', '(']) {
            lines.push(format!("{sign} {}{value}", path.map_or("", String::as_str)));
        }
    }
    let more = lines.len().saturating_sub(FIELDS_MAX);
    lines.truncate(FIELDS_MAX);
    if more > 0 {
        lines.push(format!("and {more} more"));
    }
    lines
}

/// For each line of an indented text, the names of what encloses it.
fn paths(text: &str) -> Vec<String> {
    let mut enclosing: Vec<(usize, String)> = Vec::new();
    let mut paths = Vec::new();
    for line in text.lines() {
        let value = line.trim_start();
        let indent = line.len() - value.len();
        enclosing.retain(|(of, _)| *of < indent);
        let names = enclosing.iter().map(|(_, name)| name.as_str()).filter(|name| !name.is_empty());
        paths.push(names.map(|name| format!("{name} > ")).collect());
        if value.ends_with(['{', '[', '(']) {
            let name = value.trim_end_matches(['{', '[', '(', ' ']);
            // A field has a name; what a key of several lines stands for has a type; the whole needs neither.
            let name = match name.split_once(": ") {
                _ if indent == 0 => "",
                Some((")" | "}" | "]", kind)) => kind,
                Some((field, _)) => field,
                None => name.trim_end_matches(':'),
            };
            enclosing.push((indent, name.to_owned()));
        }
    }
    paths
}
