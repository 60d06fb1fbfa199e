//! A model spread over real processes, which are killed, halted and left without their supervisor: the stream is that of one
//! process, every end is recorded, and the journals agree with each other and with a recomputation on one machine.

use lite_llm_core::cluster::membership::{Member, NodeId};
use lite_llm_core::event::Event;
use lite_llm_core::ids::{Incarnation, Seq};
use lite_llm_core::input::Input;
use lite_llm_core::journal::{Record, Store, scan};
use lite_llm_core::output::Output;
use lite_llm_core::replay::{encode_input, fold};
use lite_llm_core::topology::Topology;
use lite_llm_hw::disk::FileDisk;
use lite_llm_sim::cluster::check::{all, first_bytes};
use lite_llm_sim::cluster::watch::Fact;
use lite_llm_tests::command::{self, Place, Ran, failures, tokens, try_signal};
use lite_llm_tests::harness::folder;
use serde_json::Value;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

const RUN: [&str; 8] = [
    "--prompt-tokens",
    "265,338,449,471,56,294",
    "--max-tokens",
    "300",
    "--ignore-eos",
    "--stream",
    "--json",
    "--temperature",
];
const SAMPLING: [&str; 3] = ["1", "--seed", "5"];

/// `supervise --nodes N --topology T -- run olmoe ... --state state`, with the same request in every life.
fn command(place: &Place, nodes: u32, topology: &str) -> Command {
    let model = folder("olmoe");
    let nodes = nodes.to_string();
    let mut arguments =
        vec!["supervise", "--max-restarts", "100", "--nodes", &nodes, "--topology", topology, "--", "run"];
    arguments.push(model.to_str().expect("a path in UTF-8"));
    arguments.extend(RUN.iter().chain(&SAMPLING));
    arguments.extend(["--state", "state", "--request-id", "one"]);
    place.command(arguments)
}

/// What one process makes of the request.
fn alone(place: &Place) -> Vec<u64> {
    let model = folder("olmoe");
    let arguments = ["run", model.to_str().expect("a path in UTF-8")];
    let ran = place.run(arguments.iter().chain(&RUN).chain(&SAMPLING));
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    tokens(&ran)
}

/// The process of a node, as it says itself.
fn pid(state: &Path, node: u32) -> Option<u32> {
    let text = std::fs::read_to_string(state.join(format!("node-{node}/alive"))).ok()?;
    text.split_whitespace().next()?.parse().ok()
}

/// Records that a node has, not counting what waits to be written.
fn records(state: &Path, node: u32) -> Vec<Record> {
    let disk = FileDisk::open_read_only(state.join(format!("node-{node}")));
    disk.ok().and_then(|mut disk| scan(&mut disk).ok()).map_or_else(Vec::new, |scanned| scanned.records)
}

/// The length of the longest log. A node that has lost its seat keeps the log that it had.
fn furthest(state: &Path, nodes: u32) -> usize {
    (0..nodes).map(|node| records(state, node).len()).max().unwrap_or_default()
}

/// Waits until the longest log has more records than this, or the command has ended.
fn wait_for(child: &mut Child, state: &Path, nodes: u32, more_than: usize) -> bool {
    let began = Instant::now();
    while furthest(state, nodes) <= more_than {
        if child.try_wait().expect("a child").is_some() {
            return false;
        }
        assert!(began.elapsed() < Duration::from_secs(120), "nothing goes on");
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// The journals of all nodes under the checkers of the simulation; and each record of one, computed again by one process.
fn check_journals(place: &Place, topology: &Topology, nodes: u32) {
    let state = place.path("state");
    let mut checkers = all(topology);
    let mut see = |fact: &Fact<'_>| {
        for checker in &mut checkers {
            checker.see(fact).unwrap_or_else(|what| panic!("{}: {what}", checker.name()));
        }
    };
    let mut longest = (0, 0);
    for node in 0..nodes {
        let records = records(&state, node);
        let member = Member { node: NodeId(node), incarnation: Incarnation(1) };
        let last = Seq(records.len() as u64);
        see(&Fact::Durable { member, last });
        for record in &records {
            let (seq, digest) = (Seq(record.seq), first_bytes(&record.digest));
            see(&Fact::Committed { member, replica: 0, seq, digest });
        }
        let mut engine = lite_llm_core::engine::Engine::new();
        let folded = fold(&mut engine, &records, |_, output| {
            if let Output::Event { event: Event::TierSet { generation, tiers }, .. } = output {
                see(&Fact::Entered { replica: 0, generation: *generation, tiers });
            }
        });
        folded.expect("a journal folds");
        longest = longest.max((last.0, node));
    }
    let (count, node) = longest;
    assert!(count > 150);
    let model = folder("olmoe");
    let dir = state.join(format!("node-{node}"));
    let arguments =
        ["replay", "--json", "--full", model.to_str().expect("a path"), dir.to_str().expect("a path")];
    let replayed = place.run(arguments).json();
    assert!(replayed["full"].is_object() || replayed["steps"].is_number(), "{replayed}");
}

fn finished(child: Child) -> Ran {
    let ran = command::ended(child);
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    ran
}

#[test]
fn every_layout_gives_the_stream_of_one_process() {
    let place = Place::new();
    let expected = alone(&place);
    for (nodes, topology) in [(2, "tp=2"), (2, "pp=2"), (4, "ep=4"), (5, "tp=2,ep=2"), (4, "dp=2,pp=2")] {
        let place = Place::new();
        let ran: Ran = command(&place, nodes, topology).output().expect("a command").into();
        assert_eq!(ran.code, Some(0), "{topology}: {}", ran.stderr);
        assert_eq!(tokens(&ran), expected, "{topology}");
        if !topology.contains("dp") {
            check_journals(&place, &topology.parse().expect("a topology"), nodes);
        }
    }
}

#[test]
fn nodes_that_are_killed_or_halted_cost_no_bit() {
    let place = Place::new();
    let expected = alone(&place);
    let topology = "pp=2,ep=2";
    let mut child = command(&place, 5, topology).spawn().expect("a command");
    let state = place.path("state");
    let mut struck = 0;
    for (nth, &how) in ["KILL", "KILL", "STOP", "KILL"].iter().enumerate() {
        let before = furthest(&state, 5);
        if !wait_for(&mut child, &state, 5, before + 12) {
            break;
        }
        // Whoever leads is among them.
        let node = [0, 3, 1, 2][nth];
        if let Some(pid) = pid(&state, node) {
            struck += u32::from(try_signal(pid, how));
        }
    }
    let ran = finished(child);
    assert!(struck >= 3, "it was over before it was attacked");
    assert_eq!(tokens(&ran), expected);
    let failures = failures(&place, 5);
    assert!(failures.len() >= 3, "{}", ran.stderr);
    let causes: Vec<String> = failures.iter().map(|of| of["failure"]["cause"].to_string()).collect();
    assert!(causes.iter().any(|cause| cause.contains("\"Signal\":9")), "{causes:?}");
    assert!(causes.iter().any(|cause| cause.contains("Suspected")), "{causes:?}");
    assert!(failures.iter().all(|of| of["journal"]["last"].is_number()), "the log is captured");
    check_journals(&place, &topology.parse().expect("a topology"), 5);
}

#[test]
fn a_killed_supervisor_finds_its_nodes_again() {
    let place = Place::new();
    let expected = alone(&place);
    let state = place.path("state");
    for _ in 0..3 {
        let mut child = command(&place, 4, "tp=2,pp=2").spawn().expect("a command");
        let before = furthest(&state, 4);
        wait_for(&mut child, &state, 4, before + 10);
        // Its nodes go on without it.
        drop(child.kill());
        drop(child.wait());
    }
    let lives: Vec<Option<u32>> = (0..4).map(|node| pid(&state, node)).collect();
    let ran: Ran = command(&place, 4, "tp=2,pp=2").output().expect("a command").into();
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(tokens(&ran), expected);
    assert_eq!((0..4).map(|node| pid(&state, node)).collect::<Vec<_>>(), lives, "the processes are the same");
    assert_eq!(failures(&place, 4), Vec::<Value>::new());
    check_journals(&place, &"tp=2,pp=2".parse().expect("a topology"), 4);
}

/// Writes a record after a node's last that no driver would: the fold panics on it. Returns its number.
fn write_a_bug(dir: &Path) -> u64 {
    let scanned = scan(&mut FileDisk::open_read_only(dir).expect("a folder")).expect("a journal");
    let mut engine = lite_llm_core::engine::Engine::new();
    fold(&mut engine, &scanned.records, |_, _| {}).expect("a journal folds");
    let header = scanned.header.expect("a journal that was begun");
    let (mut store, _) = Store::open(FileDisk::open(dir).expect("a folder"), &header).expect("a journal");
    let (seq, time, digest) = (engine.next_seq().0, engine.now().0, engine.digest().0);
    let bug = encode_input(&Input::BaseLoaded { shard: 7 });
    store.push(seq, time, digest, bug).and_then(|()| store.flush()).expect("a journal takes records");
    seq
}

#[test]
fn a_bug_that_every_life_meets_again_ends_the_restarts() {
    let place = Place::new();
    finished(command(&place, 2, "tp=2").spawn().expect("a command"));
    let records: Vec<u64> =
        (0..2).map(|node| write_a_bug(&place.path(&format!("state/node-{node}")))).collect();
    let ran: Ran = command(&place, 2, "tp=2").output().expect("a command").into();
    assert_ne!(ran.code, Some(0), "{}", ran.stderr);
    for (node, record) in (0..).zip(records) {
        let why = format!("node {node} is given up: it panicked at record {record} twice");
        assert!(ran.stderr.contains(&why), "{why:?} is not in: {}", ran.stderr);
    }
    let panics = failures(&place, 2);
    let panics = panics.iter().filter(|of| of["failure"]["cause"].to_string().contains("Panic"));
    assert_eq!(panics.count(), 4, "twice each, and each is recorded");
}

/// Nobody knows where its control socket would be, so that nobody can restart what is given up.
#[test]
fn a_private_run_ends_when_too_few_nodes_are_left() {
    let place = Place::new();
    let model = folder("olmoe");
    let given_up = |nodes: &str| {
        let cluster =
            ["supervise", "--max-restarts", "0", "--nodes", nodes, "--topology", "pp=2", "--", "run"];
        let run = cluster.into_iter().chain([model.to_str().expect("a path")]).chain(RUN).chain(SAMPLING);
        let mut child = place.command(run).spawn().expect("a command");
        let state = || place.private_states().pop().unwrap_or_default();
        command::wait_until(&mut child, || furthest(&state(), 2) > 40);
        command::signal(pid(&state(), 1).expect("a node that lives"), "KILL");
        command::ended(child)
    };
    given_up("2").refuses(1, &["node 1 is given up", "too few of its nodes are left", "goes on", "--state"]);
    let left = place.private_states().pop().expect("a state that is kept");
    std::fs::remove_dir_all(left).expect("it goes");
    // One that stands by takes the seat.
    let ran = given_up("3");
    assert_eq!(ran.code, Some(0), "{}", ran.stderr);
    assert_eq!(tokens(&ran), alone(&place));
    assert!(place.private_states().is_empty());
}

#[test]
fn nodes_of_another_number_share_the_memory_anew() {
    let place = Place::new();
    let memory = |nodes: u32| {
        let ran = command::run(command(&place, nodes, "pp=2"));
        assert_eq!(ran.code, Some(0), "{}", ran.stderr);
        let settings = std::fs::read(place.path("state/nodes.json")).expect("settings");
        let settings: Value = serde_json::from_slice(&settings).expect("JSON");
        settings["config"]["memory_bytes"].as_u64().expect("a number")
    };
    let of_two = memory(2);
    // What is available is not the same twice; what nodes were given is.
    assert_eq!(memory(2), of_two);
    let of_four = memory(4);
    assert!(of_four < of_two / 3 * 2, "four have {of_four} each, and two had {of_two}");
}

#[test]
fn a_batch_is_spread_over_replicas() {
    let place = Place::new();
    let lines: Vec<String> = (0..6)
        .map(|n| {
            format!(
                r#"{{"id": "q{n}", "prompt_tokens": [265, {}, 449], "max_tokens": 12, "ignore_eos": true}}"#,
                300 + n
            )
        })
        .collect();
    std::fs::write(place.path("in.jsonl"), lines.join("\n")).expect("a file");
    let model = folder("olmoe");
    let batch = ["run", model.to_str().expect("a path"), "--batch", "in.jsonl", "--out"];
    let alone = place.run(batch.iter().chain(&["alone.jsonl"]));
    assert_eq!(alone.code, Some(0), "{}", alone.stderr);
    let spread = ["supervise", "--nodes", "4", "--topology", "dp=2,pp=2", "--"];
    let spread = place.run(spread.iter().chain(&batch).chain(&["spread.jsonl"]));
    assert_eq!(spread.code, Some(0), "{}", spread.stderr);
    let sorted = |name: &str| {
        let text = std::fs::read_to_string(place.path(name)).expect("a file");
        let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
        lines.sort_unstable();
        lines
    };
    assert_eq!(sorted("spread.jsonl"), sorted("alone.jsonl"));
}

#[test]
fn what_cannot_be_is_refused_with_the_remedy() {
    let place = Place::new();
    let model = folder("olmoe");
    let run = |cluster: &[&str], more: &[&str]| {
        let run = ["--", "run", model.to_str().expect("a path"), "--prompt-tokens", "1"];
        place.run(["supervise"].iter().chain(cluster).chain(&run).chain(more))
    };
    run(&["--nodes", "3", "--topology", "tp=2,pp=2"], &[]).refuses(2, &["nodes is 3", "4 ranks"]);
    run(&["--nodes", "3", "--topology", "tp=3"], &[]).refuses(2, &["topology.tensor is 3", "take at most"]);
    run(&["--nodes", "40", "--topology", "pp=40"], &[]).refuses(2, &["topology.pipeline is 40", "layers"]);
    run(&["--nodes", "2", "--topology", "xp=2"], &[]).refuses(2, &["xp=2", "write it as dp=2,tp=1"]);
    run(&["--topology", "tp=2"], &[]).refuses(2, &["--nodes"]);
    run(&["--nodes", "2"], &["--logits", "f"]).refuses(2, &["--logits is for one process"]);
    run(&["--nodes", "2"], &["--memory", "1"]).refuses(1, &["of each node", "memory_bytes is 1", "at least"]);
    let of_one =
        place.run(["run", model.to_str().expect("a path"), "--prompt-tokens", "1", "--state", "one"]);
    assert_eq!(of_one.code, Some(0), "{}", of_one.stderr);
    run(&["--nodes", "2"], &["--state", "one"]).refuses(1, &["one process", "without --nodes", "--state"]);
    assert!(!place.path("one/key").exists() && !place.path("one/nodes.json").exists());
    std::fs::write(place.path("key"), "no key").expect("a file");
    let refused = run(&["--nodes", "2", "--key-file", "key"], &[]);
    assert!(refused.code == Some(1) && refused.stderr.contains("chmod 600"), "{}", refused.stderr);
    assert!(place.private_states().is_empty(), "whoever is refused leaves nothing");
}

/// Two machines: a network namespace for the supervisor and three nodes, another for two agents, and a link between them that
/// is cut in the middle of a stream.
const TWO_MACHINES: &str = r#"
set -e
unshare -n sleep 1000 & other=$!
trap 'kill -9 $other $agents 2>/dev/null' EXIT
sleep 0.3
ip link set lo up
ip link add v0 type veth peer name v1 netns $other
ip addr add 10.9.0.1/24 dev v0 && ip link set v0 up
there="nsenter -t $other -n"
$there ip link set lo up && $there ip addr add 10.9.0.2/24 dev v1 && $there ip link set v1 up
$PROGRAM supervise --max-restarts 100 --nodes 2 --elsewhere 2 --topology tp=2,pp=2 --listen 10.9.0.1:7400 -- \
    run $MODEL $REQUEST --state head --request-id one > out 2> err & head=$!
until [ -s head/key ]; do sleep 0.05; done
$there $PROGRAM node $MODEL --join 10.9.0.1:7400 --key-file head/key --state a 2> a.err & agents=$!
$there $PROGRAM node $MODEL --join 10.9.0.1:7400 --key-file head/key --state b 2> b.err & agents="$agents $!"
until [ "$(wc -l < out)" -ge 20 ]; do kill -0 $head; sleep 0.02; done
ip link set v0 down
sleep 3
wc -l < out > told
ip link set v0 up
wait $head
kill -TERM $agents
wait $agents
"#;

#[test]
fn a_cut_link_between_machines_costs_no_bit() {
    let namespaces = Command::new("unshare").args(["-Urn", "ip", "link", "set", "lo", "up"]).status();
    if !namespaces.is_ok_and(|status| status.success()) {
        println!("skipped: this machine lets nobody make network namespaces (unshare -Urn)");
        return;
    }
    let place = Place::new();
    let expected = alone(&place);
    let mut script = Command::new("unshare");
    script.args(["-Urn", "bash", "-c", TWO_MACHINES]).current_dir(place.path(""));
    let request: Vec<&str> = RUN.iter().chain(&SAMPLING).copied().collect();
    script.env("PROGRAM", lite_llm_tests::command::binary()).env("MODEL", folder("olmoe"));
    script.env("REQUEST", request.join(" "));
    let ran = script.output().expect("a script");
    let read = |name: &str| std::fs::read_to_string(place.path(name)).unwrap_or_default();
    let said =
        format!("{}{}{}{}", String::from_utf8_lossy(&ran.stderr), read("err"), read("a.err"), read("b.err"));
    assert!(ran.status.success(), "{said}");
    assert_eq!(tokens(&Ran { code: Some(0), stdout: read("out"), stderr: said.clone() }), expected);
    let told: usize = read("told").trim().parse().expect("a number");
    assert!(told < expected.len(), "it was over before the link was mended");
    assert!(said.contains("was suspected and ended (Silent"), "{said}");
    assert!(
        said.contains("this is node 2 of the cluster") && said.contains("this is node 3 of the cluster"),
        "{said}"
    );
}
