//! What a node tells of itself.

use std::collections::BTreeMap;

use lite_llm_core::engine::Engine;
use lite_llm_core::ids::{Generation, RequestId, Seq};
use lite_llm_core::view::Segment;

use super::{ExitReport, GenerationSpan, RequestStatus, Status};
use crate::memory;

fn last(engine: &Engine) -> Seq {
    Seq(engine.next_seq().0 - 1)
}

pub(super) fn exit(engine: &Engine) -> ExitReport {
    let view = engine.view();
    ExitReport {
        seq: last(engine),
        incarnation: view.incarnation(),
        unfinished: view.requests().count() as u32,
        digest: engine.digest(),
        state_digest: engine.state_digest(),
    }
}

pub(crate) fn status(engine: &Engine, durable: Seq, telemetry_dropped: u64) -> Status {
    let view = engine.view();
    let current = view.generation();
    let requests = view.requests().map(|request| RequestStatus {
        id: request.id.clone(),
        number: request.number,
        prompt: request.body.prompt.len() as u32,
        generated: request.tokens.len() as u32,
        computed: request.computed,
    });
    Status {
        lifecycle: view.lifecycle(),
        incarnation: view.incarnation(),
        seq: last(engine),
        durable,
        digest: engine.digest(),
        generation: current.and_then(|current| {
            view.generations().into_iter().find(|(generation, _)| *generation == current)
        }),
        routing_seed: view.routing_seed(),
        requests: requests.collect(),
        memory_bytes: view.config().memory_bytes,
        resident_bytes: memory::resident_bytes(),
        carving: view.carving(),
        slots_ready: view.slots().filter(|slot| slot.ready).count() as u32,
        warm_slots_ready: view.warm_slots().filter(|slot| slot.ready).count() as u32,
        pages_free: view.pages_free() as u32,
        stepping: view.step().is_some(),
        telemetry_dropped,
    }
}

pub(super) fn generations(engine: &Engine, id: &RequestId) -> Option<Vec<GenerationSpan>> {
    let view = engine.view();
    let names: BTreeMap<Generation, Vec<String>> = view.generations().into_iter().collect();
    let span = |segment: &Segment| GenerationSpan {
        until: segment.until,
        generation: segment.generation,
        tiers: names.get(&segment.generation).cloned().unwrap_or_default(),
    };
    view.stream(id).map(|stream| stream.segments.iter().map(span).collect())
}
