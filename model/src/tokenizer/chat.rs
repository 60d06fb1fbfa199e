//! Chat templates, rendered as transformers renders them: Jinja with its functions, and values as Python writes them.

use super::python::{Json, str_of};
use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, Value};
use minijinja::{Environment, Error, ErrorKind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::time::SystemTime;

/// What a template may compute before it counts as one that does not end.
const FUEL: u64 = 20_000_000;

/// A message of a chat.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Message {
    /// Who says it: `system`, `user`, `assistant`, `tool`.
    pub role: String,
    /// What is said, if anything.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    /// What else the template may ask for, as `tool_calls`.
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

impl Message {
    /// What a user says.
    pub fn user(content: &str) -> Self {
        Self { role: "user".into(), content: Some(content.into()), more: serde_json::Map::new() }
    }
}

/// The chat templates of a tokenizer.
#[derive(Debug)]
pub(super) struct Templates {
    found: Found,
    /// Special tokens by their names: those that the configuration has.
    special: BTreeMap<&'static str, String>,
}

#[derive(Debug)]
enum Found {
    None,
    One(String),
    /// Several, and none of them is `default`: their names.
    Named(Vec<String>),
}

impl Templates {
    /// Those of a configuration, or `chat_template.jinja`, which goes before them.
    pub(super) fn new(
        config: &serde_json::Value,
        jinja: Option<&[u8]>,
        special: BTreeMap<&'static str, String>,
    ) -> Self {
        let found = match (jinja, &config["chat_template"]) {
            (Some(bytes), _) => Found::One(String::from_utf8_lossy(bytes).into_owned()),
            (None, serde_json::Value::String(template)) => Found::One(template.clone()),
            (None, serde_json::Value::Array(list)) => named(list),
            (None, _) => Found::None,
        };
        Self { found, special }
    }

    /// The text of a chat.
    ///
    /// # Errors
    /// Why there is none, for people.
    pub(super) fn render(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
        now: SystemTime,
    ) -> Result<String, String> {
        let template = match &self.found {
            Found::One(template) => template,
            Found::None => {
                return Err("this checkpoint has no chat template; give the prompt as text".into());
            }
            Found::Named(names) => {
                return Err(format!(
                    "this checkpoint has templates {} and none that is called default; give the prompt as text",
                    names.join(", ")
                ));
            }
        };
        let mut context: BTreeMap<&str, Value> = BTreeMap::from([
            ("messages", messages.iter().map(|message| Value::from(Serde(message))).collect()),
            ("add_generation_prompt", add_generation_prompt.into()),
            ("tools", Value::from(())),
            ("documents", Value::from(())),
        ]);
        for (&name, token) in &self.special {
            context.insert(name, token.as_str().into());
        }
        let source = transparent_generation(template);
        let rendered = environment(now).and_then(|mut environment| {
            environment.add_template("chat", &source)?;
            environment.get_template("chat")?.render(context)
        });
        rendered.map_err(|error| error.to_string())
    }
}

/// The template called `default` of several.
fn named(list: &[serde_json::Value]) -> Found {
    let named = |entry: &serde_json::Value| {
        Some((entry["name"].as_str()?.to_owned(), entry["template"].as_str()?.to_owned()))
    };
    let mut templates: BTreeMap<String, String> = list.iter().filter_map(named).collect();
    match templates.remove("default") {
        Some(template) => Found::One(template),
        None if templates.is_empty() => Found::None,
        None => Found::Named(templates.into_keys().collect()),
    }
}

fn environment(now: SystemTime) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_fuel(Some(FUEL));
    environment.set_formatter(|out, _, value| out.write_str(&str_of(value)).map_err(Error::from));
    environment.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    environment.add_function("raise_exception", |what: String| -> Result<String, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, what))
    });
    environment.add_function("strftime_now", move |format: String| date(&format, now));
    environment.add_filter("string", |value: Value| str_of(&value));
    environment.add_filter("tojson", to_json);
    Ok(environment)
}

/// The present in the time zone of the machine.
fn date(format: &str, now: SystemTime) -> Result<String, Error> {
    let wrong =
        |error: jiff::Error| Error::new(ErrorKind::InvalidOperation, format!("strftime_now: {error}"));
    let zone = jiff::tz::TimeZone::try_system().unwrap_or(jiff::tz::TimeZone::UTC);
    let now = jiff::Timestamp::try_from(now).map_err(wrong)?.to_zoned(zone);
    jiff::fmt::strtime::format(format, &now).map_err(wrong)
}

/// `json.dumps(value, ensure_ascii, indent, separators, sort_keys)`.
fn to_json(value: Value, arguments: Rest<Value>, kwargs: Kwargs) -> Result<String, Error> {
    let given = |at: usize, name: &str| -> Result<Option<Value>, Error> {
        let given = match arguments.get(at) {
            Some(value) => Some(value.clone()),
            None => kwargs.get::<Option<Value>>(name)?,
        };
        Ok(given.filter(|value| !value.is_none()))
    };
    let indent = given(1, "indent")?.map(|indent| match indent.as_str() {
        Some(text) => text.to_owned(),
        None => " ".repeat(indent.as_usize().unwrap_or(0)),
    });
    let separators = given(2, "separators")?;
    let separator = |at: usize, default: &str| -> Result<String, Error> {
        let Some(separators) = &separators else { return Ok(default.into()) };
        let separator = separators.get_item_by_index(at)?;
        let wrong = || Error::new(ErrorKind::InvalidOperation, "tojson: separators are two texts");
        separator.as_str().map(Into::into).ok_or_else(wrong)
    };
    let json = Json {
        ensure_ascii: given(0, "ensure_ascii")?.is_some_and(|value| value.is_true()),
        item_separator: separator(0, if indent.is_some() { "," } else { ", " })?,
        key_separator: separator(1, ": ")?,
        indent,
        sort_keys: given(3, "sort_keys")?.is_some_and(|value| value.is_true()),
    };
    kwargs.assert_all_used()?;
    json.dump(&value)
}

/// Transformers marks what the assistant says with a block of its own, for training. Rendered, it is what stands in it,
/// in a scope of its own.
fn transparent_generation(template: &str) -> String {
    let mut out = String::with_capacity(template.len());
    let (mut rest, mut raw) = (template, false);
    while let Some(at) = rest.find('{') {
        out.push_str(&rest[..at]);
        rest = &rest[at..];
        let end = match rest.as_bytes().get(1) {
            Some(b'#') if !raw => rest.find("#}").map(|end| end + 2),
            Some(b'{') if !raw => code_end(rest, "}}"),
            Some(b'%') => code_end(rest, "%}"),
            _ => Some(1),
        };
        // What does not end is an error; the parser says it better.
        let Some(end) = end else { break };
        let (tag, after) = rest.split_at(end);
        let name = tag.strip_prefix("{%").and_then(|tag| tag.strip_suffix("%}"));
        let name = name.map(|name| name.trim_matches(['-', '+']).trim()).unwrap_or_default();
        match name {
            "raw" => raw = true,
            "endraw" => raw = false,
            _ => {}
        }
        let block = match name {
            "generation" if !raw => Some("with"),
            "endgeneration" if !raw => Some("endwith"),
            _ => None,
        };
        match block {
            // With its whitespace control.
            Some(block) => out.push_str(&tag.replacen(name, block, 1)),
            None => out.push_str(tag),
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// The end of a tag, which may hold strings.
fn code_end(tag: &str, close: &str) -> Option<usize> {
    let (mut quote, mut escaped) = (None, false);
    for (at, c) in tag.char_indices().skip(2) {
        match quote {
            Some(_) if escaped => escaped = false,
            Some(_) if c == '\\' => escaped = true,
            Some(open) if c == open => quote = None,
            Some(_) => {}
            None if c == '\'' || c == '"' => quote = Some(c),
            None if tag[at..].starts_with(close) => return Some(at + close.len()),
            None => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::transparent_generation;

    #[test]
    fn only_tags_of_generation_become_scopes() {
        for (template, expected) in [
            ("{% generation %}a{%- endgeneration -%}", "{% with %}a{%- endwith -%}"),
            ("{%+generation%}", "{%+with%}"),
            ("{# {% generation %} #}{% generation %}", "{# {% generation %} #}{% with %}"),
            ("{{ '}} {% generation %}' }}", "{{ '}} {% generation %}' }}"),
            (r"{{ '\'{% generation %}' }}", r"{{ '\'{% generation %}' }}"),
            ("{% raw %}{% generation %}{% endraw %}", "{% raw %}{% generation %}{% endraw %}"),
            ("{ % generation %}", "{ % generation %}"),
            ("a {% generation", "a {% generation"),
            ("{% set generation = 1 %}", "{% set generation = 1 %}"),
            ("", ""),
        ] {
            assert_eq!(transparent_generation(template), expected);
        }
    }
}
