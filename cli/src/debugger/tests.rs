use super::app::{App, Pane};
use super::*;
use lite_llm_core::LOGIC_VERSION;
use lite_llm_core::config::{Config, Limits};
use lite_llm_core::engine::Engine;
use lite_llm_core::ids::Incarnation;
use lite_llm_core::input::{Input, SwitchTarget};
use lite_llm_core::journal::{Header, Store};
use lite_llm_core::output::Output;
use lite_llm_core::replay::encode_input;
use lite_llm_core::time::Time;
use lite_llm_hw::disk::FileDisk;
use ratatui::Terminal;
use ratatui::backend::TestBackend;
use ratatui::crossterm::event::{KeyCode, KeyEvent};
use std::path::Path;

fn config() -> Config {
    Config { limits: Limits { rows_max: 3, ..Limits::default() }, ..Config::default() }
}

/// A journal of a boot that never gets on, with something to find in the middle.
fn journal(dir: &Path, records: u64, start_ns: u64) {
    let header = Header { logic_version: LOGIC_VERSION, node: 0, incarnation: 1, identity: [0; 32] };
    let (mut store, _) = Store::open(FileDisk::open(dir).unwrap(), &header).unwrap();
    let mut engine = Engine::new();
    for seq in 1..=records {
        let input = match seq {
            1 => Input::Boot { incarnation: Incarnation(1), config: config().into(), entropy: 1 },
            150 => Input::Switch { target: SwitchTarget::Mode("needle".into()), at: None },
            _ => Input::Tick,
        };
        let time = start_ns + seq * 1_000_000_000;
        store.push(seq, time, engine.digest().0, encode_input(&input)).unwrap();
        engine.handle(Time(time), input);
        while !matches!(engine.poll(), Output::Wait { .. }) {}
    }
    store.flush().unwrap();
}

fn app(records: &[(u64, u64)], at: Option<u64>) -> (App, Vec<tempfile::TempDir>) {
    let dirs: Vec<_> = records.iter().map(|_| tempfile::tempdir().unwrap()).collect();
    for (dir, &(records, start_ns)) in dirs.iter().zip(records) {
        journal(dir.path(), records, start_ns);
    }
    let tapes = dirs.iter().map(|dir| Tape::open(dir.path()).unwrap()).collect();
    (App::new(tapes, at).unwrap(), dirs)
}

fn press(app: &mut App, keys: &str) {
    for c in keys.chars() {
        let code = match c {
            '\n' => KeyCode::Enter,
            '>' => KeyCode::Right,
            '\t' => KeyCode::Tab,
            c => KeyCode::Char(c),
        };
        app.key(KeyEvent::from(code)).unwrap();
    }
}

fn at(app: &App) -> Vec<u64> {
    app.panels.iter().map(|panel| panel.frame.seq()).collect()
}

fn screen(app: &App) -> String {
    let mut terminal = Terminal::new(TestBackend::new(100, 40)).unwrap();
    terminal.draw(|frame| draw::draw(frame, app)).unwrap();
    terminal.backend().to_string()
}

#[test]
fn every_place_is_reached_forward_and_back_and_has_the_state_of_the_fold() {
    let (mut app, dirs) = app(&[(300, 0)], Some(1));
    let digest = |app: &App| app.panels[0].frame.after.digest();
    let mut forward = vec![digest(&app)];
    for _ in 2..=300 {
        press(&mut app, "j");
        forward.push(digest(&app));
    }
    assert_eq!(at(&app), [300]);
    for seq in (1..300).rev() {
        press(&mut app, "k");
        assert_eq!((at(&app), digest(&app)), (vec![seq], forward[seq as usize - 1]));
    }
    press(&mut app, "k");
    assert!(screen(&app).contains("the beginning"));
    press(&mut app, "k");
    assert_eq!(at(&app), [0], "nothing is before it");
    drop(dirs);
}

#[test]
fn jumps_searches_and_questions() {
    let (mut app, _dirs) = app(&[(300, 0)], None);
    assert_eq!(at(&app), [300], "it begins at the end");
    press(&mut app, "/NEEDLE\n");
    assert_eq!(at(&app), [300]);
    assert!(screen(&app).contains("no later record has \"NEEDLE\""), "{}", screen(&app));
    press(&mut app, "N");
    assert_eq!(at(&app), [150]);
    let shown = screen(&app);
    assert!(
        shown.contains("Switch { target: Mode(\"needle\")") && shown.contains("output  Switched"),
        "{shown}"
    );
    press(&mut app, ":7\n");
    assert_eq!(at(&app), [7]);
    press(&mut app, "t20\n");
    assert_eq!(at(&app), [21], "twenty seconds after the first");
    press(&mut app, ":x\n");
    assert!(screen(&app).contains("\"x\" is no number of a record"));
    press(&mut app, "d");
    assert!(screen(&app).contains("diverges nowhere"));
    press(&mut app, "?");
    assert!(screen(&app).contains("to where the journal diverges"));
    press(&mut app, "qq");
    assert!(app.done);
}

#[test]
fn fields_fold_and_changes_are_open() {
    let (mut app, _dirs) = app(&[(2, 0)], Some(1));
    let shown =
        |app: &App| app.panels[0].visible().iter().map(|field| field.text.clone()).collect::<Vec<_>>();
    assert!(shown(&app).contains(&"boot: Resources".into()), "{:?}", shown(&app));
    let limits = "limits: Limits {";
    assert!(shown(&app).contains(&limits.into()), "the first record changes them");
    press(&mut app, "j");
    assert!(!shown(&app).contains(&limits.into()), "a tick changes nothing: all is folded");
    press(&mut app, ">");
    assert_eq!(app.pane, Pane::State);
    let config = shown(&app).iter().position(|text| text == "config: Config {").unwrap();
    press(&mut app, &"j".repeat(config));
    press(&mut app, "\n");
    assert!(shown(&app).contains(&limits.into()));
    press(&mut app, "\n");
    assert!(!shown(&app).contains(&limits.into()));
    assert_eq!(at(&app), [2], "the cursor moved in the state");
}

#[test]
fn journals_side_by_side_keep_the_same_time() {
    let (mut app, _dirs) = app(&[(100, 0), (100, 10_000_000_000)], Some(30));
    assert_eq!(at(&app), [30, 20]);
    press(&mut app, ":50\n");
    assert_eq!(at(&app), [50, 40]);
    press(&mut app, "\t:5\n");
    assert_eq!(at(&app), [15, 5]);
}

#[test]
fn a_journal_that_diverges_opens_up_to_there() {
    let dir = tempfile::tempdir().unwrap();
    journal(dir.path(), 9, 0);
    let header = Header { logic_version: LOGIC_VERSION, node: 0, incarnation: 2, identity: [0; 32] };
    let (mut store, _) = Store::open(FileDisk::open(dir.path()).unwrap(), &header).unwrap();
    store.push(10, 99_000_000_000, [9; 32], encode_input(&Input::Tick)).unwrap();
    store.flush().unwrap();
    drop(store);
    let mut app = App::new(vec![Tape::open(dir.path()).unwrap()], Some(3)).unwrap();
    press(&mut app, "d");
    assert_eq!(at(&app), [9]);
    assert!(screen(&app).contains("diverges before record 10"), "{}", screen(&app));
}
