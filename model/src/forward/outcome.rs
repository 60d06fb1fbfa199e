//! What a step comes to that was computed elsewhere: the digests and tokens that [`Model::forward`](crate::Model::forward) would
//! give of the same values.

use super::StepError;
use super::output::{digest_values, params, penalised_tokens, penalises};
use super::ranks::{RowDigest, handed_on, taken_over};
use crate::kernels::sample::Params;
use crate::share::Share;
use lite_llm_core::input::RowResult;
use lite_llm_core::output::{Forward, Row};

/// How the token of a row is chosen, by which parameters and draw, if it samples one: by its logits, or what repetition makes of them
/// ([`penalty`]).
pub fn choice(row: &Row) -> Option<(Params, u64)> {
    let spec = row.sample.as_ref()?;
    Some((params(&spec.sampling), spec.draw))
}

/// The tokens whose logits are changed before one is chosen, each once, and by which penalty; none if it changes nothing. The digest is
/// of logits as they were.
pub fn penalty(row: &Row) -> Option<(Vec<u32>, f32)> {
    let spec = row.sample.as_ref().filter(|spec| penalises(&spec.sampling))?;
    Some((penalised_tokens(row, spec), spec.sampling.repetition_penalty))
}

/// The results of a step's rows as they become known, in this order: routes, layer by layer and in each position by position;
/// the logits of rows that sample; what stands in the residual stream at last, position by position.
#[derive(Debug)]
pub struct Outcome<'a> {
    step: &'a Forward,
    digests: Vec<RowDigest>,
    tokens: Vec<Option<u32>>,
}

impl<'a> Outcome<'a> {
    /// Of nothing as yet, for this share of the model.
    pub fn new(step: &'a Forward, share: &Share) -> Self {
        let digests = step.rows.iter().map(|_| RowDigest::new(share)).collect();
        Self { step, digests, tokens: vec![None; step.rows.len()] }
    }

    /// Takes what the stage before has handed on, before all else: the residual stream of so many values, as bytes.
    ///
    /// # Panics
    /// If it is of another step.
    pub fn take_over<'b>(&mut self, bytes: &'b [u8], values: usize) -> &'b [u8] {
        taken_over(bytes, values, &mut self.digests)
    }

    /// What a stage that is not the last hands on, after all else: of the residual stream, so many values of each position. By
    /// them the ranks of the stage are compared, so that they are digested too.
    pub fn hand_on(&mut self, x: &[f32], hidden: usize) -> Vec<u8> {
        let bytes = handed_on(x, &self.digests);
        let mut values = x.chunks_exact(hidden);
        for (row, digest) in self.step.rows.iter().zip(&mut self.digests) {
            values.by_ref().take(row.tokens.len()).for_each(|x| digest_values(digest, x));
        }
        bytes
    }

    /// The experts of a position of a row, by original number, ascending, and their weights.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn route(&mut self, row: usize, experts: &[u32], weights: &[f32]) {
        let digest = &mut self.digests[row];
        for (expert, weight) in experts.iter().zip(weights) {
            digest.update(&expert.to_le_bytes()).update(&weight.to_bits().to_le_bytes());
        }
    }

    /// The logits of the last position of a row that samples, as they were before repetition changed any, and its token, which was chosen
    /// elsewhere as [`choice`] and [`penalty`] say: none if a logit is not finite.
    ///
    /// # Errors
    /// If one is not finite; the model has so many layers.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn chosen(
        &mut self,
        row: usize,
        layers: usize,
        logits: &[f32],
        token: Option<u32>,
    ) -> Result<(), StepError> {
        digest_values(&mut self.digests[row], logits);
        self.choose(row, layers, token)
    }

    fn choose(&mut self, row: usize, layers: usize, token: Option<u32>) -> Result<(), StepError> {
        let of_row = &self.step.rows[row];
        let position = of_row.start + of_row.tokens.len() as u32 - 1;
        let fault = StepError::NonFinite { row: row as u32, layer: layers as u32, position };
        self.tokens[row] = Some(token.ok_or(fault)?);
        Ok(())
    }

    /// What stands in the residual stream at a position of a row, or at several in their order.
    ///
    /// # Panics
    /// If there is no such row.
    pub fn hidden(&mut self, row: usize, x: &[f32]) {
        digest_values(&mut self.digests[row], x);
    }

    /// The results.
    pub fn results(self) -> Vec<RowResult> {
        let digests = self.digests.iter().map(RowDigest::digest);
        let results = self.tokens.iter().zip(digests);
        results.map(|(&token, digest)| RowResult { token, stop: false, digest }).collect()
    }
}
