//! What computes: the CPU, or a GPU.

use crate::quantity::duration;
use crate::settings::Settings;
use clap::{Args, ValueEnum};
use lite_llm_hw::cuda::PATIENCE;
use lite_llm_hw::node::Computer;
use std::time::Duration;

/// A device by its name in flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum DeviceName {
    #[default]
    Cpu,
    Cuda,
}

/// What computes a model.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Runtime")]
pub(crate) struct DeviceArgs {
    /// What computes; cuda is the first GPU of the CUDA driver, and has not yet been tried on one. The choice changes no bit
    #[arg(long, value_enum, default_value_t)]
    pub(crate) device: DeviceName,
    /// How long a GPU may make no progress before it is given up [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) device_patience: Option<Duration>,
}

impl DeviceArgs {
    /// Decides what computes. Memory that nobody has said is then the GPU's.
    pub(crate) fn settle(&self, settings: &mut Settings) {
        if self.device == DeviceName::Cuda {
            let patience = self.device_patience.unwrap_or(PATIENCE);
            settings.computer = Computer::Cuda { patience };
            if !settings.memory_is_given {
                settings.config.memory_bytes = u64::MAX;
            }
        }
    }
}
