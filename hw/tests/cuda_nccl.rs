//! The stand-in for NCCL (`hw/cuda/stand_in/nccl.cpp`), with two ranks in one process: that it moves what it is to move, and that it
//! reports who is wrong. What it reports ends the process: each scenario is a process of its own, this program again.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![cfg(target_os = "linux")]

use cudarc::driver::result::{self, stream::StreamKind};
use cudarc::driver::sys::{CUcontext, CUstream};
use libloading::Library;
use lite_llm_tests::cuda::{compile_driver, nccl_of, say_skipped};
use std::ffi::{c_int, c_void};
use std::path::Path;
use std::process::{Command, Output};
use std::time::{Duration, Instant};

const SCENARIO: &str = "LITE_LLM_TEST_SCENARIO";
const PLAYED: &str = "played to its end";
const IN_PROGRESS: c_int = 7;
const WORDS: c_int = 3;

/// Plays a scenario with what the stand-in is asked for. `None` where there is no compiler.
fn play(scenario: &str, wishes: &[(&str, &str)]) -> Option<Output> {
    let tmp = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let Some(driver) = compile_driver(tmp) else {
        say_skipped("the stand-in for NCCL, for want of Linux and a C++ compiler (c++, or CXX)");
        return None;
    };
    let meeting = tempfile::tempdir().unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "scenario", "--nocapture"]).env(SCENARIO, scenario);
    command
        .env("LITE_LLM_STAND_IN", "90")
        .env("LITE_LLM_STAND_IN_NCCL", meeting.path())
        .env("LD_LIBRARY_PATH", std::env::join_paths([&driver, &nccl_of(&driver)]).unwrap());
    for (name, value) in wishes {
        command.env(format!("LITE_LLM_STAND_IN_{name}"), value);
    }
    Some(command.output().unwrap())
}

/// Plays a scenario in which the stand-in reports these words, or which ends well if there are none.
fn ends(scenario: &str, wishes: &[(&str, &str)], words: &str) {
    let Some(output) = play(scenario, wishes) else { return };
    let [stdout, stderr] = [&output.stdout, &output.stderr].map(|text| String::from_utf8_lossy(text));
    if words.is_empty() {
        assert!(
            output.status.success() && stdout.contains(PLAYED),
            "{scenario} {wishes:?}: {stdout}{stderr}"
        );
    } else {
        assert!(
            !output.status.success() && stderr.contains(words),
            "{scenario} {wishes:?}: {stdout}{stderr}"
        );
    }
}

#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; 128]);

#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    rest: [c_int; 9],
}

/// The calls, each by its name.
struct Nccl(Library);

macro_rules! call {
    ($nccl:expr, $name:literal, ($($type:ty),*), $($argument:expr),*) => {{
        // SAFETY: the stand-in has the call with these types, and what is pointed at lives until it returns.
        unsafe {
            let call = $nccl.0.get::<unsafe extern "C" fn($($type),*) -> c_int>($name.as_bytes()).unwrap();
            call($($argument),*)
        }
    }};
}

/// A rank with a device of its own.
struct Rank {
    context: CUcontext,
    stream: CUstream,
    memory: u64,
    handle: *mut c_void,
}

/// Words of a rank's memory: more than goes at once.
const COUNT: usize = 50_000;

impl Rank {
    fn open(number: i32) -> Self {
        result::init().unwrap();
        let device = result::device::get(number).unwrap();
        // SAFETY: the device is there, and everything that is made lives as long as the process.
        unsafe {
            let context = result::primary_ctx::retain(device).unwrap();
            result::ctx::set_current(context).unwrap();
            let memory = result::malloc_sync(8 * COUNT).unwrap();
            let own: Vec<u8> = (0..8 * COUNT).map(|i| (i as u8).wrapping_mul(number as u8 + 3)).collect();
            result::memcpy_htod_sync(memory, &own).unwrap();
            let stream = result::stream::create(StreamKind::NonBlocking).unwrap();
            Self { context, stream, memory, handle: std::ptr::null_mut() }
        }
    }

    fn enter(&self) {
        // SAFETY: the context is there.
        unsafe { result::ctx::set_current(self.context) }.unwrap();
    }

    fn join(&mut self, nccl: &Nccl, id: UniqueId, rank: c_int, blocking: c_int) {
        self.enter();
        let mut config = Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: 21_800,
            blocking,
            rest: [c_int::MIN; 9],
        };
        let types = call!(
            nccl,
            "ncclCommInitRankConfig",
            (*mut *mut c_void, c_int, UniqueId, c_int, *mut Config),
            &raw mut self.handle,
            2,
            id,
            rank,
            &raw mut config
        );
        assert_eq!(types, IN_PROGRESS);
    }

    fn state(&self, nccl: &Nccl) -> c_int {
        self.enter();
        let mut state = 0;
        let asked =
            call!(nccl, "ncclCommGetAsyncError", (*mut c_void, *mut c_int), self.handle, &raw mut state);
        assert_eq!(asked, 0);
        state
    }

    fn abort(&self, nccl: &Nccl) {
        assert_eq!(call!(nccl, "ncclCommAbort", (*mut c_void), self.handle), 0);
    }

    fn part(&self, nccl: &Nccl, sends: bool, at: u64, count: usize, peer: c_int) -> c_int {
        let (at, stream) = (at as *mut c_void, self.stream.cast::<c_void>());
        if sends {
            call!(
                nccl,
                "ncclSend",
                (*mut c_void, usize, c_int, c_int, *mut c_void, *mut c_void),
                at,
                count,
                WORDS,
                peer,
                self.handle,
                stream
            )
        } else {
            call!(
                nccl,
                "ncclRecv",
                (*mut c_void, usize, c_int, c_int, *mut c_void, *mut c_void),
                at,
                count,
                WORDS,
                peer,
                self.handle,
                stream
            )
        }
    }

    /// Sends the first half, and receives into the second.
    fn swap(&self, nccl: &Nccl, [sent, received]: [usize; 2], peer: c_int) {
        self.enter();
        assert_eq!(call!(nccl, "ncclGroupStart", (),), 0);
        assert_eq!(self.part(nccl, true, self.memory, sent, peer), 0);
        assert_eq!(self.part(nccl, false, self.memory + 4 * COUNT as u64, received, peer), 0);
        let ended = call!(nccl, "ncclGroupEnd", (),);
        assert!(matches!(ended, 0 | IN_PROGRESS));
    }

    fn issue(&self, nccl: &Nccl) {
        while self.state(nccl) == IN_PROGRESS {}
    }

    /// Whether all that was queued has ended.
    fn has_ended(&self) -> bool {
        self.enter();
        let event =
            result::event::create(cudarc::driver::sys::CUevent_flags::CU_EVENT_DISABLE_TIMING).unwrap();
        // SAFETY: event and stream live.
        unsafe {
            result::event::record(event, self.stream).unwrap();
            (0..50).any(|_| result::event::query(event).is_ok())
        }
    }
}

fn wait(ranks: &[&Rank]) {
    let began = Instant::now();
    while ranks.iter().filter(|rank| !rank.has_ended()).count() > 0 {
        assert!(began.elapsed() < Duration::from_secs(60), "an exchange does not end");
    }
}

/// A scenario, in a process of its own.
#[test]
fn scenario() {
    let Ok(scenario) = std::env::var(SCENARIO) else { return };
    // SAFETY: what opening it runs is the stand-in's own.
    let nccl = Nccl(unsafe { Library::new("libnccl.so.2") }.unwrap());
    let mut ranks = [Rank::open(0), Rank::open(i32::from(scenario != "one device"))];
    let mut id = UniqueId([0; 128]);
    assert_eq!(call!(nccl, "ncclGetUniqueId", (*mut UniqueId), &raw mut id), 0);
    for (number, rank) in (0..).zip(&mut ranks) {
        rank.join(&nccl, id, number, c_int::from(scenario == "blocking"));
    }
    let [one, other] = &ranks;
    if scenario == "early" {
        one.swap(&nccl, [COUNT; 2], 1);
    }
    for rank in [one, other] {
        rank.issue(&nccl);
    }
    match &*scenario {
        "one device" => assert_eq!(one.state(&nccl), 5),
        "swap" => {
            for _ in 0..5 {
                one.swap(&nccl, [COUNT, COUNT / 2], 1);
                other.swap(&nccl, [COUNT / 2, COUNT], 0);
                one.issue(&nccl);
                other.issue(&nccl);
                wait(&[one, other]);
                for (rank, peer, count) in [(one, other, COUNT / 2), (other, one, COUNT)] {
                    let [mut sent, mut received] = [vec![0u8; 4 * count], vec![0u8; 4 * count]];
                    // SAFETY: both have as many bytes.
                    unsafe {
                        peer.enter();
                        result::memcpy_dtoh_sync(&mut sent, peer.memory).unwrap();
                        rank.enter();
                        result::memcpy_dtoh_sync(&mut received, rank.memory + 4 * COUNT as u64).unwrap();
                    }
                    assert!(sent == received, "other bytes");
                }
            }
        }
        "gone" => {
            one.swap(&nccl, [COUNT; 2], 1);
            one.issue(&nccl);
            assert!(!one.has_ended(), "nobody was there");
            one.abort(&nccl);
            wait(&[one]);
        }
        "error" => {
            for (rank, peer) in [(one, 1), (other, 0)] {
                rank.swap(&nccl, [COUNT; 2], peer);
                rank.issue(&nccl);
            }
            let began = Instant::now();
            while one.state(&nccl) != 6 {
                assert!(!one.has_ended() && began.elapsed() < Duration::from_secs(60));
            }
            one.abort(&nccl);
            other.abort(&nccl);
            wait(&[one, other]);
        }
        "counts" => {
            one.swap(&nccl, [COUNT, COUNT], 1);
            other.swap(&nccl, [COUNT, COUNT - 1], 0);
            one.issue(&nccl);
            other.issue(&nccl);
            wait(&[one, other]);
        }
        "aborted" => {
            one.abort(&nccl);
            one.swap(&nccl, [COUNT; 2], 1);
        }
        "host" => {
            let own = [0u32; 4];
            one.enter();
            assert_eq!(call!(nccl, "ncclGroupStart", (),), 0);
            one.part(&nccl, true, own.as_ptr() as u64, 4, 1);
        }
        "beyond" => one.swap(&nccl, [2 * COUNT + 1, 1], 1),
        "overtaken" => {
            one.swap(&nccl, [COUNT; 2], 1);
            assert!(!one.has_ended(), "nobody was there");
        }
        other => panic!("{other} is no scenario"),
    }
    println!("{PLAYED}");
}

#[test]
fn what_is_sent_is_received_whatever_the_order() {
    for seed in 0..12 {
        ends("swap", &[("SEED", &seed.to_string())], "");
    }
}

#[test]
fn an_abort_ends_waiting_for_whoever_is_gone_and_for_what_failed() {
    for seed in ["0", "1", "2"] {
        ends("gone", &[("SEED", seed)], "");
        ends("error", &[("SEED", seed), ("FAULT", "exchange:*:6")], "");
    }
    ends("one device", &[], "");
}

#[test]
fn whoever_is_wrong_is_reported() {
    for (scenario, words) in [
        ("blocking", "a communicator that waits within its calls"),
        ("early", "ncclSend while the communicator is not ready"),
        ("counts", "receives 199996 bytes from 0, which sends 200000"),
        ("aborted", "ncclSend of a communicator that was aborted"),
        ("host", "ncclSend of memory that is not the device's"),
        ("beyond", "ncclSend of memory that is not the device's"),
    ] {
        ends(scenario, &[], words);
    }
    // Whether a group is issued at once is drawn.
    let found = (0..8).any(|seed| {
        let output = play("overtaken", &[("SEED", &seed.to_string())]);
        output.is_none_or(|output| {
            String::from_utf8_lossy(&output.stderr).contains("would overtake an exchange")
        })
    });
    assert!(found, "no seed has reported it");
}
