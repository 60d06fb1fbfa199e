//! What a rank on a device exchanges with the others, whichever way its values go (`transport.rs`).

use super::mirror::Results;
use super::routes::Users;
use super::run::Run;
use super::transport::{Gather, Transport};
use super::{Failed, Step};
use lite_llm_model::forward::exchange;
use lite_llm_model::{ExpertSource, Model};
use std::ops::Range;

/// The other ranks, if there are any, and how they are reached.
pub(super) struct Among<'a> {
    pub(super) source: &'a dyn ExpertSource,
    pub(super) transport: &'a mut dyn Transport,
}

impl Among<'_> {
    fn reach(&mut self) -> (&dyn ExpertSource, &mut dyn Transport) {
        (self.source, &mut *self.transport)
    }
}

impl Run<'_> {
    /// Whether several ranks share the rows of matrices.
    pub(super) const fn is_tensor(&self) -> bool {
        self.model.share().is_tensor()
    }

    /// Values of all tensor ranks together, rows x all columns, of this one's, rows x its columns. Both may be in one place. With one
    /// tensor rank they are there already.
    pub(super) fn gather(
        &self,
        (from, to): (u64, u64),
        rows: usize,
        columns: &dyn Fn(u32) -> Range<usize>,
        exchange: u32,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        let share = self.model.share();
        if !share.is_tensor() {
            return Ok(());
        }
        let (source, transport) = among.reach();
        let (own, columns): (_, Vec<_>) =
            (share.seat().tensor as usize, (0..share.topology().tensor).map(columns).collect());
        let ranks = &share.tensor_ranks();
        transport.gather(self, source, &Gather { ranks, own, columns: &columns, rows, from, to, exchange })
    }

    /// The same of rows of a matrix with so many.
    pub(super) fn gather_rows(
        &self,
        places: (u64, u64),
        rows: u32,
        outputs: u32,
        exchange: u32,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        let columns = |tensor| self.model.share().rows_of(tensor, outputs as usize);
        self.gather(places, rows as usize, &columns, exchange, among)
    }

    /// Normalises whole queries or keys, of which each tensor rank has some heads.
    pub(super) fn norm_of_all(
        &self,
        own: u64,
        (weight, width): (u64, u32),
        columns: &dyn Fn(u32) -> Range<usize>,
        exchange: u32,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        let (whole, rows) = (self.room.whole, self.positions());
        self.gather((own, whole), rows as usize, columns, exchange, among)?;
        self.rms_norm(whole, weight, whole, rows, [width; 2], self.model.arch().norm_eps)?;
        let mine = columns(self.model.share().seat().tensor);
        let count = mine.len() as u32;
        self.arrange((whole, width, mine.start as u32), 0, (own, count, 0), count, rows)?;
        Ok(())
    }

    /// Gives the other expert ranks what this one's experts gave, and takes what theirs did. One alone has all.
    pub(super) fn exchange_results(
        &self,
        layer: usize,
        users: &Users,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        // In the order of ranks they are all results, in the order of experts.
        let rows = |seat| users.of(&users.held(self.model, seat));
        self.exchange_rows(layer, &|seat| rows(seat).0 as usize..rows(seat).1 as usize, among)
    }

    /// The same where each expert rank has places for all results that there may be.
    pub(super) fn exchange_places(&self, layer: usize, among: &mut Among<'_>) -> Result<(), Failed> {
        let places = self.at.len() * self.sizes.places;
        self.exchange_rows(layer, &|seat| seat as usize * places..(seat as usize + 1) * places, among)
    }

    /// Exchanges rows of results, by the rank that has them.
    fn exchange_rows(
        &self,
        layer: usize,
        rows: &dyn Fn(u32) -> Range<usize>,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        let share = self.model.share();
        if !share.is_expert() {
            return Ok(());
        }
        let (source, transport) = among.reach();
        // One row of values.
        let values = |rows: Range<usize>| rows.start * self.sizes.hidden..rows.end * self.sizes.hidden;
        let columns: Vec<_> = (0..share.topology().expert).map(|seat| values(rows(seat))).collect();
        let (own, to) = (share.seat().expert as usize, self.room.results);
        let (ranks, from) = (&share.expert_ranks(), Self::value(to, columns[own].start));
        let exchange = exchange::of_results(layer);
        transport.gather(self, source, &Gather { ranks, own, columns: &columns, rows: 1, from, to, exchange })
    }

    /// Takes what the stage before computed.
    pub(super) fn take_over(&self, step: &mut Step<'_, '_>, among: &mut Among<'_>) -> Result<(), Failed> {
        let (source, transport) = among.reach();
        let share = self.model.share();
        let from = share.in_stage(share.seat().pipeline - 1);
        let exchange = exchange::of_stage(share.layers(self.model.arch()).start);
        transport.take_over(self, source, (from, exchange), step)
    }

    /// Gives the next stage what this one computed.
    pub(super) fn hand_on(
        &self,
        step: &mut Step<'_, '_>,
        results: &mut Results,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        let (source, transport) = among.reach();
        let share = self.model.share();
        let to = share.in_stage(share.seat().pipeline + 1);
        let exchange = exchange::of_stage(share.layers(self.model.arch()).end);
        transport.hand_on(self, source, (to, exchange), step, results)
    }
}

impl Users {
    /// Those of the experts that are this rank's: neighbours.
    pub(super) fn own(&self, model: &Model) -> Range<usize> {
        self.held(model, model.share().seat().expert)
    }

    /// Those that an expert rank holds.
    fn held(&self, model: &Model, seat: u32) -> Range<usize> {
        let holder = |key| model.holder(key).expect("a key of this checkpoint");
        let first = self.keys.partition_point(|&key| holder(key) < seat);
        first..self.keys.partition_point(|&key| holder(key) <= seat)
    }

    /// The experts that are computed together from one on, up to another. Tensor ranks, which exchange what each group gives, make
    /// the groups of the model on the CPU.
    pub(super) fn together(&self, first: usize, end: usize, is_tensor: bool) -> Range<usize> {
        if !is_tensor {
            return first..end;
        }
        let rows = |end: usize| (self.firsts[end] - self.firsts[first]) as usize;
        let fits = (first + 2..=end).take_while(|&end| rows(end) <= exchange::ROWS_TOGETHER).last();
        first..fits.unwrap_or(first + 1)
    }
}
