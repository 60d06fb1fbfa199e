//! A node on real files and real arithmetic: the oracle's tokens, whatever happens to the process in between.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};
use std::sync::mpsc::Receiver;
use std::time::Duration;

use lite_llm_core::config::Config;
use lite_llm_core::engine::Engine;
use lite_llm_core::event::{Event, Phase};
use lite_llm_core::ids::{Generation, Incarnation, RequestId};
use lite_llm_core::input::{Body, SwitchTarget};
use lite_llm_core::journal::frame::parse_segment_name;
use lite_llm_core::journal::{JournalError, scan};
use lite_llm_core::lifecycle::Lifecycle;
use lite_llm_core::output::{Carving, FinishReason, Output};
use lite_llm_core::replay::fold;
use lite_llm_hw::disk::FileDisk;
use lite_llm_hw::node::{Node, NodeError, NodeOptions, StreamEvent};
use lite_llm_hw::telemetry;
use lite_llm_model::Capture;
use lite_llm_model::checkpoint::import::import;
use lite_llm_model::checkpoint::tiers::parse_tiers;
use lite_llm_model::kernels::DType;
use lite_llm_model::tokenizer::Tokenizer;

/// A budget in which everything of a fixture fits.
const ROOMY: u64 = 512 << 20;

struct Oracle {
    dir: PathBuf,
    prompts: Vec<Vec<u32>>,
    greedy: Vec<Vec<u32>>,
}

impl Oracle {
    fn of(name: &str) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name);
        let text = std::fs::read_to_string(dir.join("oracle.json")).unwrap();
        let oracle: serde_json::Value = serde_json::from_str(&text).unwrap();
        let tokens = |value: &serde_json::Value| -> Vec<u32> {
            value.as_array().unwrap().iter().map(|token| token.as_u64().unwrap() as u32).collect()
        };
        let prompts = oracle["prompts"].as_array().unwrap().iter().map(tokens).collect();
        let greedy = oracle["greedy"].as_array().unwrap().iter().map(|g| tokens(&g["tokens"])).collect();
        Self { dir, prompts, greedy }
    }

    fn options(&self, state: &Path) -> NodeOptions {
        let config = Config { memory_bytes: ROOMY, ..Config::default() };
        // The oracles round no cached value.
        let kv_dtype = Some(DType::F32);
        NodeOptions { threads: 2, kv_dtype, ..NodeOptions::new(&self.dir, state, config) }
    }

    fn start(&self, state: &Path) -> Node {
        Node::start(self.options(state)).unwrap()
    }

    fn body(&self, prompt: usize) -> Body {
        let (prompt, max_tokens) = (self.prompts[prompt].clone(), self.greedy[prompt].len() as u32);
        Body { prompt, max_tokens, ..Body::default() }
    }

    /// What memory is carved into where there is plenty.
    fn carving(&self) -> Carving {
        let state = tempfile::tempdir().unwrap();
        self.start(state.path()).status().unwrap().carving
    }

    /// The least memory that the node says it needs.
    fn memory_min(&self) -> u64 {
        let dir = tempfile::tempdir().unwrap();
        let mut options = self.options(dir.path());
        options.config.memory_bytes = 1;
        let Err(NodeError::Boot(refusal)) = Node::start(options) else { panic!("one byte is not enough") };
        let (_, needed) = refusal.split_once("needs at least ").unwrap();
        needed.split(':').next().unwrap().parse().unwrap()
    }
}

/// Every golden checkpoint.
fn families() -> Vec<String> {
    let fixtures = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures");
    let names = std::fs::read_dir(fixtures).unwrap().map(|entry| entry.unwrap());
    let names = names.filter(|entry| entry.path().is_dir());
    let mut names: Vec<String> = names.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort_unstable();
    assert!(names.len() >= 14, "{names:?}");
    names
}

fn id(name: &str) -> RequestId {
    RequestId::new(name).unwrap()
}

/// Tokens until the stream ends, which begins at an offset.
fn collect(events: &Receiver<StreamEvent>, from: u32) -> (Vec<u32>, Option<FinishReason>) {
    let mut tokens = Vec::new();
    assert!(matches!(events.recv(), Ok(StreamEvent::Accepted { .. })), "accepted before anything else");
    for event in events {
        match event {
            StreamEvent::Token { offset, token } => {
                assert_eq!(offset, from + tokens.len() as u32, "offsets are dense");
                tokens.push(token);
            }
            StreamEvent::Finish { reason, generated, generations } => {
                assert!(!generations.is_empty() || generated == 0, "each position has a generation");
                assert_eq!(generated, from + tokens.len() as u32, "every token before the end");
                return (tokens, Some(reason));
            }
            other => panic!("{other:?} in the middle of a stream"),
        }
    }
    (tokens, None)
}

#[test]
fn greedy_tokens_are_the_oracles() {
    let oracle = Oracle::of("olmoe");
    let state = tempfile::tempdir().unwrap();
    let node = oracle.start(state.path());
    for prompt in 0..oracle.prompts.len() {
        let events = node.submit(id(&format!("p{prompt}")), oracle.body(prompt), 0);
        assert_eq!(collect(&events, 0), (oracle.greedy[prompt].clone(), Some(FinishReason::Length)));
    }
    let status = node.status().unwrap();
    assert_eq!((status.lifecycle, status.incarnation), (Lifecycle::Active, Incarnation(1)));
    assert!(status.requests.is_empty() && status.durable <= status.seq);
    node.drain(None).unwrap();
    let handle = node.handle();
    let report = node.wait().unwrap();
    assert_eq!(report.unfinished, 0);
    assert!(matches!(handle.status(), Err(NodeError::Ended)));
    let refused = handle.submit(id("late"), oracle.body(0), 0).recv().unwrap();
    assert!(matches!(refused, StreamEvent::Refused { .. }));
}

#[test]
fn a_killed_node_goes_on_where_its_journal_ends() {
    let olmoe = [0, 1, 20].map(|after| (String::from("olmoe"), after));
    for (family, after) in families().into_iter().map(|family| (family, 7)).chain(olmoe) {
        let oracle = Oracle::of(&family);
        let state = tempfile::tempdir().unwrap();
        let mut heard = Vec::new();
        {
            let node = oracle.start(state.path());
            let events = node.submit(id("r"), oracle.body(1), 0);
            let other = node.submit(id("other"), oracle.body(2), 0);
            assert!(matches!(events.recv(), Ok(StreamEvent::Accepted { generated: 0 })));
            assert!(matches!(other.recv(), Ok(StreamEvent::Accepted { generated: 0 })));
            while heard.len() < after {
                match events.recv().unwrap() {
                    StreamEvent::Token { token, .. } => heard.push(token),
                    other => panic!("{other:?} before token {after}"),
                }
            }
        }
        assert_eq!(heard, oracle.greedy[1][..after], "{family}: what was heard is a prefix");
        let node = oracle.start(state.path());
        assert_eq!(node.status().unwrap().incarnation, Incarnation(2));
        let rest = node.submit(id("r"), oracle.body(1), after as u32);
        assert_eq!(
            collect(&rest, after as u32),
            (oracle.greedy[1][after..].to_vec(), Some(FinishReason::Length)),
            "{family}"
        );
        let again = node.submit(id("other"), oracle.body(2), 0);
        assert_eq!(collect(&again, 0).0, oracle.greedy[2], "it goes on unasked, and is found again");
        let changed = node.submit(id("r"), oracle.body(0), 0);
        assert!(matches!(changed.recv(), Ok(StreamEvent::Refused { .. })), "the same id with another body");
    }
}

#[test]
fn many_lives_make_one_stream() {
    for family in families() {
        live_often(&family);
    }
}

fn live_often(family: &str) {
    let oracle = Oracle::of(family);
    let state = tempfile::tempdir().unwrap();
    // A request that was accepted may need a page more for each group of layers than an empty journal.
    let least = oracle.memory_min() + 2 * oracle.carving().page_bytes;
    let mut tokens: Vec<u32> = Vec::new();
    for life in 1.. {
        let mut options = oracle.options(state.path());
        // Neither the number of slots nor that of threads changes a bit.
        options.config.memory_bytes = [least, ROOMY, least + (1 << 20)][life as usize % 3];
        options.config.prefill_chunk = [5, 64, 1][life as usize % 3];
        options.threads = 1 + life as usize % 3;
        let node = Node::start(options).unwrap();
        assert_eq!(node.status().unwrap().incarnation, Incarnation(life));
        let events = node.submit(id("r"), oracle.body(2), tokens.len() as u32);
        let mut now = events.into_iter().filter_map(|event| match event {
            StreamEvent::Token { token, .. } => Some(token),
            _ => None,
        });
        tokens.extend(now.by_ref().take(3));
        if tokens.len() == oracle.greedy[2].len() {
            break;
        }
        if life == 3 {
            node.snapshot().unwrap();
        }
    }
    assert_eq!(tokens, oracle.greedy[2], "{family}");
}

#[test]
fn the_smallest_arena_gives_the_same_tokens() {
    let oracle = Oracle::of("olmoe");
    let least = oracle.memory_min();
    let state = tempfile::tempdir().unwrap();
    let mut options = oracle.options(state.path());
    options.config.memory_bytes = least;
    let node = Node::start(options).unwrap();
    let carving = node.status().unwrap().carving;
    assert_eq!((carving.slots, carving.pages), (2, 1), "the smallest arena that can be had");
    for prompt in [2, 0] {
        let events = node.submit(id(&format!("p{prompt}")), oracle.body(prompt), 0);
        assert_eq!(collect(&events, 0).0, oracle.greedy[prompt]);
    }
    let long = Body { max_tokens: 65, ..oracle.body(0) };
    assert!(matches!(node.submit(id("long"), long, 0).recv(), Ok(StreamEvent::Refused { .. })));
    drop(node);

    let mut options = oracle.options(tempfile::tempdir().unwrap().path());
    options.config.memory_bytes = least - 1;
    assert!(matches!(Node::start(options), Err(NodeError::Boot(_))), "a byte less is refused");
    let mut options = oracle.options(tempfile::tempdir().unwrap().path());
    options.config.memory_bytes = 1 << 60;
    let Err(NodeError::Boot(refusal)) = Node::start(options) else { panic!("an exbibyte is not there") };
    assert!(refusal.contains("give at most that"), "{refusal}");
}

#[test]
fn a_warm_arena_gives_the_same_tokens() {
    let oracle = Oracle::of("olmoe");
    let slot_bytes = oracle.carving().slot_bytes;
    for warm in [1, 3] {
        let state = tempfile::tempdir().unwrap();
        let mut options = oracle.options(state.path());
        options.config.memory_bytes = oracle.memory_min() + warm * slot_bytes;
        options.config.warm_bytes = warm * slot_bytes;
        let node = Node::start(options).unwrap();
        let status = node.status().unwrap();
        assert_eq!((status.carving.slots, u64::from(status.carving.warm_slots)), (2, warm));
        assert_eq!(u64::from(status.warm_slots_ready), warm, "the boot sequence stages what is not hot");
        for prompt in [2, 0] {
            let events = node.submit(id(&format!("p{prompt}")), oracle.body(prompt), 0);
            assert_eq!(collect(&events, 0).0, oracle.greedy[prompt]);
        }
        drop(node);
        let timings = std::fs::read_to_string(state.path().join(telemetry::TIMINGS_NAME)).unwrap();
        assert!(timings.contains("{\"Promote\":"), "experts came from the warm arena");
    }
}

#[test]
fn a_batch_gives_what_each_gives_alone() {
    let oracle = Oracle::of("olmoe");
    let state = tempfile::tempdir().unwrap();
    let mut options = oracle.options(state.path());
    options.config.memory_bytes = oracle.memory_min() + 20 * 4096;
    options.config.limits.rows_max = 8;
    let node = Node::start(options).unwrap();
    let streams: Vec<_> =
        (0..8).map(|n| (n % 3, node.submit(id(&format!("r{n}")), oracle.body(n % 3), 0))).collect();
    for (prompt, events) in streams {
        assert_eq!(collect(&events, 0), (oracle.greedy[prompt].clone(), Some(FinishReason::Length)));
    }
}

/// Holds the first step until it is let go.
struct Gate(Option<Receiver<()>>);

impl Capture for Gate {
    fn wants_logits(&self, _: u64) -> bool {
        false
    }
    fn logits(&mut self, _: u64, _: u32, _: &[f32]) {}
    fn routes(&mut self, _: u64, _: u32, _: u32, _: &[u32], _: &[f32]) {
        if let Some(gate) = self.0.take() {
            gate.recv().unwrap();
        }
    }
}

#[test]
fn a_drain_with_a_bound_leaves_the_rest_to_the_next_life() {
    let oracle = Oracle::of("olmoe");
    let state = tempfile::tempdir().unwrap();
    let (open, gate) = std::sync::mpsc::channel();
    let mut options = oracle.options(state.path());
    options.capture = Some(Box::new(Gate(Some(gate))));
    let node = Node::start(options).unwrap();
    let events = node.submit(id("r"), oracle.body(2), 0);
    assert!(matches!(events.recv(), Ok(StreamEvent::Accepted { .. })));
    node.drain(Some(Duration::ZERO)).unwrap();
    open.send(()).unwrap();
    let report = node.wait().unwrap();
    assert_eq!(report.unfinished, 1);
    let disk = &mut FileDisk::open_read_only(state.path()).unwrap();
    let mut engine = Engine::new();
    fold(&mut engine, &scan(disk).unwrap().records, |_, _| {}).unwrap();
    assert_eq!(engine.state_digest(), report.state_digest, "the journal holds the clean stop");
    assert_eq!(engine.view().lifecycle(), Lifecycle::Stopped);
    let node = oracle.start(state.path());
    let events = node.submit(id("r"), oracle.body(2), 0);
    assert_eq!(collect(&events, 0).0, oracle.greedy[2]);
}

#[test]
fn telemetry_is_what_a_replay_writes() {
    let oracle = Oracle::of("olmoe");
    let state = tempfile::tempdir().unwrap();
    let mut options = oracle.options(state.path());
    let (phases, seen) = std::sync::mpsc::channel();
    options.on_event = Some(Box::new(move |_, event| {
        if let Event::PhaseDone { phase, .. } = event {
            phases.send(*phase).unwrap();
        }
    }));
    let node = Node::start(options).unwrap();
    let phases: Vec<Phase> = seen.try_iter().collect();
    assert!(phases.is_sorted() && phases.len() == 9, "every phase in its order: {phases:?}");
    assert_eq!(collect(&node.submit(id("a"), oracle.body(0), 0), 0).0, oracle.greedy[0]);
    drop(node);
    let node = oracle.start(state.path());
    assert_eq!(collect(&node.submit(id("b"), oracle.body(1), 0), 0).0, oracle.greedy[1]);
    node.drain(None).unwrap();
    node.wait().unwrap();

    let disk = &mut FileDisk::open_read_only(state.path()).unwrap();
    let mut replayed = String::new();
    fold(&mut Engine::new(), &scan(disk).unwrap().records, |_, output| {
        if let Output::Event { seq, event } = output {
            replayed += &telemetry::line(*seq, event);
        }
    })
    .unwrap();
    let written = std::fs::read_to_string(state.path().join(telemetry::EVENTS_NAME)).unwrap();
    assert_eq!(written, replayed);
    assert!(std::fs::read_to_string(state.path().join(telemetry::TIMINGS_NAME)).unwrap().contains("Step"));
}

#[test]
fn snapshots_bound_the_journal_and_carry_the_streams() {
    let oracle = Oracle::of("olmoe");
    let state = tempfile::tempdir().unwrap();
    let mut options = oracle.options(state.path());
    options.config.snapshot_every = 10;
    let node = Node::start(options).unwrap();
    assert_eq!(collect(&node.submit(id("a"), oracle.body(0), 0), 0).0, oracle.greedy[0]);
    let next = node.snapshot().unwrap();
    drop(node);
    let disk = &mut FileDisk::open_read_only(state.path()).unwrap();
    assert_eq!(scan(disk).unwrap().snapshot.map(|snapshot| snapshot.next), Some(next.0));
    let node = oracle.start(state.path());
    let found = node.submit(id("a"), oracle.body(0), 0);
    assert_eq!(collect(&found, 0), (oracle.greedy[0].clone(), Some(FinishReason::Length)));
}

#[test]
fn a_bound_on_the_journal_holds_and_costs_no_stream() {
    let oracle = Oracle::of("olmoe");
    let size = |state: &Path| -> u64 {
        let entries = std::fs::read_dir(state).unwrap().map(|entry| entry.unwrap());
        let segments = entries.filter(|e| parse_segment_name(e.file_name().to_str().unwrap()).is_some());
        segments.map(|entry| entry.metadata().unwrap().len()).sum()
    };
    let short = |prompt| Body { max_tokens: 2, ..oracle.body(prompt) };
    let run = |journal_bytes| {
        let state = tempfile::tempdir().unwrap();
        let options = || NodeOptions { journal_bytes, ..oracle.options(state.path()) };
        let node = Node::start(options()).unwrap();
        // Each stream's end is durable before the next begins: a group, and with it a block, for each at least.
        for n in 0..120 {
            let events = node.submit(id(&format!("r{n}")), short(n % 3), 0);
            assert_eq!(collect(&events, 0).0, oracle.greedy[n % 3][..2]);
        }
        node.drain(None).unwrap();
        node.wait().unwrap();
        let bytes = size(state.path());
        let node = Node::start(options()).unwrap();
        for n in 0..120 {
            let events = node.submit(id(&format!("r{n}")), short(n % 3), 0);
            assert_eq!(collect(&events, 0).0, oracle.greedy[n % 3][..2], "found again");
        }
        bytes
    };
    let bound = 320 << 10;
    let (free, bounded) = (run(None), run(Some(bound)));
    assert!(free > bound, "{free} bytes are no reason for a bound");
    assert!(bounded <= bound, "{bounded} bytes");
}

#[test]
fn tiers_are_switched_by_name() {
    let oracle = Oracle::of("olmoe");
    let state = tempfile::tempdir().unwrap();
    let node = oracle.start(state.path());
    let pinned = node.switch(SwitchTarget::Tiers(vec!["all".into()]), Some((id("r"), 9)));
    let unknown = node.switch(SwitchTarget::Tiers(vec!["none".into()]), None).recv().unwrap();
    assert!(unknown.unwrap_err().contains("unknown tier"));
    let now = node.switch(SwitchTarget::Tiers(vec![]), None).recv().unwrap();
    assert_eq!(now, Ok(Generation(0)), "all tiers are the one that is active");
    let events = node.submit(id("r"), oracle.body(1), 0);
    assert_eq!(collect(&events, 0).0, oracle.greedy[1]);
    assert_eq!(pinned.recv().unwrap(), Ok(Generation(0)));
    let spans = node.handle().generations(&id("r")).unwrap().unwrap();
    assert_eq!(spans.last().unwrap().tiers, ["all"]);
    assert_eq!(node.handle().generations(&id("x")).unwrap(), None);
}

#[test]
fn streams_are_cancelled_and_stop_at_a_text() {
    let oracle = Oracle::of("mixtral");
    let tokenizer = Tokenizer::open(&oracle.dir).unwrap().unwrap();
    let state = tempfile::tempdir().unwrap();
    let (open, gate) = std::sync::mpsc::channel();
    let mut options = oracle.options(state.path());
    options.capture = Some(Box::new(Gate(Some(gate))));
    let node = Node::start(options).unwrap();
    assert!(matches!(node.cancel(id("nobody")), Err(NodeError::Refused(_))));
    let events = node.submit(id("endless"), oracle.body(0), 0);
    assert!(matches!(events.recv(), Ok(StreamEvent::Accepted { .. })));
    node.cancel(id("endless")).unwrap();
    open.send(()).unwrap();
    let last = events.into_iter().last().unwrap();
    assert!(matches!(last, StreamEvent::Finish { reason: FinishReason::Cancelled, .. }), "{last:?}");

    let greedy = &oracle.greedy[2];
    let text = |n: usize| tokenizer.decode(&greedy[..n]).unwrap();
    let whole = text(greedy.len());
    let (end, _) = whole.char_indices().nth(whole.chars().count() / 2).unwrap();
    let (start, _) = whole[..end].char_indices().rev().nth(2).unwrap();
    let stop = &whole[start..end];
    let expected = (1..=greedy.len()).find(|&n| text(n).contains(stop)).unwrap();
    assert!(expected < greedy.len());
    let body = Body { stop: vec!["never in there".into(), stop.into()], ..oracle.body(2) };
    let events = node.submit(id("stop"), body, 0);
    assert_eq!(collect(&events, 0), (greedy[..expected].to_vec(), Some(FinishReason::Stop)));

    let bare = Oracle::of("olmoe");
    let state = tempfile::tempdir().unwrap();
    let node = bare.start(state.path());
    let body = Body { stop: vec!["x".into()], ..bare.body(0) };
    assert!(matches!(node.submit(id("a"), body, 0).recv(), Ok(StreamEvent::Refused { .. })));
}

#[test]
fn a_state_directory_is_of_one_model_and_one_process() {
    let (olmoe, mixtral) = (Oracle::of("olmoe"), Oracle::of("mixtral"));
    let state = tempfile::tempdir().unwrap();
    let node = olmoe.start(state.path());
    assert!(matches!(Node::start(olmoe.options(state.path())), Err(NodeError::State(_))));
    drop(node);
    let other = Node::start(mixtral.options(state.path()));
    assert!(matches!(other, Err(NodeError::Journal(JournalError::Identity { .. }))));
    let mut options = olmoe.options(state.path());
    options.config.routing_seed = Some(5);
    assert!(matches!(Node::start(options), Err(NodeError::Boot(_))), "the routing seed decides bits too");
    drop(olmoe.start(state.path()));
}

/// A fixture in two tiers, and where its files are.
fn tiered(oracle: &Oracle, tiers: &str) -> (tempfile::TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let native = dir.path().join("native");
    import(&oracle.dir, &native, Some(&parse_tiers(tiers).unwrap()), 2, |_, _| {}).unwrap();
    (dir, native)
}

/// A stream that begins under one tier and is switched to both at a position of its own.
fn switched_stream(native: &Path, state: &Path, oracle: &Oracle, kill_after: Option<usize>) -> Vec<u32> {
    let options = || {
        let tier_set = vec!["small".into()];
        let config = Config { memory_bytes: ROOMY, tier_set, ..Config::default() };
        NodeOptions { threads: 2, ..NodeOptions::new(native, state, config) }
    };
    let mut node = Node::start(options()).unwrap();
    let switched = node.switch(SwitchTarget::Tiers(vec![]), Some((id("r"), 40)));
    let mut events = node.submit(id("r"), oracle.body(2), 0);
    if let Some(tokens) = kill_after {
        assert_eq!(events.iter().take(tokens + 1).count(), tokens + 1);
        drop(node);
        node = Node::start(options()).unwrap();
        events = node.submit(id("r"), oracle.body(2), 0);
    }
    let (tokens, finish) = collect(&events, 0);
    assert_eq!(finish, Some(FinishReason::Length));
    if kill_after.is_none() {
        assert_eq!(switched.recv().unwrap(), Ok(Generation(1)));
    }
    let spans = node.handle().generations(&id("r")).unwrap().unwrap();
    let map: Vec<_> = spans.iter().map(|span| (span.until, span.tiers.join("+"))).collect();
    assert_eq!(map, [(40, "small".to_owned()), (56, "small+large".to_owned())]);
    assert_eq!(node.status().unwrap().generation.unwrap().1, ["small", "large"]);
    tokens
}

#[test]
fn a_switch_of_tiers_is_where_the_journal_says_in_every_life() {
    let oracle = Oracle::of("olmoe");
    let (_dir, native) = tiered(&oracle, "small:4,large:4:cold");
    let stream = |kill_after| {
        let state = tempfile::tempdir().unwrap();
        switched_stream(&native, state.path(), &oracle, kill_after)
    };
    let reference = stream(None);
    assert_ne!(reference, oracle.greedy[2], "the small tier alone is another model");
    for kill_after in [0, 3, 7, 8, 9, 20] {
        assert_eq!(stream(Some(kill_after)), reference, "killed after {kill_after}");
    }
    let state = tempfile::tempdir().unwrap();
    let whole = Node::start(NodeOptions::new(&native, state.path(), Config::default())).unwrap();
    assert_eq!(collect(&whole.submit(id("r"), oracle.body(2), 0), 0).0, oracle.greedy[2]);
}

#[test]
fn a_corrupt_expert_is_a_fault_of_who_needs_it() {
    let oracle = Oracle::of("olmoe");
    let (_dir, native) = tiered(&oracle, "small:4,large:4:cold");
    let experts = std::fs::read_dir(&native).unwrap().map(|entry| entry.unwrap().path());
    let experts = experts.filter(|path| path.file_name().unwrap().to_str().unwrap().contains("expert"));
    for path in experts {
        // The second half of each file is the large tier.
        let mut bytes = std::fs::read(&path).unwrap();
        let half = bytes.len() / 2;
        for at in (half..bytes.len()).step_by(512) {
            bytes[at] ^= 1;
        }
        std::fs::write(&path, bytes).unwrap();
    }
    let state = tempfile::tempdir().unwrap();
    let config = Config { tier_set: vec!["small".into()], ..Config::default() };
    let node = Node::start(NodeOptions { threads: 1, ..NodeOptions::new(&native, state.path(), config) });
    let node = node.unwrap();
    let (_, finish) = collect(&node.submit(id("small"), oracle.body(1), 0), 0);
    assert_eq!(finish, Some(FinishReason::Length), "the small tier is whole");
    let refused = node.switch(SwitchTarget::Tiers(vec![]), None).recv().unwrap();
    assert!(refused.unwrap_err().contains("corrupt"), "a tier that does not verify is not switched to");
    let (_, finish) = collect(&node.submit(id("after"), oracle.body(1), 0), 0);
    assert_eq!(finish, Some(FinishReason::Length), "the old tiers go on");
}

/// Sees that all is as it was, then panics.
struct Bomb {
    routes: u32,
}

impl Capture for Bomb {
    fn wants_logits(&self, _: u64) -> bool {
        false
    }
    fn logits(&mut self, _: u64, _: u32, _: &[f32]) {}
    fn routes(&mut self, _: u64, _: u32, _: u32, _: &[u32], _: &[f32]) {
        self.routes += 1;
        assert!(self.routes < 40, "boom");
    }
}

#[test]
fn a_panic_is_reported_and_leaves_a_journal_that_goes_on() {
    let oracle = Oracle::of("olmoe");
    let state = tempfile::tempdir().unwrap();
    let mut options = oracle.options(state.path());
    options.capture = Some(Box::new(Bomb { routes: 0 }));
    let node = Node::start(options).unwrap();
    let events = node.submit(id("r"), oracle.body(1), 0);
    let finished = events.into_iter().any(|event| matches!(event, StreamEvent::Finish { .. }));
    assert!(!finished, "the stream breaks off");
    let Err(NodeError::Panic { thread, message, .. }) = node.wait() else { panic!("no panic") };
    assert_eq!((thread, message.as_str()), ("compute", "boom"));

    let mut options = oracle.options(state.path());
    options.on_event = Some(Box::new(|_, event| {
        assert!(!matches!(event, Event::StepDone { .. }), "bang");
    }));
    let node = Node::start(options).unwrap();
    let Err(NodeError::Panic { seq, thread, message }) = node.wait() else { panic!("no panic") };
    assert_eq!((thread, message.as_str()), ("node", "bang"));
    let disk = &mut FileDisk::open_read_only(state.path()).unwrap();
    assert_eq!(scan(disk).unwrap().records.last().unwrap().seq, seq.0, "every input is in the log");

    let node = oracle.start(state.path());
    let events = node.submit(id("r"), oracle.body(1), 0);
    assert_eq!(collect(&events, 0).0, oracle.greedy[1]);
}
