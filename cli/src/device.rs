//! What computes: the CPU, or a GPU.

use crate::quantity::duration;
use crate::settings::Settings;
use clap::Args;
use lite_llm_hw::cuda::PATIENCE;
use lite_llm_hw::node::Computer;
use std::fmt;
use std::time::Duration;

/// A device by its name in flags.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum DeviceName {
    /// `cpu`
    #[default]
    Cpu,
    /// `cuda` or `cuda:N`
    Cuda(Option<u32>),
}

impl DeviceName {
    /// As a flag has it.
    pub(crate) fn parse(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "{text:?} is no device: give cpu, cuda, or cuda:N with the number of a GPU, which doctor --device cuda says"
            )
        };
        match text.split_once(':') {
            None if text == "cpu" => Ok(Self::Cpu),
            None if text == "cuda" => Ok(Self::Cuda(None)),
            // No sign, which a number might have.
            Some(("cuda", number)) if number.bytes().all(|byte| byte.is_ascii_digit()) => {
                number.parse().map(|number| Self::Cuda(Some(number))).map_err(|_| wrong())
            }
            _ => Err(wrong()),
        }
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => write!(f, "cpu"),
            Self::Cuda(None) => write!(f, "cuda"),
            Self::Cuda(Some(number)) => write!(f, "cuda:{number}"),
        }
    }
}

/// What computes a model.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Runtime")]
pub(crate) struct DeviceArgs {
    /// What computes: cpu, or a GPU, not yet tried on one: cuda:N, or cuda for the first (of nodes each has the next). It changes no bit
    #[arg(long, value_name = "DEVICE", value_parser = DeviceName::parse, default_value_t)]
    pub(crate) device: DeviceName,
    /// How long a GPU may make no progress before it is given up [default: 30s]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub(crate) device_patience: Option<Duration>,
}

impl DeviceArgs {
    /// Decides what computes. Memory that nobody has said is then the GPU's.
    pub(crate) fn settle(&self, settings: &mut Settings) {
        if let DeviceName::Cuda(number) = self.device {
            let patience = self.device_patience.unwrap_or(PATIENCE);
            settings.computer = Computer::Cuda { number, patience };
            if !settings.memory_is_given {
                settings.config.memory_bytes = u64::MAX;
            }
        }
    }
}
