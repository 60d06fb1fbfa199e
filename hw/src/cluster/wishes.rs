//! What the operator wishes of replicas: asked of whoever leads, again and under the same name, until it is answered. So it is
//! done once, whoever dies in between.

use super::head::Reply;
use lite_llm_core::cluster::membership::{Epoch, NodeId};
use lite_llm_core::ids::WishId;
use lite_llm_core::input::{Input, Wish};
use lite_llm_core::output::{Granted, Output, Refusal};
use std::collections::BTreeMap;
use std::hash::{BuildHasher, RandomState};
use std::time::{Duration, Instant};

/// How long nothing may come of a wish before it is asked for again; doubles, because each time is a record of the log.
const SILENCE_MIN: Duration = Duration::from_secs(2);
const SILENCE_MAX: Duration = Duration::from_secs(64);
/// Pause after somebody could not take it.
const PAUSE: Duration = Duration::from_millis(100);
/// Wishes at once.
const OPEN_MAX: usize = 64;

/// A wish that somebody waits for.
#[derive(Debug)]
struct Open {
    replica: u32,
    wish: Wish,
    reply: Reply<Granted>,
    /// In which epoch it was asked for last.
    asked: Option<Epoch>,
    /// When to ask again, and how long to wait then.
    again: Instant,
    silence: Duration,
}

/// All wishes that are not answered.
#[derive(Debug)]
pub(super) struct Wishes {
    open: BTreeMap<WishId, Open>,
    /// The last name. It begins anywhere, so that two lives of a head do not name two wishes the same.
    last: u64,
}

impl Default for Wishes {
    fn default() -> Self {
        Self { open: BTreeMap::new(), last: RandomState::new().hash_one(std::process::id()) }
    }
}

impl Wishes {
    /// Somebody wishes something of a replica.
    pub(super) fn add(&mut self, replica: u32, wish: Wish, reply: Reply<Granted>) {
        if self.open.len() >= OPEN_MAX {
            return reply.send(Err("too many wishes wait; ask again when one is answered".into()));
        }
        self.last = self.last.wrapping_add(1);
        let open = Open { replica, wish, reply, asked: None, again: Instant::now(), silence: SILENCE_MIN };
        self.open.insert(WishId(self.last), open);
    }

    /// What is to be asked now, and of whom: `leader` says who leads a replica.
    pub(super) fn due(
        &mut self,
        leader: impl Fn(u32) -> Option<(Epoch, NodeId)>,
    ) -> Vec<(NodeId, u32, Input)> {
        let now = Instant::now();
        let mut due = Vec::new();
        self.open.retain(|_, open| open.reply.is_awaited());
        for (&id, open) in &mut self.open {
            let Some((epoch, node)) = leader(open.replica) else { continue };
            if open.asked == Some(epoch) && open.again > now {
                continue;
            }
            if open.asked != Some(epoch) {
                open.silence = SILENCE_MIN;
            }
            open.asked = Some(epoch);
            open.again = now + open.silence;
            open.silence = (2 * open.silence).min(SILENCE_MAX);
            due.push((node, open.replica, Input::Wish { id, wish: open.wish.clone() }));
        }
        due
    }

    /// When something is due if nothing happens.
    pub(super) fn again(&self) -> Option<Instant> {
        self.open.values().map(|open| open.again).min()
    }

    /// A node could not take it.
    pub(super) fn refused(&mut self, input: &Input) {
        if let Input::Wish { id, .. } = input
            && let Some(open) = self.open.get_mut(id)
        {
            open.again = Instant::now() + PAUSE;
        }
    }

    /// A leader tells what came of a wish.
    pub(super) fn tell(&mut self, output: &Output) {
        let Output::Answered { id, outcome, .. } = output else { return };
        let Some(open) = self.open.get_mut(id) else { return };
        if matches!(outcome, Err((Refusal::NotServing, _))) {
            open.again = Instant::now() + PAUSE;
            return;
        }
        let open = self.open.remove(id).expect("it was there");
        open.reply.send(outcome.clone().map_err(|(_, reason)| reason));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::super::head::Answer;
    use super::*;
    use lite_llm_core::ids::{Generation, Seq};

    fn named(due: &[(NodeId, u32, Input)]) -> Vec<(u32, WishId)> {
        due.iter()
            .map(|(node, _, input)| match input {
                Input::Wish { id, .. } => (node.0, *id),
                other => panic!("{other:?} is no wish"),
            })
            .collect()
    }

    #[test]
    fn a_wish_is_asked_of_each_leader_under_one_name_until_it_is_answered() {
        let mut wishes = Wishes::default();
        let (reply, answer) = Answer::new();
        wishes.add(1, Wish::Snapshot, reply);
        let leads = |epoch, node| move |replica| (replica == 1).then_some((Epoch(epoch), NodeId(node)));
        assert!(wishes.due(|_| None).is_empty(), "nobody leads");
        let first = named(&wishes.due(leads(1, 0)));
        let id = first[0].1;
        assert_eq!(first, [(0, id)]);
        assert!(wishes.due(leads(1, 0)).is_empty(), "it is under way");
        assert_eq!(named(&wishes.due(leads(2, 3))), [(3, id)], "another leader may not know of it");
        let told = |outcome| Output::Answered { id, outcome, after: Seq(1) };
        wishes.tell(&told(Err((Refusal::NotServing, "not ready".into()))));
        std::thread::sleep(PAUSE);
        assert_eq!(named(&wishes.due(leads(2, 3))), [(3, id)], "it serves later");
        wishes.tell(&told(Ok(Granted::Switched(Generation(4)))));
        assert_eq!(answer.recv_timeout(PAUSE), Ok(Ok(Granted::Switched(Generation(4)))));
        assert!(wishes.due(leads(3, 0)).is_empty() && wishes.again().is_none());
    }

    #[test]
    fn what_nobody_waits_for_is_not_asked_for_again_and_too_much_is_refused() {
        let mut wishes = Wishes::default();
        let answers: Vec<Answer<Granted>> = (0..=OPEN_MAX)
            .map(|_| {
                let (reply, answer) = Answer::new();
                wishes.add(0, Wish::Snapshot, reply);
                answer
            })
            .collect();
        assert!(answers[OPEN_MAX].recv_timeout(PAUSE).unwrap().unwrap_err().contains("too many wishes"));
        drop(answers);
        assert!(wishes.due(|_| Some((Epoch(1), NodeId(0)))).is_empty());
    }
}
