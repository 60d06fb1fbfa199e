//! Whether the nodes of a cluster could compute on the devices of this machine: asked once, by whoever starts them.

use super::CudaError;
use super::cache::Cache;
use super::driver::{self, Device};
use super::model::sizes::Sizes;
use super::nvrtc::Nvrtc;
use lite_llm_core::config::Limits;
use lite_llm_model::Model;

/// Looks for driver and devices, has kernels compiled for those that nodes will have, so that these find them in the cache, and
/// refuses a model that the kernels do not know. Nodes have devices in turn, or all of them the one of a number. Gives the bytes that a
/// node may take of its device if nobody says otherwise: seven eighths, shared with the others that have it; nothing if there are no
/// nodes here.
///
/// # Errors
/// Why they could not.
pub fn ready(
    model: &Model,
    limits: &Limits,
    nodes: u32,
    number: Option<u32>,
) -> Result<Option<u64>, CudaError> {
    Sizes::of(model, limits.step_positions_max, limits.rows_max)?;
    if nodes == 0 {
        return Ok(None);
    }
    let found = driver::find()?;
    let devices: Vec<&Device> = match number {
        Some(number) => vec![found.device(number)?],
        None => found.devices.iter().collect(),
    };
    let (count, nvrtc, cache) = (devices.len().max(1), Nvrtc::find()?, Cache::of_user());
    let mut least = u64::MAX;
    for (number, device) in devices.into_iter().enumerate().take(nodes as usize) {
        cache.kernels(&nvrtc, nvrtc.target(device.capability)?)?;
        let sharers = (nodes as usize - number).div_ceil(count) as u64;
        least = least.min(device.memory_bytes / 8 * 7 / sharers);
    }
    Ok(Some(least))
}
