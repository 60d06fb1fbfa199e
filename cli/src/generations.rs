//! Which tiers compute which positions: as `run --json` reports it and `run --generations` takes it.

use lite_llm_hw::node::GenerationSpan;
use serde::Deserialize;
use serde_json::{Value, json};

/// A generation map that is to be forced.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct GenerationMap(Vec<Span>);

#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
struct Span {
    from: u32,
    tiers: Vec<String>,
}

impl GenerationMap {
    /// The tiers of position 0.
    pub(crate) fn first(&self) -> &[String] {
        &self.0[0].tiers
    }

    /// The later positions at which tiers change, and to which.
    pub(crate) fn later(&self) -> impl Iterator<Item = (u32, &[String])> {
        self.0.iter().skip(1).map(|span| (span.from, span.tiers.as_slice()))
    }

    /// All tiers that it names.
    pub(crate) fn tiers(&self) -> impl Iterator<Item = &String> {
        self.0.iter().flat_map(|span| &span.tiers)
    }

    /// The JSON form of what a node tells.
    pub(crate) fn report(spans: &[GenerationSpan]) -> Value {
        let mut from = 0;
        let mut list = Vec::new();
        for span in spans {
            list.push(json!({
                "from": from,
                "until": span.until,
                "generation": span.generation.0,
                "tiers": span.tiers,
            }));
            from = span.until;
        }
        Value::Array(list)
    }
}

impl std::str::FromStr for GenerationMap {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let spans: Vec<Span> = serde_json::from_str(text).map_err(|e| {
            format!("{e}; give [{{\"from\":0,\"tiers\":[\"a\"]}},..] as run --json reports it")
        })?;
        if spans.first().is_none_or(|span| span.from != 0) {
            return Err("the first generation begins at position 0".into());
        }
        if !spans.is_sorted_by(|a, b| a.from < b.from) {
            return Err("generations begin at ascending positions".into());
        }
        Ok(Self(spans))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use lite_llm_core::ids::Generation;

    #[test]
    fn what_is_reported_is_taken() {
        let span = |until, generation, tier: &str| GenerationSpan {
            until,
            generation: Generation(generation),
            tiers: vec![tier.into()],
        };
        let report = GenerationMap::report(&[span(7, 0, "a"), span(9, 1, "b")]).to_string();
        let map: GenerationMap = report.parse().expect("it is the form that is taken");
        assert_eq!(map.first(), ["a"]);
        assert_eq!(map.later().collect::<Vec<_>>(), [(7, &["b".to_owned()][..])]);
        assert!("[]".parse::<GenerationMap>().is_err());
        assert!("[{\"from\":1,\"tiers\":[]}]".parse::<GenerationMap>().is_err());
    }
}
