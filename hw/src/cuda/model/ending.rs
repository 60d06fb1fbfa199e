//! The end of a step: logits where they are wanted, then all that is digested comes back.

use super::super::CudaError;
use super::mirror::Results;
use super::run::Run;
use super::tables::Wanted;
use super::{Failed, Step};
use lite_llm_model::kernels::Isa;

impl Run<'_> {
    /// Computes logits, chooses tokens, digests rows.
    pub(super) fn end(&self, isa: Isa, step: &mut Step<'_, '_>, results: &mut Results) -> Result<(), Failed> {
        let (arch, hidden) = (self.model.arch(), self.sizes.hidden);
        let last = self.tables.wanted.len().saturating_sub(1);
        if self.tables.wanted.is_empty() {
            results.ask(self.stream, self.room.x, self.tables.at.len() * hidden)?;
            self.digest(step, results.look(self.stream)?);
            return Ok(());
        }
        for (number, wanted) in self.tables.wanted.iter().enumerate() {
            self.logits(wanted)?;
            let values = wanted.positions.len() * arch.vocab;
            results.ask(self.stream, self.room.logits, values)?;
            if number == last {
                results.ask(self.stream, self.room.x, self.tables.at.len() * hidden)?;
            }
            let (logits, x) = results.look(self.stream)?.split_at_mut(values);
            for (&i, logits) in wanted.positions.iter().zip(logits.chunks_exact_mut(arch.vocab)) {
                let logits: &mut [f32] = bytemuck::cast_slice_mut(logits);
                let at = &self.tables.at[i as usize];
                if let Some(capture) = &mut step.capture
                    && capture.wants_logits(at.request)
                {
                    capture.logits(at.request, at.position, logits);
                }
                let row = &step.forward.rows[at.row];
                if at.position + 1 == row.start + row.tokens.len() as u32 {
                    step.outcome.logits(isa, at.row, arch.layers.len(), logits)?;
                }
            }
            if number == last {
                self.digest(step, x);
            }
        }
        Ok(())
    }

    fn logits(&self, wanted: &Wanted) -> Result<(), CudaError> {
        let (room, hidden, head) = (self.room, self.hidden(), &self.base.head);
        let rows = wanted.positions.len() as u32;
        self.arrange((room.x, hidden, 0), wanted.picked, (room.last, hidden, 0), hidden, rows)?;
        self.norm(room.last, self.base.norm, room.last, rows)?;
        self.pack(room.last, 0, rows, hidden, &[head.storage], room.packed)?;
        self.product(room.packed, head, (wanted.all, rows), room.logits)?;
        let by = self.model.arch().multipliers.logits;
        if by.to_bits() != 1.0f32.to_bits() {
            self.divide(room.logits, by, rows * head.outputs)?;
        }
        Ok(())
    }

    fn digest(&self, step: &mut Step<'_, '_>, x: &[u32]) {
        let x: &[f32] = bytemuck::cast_slice(x);
        for (at, x) in self.tables.at.iter().zip(x.chunks_exact(self.sizes.hidden)) {
            step.outcome.hidden(at.row, x);
        }
    }
}
