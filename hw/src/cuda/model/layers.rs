//! The layers of a step: with all experts resident nothing but launches, else layer by layer with the host.

use super::super::CudaError;
use super::mixture::Desk;
use super::run::Run;
use super::standing::Resident;
use super::weights::Layer;
use super::{Failed, Step};
use lite_llm_model::ExpertSource;

impl Run<'_> {
    /// Every launch of a step whose experts are all resident, up to the first logits.
    pub(super) fn launches(&self, resident: &[Resident]) -> Result<(), CudaError> {
        self.embed()?;
        for (index, layer) in self.base.layers.iter().enumerate() {
            self.before_block(index, layer)?;
            if !self.dense(layer)? {
                self.with_resident(index, layer, resident[index])?;
            }
        }
        self.first_logits()
    }

    /// The same of a step whose experts come and go.
    pub(super) fn by_layers(
        &self,
        step: &mut Step<'_, '_>,
        source: &mut dyn ExpertSource,
        desk: &mut Desk,
    ) -> Result<(), Failed> {
        self.embed()?;
        for (index, layer) in self.base.layers.iter().enumerate() {
            self.before_block(index, layer)?;
            if !self.dense(layer)? {
                self.mixture(index, layer, step, source, desk)?;
            }
        }
        Ok(self.first_logits()?)
    }

    fn before_block(&self, index: usize, layer: &Layer) -> Result<(), CudaError> {
        let (room, rows) = (self.room, self.positions());
        self.norm(room.x, layer.attention_norm, room.normed, rows)?;
        self.attend(index, layer)?;
        self.norm(room.x, layer.block_norm, room.normed, rows)
    }

    /// The block of a layer without experts; whether it is one.
    fn dense(&self, layer: &Layer) -> Result<bool, CudaError> {
        let Some(dense) = &layer.dense else { return Ok(false) };
        self.gated(dense, self.room.added)?;
        self.add(self.room.added)?;
        Ok(true)
    }

    fn first_logits(&self) -> Result<(), CudaError> {
        self.tables.wanted.first().map_or(Ok(()), |wanted| self.logits(wanted))
    }
}
