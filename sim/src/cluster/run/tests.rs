//! Whole clusters under all faults, over a few seeds; the command runs many.

use super::*;
use crate::decision::LogFile;
use crate::mark::Mark;

#[test]
fn every_layout_survives_every_fault() {
    let mut marks = Marks::default();
    for seed in 0..40 {
        let report = run(&ClusterSetup::of(seed));
        let found = report.violation.as_ref().map_or_else(String::new, ToString::to_string);
        assert!(report.violation.is_none(), "seed {seed}: {found}");
        assert_eq!(report.excuse, None, "seed {seed}");
        marks.add(&report.marks);
    }
    for mark in [Mark::Recovered, Mark::Rewound, Mark::LeaderChanged, Mark::Complete, Mark::StepRetried] {
        assert!(marks.count(mark) > 0, "{mark} never happened");
    }
}

#[test]
fn a_seed_is_a_run() {
    for seed in 0..5 {
        let (one, other) = (run(&ClusterSetup::of(seed)), run(&ClusterSetup::of(seed)));
        assert_eq!((one.digest, one.decisions), (other.digest, other.decisions));
    }
    assert_ne!(run(&ClusterSetup::of(0)).digest, run(&ClusterSetup::of(5)).digest);
}

#[test]
fn its_decisions_alone_make_the_same_run() {
    let seeded = run(&ClusterSetup::of(5));
    let logged = run(&ClusterSetup { decisions: Some(seeded.decisions.clone()), ..ClusterSetup::of(5) });
    assert_eq!((seeded.digest, seeded.decisions.len()), (logged.digest, logged.decisions.len()));
}

#[test]
fn a_run_is_written_and_made_again() {
    let seeded = run(&ClusterSetup::of(7));
    let file = ClusterSetup::of(7).to_log(seeded.decisions);
    let setup =
        ClusterSetup::of_log(&LogFile::parse(&file.to_text()).expect("it was written")).expect("whole");
    assert_eq!(run(&setup).digest, seeded.digest);
    for (name, value, word) in [
        ("nodes", "2", "needs 4 to 64"),
        ("topology", "pp=9", "4 layers to share"),
        ("topology", "xp=9", "write it as dp="),
        ("requests", "many", "which is none"),
    ] {
        let mut other = file.clone();
        other.settings.insert("topology".into(), "dp=2,ep=2".into());
        other.settings.insert(name.into(), value.into());
        let error = ClusterSetup::of_log(&other).expect_err("it is wrong");
        assert!(error.contains(word), "{error}");
    }
}
