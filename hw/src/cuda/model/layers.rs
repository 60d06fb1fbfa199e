//! The layers of a step: of a whole model with all experts resident nothing but launches, else layer by layer with the host.

use super::mixture::Desk;
use super::ranks::Among;
use super::run::Run;
use super::standing::Resident;
use super::weights::Layer;
use super::{Failed, Step};
use lite_llm_model::ExpertSource;
use lite_llm_model::forward::exchange::of_block;

impl Run<'_> {
    /// Every launch of a step of a whole model whose experts are all resident, up to the first logits.
    pub(super) fn launches(&self, resident: &[Resident]) -> Result<(), Failed> {
        let among = &mut Among::Nobody;
        self.embed()?;
        for (index, layer) in self.base.layers.iter().enumerate() {
            self.before_block(index, layer, among)?;
            if !self.dense(index, layer, among)? {
                self.with_resident(index, layer, resident[index])?;
            }
        }
        self.first_logits(among)
    }

    /// The same of a step whose experts come and go, or of a rank: its stage, and the logits if that is the last one.
    pub(super) fn by_layers(
        &self,
        step: &mut Step<'_, '_>,
        source: &mut dyn ExpertSource,
        desk: &mut Desk,
    ) -> Result<(), Failed> {
        let share = self.model.share();
        if share.is_first_stage() {
            self.embed()?;
        } else {
            self.take_over(step, &mut Among::Ranks { source, transport: desk.ways.transport() })?;
        }
        for (index, layer) in share.layers(self.model.arch()).zip(&self.base.layers) {
            let among = &mut Among::Ranks { source, transport: desk.ways.transport() };
            self.before_block(index, layer, among)?;
            if !self.dense(index, layer, among)? {
                self.mixture(index, layer, step, source, desk)?;
            }
        }
        if !share.is_last_stage() {
            return Ok(());
        }
        self.first_logits(&mut Among::Ranks { source, transport: desk.ways.transport() })
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
