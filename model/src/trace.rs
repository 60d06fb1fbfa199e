//! A routing trace: how often the router of each layer selected each expert for a text, and with what weights.
//!
//! `lite-llm trace` writes one, `lite-llm import --by-use` divides experts by it. It is JSON:
//!
//! ```json
//! {"format": 1, "weights": "<digest of the weights>", "tokens": 4096, "window": 2048, "experts": 8,
//!  "layers": [{"layer": 0, "counts": [512, ...], "weights": [201.5, ...]}, ...]}
//! ```

use lite_llm_core::digest::Digest;
use serde::{Deserialize, Serialize};
use std::path::Path;

/// The version of the form that is written and read.
pub const FORMAT: u32 = 1;
/// The largest trace that is read.
const BYTES_MAX: u64 = 1 << 30;

/// How the experts of a model were used.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trace {
    /// Version of this form.
    pub format: u32,
    /// Layout-independent digest of the weights, in hexadecimal: a trace divides this model only.
    pub weights: String,
    /// Positions that were routed.
    pub tokens: u64,
    /// The most positions that saw each other: the text was cut into windows of so many.
    pub window: u32,
    /// Experts of a layer.
    pub experts: u32,
    /// Every mixture layer, ascending.
    pub layers: Vec<LayerUse>,
}

/// How the experts of a layer were used, by original number.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerUse {
    /// Decoder layer.
    pub layer: u32,
    /// Positions that selected each expert.
    pub counts: Vec<u64>,
    /// The sum of its weights at these positions, added in order of positions.
    pub weights: Vec<f64>,
}

impl Trace {
    /// A trace of nothing.
    pub fn new(weights: Digest, window: u32, experts: u32, layers: &[u32]) -> Self {
        let unused = |&layer: &u32| LayerUse {
            layer,
            counts: vec![0; experts as usize],
            weights: vec![0.0; experts as usize],
        };
        Self {
            format: FORMAT,
            weights: weights.to_string(),
            tokens: 0,
            window,
            experts,
            layers: layers.iter().map(unused).collect(),
        }
    }

    /// Notes what one position selected in one layer.
    ///
    /// # Panics
    /// If the model has no such layer or expert.
    pub fn note(&mut self, layer: u32, experts: &[u32], weights: &[f32]) {
        let at = self.layers.binary_search_by_key(&layer, |of| of.layer).expect("a mixture layer");
        let of_layer = &mut self.layers[at];
        for (&expert, &weight) in experts.iter().zip(weights) {
            of_layer.counts[expert as usize] += 1;
            of_layer.weights[expert as usize] += f64::from(weight);
        }
    }

    /// Reads a trace.
    ///
    /// # Errors
    /// What is wrong, for people.
    pub fn read(path: &Path) -> Result<Self, String> {
        let at = |what: String| format!("{}: {what}", path.display());
        let bytes = std::fs::metadata(path).map_err(|error| at(error.to_string()))?.len();
        if bytes > BYTES_MAX {
            return Err(at(format!("{bytes} bytes are more than any trace has")));
        }
        let text = crate::files::read(path).map_err(|error| at(error.to_string()))?;
        let no_trace = |error: serde_json::Error| {
            at(format!("it is no routing trace: {error}; lite-llm trace writes one"))
        };
        // The version is read first: a later form may have other keys.
        let json: serde_json::Value = serde_json::from_slice(&text).map_err(no_trace)?;
        if json["format"].is_u64() && json["format"] != FORMAT {
            return Err(at(format!(
                "it is a trace of format {}, this program reads {FORMAT}; trace the text again",
                json["format"]
            )));
        }
        let trace: Self = serde_json::from_value(json).map_err(no_trace)?;
        let whole = |of: &LayerUse| {
            [of.counts.len(), of.weights.len()] == [trace.experts as usize; 2]
                && of.weights.iter().all(|weight| weight.is_finite())
        };
        if !trace.layers.iter().all(whole) || !trace.layers.is_sorted_by(|a, b| a.layer < b.layer) {
            let what = "it does not have a count and a weight for each expert of ascending layers; trace the text again";
            return Err(at(what.into()));
        }
        Ok(trace)
    }

    /// Whether this is a trace of such a model.
    ///
    /// # Errors
    /// What is different, for people.
    pub fn check(&self, weights: &str, experts: u32, layers: &[u32]) -> Result<(), String> {
        if self.weights != weights {
            return Err(format!(
                "the trace is of a model with weights {}, this one has {weights}; trace a text with this model",
                self.weights
            ));
        }
        if self.experts != experts || !self.layers.iter().map(|of| of.layer).eq(layers.iter().copied()) {
            return Err(
                "the trace is of other layers or experts than this model's; trace the text again".into()
            );
        }
        Ok(())
    }

    /// The experts of a layer, the most used first: by count, then by weight, then by original number.
    ///
    /// # Panics
    /// If the trace has no such layer: it was checked.
    pub(crate) fn ranking(&self, layer: u32) -> Vec<u32> {
        let at = self.layers.binary_search_by_key(&layer, |of| of.layer).expect("the trace was checked");
        let LayerUse { counts, weights, .. } = &self.layers[at];
        let mut ranking: Vec<u32> = (0..self.experts).collect();
        // Sorting is stable: what is equal stays in order of numbers.
        ranking.sort_by(|&a, &b| {
            let (a, b) = (a as usize, b as usize);
            counts[b].cmp(&counts[a]).then(weights[b].total_cmp(&weights[a]))
        });
        ranking
    }
}
