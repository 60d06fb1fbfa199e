//! A cluster of real processes that is asked and steered while it streams: it tells how it stands, and whatever is wished of it,
//! or dies meanwhile, its stream is that of one process.

use lite_llm_tests::command::{Place, Ran, failures, parse_stream, signal, tokens, wait_until};
use serde_json::{Value, json};
use std::fs::File;
use std::process::{Child, Command, Stdio};

/// More tokens than anybody waits for: a stream is unfinished until it is cancelled.
const ENDLESS: &str = "60000";
const PROMPT: [&str; 2] = ["--prompt-tokens", "7,99,20,31,4,200"];
const SAMPLING: [&str; 4] = ["--temperature", "1", "--seed", "5"];

/// A place with a model of two tiers.
fn place() -> Place {
    let place = Place::new();
    let synth = ["synth", "m", "--family", "olmoe", "--tiers", "small:8,large:8:cold", "--context", "65536"];
    let made = place.run(synth);
    assert_eq!(made.code, Some(0), "{}", made.stderr);
    place
}

/// A cluster that computes an endless stream. Dropped, it is ended with all its nodes.
struct Cluster<'a> {
    place: &'a Place,
    child: Child,
}

impl<'a> Cluster<'a> {
    fn start(place: &'a Place, arguments: &[&str]) -> Self {
        let mut command = Self::command(place, arguments);
        let file = |name: &str| Stdio::from(File::create(place.path(name)).expect("a file"));
        // Nobody has to read along.
        command.stdout(file("out")).stderr(file("err"));
        Self { place, child: command.spawn().expect("a command") }
    }

    fn command(place: &Place, arguments: &[&str]) -> Command {
        let run = ["--", "run", "m", "--max-tokens", ENDLESS, "--ignore-eos", "--stream", "--json"];
        let more = ["--state", "state", "--request-id", "long"];
        let supervise = ["supervise"].iter().chain(arguments);
        place.command(supervise.chain(&run).chain(&PROMPT).chain(&SAMPLING).chain(&more))
    }

    fn ctl(&self, what: &[&str]) -> Ran {
        self.place.run(["ctl", "state", "--json"].iter().chain(what))
    }

    fn status(&self) -> Value {
        self.ctl(&["status"]).json()
    }

    /// The standing of a node.
    fn node(&self, node: usize) -> Value {
        self.status()["nodes"][node].clone()
    }

    /// Tokens that were told.
    fn told(&self) -> usize {
        let out = std::fs::read_to_string(self.place.path("out")).expect("a file");
        out.lines().count()
    }

    /// Waits until so many tokens were told.
    fn wait_for(&mut self, told: usize) {
        let out = self.place.path("out");
        let lines = || std::fs::read_to_string(&out).expect("a file").lines().count();
        wait_until(&mut self.child, || lines() >= told);
    }

    /// Waits until the status is such.
    fn wait_until(&mut self, such: impl Fn(&Value) -> bool) -> Value {
        loop {
            let status = self.status();
            if such(&status) {
                return status;
            }
            assert!(self.child.try_wait().expect("a child").is_none(), "{status:#}\n{}", self.stderr());
        }
    }

    fn stderr(&self) -> String {
        std::fs::read_to_string(self.place.path("err")).expect("a file")
    }

    /// Waits until it has ended, and says what it said.
    fn ended(mut self) -> Ran {
        let code = self.child.wait().expect("a child").code();
        let stdout = std::fs::read_to_string(self.place.path("out")).expect("a file");
        Ran { code, stdout, stderr: self.stderr() }
    }

    /// Ends the stream, and with it the cluster; what was told of it.
    fn cancelled(self) -> Vec<u64> {
        let cancelled = self.ctl(&["cancel", "long"]);
        assert_eq!(cancelled.json(), json!({ "cancelled": "long" }));
        let ran = self.ended();
        ran.refuses(1, &["long ended early: cancelled"]);
        tokens(&ran)
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        // A test that has failed leaves nobody behind: nodes without a supervisor would wait for it.
        for node in self.ctl_quietly() {
            let _ = lite_llm_tests::command::try_signal(node, "KILL");
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Cluster<'_> {
    /// The processes of all nodes, if the cluster answers.
    fn ctl_quietly(&self) -> Vec<u32> {
        let status: Value = serde_json::from_str(&self.ctl(&["status"]).stdout).unwrap_or_default();
        let nodes = status["nodes"].as_array().cloned().unwrap_or_default();
        nodes.iter().filter_map(|node| u32::try_from(node["pid"].as_u64()?).ok()).collect()
    }
}

/// What one process makes of the request, so many tokens of it, its positions computed under these tiers.
fn alone(place: &Place, tokens: usize, generations: &Value) -> Vec<u64> {
    let (count, generations) = (tokens.to_string(), generations.to_string());
    let run = ["run", "m", "--max-tokens", &count, "--ignore-eos", "--json", "--generations", &generations];
    let ran = place.run(run.iter().chain(&PROMPT).chain(&SAMPLING)).json();
    ran["tokens"].as_array().expect("tokens").iter().filter_map(Value::as_u64).collect()
}

fn all_tiers() -> Value {
    json!([{ "from": 0, "tiers": ["small", "large"] }])
}

fn serves(status: &Value) -> bool {
    let replicas = status["replicas"].as_array().expect("replicas");
    replicas.iter().all(|replica| replica["standing"] == "active" && replica["lifecycle"] == "Active")
}

#[test]
fn a_cluster_says_how_it_stands_and_refuses_with_the_remedy() {
    let place = place();
    let mut cluster = Cluster::start(&place, &["--nodes", "3", "--topology", "tp=2"]);
    cluster.wait_for(5);
    // What nodes say of themselves is a beat old.
    let heard = |status: &Value| {
        let nodes = status["nodes"].as_array().expect("nodes");
        let far = |node: &Value| node["rank"].is_null() || node["log_end"].as_u64() > Some(5);
        serves(status) && nodes.iter().all(|node| node["life"] == "up" && far(node))
    };
    let status =
        cluster.wait_until(|status| heard(status) && status["replicas"][0]["committed"].as_u64() > Some(5));
    assert_eq!(status["topology"], "dp=1,tp=2,pp=1,ep=1");
    let replica = &status["replicas"][0];
    let members = replica["nodes"].as_array().expect("members");
    assert_eq!((members.len(), &replica["tiers"]), (2, &json!(["small", "large"])));
    assert!(members.contains(&replica["leader"]));
    let nodes = status["nodes"].as_array().expect("nodes");
    assert_eq!(nodes.len(), 3);
    for node in nodes {
        let lived = (&node["incarnation"], &node["restarts"], &node["failure"]);
        assert_eq!(lived, (&json!(1), &json!(0), &Value::Null));
        let seat = members.iter().position(|member| *member == node["node"]);
        assert_eq!(node["rank"], json!(seat), "{node}");
        assert!(std::path::Path::new(&format!("/proc/{}", node["pid"])).exists(), "{node}");
    }
    let request = &status["requests"][0];
    assert_eq!(
        (&request["id"], &request["replica"], &request["prompt"]),
        (&json!("long"), &json!(0), &json!(6))
    );
    assert!(request["told"].as_u64() >= Some(5) && request["generated"].as_u64() >= Some(5), "{request}");
    // The same for people: a line for each node.
    let text = place.run(["ctl", "state", "status"]).stdout;
    assert!(
        text.contains("  node 2, incarnation 1, life up") && text.contains("\n  id long, replica 0"),
        "{text}"
    );

    let snapshot = cluster.ctl(&["snapshot"]).json();
    assert!(snapshot["snapshot_before"].as_u64() > Some(5));
    for member in members {
        let files = std::fs::read_dir(place.path(&format!("state/node-{member}"))).expect("a directory");
        let names = files.map(|file| file.expect("a file").file_name().to_string_lossy().into_owned());
        assert!(names.collect::<Vec<_>>().iter().any(|name| name.starts_with("snapshot-")), "node {member}");
    }
    let mode = std::os::unix::fs::PermissionsExt::mode(
        &std::fs::metadata(place.path("state")).expect("a directory").permissions(),
    );
    assert_eq!(mode & 0o777, 0o700, "nobody else may ask");

    cluster.ctl(&["tierset", "nope"]).refuses(1, &["unknown tier \"nope\""]);
    cluster.ctl(&["mode", "nope"]).refuses(1, &["unknown mode \"nope\""]);
    cluster.ctl(&["tierset", "small", "--at", "long:1"]).refuses(1, &["pin the switch to a later one"]);
    cluster.ctl(&["cancel", "nobody"]).refuses(1, &["no such request"]);
    cluster.ctl(&["cancel", "no body"]).refuses(1, &["visible ASCII"]);
    cluster.ctl(&["restart", "3"]).refuses(1, &["node 3 is none of this cluster's", "0 to 2"]);
    cluster.ctl(&["restart", "first"]).refuses(2, &["invalid value 'first'"]);
    let one = place.run(["ctl", "state/node-0", "status"]);
    one.refuses(1, &["directory of one node", "ask its cluster"]);
    let told = cluster.cancelled();
    assert_eq!(told, alone(&place, told.len(), &all_tiers()));
    assert!(!place.path("state/control.sock").exists());
    place.run(["ctl", "state", "status"]).refuses(1, &["no running process"]);
}

/// Asks for other tiers from a position on that is still to come, and kills whoever leads. Which position it became.
fn switch_and_kill(cluster: &mut Cluster<'_>) -> u64 {
    let mut margin = 100;
    loop {
        let status = cluster.wait_until(serves);
        let leader = status["replicas"][0]["leader"].as_u64().expect("a node");
        let leader = &status["nodes"][usize::try_from(leader).expect("few")];
        let computed = status["requests"][0]["computed"].as_u64().expect("it is being computed");
        let (position, pid) = (computed + margin, leader["pid"].as_u64().expect("a process"));
        let at = format!("long:{position}");
        let asked = ["ctl", "state", "--json", "tierset", "small", "--at", &at];
        let asked = cluster.place.command(asked).spawn().expect("a command");
        signal(u32::try_from(pid).expect("a process"), "KILL");
        let ran: Ran = asked.wait_with_output().expect("a command").into();
        if ran.code == Some(0) {
            assert_eq!(ran.json(), json!({ "generation": 1 }));
            return position;
        }
        // The machine was faster than the question.
        ran.refuses(1, &["pin the switch to a later one"]);
        margin *= 4;
    }
}

#[test]
fn a_switch_takes_effect_where_it_is_pinned_whoever_dies() {
    let place = place();
    let mut cluster = Cluster::start(&place, &["--nodes", "2", "--topology", "tp=2"]);
    cluster.wait_for(5);
    let position = switch_and_kill(&mut cluster);
    let status = cluster.wait_until(serves);
    assert_eq!(
        (&status["replicas"][0]["generation"], &status["replicas"][0]["tiers"]),
        (&json!(1), &json!(["small"]))
    );
    cluster.wait_for(usize::try_from(position).expect("few") + 40);
    let told = cluster.cancelled();
    let switched =
        json!([{ "from": 0, "tiers": ["small", "large"] }, { "from": position, "tiers": ["small"] }]);
    assert_eq!(told, alone(&place, told.len(), &switched));
    assert_ne!(told, alone(&place, told.len(), &all_tiers()), "tiers matter");
    let failures = failures(&place, 2);
    assert!(failures.iter().any(|of| of["failure"]["cause"]["Ended"]["Signal"] == 9), "{failures:?}");
}

#[test]
fn every_replica_does_what_is_wished() {
    let place = place();
    let mut cluster = Cluster::start(&place, &["--nodes", "2", "--topology", "dp=2"]);
    cluster.wait_for(5);
    cluster.wait_until(serves);
    assert_eq!(cluster.ctl(&["tierset", "small"]).json(), json!({ "generation": [1, 1] }));
    assert_eq!(cluster.ctl(&["mode", "max"]).json(), json!({ "generation": [2, 2] }));
    let status = cluster.status();
    let of_each = |key: &str| [0, 1].map(|replica: usize| status["replicas"][replica][key].clone());
    assert_eq!(of_each("tiers"), [json!(["small", "large"]), json!(["small", "large"])]);
    assert_eq!(of_each("generation"), [json!(2), json!(2)]);
    // The position is one of its request; the replica that has not got it follows.
    let computed = status["requests"][0]["computed"].as_u64().expect("it is being computed");
    let at = format!("long:{}", computed + 20_000);
    let mut waits =
        place.command(["ctl", "state", "tierset", "small", "--at", &at]).spawn().expect("a command");
    let budget = cluster.ctl(&["budget", "1us"]).json();
    assert!(budget["generation"].as_array().is_some_and(|each| each.len() == 2), "{budget}");
    assert!(waits.try_wait().expect("a command").is_none(), "its position is to come");
    waits.kill().expect("it waits");
    drop(waits.wait());
    let snapshot = cluster.ctl(&["snapshot"]).json();
    assert!(snapshot["snapshot_before"].as_array().is_some_and(|each| each.len() == 2), "{snapshot}");
    cluster.cancelled();
}

#[test]
fn a_node_that_is_restarted_costs_no_bit_and_nothing_of_its_budget() {
    let place = place();
    let arguments = ["--max-restarts", "0", "--nodes", "2", "--topology", "pp=2"];
    let mut cluster = Cluster::start(&place, &arguments);
    cluster.wait_for(5);
    for (node, incarnation) in [("0", 2), ("1", 2), ("0", 3)] {
        let pid = cluster.node(node.parse().expect("a number"))["pid"].clone();
        let restarted = cluster.ctl(&["restart", node]).json();
        assert_eq!(
            restarted,
            json!({ "node": node.parse::<u32>().expect("a number"), "incarnation": incarnation })
        );
        cluster.wait_until(serves);
        let now = cluster.node(node.parse().expect("a number"));
        assert_eq!((&now["incarnation"], &now["restarts"]), (&json!(incarnation), &json!(0)));
        assert_eq!(now["failure"]["cause"], "was ended by the operator");
        assert_ne!(now["pid"], pid, "it is another process");
        let told = cluster.told();
        cluster.wait_for(told + 10);
    }
    let causes: Vec<Value> = failures(&place, 2).iter().map(|of| of["failure"]["cause"].clone()).collect();
    assert_eq!(causes, [json!("Operator"), json!("Operator"), json!("Operator")]);
    // A life that nobody wished to end exhausts the budget; the operator has it begin again.
    let pid = cluster.node(1)["pid"].as_u64().expect("a process");
    signal(u32::try_from(pid).expect("a process"), "KILL");
    let status = cluster.wait_until(|status| status["nodes"][1]["life"] == "given up");
    let reason = status["nodes"][1]["given_up"].as_str().expect("a reason").to_owned();
    assert!(reason.contains("restarts.most") && reason.contains("restart the node"), "{reason}");
    assert_eq!(status["nodes"][1]["failure"]["cause"], "was ended by signal 9");
    assert_eq!(
        (&status["replicas"][0]["standing"], &status["replicas"][0]["waits_for"]),
        (&json!("waiting"), &json!("nodes that beat"))
    );
    assert_eq!(cluster.ctl(&["restart", "1"]).json(), json!({ "node": 1, "incarnation": 3 }));
    cluster.wait_until(serves);
    let told = cluster.told();
    cluster.wait_for(told + 10);
    let told = cluster.cancelled();
    assert_eq!(told, alone(&place, told.len(), &all_tiers()));
}

#[test]
fn what_a_drain_leaves_goes_on_in_the_next_run() {
    let place = place();
    let arguments = ["--nodes", "2", "--topology", "ep=2"];
    let mut cluster = Cluster::start(&place, &arguments);
    cluster.wait_for(20);
    assert_eq!(cluster.ctl(&["restart", "0"]).json(), json!({ "node": 0, "incarnation": 2 }));
    cluster.wait_until(serves);
    assert_eq!(cluster.ctl(&["drain", "--bound", "0s"]).json(), json!({ "draining": true }));
    let ran = cluster.ended();
    ran.refuses(1, &["broken off; the same command", "drained with unfinished requests"]);
    let (before, result) = parse_stream(&ran.stdout);
    assert!(result.is_none() && before.len() >= 20);
    let mut cluster = Cluster::start(&place, &arguments);
    cluster.wait_for(before.len() + 20);
    // What is known of a node outlives the process that knew it.
    let node = cluster.node(0);
    assert_eq!(
        (&node["failure"]["cause"], &node["failure"]["incarnation"]),
        (&json!("was ended by the operator"), &json!(1))
    );
    let told = cluster.cancelled();
    assert!(before.iter().map(|(_, token)| token).eq(&told[..before.len()]), "nothing told is changed");
    assert_eq!(told, alone(&place, told.len(), &all_tiers()));
}

#[test]
fn whoever_is_refused_touches_nothing_of_the_cluster() {
    let place = place();
    let mut cluster = Cluster::start(&place, &["--nodes", "2", "--topology", "tp=2"]);
    cluster.wait_for(5);
    let settings = || std::fs::read_to_string(place.path("state/nodes.json")).expect("settings");
    let (nodes, before) = (cluster.ctl_quietly(), settings());
    assert_eq!(nodes.len(), 2);
    let other = [
        "supervise",
        "--nodes",
        "2",
        "--topology",
        "tp=2",
        "--",
        "run",
        "m",
        "--state",
        "state",
        "--kv-type",
        "bf16",
    ];
    place.run(other.iter().chain(&PROMPT)).refuses(1, &["state is in use by another process"]);
    assert_eq!((cluster.ctl_quietly(), settings()), (nodes, before));
    for supervise in [&[][..], &["supervise", "--"]] {
        let one = ["run", "m", "--max-tokens", "1", "--state", "state/node-0"];
        place
            .run(supervise.iter().chain(&one).chain(&PROMPT))
            .refuses(1, &["state/node-0 is the directory of one node", "supervise --nodes"]);
    }
    assert!(!cluster.cancelled().is_empty());
}
