//! Mixtral: every layer a mixture, weights of the selected normalised.

use crate::arch::{Arch, Moe, MoeNames};
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

/// `w1` is the gate, `w3` the up, `w2` the down projection.
const NAMES: MoeNames = MoeNames { block: "block_sparse_moe", router: "gate", expert: ["w1", "w3", "w2"] };

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "mixtral")?;
    let window = config.optional_count("sliding_window")?.filter(|&window| window > 0);
    for layer in &mut arch.layers {
        layer.window = window;
    }
    arch.moe = Some(Moe {
        experts: config.size("num_local_experts")?,
        top_k: config.size("num_experts_per_tok")?,
        intermediate: config.size("intermediate_size")?,
        normalise: true,
        group_limit: None,
        tiered: None,
        shared: None,
        names: NAMES,
    });
    Ok(arch)
}
