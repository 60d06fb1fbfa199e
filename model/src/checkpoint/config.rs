//! `config.json`, read key by key: every error names the file, the key and what would do.

use super::CheckpointError;
use serde_json::{Map, Value};
use std::path::Path;

/// The largest size that is believed of any dimension.
const SIZE_MAX: u64 = 1 << 24;

/// A JSON object with the file that it came from.
#[derive(Clone, Debug)]
pub struct Config<'a> {
    path: &'a Path,
    map: Map<String, Value>,
}

impl<'a> Config<'a> {
    /// Parses the text of a file.
    ///
    /// # Errors
    /// If it is not a JSON object.
    pub fn parse(path: &'a Path, text: &[u8]) -> Result<Self, CheckpointError> {
        match serde_json::from_slice(text) {
            Ok(Value::Object(map)) => Ok(Self { path, map }),
            Ok(_) => Err(CheckpointError::invalid(path, "it is not a JSON object")),
            Err(error) => Err(CheckpointError::invalid(path, &format!("it is not JSON: {error}"))),
        }
    }

    fn value(&self, key: &str) -> Option<&Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Whether the key has a value.
    pub fn has(&self, key: &str) -> bool {
        self.value(key).is_some()
    }

    /// An error about a key's value.
    pub fn invalid(&self, key: &str, what: &str) -> CheckpointError {
        CheckpointError::invalid(self.path, &format!("{key}: {what}"))
    }

    /// An error about a value that is known but not computed here.
    pub fn unsupported(&self, key: &str, value: &str, remedy: &str) -> CheckpointError {
        CheckpointError::Unsupported {
            path: self.path.into(),
            what: format!("{key} = {value}"),
            remedy: remedy.into(),
        }
    }

    fn missing(&self, key: &str) -> CheckpointError {
        self.invalid(key, "it is missing")
    }

    /// A whole number of at least 1 that may be a dimension.
    pub fn size(&self, key: &str) -> Result<usize, CheckpointError> {
        Ok(self.count(key)? as usize)
    }

    /// [`size`](Self::size), or a default.
    pub fn size_or(&self, key: &str, default: usize) -> Result<usize, CheckpointError> {
        if self.has(key) { self.size(key) } else { Ok(default) }
    }

    /// A whole number of at least 1.
    pub fn count(&self, key: &str) -> Result<u32, CheckpointError> {
        self.optional_count(key)?.filter(|&n| n > 0).ok_or_else(|| {
            if self.has(key) { self.invalid(key, "it must not be 0") } else { self.missing(key) }
        })
    }

    /// A whole number, if there is one.
    pub fn optional_count(&self, key: &str) -> Result<Option<u32>, CheckpointError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let number = value.as_u64().filter(|&n| n <= SIZE_MAX).and_then(|n| u32::try_from(n).ok());
        number
            .map(Some)
            .ok_or_else(|| self.invalid(key, &format!("{value} is no whole number up to {SIZE_MAX}")))
    }

    /// A number.
    pub fn number(&self, key: &str) -> Result<f64, CheckpointError> {
        self.optional_number(key)?.ok_or_else(|| self.missing(key))
    }

    /// A number, or a default.
    pub fn number_or(&self, key: &str, default: f64) -> Result<f64, CheckpointError> {
        Ok(self.optional_number(key)?.unwrap_or(default))
    }

    /// A number, if there is one.
    pub fn optional_number(&self, key: &str) -> Result<Option<f64>, CheckpointError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        value.as_f64().map(Some).ok_or_else(|| self.invalid(key, &format!("{value} is no number")))
    }

    /// A flag, or a default.
    pub fn flag_or(&self, key: &str, default: bool) -> Result<bool, CheckpointError> {
        let Some(value) = self.value(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.invalid(key, &format!("{value} is not true or false")))
    }

    /// A text.
    pub fn text(&self, key: &str) -> Result<String, CheckpointError> {
        let value = self.value(key).ok_or_else(|| self.missing(key))?;
        value.as_str().map(Into::into).ok_or_else(|| self.invalid(key, &format!("{value} is no text")))
    }

    /// A text, or a default.
    pub fn text_or(&self, key: &str, default: &str) -> Result<String, CheckpointError> {
        if self.has(key) { self.text(key) } else { Ok(default.into()) }
    }

    /// A list of texts, if there is one.
    pub fn texts(&self, key: &str) -> Result<Option<Vec<String>>, CheckpointError> {
        let Some(value) = self.value(key) else { return Ok(None) };
        let texts =
            value.as_array().and_then(|list| list.iter().map(|v| v.as_str().map(Into::into)).collect());
        texts.map(Some).ok_or_else(|| self.invalid(key, "it is no list of texts"))
    }

    /// A list of whole numbers; empty if there is none.
    pub fn counts(&self, key: &str) -> Result<Vec<u32>, CheckpointError> {
        let Some(value) = self.value(key) else { return Ok(Vec::new()) };
        let whole = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok());
        let list = value.as_array().and_then(|list| list.iter().map(whole).collect());
        list.ok_or_else(|| self.invalid(key, "it is no list of whole numbers"))
    }

    /// A list of numbers.
    pub fn numbers(&self, key: &str) -> Result<Vec<f64>, CheckpointError> {
        let value = self.value(key).ok_or_else(|| self.missing(key))?;
        let list = value.as_array().and_then(|list| list.iter().map(Value::as_f64).collect());
        list.ok_or_else(|| self.invalid(key, "it is no list of numbers"))
    }

    /// One token id or a list of them; empty if there is none.
    pub fn tokens(&self, key: &str) -> Result<Vec<u32>, CheckpointError> {
        match self.value(key) {
            Some(Value::Array(_)) => self.counts(key),
            _ => Ok(self.optional_count(key)?.into_iter().collect()),
        }
    }

    /// An object within this one.
    pub fn part(&self, key: &str) -> Result<Option<Self>, CheckpointError> {
        match self.value(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Self { path: self.path, map: map.clone() })),
            Some(_) => Err(self.invalid(key, "it is no object")),
        }
    }

    /// A list of objects; empty if there is none.
    pub fn parts(&self, key: &str) -> Result<Vec<Self>, CheckpointError> {
        let Some(value) = self.value(key) else { return Ok(Vec::new()) };
        let object = |v: &Value| v.as_object().map(|map| Self { path: self.path, map: map.clone() });
        let list = value.as_array().and_then(|list| list.iter().map(object).collect());
        list.ok_or_else(|| self.invalid(key, "it is no list of objects"))
    }
}
