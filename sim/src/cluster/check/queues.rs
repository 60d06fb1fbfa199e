//! Whatever waits, waits within limits.

use super::Checker;
use crate::cluster::watch::Fact;

/// More than this never waits at a node.
const THINGS_MAX: usize = 20_000;

/// Queues are bounded.
#[derive(Debug)]
pub struct QueuesBounded;

impl Checker for QueuesBounded {
    fn name(&self) -> &'static str {
        "queues-bounded"
    }

    fn see(&mut self, fact: &Fact<'_>) -> Result<(), String> {
        match fact {
            Fact::Queued { node, things } if *things > THINGS_MAX => {
                Err(format!("{things} things wait at {node}"))
            }
            Fact::Exited { node, code: 0, left } if *left > 0 => {
                Err(format!("{node} has stopped, and still held {left} things"))
            }
            _ => Ok(()),
        }
    }
}
