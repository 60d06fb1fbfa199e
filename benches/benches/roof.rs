//! Decode held against memory: tokens and plain reading by turns on the same threads, every expert in memory.
//!
//! What memory delivers on a shared machine changes within seconds. Turns of a few hundredths of a second see the same of it, so that
//! their means may be compared where separate runs may not. Not a bench of Criterion: it wants a share, not a time.

use lite_llm_benches::{Resident, olmoe_of_integers, olmoe_shape};
use lite_llm_hw::bandwidth::PlainReading;
use lite_llm_model::kernels::Quantised;
use std::time::{Duration, Instant};

/// How long a turn takes, about, and how many there are of each kind.
const TURN: Duration = Duration::from_millis(60);
const TURNS: u32 = 80;
/// Positions of the tokens: again and again the same, after a prompt.
const POSITIONS: std::ops::Range<u32> = 256..512;
/// More than any cache has.
const READ_BYTES: usize = 512 << 20;

/// What one kind of turns did.
#[derive(Clone, Copy, Default)]
struct Done {
    bytes: u64,
    took: Duration,
}

impl Done {
    /// Does something for a turn, which says how many bytes it read.
    fn turn(&mut self, mut work: impl FnMut() -> u64) {
        let began = Instant::now();
        while began.elapsed() < TURN {
            self.bytes += work();
        }
        self.took += began.elapsed();
    }

    fn gigabytes_per_s(self) -> f64 {
        self.bytes as f64 / self.took.as_secs_f64() / 1e9
    }
}

fn main() {
    println!("weights  threads  tokens/s  decode GB/s  plain reading GB/s  share");
    let shapes = [
        ("bf16", olmoe_shape()),
        ("q8", olmoe_of_integers(Quantised::Q8)),
        ("q4", olmoe_of_integers(Quantised::Q4)),
    ];
    for (name, dir) in shapes {
        for threads in [1, 2] {
            let plain = PlainReading::new(threads, READ_BYTES).expect("memory to read");
            let mut model = Resident::load(&dir, threads);
            let prompt: Vec<u32> = (0..POSITIONS.start).map(|i| 3 + i * 97 % 50000).collect();
            let mut token = model.step(0, &prompt);
            let mut positions = POSITIONS.cycle();
            let (mut decode, mut tokens) = (Done::default(), 0);
            let mut reading = [Done::default(); 2];
            for _ in 0..TURNS {
                decode.turn(|| {
                    let position = positions.next().expect("they have no end");
                    token = model.step(position, &[token]);
                    tokens += 1;
                    model.step_bytes(position)
                });
                reading[0].turn(|| read(&plain, PlainReading::pass::<1>));
                reading[1].turn(|| read(&plain, PlainReading::pass::<4>));
            }
            let roof = reading.map(Done::gigabytes_per_s).into_iter().fold(0.0, f64::max);
            let (speed, rate) = (f64::from(tokens) / decode.took.as_secs_f64(), decode.gigabytes_per_s());
            let share = 100.0 * rate / roof;
            println!("{name:<9}{threads:<9}{speed:<10.1}{rate:<13.1}{roof:<20.1}{share:.0} %");
        }
    }
}

/// Reads everything once; how much that was.
fn read(plain: &PlainReading, pass: fn(&PlainReading) -> Duration) -> u64 {
    pass(plain);
    plain.bytes() as u64
}
