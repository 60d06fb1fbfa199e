//! The house rules that a machine can check, as a test.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

/// A file has one concern and rarely more lines than this.
const FILE_LINES_MAX: usize = 600;
/// A function rarely has more lines than this.
const FUNCTION_LINES_MAX: usize = 85;
/// A line of source or prose has at most this many characters; tables and links of Markdown may be longer.
const LINE_CHARS_MAX: usize = 140;

/// Files that may be longer, each with its reason.
const LONG_FILES: &[(&str, &str)] = &[];

/// Where `unsafe` may stand.
const UNSAFE_PLACES: &[&str] = &["hw/", "model/src/kernels/", "model/src/checkpoint/tensors.rs"];

struct File {
    name: String,
    text: String,
}

impl File {
    fn is(&self, extension: &str) -> bool {
        self.name.ends_with(extension)
    }

    /// Lines with their numbers from 1.
    fn lines(&self) -> impl Iterator<Item = (usize, &str)> {
        (1..).zip(self.text.lines())
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every text file of the project, golden data apart.
fn files() -> Vec<File> {
    let mut found = Vec::new();
    let mut open = vec![root()];
    while let Some(dir) = open.pop() {
        for entry in std::fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(root()).unwrap().to_str().unwrap().to_owned();
            let skipped =
                ["target", ".git", ".venv", "fuzz/target", "fuzz/corpus", "fuzz/artifacts", "tests/fixtures"];
            if skipped.contains(&name.as_str()) {
                continue;
            }
            if path.is_dir() {
                open.push(path);
            } else if let Ok(text) = std::fs::read_to_string(&path) {
                found.push(File { name, text });
            }
        }
    }
    found.sort_by(|a, b| a.name.cmp(&b.name));
    assert!(found.iter().any(|f| f.name == "core/src/engine.rs"), "the sources are not where they should be");
    found
}

fn sources() -> impl Iterator<Item = File> {
    files().into_iter().filter(|file| file.is(".rs"))
}

fn prose() -> impl Iterator<Item = File> {
    files().into_iter().filter(|file| file.is(".md"))
}

fn assert_none(what: &str, found: &[String]) {
    assert!(found.is_empty(), "{what}:\n  {}", found.join("\n  "));
}

/// Whether `text` has `word` as a word of its own, in any case.
fn has_word(text: &str, word: &str) -> bool {
    text.to_lowercase().split(|c: char| !c.is_ascii_alphanumeric()).any(|part| part == word)
}

#[test]
fn files_have_one_concern() {
    let mut found = Vec::new();
    for file in sources() {
        let lines = file.text.lines().count();
        let excused = LONG_FILES.iter().any(|(name, _)| *name == file.name);
        if !excused && lines > FILE_LINES_MAX {
            found.push(format!(
                "{}: {lines} lines, more than {FILE_LINES_MAX}: split it by concern",
                file.name
            ));
        }
        if excused && lines <= FILE_LINES_MAX {
            found.push(format!("{}: no longer too long; take it out of LONG_FILES", file.name));
        }
    }
    assert_none("files", &found);
}

#[test]
fn functions_fit_on_a_screen() {
    let mut found = Vec::new();
    for file in sources() {
        let lines: Vec<&str> = file.text.lines().collect();
        for (at, line) in lines.iter().enumerate() {
            let body = line.trim_start();
            let indent = &line[..line.len() - body.len()];
            let head = body.split('(').next().unwrap_or_default();
            if !head.split(' ').any(|word| word == "fn")
                || body.starts_with("//")
                || body.ends_with(['}', ';', ','])
            {
                continue;
            }
            // A declaration in several lines ends without a body.
            let (end, declared) = (format!("{indent}}}"), format!("{indent})"));
            let is_last = |line: &&str| *line == end || (line.starts_with(&declared) && line.ends_with(';'));
            let length = lines[at..].iter().position(is_last).map_or(0, |n| n + 1);
            if length > FUNCTION_LINES_MAX {
                found.push(format!("{}:{}: {length} lines", file.name, at + 1));
            }
        }
    }
    assert_none("functions that are too long", &found);
}

#[test]
fn nothing_is_left_open() {
    // Put together, so that this file does not find itself.
    let marks = [
        ["todo", "!("],
        ["unimplemented", "!("],
        ["FIX", "ME"],
        ["TO", "DO"],
        ["XX", "X"],
        ["#[ig", "nore"],
        ["dbg", "!("],
    ]
    .map(|parts| parts.concat());
    let mut found = Vec::new();
    for file in files().iter().filter(|file| file.is(".rs") || file.is(".toml") || file.is(".md")) {
        for (number, line) in file.lines() {
            for mark in marks.iter().filter(|mark| line.contains(mark.as_str())) {
                found.push(format!("{}:{number}: {mark}", file.name));
            }
        }
    }
    assert_none("left open", &found);
}

#[test]
fn names_say_what_a_thing_is() {
    let empty =
        [["ut", "ils"], ["ut", "il"], ["help", "er"], ["help", "ers"], ["mana", "ger"]].map(|p| p.concat());
    let mut found = Vec::new();
    for file in sources() {
        for word in empty.iter().chain([&"common".to_owned()]) {
            if has_word(&file.name, word) {
                found.push(format!("{}: a file named {word}", file.name));
            }
        }
        for (number, line) in file.lines() {
            for word in empty.iter().filter(|word| has_word(line, word)) {
                found.push(format!("{}:{number}: {word}", file.name));
            }
        }
    }
    assert_none("names that say nothing", &found);
}

#[test]
fn no_path_of_a_workplace_is_written_down() {
    let places =
        [["/wo", "rk/"], ["/ro", "ot/"], ["/ho", "me/"], ["../sha", "red"]].map(|parts| parts.concat());
    let mut found = Vec::new();
    for file in files() {
        for (number, line) in file.lines() {
            for place in places.iter().filter(|place| line.contains(place.as_str())) {
                found.push(format!("{}:{number}: {place}", file.name));
            }
        }
    }
    assert_none("paths of one machine", &found);
}

#[test]
fn unsafe_stays_in_drivers_and_kernels() {
    let mut found = Vec::new();
    for file in sources().filter(|file| !UNSAFE_PLACES.iter().any(|place| file.name.starts_with(place))) {
        for (number, line) in file.lines() {
            let code = line.split("//").next().unwrap_or_default();
            if ["un", "safe "].concat().as_str() == code.get(..7).unwrap_or_default()
                || code.contains(&[" un", "safe {"].concat())
                || code.contains(&[" un", "safe fn"].concat())
            {
                found.push(format!("{}:{number}", file.name));
            }
        }
    }
    assert_none("unsafe code elsewhere", &found);
    for name in ["core/src/lib.rs", "sim/src/lib.rs"] {
        let text = std::fs::read_to_string(root().join(name)).unwrap();
        assert!(text.contains("#![forbid(unsafe_code)]"), "{name} forbids it to the compiler");
    }
}

#[test]
fn lines_are_clean() {
    let mut found = Vec::new();
    for file in files().iter().filter(|file| !file.is(".lock") && !file.name.starts_with("LICENSE")) {
        if !file.text.is_empty() && (!file.text.ends_with('\n') || file.text.ends_with("\n\n")) {
            found.push(format!("{}: ends with one newline", file.name));
        }
        let table = |line: &str| file.is(".md") && (line.starts_with('|') || line.contains("]("));
        for (number, line) in file.lines() {
            if line.ends_with([' ', '\t', '\r']) || line.contains('\t') {
                found.push(format!("{}:{number}: tab or space at the end", file.name));
            }
            if (file.is(".rs") || file.is(".md")) && !table(line) && line.chars().count() > LINE_CHARS_MAX {
                found.push(format!("{}:{number}: more than {LINE_CHARS_MAX} characters", file.name));
            }
        }
    }
    assert_none("lines", &found);
}

/// Targets of the links and images of a line: `](target)`.
fn targets(line: &str) -> impl Iterator<Item = &str> {
    line.match_indices("](").filter_map(|(at, _)| line[at + 2..].split([')', ' ']).next())
}

/// A heading as the anchor that a reader's site makes of it.
fn anchor(heading: &str) -> String {
    heading
        .trim_start_matches('#')
        .trim()
        .to_lowercase()
        .chars()
        .filter(|c| c.is_alphanumeric() || *c == ' ' || *c == '-' || *c == '_')
        .map(|c| if c == ' ' { '-' } else { c })
        .collect()
}

#[test]
fn every_link_of_the_prose_resolves() {
    let mut found = Vec::new();
    for file in prose() {
        let dir = root().join(&file.name).parent().unwrap().to_owned();
        for (number, line) in file.lines() {
            for target in targets(line).filter(|t| !t.contains("://") && !t.starts_with("mailto:")) {
                let (path, fragment) = target.split_once('#').unwrap_or((target, ""));
                let at = if path.is_empty() { root().join(&file.name) } else { dir.join(path) };
                // A picture is no text, and a folder no file: both are there.
                let text = std::fs::read(&at).map(|bytes| String::from_utf8_lossy(&bytes).into_owned());
                let Ok(text) = text.or_else(|_| std::fs::read_dir(&at).map(|_| String::new())) else {
                    found.push(format!("{}:{number}: {target} is not there", file.name));
                    continue;
                };
                let anchors: BTreeSet<String> =
                    text.lines().filter(|line| line.starts_with('#')).map(anchor).collect();
                if !fragment.is_empty() && !anchors.contains(fragment) {
                    found.push(format!("{}:{number}: {target} has no such heading", file.name));
                }
            }
        }
    }
    assert_none("links", &found);
}

/// What stands between backquotes.
fn quoted(line: &str) -> impl Iterator<Item = &str> {
    line.split('`').skip(1).step_by(2)
}

#[test]
fn sources_and_tests_that_the_prose_names_are_there() {
    let files = files();
    let mut found = Vec::new();
    for file in files.iter().filter(|file| file.is(".md") && file.name != "CHANGELOG.md") {
        for (number, line) in file.lines() {
            for name in
                quoted(line).filter(|name| name.contains(".rs") && !name.contains(['*', ' ', '{', 'N']))
            {
                let (path, item) = name.split_once("::").unwrap_or((name, ""));
                let Some(source) =
                    files.iter().find(|f| f.name == path || f.name.ends_with(&format!("/{path}")))
                else {
                    found.push(format!("{}:{number}: there is no {path}", file.name));
                    continue;
                };
                if !item.is_empty() && !source.text.contains(&format!("fn {item}(")) {
                    found.push(format!("{}:{number}: {path} has no {item}", file.name));
                }
            }
        }
    }
    assert_none("names that the prose gives", &found);
}

#[test]
fn every_test_file_belongs_to_a_package() {
    // Under a virtual root a file in `tests/` itself would silently never run.
    let strays: Vec<String> = sources()
        .map(|file| file.name)
        .filter(|name| name.strip_prefix("tests/").is_some_and(|rest| !rest.contains('/')))
        .collect();
    assert_none("test files that never run", &strays);
}

#[test]
fn the_checks_can_fail() {
    assert!(has_word("a Help er", "help") && !has_word("unhelpful", "help"));
    assert_eq!(targets("see [a](b.md#c) and ![d](e.png \"f\")").collect::<Vec<_>>(), ["b.md#c", "e.png"]);
    assert_eq!(anchor("## The core: `Engine`, one door"), "the-core-engine-one-door");
    assert_eq!(quoted("`a.rs::b` and `c`").collect::<Vec<_>>(), ["a.rs::b", "c"]);
}
