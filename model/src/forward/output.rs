//! The end of a step: logits where they are asked for, the choice of tokens, the digest of each row.

use super::{Batch, Capture, StepError};
use crate::kernels::linear;
use crate::kernels::sample::{Params, penalise, sample};
use crate::model::Model;
use crate::weights::Base;
use lite_llm_core::digest::Digest;
use lite_llm_core::input::RowResult;
use lite_llm_core::output::{Forward, Row, SampleSpec};

impl Model {
    pub(super) fn choose(
        &self,
        base: &Base,
        step: &Forward,
        batch: &mut Batch,
        capture: &mut Option<&mut dyn Capture>,
    ) -> Result<Vec<RowResult>, StepError> {
        let arch = self.arch();
        let wanted = self.wanted(step, batch, capture.as_deref());
        let mut normed = vec![0.0; wanted.len() * arch.hidden];
        for (&i, out) in wanted.iter().zip(normed.chunks_exact_mut(arch.hidden)) {
            self.norm(&batch.x[i * arch.hidden..][..arch.hidden], &base.norm, out);
        }
        let mut logits = vec![0.0; wanted.len() * arch.vocab];
        let (head, bias) = (base.head.matrix.view(), base.head.bias.as_deref());
        linear(&self.pool, self.isa, &normed, wanted.len(), &head, bias, &mut logits);
        for logit in &mut logits {
            *logit /= arch.multipliers.logits;
        }

        let mut tokens = vec![None; step.rows.len()];
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
            let digest = &mut batch.digests[at.row as usize];
            digest_values(digest, logits);
            let layer = arch.layers.len() as u32;
            let token = token(row, spec, logits).ok_or(StepError::NonFinite {
                row: at.row,
                layer,
                position: at.position,
            })?;
            tokens[at.row as usize] = Some(token);
        }
        for (at, x) in batch.at.iter().zip(batch.x.chunks_exact(arch.hidden)) {
            digest_values(&mut batch.digests[at.row as usize], x);
        }
        let digests = batch.digests.iter().map(|digest| Digest(*digest.finalize().as_bytes()));
        Ok(tokens
            .into_iter()
            .zip(digests)
            .map(|(token, digest)| RowResult { token, stop: false, digest })
            .collect())
    }

    /// The positions whose logits are computed: those that sample, and those that somebody wants to see.
    fn wanted(&self, step: &Forward, batch: &Batch, capture: Option<&dyn Capture>) -> Vec<usize> {
        let all = batch.at.iter().enumerate().filter(|(_, at)| {
            let row = &step.rows[at.row as usize];
            let last = at.position as usize + 1 == row.start as usize + row.tokens.len();
            (last && row.sample.is_some()) || capture.is_some_and(|capture| capture.wants_logits(at.request))
        });
        all.map(|(i, _)| i).collect()
    }
}

fn token(row: &Row, spec: &SampleSpec, logits: &mut [f32]) -> Option<u32> {
    let sampling = &spec.sampling;
    if sampling.repetition_penalty.to_bits() != 1.0f32.to_bits() {
        penalise(logits, &spec.history, sampling.repetition_penalty);
        let fresh: Vec<u32> =
            row.tokens.iter().copied().filter(|token| !spec.history.contains(token)).collect();
        penalise(logits, &fresh, sampling.repetition_penalty);
    }
    let params = Params {
        temperature: sampling.temperature,
        top_k: sampling.top_k,
        top_p: sampling.top_p,
        min_p: sampling.min_p,
    };
    sample(logits, &params, spec.draw).ok()
}

fn digest_values(digest: &mut blake3::Hasher, values: &[f32]) {
    if cfg!(target_endian = "little") {
        digest.update(bytemuck::cast_slice(values));
    } else {
        for value in values {
            digest.update(&value.to_bits().to_le_bytes());
        }
    }
}
