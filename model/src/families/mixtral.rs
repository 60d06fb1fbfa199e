//! Mixtral: every layer a mixture, weights of the selected normalised.

use super::{DEFAULTS, Defaults};
use crate::arch::{Arch, Moe};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "mixtral", Defaults { theta: 1e6, eps: 1e-5, ..DEFAULTS })?;
    let window = config.optional_count("sliding_window")?.filter(|&window| window > 0);
    for layer in &mut arch.layers {
        layer.window = window;
    }
    let (experts, width) = (super::experts(config)?, config.size("intermediate_size")?);
    arch.moe = Some(Moe {
        normalise: true,
        routers: &["block_sparse_moe.gate", "mlp.gate"],
        ..super::mixture(experts, config.size("num_experts_per_tok")?, width, super::BLOCK_SPARSE_EXPERTS)
    });
    Ok(arch)
}
