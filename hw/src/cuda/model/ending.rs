//! The end of a step: logits where they are wanted, then all that is digested comes back.

use super::super::CudaError;
use super::mirror::Results;
use super::routes::Routes;
use super::run::Run;
use super::sizes::Back;
use super::tables::Wanted;
use super::{Failed, Step};
use lite_llm_model::kernels::Isa;

impl Run<'_> {
    /// Takes back what is digested, chooses tokens. All of it comes at once, where logits have room for all who want them; else the
    /// first logits are there, and others are computed.
    pub(super) fn end(&self, isa: Isa, step: &mut Step<'_, '_>, results: &mut Results) -> Result<(), Failed> {
        let Back { routes, logits, end } = self.back;
        if self.tables.wanted.is_empty() {
            results.ask(self.stream, self.room.x, logits)?;
            let words = results.look(self.stream)?;
            self.kept_routes(step, &words[routes..])?;
            self.digest(step, words);
            return Ok(());
        }
        let last = self.tables.wanted.len() - 1;
        for (number, wanted) in self.tables.wanted.iter().enumerate() {
            if number > 0 {
                self.logits(wanted)?;
            }
            // Between the first ones and the last ones logits come alone.
            let from = if number == 0 || number == last { 0 } else { logits };
            results.ask(self.stream, Self::value(self.room.x, from), end - from)?;
            let words = results.look(self.stream)?;
            let (before, words) = words.split_at_mut(logits - from);
            if number == 0 {
                self.kept_routes(step, &before[routes..])?;
            }
            self.choose(isa, wanted, step, words)?;
            if number == last {
                self.digest(step, before);
            }
        }
        Ok(())
    }

    /// Takes the routes of all layers, if they were kept until now: the first layer with a fault is heard of.
    fn kept_routes(&self, step: &mut Step<'_, '_>, words: &[u32]) -> Result<(), Failed> {
        if self.standing.resident.is_none() {
            return Ok(());
        }
        let (rows, each) = (self.at.len(), self.route_words());
        let mixtures = (0..).zip(&self.routers.of_layer).filter(|(_, router)| router.is_some());
        for ((number, _), words) in mixtures.zip(words.chunks_exact(each)) {
            self.take_routes(number, &Routes::new(words, rows, self.sizes.places), step)?;
        }
        Ok(())
    }

    /// Takes logits of some positions.
    fn choose(
        &self,
        isa: Isa,
        wanted: &Wanted,
        step: &mut Step<'_, '_>,
        logits: &mut [u32],
    ) -> Result<(), Failed> {
        let arch = self.model.arch();
        for (&i, logits) in wanted.positions.iter().zip(logits.chunks_exact_mut(arch.vocab)) {
            let logits: &mut [f32] = bytemuck::cast_slice_mut(logits);
            let at = &self.at[i as usize];
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
        Ok(())
    }

    pub(super) fn logits(&self, wanted: &Wanted) -> Result<(), CudaError> {
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
        for (at, x) in self.at.iter().zip(x.chunks_exact(self.sizes.hidden)) {
            step.outcome.hidden(at.row, x);
        }
    }
}
