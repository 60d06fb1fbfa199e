//! A decision log as a file: text, one decision a line, so that people can read and shorten it.

use super::{Decision, Point};
use crate::hazard::Hazard;
use std::collections::BTreeMap;
use std::fmt::Write as _;

/// The version of the format that this program reads and writes.
const VERSION: u32 = 1;
const HEADER: &str = "lite-llm decisions";

/// Everything that makes a run again: its seed, its settings, its decisions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct LogFile {
    /// The seed; decides what is no fault.
    pub seed: u64,
    /// What the run was asked for, by name.
    pub settings: BTreeMap<String, String>,
    /// What happens.
    pub decisions: Vec<Decision>,
}

/// A file that is no decision log of this version.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// It is something else.
    #[error("this is no decision log: its first line is not \"{HEADER} {VERSION}\"", HEADER = HEADER, VERSION = VERSION)]
    Other,
    /// It is of another version.
    #[error(
        "this decision log has format version {found}, this program reads version {VERSION}: replay it with the \
         version that wrote it, or run its seed again", VERSION = VERSION
    )]
    Version {
        /// The version found.
        found: String,
    },
    /// A line is damaged.
    #[error("line {line} of the decision log: {what}; write the log again from its seed")]
    Line {
        /// Which, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
}

impl LogFile {
    /// How every log begins.
    pub const HEADER: &str = HEADER;

    /// The file's text.
    #[must_use]
    pub fn to_text(&self) -> String {
        let mut text = format!("{HEADER} {VERSION}\nseed {}\n", self.seed);
        for (name, value) in &self.settings {
            let _ = writeln!(text, "set {name} {value}");
        }
        for Decision { point: Point { hazard, subject, nth }, value } in &self.decisions {
            let _ = writeln!(text, "{hazard} {}.{} {nth} {value:x}", subject >> 32, subject & 0xffff_ffff);
        }
        let _ = writeln!(text, "end {}", self.decisions.len());
        text
    }

    /// Reads a file's text.
    ///
    /// # Errors
    /// If it is no log, of another version, or damaged; the number of decisions at its end tells a cut one.
    pub fn parse(text: &str) -> Result<Self, FileError> {
        let mut lines = (1..).zip(text.lines());
        let (_, first) = lines.next().ok_or(FileError::Other)?;
        let version = first.strip_prefix(HEADER).ok_or(FileError::Other)?.trim();
        if version != VERSION.to_string() {
            return Err(FileError::Version { found: version.chars().take(20).collect() });
        }
        let mut file = Self::default();
        let (mut ended, mut last) = (false, 1);
        for (line, text) in lines {
            last = line;
            let fail = |what: String| FileError::Line { line, what };
            if ended {
                return Err(fail("something comes after the end".into()));
            }
            let mut words = text.split(' ');
            match words.next().unwrap_or_default() {
                "seed" => file.seed = number(words.next(), 10).map_err(fail)?,
                "set" => {
                    let name = words.next().unwrap_or_default().to_owned();
                    let value = words.collect::<Vec<_>>().join(" ");
                    // Written again, a carriage return at the end of a line would be lost.
                    if name.is_empty() || format!("{name}{value}").contains(char::is_control) {
                        return Err(fail("a setting has no name, or a control character in it".into()));
                    }
                    file.settings.insert(name, value);
                    continue;
                }
                "end" => {
                    let count: u64 = number(words.next(), 10).map_err(fail)?;
                    if count != file.decisions.len() as u64 {
                        return Err(fail(format!(
                            "{count} decisions are due, {} came",
                            file.decisions.len()
                        )));
                    }
                    ended = true;
                }
                name => file.decisions.push(decision(name, &mut words).map_err(fail)?),
            }
            if words.next().is_some() {
                return Err(fail("words are left over".into()));
            }
        }
        if ended { Ok(file) } else { Err(FileError::Line { line: last, what: "the end is missing".into() }) }
    }
}

fn decision<'a>(name: &str, words: &mut impl Iterator<Item = &'a str>) -> Result<Decision, String> {
    let hazard = Hazard::named(name).ok_or_else(|| format!("there is no fault {name:?}"))?;
    let (from, to) = words.next().and_then(|word| word.split_once('.')).ok_or("a subject is missing")?;
    let (from, to): (u64, u64) = (number(Some(from), 10)?, number(Some(to), 10)?);
    if from.max(to) > u64::from(u32::MAX) {
        return Err("a subject is out of range".into());
    }
    let nth = number(words.next(), 10)?;
    let value = number(words.next(), 16)?;
    Ok(Decision { point: Point { hazard, subject: from << 32 | to, nth }, value })
}

fn number(word: Option<&str>, radix: u32) -> Result<u64, String> {
    let word = word.ok_or("a number is missing")?;
    u64::from_str_radix(word, radix).map_err(|_| format!("{word:?} is no number"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::decision::link;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            seed: u64,
            raw in prop::collection::vec((0..Hazard::ALL.len(), any::<u64>(), any::<u64>(), any::<u64>()), 0..20),
        ) {
            let decisions = raw
                .into_iter()
                .map(|(at, subject, nth, value)| {
                    Decision { point: Point { hazard: Hazard::ALL[at], subject, nth }, value }
                })
                .collect();
            let settings = [("nodes".to_owned(), "5".to_owned()), ("faults".to_owned(), "a b".to_owned())];
            let file = LogFile { seed, settings: settings.into(), decisions };
            prop_assert_eq!(LogFile::parse(&file.to_text()), Ok(file));
        }

        #[test]
        fn any_text_is_read_or_refused(text in "(lite-llm decisions 1\n)?[a-z0-9 .\n-]{0,200}") {
            let _ = LogFile::parse(&text);
        }
    }

    #[test]
    fn what_is_wrong_is_said_with_the_remedy() {
        let point = Point { hazard: Hazard::Rot, subject: link(0, 3), nth: 9 };
        let file = LogFile { seed: 3, decisions: vec![Decision { point, value: 255 }], ..LogFile::default() };
        let text = file.to_text();
        assert_eq!(text, "lite-llm decisions 1\nseed 3\nrot 0.3 9 ff\nend 1\n");
        for (text, word) in [
            (text.replace("decisions 1", "decisions 2"), "with the version that wrote it"),
            (text.replace("rot", "rut"), "no fault \"rut\""),
            (text.replace("end 1\n", ""), "the end is missing"),
            (text.replace("rot", "set \nrot"), "a setting has no name"),
            (text.replace("rot", "set a b\r\r\nrot"), "a control character"),
            (text.replace("rot 0.3 9 ff\n", ""), "1 decisions are due, 0 came"),
            (text.replace("9 ff", "9 fg"), "\"fg\" is no number"),
            ("hello".into(), "no decision log"),
        ] {
            let error = LogFile::parse(&text).expect_err("it is damaged").to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
