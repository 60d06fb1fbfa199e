//! The end of a step: logits where they are wanted, then all that is digested comes back.

use super::super::CudaError;
use super::super::stream::Arg::{At, Value, Word};
use super::mirror::Results;
use super::ranks::Among;
use super::routes::Routes;
use super::run::Run;
use super::sizes::Back;
use super::tables::{Penalty, Wanted, last_of};
use super::{Failed, Step};
use lite_llm_model::forward::choice;
use lite_llm_model::forward::exchange::of_output;

/// The most threads of a block that chooses a token.
const SAMPLE_THREADS: u32 = 1024;
/// Threads of a block that changes logits of tokens that were there, and the most such blocks.
const PENALTY_THREADS: u32 = 256;
const PENALTY_BLOCKS: u32 = 64;
/// What stands for no token whose logit is not finite.
const NO_FAULT: u32 = u32::MAX;

impl Run<'_> {
    /// Takes back what is digested, chooses tokens. All of it comes at once, where logits have room for all who want them; else the
    /// first logits are there, and others are computed.
    pub(super) fn end(
        &self,
        step: &mut Step<'_, '_>,
        results: &mut Results,
        among: &mut Among<'_>,
    ) -> Result<(), Failed> {
        let Back { routes, tokens, logits, end, .. } = self.back;
        if self.tables.wanted.is_empty() {
            results.ask(self.stream, self.room.x, tokens)?;
            let words = results.look(self.stream)?;
            self.kept_routes(step, &words[routes..])?;
            self.digest(step, words);
            return Ok(());
        }
        let last = self.tables.wanted.len() - 1;
        assert!(last == 0 || !self.is_tensor(), "ranks show nobody their logits, so that a step wants few");
        for (number, wanted) in self.tables.wanted.iter().enumerate() {
            if number > 0 {
                self.logits(wanted, among)?;
            }
            // Between the first ones and the last ones logits come with nothing but tokens.
            let from = if number == 0 || number == last { 0 } else { tokens };
            results.ask(self.stream, Self::value(self.room.x, from), end - from)?;
            let words = results.look(self.stream)?;
            let (before, words) = words.split_at(logits - from);
            if number == 0 {
                self.kept_routes(step, &before[routes..])?;
            }
            self.choose(wanted, step, &before[tokens - from..], words)?;
            if number == last {
                self.digest(step, before);
            }
        }
        Ok(())
    }

    /// Asks for what a stage digests before it hands on: the residual stream, and routes behind it, if they were kept.
    pub(super) fn ask_to_hand_on(&self, results: &mut Results) -> Result<(), CudaError> {
        let words = if self.finds_users { self.back.tokens } else { self.at.len() * self.sizes.hidden };
        results.ask(self.stream, self.room.x, words)
    }

    /// Waits for it, digests it, and gives what is handed on: the residual stream, then what was digested.
    pub(super) fn to_hand_on(
        &self,
        step: &mut Step<'_, '_>,
        results: &mut Results,
    ) -> Result<Vec<u8>, Failed> {
        let words = results.look(self.stream)?;
        let (x, rest) = words.split_at(self.at.len() * self.sizes.hidden);
        if self.finds_users {
            self.kept_routes(step, &rest[self.back.routes - x.len()..])?;
        }
        Ok(step.outcome.hand_on(bytemuck::cast_slice(x), self.sizes.hidden))
    }

    /// Takes the routes of all layers, if they were kept until now: the first layer with a fault is heard of.
    fn kept_routes(&self, step: &mut Step<'_, '_>, words: &[u32]) -> Result<(), Failed> {
        if !self.finds_users {
            return Ok(());
        }
        let (rows, each) = (self.at.len(), self.route_words());
        let mixtures = (0..).zip(&self.routers.of_layer).filter(|(_, router)| router.is_some());
        for ((number, _), words) in mixtures.zip(words.chunks_exact(each)) {
            self.take_routes(number, &Routes::new(words, rows, self.sizes.places), step)?;
        }
        Ok(())
    }

    /// Takes logits of some positions, and the tokens that were chosen by them.
    fn choose(
        &self,
        wanted: &Wanted,
        step: &mut Step<'_, '_>,
        tokens: &[u32],
        logits: &[u32],
    ) -> Result<(), Failed> {
        let arch = self.model.arch();
        let (tokens, faults) = tokens.split_at(self.back.faults - self.back.tokens);
        let found = tokens.iter().zip(faults).map(|(&token, &fault)| (fault == NO_FAULT).then_some(token));
        let each = wanted.positions.iter().zip(logits.chunks_exact(arch.vocab)).zip(found);
        for ((&i, logits), token) in each {
            let logits: &[f32] = bytemuck::cast_slice(logits);
            let at = &self.at[i as usize];
            if let Some(capture) = &mut step.capture
                && capture.wants_logits(at.request)
            {
                capture.logits(at.request, at.position, logits);
            }
            let Some(row) = last_of(step.forward, at) else { continue };
            if choice(row).is_some() {
                step.outcome.chosen(at.row, arch.layers.len(), logits, token)?;
            }
        }
        Ok(())
    }

    /// The logits by which tokens are chosen: a copy where repetition changes any, as those that are digested stay as they are.
    fn penalised(&self, wanted: &Wanted) -> Result<u64, CudaError> {
        let (room, rows, vocab) = (self.room, wanted.positions.len() as u32, self.sizes.vocab as u32);
        if wanted.penalties.is_empty() {
            return Ok(room.logits);
        }
        self.arrange((room.logits, vocab, 0), 0, (room.penalised, vocab, 0), vocab, rows)?;
        for &Penalty { row, tokens, places, bits } in &wanted.penalties {
            let logits = Self::value(room.penalised, row as usize * self.sizes.vocab);
            let arguments = [At(logits), At(tokens), Value(f32::from_bits(bits)), Word(places)];
            let blocks = [places.div_ceil(PENALTY_THREADS).min(PENALTY_BLOCKS), 1, 1];
            self.launch(self.functions.penalise, blocks, PENALTY_THREADS, &arguments)?;
        }
        Ok(room.penalised)
    }

    /// Chooses tokens.
    fn tokens(&self, wanted: &Wanted) -> Result<(), CudaError> {
        let (room, rows, vocab) = (self.room, wanted.positions.len() as u32, self.sizes.vocab as u32);
        if !wanted.chooses {
            return Ok(());
        }
        let logits = self.penalised(wanted)?;
        // Some logits a thread, so that a small vocabulary does not wait for threads without any.
        let threads = vocab.div_ceil(8).next_multiple_of(32).min(SAMPLE_THREADS);
        let arguments = [At(logits), At(room.tokens), At(room.faults), Word(vocab)];
        self.launch(self.functions.argmax, [rows, 1, 1], threads, &arguments)?;
        let Some(draws) = &wanted.draws else { return Ok(()) };
        let arguments = [
            At(logits),
            At(room.faults),
            At(draws.temperatures),
            At(draws.top_k),
            At(draws.top_p),
            At(draws.min_p),
            At(draws.draws),
            At(room.shares),
            At(room.tokens),
            Word(vocab),
        ];
        self.launch(self.functions.sample, [rows, 1, 1], threads, &arguments)
    }

    /// The first logits, and the tokens that are chosen by them.
    pub(super) fn first_logits(&self, among: &mut Among<'_>) -> Result<(), Failed> {
        match self.tables.wanted.first() {
            Some(wanted) => self.logits(wanted, among),
            // The model on the CPU exchanges nothing too, and others wait for it.
            None => self.gather_logits(0, among),
        }
    }

    /// Computes logits, and chooses tokens by them: tensor ranks have whole ones before they choose.
    fn logits(&self, wanted: &Wanted, among: &mut Among<'_>) -> Result<(), Failed> {
        let head = self.base.head.as_ref().expect("the last stage has the output projection");
        let (room, hidden) = (self.room, self.hidden());
        let rows = wanted.positions.len() as u32;
        self.arrange((room.x, hidden, 0), wanted.picked, (room.last, hidden, 0), hidden, rows)?;
        self.norm(room.last, self.base.norm, room.last, rows)?;
        self.pack(room.last, 0, rows, hidden, &[head.storage], room.packed)?;
        self.product(room.packed, head, (wanted.all, rows), room.logits)?;
        self.gather_logits(rows, among)?;
        let by = self.model.arch().multipliers.logits;
        if by.to_bits() != 1.0f32.to_bits() {
            self.divide(room.logits, by, rows * self.sizes.vocab as u32)?;
        }
        Ok(self.tokens(wanted)?)
    }

    fn gather_logits(&self, rows: u32, among: &mut Among<'_>) -> Result<(), Failed> {
        let (logits, exchange) = (self.room.logits, of_output(self.model.arch().layers.len()));
        self.gather_rows((logits, logits), rows, self.sizes.vocab as u32, exchange, among)
    }

    fn digest(&self, step: &mut Step<'_, '_>, x: &[u32]) {
        let x: &[f32] = bytemuck::cast_slice(x);
        for (at, x) in self.at.iter().zip(x.chunks_exact(self.sizes.hidden)) {
            step.outcome.hidden(at.row, x);
        }
    }
}
