//! The arenas by hand: what is loaded ahead, what is promoted and demoted, what becomes of it after a fault.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use lite_llm_core::config::{Config, Foresight, Limits, Placement};
use lite_llm_core::digest::Digest;
use lite_llm_core::engine::Engine;
use lite_llm_core::event::Event;
use lite_llm_core::ids::{ExpertKey, Incarnation, LoadId, RequestId, Slot};
use lite_llm_core::input::{Body, Fault, Input, RowResult};
use lite_llm_core::output::{Origin, Output};
use lite_llm_core::plan::{Identity, ModelPlan, TierPlan};

/// Two layers of four experts, in slots of 100 bytes.
fn plan() -> ModelPlan {
    let tier = |name: &str, placement| TierPlan { name: name.into(), groups: 1, experts: 2, placement };
    ModelPlan {
        format: ModelPlan::FORMAT,
        identity: Identity::default(),
        tiers: vec![tier("base", Placement::Hot), tier("extra", Placement::Warm)],
        layers: 2,
        moe_layers: vec![0, 1],
        top_k: 2,
        slot_bytes: 100,
        base_shards: vec![700],
        router_bytes: 50,
        overhead_bytes: 250,
        page_positions: 4,
        page_bytes: 40,
        kv_groups: vec![None],
        context: 4,
        vocab: 50,
        eos: vec![],
    }
}

/// Room for two experts that steps can read, and so many more.
fn config(warm: u64) -> Config {
    let limits = Limits { retries_max: 1, ..Limits::default() };
    Config { memory_bytes: 1000 + 40 + 200 + 100 * warm, warm_bytes: 100 * warm, limits, ..Config::default() }
}

const fn key(layer: u32, tier: u32, expert: u32) -> ExpertKey {
    ExpertKey { layer, tier, group: 0, expert }
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

/// Boots to the end; returns everything that was said.
fn boot(config: Config) -> (Engine, Vec<Output>) {
    let mut engine = Engine::new();
    let mut said =
        feed(&mut engine, Input::Boot { incarnation: Incarnation(1), config: config.into(), entropy: 7 });
    let mut next = 0;
    while let Some(output) = said.get(next) {
        next += 1;
        let answer = match output {
            Output::Reserve { .. } => Input::Reserved,
            Output::ReadManifest => Input::ManifestRead { plan: plan().into() },
            Output::LoadBase { shard } => Input::BaseLoaded { shard: *shard },
            Output::Load { load, .. } | Output::Stage { load, .. } => {
                Input::Loaded { load: *load, fault: None }
            }
            Output::LoadRouters => Input::RoutersLoaded,
            _ => continue,
        };
        said.extend(feed(&mut engine, answer));
    }
    (engine, said)
}

/// A booted engine with a running step.
fn stepping(warm: u64) -> Rig {
    stepping_with(config(warm))
}

fn stepping_with(config: Config) -> Rig {
    let (mut engine, _) = boot(config);
    let body = Body { prompt: vec![3], max_tokens: 1, ..Body::default() };
    let outputs =
        feed(&mut engine, Input::Submit { id: RequestId::new("a").unwrap(), body: body.into(), from: 0 });
    let forward = outputs.into_iter().find_map(|output| match output {
        Output::Forward(forward) => Some(forward),
        _ => None,
    });
    Rig { engine, step: forward.unwrap().step }
}

struct Rig {
    engine: Engine,
    step: lite_llm_core::ids::StepId,
}

impl Rig {
    /// The step needs experts: the loads that come of it.
    fn need(&mut self, layer: u32, experts: Vec<ExpertKey>) -> Vec<(LoadId, ExpertKey, Slot, Origin)> {
        self.foresee(layer, experts, vec![])
    }

    /// The same, with what the next layer will probably need.
    fn foresee(
        &mut self,
        layer: u32,
        experts: Vec<ExpertKey>,
        foreseen: Vec<ExpertKey>,
    ) -> Vec<(LoadId, ExpertKey, Slot, Origin)> {
        let need = Input::Need { step: self.step, attempt: 0, layer, experts, foreseen };
        loads(feed(&mut self.engine, need))
    }

    fn loaded(&mut self, load: LoadId, fault: Option<Fault>) -> Vec<Output> {
        feed(&mut self.engine, Input::Loaded { load, fault })
    }

    fn released(&mut self, layer: u32) {
        feed(&mut self.engine, Input::Released { step: self.step, attempt: 0, layer, wave: 0 });
    }

    /// Needs one expert, loads it, and lets it go: where it came from.
    fn visit(&mut self, expert: ExpertKey) -> Option<Origin> {
        let loads = self.need(expert.layer, vec![expert]);
        let origin = loads.first().map(|&(load, _, _, origin)| {
            self.loaded(load, None);
            origin
        });
        self.released(expert.layer);
        origin
    }

    /// The experts of the hot and of the warm arena.
    fn arenas(&self) -> [Vec<Option<ExpertKey>>; 2] {
        let view = self.engine.view();
        [view.slots().map(|slot| slot.expert).collect(), view.warm_slots().map(|slot| slot.expert).collect()]
    }
}

fn loads(outputs: Vec<Output>) -> Vec<(LoadId, ExpertKey, Slot, Origin)> {
    let load = |output| match output {
        Output::Load { load, expert, slot, origin, .. } => Some((load, expert, slot, origin)),
        _ => None,
    };
    outputs.into_iter().filter_map(load).collect()
}

#[test]
fn boot_fills_the_hot_arena_then_the_warm_one() {
    let (engine, said) = boot(config(3));
    let carving = engine.view().carving();
    assert_eq!((carving.slots, carving.warm_slots, carving.pages), (2, 3, 1));
    let begun: Vec<(&str, ExpertKey, Slot)> = said
        .iter()
        .filter_map(|output| match output {
            Output::Load { expert, slot, origin: Origin::Disk { keep: None }, .. } => {
                Some(("hot", *expert, *slot))
            }
            Output::Stage { expert, slot, .. } => Some(("warm", *expert, *slot)),
            _ => None,
        })
        .collect();
    let expected = [
        ("hot", key(0, 0, 0), Slot(0)),
        ("hot", key(0, 0, 1), Slot(1)),
        ("warm", key(1, 0, 0), Slot(0)),
        ("warm", key(1, 0, 1), Slot(1)),
        ("warm", key(0, 1, 0), Slot(2)),
    ];
    assert_eq!(begun, expected, "the placement policy says who comes first");
    assert!(engine.view().slots().chain(engine.view().warm_slots()).all(|slot| slot.ready));
}

#[test]
fn a_warm_expert_changes_places_with_the_one_that_has_to_go() {
    let mut rig = stepping(2);
    let warm = Origin::Warm { slot: Slot(0), exchange: true };
    assert_eq!(rig.visit(key(1, 0, 0)), Some(warm));
    let [hot, staged] = rig.arenas();
    assert_eq!(hot, [Some(key(1, 0, 0)), Some(key(0, 0, 1))]);
    assert_eq!(staged, [Some(key(0, 0, 0)), Some(key(1, 0, 1))], "nobody is forgotten");
    assert_eq!(rig.visit(key(1, 0, 0)), None, "what is hot is not loaded");
}

#[test]
fn what_is_used_displaces_what_is_not() {
    let mut rig = stepping(1);
    // Used once in the hot arena, it is worth more than the warm one, which never was.
    assert_eq!(rig.visit(key(0, 0, 0)), None);
    assert_eq!(rig.visit(key(0, 0, 1)), None);
    assert_eq!(rig.visit(key(1, 1, 0)), Some(Origin::Disk { keep: Some(Slot(0)) }));
    let [hot, warm] = rig.arenas();
    assert_eq!(hot, [Some(key(1, 1, 0)), Some(key(0, 0, 1))]);
    assert_eq!(warm, [Some(key(0, 0, 0))]);
    // The tier that is placed warm is worth less than any that is placed hot, however often it is used.
    assert_eq!(rig.visit(key(1, 1, 0)), None);
    assert_eq!(rig.visit(key(1, 1, 1)), Some(Origin::Disk { keep: None }));
    assert_eq!(rig.arenas()[1], [Some(key(0, 0, 0))]);
    // It comes back with its count of use.
    assert_eq!(rig.visit(key(0, 0, 0)), Some(Origin::Warm { slot: Slot(0), exchange: true }));
    assert_eq!(rig.arenas(), [vec![Some(key(0, 0, 0)), Some(key(0, 0, 1))], vec![Some(key(1, 1, 1))]]);
    rig.visit(key(1, 0, 0));
    assert_eq!(rig.arenas()[0], [Some(key(0, 0, 0)), Some(key(1, 0, 0))], "used twice, it stays");
}

/// Where a layer needs more than there is room for, everything comes and goes; what is used most stays all the same.
#[test]
fn what_comes_back_is_worth_what_it_was() {
    let mut rig = stepping(0);
    let (popular, others) = (key(0, 0, 0), [key(0, 0, 1), key(1, 0, 0), key(1, 0, 1)]);
    for _ in 0..3 {
        rig.visit(popular);
    }
    // Two that are used as often drive it out, and it comes back, in the place of one of them.
    for _ in 0..3 {
        rig.visit(others[0]);
    }
    for _ in 0..4 {
        rig.visit(others[1]);
    }
    assert!(!rig.arenas()[0].contains(&Some(popular)), "{:?}", rig.arenas());
    assert!(rig.visit(popular).is_some());
    // It has four uses by now, and whoever comes next takes the place of somebody who has fewer, or as many.
    rig.visit(others[2]);
    assert!(rig.arenas()[0].contains(&Some(popular)), "{:?}", rig.arenas());
}

#[test]
fn of_equals_the_one_that_is_there_stays() {
    let mut rig = stepping(1);
    rig.visit(key(1, 0, 0));
    assert_eq!(rig.arenas(), [vec![Some(key(1, 0, 0)), Some(key(0, 0, 1))], vec![Some(key(0, 0, 0))]]);
    assert_eq!(rig.visit(key(1, 0, 1)), Some(Origin::Disk { keep: None }));
    assert_eq!(rig.arenas()[1], [Some(key(0, 0, 0))]);
}

#[test]
fn after_a_fault_nothing_that_was_moved_is_relied_on() {
    let mut rig = stepping(2);
    let begun = rig.need(1, vec![key(1, 0, 0)]);
    let &[(load, _, slot, Origin::Warm { exchange: true, .. })] = begun.as_slice() else {
        panic!("not an exchange: {begun:?}")
    };
    let again = loads(rig.loaded(load, Some(Fault::Device("hiccup".into()))));
    let &[(load, expert, again, origin)] = again.as_slice() else { panic!("not tried again") };
    assert_eq!((expert, again, origin), (key(1, 0, 0), slot, Origin::Disk { keep: None }));
    assert_eq!(rig.arenas()[1], [None, Some(key(1, 0, 1))], "neither is the warm slot's");
    let lost = rig.loaded(load, Some(Fault::Io("EIO".into())));
    assert!(lost.iter().any(|output| matches!(output, Output::Abort { .. })), "{lost:?}");
    assert_eq!(rig.arenas()[0], [None, Some(key(0, 0, 1))]);
}

#[test]
fn what_is_on_its_way_to_a_warm_slot_is_waited_for() {
    let mut rig = stepping(1);
    assert_eq!(rig.visit(key(0, 0, 0)), None);
    // The first leaves the hot arena for the warm one, and is needed before it is there.
    assert_eq!(rig.visit(key(0, 0, 1)), None);
    let begun = rig.need(1, vec![key(1, 1, 0)]);
    let &[(first, _, _, Origin::Disk { keep: Some(_) })] = begun.as_slice() else {
        panic!("nothing is demoted: {begun:?}")
    };
    feed(
        &mut rig.engine,
        Input::Failed { step: rig.step, attempt: 0, fault: Fault::Device("hiccup".into()) },
    );
    let again =
        Input::Need { step: rig.step, attempt: 1, layer: 0, experts: vec![key(0, 0, 0)], foreseen: vec![] };
    assert_eq!(loads(feed(&mut rig.engine, again)), [], "it is on its way");
    let then = loads(rig.loaded(first, None));
    assert!(matches!(then[..], [(_, expert, _, Origin::Warm { .. })] if expert == key(0, 0, 0)), "{then:?}");
}

#[test]
fn a_warm_arena_that_does_not_fit_is_refused_with_the_number() {
    let refused = |config: Config| {
        let (_, said) = boot(config);
        let error = said.into_iter().find_map(|output| match output {
            Output::Exit { error, .. } => error,
            _ => None,
        });
        error.unwrap()
    };
    let error = refused(Config { memory_bytes: 1539, ..config(3) });
    assert!(error.contains("at least 1540") && error.contains("300 for the warm arena"), "{error}");
    let error = refused(Config { warm_bytes: 99, ..config(3) });
    assert!(error.contains("warm_bytes is 99") && error.contains("100"), "{error}");
    // More than all experts is no more than all experts.
    let (engine, _) = boot(Config { memory_bytes: 1 << 20, warm_bytes: 1 << 19, ..config(0) });
    let carving = engine.view().carving();
    assert_eq!(carving.slots + carving.warm_slots, 8, "{carving:?}");
}

#[test]
fn what_the_cache_does_not_need_goes_to_experts() {
    let carved = |cache_positions| {
        let memory_bytes = 1000 + 40 + 4 * 100;
        let (engine, _) = boot(Config { memory_bytes, cache_positions, ..config(0) });
        let carving = engine.view().carving();
        (carving.pages, carving.slots)
    };
    assert_eq!(carved(None), (3, 3), "a quarter, and what no expert fits into");
    assert_eq!(carved(Some(4)), (1, 4));
    assert_eq!(carved(Some(16)), (4, 2), "more than a quarter, if that is what it needs");
    assert!(
        Config { cache_positions: Some(0), ..config(0) }.check().unwrap_err().contains("cache_positions")
    );
}

/// Four slots; at first they hold the base tier of both layers.
fn foreseeing() -> Rig {
    let config = config(0);
    stepping_with(Config { memory_bytes: config.memory_bytes + 200, foresight: Foresight::On, ..config })
}

#[test]
fn what_is_foreseen_is_loaded_once_nothing_is_waited_for() {
    let mut rig = foreseeing();
    let (here, soon, later) = (key(0, 1, 0), key(1, 1, 0), key(1, 0, 0));
    let demanded = rig.foresee(0, vec![here], vec![later, soon]);
    assert_eq!(demanded.iter().map(|load| load.1).collect::<Vec<_>>(), [here], "need comes first");
    let ahead = loads(rig.loaded(demanded[0].0, None));
    let [(load, expert, slot, _)] = ahead[..] else { panic!("{ahead:?}") };
    assert_eq!(expert, soon, "the other is there");
    assert_ne!(slot, demanded[0].2, "what the step reads stays");
    assert!(rig.arenas()[0].contains(&Some(later)), "what is foreseen does not go for what is foreseen");
    // The next layer needs one that is on its way, and one that is there.
    rig.released(0);
    assert_eq!(rig.need(1, vec![later, soon]), [], "nothing is loaded twice");
    let said = rig.loaded(load, None);
    assert!(
        said.iter().any(|output| matches!(output, Output::Provide { expert, .. } if *expert == soon)),
        "{said:?}"
    );
    rig.released(1);
    let rows = vec![RowResult { token: Some(1), stop: false, digest: Digest::default() }];
    let said = feed(&mut rig.engine, Input::Finished { step: rig.step, attempt: 0, rows, duration_ns: 5 });
    let done = said.iter().find_map(|output| match output {
        Output::Event { event: Event::StepDone { hits, misses, ahead, foreseen, .. }, .. } => {
            Some((*hits, *misses, *ahead, *foreseen))
        }
        _ => None,
    });
    assert_eq!(done, Some((1, 2, 1, 1)), "who was brought ahead was no hit");
}

#[test]
fn what_was_foreseen_wrongly_is_only_in_the_way_until_it_is_there() {
    let mut rig = foreseeing();
    let demanded = rig.foresee(0, vec![key(0, 1, 0)], vec![key(1, 1, 0), key(1, 1, 1)]);
    let ahead = loads(rig.loaded(demanded[0].0, None));
    assert_eq!(ahead.len(), 1, "no more than that at once");
    rig.released(0);
    let wrong = rig.need(1, vec![key(1, 0, 0), key(1, 0, 1)]);
    assert!(wrong.iter().all(|load| ahead.iter().all(|other| other.2 != load.2)), "{wrong:?} {ahead:?}");
    // One that fails is nobody's loss.
    let fault = || Some(Fault::Io("it cannot be read".into()));
    let again = loads(rig.loaded(ahead[0].0, fault()));
    assert_eq!(again.iter().map(|load| load.1).collect::<Vec<_>>(), [ahead[0].1], "it is tried again");
    let said = rig.loaded(again[0].0, fault());
    assert!(!said.iter().any(|output| matches!(output, Output::Abort { .. })), "{said:?}");
}

#[test]
fn nothing_is_foreseen_where_that_is_off_or_all_is_there() {
    for (foresight, more, asked) in [
        (Foresight::Off, 200, false),
        (Foresight::Paired, 200, false),
        (Foresight::On, 200, true),
        (Foresight::On, 600, false),
    ] {
        let config = config(0);
        let memory_bytes = config.memory_bytes + more;
        let cache_positions = Some(4);
        let (mut engine, _) = boot(Config { memory_bytes, cache_positions, foresight, ..config });
        let body = Body { prompt: vec![3], max_tokens: 1, ..Body::default() };
        let id = RequestId::new("a").unwrap();
        let said = feed(&mut engine, Input::Submit { id, body: body.into(), from: 0 });
        let foresees =
            said.iter().any(|output| matches!(output, Output::Forward(forward) if forward.foresee));
        assert_eq!(foresees, asked, "{foresight:?} with {more} bytes more");
    }
}
