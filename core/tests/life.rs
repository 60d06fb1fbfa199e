//! The engine's life by hand: boot, refusals, recovery, drain, and the encodings that journals depend on.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::config::{Config, Placement};
use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::ids::{ExpertKey, Incarnation, LoadId, RequestId, Seq, StepId, WishId};
use lite_llm_core::input::{Body, Fault, Input, RowResult, SwitchTarget, Wish};
use lite_llm_core::lifecycle::Lifecycle;
use lite_llm_core::output::{FinishReason, Granted, Output, Refusal};
use lite_llm_core::plan::{Identity, ModelPlan, TierPlan};
use lite_llm_core::replay::{DecodeError, decode_input, encode_input};

fn plan() -> ModelPlan {
    ModelPlan {
        format: ModelPlan::FORMAT,
        identity: Identity::default(),
        tiers: vec![
            TierPlan { name: "base".into(), groups: 1, experts: 2, placement: Placement::Hot },
            TierPlan { name: "extra".into(), groups: 1, experts: 2, placement: Placement::Hot },
        ],
        layers: 2,
        moe_layers: vec![0, 1],
        top_k: 2,
        slot_bytes: 100,
        base_shards: vec![500, 200],
        router_bytes: 50,
        overhead_bytes: 250,
        page_positions: 4,
        page_bytes: 40,
        kv_groups: vec![None],
        context: 32,
        vocab: 50,
        eos: vec![2],
    }
}

fn config() -> Config {
    Config { memory_bytes: 1000 + 800 + 40 * 8, ..Config::default() }
}

fn feed(engine: &mut Engine, input: Input) -> Vec<Output> {
    let now = engine.now().after_ns(1);
    engine.handle(now, input);
    let mut outputs = Vec::new();
    loop {
        match engine.poll() {
            Output::Wait { .. } => return outputs,
            output => outputs.push(output),
        }
    }
}

fn boot(config: Config) -> (Engine, Vec<Output>) {
    let mut engine = Engine::new();
    let outputs =
        feed(&mut engine, Input::Boot { incarnation: Incarnation(1), config: config.into(), entropy: 7 });
    (engine, outputs)
}

/// Answers everything that boot asks for; returns all that was said.
fn load(engine: &mut Engine, plan: &ModelPlan, mut outputs: Vec<Output>) -> Vec<Output> {
    let mut all = Vec::new();
    while !outputs.is_empty() {
        let mut next = Vec::new();
        for output in outputs {
            let answer = match &output {
                Output::Reserve { .. } => Some(Input::Reserved),
                Output::ReadManifest => Some(Input::ManifestRead { plan: Box::new(plan.clone()) }),
                Output::LoadBase { shard } => Some(Input::BaseLoaded { shard: *shard }),
                Output::Load { load, .. } | Output::Stage { load, .. } => {
                    Some(Input::Loaded { load: *load, fault: None })
                }
                Output::LoadRouters => Some(Input::RoutersLoaded),
                _ => None,
            };
            all.push(output);
            next.extend(answer.into_iter().flat_map(|answer| feed(engine, answer)));
        }
        outputs = next;
    }
    all
}

fn ready(config: Config) -> Engine {
    let (mut engine, outputs) = boot(config);
    load(&mut engine, &plan(), outputs);
    assert_eq!(engine.view().lifecycle(), Lifecycle::Active);
    engine
}

fn exit_error(outputs: &[Output]) -> String {
    let error = outputs.iter().find_map(|output| match output {
        Output::Exit { error, .. } => error.clone(),
        _ => None,
    });
    error.unwrap_or_else(|| panic!("no exit with an error: {outputs:?}"))
}

fn refusal(outputs: &[Output]) -> String {
    let reason = outputs.iter().find_map(|output| match output {
        Output::Refuse { reason, .. } => Some(reason.clone()),
        Output::Switched { outcome: Err(reason), .. } => Some(reason.clone()),
        _ => None,
    });
    reason.unwrap_or_else(|| panic!("nothing is refused: {outputs:?}"))
}

fn id(name: &str) -> RequestId {
    RequestId::new(name).unwrap()
}

fn submit(name: &str, body: Body) -> Input {
    Input::Submit { id: id(name), body: body.into(), from: 0 }
}

fn body(prompt: &[u32], max_tokens: u32) -> Body {
    Body { prompt: prompt.to_vec(), max_tokens, ..Body::default() }
}

/// Computes the running step, choosing `token` in every row that samples.
fn compute(engine: &mut Engine, outputs: &[Output], token: u32) -> Vec<Output> {
    let forward = outputs.iter().find_map(|output| match output {
        Output::Forward(forward) => Some(forward.clone()),
        _ => None,
    });
    let forward = forward.unwrap_or_else(|| panic!("no step: {outputs:?}"));
    let row =
        |sample: bool| RowResult { token: sample.then_some(token), stop: false, digest: Digest::default() };
    let rows = forward.rows.iter().map(|r| row(r.sample.is_some())).collect();
    feed(engine, Input::Finished { step: forward.step, attempt: forward.attempt, rows, duration_ns: 5 })
}

/// Every layer sees six positions: the pages of a request do not grow with it.
#[test]
fn pages_of_windows_go_round() {
    let plan = ModelPlan { kv_groups: vec![Some(6); 2], ..plan() };
    // Six positions touch three pages at most, in each of two groups.
    let (mut engine, outputs) = boot(Config { memory_bytes: 1000 + 800 + 40 * 6, ..config() });
    load(&mut engine, &plan, outputs);
    let pages = engine.view().carving().pages;
    let mut outputs = feed(&mut engine, submit("a", body(&[3; 20], 12)));
    let mut held_most = 0;
    while engine.view().requests().next().is_some() {
        outputs = compute(&mut engine, &outputs, 5);
        let held = |run: &lite_llm_core::pages::PageRun| run.pages.len();
        held_most = held_most.max(engine.view().requests().flat_map(|r| r.pages).map(held).sum());
    }
    assert_eq!((pages, held_most), (6, 6));
    assert_eq!(engine.view().pages_free(), 6, "all are back");
    let blind = ModelPlan { kv_groups: vec![Some(0)], ..plan };
    assert!(blind.check().is_err_and(|error| error.contains("window")));
}

#[test]
fn boot_says_every_phase_in_order() {
    let (mut engine, outputs) = boot(config());
    let said = load(&mut engine, &plan(), outputs);
    insta::assert_debug_snapshot!(said);
}

#[test]
fn a_bad_configuration_is_refused_by_key() {
    let limits = lite_llm_core::config::Limits { rows_max: 0, ..Default::default() };
    for (config, key) in [
        (Config { prefill_chunk: 0, ..config() }, "prefill_chunk"),
        (Config { limits, ..config() }, "limits.rows_max"),
        (Config { memory_bytes: 0, ..config() }, "memory_bytes"),
        (Config { training: true, ..config() }, "training"),
    ] {
        let (engine, outputs) = boot(config);
        assert!(exit_error(&outputs).contains(key), "{outputs:?}");
        assert_eq!(engine.view().lifecycle(), Lifecycle::Stopped);
    }
    for (config, key) in [
        (Config { tier_set: vec!["none".into()], ..config() }, "tier_set: unknown tier \"none\""),
        (Config { modes: [("deep".into(), vec!["none".into()])].into(), ..config() }, "modes.deep"),
        (Config { placement: [("none".into(), Placement::Warm)].into(), ..config() }, "placement"),
    ] {
        let (mut engine, outputs) = boot(config);
        assert!(exit_error(&load(&mut engine, &plan(), outputs)).contains(key));
    }
}

#[test]
fn a_budget_that_does_not_do_is_refused_with_the_number_that_does() {
    let (mut engine, outputs) = boot(Config { memory_bytes: 1200, ..config() });
    let error = exit_error(&load(&mut engine, &plan(), outputs));
    assert!(error.contains("at least 1240"), "{error}");
    let engine = ready(Config { memory_bytes: 1240, ..config() });
    let carving = engine.view().carving();
    assert_eq!((carving.slots, carving.pages), (2, 1));
}

#[test]
fn a_manifest_of_another_version_or_an_impossible_one_is_refused() {
    for (broken, word) in [
        (ModelPlan { format: 9, ..plan() }, "format 9"),
        (ModelPlan { page_positions: 0, ..plan() }, "page size"),
        (ModelPlan { top_k: 0, ..plan() }, "top_k"),
        (ModelPlan { moe_layers: vec![1, 0], ..plan() }, "ascend"),
        (
            ModelPlan {
                tiers: vec![TierPlan {
                    name: "x".into(),
                    groups: u32::MAX,
                    experts: 2,
                    placement: Placement::Hot,
                }],
                ..plan()
            },
            "too many",
        ),
    ] {
        let (mut engine, outputs) = boot(config());
        let error = exit_error(&load(&mut engine, &broken, outputs));
        assert!(error.contains(word), "{error}");
    }
}

#[test]
fn bad_requests_are_refused_with_the_reason() {
    let mut engine = ready(config());
    let mut bad = body(&[3], 4);
    bad.sampling.top_p = f32::NAN;
    for (body, word) in [
        (body(&[], 4), "is empty"),
        (body(&[3, 50], 4), "token 50"),
        (body(&[3; 33], 4), "context"),
        (body(&[3], 0), "max_tokens"),
        (bad, "top_p"),
        (Body { stop: vec![String::new()], ..body(&[3], 4) }, "stop"),
    ] {
        let outputs = feed(&mut engine, submit("a", body));
        assert!(refusal(&outputs).contains(word), "{outputs:?}");
    }
    let outputs = feed(&mut engine, Input::Submit { id: id("a"), body: body(&[3], 4).into(), from: 1 });
    assert!(refusal(&outputs).contains("offset 1"));
    assert!(refusal(&feed(&mut engine, Input::Cancel { id: id("a") })).contains("no such request"));
    let mode = Input::Switch { target: SwitchTarget::Mode("deep".into()), at: None };
    assert!(refusal(&feed(&mut engine, mode)).contains("unknown mode"));
}

#[test]
fn an_id_attaches_to_its_own_body_only() {
    let mut engine = ready(config());
    let outputs = feed(&mut engine, submit("a", body(&[3, 4], 2)));
    let outputs = compute(&mut engine, &outputs, 9);
    let again = feed(&mut engine, submit("a", body(&[3, 4], 2)));
    assert!(matches!(
        &again[..],
        [Output::Accepted { generated: 1, .. }, Output::Token { offset: 0, token: 9, .. }]
    ));
    assert!(refusal(&feed(&mut engine, submit("a", body(&[3, 5], 2)))).contains("another body"));
    let end = compute(&mut engine, &outputs, 8);
    assert!(
        end.iter().any(|o| matches!(o, Output::Finish { reason: FinishReason::Length, generated: 2, .. }))
    );
    let again = feed(&mut engine, Input::Submit { id: id("a"), body: body(&[3, 4], 2).into(), from: 1 });
    assert_eq!(again.len(), 3, "accepted, the second token, the end: {again:?}");
}

#[test]
fn of_the_streams_that_ended_the_first_goes_first() {
    let limits = lite_llm_core::config::Limits { finished_max: 1, ..Default::default() };
    let mut engine = ready(Config { limits, ..config() });
    let mut outputs = feed(&mut engine, submit("long", body(&[5], 3)));
    outputs.extend(feed(&mut engine, submit("short", body(&[6], 1))));
    while outputs.iter().any(|output| matches!(output, Output::Forward(_))) {
        outputs = compute(&mut engine, &outputs, 9);
    }
    // The one that was accepted first ended last.
    feed(&mut engine, Input::Tick);
    assert!(refusal(&feed(&mut engine, submit("short", body(&[6], 1)))).contains("expired"));
    let kept = feed(&mut engine, submit("long", body(&[5], 3)));
    assert!(kept.iter().any(|output| matches!(output, Output::Finish { .. })), "{kept:?}");
}

#[test]
fn a_deadline_ends_a_request_and_is_waited_for() {
    let mut engine = ready(Config { prefill_chunk: 1, ..config() });
    let late = Body { deadline_ns: Some(100), ..body(&[3, 4, 5], 9) };
    let outputs = feed(&mut engine, submit("a", late));
    let due = engine.now().after_ns(100);
    assert!(matches!(engine.poll(), Output::Wait { until: Some(until), .. } if until == due));
    engine.handle(due, Input::Tick);
    assert!(matches!(engine.poll(), Output::Wait { .. }), "the running step is waited for");
    let outputs = compute(&mut engine, &outputs, 9);
    assert!(outputs.iter().any(|o| matches!(o, Output::Finish { reason: FinishReason::Deadline, .. })));
}

#[test]
fn numbers_that_are_not_finite_end_the_request_that_has_them() {
    let mut engine = ready(config());
    let first = feed(&mut engine, submit("a", body(&[3], 3)));
    feed(&mut engine, submit("b", body(&[4], 3)));
    let outputs = compute(&mut engine, &first, 9);
    let Some(Output::Forward(forward)) = outputs.iter().find(|o| matches!(o, Output::Forward(_))) else {
        panic!("no step: {outputs:?}")
    };
    assert_eq!(forward.rows.len(), 2, "both run together");
    let fault = Fault::NonFinite { row: 1, layer: 1, position: 0 };
    let outputs = feed(&mut engine, Input::Failed { step: forward.step, attempt: 0, fault });
    let ended = outputs.iter().find_map(|output| match output {
        Output::Finish { id, reason: FinishReason::Fault(what), .. } => {
            Some((id.as_str().to_owned(), what.clone()))
        }
        _ => None,
    });
    let (who, what) = ended.unwrap();
    assert_eq!(who, "b");
    assert!(what.contains("layer 1 at position 0"), "{what}");
    assert!(outputs.iter().any(|output| matches!(output, Output::Forward(_))), "the other goes on");
}

#[test]
fn another_model_is_refused_after_a_restart() {
    let mut engine = ready(config());
    let restart = |engine: &mut Engine, config: Config| {
        let incarnation = Incarnation(engine.view().incarnation().0 + 1);
        feed(engine, Input::Restarted { incarnation, config: config.into(), entropy: 8 })
    };
    let seed = engine.view().routing_seed();
    let outputs = restart(&mut engine, config());
    let identity = Identity { contract: 9, ..Identity::default() };
    let error = exit_error(&load(&mut engine, &ModelPlan { identity, ..plan() }, outputs));
    assert!(error.contains("under 9"), "{error}");
    let error = exit_error(&restart(&mut engine, Config { routing_seed: Some(5), ..config() }));
    assert!(error.contains("routing_seed is 5"), "{error}");
    let outputs = restart(&mut engine, config());
    load(&mut engine, &plan(), outputs);
    assert_eq!((engine.view().lifecycle(), engine.view().routing_seed()), (Lifecycle::Active, seed));
}

#[test]
fn a_drain_finishes_what_is_there_and_releases_everything() {
    let mut engine = ready(config());
    let step = feed(&mut engine, submit("a", body(&[3], 1)));
    feed(&mut engine, Input::Drain { bound_ns: None });
    assert!(refusal(&feed(&mut engine, submit("b", body(&[3], 1)))).contains("draining"));
    let outputs = compute(&mut engine, &step, 9);
    assert!(outputs.contains(&Output::FlushTelemetry), "{outputs:?}");
    assert!(feed(&mut engine, Input::TelemetryFlushed).contains(&Output::Release));
    let outputs = feed(&mut engine, Input::ResourcesReleased);
    assert!(matches!(outputs.last(), Some(Output::Exit { error: None, .. })));
    assert_eq!((engine.view().slots().count(), engine.view().pages_free()), (0, 0));
}

#[test]
fn a_drain_whose_bound_is_over_waits_for_no_time() {
    let mut engine = ready(config());
    feed(&mut engine, submit("a", body(&[3], 4)));
    feed(&mut engine, Input::Drain { bound_ns: Some(100) });
    let due = engine.now().after_ns(99);
    assert!(matches!(engine.poll(), Output::Wait { until: Some(until), .. } if until > engine.now()));
    engine.handle(due.after_ns(1), Input::Tick);
    let waited = std::iter::repeat_with(|| engine.poll()).find_map(|output| match output {
        Output::Wait { until, .. } => Some(until),
        _ => None,
    });
    assert_eq!(waited, Some(None), "only the step can end it");
}

#[test]
fn a_budget_chooses_the_largest_mode_whose_measured_steps_keep_it() {
    let modes = [("fast", vec!["base"]), ("max", vec!["base", "extra"])]
        .map(|(mode, tiers)| (mode.to_owned(), tiers.into_iter().map(str::to_owned).collect()));
    let mut engine = ready(Config { modes: modes.into(), ..config() });
    // A step under both tiers is measured to take 5 ns, so one under half of the experts is taken to need 2.
    let step = feed(&mut engine, submit("a", body(&[3], 1)));
    compute(&mut engine, &step, 9);
    for (budget_ns, tiers) in
        [(4, vec!["base"]), (5, vec!["base", "extra"]), (1, vec!["base"]), (u64::MAX, vec!["base", "extra"])]
    {
        let outputs = feed(&mut engine, Input::Switch { target: SwitchTarget::Budget(budget_ns), at: None });
        load(&mut engine, &plan(), outputs);
        assert_eq!(engine.view().lifecycle(), Lifecycle::Active);
        let generation = engine.view().generation().unwrap();
        let names =
            engine.view().generations().into_iter().find(|(known, _)| *known == generation).unwrap().1;
        assert_eq!(names, tiers, "within {budget_ns} ns");
    }
    let mut without = ready(config());
    let outputs = feed(&mut without, Input::Switch { target: SwitchTarget::Budget(5), at: None });
    assert!(refusal(&outputs).contains("no modes"));
}

#[test]
fn blobs_go_once_and_only_when_their_bytes_do_not_come_back() {
    // Streams that are over are soon forgotten, and refer to nothing.
    let limits = lite_llm_core::config::Limits { finished_age_ns: 1, ..Default::default() };
    let mut engine = ready(Config { limits, ..config() });
    let expert = ExpertKey { layer: 0, tier: 0, group: 0, expert: 0 };
    let other = ExpertKey { expert: 1, ..expert };
    let [x, y] = [1, 2].map(|byte| Digest([byte; 32]));
    let retired = |outputs: &[Output]| -> Vec<Digest> {
        let blobs = outputs.iter().filter_map(|output| match output {
            Output::Retire { blob, .. } => Some(*blob),
            _ => None,
        });
        blobs.collect()
    };
    let modify = |engine: &mut Engine, blob| {
        let experts = vec![(expert, blob), (other, blob)];
        let outputs = feed(engine, Input::Modify { experts });
        outputs.iter().find_map(|output| match output {
            Output::Persist { asked, .. } => Some(*asked),
            _ => None,
        })
    };
    let persisted = |engine: &mut Engine, asked| {
        let outputs = feed(engine, Input::Persisted { asked, fault: None });
        load(engine, &plan(), outputs)
    };
    let asked = modify(&mut engine, x).unwrap();
    persisted(&mut engine, asked);
    // One position under x, then y, then x is to come back while nothing else refers to it any more.
    let step = feed(&mut engine, submit("a", body(&[3], 3)));
    let step = compute(&mut engine, &step, 9);
    let asked = modify(&mut engine, y).unwrap();
    feed(&mut engine, Input::Persisted { asked, fault: None });
    let outputs = compute(&mut engine, &step, 9);
    assert_eq!(retired(&outputs), [], "a position refers to x");
    let step = load(&mut engine, &plan(), outputs);
    let asked = modify(&mut engine, x).unwrap();
    let outputs = if step.iter().any(|o| matches!(o, Output::Forward(_))) {
        compute(&mut engine, &step, 9)
    } else {
        panic!("the request goes on: {step:?}")
    };
    assert!(outputs.iter().any(|o| matches!(o, Output::Finish { .. })), "{outputs:?}");
    feed(&mut engine, Input::Tick);
    let base = Input::Switch { target: SwitchTarget::Tiers(vec!["base".into()]), at: None };
    let outputs = feed(&mut engine, base);
    assert_eq!(retired(&load(&mut engine, &plan(), outputs)), [], "x is about to come back");
    let outputs = persisted(&mut engine, asked);
    assert_eq!(retired(&outputs), [y], "two experts had it, and it goes once");
    assert_eq!(modify(&mut engine, y), None, "its removal is under way");
    feed(&mut engine, Input::Retired { blob: y });
    // Bytes that never became durable are cleared away too, in this life or the next.
    let asked = modify(&mut engine, y).unwrap();
    let full = Some(Fault::Io("disk full".into()));
    assert_eq!(retired(&feed(&mut engine, Input::Persisted { asked, fault: full })), [y]);
    let incarnation = Incarnation(2);
    let outputs = feed(&mut engine, Input::Restarted { incarnation, config: config().into(), entropy: 8 });
    assert_eq!(retired(&outputs), [y], "the removal is asked for until it is answered");
}

/// The journal's format: these bytes change only with `LOGIC_VERSION`.
#[test]
fn inputs_have_golden_bytes() {
    let expert = ExpertKey { layer: 1, tier: 0, group: 2, expert: 300 };
    let (step, attempt) = (StepId(300), 1);
    let row = RowResult { token: Some(17), stop: false, digest: Digest([7; 32]) };
    let inputs = [
        Input::Boot { incarnation: Incarnation(1), config: Config::default().into(), entropy: 9 },
        Input::ManifestRead { plan: plan().into() },
        Input::Loaded { load: LoadId(3), fault: Some(Fault::Io("gone".into())) },
        submit("a", body(&[1, 2, 300], 16)),
        Input::Switch { target: SwitchTarget::Tiers(vec!["base".into()]), at: Some((id("a"), 5)) },
        Input::Need { step, attempt, layer: 1, experts: vec![expert], foreseen: vec![] },
        Input::Released { step, attempt, layer: 1, wave: 0 },
        Input::Finished { step, attempt, rows: vec![row], duration_ns: 1000 },
        Input::SnapshotDurable { next: Seq(9) },
        Input::ResourcesReleased,
        Input::Wish { id: WishId(300), wish: Wish::Cancel { id: id("a") } },
    ];
    let mut golden = String::new();
    for input in &inputs {
        let bytes = encode_input(input);
        assert_eq!(decode_input(&bytes).as_ref(), Ok(input));
        assert_eq!(decode_input::<Input>(&[&bytes[..], &[0]].concat()), Err(DecodeError::Trailing(1)));
        golden.extend(bytes.iter().map(|byte| format!("{byte:02x}")));
        golden.push('\n');
    }
    insta::assert_snapshot!(golden);
}

#[test]
fn a_snapshot_restores_the_very_state() {
    let mut engine = ready(config());
    feed(&mut engine, submit("a", body(&[3, 4, 5], 9)));
    let restored = Engine::restore(&engine.snapshot()).unwrap();
    assert_eq!((restored.digest(), restored.state_digest()), (engine.digest(), engine.state_digest()));
    let bytes = engine.snapshot();
    assert!(Engine::restore(&bytes[..bytes.len() - 1]).is_err());
    assert!(Engine::restore(&[&bytes[..], &[0]].concat()).is_err());
}

fn wish(engine: &mut Engine, number: u64, wish: Wish) -> Vec<Output> {
    feed(engine, Input::Wish { id: WishId(number), wish })
}

/// What was told of a wish, which is told once.
fn answer(outputs: &[Output], number: u64) -> Option<Result<Granted, (Refusal, String)>> {
    let mut told = outputs.iter().filter_map(|output| match output {
        Output::Answered { id, outcome, .. } if *id == WishId(number) => Some(outcome.clone()),
        _ => None,
    });
    let first = told.next();
    assert!(told.next().is_none(), "{outputs:?}");
    first
}

fn tiers(name: &str, at: Option<(RequestId, u32)>) -> Wish {
    Wish::Switch { target: SwitchTarget::Tiers(vec![name.into()]), at }
}

/// Asked for again, before or after it is done, in this life or the next, a wish is the one that it was.
#[test]
fn a_wish_is_done_once_however_often_it_is_asked_for() {
    let mut engine = ready(config());
    let mut outputs = feed(&mut engine, submit("a", body(&[3, 4], 9)));
    assert_eq!(
        answer(&wish(&mut engine, 1, tiers("base", Some((id("a"), 3)))), 1),
        None,
        "its position is to come"
    );
    outputs = compute(&mut engine, &outputs, 5);
    assert_eq!(answer(&wish(&mut engine, 1, tiers("base", Some((id("a"), 3)))), 1), None);
    outputs = compute(&mut engine, &outputs, 5);
    let granted = Some(Ok(Granted::Switched(lite_llm_core::ids::Generation(1))));
    assert_eq!(answer(&outputs, 1), granted);
    // Somebody else wishes something else meanwhile.
    let loads = wish(&mut engine, 2, tiers("extra", None));
    load(&mut engine, &plan(), loads);
    outputs = compute(&mut engine, &outputs, 5);
    assert_eq!(answer(&outputs, 2), Some(Ok(Granted::Switched(lite_llm_core::ids::Generation(2)))));
    assert_eq!(
        answer(&wish(&mut engine, 1, tiers("base", Some((id("a"), 3)))), 1),
        granted,
        "it is not done again"
    );
    assert!(matches!(
        answer(&wish(&mut engine, 3, tiers("none", None)), 3),
        Some(Err((Refusal::Invalid, _)))
    ));
    // In the next life it is known too; what comes too early is to be asked for again, and is not kept.
    let incarnation = Incarnation(2);
    let restarted = feed(&mut engine, Input::Restarted { incarnation, config: config().into(), entropy: 8 });
    let early = answer(&wish(&mut engine, 4, tiers("base", None)), 4);
    assert!(matches!(early, Some(Err((Refusal::NotServing, _)))), "{early:?}");
    load(&mut engine, &plan(), restarted);
    assert_eq!(answer(&wish(&mut engine, 1, tiers("base", None)), 1), granted);
    assert_eq!(answer(&wish(&mut engine, 4, Wish::Cancel { id: id("a") }), 4), Some(Ok(Granted::Cancelled)));
    assert!(matches!(answer(&wish(&mut engine, 5, Wish::Cancel { id: id("b") }), 5), Some(Err(_))));
    let restored = Engine::restore(&engine.snapshot()).unwrap();
    assert_eq!(restored.state_digest(), engine.state_digest());
}

#[test]
fn a_wished_snapshot_is_answered_when_it_is_durable_or_never_will_be() {
    let mut engine = ready(config());
    let outputs = wish(&mut engine, 1, Wish::Snapshot);
    assert!(outputs.contains(&Output::Snapshot) && answer(&outputs, 1).is_none());
    let next = engine.next_seq();
    // A life in between writes another; one that was wished after it began waits for the next.
    let incarnation = Incarnation(2);
    let restarted = feed(&mut engine, Input::Restarted { incarnation, config: config().into(), entropy: 8 });
    let said = load(&mut engine, &plan(), restarted);
    assert!(said.contains(&Output::Snapshot), "{said:?}");
    wish(&mut engine, 2, Wish::Snapshot);
    let durable = Seq(next.0 + 1);
    let outputs = feed(&mut engine, Input::SnapshotDurable { next: durable });
    assert_eq!(answer(&outputs, 1), Some(Ok(Granted::Snapshot(durable))));
    assert!(answer(&outputs, 2).is_none() && outputs.contains(&Output::Snapshot));
    wish(&mut engine, 3, Wish::Snapshot);
    let outputs = feed(&mut engine, Input::Drain { bound_ns: None });
    assert!(answer(&outputs, 2).is_none(), "it is being written");
    assert!(matches!(answer(&outputs, 3), Some(Err((Refusal::Invalid, _)))));
    let outputs = wish(&mut engine, 4, Wish::Snapshot);
    assert!(matches!(answer(&outputs, 4), Some(Err((Refusal::Invalid, _)))));
    let next = engine.next_seq();
    let outputs = feed(&mut engine, Input::SnapshotDurable { next });
    assert!(matches!(answer(&outputs, 2), Some(Ok(_))));
}
