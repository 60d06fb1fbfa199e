//! `lite-llm rank`: the process of one node of a cluster.

use crate::exit::Exit;
use crate::terminal::tell;
use anyhow::Context;
use clap::Args;
use lite_llm_core::cluster::membership::{Member, NodeId};
use lite_llm_core::config::Config;
use lite_llm_core::ids::Incarnation;
use lite_llm_hw::cluster::{RankOptions, rank};
use lite_llm_hw::cold::Io;
use lite_llm_hw::net::Key;
use lite_llm_hw::node::Computer;
use lite_llm_model::kernels::{DType, Isa};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// What all nodes of a cluster are started with.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NodeSettings {
    /// The checkpoint.
    pub(crate) model: PathBuf,
    pub(crate) config: Config,
    pub(crate) threads: usize,
    /// Whether portable code is to be used.
    pub(crate) scalar: bool,
    pub(crate) kv_type: KvName,
    #[serde(default)]
    pub(crate) io: Option<Io>,
    pub(crate) drift_per_mille: u32,
    /// How many nodes share the memory of the supervisor's machine.
    pub(crate) here: u32,
    /// How long a GPU may make no progress, if nodes compute on GPUs.
    #[serde(default)]
    pub(crate) gpu_patience: Option<Duration>,
    /// Which GPU all nodes have, if they do not take turns.
    #[serde(default)]
    pub(crate) gpu_number: Option<u32>,
}

#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum KvName {
    F32,
    Bf16,
    F16,
}

impl From<DType> for KvName {
    fn from(dtype: DType) -> Self {
        match dtype {
            DType::F32 => Self::F32,
            DType::Bf16 => Self::Bf16,
            DType::F16 => Self::F16,
        }
    }
}

impl From<KvName> for DType {
    fn from(name: KvName) -> Self {
        match name {
            KvName::F32 => Self::F32,
            KvName::Bf16 => Self::Bf16,
            KvName::F16 => Self::F16,
        }
    }
}

impl NodeSettings {
    pub(crate) fn read(path: &Path) -> anyhow::Result<Self> {
        let cannot = || format!("cannot read the settings of the nodes in {}", path.display());
        let text = std::fs::read_to_string(path).with_context(cannot)?;
        serde_json::from_str(&text).with_context(cannot)
    }
}

#[derive(Debug, Args)]
pub(crate) struct RankArgs {
    /// Which node
    #[arg(long, value_name = "N")]
    node: u32,
    /// Which life of it
    #[arg(long, value_name = "N")]
    incarnation: u64,
    /// Where the supervisor listens
    #[arg(long, value_name = "ADDR")]
    join: SocketAddr,
    /// Where to listen
    #[arg(long, value_name = "ADDR")]
    listen: SocketAddr,
    /// The node's directory
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// What all nodes are started with
    #[arg(long, value_name = "FILE")]
    settings: PathBuf,
    /// The key that all processes of the cluster share
    #[arg(long, value_name = "FILE")]
    key_file: PathBuf,
}

impl RankArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        let settings = NodeSettings::read(&self.settings)?;
        let NodeSettings { model, config, threads, scalar, kv_type, io, drift_per_mille, .. } = settings;
        let NodeSettings { gpu_patience, gpu_number: number, .. } = settings;
        rank::run(RankOptions {
            model_dir: model,
            state_dir: self.state,
            config,
            threads,
            isa: if scalar { Isa::Scalar } else { Isa::detect() },
            kv_dtype: kv_type.into(),
            computer: gpu_patience.map_or(Computer::Cpu, |patience| Computer::Cuda { number, patience }),
            io,
            member: Member { node: NodeId(self.node), incarnation: Incarnation(self.incarnation) },
            drift_per_mille,
            supervisor: self.join,
            listen: self.listen,
            key: Key::of_file(&self.key_file)?,
            say: |line| tell!("{line}"),
        })?;
        Ok(Exit::Ok)
    }
}
