//! The end of a step: logits where they are asked for, the choice of tokens, the digest of each row.

use super::exchange::of_output;
use super::ranks::{Among, RowDigest};
use super::{At, Batch, Capture, ExpertSource, Rooms, StepError};
use crate::kernels::sample::{Params, penalise, sample};
use crate::kernels::{Buffer, Isa, Product};
use crate::model::Model;
use crate::weights::Base;
use lite_llm_core::input::{RowResult, Sampling};
use lite_llm_core::output::{Forward, Row, SampleSpec};

/// What a choice costs for each logit, beside touching it.
const CHOICE_COST: usize = 8;

/// What the end of a step works in.
#[derive(Debug, Default)]
pub(super) struct Room {
    /// The positions whose logits are computed.
    wanted: Vec<usize>,
    normed: Buffer,
    logits: Buffer,
    /// What all tensor ranks have.
    whole: Buffer,
    /// The token of each row.
    tokens: Vec<Option<u32>>,
}

impl Room {
    pub(super) fn bytes(&self) -> usize {
        let buffers = [&self.normed, &self.logits, &self.whole].map(Buffer::bytes);
        buffers.iter().sum::<usize>() + 8 * (self.wanted.capacity() + self.tokens.capacity())
    }
}

impl Model {
    pub(super) fn choose(
        &self,
        base: &Base,
        step: &Forward,
        batch: &mut Batch<'_>,
        capture: &mut Option<&mut dyn Capture>,
        rooms: &mut Rooms,
        source: &dyn ExpertSource,
    ) -> Result<Vec<RowResult>, StepError> {
        let arch = self.arch();
        let Rooms { products, output: Room { wanted, normed, logits, whole, tokens }, .. } = rooms;
        wanted.clear();
        let all = batch.at.iter().enumerate();
        wanted.extend(all.filter(|(_, at)| is_wanted(at, step, capture.as_deref())).map(|(i, _)| i));
        let normed = normed.values(wanted.len() * arch.hidden);
        let x = &*batch.x;
        self.pool.each_row(normed, arch.hidden, 1, &|i, out| {
            self.norm(&x[wanted[i] * arch.hidden..][..arch.hidden], &base.norm, out);
        });
        let head = base.head.as_ref().expect("the last stage has the output projection");
        let mut logits = logits.values(wanted.len() * head.matrix.view().outputs());
        let product = Product::new(normed, head.matrix.view(), head.bias.as_deref(), &mut *logits);
        products.compute(&self.pool, self.isa, [product]);
        if self.share.is_tensor() {
            let among = Among { source, exchange: of_output(arch.layers.len()) };
            let whole = whole.values(wanted.len() * arch.vocab);
            self.gather_into(
                logits,
                wanted.len(),
                |tensor| self.share.rows_of(tensor, arch.vocab),
                whole,
                among,
            )?;
            logits = whole;
        }
        self.pool.each_row(logits, arch.vocab, 1, &|_, logits| {
            logits.iter_mut().for_each(|logit| *logit /= arch.multipliers.logits);
        });

        let mut digests = batch.digests.iter_mut().enumerate();
        let mut choices = Vec::with_capacity(wanted.len());
        for (&i, logits) in wanted.iter().zip(logits.chunks_exact_mut(arch.vocab)) {
            let at = batch.at[i];
            let row = &step.rows[at.row as usize];
            if let Some(capture) = capture
                && capture.wants_logits(at.request)
            {
                capture.logits(at.request, at.position, logits);
            }
            let last = at.position as usize + 1 == row.start as usize + row.tokens.len();
            let Some(spec) = row.sample.as_ref().filter(|_| last) else { continue };
            let digest = digests.find(|(number, _)| *number == at.row as usize);
            let (_, digest) = digest.expect("positions are in the order of their rows, and one is the last");
            choices.push(Choice { at, row, spec, logits, digest, token: None });
        }
        self.pool.each_row(&mut choices, 1, CHOICE_COST * arch.vocab, &|_, choice| {
            let [Choice { row, spec, logits, digest, token: chosen, .. }] = choice else { return };
            digest_values(digest, logits);
            *chosen = token(self.isa, row, spec, logits);
        });
        tokens.clear();
        tokens.resize(step.rows.len(), None);
        for Choice { at, token, .. } in choices {
            let (layer, At { row, position, .. }) = (arch.layers.len() as u32, at);
            tokens[row as usize] = Some(token.ok_or(StepError::NonFinite { row, layer, position })?);
        }
        for (at, x) in batch.at.iter().zip(batch.x.chunks_exact(arch.hidden)) {
            digest_values(&mut batch.digests[at.row as usize], x);
        }
        let digests = batch.digests.iter().map(RowDigest::digest);
        let results = tokens.iter().zip(digests);
        Ok(results.map(|(&token, digest)| RowResult { token, stop: false, digest }).collect())
    }
}

/// A token that is to be chosen, by whichever thread.
struct Choice<'a> {
    at: At,
    row: &'a Row,
    spec: &'a SampleSpec,
    logits: &'a mut [f32],
    digest: &'a mut RowDigest,
    token: Option<u32>,
}

/// Whether the logits after a position are computed: where one is sampled, and where somebody wants to see them.
fn is_wanted(at: &At, step: &Forward, capture: Option<&dyn Capture>) -> bool {
    let row = &step.rows[at.row as usize];
    let last = at.position as usize + 1 == row.start as usize + row.tokens.len();
    (last && row.sample.is_some()) || capture.is_some_and(|capture| capture.wants_logits(at.request))
}

/// Whether tokens that were there change logits.
pub(super) fn penalises(sampling: &Sampling) -> bool {
    sampling.repetition_penalty.to_bits() != 1.0f32.to_bits()
}

pub(super) fn token(isa: Isa, row: &Row, spec: &SampleSpec, logits: &mut [f32]) -> Option<u32> {
    let sampling = &spec.sampling;
    if penalises(sampling) {
        penalise(logits, &penalised_tokens(row, spec), sampling.repetition_penalty);
    }
    sample(isa, logits, &params(sampling), spec.draw).ok()
}

/// The tokens before the one that is sampled, each once, in their order.
pub(super) fn penalised_tokens(row: &Row, spec: &SampleSpec) -> Vec<u32> {
    let mut tokens: Vec<u32> = spec.history.iter().chain(&row.tokens).copied().collect();
    tokens.sort_unstable();
    tokens.dedup();
    tokens
}

pub(super) fn params(sampling: &Sampling) -> Params {
    Params {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
    }
}

pub(super) fn digest_values(digest: &mut RowDigest, values: &[f32]) {
    if cfg!(target_endian = "little") {
        digest.update(bytemuck::cast_slice(values));
    } else {
        for value in values {
            digest.update(&value.to_bits().to_le_bytes());
        }
    }
}
