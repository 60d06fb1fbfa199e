//! The layers of a step: with all experts resident nothing but launches, and exchanges of ranks; else layer by layer with the host.

use super::mixture::Desk;
use super::ranks::Among;
use super::run::Run;
use super::weights::Layer;
use super::{Failed, Step};
use lite_llm_model::ExpertSource;
use lite_llm_model::forward::exchange::of_block;

impl Run<'_> {
    /// All launches of a step, up to the first logits: those of the stage that is this rank's.
    pub(super) fn layers(
        &self,
        step: &mut Step<'_, '_>,
        source: &mut dyn ExpertSource,
        desk: &mut Desk,
    ) -> Result<(), Failed> {
        let share = self.model.share();
        if share.is_first_stage() {
            self.embed()?;
        } else {
            self.take_over(step, &mut Among { source, transport: desk.ways.transport() })?;
        }
        for (index, layer) in share.layers(self.model.arch()).zip(&self.base.layers) {
            let among = &mut Among { source, transport: desk.ways.transport() };
            self.before_block(index, layer, among)?;
            if self.dense(index, layer, among)? {
                continue;
            }
            match &self.standing.resident {
                Some(resident) if self.finds_users => {
                    self.with_resident(index, layer, &resident[index], among)?;
                }
                _ => self.mixture(index, layer, step, source, desk)?,
            }
        }
        if share.is_last_stage() {
            self.first_logits(&mut Among { source, transport: desk.ways.transport() })?;
        }
        Ok(self.flush()?)
    }

    fn before_block(&self, index: usize, layer: &Layer, among: &mut Among<'_>) -> Result<(), Failed> {
        let (room, rows) = (self.room, self.positions());
        self.norm(room.x, layer.attention_norm, room.normed, rows)?;
        self.attend(index, layer, among)?;
        Ok(self.norm(room.x, layer.block_norm, room.normed, rows)?)
    }

    /// The block of a layer without experts; whether it is one.
    fn dense(&self, index: usize, layer: &Layer, among: &mut Among<'_>) -> Result<bool, Failed> {
        let Some(dense) = &layer.dense else { return Ok(false) };
        self.gated(dense, self.room.added, of_block(index), among)?;
        self.add(self.room.added)?;
        Ok(true)
    }
}
