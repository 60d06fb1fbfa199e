//! `lite-llm perplexity`: how well a model predicts a text, under one or all of its TierSets.

use crate::exit::{Exit, usage};
use crate::passes::{Passes, TextArgs};
use crate::quantity::Size;
use crate::settings::{RuntimeArgs, Settings};
use clap::Args;
use lite_llm_model::checkpoint::Tier;
use lite_llm_model::likelihood::{Window, perplexity, surprise, windows};
use lite_llm_model::{Capture, Checkpoint};
use serde_json::json;
use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Tiers whose every combination is tried.
const TIERS_MAX: usize = 6;

#[derive(Debug, Args)]
pub(crate) struct PerplexityArgs {
    /// A Hugging Face directory or an imported checkpoint
    model: PathBuf,
    #[command(flatten)]
    text: TextArgs,
    /// Tokens between the beginnings of two windows; half a window if left out
    ///
    /// Each window scores the tokens that no window before it did: those of the first have at least one token before
    /// them, all others at least WINDOW - STRIDE.
    #[arg(long, value_name = "N", help_heading = "Text", value_parser = clap::value_parser!(u32).range(1..))]
    stride: Option<u32>,
    /// Try every combination of tiers, instead of one TierSet
    #[arg(long, conflicts_with_all = ["tierset", "mode"])]
    all_tiersets: bool,
    /// Print one JSON object
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    runtime: RuntimeArgs,
}

/// What came of one TierSet.
struct Score {
    tiers: Vec<String>,
    expert_bytes: u64,
    surprise: f64,
    scored: u64,
}

impl PerplexityArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        let checkpoint = Checkpoint::open(&self.model)?;
        let mut settings = self.runtime.settle(&checkpoint)?;
        settings.expect_all_logits();
        let sets = self.sets(&checkpoint, &settings)?;
        settings.config.tier_set.clone_from(&sets[0]);
        let window = self.text.window(&checkpoint)?;
        let stride = self.stride.unwrap_or(window.div_ceil(2));
        if stride > window {
            return Err(usage(format!("--stride {stride} is more than the window of {window} tokens")));
        }
        let tokens = self.text.read(&checkpoint)?;
        anyhow::ensure!(
            tokens.len() > 1,
            "the text has {} token{}: there is nothing to predict; give at least two",
            tokens.len(),
            if tokens.len() == 1 { "" } else { "s" }
        );
        let windows = windows(tokens.len(), window as usize, stride as usize);
        let scorer = Scorer::default();
        let (count, capture) = (windows.len() * sets.len(), Box::new(scorer.clone()));
        let scores = Passes::run(&self.model, &settings, capture, count, |passes| {
            let slot_bytes = passes.slot_bytes()?;
            let mut scores = Vec::new();
            for (i, tiers) in sets.iter().enumerate() {
                if i > 0 {
                    passes.switch(tiers)?;
                }
                let experts: u64 =
                    in_set(checkpoint.tiers(), tiers).map(|tier| u64::from(tier.experts)).sum();
                let layers = checkpoint.arch().moe_layers().len() as u64;
                let expert_bytes = experts * layers * slot_bytes;
                let (surprise, scored) = score(passes, &scorer, &tokens, &windows)?;
                scores.push(Score {
                    tiers: names(checkpoint.tiers(), tiers),
                    expert_bytes,
                    surprise,
                    scored,
                });
            }
            Ok((scores, passes.identity().weights))
        });
        let (scores, weights) = scores?;
        let mut out = std::io::stdout().lock();
        if self.json {
            let of = |score: &Score| {
                json!({
                    "tiers": score.tiers,
                    "expert_bytes": score.expert_bytes,
                    "nll": score.surprise,
                    "nll_per_token": score.surprise / score.scored as f64,
                    "perplexity": perplexity(score.surprise, score.scored),
                })
            };
            let value = json!({
                "model": self.model.display().to_string(),
                "weights": weights.to_string(),
                "tokens": tokens.len(),
                "scored": scores[0].scored,
                "window": window,
                "stride": stride,
                "tiersets": scores.iter().map(of).collect::<Vec<_>>(),
            });
            writeln!(out, "{value}")?;
        } else {
            out.write_all(table(&scores).as_bytes())?;
            let (scored, all) = (scores[0].scored, tokens.len());
            writeln!(out, "{scored} of {all} tokens scored, windows of {window}, stride {stride}")?;
        }
        Ok(Exit::Ok)
    }

    /// The TierSets that are tried, by their tiers' names; no names are all tiers.
    fn sets(&self, checkpoint: &Checkpoint, settings: &Settings) -> anyhow::Result<Vec<Vec<String>>> {
        let tiers = checkpoint.tiers();
        if !self.all_tiersets || tiers.is_empty() {
            return Ok(vec![settings.config.tier_set.clone()]);
        }
        if tiers.len() > TIERS_MAX {
            return Err(usage(format!(
                "{} tiers have too many combinations; --all-tiersets tries those of up to {TIERS_MAX}: name one with \
                 --tierset",
                tiers.len()
            )));
        }
        let set = |mask: usize| {
            let of = |(i, tier): (usize, &Tier)| (mask >> i & 1 == 1).then(|| tier.name.clone());
            tiers.iter().enumerate().filter_map(of).collect()
        };
        Ok((1..1usize << tiers.len()).map(set).collect())
    }
}

/// The tiers of a TierSet.
fn in_set<'a>(tiers: &'a [Tier], set: &'a [String]) -> impl Iterator<Item = &'a Tier> {
    tiers.iter().filter(move |tier| set.is_empty() || set.contains(&tier.name))
}

fn names(tiers: &[Tier], set: &[String]) -> Vec<String> {
    in_set(tiers, set).map(|tier| tier.name.clone()).collect()
}

/// The sum of the surprises of all scored tokens, in order of positions, and how many these are.
fn score(passes: &Passes, scorer: &Scorer, tokens: &[u32], windows: &[Window]) -> anyhow::Result<(f64, u64)> {
    let (mut sum, mut scored) = (0.0, 0);
    for window in windows.iter().filter(|window| window.scored_from < window.end) {
        let expected = &tokens[window.scored_from..window.end];
        let first = (window.scored_from - window.start - 1) as u32;
        *scorer.of_window() =
            OfWindow { first, expected: expected.to_vec(), surprises: vec![None; expected.len()] };
        // What follows the last token is not asked.
        passes.pass(&tokens[window.start..window.end - 1])?;
        for surprise in &scorer.of_window().surprises {
            sum += surprise.ok_or_else(|| anyhow::anyhow!("a position of a window has no logits"))?;
            scored += 1;
        }
    }
    Ok((sum, scored))
}

fn table(scores: &[Score]) -> String {
    let name = |score: &Score| if score.tiers.is_empty() { "-".into() } else { score.tiers.join(",") };
    let width = scores.iter().map(|score| name(score).len()).max().unwrap_or(0).max("tierset".len());
    let mut text =
        format!("{:width$}  {:>12}  {:>14}  {:>12}\n", "tierset", "experts", "perplexity", "nll/token");
    for score in scores {
        text += &format!(
            "{:width$}  {:>12}  {:>14.6}  {:>12.6}\n",
            name(score),
            Size(score.expert_bytes).to_string(),
            perplexity(score.surprise, score.scored),
            score.surprise / score.scored as f64
        );
    }
    text
}

/// What the window at hand is to be scored on.
#[derive(Debug, Default)]
struct OfWindow {
    /// The position whose logits predict the first expected token.
    first: u32,
    expected: Vec<u32>,
    surprises: Vec<Option<f64>>,
}

/// Scores logits as they come. A position that is computed again overwrites itself, with the same bits.
#[derive(Clone, Debug, Default)]
struct Scorer(Arc<Mutex<OfWindow>>);

impl Scorer {
    fn of_window(&self) -> MutexGuard<'_, OfWindow> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Capture for Scorer {
    fn wants_logits(&self, _request: u64) -> bool {
        true
    }

    fn logits(&mut self, _request: u64, position: u32, logits: &[f32]) {
        let mut of_window = self.of_window();
        let Some(at) = position.checked_sub(of_window.first).map(|at| at as usize) else { return };
        if let Some(&token) = of_window.expected.get(at) {
            of_window.surprises[at] = Some(surprise(logits, token));
        }
    }

    fn routes(&mut self, _request: u64, _layer: u32, _position: u32, _experts: &[u32], _weights: &[f32]) {}
}
