//! Who is in a cluster's world. Node n is actor n; then come the supervisor, the clients and the operator.

use crate::cluster::clients::ClientsActor;
use crate::cluster::message::Said;
use crate::cluster::node::NodeActor;
use crate::cluster::operator::OperatorActor;
use crate::cluster::supervisor::SupervisorActor;
use crate::world::{Actor, Context, Happening};

/// An actor of a cluster.
#[derive(Debug)]
pub enum Cast {
    /// A node.
    Node(Box<NodeActor>),
    /// The supervisor.
    Supervisor(Box<SupervisorActor>),
    /// All clients.
    Clients(Box<ClientsActor>),
    /// The operator.
    Operator(Box<OperatorActor>),
}

impl Actor for Cast {
    type Message = Said;

    fn handle(&mut self, cx: &mut Context<'_, Said>, happening: Happening<Said>) {
        match self {
            Self::Node(node) => node.handle(cx, happening),
            Self::Supervisor(supervisor) => supervisor.handle(cx, happening),
            Self::Clients(clients) => clients.handle(cx, happening),
            Self::Operator(operator) => operator.handle(cx, happening),
        }
    }

    fn died(&mut self, cx: &mut Context<'_, Said>) {
        match self {
            Self::Node(node) => node.died(),
            Self::Supervisor(supervisor) => {
                let me = cx.me();
                supervisor.died(cx, me);
            }
            Self::Clients(_) | Self::Operator(_) => {}
        }
    }
}
