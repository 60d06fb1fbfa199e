//! Llama: dense; the control without experts.

use super::DEFAULTS;
use crate::arch::Arch;
use crate::checkpoint::CheckpointError;
use crate::checkpoint::config::Config;

pub(super) fn read(config: &Config<'_>) -> Result<Arch, CheckpointError> {
    let mut arch = super::common(config, "llama", DEFAULTS)?;
    if config.flag_or("mlp_bias", false)? {
        return Err(config.unsupported("mlp_bias", "true", "only blocks without bias are computed"));
    }
    let bias = config.flag_or("attention_bias", false)?;
    (arch.attention.qkv_bias, arch.attention.o_bias) = (bias, bias);
    let width = config.size("intermediate_size")?;
    for layer in &mut arch.layers {
        layer.dense = Some(width);
    }
    Ok(arch)
}
