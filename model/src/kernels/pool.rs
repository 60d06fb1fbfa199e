//! A pool of threads for kernels: tasks of one call, no queue. Idle threads spin for a few microseconds, then park.

mod crowd;

use std::any::Any;
use std::cell::UnsafeCell;
use std::hint::{black_box, spin_loop};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Barrier, Condvar, Mutex, MutexGuard, PoisonError, TryLockError};
use std::thread::{JoinHandle, yield_now};
use std::time::{Duration, Instant};

use self::crowd::{Crowd, Turns};
use super::buffer::{Buffer, Parts};
use super::{Isa, SelfTestError, self_test};

/// Turns of the bounded spin before a thread parks: some 10 to 40 microseconds.
const SPINS: u32 = 1_000;
/// The same for the caller, whose job is not done before its last task is.
const SPINS_FOR_LAST: u32 = 8_000;
/// After so long a worker lets others that want its core have it, between two tasks. A scheduler that takes the core away does so in
/// a task, mostly, and the caller waits for it until the others have had their turn, some milliseconds later.
const TURN: Duration = Duration::from_micros(300);
/// Below this many values what is done to each stays on the calling thread: waking another takes as long.
const SHARED_FROM: usize = 1 << 15;
/// Tasks of each thread where rows are shared out.
const TASKS_OF_THREAD: usize = 8;

/// Threads that run the tasks of one call at a time. The calling thread is one of them.
pub struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

/// A task: its number, and memory that its thread keeps from one task to the next.
type Task<'a> = dyn Fn(usize, &mut Buffer) + Sync + 'a;

/// A borrowed task function with its lifetime erased; [`Pool::run`] outlives every use.
#[derive(Clone, Copy)]
struct Job {
    run: &'static Task<'static>,
    tasks: usize,
}

struct Shared {
    /// What threads that sleep are told under.
    state: Mutex<State>,
    /// Tells parked workers that a job or the end has come.
    wake: Condvar,
    /// Tells the caller that the last worker has left the job.
    left: Condvar,
    /// Counts jobs and the end.
    generation: AtomicUsize,
    /// Whether workers may join the job ([`OPEN`]), and how many are at it.
    gate: AtomicUsize,
    /// The job: written by the caller while the gate is 0, read by those that have passed it.
    job: UnsafeCell<Option<Job>>,
    /// The next task of the job.
    next: AtomicUsize,
    /// How many workers may help with the job; one too many does no harm.
    helping: AtomicUsize,
    /// A worker noticed that others want its core.
    crowded: AtomicBool,
    /// Workers that sleep, or are about to.
    parked: AtomicUsize,
    /// The caller sleeps, or is about to.
    waits: AtomicBool,
    /// Held by the caller whose job it is.
    calling: Mutex<Calling>,
}

/// What a caller has.
struct Calling {
    /// The memory of its tasks.
    room: Buffer,
    /// How many workers it has help.
    crowd: Crowd,
}

// SAFETY: all but `job` may be shared as it is; what `gate` says of `job` keeps a write from every other access.
unsafe impl Sync for Shared {}

/// In the gate: there is a job that workers may join. Below it is how many have.
const OPEN: usize = 1 << (usize::BITS - 1);

#[derive(Default)]
struct State {
    closed: bool,
    panic: Option<Box<dyn Any + Send>>,
}

impl Pool {
    /// A pool of `threads` threads, of which `threads - 1` are started.
    ///
    /// # Panics
    /// If the system refuses a thread, or a thread does not compute with IEEE rounding and gradual underflow.
    pub fn new(threads: usize) -> Self {
        assert!(is_ieee(), "{}", SelfTestError::ControlRegister);
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            wake: Condvar::new(),
            left: Condvar::new(),
            generation: AtomicUsize::new(0),
            gate: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            next: AtomicUsize::new(0),
            helping: AtomicUsize::new(0),
            crowded: AtomicBool::new(false),
            parked: AtomicUsize::new(0),
            waits: AtomicBool::new(false),
            calling: Mutex::new(Calling {
                room: Buffer::default(),
                crowd: Crowd::new(threads.saturating_sub(1)),
            }),
        });
        let mut pool = Self { shared, workers: Vec::new() };
        let (started, reports) = channel();
        for index in 1..threads {
            let shared = Arc::clone(&pool.shared);
            let started = started.clone();
            let worker = std::thread::Builder::new()
                .name(format!("kernel-{index}"))
                .spawn(move || shared.work(&started))
                .expect("the system refused to start a kernel thread");
            pool.workers.push(worker);
        }
        drop(started);
        assert!(
            reports.iter().take(threads.saturating_sub(1)).all(|ieee| ieee),
            "{}",
            SelfTestError::ControlRegister
        );
        pool
    }

    /// Runs [`self_test`](super::self_test()) on every thread of the pool, the caller included: the control registers belong to
    /// threads, not to the process. Not to be called from inside a task.
    ///
    /// # Errors
    /// What the first failing thread found.
    pub fn self_test(&self, isa: Isa) -> Result<(), SelfTestError> {
        // A thread that holds a task waits for the others, so that each takes one.
        let together = Barrier::new(self.threads());
        let found = Mutex::new(Ok(()));
        let test = |_, _: &mut Buffer| {
            together.wait();
            let result = self_test(isa);
            let mut found = found.lock().unwrap_or_else(PoisonError::into_inner);
            *found = (*found).and(result);
        };
        let calling = self.shared.calling.lock().unwrap_or_else(PoisonError::into_inner);
        self.share(calling, self.threads(), self.workers.len(), &test);
        found.into_inner().unwrap_or_else(PoisonError::into_inner)
    }

    /// Number of threads, the caller included.
    pub fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task(0)` to `task(tasks - 1)`, each once, in any order, and returns when all have returned.
    ///
    /// A call from inside a task, or while another thread's call runs, takes place on the calling thread alone.
    ///
    /// # Panics
    /// If a task panics, after all have stopped.
    pub fn run(&self, tasks: usize, task: &(dyn Fn(usize) + Sync)) {
        self.run_with_room(tasks, true, &|index, _| task(index));
    }

    /// The same with memory that every thread keeps for its tasks; on the calling thread alone unless `shared`.
    pub(super) fn run_with_room(&self, tasks: usize, shared: bool, task: &Task<'_>) {
        let calling = match self.shared.calling.try_lock() {
            Ok(calling) => Some(calling),
            // What a task that panicked has left in its memory does not matter.
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        };
        let Some(mut calling) = calling else {
            let mut room = Buffer::default();
            return (0..tasks).for_each(|index| task(index, &mut room));
        };
        let helping = if shared && tasks > 1 { self.helping(&mut calling.crowd, tasks) } else { 0 };
        if helping > 0 {
            self.share(calling, tasks, helping, task);
        } else {
            (0..tasks).for_each(|index| task(index, &mut calling.room));
        }
    }

    /// How many workers are to help with so many tasks.
    fn helping(&self, crowd: &mut Crowd, tasks: usize) -> usize {
        let noticed = &self.shared.crowded;
        let crowded = noticed.load(Ordering::Relaxed) && noticed.swap(false, Ordering::Relaxed);
        crowd.helping(tasks, crowded, Instant::now)
    }

    /// Calls `row(0)` to `row(rows - 1)`, each once, in any order: on all threads where they touch enough values.
    pub fn rows(&self, rows: usize, values: usize, row: &(dyn Fn(usize) + Sync)) {
        if values < SHARED_FROM || self.workers.is_empty() {
            return (0..rows).for_each(row);
        }
        let tasks = rows.min(self.threads() * TASKS_OF_THREAD);
        self.run(tasks, &|task| (rows * task / tasks..rows * (task + 1) / tasks).for_each(row));
    }

    /// Calls `row(i, values i * width..)` for every row of `width` values, in any order, where `cost` times as many
    /// values are touched as there are.
    pub fn each_row<T: Send>(
        &self,
        values: &mut [T],
        width: usize,
        cost: usize,
        row: &(dyn Fn(usize, &mut [T]) + Sync),
    ) {
        let touched = values.len() * cost;
        let rows = values.len().checked_div(width).unwrap_or(0);
        let parts = Parts::new(values);
        self.rows(rows, touched, &|index| {
            // SAFETY: rows do not overlap, and each is given to one call.
            row(index, unsafe { parts.part(index * width..(index + 1) * width) });
        });
    }

    /// Shares the tasks with so many workers. The caller holds the lock, which says that no other job runs.
    fn share(&self, mut calling: MutexGuard<'_, Calling>, tasks: usize, helping: usize, task: &Task<'_>) {
        // SAFETY: only the lifetime changes. Workers reach the reference through `job` alone, past the gate, which counts them
        // while they use it; `finish` below shuts it and waits until none is left before this function returns; nothing between
        // here and there can unwind.
        let run = unsafe { std::mem::transmute::<&Task<'_>, &'static Task<'static>>(task) };
        let job = Job { run, tasks };
        self.shared.helping.store(helping, Ordering::Relaxed);
        self.shared.start(job);
        let own = catch_unwind(AssertUnwindSafe(|| self.shared.take_tasks(job, &mut calling.room, || true)));
        let theirs = self.shared.finish();
        drop(calling);
        if let Err(panic) = own {
            resume_unwind(panic);
        }
        if let Some(panic) = theirs {
            resume_unwind(panic);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        let mut state = self.shared.lock();
        state.closed = true;
        // Under the lock: else a worker that has just looked would go to sleep after the only call that could wake it.
        self.shared.generation.fetch_add(1, Ordering::Release);
        drop(state);
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            worker.join().expect("a worker catches the panics of its tasks");
        }
    }
}

impl Shared {
    /// The lock guards plain data that is consistent between statements, so that a poisoned one may be used.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn start(&self, job: Job) {
        debug_assert_eq!(self.gate.load(Ordering::Relaxed), 0, "the job before is over");
        self.next.store(0, Ordering::Relaxed);
        // SAFETY: the caller whose job it is is the only one to write, and the gate is shut and nobody past it.
        unsafe { *self.job.get() = Some(job) };
        self.gate.store(OPEN, Ordering::Release);
        // Either this sees a worker that is about to park, or the worker sees the new job: both look after they have written.
        self.generation.fetch_add(1, Ordering::SeqCst);
        if self.parked.load(Ordering::SeqCst) > 0 {
            // Under the lock it has not looked yet, or sleeps.
            drop(self.lock());
            self.wake.notify_all();
        }
    }

    /// Withdraws the job and waits until no worker uses it.
    fn finish(&self) -> Option<Box<dyn Any + Send>> {
        let mut at_it = self.gate.fetch_and(!OPEN, Ordering::AcqRel) & !OPEN;
        // Tasks are short: the last one ends soon, and a sleep would cost more than it.
        for _ in 0..SPINS_FOR_LAST {
            if at_it == 0 {
                break;
            }
            spin_loop();
            at_it = self.gate.load(Ordering::Acquire);
        }
        let mut state = self.lock();
        if at_it > 0 {
            // As in `start`: either the last worker sees this, or this sees that it has left.
            self.waits.store(true, Ordering::SeqCst);
            while self.gate.load(Ordering::SeqCst) > 0 {
                state = self.left.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            self.waits.store(false, Ordering::Relaxed);
        }
        state.panic.take()
    }

    /// Lets a worker in to the job, unless it is over or as many are at it as may help.
    fn join(&self) -> Option<Job> {
        let helping = self.helping.load(Ordering::Relaxed);
        let open = |gate| (gate & OPEN != 0 && gate & !OPEN < helping).then_some(gate + 1);
        self.gate.fetch_update(Ordering::Acquire, Ordering::Relaxed, open).ok()?;
        // SAFETY: the gate counts this worker, so that nobody writes before it has left.
        unsafe { *self.job.get() }
    }

    fn leave(&self) {
        let last = self.gate.fetch_sub(1, Ordering::SeqCst) == 1;
        if last && self.waits.load(Ordering::SeqCst) {
            drop(self.lock());
            self.left.notify_one();
        }
    }

    fn take_tasks(&self, job: Job, room: &mut Buffer, goes_on: impl Fn() -> bool) {
        while goes_on() {
            let task = self.next.fetch_add(1, Ordering::Relaxed);
            if task >= job.tasks {
                return;
            }
            (job.run)(task, room);
        }
    }

    fn work(&self, started: &Sender<bool>) {
        let ieee = is_ieee();
        if started.send(ieee).is_err() || !ieee {
            return;
        }
        let (mut seen, mut room) = (0, Buffer::default());
        let mut turn_began = Instant::now();
        let mut turns = Turns::new(turn_began);
        loop {
            for _ in 0..SPINS {
                if self.generation.load(Ordering::Acquire) != seen {
                    break;
                }
                spin_loop();
            }
            if self.generation.load(Ordering::Acquire) == seen {
                let mut state = self.lock();
                self.parked.fetch_add(1, Ordering::SeqCst);
                while self.generation.load(Ordering::SeqCst) == seen {
                    state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                self.parked.fetch_sub(1, Ordering::Relaxed);
                turn_began = Instant::now();
            }
            seen = self.generation.load(Ordering::Acquire);
            let Some(job) = self.join() else {
                if self.lock().closed {
                    return;
                }
                continue;
            };
            let goes_on = || turn_began.elapsed() < TURN;
            let result = catch_unwind(AssertUnwindSafe(|| self.take_tasks(job, &mut room, goes_on)));
            if let Err(panic) = result {
                self.lock().panic = Some(panic);
            }
            self.leave();
            if !goes_on() {
                let gave = Instant::now();
                yield_now();
                turn_began = Instant::now();
                if turns.crowded(gave, turn_began) {
                    self.crowded.store(true, Ordering::Relaxed);
                }
                // There may be tasks left.
                seen = seen.wrapping_sub(1);
            }
        }
    }
}

/// Whether this thread rounds to nearest even and keeps subnormals, as operands and as results.
pub fn is_ieee() -> bool {
    let smallest_normal = black_box(f32::MIN_POSITIVE);
    let subnormal = black_box(f32::from_bits(1));
    let half_ulp = black_box(f32::EPSILON / 2.0);
    let result_kept = black_box(smallest_normal * black_box(0.5)).to_bits() == 0x0040_0000;
    // 2^-149 * 2^24 = 2^-125.
    let operand_kept = black_box(subnormal * black_box(16_777_216.0)).to_bits() == 0x0100_0000;
    let to_even = black_box(black_box(1.0) + half_ulp) == 1.0
        && black_box(black_box(-1.0) - half_ulp) == -1.0
        && black_box(black_box(1.0 + f32::EPSILON) + half_ulp) == 1.0 + 2.0 * f32::EPSILON;
    result_kept && operand_kept && to_even
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_workers_join_than_may_help() {
        let pool = Pool::new(4);
        for helping in [1, 2, 3] {
            let (at_it, most) = (AtomicUsize::new(0), AtomicUsize::new(0));
            let task = |_, _: &mut Buffer| {
                most.fetch_max(at_it.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
                // Long enough for all to come.
                std::thread::sleep(Duration::from_millis(5));
                at_it.fetch_sub(1, Ordering::SeqCst);
            };
            let calling = pool.shared.calling.lock().unwrap_or_else(PoisonError::into_inner);
            pool.share(calling, 24, helping, &task);
            assert!(most.into_inner() <= helping + 1, "of whom {helping} may help");
        }
    }
}
