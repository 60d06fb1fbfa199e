//! What the cold tier delivers here: experts loaded into slots for a while, as the engine has them loaded, and let go of.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use lite_llm_core::ids::{ExpertKey, LoadId, Slot};
use lite_llm_core::input::Fault;
use lite_llm_model::ExpertLoader;

use super::{Answer, Cold, Fetch, Load, Reader, Told};
use crate::arena::Arena;

/// Loads that are under way at most, and threads where no reader has them all.
const LOADS: u32 = 8;
const THREADS: usize = 4;

/// Loads experts in their order, from the first again after the last, until `time` is over; bytes a second, and nothing of a
/// checkpoint that is not read by whole experts.
///
/// # Errors
/// If memory for a few slots or threads cannot be had, or an expert cannot be loaded.
pub fn delivered(
    cold: Cold,
    loader: &ExpertLoader,
    experts: &[ExpertKey],
    slot_bytes: u64,
    time: Duration,
) -> Result<Option<f64>, String> {
    let Some(fetch) = cold.fetch().filter(|_| !experts.is_empty()) else { return Ok(None) };
    let arena = Arena::new(LOADS, slot_bytes, u64::from(LOADS) * slot_bytes).map_err(|e| e.to_string())?;
    let (told, answers) = channel();
    let reader = cold.reader(move |what| told.send(what).is_ok()).map_err(|error| error.to_string())?;
    let began = Instant::now();
    let Some(reader) = reader else {
        let bytes = by_threads(&fetch, loader, experts, &arena, time).map_err(|fault| fault.to_string())?;
        return Ok(Some(bytes as f64 / began.elapsed().as_secs_f64()));
    };
    let mut experts = experts.iter().copied().cycle();
    let mut ask = |slot: u32| ask(&reader, loader, &arena, slot, experts.next());
    let mut under_way = (0..LOADS).filter(|&slot| ask(slot)).count();
    let mut loaded = 0;
    while under_way > 0 {
        match answers.recv().map_err(|_| "the reader is gone")? {
            Told::Answer(Answer { load, result: Ok(()), .. }) => {
                loaded += 1;
                under_way -= 1;
                let slot = u32::try_from(load.0).expect("a slot");
                under_way += usize::from(began.elapsed() < time && ask(slot));
            }
            Told::Answer(Answer { result: Err(fault), .. }) => return Err(fault.to_string()),
            Told::Lost(what) | Told::DeviceLost(what) | Told::Panicked(what) => return Err(what),
        }
    }
    let seconds = began.elapsed().as_secs_f64();
    for thread in reader.close() {
        // What it had to say was said.
        let _ = thread.join();
    }
    Ok(Some(loaded as f64 * slot_bytes as f64 / seconds))
}

/// Has an expert loaded; whether there is one that can be.
fn ask(
    reader: &Reader,
    loader: &ExpertLoader,
    arena: &Arc<Arena>,
    slot: u32,
    expert: Option<ExpertKey>,
) -> bool {
    let Some((expert, blob)) = expert.and_then(|expert| Some((expert, loader.blob(expert)?))) else {
        return false;
    };
    let (load, slot) = (LoadId(u64::from(slot)), arena.write(Slot(slot)));
    reader.read(Load { epoch: 0, load, expert, blob, slot, keep: None });
    true
}

fn by_threads(
    fetch: &Fetch,
    loader: &ExpertLoader,
    experts: &[ExpertKey],
    arena: &Arc<Arena>,
    time: Duration,
) -> Result<u64, Fault> {
    let (next, bytes, began) = (AtomicUsize::new(0), AtomicU64::new(0), Instant::now());
    let load = |thread: usize| -> Result<(), Fault> {
        let mut slot = arena.write(Slot(u32::try_from(thread).expect("few threads")));
        while began.elapsed() < time {
            let expert = experts[next.fetch_add(1, Ordering::Relaxed) % experts.len()];
            let Some(blob) = loader.blob(expert) else { break };
            fetch.read(expert, &blob, &mut slot)?;
            bytes.fetch_add(slot.len() as u64, Ordering::Relaxed);
        }
        Ok(())
    };
    let load = &load;
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|thread| scope.spawn(move || load(thread))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().expect("it does not panic"))
    })?;
    Ok(bytes.into_inner())
}
