//! The figures of a run, and the roof that they are held against.

use super::course::{Course, Step};
use super::optimum;
use crate::quantity::Size;
use lite_llm_core::ids::ExpertKey;
use serde::Serialize;
use std::fmt;

/// What was measured around a run.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Around {
    /// Bytes a second that the same threads read from memory.
    pub(crate) dram_bytes_per_s: f64,
    /// The most memory that the process had.
    pub(crate) peak_rss_bytes: u64,
    /// Bytes that every step reads, whatever it needs of experts.
    pub(crate) step_bytes: u64,
    /// Bytes of keys and values of one position.
    pub(crate) position_bytes: f64,
}

/// Where the time of a generated token goes, in milliseconds. With several rows a step's time is shared among them.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub(crate) struct Stalls {
    /// Nothing could be computed for want of experts.
    pub(crate) io_wait_ms: f64,
    /// Computing.
    pub(crate) compute_ms: f64,
    /// Neither: scheduling, journal, telling.
    pub(crate) other_ms: f64,
}

/// The figures. All of decoding are of the steps that do nothing else, with all rows.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Figures {
    pub(crate) prefill_tokens_per_s: f64,
    pub(crate) decode_tokens_per_s: f64,
    /// Weights, keys and values that were read from memory for a generated token.
    pub(crate) bytes_per_token: f64,
    pub(crate) dram_bytes_per_s: f64,
    /// Of what memory delivers, how much of it decoding read.
    pub(crate) roofline_share: f64,
    /// Of what layers needed, how much was in memory; all, where every expert is.
    pub(crate) hit_rate: f64,
    /// The same of the best possible eviction on the same trace.
    pub(crate) belady_hit_rate: f64,
    /// The same of plain recency.
    pub(crate) lru_hit_rate: f64,
    /// The same of any eviction, if every expert were as likely as any other.
    pub(crate) uniform_hit_rate: f64,
    /// Loads that were begun by foresight, for a token, and how many of them were of experts that were needed.
    pub(crate) loads_ahead_per_token: f64,
    pub(crate) foreseen_per_token: f64,
    pub(crate) disk_bytes_per_token: f64,
    /// While decoding.
    pub(crate) disk_bytes_per_s: f64,
    /// While experts were loaded at boot.
    pub(crate) boot_bytes_per_s: f64,
    pub(crate) peak_rss_bytes: u64,
    pub(crate) expert_slots: u32,
    pub(crate) experts: u64,
    pub(crate) expert_bytes: u64,
    pub(crate) per_token: Stalls,
}

impl Figures {
    pub(crate) fn of(course: &Course, around: &Around) -> Self {
        let decode: Vec<&Step> = course.decode().collect();
        let sum = |of: &dyn Fn(&Step) -> u64| decode.iter().map(|step| of(step)).sum::<u64>() as f64;
        let tokens = sum(&|step| u64::from(step.rows));
        let seconds = sum(&|step| step.wall_ns) / 1e9;
        let slot_bytes = course.carving.slot_bytes;
        let read = sum(&|step| around.step_bytes + step.experts * slot_bytes)
            + sum(&|step| step.seen) * around.position_bytes;
        let (hits, misses) = (sum(&|step| u64::from(step.hits)), sum(&|step| u64::from(step.misses)));
        let (ahead, foreseen) = (sum(&|step| u64::from(step.ahead)), sum(&|step| u64::from(step.foreseen)));
        let loaded = (misses - foreseen + ahead) * slot_bytes as f64;
        let trace: Vec<ExpertKey> = decode.iter().flat_map(|step| step.needed.iter().copied()).collect();
        let slots = course.carving.slots as usize;
        let optimum = optimum::hits(&trace, &course.inside, slots) as f64;
        let recency = optimum::hits_of_recency(&trace, &course.inside, slots) as f64;
        // Where nothing is ever asked for, everything is there.
        let rate = |hits: f64| if trace.is_empty() { 1.0 } else { hits / trace.len() as f64 };
        let (prefilled, prefill_ns) = course
            .prefill()
            .fold((0.0, 0.0), |(n, ns), step| (n + f64::from(step.positions), ns + step.wall_ns as f64));
        let ms = |ns: f64| per(ns / 1e6, tokens);
        let (took, waited) = (sum(&|step| step.took_ns), sum(&|step| step.waited_ns));
        Self {
            prefill_tokens_per_s: per(prefilled, prefill_ns / 1e9),
            decode_tokens_per_s: per(tokens, seconds),
            bytes_per_token: per(read, tokens),
            dram_bytes_per_s: around.dram_bytes_per_s,
            roofline_share: per(per(read, seconds), around.dram_bytes_per_s),
            hit_rate: if hits + misses > 0.0 { hits / (hits + misses) } else { 1.0 },
            belady_hit_rate: rate(optimum),
            lru_hit_rate: rate(recency),
            uniform_hit_rate: per(slots as f64, course.experts as f64).min(1.0),
            loads_ahead_per_token: per(ahead, tokens),
            foreseen_per_token: per(foreseen, tokens),
            disk_bytes_per_token: per(loaded, tokens),
            disk_bytes_per_s: per(loaded, seconds),
            boot_bytes_per_s: per(course.boot_bytes as f64, course.boot_ns as f64 / 1e9),
            peak_rss_bytes: around.peak_rss_bytes,
            expert_slots: course.carving.slots,
            experts: course.experts,
            expert_bytes: slot_bytes,
            per_token: Stalls {
                io_wait_ms: ms(waited),
                compute_ms: ms(took - waited),
                other_ms: ms(sum(&|step| step.wall_ns) - took),
            },
        }
    }
}

/// The quotient; nothing of nothing is nothing.
fn per(amount: f64, of: f64) -> f64 {
    if of > 0.0 { amount / of } else { 0.0 }
}

impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let gb = |bytes: f64| format!("{:.2} GB/s", bytes / 1e9);
        let size = |bytes: f64| Size(bytes as u64);
        let Stalls { io_wait_ms, compute_ms, other_ms } = self.per_token;
        writeln!(f, "prefill   {:.1} tokens/s", self.prefill_tokens_per_s)?;
        writeln!(f, "decode    {:.2} tokens/s", self.decode_tokens_per_s)?;
        writeln!(
            f,
            "token     {:.2} ms computing, {:.2} ms waiting for experts, {:.2} ms else",
            compute_ms, io_wait_ms, other_ms
        )?;
        writeln!(
            f,
            "memory    {} read for a token: {:.0} % of the {} that plain reading has",
            size(self.bytes_per_token),
            self.roofline_share * 100.0,
            gb(self.dram_bytes_per_s),
        )?;
        writeln!(
            f,
            "experts   {} of {} in memory, {} each",
            self.expert_slots.min(u32::try_from(self.experts).unwrap_or(u32::MAX)),
            self.experts,
            Size(self.expert_bytes)
        )?;
        writeln!(
            f,
            "hits      {:.1} %; the best eviction {:.1} %, recency {:.1} %, any if all were alike {:.1} %",
            self.hit_rate * 100.0,
            self.belady_hit_rate * 100.0,
            self.lru_hit_rate * 100.0,
            self.uniform_hit_rate * 100.0
        )?;
        if self.loads_ahead_per_token > 0.0 {
            writeln!(
                f,
                "foresight {:.1} loads begun ahead for a token, {:.1} of them needed",
                self.loads_ahead_per_token, self.foreseen_per_token
            )?;
        }
        writeln!(
            f,
            "disk      {} a token, {} while decoding, {} at boot",
            size(self.disk_bytes_per_token),
            gb(self.disk_bytes_per_s),
            gb(self.boot_bytes_per_s)
        )?;
        write!(f, "peak      {} of memory", Size(self.peak_rss_bytes))
    }
}
