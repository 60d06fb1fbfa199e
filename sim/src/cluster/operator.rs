//! The operator of a simulated cluster: switches tiers, wants snapshots, drains, restarts and upgrades at bad moments; mends
//! what was given up when asked to. What he wishes of a replica he asks for until it is answered, and once more now and then.

use super::luck::Luck;
use super::message::Said;
use super::node::Common;
use crate::chronicle::What;
use crate::hazard::Hazard;
use crate::mark::Mark;
use crate::world::{Context, Happening};
use lite_llm_core::LOGIC_VERSION;
use lite_llm_core::cluster::membership::NodeId;
use lite_llm_core::cluster::supervisor::SupervisorInput;
use lite_llm_core::ids::WishId;
use lite_llm_core::input::{Input, SwitchTarget, Wish};
use lite_llm_core::output::{Output, Refusal};
use std::collections::BTreeMap;
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
    /// Wishes that are not answered: of which replica, and what.
    open: BTreeMap<WishId, (u32, Wish)>,
    /// The last that was.
    answered: Option<(WishId, (u32, Wish))>,
    /// The last name of a wish.
    last: u64,
}

impl OperatorActor {
    /// An operator of so many nodes.
    #[must_use]
    pub fn new(common: Rc<Common>, nodes: u32) -> Self {
        Self { common, nodes, luck: Luck::default(), open: BTreeMap::new(), answered: None, last: 0 }
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
            Happening::Message { message: Said::Tell(output), .. } => self.told(*output),
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
            self.wish_of(replica, Wish::Switch { target, at: None });
            // He is not sure of the last one.
            self.open.extend(self.answered.clone());
        }
        if let Some(value) = self.luck.befalls(cx, Hazard::OperatorSnapshot) {
            let replica = u32::try_from(value % u64::from(self.common.config.topology.data)).expect("few");
            self.wish_of(replica, Wish::Snapshot);
        }
        self.ask(cx);
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

    /// Whether every wish was answered.
    #[must_use]
    pub fn is_answered(&self) -> bool {
        self.open.is_empty()
    }

    fn wish_of(&mut self, replica: u32, wish: Wish) {
        self.last += 1;
        self.open.insert(WishId(self.last), (replica, wish));
    }

    /// Asks everybody: only the leader takes it.
    fn ask(&self, cx: &mut Context<'_, Said>) {
        for (&id, (replica, wish)) in &self.open {
            for node in 0..self.nodes {
                let input = Box::new(Input::Wish { id, wish: wish.clone() });
                cx.send(node, Said::Ask { replica: *replica, input });
            }
        }
    }

    /// A leader tells what came of a wish.
    fn told(&mut self, output: Output) {
        let Output::Answered { id, outcome, .. } = output else { return };
        if matches!(outcome, Err((Refusal::NotServing, _))) {
            return;
        }
        if let Some(wish) = self.open.remove(&id) {
            if self.answered.as_ref().is_some_and(|(answered, _)| *answered == id) {
                self.common.watch.mark(Mark::WishAgain);
            }
            self.answered = Some((id, wish));
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
