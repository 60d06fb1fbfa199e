//! A state as a tree of its fields, with what changed.

use lite_llm_core::engine::Engine;
use similar::{ChangeTag, TextDiff};
use std::collections::BTreeSet;

/// A field, or what it holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Field {
    /// What leads there, so that it is found again in another state.
    pub(crate) path: String,
    /// How deep it is.
    pub(crate) depth: usize,
    /// The line without its indentation.
    pub(crate) text: String,
    /// Whether others are in it.
    pub(crate) opens: bool,
    /// Whether it, or something in it, is new here.
    pub(crate) changed: bool,
}

/// All fields of a state, in order.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    pub(crate) fields: Vec<Field>,
    /// Lines of the state before that are gone, each with its path.
    pub(crate) gone: Vec<String>,
}

impl Tree {
    /// The fields of a state, compared with those of the one before.
    pub(crate) fn of(before: &Engine, after: &Engine) -> Self {
        Self::between(&compact(&format!("{:#?}", before.state())), &compact(&format!("{:#?}", after.state())))
    }

    fn between(before: &str, after: &str) -> Self {
        let mut fields = fields(after);
        let old = self::fields(before);
        let mut gone = Vec::new();
        if before != after {
            for change in TextDiff::from_lines(before, after).iter_all_changes() {
                match change.tag() {
                    ChangeTag::Equal => {}
                    ChangeTag::Insert => {
                        if let Some(field) = change.new_index().and_then(|at| fields.get_mut(at)) {
                            field.changed = true;
                        }
                    }
                    ChangeTag::Delete => {
                        if let Some(field) = change.old_index().and_then(|at| old.get(at)).filter(|f| says(f))
                        {
                            gone.push(format!("{} {}", field.path, field.text));
                        }
                    }
                }
            }
        }
        // Whatever encloses a change has changed.
        let mut inside: Vec<usize> = Vec::new();
        for at in 0..fields.len() {
            let depth = fields[at].depth;
            inside.retain(|&outer| fields[outer].depth < depth);
            if fields[at].changed && says(&fields[at]) {
                for &outer in &inside {
                    fields[outer].changed = true;
                }
            }
            if fields[at].opens {
                inside.push(at);
            }
        }
        Self { fields, gone }
    }

    /// The fields that are seen while some are folded.
    pub(crate) fn visible<'a>(&'a self, folded: &'a BTreeSet<String>) -> impl Iterator<Item = &'a Field> {
        let mut hidden: Option<usize> = None;
        self.fields.iter().filter(move |field| {
            if hidden.is_some_and(|depth| field.depth > depth || (field.depth == depth && !says(field))) {
                return false;
            }
            hidden = (field.opens && folded.contains(&field.path)).then_some(field.depth);
            true
        })
    }

    /// What is folded at first: everything in the top fields, unless it has changed.
    pub(crate) fn folded(&self) -> BTreeSet<String> {
        let outer = self.fields.iter().filter(|field| field.opens && field.depth > 0 && !field.changed);
        outer.map(|field| field.path.clone()).collect()
    }

    /// The state as text, what is new with a plus and what is gone, at the end, with a minus.
    pub(crate) fn lines(&self) -> Vec<String> {
        let sign = |field: &Field| if field.changed && says(field) { '+' } else { ' ' };
        let mut lines: Vec<String> = self
            .fields
            .iter()
            .map(|field| format!("{} {}{}", sign(field), "  ".repeat(field.depth), field.text))
            .collect();
        lines.extend(self.gone.iter().map(|line| format!("- {line}")));
        lines
    }
}

/// Whether a line says something, and does not merely close.
fn says(field: &Field) -> bool {
    field.text.chars().any(char::is_alphanumeric)
}

/// The same text with whatever holds one thing only, `Seq(` over `3,` over `)`, on one line.
fn compact(text: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let closing = line.trim_start();
        let indent = line.len() - closing.len();
        let inner = |line: &String| {
            line.len() - line.trim_start().len() == indent + 4 && !line.ends_with(['(', '[', '{'])
        };
        let outer = |line: &String| line.len() - line.trim_start().len() == indent && line.ends_with('(');
        if closing.starts_with(')')
            && let [.., first, second] = lines.as_slice()
            && outer(first)
            && inner(second)
        {
            let value = lines.pop().unwrap_or_default();
            if let Some(first) = lines.last_mut() {
                first.push_str(value.trim().trim_end_matches(','));
                first.push_str(closing);
            }
        } else {
            lines.push(line.to_owned());
        }
    }
    lines.join("\n")
}

/// The lines of an indented text as fields.
fn fields(text: &str) -> Vec<Field> {
    // For each level the name of what is open there, and how many are in it.
    let mut open: Vec<(String, usize)> = Vec::new();
    let mut fields = Vec::new();
    for line in text.lines() {
        let trimmed = line.trim_start();
        let depth = (line.len() - trimmed.len()) / 4;
        open.truncate(depth);
        let opens = trimmed.ends_with(['{', '[', '(']);
        let nth = open.last_mut().map_or(0, |(_, count)| {
            *count += 1;
            *count - 1
        });
        let name = match trimmed.split_once(": ") {
            Some((name, _)) if name.chars().all(|c| c.is_alphanumeric() || c == '_') => name.to_owned(),
            _ => format!("[{nth}]"),
        };
        let mut path: String = open.iter().skip(1).map(|(name, _)| format!("{name}.")).collect();
        path.push_str(&name);
        if opens {
            open.push((name, 0));
        }
        fields.push(Field { path, depth, text: trimmed.trim_end_matches(',').into(), opens, changed: false });
    }
    fields
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    const BEFORE: &str = "State {
    a: 1,
    b: [
        X(
            3,
        ),
    ],
    c: D {
        e: 1,
    },
}";

    #[test]
    fn changes_are_seen_from_the_outside_in() {
        let after = BEFORE.replace('3', "4");
        let tree = Tree::between(BEFORE, &after);
        let changed: Vec<&str> =
            tree.fields.iter().filter(|field| field.changed).map(|field| field.path.as_str()).collect();
        assert_eq!(changed, ["[0]", "b", "b.[0]", "b.[0].[0]"]);
        assert_eq!(tree.gone, ["b.[0].[0] 3"]);
        let folded = tree.folded();
        let seen: Vec<&str> = tree.visible(&folded).map(|field| field.text.as_str()).collect();
        assert_eq!(seen, ["State {", "a: 1", "b: [", "X(", "4", ")", "]", "c: D {", "}"]);
        assert_eq!(tree.lines().last().unwrap(), "- b.[0].[0] 3");
    }

    #[test]
    fn what_holds_one_thing_is_one_line() {
        let text = "a: Some(\n    Seq(\n        3,\n    ),\n),\nb: (\n    1,\n    2,\n),";
        assert_eq!(compact(text), "a: Some(Seq(3)),\nb: (\n    1,\n    2,\n),");
    }

    #[test]
    fn nothing_changed_is_nothing_marked() {
        let tree = Tree::between(BEFORE, BEFORE);
        assert!(tree.fields.iter().all(|field| !field.changed) && tree.gone.is_empty());
    }
}
