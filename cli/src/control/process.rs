//! One process that is asked.

use super::{Ask, Client, Controlled, pinned, request_id};
use anyhow::bail;
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::SwitchTarget;
use lite_llm_hw::node::NodeHandle;
use serde_json::{Value, json};
use std::time::Duration;

impl Controlled for NodeHandle {
    fn obey(&self, ask: Ask, client: &Client<'_>) -> anyhow::Result<Value> {
        Ok(match ask {
            Ask::Status => status(self)?,
            Ask::Tierset { tiers, at } => switch(self, SwitchTarget::Tiers(tiers), pinned(at)?, client)?,
            Ask::Mode { mode, at } => switch(self, SwitchTarget::Mode(mode), pinned(at)?, client)?,
            Ask::Budget { ns, at } => switch(self, SwitchTarget::Budget(ns), pinned(at)?, client)?,
            Ask::Drain { bound_ms } => {
                self.drain(bound_ms.map(Duration::from_millis))?;
                json!({ "draining": true })
            }
            Ask::Cancel { id } => {
                self.cancel(request_id(&id)?)?;
                json!({ "cancelled": id })
            }
            Ask::Snapshot => json!({ "snapshot_before": self.snapshot()?.0 }),
            Ask::Restart { .. } => bail!(
                "this is one process, not a cluster, and has no nodes to restart; drain it and run the same command again"
            ),
        })
    }
}

fn switch(
    node: &NodeHandle,
    target: SwitchTarget,
    at: Option<(RequestId, u32)>,
    client: &Client<'_>,
) -> anyhow::Result<Value> {
    // A position may never come.
    let _place = at.is_some().then(|| client.place()).transpose()?;
    let outcome = node.switch(target, at);
    let generation = client.wait(|period| outcome.recv_timeout(period))?;
    Ok(json!({ "generation": generation.0 }))
}

fn status(node: &NodeHandle) -> anyhow::Result<Value> {
    let status = node.status()?;
    let requests: Vec<Value> = status
        .requests
        .iter()
        .map(|r| {
            json!({
                "id": r.id.as_str(),
                "prompt": r.prompt,
                "generated": r.generated,
                "computed": r.computed,
            })
        })
        .collect();
    Ok(json!({
        "lifecycle": format!("{:?}", status.lifecycle),
        "incarnation": status.incarnation.0,
        "record": status.seq.0,
        "durable": status.durable.0,
        "digest": status.digest.to_string(),
        "generation": status.generation.as_ref().map(|(generation, _)| generation.0),
        "tiers": status.generation.as_ref().map(|(_, tiers)| tiers),
        "routing_seed": status.routing_seed,
        "requests": requests,
        "memory_bytes": status.memory_bytes,
        "resident_bytes": status.resident_bytes,
        "reading": node.reading(),
        "slots": status.carving.slots,
        "slots_ready": status.slots_ready,
        "warm_slots": status.carving.warm_slots,
        "warm_slots_ready": status.warm_slots_ready,
        "pages": status.carving.pages,
        "pages_free": status.pages_free,
        "telemetry_dropped": status.telemetry_dropped,
    }))
}
