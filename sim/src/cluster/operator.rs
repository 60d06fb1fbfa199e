//! The operator of a simulated cluster: switches tiers, drains, restarts and upgrades at bad moments; mends what was
//! given up when asked to.

use super::luck::Luck;
use super::message::Said;
use super::node::Common;
use crate::chronicle::What;
use crate::hazard::Hazard;
use crate::world::{Context, Happening};
use lite_llm_core::LOGIC_VERSION;
use lite_llm_core::cluster::membership::NodeId;
use lite_llm_core::cluster::supervisor::SupervisorInput;
use lite_llm_core::input::{Input, SwitchTarget};
use std::rc::Rc;

/// How often it looks for something to do.
const LOOK_NS: u64 = 250_000_000;
/// Tokens of wakes: to look, and, above it, to take an upgrade of a node back.
const LOOK: u64 = 0;

/// The operator.
#[derive(Debug)]
pub struct OperatorActor {
    common: Rc<Common>,
    nodes: u32,
    luck: Luck,
}

impl OperatorActor {
    /// An operator of so many nodes.
    #[must_use]
    pub fn new(common: Rc<Common>, nodes: u32) -> Self {
        Self { common, nodes, luck: Luck::default() }
    }

    /// Deals with what happened.
    pub fn handle(&mut self, cx: &mut Context<'_, Said>, happening: Happening<Said>) {
        match happening {
            Happening::Started { .. } => cx.wake_in(LOOK_NS, LOOK),
            Happening::Woken { token: LOOK } => {
                self.look(cx);
                cx.wake_in(LOOK_NS, LOOK);
            }
            Happening::Woken { token } => {
                let node = u32::try_from(token - 1).expect("a node");
                self.install(cx, node, LOGIC_VERSION);
            }
            Happening::Message { .. } | Happening::Tampered { .. } | Happening::Ended { .. } => {}
        }
    }

    fn look(&mut self, cx: &mut Context<'_, Said>) {
        if let Some(value) = self.luck.befalls(cx, Hazard::OperatorSwitch) {
            let target = match value % 5 {
                0 => SwitchTarget::Tiers(vec!["large".into()]),
                1 => SwitchTarget::Tiers(vec!["small".into()]),
                2 => SwitchTarget::Mode("fast".into()),
                3 => SwitchTarget::Mode("max".into()),
                _ => SwitchTarget::Budget(value % 2_000_000),
            };
            let replica =
                u32::try_from((value >> 8) % u64::from(self.common.config.topology.data)).expect("few");
            // Only the leader takes it.
            for node in 0..self.nodes {
                let input = Box::new(Input::Switch { target: target.clone(), at: None });
                cx.send(node, Said::Ask { replica, input });
            }
        }
        if let Some(value) = self.luck.befalls(cx, Hazard::OperatorDrain) {
            let bound_ns = (value % 2 == 0).then_some(value % 5_000_000_000);
            self.wish(cx, SupervisorInput::Drain { bound_ns });
        }
        if let Some(value) = self.luck.befalls(cx, Hazard::OperatorRestart) {
            let node = NodeId(self.some_node(value));
            self.wish(cx, SupervisorInput::Restart { node });
        }
        if let Some(value) = self.luck.befalls(cx, Hazard::OperatorUpgrade) {
            let node = self.some_node(value);
            self.install(cx, node, LOGIC_VERSION + 1);
            cx.wake_in(1_000_000_000 + value % 5_000_000_000, 1 + u64::from(node));
        }
    }

    fn some_node(&self, value: u64) -> u32 {
        u32::try_from((value >> 16) % u64::from(self.nodes)).expect("a node")
    }

    /// Installs a version on a node and has it begin a new life.
    fn install(&self, cx: &mut Context<'_, Said>, node: u32, version: u32) {
        cx.note(|| What::Note(format!("version {version} is installed on node {node}")));
        self.common.installed[node as usize].set(version);
        self.wish(cx, SupervisorInput::Restart { node: NodeId(node) });
    }

    fn wish(&self, cx: &mut Context<'_, Said>, input: SupervisorInput) {
        cx.send(self.common.supervisor, Said::Wish(Box::new(input)));
    }
}
