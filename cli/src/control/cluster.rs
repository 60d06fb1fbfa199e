//! A cluster that is asked: each replica does what is wished, once, whoever of it dies meanwhile.

use super::{Ask, Client, Controlled, pinned, request_id};
use crate::cause;
use anyhow::bail;
use lite_llm_core::cluster::membership::NodeId;
use lite_llm_core::cluster::orders::Activity;
use lite_llm_core::cluster::supervisor::{Failure, ReplicaStanding, Standing};
use lite_llm_core::ids::RequestId;
use lite_llm_core::input::{SwitchTarget, Wish};
use lite_llm_core::output::Granted;
use lite_llm_hw::cluster::ClusterStatus;
use lite_llm_hw::cluster::head::{Answer, HeadHandle, NodeStatus, ReplicaStatus};
use lite_llm_hw::node::Status;
use serde_json::{Value, json};
use std::collections::BTreeMap;
use std::time::Duration;

impl Controlled for HeadHandle {
    fn obey(&self, ask: Ask, client: &Client<'_>) -> anyhow::Result<Value> {
        Ok(match ask {
            Ask::Status => {
                let answer = self.status();
                status(&client.wait(|period| answer.recv_timeout(period))?)
            }
            Ask::Tierset { tiers, at } => switch(self, &SwitchTarget::Tiers(tiers), pinned(at)?, client)?,
            Ask::Mode { mode, at } => switch(self, &SwitchTarget::Mode(mode), pinned(at)?, client)?,
            Ask::Budget { ns, at } => switch(self, &SwitchTarget::Budget(ns), pinned(at)?, client)?,
            Ask::Drain { bound_ms } => {
                self.drain(bound_ms.map(Duration::from_millis));
                json!({ "draining": true })
            }
            Ask::Cancel { id } => {
                let request = request_id(&id)?;
                let replica = self.replica_of(&request);
                of_all(vec![(replica, self.wish(replica, Wish::Cancel { id: request }))], client)?;
                json!({ "cancelled": id })
            }
            Ask::Snapshot => {
                let answers =
                    (0..self.replicas()).map(|replica| (replica, self.wish(replica, Wish::Snapshot)));
                let granted = of_all(answers.collect(), client)?;
                json!({ "snapshot_before": number_of_each(&granted) })
            }
            Ask::Restart { node } => {
                let _place = client.place()?;
                let answer = self.restart(NodeId(node));
                let incarnation = client.wait(|period| answer.recv_timeout(period))?;
                json!({ "node": node, "incarnation": incarnation.0 })
            }
        })
    }
}

/// Switches all replicas. A position is one of a request, and so of its replica: the others follow once it is done there.
fn switch(
    head: &HeadHandle,
    target: &SwitchTarget,
    at: Option<(RequestId, u32)>,
    client: &Client<'_>,
) -> anyhow::Result<Value> {
    let wish = |replica, at| {
        let wish = Wish::Switch { target: target.clone(), at };
        (replica, head.wish(replica, wish))
    };
    let first = at.as_ref().map(|(id, _)| head.replica_of(id));
    let mut granted = match first {
        Some(replica) => of_all(vec![wish(replica, at)], client)?,
        None => BTreeMap::new(),
    };
    let others = (0..head.replicas()).filter(|replica| Some(*replica) != first);
    granted.extend(of_all(others.map(|replica| wish(replica, None)).collect(), client)?);
    Ok(json!({ "generation": number_of_each(&granted) }))
}

/// Waits for what each replica answers. If one refuses, the others have done it all the same.
fn of_all(
    answers: Vec<(u32, Answer<Granted>)>,
    client: &Client<'_>,
) -> anyhow::Result<BTreeMap<u32, Granted>> {
    let _place = client.place()?;
    let several = answers.len() > 1;
    let (mut granted, mut refused) = (BTreeMap::new(), Vec::new());
    for (replica, answer) in answers {
        match client.wait(|period| answer.recv_timeout(period)) {
            Ok(done) => drop(granted.insert(replica, done)),
            Err(reason) if several => refused.push(format!("replica {replica}: {reason:#}")),
            Err(reason) => return Err(reason),
        }
    }
    if !refused.is_empty() {
        let done: Vec<String> = granted.keys().map(ToString::to_string).collect();
        let done = if done.is_empty() { "none".into() } else { done.join(", ") };
        bail!("{}; done by replicas: {done}", refused.join("; "));
    }
    Ok(granted)
}

/// The number that a replica answered; of several replicas a list, in their order.
fn number_of_each(granted: &BTreeMap<u32, Granted>) -> Value {
    let number = |granted: &Granted| match granted {
        Granted::Switched(generation) => json!(generation.0),
        Granted::Snapshot(next) => json!(next.0),
        Granted::Cancelled => Value::Null,
    };
    let mut numbers: Vec<Value> = granted.values().map(number).collect();
    if numbers.len() == 1 { numbers.remove(0) } else { numbers.into() }
}

fn status(status: &ClusterStatus) -> Value {
    let replicas: Vec<Value> = (0..).zip(&status.replicas).map(|(number, it)| replica(number, it)).collect();
    json!({
        "topology": status.config.topology.to_string(),
        "incarnation": status.incarnation.0,
        "draining": status.draining,
        "replicas": replicas,
        "nodes": status.nodes.iter().map(node).collect::<Vec<Value>>(),
        "restarts_max": status.config.restarts.most,
        "requests": requests(status),
    })
}

fn replica(number: u32, replica: &ReplicaStatus) -> Value {
    let ReplicaStatus { membership, standing, committed, leader } = replica;
    let nodes: Option<Vec<u32>> =
        membership.as_ref().map(|membership| membership.members.iter().map(|m| m.node.0).collect());
    let (standing, waits_for) = match standing {
        ReplicaStanding::Active => ("active", None),
        ReplicaStanding::Joining => ("joining", Some("the logs of its members to be one".into())),
        ReplicaStanding::WaitsForNodes => ("waiting", Some("nodes that beat".into())),
        ReplicaStanding::WaitsForDisks(nodes) => {
            let nodes: Vec<String> = nodes.iter().map(|node| node.0.to_string()).collect();
            ("waiting", Some(format!("the disk of one of nodes {}", nodes.join(", "))))
        }
        ReplicaStanding::WaitsForLease => ("waiting", Some("leases that may still be held".into())),
        ReplicaStanding::Drained => ("drained", None),
        ReplicaStanding::Hopeless(reason) => ("given up", Some(reason.clone())),
    };
    let generation = leader.as_ref().and_then(|leader| leader.generation.as_ref());
    json!({
        "replica": number,
        "standing": standing,
        "waits_for": waits_for,
        "epoch": membership.as_ref().map(|membership| membership.epoch.0),
        "nodes": nodes,
        "leader": membership.as_ref().map(|membership| membership.leading().node.0),
        "committed": committed.0,
        "lifecycle": leader.as_ref().map(|leader| format!("{:?}", leader.lifecycle)),
        "record": leader.as_ref().map(|leader| leader.seq.0),
        "generation": generation.map(|(generation, _)| generation.0),
        "tiers": generation.map(|(_, tiers)| tiers),
    })
}

fn node(node: &NodeStatus) -> Value {
    let life = match node.standing {
        Standing::Down => "down",
        Standing::Starting => "starting",
        Standing::Up => "up",
        Standing::Fencing => "fencing",
        Standing::Capturing => "capturing",
        Standing::GivenUp => "given up",
        Standing::Stopped => "stopped",
    };
    let activity = node.beat.map(|(activity, _)| match activity {
        Activity::Idle => "idle",
        Activity::Loading => "loading",
        Activity::Joining => "joining",
        Activity::Serving => "serving",
        Activity::Draining => "draining",
    });
    json!({
        "node": node.member.node.0,
        "incarnation": node.member.incarnation.0,
        "life": life,
        "activity": activity,
        "pid": node.pid,
        "agent": node.agent.map(|agent| agent.to_string()),
        "replica": node.replica,
        "rank": node.rank,
        "log_end": node.beat.map(|(_, log)| log.last.0),
        "restarts": node.restarts,
        "failure": node.failure.as_ref().map(failure),
        "given_up": node.given_up,
    })
}

fn failure(failure: &Failure) -> Value {
    json!({
        "incarnation": failure.member.incarnation.0,
        "cause": cause::in_words(&failure.cause),
        "epoch": failure.epoch.0,
        "log_end": failure.log.last.0,
        "at_ns": failure.at.0,
    })
}

/// What the leaders compute, and what clients of this process wait for.
fn requests(status: &ClusterStatus) -> Vec<Value> {
    let told = |id: &RequestId| status.told.get(id).map(|(_, told)| *told);
    let leaders =
        (0u32..).zip(&status.replicas).filter_map(|(replica, it)| Some((replica, it.leader.as_ref()?)));
    let computed = leaders.flat_map(|(replica, Status { requests, .. })| {
        requests.iter().map(move |request| (replica, request))
    });
    let mut all: BTreeMap<&RequestId, Value> = BTreeMap::new();
    for (id, (replica, told)) in &status.told {
        all.insert(id, json!({ "id": id.as_str(), "replica": replica, "told": told }));
    }
    for (replica, request) in computed {
        let known = json!({
            "id": request.id.as_str(),
            "replica": replica,
            "told": told(&request.id),
            "prompt": request.prompt,
            "generated": request.generated,
            "computed": request.computed,
        });
        all.insert(&request.id, known);
    }
    all.into_values().collect()
}
