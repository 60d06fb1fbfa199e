//! `lite-llm node`: a node on this machine for a cluster whose supervisor is on another.

use crate::commands::cluster::rank_command;
use crate::commands::rank::NodeSettings;
use crate::exit::Exit;
use crate::terminal::tell;
use anyhow::Context;
use clap::Args;
use lite_llm_core::cluster::membership::{Member, NodeId};
use lite_llm_hw::cluster::{AgentOptions, agent};
use lite_llm_hw::net::Key;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

#[derive(Debug, Args)]
pub(crate) struct NodeArgs {
    /// The checkpoint, the same as the supervisor's
    model: PathBuf,
    /// Where the supervisor listens
    #[arg(long, value_name = "ADDR")]
    join: SocketAddr,
    /// The key that all processes of the cluster share: a copy of the supervisor's
    #[arg(long, value_name = "FILE")]
    key_file: PathBuf,
    /// Where this node keeps its journal
    #[arg(long, value_name = "DIR")]
    state: PathBuf,
    /// The address of this machine at which the others reach it; that from which it reaches the supervisor if left out
    #[arg(long, value_name = "IP")]
    listen: Option<IpAddr>,
}

impl NodeArgs {
    pub(crate) fn run(self) -> anyhow::Result<Exit> {
        anyhow::ensure!(
            self.key_file.exists(),
            "there is no key file {}: copy the one that the supervisor uses",
            self.key_file.display()
        );
        let key = Key::of_file(&self.key_file)?;
        let model =
            self.model.canonicalize().with_context(|| format!("no checkpoint {}", self.model.display()))?;
        let listen = match self.listen {
            Some(ip) => ip,
            None => {
                own_address(self.join).context("cannot tell this machine's address; give it with --listen")?
            }
        };
        let over = Arc::new(AtomicBool::new(false));
        for signal in [SIGTERM, SIGINT] {
            signal_hook::flag::register(signal, Arc::clone(&over)).context("cannot listen for signals")?;
        }
        let program = std::env::current_exe().context("cannot find this program")?;
        let key_file = self.key_file.canonicalize().context("the key file is gone")?;
        let command = move |member: Member, at: SocketAddr, settings: &str, dir: &Path| {
            let mut settings: NodeSettings = serde_json::from_str(settings).map_err(std::io::Error::other)?;
            settings.model.clone_from(&model);
            let path = dir.join("settings.json");
            std::fs::write(&path, serde_json::to_string_pretty(&settings).map_err(std::io::Error::other)?)?;
            Ok(rank_command(&program, member, at, listen, (dir, &path, &key_file)))
        };
        let supervisor = self.join;
        agent::run(AgentOptions {
            state_dir: self.state,
            supervisor,
            listen: SocketAddr::new(listen, 0),
            key,
            command: Box::new(command),
            on_joined: Box::new(move |node: NodeId| tell!("this is {node} of the cluster at {supervisor}")),
            over,
        })?;
        Ok(Exit::Ok)
    }
}

/// The address from which packets go to another: nothing is sent.
fn own_address(to: SocketAddr) -> std::io::Result<IpAddr> {
    let any: SocketAddr = if to.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(to)?;
    Ok(socket.local_addr()?.ip())
}
